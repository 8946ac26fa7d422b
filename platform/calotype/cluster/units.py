"""Units of a `map` on their way: which is handed out next, and the actors that come and go."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from calotype.config import Cluster
from calotype.environment import Held
from calotype.errors import CalotypeError

Unit = TypeVar("Unit")

AGAIN = 2.0  # seconds until a unit that another job has is handed out again
PLACED = 60.0  # seconds without any worker after which that is said
REST = 1.0  # seconds before another actor is asked for, after one that did not start; doubled by each further one
LONGEST_REST = 60.0
ANSWER = 2.0  # seconds that an idle worker has to say that it lives

log = logging.getLogger(__name__)


@dataclass
class Watch:
    """Of a unit that another job has: the sign of that, when it was last looked at, seconds that it stood still."""

    held: Held
    looked: float
    still: float = 0.0

    def now(self) -> float:
        """Seconds that the sign will have stood still if it still does.

        Between two looks at most a third of the patience: if they are far apart, the store may have been away for the
        other job as long as for this one.
        """
        return self.still + min(time.monotonic() - self.looked, self.held.patience / 3)


class Waiting(Generic[Unit]):
    """Units that nobody here has in hand: first those that nobody elsewhere has either.

    Attributes:
        undone: units without a result, also those in hand.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._free = deque(range(len(units)))
        self._held: deque[tuple[float, int]] = deque()  # (when it is due, index), in this order
        self._watched: dict[int, Watch] = {}
        self._deaths: dict[int, int] = {}
        self._said = False
        self.undone = len(units)

    def next(self) -> tuple[int, tuple[Unit] | tuple[Unit, bytes]] | None:
        """Index and what is handed out: the unit, with the sign of one that is dead if such a one had it."""
        if self._free:
            index = self._free.popleft()
        elif self._held and self._held[0][0] <= time.monotonic():
            index = self._held.popleft()[1]
        else:
            return None
        unit, watch = self._units[index], self._watched.get(index)
        if watch is None or watch.now() < watch.held.patience:
            return index, (unit,)
        return index, (unit, watch.held.sign)

    def due(self) -> float:
        """Seconds until one that another job has is handed out again."""
        return max(self._held[0][0] - time.monotonic(), 0.0) if self._held else AGAIN

    def done(self, index: int) -> None:
        self._watched.pop(index, None)
        self._deaths.pop(index, None)
        self.undone -= 1

    def died(self, index: int) -> int:
        """Its worker died, as so many before on this unit."""
        self._free.appendleft(index)
        self._deaths[index] = self._deaths.get(index, 0) + 1
        return self._deaths[index]

    def held(self, index: int, held: Held) -> None:
        """Another job has it."""
        now, watch = time.monotonic(), self._watched.get(index)
        still = watch.now() if watch is not None and watch.held.sign == held.sign else 0.0
        self._watched[index] = Watch(held, now, still)
        self._held.append((now + AGAIN, index))
        if len(self._held) == self.undone and not self._said:
            self._said = True
            log.info("another job is making all that is left (%d): waits for it", self.undone)


class Actors:
    """Workers of a `map`, as many as there is room for: asked for, started, then given one unit after another.

    Attributes:
        idle: (rank, actor).
        busy: future -> (rank, actor, index of its unit).
    """

    def __init__(self, start: Callable[[int], Any], count: int, cluster: Cluster, retries: int) -> None:
        self._start, self._cluster, self._retries = start, cluster, retries
        self._ranks = deque(range(count))
        self._coming: dict[Any, tuple[int, Any]] = {}  # future -> (rank, actor)
        self.idle: list[tuple[int, Any]] = []
        self.busy: dict[Any, tuple[int, Any, int]] = {}
        self._failed, self._rest = 0, 0.0  # starts in a row; no other before this time
        self._worked, self._said = time.monotonic(), False  # when there last was a worker

    def ask(self, wanted: int) -> None:
        """See that there are so many, started or coming."""
        missing = wanted - len(self._coming) - len(self.idle) - len(self.busy)
        for _ in range(missing if time.monotonic() >= self._rest else 0):
            rank = self._ranks.popleft()
            actor = self._start(rank)
            self._coming[actor.ready.remote()] = (rank, actor)

    def hand(self, index: int, unit: tuple[Any, ...]) -> None:
        """Give a unit to one that is idle."""
        rank, actor = self.idle.pop()
        self.busy[actor.work.remote(*unit)] = (rank, actor, index)

    def wait(self, seconds: float) -> tuple[int, Any, str] | None:
        """A unit that ended: its index, what was made of it, or why its worker died; None if none did so soon.

        Raises:
            RayTaskError: what the unit raised.
            CalotypeError: no actor starts.
        """
        import ray

        self._say_if_alone()
        if not (futures := [*self._coming, *self.busy]):
            time.sleep(seconds)
            return None
        ready, _ = ray.wait(futures, timeout=seconds)
        if not ready:
            return None
        (future,) = ready
        begun = future in self.busy
        rank, actor, index = self.busy.pop(future) if begun else (*self._coming.pop(future), -1)
        try:
            made = ray.get(future)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            ray.kill(actor)  # it may live where nobody can reach it
            self._ranks.appendleft(rank)
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if begun:
                self._drop_dead()
                return index, None, why
            self._failed_to_start(why)
            return None
        self.idle.append((rank, actor))
        if begun:
            return index, made, ""
        self._failed = 0
        return None

    def _drop_dead(self) -> None:
        """With a machine many workers die at once: those that were idle are not handed units, which would be blamed."""
        import ray

        asked = {actor.ready.remote(): (rank, actor) for rank, actor in self.idle}
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)[0] if asked else []
        for future in answered:
            try:
                ray.get(future)
            except ray.exceptions.RayError:
                self.idle.remove(asked[future])
                self._ranks.append(asked[future][0])

    def kill(self) -> None:
        import ray

        held = [actor for _, actor, _ in self.busy.values()] + [actor for _, actor in self._coming.values()]
        for actor in held + [actor for _, actor in self.idle]:
            ray.kill(actor)

    def _failed_to_start(self, why: str) -> None:
        self._failed += 1
        if self._failed > self._retries and not self.busy and not self.idle:
            raise CalotypeError(f"no worker starts; {self._failed} died before they had a unit: {why}")
        self._rest = time.monotonic() + min(REST * 2 ** (self._failed - 1), LONGEST_REST)

    def _say_if_alone(self) -> None:
        if self.busy or self.idle:
            self._worked = time.monotonic()
        elif time.monotonic() - self._worked > PLACED and not self._said:
            self._said = True
            each = self._cluster
            log.warning(
                "no worker has started for %.0f s: no machine has room yet for one of cluster.workers=%d with "
                "cluster.cpus=%d and cluster.gpus=%g; waits for it",
                *(PLACED, each.most, each.cpus, each.gpus),
            )
