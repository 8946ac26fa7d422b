"""Why the ranks of a training ended, and whether it goes on: retried for ever with backoff, or final."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from calotype.cluster.nodes import kills_by_node, lost
from calotype.cluster.watch import DONE, Sign, ranks_of
from calotype.errors import CalotypeError, Unreachable

# Kinds of failures -> how often the same may happen at the same images, with None for ever: the world's fault heals.
# Before the first step neither a hang nor a death counts.
KINDS: dict[str, int | None] = {
    "a store does not answer": None,
    "a node is lost": None,
    "no worker starts": None,
    "out of memory": 1,
    "hung": 5,
    "a worker died": 5,
    "an error": 5,
}
DOUBTFUL = ("hung", "a worker died", "an error")  # what may come of a node: it is asked
FIRST, MOST = 1.0, 60.0  # seconds of backoff: doubled while nothing gets better
MEMORY = ("out of memory", "can't allocate memory", "low on memory", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Failure:
    """One end of all ranks.

    Attributes:
        kind: one of KINDS.
        why: one line.
        began: images seen when this attempt began to train; None: it never did.
        low, high: images between which it happened: what ranks say of themselves is a second old.
    """

    kind: str
    why: str
    began: int | None = None
    low: int = 0
    high: int = 0

    @property
    def stepped(self) -> bool:
        return self.began is not None and self.high > self.began

    def where(self) -> str:
        return "before its first step" if not self.stepped else f"at {self.low:,} images"


@dataclass
class Streak:
    """Failures in a row: the backoff, and when it is enough."""

    delay: float = 0.0
    total: int = 0
    same: list[Failure] = field(default_factory=list)  # the last ones, as far as they happened at the same images

    def add(self, failure: Failure) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            CalotypeError: it happened at the same images too often: another attempt would meet it again.
        """
        self.total += 1
        self.delay = FIRST if failure.stepped else min(2 * self.delay or FIRST, MOST)
        limit = KINDS[failure.kind]
        if limit is None or (failure.kind in ("hung", "a worker died") and not failure.stepped):
            self.same.clear()  # anybody's fault but the batch's; want of memory is told apart (`looked_into`)
            return self.delay
        if self.same and not _same_place(self.same[-1], failure):
            self.same.clear()
        self.same.append(failure)
        alike = [one for one in self.same if one.kind == failure.kind] if limit == 1 else self.same
        if len(alike) > limit:
            raise CalotypeError(self._final(failure, len(alike)))
        return self.delay

    def _final(self, failure: Failure, times: int) -> str:
        if failure.kind == "out of memory":
            advice = (
                "lower engine.micro_batch, use a higher engine.stage or (against a GPU's, with host memory) "
                "engine.offload=cpu, or give workers more memory"
            )
        elif failure.stepped:
            advice = (
                f"look at the workers' memory and at the samples at positions {failure.low:,} to {failure.high:,} and "
                f"of the batch after them, and leave those out with data.takedown"
            )
        else:
            advice = "look at the workers' logs and memory"
        return f"training ended {times} times {failure.where()}, the last time because {failure.why}: {advice}"


def failure_of(error: BaseException) -> tuple[str, str]:
    """(kind, one line) of what Ray Train's `fit` raised."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    if isinstance(error, ControllerError):
        return "no worker starts", first_line(error.controller_failure)
    if not isinstance(error, WorkerGroupError):
        return "a worker died", last_line(error)
    found: dict[str, str] = {}
    failures: Mapping[int, BaseException] = error.worker_failures
    for rank, failed in sorted(failures.items()):
        said = str(failed)
        if isinstance(failed, Unreachable):
            kind, why = "a store does not answer", said
        elif any(word in said for word in MEMORY) or isinstance(failed, MemoryError):
            kind, why = "out of memory", f"rank {rank} ran out of memory: {_telling(failed)}"
        elif isinstance(failed, WorkerHealthCheckFailedError | RayActorError):
            gone = "its node" in said and ("died" in said or "terminated" in said)
            kind = "a node is lost" if gone else "a worker died"
            why = f"the node of rank {rank} is gone" if gone else f"the process of rank {rank} died"
        else:
            kind, why = "an error", f"rank {rank} raised {type(failed).__name__}: {_telling(failed)}"
        found.setdefault(kind, why)
    # The neighbours of a rank that died raise what they like: the first of KINDS is the cause.
    kind = next(kind for kind in KINDS if kind in found)
    return kind, found[kind]


def looked_into(kind: str, why: str, signs: Collection[Sign]) -> tuple[str, str]:
    """The same, or what the nodes of those ranks say of it: one is gone, or the kernel had no memory left for a rank.

    Args:
        signs: the last ones of all ranks.
    """
    with contextlib.suppress(Exception):  # a head that is busy for a moment: Ray's word stands
        if kind in DOUBTFUL and (gone := lost({sign.node for sign in signs})):
            return "a node is lost", f"the node of {ranks_of(sign for sign in signs if sign.node in gone)} is gone"
        if kind in DOUBTFUL and kind != "hung":
            silent = [sign for sign in signs if sign.phase != DONE]  # what failed by itself says so at its end
            kills = kills_by_node({sign.node for sign in silent})
            if short := [sign for sign in silent if kills.get(sign.node, 0) > sign.kills]:
                return "out of memory", f"the kernel had no memory left where {ranks_of(short)} ran"
    return kind, why


def _same_place(one: Failure, other: Failure) -> bool:
    return one.stepped == other.stepped and one.low <= other.high and other.low <= one.high


def _telling(error: BaseException) -> str:
    """The line of a message that says most; Ray's begin and end with its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if any(word in line for word in MEMORY)), lines[0] if lines else "")[:300]


def first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: Any) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
