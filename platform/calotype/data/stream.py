"""Shards in S3 -> one rank's batches, in one global order, with one cursor.

    manifest -> Schedule: position -> chunk, index        pure (schedule.py, order.py)
             -> Chunks: range GETs ahead, verified        in threads (chunks.py, get.py)
             -> Reader: rows of a batch, stacked          here, or in loader processes (reader.py, worker.py)
             -> Stream: batches, cursor, quarantine

The ids of every global batch are the same for every world size and number of loader processes; each sample comes once
per epoch; every rank takes the same steps.  The state is one integer.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import Any

import numpy as np

import calotype.data.worker as worker
from calotype.data.chunks import Reading
from calotype.data.dataset import Dataset
from calotype.data.draws import Ints
from calotype.data.order import slots
from calotype.data.reader import Array, Decode, Order, Reader, Rows
from calotype.data.shards import Sample
from calotype.errors import CalotypeError, ConfigError, DataError

log = logging.getLogger(__name__)

READY = 2  # batches made before they are asked for, beside the chunks that lie ready


@dataclass(frozen=True)
class Batch:
    """One rank's share of global batch `step`.

    Attributes:
        positions: (n,) global positions, one per sample: the key of everything random about it.
        keys: of the samples.
        arrays: name -> (n, ...), of `arrays` or of what `decode` gave.
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
        decode: sample -> arrays of equal shapes, for members that are not arrays.  Of a module, for loader processes.
        reading: memory, threads, processes, disk cache, quarantine.

    Raises:
        ConfigError: settings that cannot be.
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
        self.order = Order(seed, batch, lanes, window, until)
        self.reading = reading or Reading()
        self.slots = slots(rank, world, batch)
        if not self.slots:
            raise ConfigError(f"rank {rank} of {world} has no sample of a batch of {batch}: raise the batch")
        if until < 0:
            raise ConfigError(f"until={until} is no position: 0 is for a stream without an end")
        self.arrays, self.decode = tuple(arrays), decode
        self.skipped: dict[str, str] = {}  # id -> reason, of samples that quarantine left out here
        self.retries = 0  # requests that had to be repeated here
        self._position, self._stop = 0, threading.Event()
        self._reader = Reader(self.datasets, self.order, self.slots, self.reading, self.arrays, decode, self._threads())

    def __len__(self) -> int:
        """Batches per epoch, the last of which may be shared with the next."""
        return -(-self._reader.schedule.samples // self.order.batch)

    @property
    def epoch_samples(self) -> int:
        """Samples that count, of all datasets."""
        return self._reader.schedule.samples

    def state_dict(self) -> dict[str, int]:
        """The cursor: good on every rank, at any world size and number of workers."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a cursor; an iteration that is under way ends.

        Raises:
            DataError: it is not where a batch begins.
        """
        position = state["position"]
        if position < 0 or position % self.order.batch:
            raise DataError(
                f"position {position} is not the start of a batch of {self.order.batch}: train.batch was changed"
            )
        self.close()
        self._position = position

    def at(self, position: int) -> Stream:
        """This stream, from a global position on."""
        self.load_state_dict({"position": position})
        return self

    def where(self, position: int) -> str:
        """A cursor, in words."""
        epoch, index = divmod(position, self.epoch_samples)
        return f"cursor {position:,}: epoch {epoch + 1}, sample {index:,} of {self.epoch_samples:,}"

    def left_out(self) -> dict[str, str]:
        """id -> reason of the samples that quarantine left out here."""
        return dict(self.skipped)

    def close(self) -> None:
        """Stop reading; iterating again goes on from the cursor."""
        self._stop.set()

    def as_torch(self) -> Any:
        """A torch `IterableDataset` over this stream, for `DataLoader(..., batch_size=None)`; it yields dicts.

        {name: tensor (n, ...), "position": (n,), "present": (n,), "key": [...]}.  torchdata's `StatefulDataLoader`
        finds `state_dict` and `load_state_dict` on it.  Worker processes of a DataLoader each read all chunks of the
        rank: `Reading(workers=...)` shares them instead.
        """
        from calotype.data.loader import TorchStream

        return TorchStream(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_stop", "_reader")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stop = threading.Event()
        self._reader = Reader(
            self.datasets, self.order, self.slots, self.reading, self.arrays, self.decode, self._threads()
        )

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stop = stop = threading.Event()
        every, first = _loader()
        with self._parts(every, first) as parts:
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
        for row, reason in rows.skipped:
            present[row] = False
            if rows.keys[row] not in self.skipped:
                self.skipped[rows.keys[row]] = reason
                log.warning("left out: sample %s (%s)", rows.keys[row], reason)
        if len(self.skipped) > self.reading.error_budget:
            some, reason = list(self.skipped)[:5], next(iter(self.skipped.values()))
            raise DataError(
                f"{len(self.skipped)} samples had to be left out, more than stream.error_budget="
                f"{self.reading.error_budget}: {', '.join(some)} ... ({reason})"
            )
        cursor = {"position": (rows.step + 1) * self.order.batch}
        return Batch(rows.step, rows.positions, rows.keys, rows.arrays, rows.samples, present, wait, cursor)

    # ---------------------------------------------------------------------------------- where rows are made

    @contextmanager
    def _parts(self, every: int, first: int) -> Iterator[Iterator[Rows]]:
        """Rows from the cursor on, of every so-manieth step; whoever makes them ends with the context."""
        if self.reading.workers and every == 1:
            with ExitStack() as stack:
                count = min(self.reading.workers, len(self.slots))
                shares = [slots(i, count, len(self.slots)) for i in range(count)]
                shares = [range(self.slots.start + s.start, self.slots.start + s.stop) for s in shares]
                reading = self.reading.shared(count)
                order, position = self.order, self._position
                made = (self.datasets, order, reading, self.arrays, self.decode, position)
                processes = [stack.enter_context(_Process(worker.Task(share, *made))) for share in shares]
                yield _joined(processes)
            return
        ready: queue.Queue[Rows | BaseException | None] = queue.Queue(maxsize=READY)
        over, source = threading.Event(), self._reader.rows(self._position, every, first)
        threading.Thread(target=_fill, args=(source, ready, over), daemon=True, name="stream").start()
        try:
            yield _taken(ready)
        finally:
            over.set()


def _loader() -> tuple[int, int]:
    """(n, i) in worker i of n of a torch DataLoader, which takes batches from them in turn; else (1, 0)."""
    if "torch.utils.data" not in sys.modules:
        return 1, 0
    info = sys.modules["torch.utils.data"].get_worker_info()
    return (info.num_workers, info.id) if info else (1, 0)


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


def _taken(ready: queue.Queue[Rows | BaseException | None]) -> Iterator[Rows]:
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


class _Process:
    """A loader process, its end of the connection, and the memory that it shares."""

    def __init__(self, task: worker.Task) -> None:
        self.connection, theirs = Pipe()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed below
        memory = os.memfd_create("calotype") if hasattr(os, "memfd_create") else os.dup(self.file.fileno())
        self.memory, self.map, self.size = memory, mmap.mmap(-1, 1), 0
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        program = "from calotype.data.worker import main; main()"
        command = [sys.executable, "-c", program, str(theirs.fileno()), str(memory)]
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(), memory), env=environment)
        theirs.close()
        self.connection.send(task)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.memory)
        self.file.close()

    def take(self) -> worker.Sent | None:
        """The next batch's rows; None behind the last.

        Raises:
            CalotypeError: what the process met, or that it died.
        """
        try:
            item = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            status = self.process.wait()
            said = f"signal {-status}" if status < 0 else f"exit {status}"
            raise CalotypeError(f"a loader process died ({said}): if memory ran out, lower stream.memory_mb or "
                                "stream.workers") from error  # fmt: skip
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        assert isinstance(item, worker.Sent)
        if item.size != self.size:
            self.map, self.size = mmap.mmap(self.memory, item.size), item.size
        return item

    def arrays(self, sent: worker.Sent) -> dict[str, Array]:
        """Views of the shared memory; good until `done`."""
        return {name: worker.placed(self.map, *place) for name, place in sent.fields.items()}

    def done(self, sent: worker.Sent) -> None:
        if sent.slot >= 0:  # else there was nothing in the shared memory, and nobody waits for it
            with suppress(BrokenPipeError):
                self.connection.send(sent.slot)


def _joined(processes: list[_Process]) -> Iterator[Rows]:
    """The rows of all processes, as if one had made them: copied once, so that the memory may be used again."""
    while True:
        sent = [one for one in [process.take() for process in processes] if one is not None]
        if not sent:
            return
        assert len(sent) == len(processes), "all take the same steps: part of a batch must not pass for one"
        made, first = Rows(sent[0].rows.step, np.concatenate([one.rows.positions for one in sent]), []), 0
        made.retries = sum(one.rows.retries for one in sent)
        parts = [process.arrays(one) for process, one in zip(processes, sent)]
        for one in sent:
            made.keys += one.rows.keys
            made.samples += one.rows.samples
            made.skipped += [(first + row, reason) for row, reason in one.rows.skipped]
            first += len(one.rows.keys)
        for name in parts[0]:
            made.arrays[name] = np.concatenate([part[name] for part in parts])
        for process, one in zip(processes, sent):
            process.done(one)
        yield made
