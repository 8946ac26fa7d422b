"""One process's share of every batch: positions -> chunks -> rows, planned ahead as far as memory allows."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from calotype.data.chunks import BESIDE, Bad, Chunk, Chunks, Reading, largest_chunk
from calotype.data.dataset import Dataset, Layout
from calotype.data.draws import Ints
from calotype.data.get import counts
from calotype.data.npy import Forms, mask_of, own_rows
from calotype.data.order import slots
from calotype.data.schedule import Schedule
from calotype.data.shards import Sample
from calotype.errors import ConfigError, DataError

MEMORY = 2 * 2**30  # bytes of reading, unless it names its own, or the order needs more
AHEAD = 256  # batches planned ahead, at most
BLOCK = 4096  # positions located at once: a call costs as much as some hundred of them

Decode = Callable[[Sample], Mapping[str, npt.NDArray[Any]]]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OrderSettings:
    """What decides, with the datasets, which samples come when, and where they end."""

    seed: int
    batch: int
    lanes: int = 0
    window: int = 128
    until: int = 0  # the global position before which the last batch begins; 0: there is none


@dataclass
class Rows:
    """One process's share of global batch `step`.

    Attributes:
        positions: (n,) global positions.
        keys: of the samples; of those that are left out #N, the number in their shard, if columns do not tell.
        arrays: name -> (n, ...); zeros for samples that are left out.  Of arrays that are padded (`Dataset.lengths`)
            also NAME.mask (n, length): which rows are a sample's own.
        samples: instead of arrays; None for samples that are left out.
        skipped: (row, id, reason) of those.
        retries: requests that this process had to repeat since it made the rows before.
    """

    step: int
    positions: Ints
    keys: list[str]
    arrays: dict[str, Array] = field(default_factory=dict)
    samples: list[Sample | None] = field(default_factory=list)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    retries: int = 0


@dataclass(frozen=True)
class _Step:
    step: int
    positions: Ints
    chunks: list[int]
    indices: list[int]


class Reader:
    """Shares of batches, from any position on.

    Args:
        mine: slots of the global batch that are this process's.
        arrays: `.npy` members to stack; neither these nor `decode`: whole samples.
        decode: sample -> arrays of equal shapes; runs in `threads` threads.
        reading: as given, with `memory` told.
        allocate: (name, shape, dtype) -> where the rows of a batch are stacked.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        order: OrderSettings,
        mine: range,
        reading: Reading,
        arrays: Sequence[str] = (),
        decode: Decode | None = None,
        threads: int = 1,
        allocate: Callable[[str, tuple[int, ...], Any], Array] | None = None,
    ) -> None:
        self.slots, self._order = mine, order
        layouts = [dataset.layout() for dataset in datasets]
        for dataset, layout in zip(datasets, layouts):
            if not len(layout.counts):
                raise ConfigError(f"no sample of {dataset.store.uri} is left: relax data.filter or data.takedown")
        weights = [dataset.weight for dataset in datasets]
        self.schedule = Schedule(layouts, weights, order.seed, order.batch, order.lanes, order.window)
        self._layouts, self._datasets = layouts, datasets
        lengths = _lengths(datasets)
        self._arrays = {name: lengths.get(name, 0) for name in arrays}
        self._decode, self._threads = decode, threads
        self._like: dict[int, Forms] = {}  # of a bucket's batches
        self._retries = counts.retries
        self._allocate = allocate or (lambda name, shape, dtype: np.empty(shape, dtype))
        self.reading = _with_memory(datasets, layouts, order, mine, reading, self.schedule)

    @cached_property
    def digest(self) -> int:
        """Of what is read, in 48 bits: the shards, which samples of a chunk count, weights."""
        whole = sha256()
        for dataset, layout in zip(self._datasets, self._layouts):
            whole.update(f"{dataset.weight} {' '.join(shard.sha256 for shard in dataset.shards)}\n".encode())
            whole.update(layout.counts.tobytes())
            whole.update(b"" if layout.chosen is None else layout.chosen.tobytes())
        return int.from_bytes(whole.digest()[:6], "big")

    def rows(self, position: int, stop: threading.Event, every: int = 1, first: int = 0) -> Iterator[Rows]:
        """From `position` on; closing the iterator ends its threads, and so does `stop` where they wait.

        Args:
            every, first: steps `first`, `first + every`, ... only.
        """

        def last_use(pool: int, epoch: int, place: int) -> int:
            return self.schedule.last_use(pool, epoch, place, self.slots)

        reading = self.reading.shared(every)
        chunks = Chunks(self._datasets, self._layouts, self._arrays, reading, last_use, stop)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode") if self._decode else None
        try:
            start = position // self._order.batch + first
            steps, planned = self._steps(start, every), deque[_Step]()
            end = -(-self._order.until // self._order.batch) or math.inf  # the first step that is not taken
            while True:
                while start < end and (not planned or (len(planned) < AHEAD and not chunks.full)):
                    step, uses = next(steps)
                    chunks.request(uses)
                    planned.append(step)
                    start += every
                if not planned:
                    return
                now = planned.popleft()
                made = self._made(now, chunks, pool)
                chunks.release((now.step + 1) * self._order.batch)
                yield made
        finally:
            chunks.close()
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)

    def _steps(self, step: int, every: int) -> Iterator[tuple[_Step, list[tuple[int, int, int, int]]]]:
        """Every `every`-th step from this one on, with the chunks that it uses, but for those that were named for an
        earlier step of the same block."""
        width, many_chunks = len(self.slots), sum(len(layout.counts) for layout in self._layouts)
        many = max(1, min(BLOCK // max(width, 1), AHEAD, self.schedule.samples // self._order.batch))
        while True:
            numbers = step + every * np.arange(many)
            positions = (numbers[:, None] * self._order.batch + np.asarray(self.slots)).reshape(-1)
            places = self.schedule.locate(positions)
            new = np.sort(np.unique(places.epoch * many_chunks + places.chunk, return_index=True)[1])
            uses = list(zip(*(c[new].tolist() for c in (places.chunk, places.pool, places.epoch, places.place))))
            until = np.searchsorted(new, np.arange(many + 1) * width).tolist()
            chunk, row = places.chunk.tolist(), places.row.tolist()
            for number in range(many):
                mine = slice(number * width, (number + 1) * width)
                here = _Step(int(numbers[number]), positions[mine], chunk[mine], row[mine])
                yield here, uses[until[number] : until[number + 1]]
            step += every * many

    def _made(self, step: _Step, chunks: Chunks, pool: ThreadPoolExecutor | None) -> Rows:
        held = {number: chunks.get(number) for number in dict.fromkeys(step.chunks)}
        found: list[tuple[Chunk | Bad, int]] = []
        for number, index in zip(step.chunks, step.indices):
            chunk = held[number]
            rows = chunk.rows if isinstance(chunk, Chunk) else None
            found.append((chunk, index if rows is None else int(rows[index])))
        keys = [c.table.keys[i] if isinstance(c, Chunk) else c.keys[i] for c, i in found]
        skipped = [(row, f"{c.shard}/{c.keys[i]}", c.reason) for row, (c, i) in enumerate(found) if isinstance(c, Bad)]
        made = Rows(step.step, step.positions, keys, skipped=skipped, retries=counts.retries - self._retries)
        self._retries += made.retries
        if self._arrays:
            self._gather(made, found)
        elif pool is not None and self._decode is not None:
            self._decoded(made, found, pool, self._decode)
        else:
            made.samples = [self._sample(c, i) for c, i in found]
            return made
        bucket = found[0][0].bucket
        if made.arrays:
            self._like[bucket] = {name: (array.shape[1:], array.dtype) for name, array in made.arrays.items()}
            return made
        # All of it is left out: zeros of the shape that such batches have, which weigh nothing.
        if bucket not in self._like:
            self._like[bucket] = self._example(chunks, bucket)
        like = self._like[bucket]
        if not like:
            raise DataError(f"of no sample like {made.skipped[0][1]} the shape can be told: {made.skipped[0][2]}")
        made.arrays = {name: np.zeros((len(keys), *shape), dtype) for name, (shape, dtype) in like.items()}
        return made

    def _example(self, chunks: Chunks, bucket: int) -> Forms:
        """Shape and dtype of each array of a bucket's samples, from one that can be read; {} if none is found."""
        for chunk in chunks.examples(bucket):
            if self._arrays:
                forms: Forms = {}
                for name, array in chunk.arrays.items():
                    forms |= array.forms(name)
                return forms
            for index in range(len(chunk.table.keys)):
                sample = self._sample(chunk, index)
                with suppress(Exception):
                    if self._decode and sample:
                        return {name: (one.shape, one.dtype) for name, one in self._decode(sample).items()}
        return {}

    def _sample(self, chunk: Chunk | Bad, index: int) -> Sample | None:
        """Its bytes are copied: the chunk's buffer is used again."""
        if isinstance(chunk, Bad):
            return None
        view, spans = chunk.view, chunk.table.sample(index)
        return Sample(
            chunk.table.keys[index], {name: bytes(view[at : at + size]) for name, (at, size) in spans.items()}
        )

    def _gather(self, made: Rows, found: list[tuple[Chunk | Bad, int]]) -> None:
        """Stack the arrays of a batch: one copy of each row, from the buffer that the network filled."""
        like = next((chunk for chunk, _ in found if isinstance(chunk, Chunk)), None)
        if like is None:
            return
        for name, length in self._arrays.items():
            first = like.arrays[name]
            out = self._allocate(name, (len(found), *first.shape), first.dtype)
            target, size = out.reshape(-1).view(np.uint8).data, first.bytes
            for row, (chunk, index) in enumerate(found):
                if isinstance(chunk, Bad):
                    target[row * size : (row + 1) * size] = bytes(size)
                    continue
                here = chunk.arrays[name]
                if here.dtype != first.dtype or here.shape != first.shape:
                    raise DataError(f"{name} of sample {made.keys[row]} is {here.dtype} {here.shape}, of others in its "
                                    f"batch {first.dtype} {first.shape}: cache them in buckets by shape")  # fmt: skip
                at = here.offsets[index]
                if here.rows is None:
                    target[row * size : (row + 1) * size] = chunk.view[at : at + size]
                    continue
                own = row * size + here.rows[index] * (size // length)
                target[row * size : own] = chunk.view[at : at + own - row * size]
                target[own : (row + 1) * size] = bytes((row + 1) * size - own)
            made.arrays[name] = out
            if length:
                mask = self._allocate(mask_of(name), (len(found), length), np.dtype(np.bool_))
                mask[...] = own_rows([_rows(chunk, name, index) for chunk, index in found], length)
                made.arrays[mask_of(name)] = mask

    def _decoded(
        self, made: Rows, found: list[tuple[Chunk | Bad, int]], pool: ThreadPoolExecutor, decode: Decode
    ) -> None:
        def one(place: tuple[Chunk | Bad, int]) -> Mapping[str, Array] | DataError | None:
            sample = self._sample(*place)
            if sample is None:
                return None
            try:
                return {name: np.asarray(value) for name, value in decode(sample).items()}
            except DataError as error:
                failure = error
            except Exception as error:
                failure = DataError(f"sample {sample.key} cannot be decoded ({type(error).__name__}: {error})")
                failure.__cause__ = error
            if self.reading.on_error == "strict":
                raise failure
            return failure

        parts = list(pool.map(one, found))
        for row, part in enumerate(parts):
            if isinstance(part, DataError):
                made.skipped.append((row, f"{found[row][0].shard}/{made.keys[row]}", str(part)))
        shapes = [
            None if not isinstance(part, Mapping) else {name: (one.dtype, one.shape) for name, one in part.items()}
            for part in parts
        ]
        like = next((shape for shape in shapes if shape is not None), {})
        for key, one_shape in zip(made.keys, shapes):
            if one_shape not in (None, like):
                raise DataError(f"decode makes {one_shape} of sample {key}, and {like} of others in its batch: "
                                "it must give the same names, dtypes and shapes")  # fmt: skip
        for name, (dtype, shape) in like.items():
            out = self._allocate(name, (len(parts), *shape), dtype)
            for row, part in enumerate(parts):
                out[row] = part[name] if isinstance(part, Mapping) else 0
            made.arrays[name] = out


def _rows(chunk: Chunk | Bad, name: str, index: int) -> int:
    """Of a sample's own, in a padded array."""
    rows = chunk.arrays[name].rows if isinstance(chunk, Chunk) else None
    return rows[index] if rows else 0


def _lengths(datasets: Sequence[Dataset]) -> dict[str, int]:
    found: dict[str, int] = {}
    for dataset in datasets:
        for name, length in dataset.lengths.items():
            if found.setdefault(name, length) != length:
                raise ConfigError(
                    f"{name} has up to {length} rows in {dataset.store.uri} and {found[name]} in another dataset of "
                    f"this mixture: cache them with one conditions.{name}.length"
                )
    return found


def shares_of(mine: range, workers: int) -> list[range]:
    """The slots of each loader process, or of the one process that there is."""
    count = min(max(workers, 1), len(mine))
    parts = [slots(i, count, len(mine)) for i in range(count)]
    return [range(mine.start + part.start, mine.start + part.stop) for part in parts]


def _lane_bytes(dataset: Dataset, layout: Layout, window: int) -> tuple[int, int]:
    """(bytes of chunks that one lane holds at most: those of a window, and one begun; bytes of all shards)."""
    chosen = np.arange(len(layout.counts)) if layout.chosen is None else layout.chosen
    edges = np.searchsorted(chosen, layout.firsts)
    chunks = np.diff(edges)
    samples = np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(layout.counts, dtype=np.int64)])[edges])
    held = -(-window * chunks // np.maximum(samples, 1)) + 1  # by what a chunk of the shard holds, of what counts
    largest = np.array([largest_chunk(shard) for shard in dataset.shards], np.int64)
    return int((held * largest)[chunks > 0].max()), sum(shard.bytes for shard in dataset.shards)


def _with_memory(
    datasets: Sequence[Dataset],
    layouts: Sequence[Layout],
    order: OrderSettings,
    mine: range,
    reading: Reading,
    schedule: Schedule,
) -> Reading:
    """`reading` with the memory that the lanes of these slots need, or more, if it names none.

    Raises:
        ConfigError: it names less.
    """
    shares = shares_of(mine, reading.workers)
    processes = len(shares)
    each = [_lane_bytes(dataset, layout, order.window) for dataset, layout in zip(datasets, layouts)]
    need = max(
        sum(min(lanes * held, whole) for lanes, (held, whole) in zip(schedule.lanes(share), each, strict=True))
        for share in shares
    )
    if not reading.memory:
        return replace(reading, memory=max(MEMORY, processes * (need + min(need // 3 + 1, BESIDE))))
    room = reading.shared(processes).for_chunks
    if need > room:
        have = f"memory={reading.memory / 2**20:,.0f} MiB leaves {room / 2**20:,.0f} to each of {processes}"
        raise ConfigError(
            f"the lanes of one reading process hold up to {need / 2**20:,.0f} MiB of chunks at once, and {have}: "
            f"raise it (stream.memory_mb of a job), or lower window={order.window} or "
            f"lanes={order.lanes or order.batch} (train.window, train.lanes)"
        )
    return reading
