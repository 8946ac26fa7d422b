"""The chunks that one process holds: fetched ahead in parallel, verified, in buffers that are used again and again.

Memory is bounded: a chunk is asked for when there is room, or when the very next batch needs it.
"""

from __future__ import annotations

import heapq
import logging
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calotype.data.dataset import Dataset, Layout
from calotype.data.disk import Disk
from calotype.data.draws import Ints
from calotype.data.manifest import Shard
from calotype.data.npy import Arrays, arrays_in
from calotype.data.shards import Sidecar, keys_of, read_sidecar, verified
from calotype.data.store import Store
from calotype.data.tables import Table
from calotype.data.threads import Daemons, Steps, in_turn
from calotype.errors import CalotypeError, ConfigError, DataError

log = logging.getLogger(__name__)

SIDECARS = 4096  # kept by one process
BESIDE = 96 * 2**20  # bytes of a process that are no chunks: libraries, tables, batches on their way
TRIED = 16  # chunks of a bucket and dataset that are looked at for an example
CHECKERS = 2  # threads that hash and parse, of each process: BLAKE3 does some 2 GB/s in one of them
GRAIN = 2**16  # bytes by which buffers differ, so that they fit again
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True)
class Reading:
    """How a stream reads.  None of it changes what it reads.

    Attributes:
        memory: bytes that reading takes, in all of its processes: chunks, read ahead as far as it goes, and besides a
            quarter, at most BESIDE per process, for all else.  0: 2 GiB, or what the order needs where that is more.
        readers: parallel range GETs of one process.
        workers: loader processes besides the caller's; 0 reads in threads of the caller's.
        decoders: threads that decode, of the caller's process; 0 for as many as it has cores.
        on_error: strict, or quarantine: damaged chunks and samples are left out, named, and weigh nothing.
        error_budget: samples that quarantine may leave out before it is an error.
        cache, cache_bytes: a folder on a local disk that keeps chunks, and its limit.  It is worth it where it holds
            all that the node reads: one of half that size, in new order each epoch, meets about 1 chunk in 8 again.

    Raises:
        ConfigError: one of them cannot be.
    """

    memory: int = 0
    readers: int = 8
    workers: int = 0
    decoders: int = 0
    on_error: str = "strict"
    error_budget: int = 0
    cache: str = ""
    cache_bytes: int = 50 * 10**9

    def __post_init__(self) -> None:
        if self.on_error not in ("strict", "quarantine"):
            raise ConfigError(f"on_error={self.on_error!r} is neither 'strict' nor 'quarantine'")
        if self.readers < 1:
            raise ConfigError(f"readers={self.readers} must be at least 1")
        for name in ("memory", "workers", "decoders", "error_budget"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")

    def shared(self, processes: int) -> Reading:
        """By each of so many loader processes."""
        return replace(self, memory=self.memory // processes, workers=0)

    @property
    def for_chunks(self) -> int:
        """Bytes, in a process that shares `memory` with no other."""
        return self.memory - min(self.memory // 4, BESIDE)


@dataclass
class Chunk:
    """A verified chunk in memory, of a shard and bucket.  `rows`: which of its samples count, None for all."""

    shard: str
    bucket: int
    buffer: np.ndarray[Any, Any]
    view: memoryview  # of it
    table: Table
    rows: Ints | None
    arrays: dict[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True)
class Bad:
    """A chunk that could not be used, in quarantine: the keys of its samples that count (#N for the N-th of the shard,
    where no columns tell its key), and why."""

    shard: str
    bucket: int
    keys: list[str]
    reason: str


@dataclass
class _Held:
    future: Future[Chunk | Bad]
    bytes: int
    use: tuple[int, int]  # (pool's epoch, one past the last position that needs it)


class Chunks:
    """Chunk number -> chunk.  One thread asks, waits and releases; others fetch, and others check.

    A connection need not wait for a hash: after every step, a chunk says in which of these threads it goes on.

    Args:
        layouts: of the datasets.
        arrays: names of the `.npy` members whose place is found while chunks are fetched, and what each is padded to
            (see `arrays_in`).
        last_use: (pool, epoch, place) -> one past the last global position that needs the chunk.
        stop: set, nothing more is waited for.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        layouts: Sequence[Layout],
        arrays: Mapping[str, int],
        reading: Reading,
        last_use: Callable[[int, int, int], int],
        stop: threading.Event,
    ) -> None:
        self._datasets, self._layouts, self._arrays, self._reading = datasets, layouts, arrays, reading
        self._firsts = np.cumsum([0, *(len(layout.counts) for layout in layouts)])
        self._last_use, self._stop = last_use, stop
        self._held: dict[int, _Held] = {}
        self._ends: list[tuple[int, int]] = []  # heap of (last use, chunk)
        self._spare: OrderedDict[int, _Held] = OrderedDict()  # not needed any more in this epoch; while there is room
        self._buffers = _Buffers(reading.for_chunks)
        self._sidecars: OrderedDict[tuple[int, int], Future[Sidecar]] = OrderedDict()
        self._lock = threading.Lock()
        self._readers, self._checkers = Daemons(reading.readers, "chunk"), Daemons(CHECKERS, "check")
        self._disk = Disk(Path(reading.cache).expanduser(), reading.cache_bytes) if reading.cache else None
        self.used = 0  # bytes of chunks asked for or held

    @property
    def full(self) -> bool:
        return self.used >= self._reading.for_chunks

    def request(self, uses: Sequence[tuple[int, int, int, int]]) -> None:
        """Ask for chunks, in the order in which they are needed.  `uses`: distinct (chunk, pool, epoch, place)."""
        for chunk, pool, epoch, place in uses:
            held = self._held.get(chunk)
            if held is None:
                held = self._spare.pop(chunk) if chunk in self._spare else self._fetched(chunk)
                self._held[chunk] = held
                held.use = (-1, 0)
            if held.use[0] < epoch:
                held.use = (epoch, self._last_use(pool, epoch, place))
                heapq.heappush(self._ends, (held.use[1], chunk))

    def get(self, chunk: int) -> Chunk | Bad:
        """Wait for it.

        Raises:
            CalotypeError: it cannot be had, or is damaged, and that is not to be survived.
        """
        return self._held[chunk].future.result()

    def release(self, position: int) -> None:
        """Everything before `position` was handed out."""
        while self._ends and self._ends[0][0] <= position:
            until, chunk = heapq.heappop(self._ends)
            if chunk in self._held and self._held[chunk].use[1] == until:  # else the next epoch needs it again
                self._spare[chunk] = self._held.pop(chunk)
        while self._spare and self.full:
            self._drop(self._spare.popitem(last=False)[1])

    def examples(self, bucket: int) -> Iterator[Chunk]:
        """Sound chunks of a bucket, from all over the datasets: what its samples are like, where those at hand are
        damaged.  At most TRIED are looked at."""
        for dataset, layout in enumerate(self._layouts):
            if bucket not in layout.buckets():
                continue
            numbers = layout.chunks_of(bucket)
            numbers = np.arange(len(layout.counts)) if numbers is None else numbers
            for number in numbers[:: -(-len(numbers) // TRIED) or 1].tolist():
                if isinstance(found := in_turn(self._fetch(int(self._firsts[dataset]) + number)), Chunk):
                    try:
                        yield found
                    finally:
                        self._buffers.give(found.buffer)

    def close(self) -> None:
        self._readers.close()
        self._checkers.close()

    # ---------------------------------------------------------------------------------- fetching

    def _fetched(self, chunk: int) -> _Held:
        size = self._size(chunk)
        while self._spare and self.used + size > self._reading.for_chunks:
            self._drop(self._spare.popitem(last=False)[1])
        self.used += size
        return _Held(self._readers.submit(self._fetch(chunk)), size, (-1, 0))

    def _drop(self, held: _Held) -> None:
        self.used -= held.bytes
        if held.future.done() and not held.future.exception() and isinstance(found := held.future.result(), Chunk):
            self._buffers.give(found.buffer)

    def _find(self, chunk: int) -> tuple[int, int, int]:
        """(dataset, shard, number in the shard)."""
        dataset = int(np.searchsorted(self._firsts, chunk, side="right")) - 1
        return dataset, *self._layouts[dataset].find(chunk - int(self._firsts[dataset]))

    def _size(self, chunk: int) -> int:
        dataset, shard, _ = self._find(chunk)
        return largest_chunk(self._datasets[dataset].shards[shard])

    def _fetch(self, chunk: int) -> Steps[Chunk | Bad]:
        number, row, index = self._find(chunk)
        dataset = self._datasets[number]
        shard = dataset.shards[row]
        first = shard.chunk_samples * index if not shard.buckets else sum(shard.chunk_counts()[:index])
        bucket, count = shard.chunk_buckets()[index]
        keep = None if dataset.keep is None else dataset.keep[shard.key][first : first + count]
        rows = None if keep is None or keep.all() else np.flatnonzero(keep)
        try:
            return (yield from self._read(dataset.store, shard, self._sidecar(number, row), index, bucket, rows))
        except DataError as error:
            if self._reading.on_error == "strict":
                raise
            chosen = range(first, first + count) if rows is None else (rows + first).tolist()
            return Bad(dataset.store.where(shard.key), bucket, _names(dataset.store, shard, chosen), str(error))

    def _read(
        self, store: Store, shard: Shard, sidecar: Sidecar, index: int, bucket: int, rows: Ints | None
    ) -> Steps[Chunk]:
        buffer = self._buffers.take(sidecar.span(index)[1])
        try:
            view = buffer.data[: sidecar.span(index)[1]]
            table = yield from self._verified(store, shard, sidecar, index, view)
            where = f"chunk {index} of {store.where(shard.key)}"
            arrays = {name: arrays_in(view, table, name, where, length) for name, length in self._arrays.items()}
            return Chunk(store.where(shard.key), bucket, buffer, view, table, rows, arrays)
        except BaseException:
            self._buffers.give(buffer)
            raise

    def _verified(self, store: Store, shard: Shard, sidecar: Sidecar, index: int, view: memoryview) -> Steps[Table]:
        """What lies where in a chunk that was read into `view`, from the local disk or the store."""
        start, size = sidecar.span(index)

        def checked(have: int) -> Table:
            return verified(store.where(shard.key), shard, sidecar, index, view, have)

        if self._disk is not None and self._disk.read(sidecar.hashes[index], view):
            yield self._checkers
            try:
                return checked(size)
            except DataError:
                self._disk.discard(sidecar.hashes[index])
            yield self._readers
        have = store.read_into(shard.key, start, view, self._stop)
        yield self._checkers
        try:
            table = checked(have)
        except DataError as error:  # damaged on the way, or where it lies?
            log.warning("%s; it is read once more", error)
            yield self._readers
            have = store.read_into(shard.key, start, view, self._stop)
            yield self._checkers
            table = checked(have)
        if self._disk is not None:
            self._disk.write(sidecar.hashes[index], view)
        return table

    def _sidecar(self, dataset: int, shard: int) -> Sidecar:
        """Read once, by whoever comes first."""
        name = (dataset, shard)
        with self._lock:
            found = self._sidecars.get(name)
            mine = found is None
            if found is None:
                found = self._sidecars[name] = Future()
                while len(self._sidecars) > SIDECARS:
                    self._sidecars.popitem(last=False)
        if mine:
            try:
                found.set_result(read_sidecar(self._datasets[dataset].store, self._datasets[dataset].shards[shard]))
            except BaseException as error:
                found.set_exception(error)
                with self._lock:
                    self._sidecars.pop(name, None)  # the next iteration may try again
        return found.result()


def largest_chunk(shard: Shard) -> int:
    """Bytes, at most, of a chunk; of manifests of version 1 an estimate."""
    return shard.chunk_bytes or shard.bytes * min(shard.chunk_samples, shard.samples) // shard.samples * 5 // 4


def _names(store: Store, shard: Shard, rows: Sequence[int]) -> list[str]:
    """Keys of samples of a shard that cannot be read; #N for the N-th, where no columns tell."""
    try:
        keys = keys_of(store, shard)
    except CalotypeError:
        keys = None
    return [keys[row] if keys else f"#{row}" for row in rows]


class _Buffers:
    """Memory that was in use before: fresh memory costs the kernel more time than filling it.

    Args:
        limit: bytes of what is in use and what is free together; only what is in use may exceed it.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._made = limit, 0
        self._free: list[np.ndarray[Any, Any]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray[Any, Any]:
        whole = -(-size // GRAIN) * GRAIN
        with self._lock:
            fitting = [i for i, one in enumerate(self._free) if size <= one.nbytes <= size + size // 4 + GRAIN]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
            while self._free and self._made + whole > self._limit:
                self._made -= self._free.pop(0).nbytes
            self._made += whole
        # Not np.empty, which asks for huge pages: filling fresh ones took 2.0 s/GB here, 4 KiB pages 0.7 (reused 0.05).
        return np.frombuffer(mmap.mmap(-1, whole, flags=PRIVATE), np.uint8)

    def give(self, buffer: np.ndarray[Any, Any]) -> None:
        with self._lock:
            self._free.append(buffer)
