"""Shards in S3 -> one rank's batches, in one global order, with one cursor.

    manifest -> Schedule: position -> chunk, index        pure (schedule.py, order.py)
             -> Chunks: range GETs ahead, verified        in threads (chunks.py, get.py)
             -> Reader: rows of a batch, stacked          here, or in loader processes (reader.py, processes.py)
             -> Stream: batches, cursor, quarantine

The ids of every global batch are the same for every world size and number of loader processes; each sample comes once
per epoch; every rank takes the same steps.  The state is one position in that order.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import calotype.data.worker as worker
from calotype.data.chunks import Reading
from calotype.data.dataset import Dataset
from calotype.data.draws import Ints
from calotype.data.order import slots
from calotype.data.processes import joined
from calotype.data.reader import Array, Decode, OrderSettings, Reader, Rows, shares_of
from calotype.data.shards import Sample
from calotype.errors import ConfigError, DataError

log = logging.getLogger(__name__)

READY = 2  # batches made before they are asked for, beside the chunks that lie ready


@dataclass(frozen=True)
class Batch:
    """One rank's share of global batch `step`.

    Attributes:
        positions: (n,) global positions, one per sample: the key of everything random about it.
        keys: of the samples.
        arrays: name -> (n, ...), of `arrays` or of what `decode` gave; of texts that a cache holds without padding
            (mode=masked) it is back, and NAME.mask (n, length) is False there.
        samples: where neither was asked for; None where one is left out.
        present: (n,) False for samples that quarantine left out: their arrays are zeros, and they must weigh nothing.
        wait: seconds that the consumer waited for it.
    """

    step: int
    positions: Ints
    keys: list[str]
    arrays: dict[str, Array]
    samples: list[Sample | None]
    present: np.ndarray[Any, np.dtype[np.bool_]]
    wait: float
    cursor: dict[str, int] = field(repr=False)  # of the stream when this batch is done with


class Stream(Iterable[Batch]):
    """One rank's batches, for ever or to an end: `for batch in stream`.

    It reads ahead in threads, or in `reading.workers` processes of its own, each of which makes part of the rows of
    every batch, so that no chunk is read twice.  In a torch `DataLoader` (`batch_size=None`) with worker processes,
    each of those makes every n-th batch instead.

    Args:
        datasets: one, or several for a mixture.
        seed: of the order; any integer.
        batch: global batch, in samples over all ranks.
        lanes, window: see order.py; what they cost is memory.
        until: global position before which the last batch begins: nothing is read for what follows.  0: there is none.
        rank, world: of this process; `world` need not divide `batch`.
        arrays: `.npy` members to stack: {"latent": (n, ...)} for ("latent",).
        decode: sample -> {name: array}, for members that are not arrays: the same names, dtypes and shapes for all
            samples of a batch.  It runs in many threads; whatever it raises is of that sample alone.  For loader
            processes, a function of a module.
        reading: memory, threads, processes, disk cache, quarantine.

    Attributes:
        skipped: id -> reason of the samples that quarantine left out here; an id is the key below its shard's URI.
        retries: reads that had to be repeated here.

    Raises:
        ConfigError: invalid settings.
        DataError: nothing to read; while iterating: a shard that is missing, cut, damaged or replaced, by name.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        *,
        seed: int,
        batch: int,
        lanes: int = 0,
        window: int = 128,
        until: int = 0,
        rank: int = 0,
        world: int = 1,
        arrays: Sequence[str] = (),
        decode: Decode | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
        if not self.datasets or not all(isinstance(one, Dataset) and one.shards for one in self.datasets):
            raise ConfigError("a stream needs at least one Dataset, and shards in each: see open_dataset, open_cache")
        if isinstance(arrays, str):
            raise ConfigError(f"arrays={arrays!r} must be a list of names: [{arrays!r}]")
        self.order = OrderSettings(seed, batch, lanes, window, until)
        if not 0 <= rank < world:
            raise ConfigError(f"rank={rank} must be at least 0, and less than world={world}")
        self.slots = slots(rank, world, batch)
        if not self.slots:
            raise ConfigError(f"rank {rank} of {world} has no sample of a batch of {batch}: raise the batch")
        if until < 0:
            raise ConfigError(f"until={until} is no position: 0 is for a stream without an end")
        self.reading = reading or Reading()
        if self.reading.workers and getattr(decode, "__module__", "") == "__main__":
            raise ConfigError("loader processes cannot import `decode` from the script that runs: move it to a module, "
                              "or decode in threads (workers=0)")  # fmt: skip
        self.arrays, self.decode = tuple(arrays), decode
        self.skipped: dict[str, str] = {}
        self.retries = 0
        self._reason = ""  # of the sample that was left out last
        self._position = 0
        self._begin()

    @property
    def epoch_samples(self) -> int:
        """Samples that count, of all datasets."""
        return self._reader.schedule.samples

    def state_dict(self) -> dict[str, int]:
        """The cursor: good on every rank, at any world size and number of workers."""
        return self._cursor(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a cursor, of which `position` is enough; an iteration that is under way ends.

        Raises:
            DataError: it is not where a batch begins, or of another order.
        """
        position = state.get("position", -1)
        if position < 0 or position % self.order.batch:
            raise DataError(f"position {position} is not the start of a batch of {self.order.batch}: "
                            "the batch was changed")  # fmt: skip
        for name, value in self._cursor(position).items():
            if state.get(name, value) != value:
                what = "other datasets, filters or weights" if name == "samples" else f"{name}={state[name]}"
                mine = "" if name == "samples" else f", this one has {name}={value}"
                raise DataError(f"the cursor is of a stream with {what}{mine}: in this order it means nothing, so give "
                                "its position alone if you want that place of it")  # fmt: skip
        self.close()
        self._position = position

    def seek(self, position: int) -> Stream:
        """Go to a global position; returns the stream itself."""
        self.load_state_dict({"position": position})
        return self

    def _cursor(self, position: int) -> dict[str, int]:
        order = self.order
        return {"position": position, "seed": order.seed, "batch": order.batch, "lanes": order.lanes or order.batch,
                "window": order.window, "samples": self._reader.digest}  # fmt: skip

    def where(self, position: int) -> str:
        """A cursor, in words."""
        epoch, index = divmod(position, self.epoch_samples)
        return f"cursor {position:,}: epoch {epoch + 1}, sample {index:,} of {self.epoch_samples:,}"

    def close(self) -> None:
        """Stop reading; iterating again goes on from the cursor."""
        self._stop.set()
        if (current := self._current()) is not None:
            with suppress(ValueError):  # another thread is in it: it ends with its batch
                current.close()

    def as_torch(self) -> Any:
        """A torch `IterableDataset` over this stream, for `DataLoader(..., batch_size=None)`; it yields dicts.

        {name: tensor (n, ...), "position": (n,), "present": (n,), "key": [...], "cursor": {...}}.  torchdata's
        `StatefulDataLoader` finds `state_dict` and `load_state_dict` on it; beside a plain `DataLoader` with worker
        processes, which have the stream's state, keep the `cursor` of the last batch for `stream.load_state_dict`.
        Worker processes of a DataLoader each read all chunks of the rank: `Reading(workers=...)` shares them instead.
        """
        from calotype.data.loader import TorchStream

        return TorchStream(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_stop", "_reader", "_current")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._stop = threading.Event()
        self._current: Callable[[], Generator[Batch, None, None] | None] = lambda: None
        self._reader = Reader(
            self.datasets, self.order, self.slots, self.reading, self.arrays, self.decode, self._threads()
        )
        self.reading = self._reader.reading

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stop = threading.Event()
        batches = self._batches(self._stop)
        self._current = weakref.ref(batches)
        return batches

    def _batches(self, stop: threading.Event) -> Generator[Batch, None, None]:
        loader = _loader()
        every, first = loader or (1, 0)
        if loader and (self.reading.workers or self.reading.on_error != "strict"):
            raise ConfigError("in worker processes of a DataLoader a stream has no loader processes of its own, and "
                              "nobody who counts what quarantine leaves out: use DataLoader(num_workers=0) and "
                              "Reading(workers=...)")  # fmt: skip
        with self._parts(every, first, stop) as parts:
            while not stop.is_set():
                began = time.perf_counter()
                rows = next(parts, None)
                if rows is None or stop.is_set():
                    return
                self._position = (rows.step + every - first) * self.order.batch  # without a DataLoader: the next
                yield self._batch(rows, time.perf_counter() - began)

    def _threads(self) -> int:
        """To decode in."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.reading.decoders or cores

    def _batch(self, rows: Rows, wait: float) -> Batch:
        self.retries += rows.retries
        present = np.ones(len(rows.keys), np.bool_)
        for row, name, reason in rows.skipped:
            present[row] = False
            if name not in self.skipped:
                if reason != self._reason:  # a damaged chunk is said once, not for each of its samples
                    log.warning("left out: sample %s, and others of which the same is said (%s)", name, reason)
                self.skipped[name], self._reason = reason, reason
        if len(self.skipped) > self.reading.error_budget:
            some, reason = list(self.skipped)[:5], next(iter(self.skipped.values()))
            raise DataError(
                f"{len(self.skipped)} samples had to be left out, more than error_budget={self.reading.error_budget} "
                f"(stream.error_budget): {', '.join(some)} ... ({reason})"
            )
        cursor = self._cursor((rows.step + 1) * self.order.batch)
        return Batch(rows.step, rows.positions, rows.keys, rows.arrays, rows.samples, present, wait, cursor)

    # ---------------------------------------------------------------------------------- where rows are made

    @contextmanager
    def _parts(self, every: int, first: int, stop: threading.Event) -> Iterator[Iterator[Rows]]:
        """Rows of every `every`-th step from the cursor on; whoever makes them ends with the context."""
        if self.reading.workers:
            shares = shares_of(self.slots, self.reading.workers)
            reading = self.reading.shared(len(shares))
            made = (self.datasets, self.order, reading, self.arrays, self.decode, self._position)
            with joined([worker.Task(share, *made) for share in shares]) as rows:
                yield rows
            return
        ready: queue.Queue[Rows | BaseException | None] = queue.Queue(maxsize=READY)
        source = self._reader.rows(self._position, stop, every, first)
        threading.Thread(target=_fill, args=(source, ready, stop), daemon=True, name="stream").start()
        try:
            yield _taken(ready)
        finally:
            stop.set()


def _loader() -> tuple[int, int] | None:
    """(n, i) in worker process i of n of a torch DataLoader, which takes batches from them in turn."""
    if "torch.utils.data" not in sys.modules:
        return None
    info = sys.modules["torch.utils.data"].get_worker_info()
    return (info.num_workers, info.id) if info else None


def _fill(source: Iterator[Rows], ready: queue.Queue[Rows | BaseException | None], over: threading.Event) -> None:
    def offer(item: Rows | BaseException | None) -> None:
        while not over.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    try:
        for rows in source:
            offer(rows)
            if over.is_set():
                return
        offer(None)
    except BaseException as error:  # whatever it is, the consumer must get it
        offer(error)
    finally:
        source.close()  # type: ignore[attr-defined]  # it is a generator
        with suppress(queue.Full):  # a consumer that waits must not wait for ever: `close` may come from another thread
            ready.put_nowait(None)


def _taken(ready: queue.Queue[Rows | BaseException | None]) -> Iterator[Rows]:
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
