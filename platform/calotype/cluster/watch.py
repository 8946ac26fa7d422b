"""Signs of life of a training's ranks, the watch that finds a hang by them, and how hung ranks are ended.

A rank's loop sets a few attributes at each step (`Pulse`); a thread of the rank puts them into the cluster's key-value
store; the driver reads them there.  It takes two kinds of silence for a hang: a process whose thread says nothing (it
was stopped), and ranks of which none gets any further (one never comes to a collective, the others wait in it).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from calotype.environment import START, STEP

log = logging.getLogger(__name__)

DONE = "is done"
LONGER = 10  # what is no step (start, compilation, validation, drawing, saving, the end) may take so many times as long
BEAT = 1.0  # seconds between two signs of life
DUMP = 20.0  # seconds that py-spy has for one process


@dataclass
class Pulse:
    """What a rank is at.  Written by its loop, so a call costs less than a microsecond."""

    phase: str = START
    began: int = -1
    images: int = -1
    count: int = 0

    def __call__(self, phase: str, images: int) -> None:
        self.phase, self.images = phase, images
        self.began = self.began if self.count else images
        self.count += 1


@dataclass(frozen=True)
class Sign:
    """One sign of life.

    Attributes:
        ticks: of the thread that sends it.
        count, phase, began, images: of the loop; images, and those that it began at, are -1 before it runs.
        kills: processes of its machine that the kernel has ended for want of memory so far (nodes.py).
    """

    rank: int
    node: str
    pid: int
    ticks: int
    count: int
    phase: str
    began: int
    images: int
    kills: int = 0

    def packed(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass
class Watch:
    """The driver's view of one attempt.

    Args:
        read: rank -> its last sign, packed, or None.
        seconds: without a step, that are a hang; 0 finds none.
    """

    read: Callable[[int], bytes | None]
    world: int
    seconds: float
    clock: Callable[[], float] = time.monotonic
    signs: dict[int, Sign] = field(default_factory=dict)
    began: int | None = None  # images when the ranks began to train
    low: int = 0  # images of the rank that is furthest
    pace: int = 0  # images between two signs of it
    _stuck: float = 0.0  # seconds since any rank got further
    _mute: dict[int, float] = field(default_factory=dict)  # rank -> seconds since its process said anything
    _looked: float = -1.0

    def look(self, last: bool = False) -> str:
        """Why the ranks count as hung, or ""; `last` reads once more what they said at their end."""
        now = self.clock()
        if self._looked >= 0 and now - self._looked < BEAT and not last:
            return ""
        # What was not looked at does not count: this process may have been stopped itself, or the store away.
        passed = min(now - self._looked, 3 * BEAT) if self._looked >= 0 else 0.0
        self._looked = now
        try:
            found = [self.read(rank) for rank in range(self.world)]
        except Exception:
            return ""
        self._stuck += passed
        for data in filter(None, found):
            self._take(Sign(**json.loads(data)), passed)
        return self._judge() if self.seconds and self.signs else ""

    def _take(self, sign: Sign, passed: float) -> None:
        before = self.signs.get(sign.rank)
        self.signs[sign.rank] = sign
        still = before is not None and before.ticks == sign.ticks
        self._mute[sign.rank] = self._mute.get(sign.rank, 0.0) + passed if still else 0.0
        if before is None or before.count != sign.count or before.phase != sign.phase:
            self._stuck = 0.0
        if sign.images >= 0:
            self.began = sign.began
            if sign.images > self.low:
                self.low, self.pace = sign.images, sign.images - max(self.low, sign.began)

    def _judge(self) -> str:
        living = {rank: sign for rank, sign in self.signs.items() if sign.phase != DONE}
        for rank, sign in sorted(living.items()):
            if self._mute[rank] > self.seconds * (LONGER if sign.phase == START else 1):
                return f"the process of rank {rank} has said nothing for {self._mute[rank]:.0f} s"
        stepping = len(self.signs) == self.world and all(sign.phase == STEP for sign in living.values())
        if living and self._stuck > self.seconds * (1 if stepping else LONGER):
            return f"no rank has got any further for {self._stuck:.0f} s (cluster.hang_seconds={self.seconds:g})"
        return ""

    def told(self) -> str:
        """Where every rank is."""
        return ", ".join(
            f"rank {rank} (pid {sign.pid}) {sign.phase} at {max(sign.images, 0):,} images and was last heard of "
            f"{self._mute[rank]:.0f} s ago"
            for rank, sign in sorted(self.signs.items())
        )


def ranks_of(signs: Iterable[Sign]) -> str:
    """In words."""
    ranks = sorted(sign.rank for sign in signs)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def end_hung(signs: Sequence[Sign]) -> None:
    """Write the stacks of those processes to the log and kill them, wherever they run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pids: dict[str, list[int]] = {}
    for sign in signs:
        pids.setdefault(sign.node, []).append(sign.pid)
    ranks = {(sign.node, sign.pid): sign.rank for sign in signs}
    asked = {}
    for node, there in pids.items():
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ray.remote(ended).options(num_cpus=0, scheduling_strategy=strategy).remote(there)] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=3 * DUMP)
    for reference in done:
        try:
            for pid, stacks in ray.get(reference).items():
                log.error("stacks of rank %d (pid %d):\n%s", ranks[asked[reference], pid], pid, stacks)
        except ray.exceptions.RayError as error:
            log.error("node %s does not say where its ranks hang: %s", asked[reference], error)
    for reference in late:  # Ray finds out by itself that a node is gone
        log.error("node %s does not say where its ranks hang", asked[reference])


def ended(pids: Sequence[int]) -> dict[int, str]:
    """On the node of those processes: their stacks, before they are killed."""
    with ThreadPoolExecutor(len(pids)) as pool:
        found = dict(zip(pids, pool.map(stacks, pids), strict=True))
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            found[pid] += "\n(it was gone)"
    return found


def stacks(pid: int) -> str:
    """The Python stacks of a process of this machine.  Where py-spy may not look, the process is asked itself."""
    tool = Path(sys.executable).with_name("py-spy")
    try:
        # Without pausing it: one that was stopped would not answer, and one that hangs does not move.
        command = [str(tool), "dump", "--nonblocking", "--pid", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, timeout=DUMP, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip()
    try:
        os.kill(pid, signal.SIGUSR1)  # `faulthandler` answers, to its stderr: see workers.py
    except ProcessLookupError:
        return "it was gone"
    time.sleep(2)  # for Ray to bring what it wrote to the driver's log
    return f"py-spy cannot look into it ({why}): its own log has them, unless it was stopped"
