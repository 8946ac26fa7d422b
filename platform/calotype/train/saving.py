"""Saving while training goes on, and resuming.

A step waits only until this rank's share of the state is copied to host memory.  A thread then writes it to the store,
and a list of what it wrote; rank 0's waits for the lists of all ranks and commits.  Threads take part in no collective:
how they fared is agreed on by the training threads, between two steps.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from calotype import runs
from calotype.compose import digest_of, identity_fields
from calotype.data.store import Store
from calotype.environment import Worker
from calotype.errors import CalotypeError, DataError, Unreachable
from calotype.train import checkpoint, shares
from calotype.train.engine import Engine
from calotype.train.figures import Clock, agree

log = logging.getLogger(__name__)

T = TypeVar("T")

ENDING = 30.0  # seconds that a save has to end when the training fails
SHARED = 120.0  # seconds until files that another machine has written are seen: shared folders may be slow to show them
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what no time heals; a mount may come back
AGAIN = 1.0, 30.0  # seconds until a store that did not answer is tried again, at first and at most
ASKED = 0.5  # seconds between two looks whether to stop
LISTS = 0.05, 5.0  # seconds between two looks for the other ranks' lists, at first and at most


class Flight:
    """One save on its way.

    Attributes:
        last: nobody waits any longer for a store that does not answer: its next silence is an error.
        uploaded: this rank's files lie in the store, or there is an error.
        everywhere: those of all ranks do.
        done: nothing is left to do, or there is an error.
        abandoned: another rank has failed: nothing is to be committed.
    """

    def __init__(self, images: int, work: Callable[[Flight], None]) -> None:
        self.images, self._work = images, work
        self.figures: dict[str, float] = {}
        self.error: BaseException | None = None
        self.uploaded, self.everywhere, self.done, self.abandoned = (threading.Event() for _ in range(4))
        self.last = threading.Event()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # raised again, on all ranks, where they agree
            self.error = error
        self.uploaded.set()
        self.done.set()


class Saving:
    """The checkpoints of one training; at most one is on its way.  All methods are collective.

    Args:
        told: rank 0 is told which images were committed, in the training thread.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        config: Any,
        worker: Worker,
        record: runs.Record,
        told: Callable[[int], None] = lambda images: None,
    ) -> None:
        self.engines, self.config, self.worker, self.record, self.told = engines, config, worker, record, told
        self._since = time.time()
        self._flight: Flight | None = None
        self._figures: dict[str, float] = {}
        self._group: Any = None  # a GPU need not wait where threads agree
        token: list[Any] = [secrets.token_hex(8)]
        if worker.world > 1:
            self._group = dist.new_group(backend="gloo")
            dist.broadcast_object_list(token, group=self._group)
        self._token = token[0]  # whose lists they are: those of workers that died may lie beside them

    def begin(self, images: int, clock: Clock, figures: Mapping[str, Any], also: Mapping[str, Any]) -> None:
        """Copy what is to be saved, and send it on its way once the one before has arrived.

        Args:
            also: plain data of the loop that nobody changes any more; `resume` gives it back.
        """
        began = time.monotonic()
        self._figures |= self.check(wait=True)
        waited = time.monotonic()
        copied: dict[str, shares.Share] = {}
        scalars = {}
        for name, engine in self.engines.items():
            copied[name], scalars[name] = engine.share()
        state = {
            "identity": self.record.identity,
            "images": images,  # also the position in the stream
            "engines": scalars,
            "seed": self.config.seed,  # all randomness is keyed by it and the position: no generator has a state
            "trained": clock.trained,
            "waited": clock.waited,
            "timed": clock.images,
            "figures": dict(figures),
            "config": digest_of(identity_fields(self.config)),
            "world": self.worker.world,
            "stage": self.config.engine.stage if self.config.engine.kind == "deepspeed" else "torch",
            "attempt": self.record.attempt,
            **also,
        }
        now = time.monotonic()
        stalls = {"checkpoint_wait_seconds": waited - began, "checkpoint_stall_seconds": now - waited}
        self._flight = Flight(images, lambda flight: self._write(flight, copied, state, stalls, now))

    def check(self, wait: bool = False) -> dict[str, float]:
        """How the save on its way fares: its figures once it is committed.

        Args:
            wait: until it is.

        Raises:
            CalotypeError: on all ranks, what went wrong on one.  Nothing was committed.
        """
        flight = self._flight
        if flight is not None:
            if wait:
                self._wait(flight, flight.uploaded)
                self._raise_any(flight)
                flight.everywhere.set()
                self._wait(flight, flight.done)
            done = flight.done.is_set()  # before its error is looked at
            self._raise_any(flight)
            if not agree(self.worker, not done, self._group):
                self._flight = None
                self._figures |= flight.figures
                if self.worker.rank == 0:
                    seconds, stall = (flight.figures[f"checkpoint_{name}seconds"] for name in ("", "stall_"))
                    log.info(
                        "saved %s images in %.1f s, of which %.2f s between steps", f"{flight.images:,}", seconds, stall
                    )
                    self.told(flight.images)
        figures, self._figures = self._figures, {}
        return figures

    def close(self) -> None:
        """The training is over, maybe by an error: what is on its way has a moment to arrive."""
        flight = self._flight
        if flight is None:
            return
        flight.last.set()
        if not flight.done.wait(ENDING):
            flight.abandoned.set()
        elif flight.error is not None:
            log.error("%s", flight.error)
        elif self.worker.rank == 0:
            self.told(flight.images)

    def _wait(self, flight: Flight, event: threading.Event) -> None:
        while not event.wait(ASKED):
            if self.worker.stop():  # whoever cancels a run, or takes a machine away, does not wait for a store
                flight.last.set()

    def _raise_any(self, flight: Flight) -> None:
        error = flight.error
        if not agree(self.worker, error is not None, self._group):
            return
        self._flight = None
        flight.abandoned.set()
        found: list[Any] = [_told(error)]
        if self.worker.world > 1:
            found = [None] * self.worker.world
            dist.all_gather_object(found, _told(error), group=self._group)
        raise error or next(other for other in found if other is not None)

    # ---------------------------------------------------------------------------------------- in the thread

    def _write(
        self,
        flight: Flight,
        copied: Mapping[str, shares.Share],
        state: Mapping[str, Any],
        stalls: dict[str, float],
        began: float,
    ) -> None:
        store, images, rank, world = self.record.artifacts, flight.images, self.worker.rank, self.worker.world
        place = checkpoint.place(store, images)

        def upload() -> dict[str, Any]:
            part = shares.write(store, images, rank, copied)
            if world > 1:
                place.publish(f"parts-{self._token}-{rank:05d}.json", json.dumps(part).encode())
            return part

        def commit() -> None:
            parts = _parts(place, self._token, world, flight) if world > 1 else [part]
            shapes = {name: share.shapes for name, share in copied.items()}
            shares.commit(store, images, shapes, parts, state, self.record.check_current)
            settings = self.config.train
            checkpoint.forget(store, images, settings.keep, settings.keep_every, self._since)

        stalls["checkpoint_stall_seconds"] += sum(share.ready() for share in copied.values())
        part = _patiently(place, flight, upload)
        flight.uploaded.set()
        if rank == 0:
            _patiently(place, flight, commit)
        flight.figures = stalls | {"checkpoint_seconds": time.monotonic() - began}


def _patiently(place: Store, flight: Flight, work: Callable[[], T]) -> T:
    """Do what writes to a store, again while that does not answer: all ranks hold a good state, and train on.

    What a try has left behind is in nobody's way: names of files hold hashes of their contents.
    """
    pause, most = AGAIN
    while True:
        try:
            with _explained(place):
                return work()
        except Unreachable as error:
            if flight.last.is_set() or flight.abandoned.is_set():
                raise
            log.warning("%s; the checkpoint of %s images waits, and is written again", error, f"{flight.images:,}")
        # Whoever ends the wait gets one more try.
        until = time.monotonic() + pause
        while time.monotonic() < until and not flight.last.is_set() and not flight.abandoned.wait(0.1):
            pass
        pause = min(2 * pause, most)


@contextlib.contextmanager
def _explained(place: Store) -> Iterator[None]:
    """The system's errors as sentences."""
    try:
        yield
    except OSError as error:
        what = f"{place.uri} cannot be written ({error.strerror or error}): it was not committed"
        if error.errno not in FULL:
            raise Unreachable(what) from error
        advice = "make room there, and the same command goes on from the checkpoint before"
        raise CalotypeError(f"{what}; {advice}") from error


def _parts(place: Store, token: str, world: int, flight: Flight) -> list[dict[str, Any]]:
    """What every rank wrote, as its list says, once all lists are there."""
    found: dict[str, dict[str, Any]] = {}
    pause, most = LISTS
    until = float("inf")
    while True:
        for entry in place.list(f"parts-{token}-"):
            if entry.key not in found:
                found[entry.key] = json.loads(place.read(entry.key))
        if len(found) == world:
            return list(found.values())
        if flight.abandoned.wait(pause):
            raise CalotypeError(f"{place.uri} was not committed: another worker failed")
        if flight.everywhere.is_set():
            until = min(until, time.monotonic() + SHARED)
        if time.monotonic() > until:
            raise CalotypeError(
                f"{place.uri} holds the files of {len(found)} of {world} workers, though all have written theirs: "
                "set root to a place that all machines share"
            )
        pause = min(1.5 * pause, most)


def _told(error: BaseException | None) -> BaseException | None:
    """What the other ranks raise."""
    known = error is None or isinstance(error, CalotypeError)
    return error if known else RuntimeError(f"another worker failed to save: {type(error).__name__}: {error}")


@contextlib.contextmanager
def saves(
    engines: Mapping[str, Engine],
    config: Any,
    worker: Worker,
    record: runs.Record | None,
    told: Callable[[int], None],
) -> Iterator[Saving | None]:
    """What saves, for as long as the training runs; None without a record."""
    if record is None:
        yield None
        return
    saving = Saving(engines, config, worker, record, told)
    try:
        yield saving
    finally:
        saving.close()


def check_ours(saved: checkpoint.Checkpoint, record: runs.Record) -> None:
    """Refuse weights and a position of another run; older versions wrote down no identity."""
    owner = saved.state.get("identity", record.identity)
    if owner != record.identity:
        uri = checkpoint.place(record.artifacts, saved.images).uri
        raise CalotypeError(
            f"{uri} is a checkpoint of run {owner[:8]}, not of {record.name} ({record.identity[:8]}): move it away, or "
            "start from its weights with denoiser.init_from"
        )


def _check_state(saved: checkpoint.Checkpoint, engines: Mapping[str, Engine], record: runs.Record) -> None:
    scalars = saved.state.get("engines")
    known = isinstance(scalars, dict) and engines.keys() <= scalars.keys()
    if not known or type(saved.state.get("images")) is not int:
        raise DataError(f"the state of the checkpoint of {saved.images} images of {record.artifacts.uri} is damaged")


def resume(
    engines: Mapping[str, Engine], where: Callable[[int], str], worker: Worker, record: runs.Record | None
) -> dict[str, Any]:
    """Load the newest checkpoint that is whole; {} if there is none.  Collective.

    Args:
        where: a position, in words.

    Raises:
        DataError: there are some, and none is whole.
        CalotypeError: one is another run's; nothing is deleted.
        Unreachable: one could not be read, which another attempt may.
    """
    if record is None:
        return {}
    found: list[Any] = [checkpoint.committed(record.artifacts)]
    if worker.world > 1:
        dist.broadcast_object_list(found)  # the same choice everywhere
    needed = {name: engine.needs() for name, engine in engines.items()}
    for images in reversed(found[0]):
        try:
            with checkpoint.opened(record.artifacts, images, needed=needed) as saved:
                _check_state(saved, engines, record)
                if agree(worker, False):
                    continue
                check_ours(saved, record)
                for name, engine in engines.items():
                    kinds = [kind for kind in saved.tensors if kind.startswith(f"{name}.")]
                    states = {kind.removeprefix(f"{name}."): saved.tensors[kind] for kind in kinds}
                    engine.load(states, saved.state["engines"][name])
        except DataError as error:
            agree(worker, True)
            log.error("%s; goes back to the one before", error)
            continue
        if worker.rank == 0:
            log.info("resumes at %s images (%s)", f"{images:,}", where(images))
            for other in (other for other in found[0] if other > images):
                if checkpoint.damaged(record.artifacts, other):  # not only for another rank, or for a moment
                    record.check_current()
                    checkpoint.discard(record.artifacts, other)
                else:
                    log.warning("the checkpoint of %s images is whole: it is kept", f"{other:,}")
        return saved.state
    if found[0]:
        raise DataError(f"none of the checkpoints under {record.artifacts.uri} is whole: remove them to start anew")
    return {}
