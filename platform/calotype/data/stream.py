"""Manifest -> one global order -> batches, and one cursor.

A global position p counts samples from 0 for ever: epoch e = p // N, index i = p % N, slot s = p % B of the global
batch.  Rank r of W owns slots floor(rB/W) .. floor((r+1)B/W); slot s belongs to lane s // (B/L).  Within an epoch the
chunks are permuted and their samples laid in one line; every lane gets the span of the line that is as long as the
lane has slots in this epoch; windows of a lane's span are permuted.  All of it is closed form: any position is located
without walking there, each sample comes exactly once per epoch, a batch may straddle two epochs, and nothing depends
on W.  A rank's lanes are neighbours on the line, so it reads about 1/W of the bytes (L >= W).

Memory of a rank is about (lanes of it) x (window + chunk) samples: fewer lanes or a smaller window need less.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calotype.data.shards import Sample, Shard, open_chunk, read_sidecar
from calotype.data.store import Store
from calotype.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]

READERS = 16  # parallel range GETs of one rank
SPARE = 256 * 2**20  # bytes of finished chunks kept for the next epoch: a small data set is downloaded once
WINDOWS = 4096  # permutations of windows kept
AHEAD = 4  # batches whose chunks are asked for before they are needed


class Purpose(IntEnum):
    """What a stream of random numbers is for.  Numbers are for ever: runs resume by them."""

    NOISE = 1
    TIMESTEP = 2
    DROP = 3
    POSTERIOR = 4
    FLIP = 5
    CHUNKS = 101
    WINDOW = 102


def philox(seed: int, position: int, purpose: int) -> np.random.Generator:
    """Random numbers of one sample for one purpose: the same on any rank, in any order (Salmon et al. 2011)."""
    return np.random.Generator(_bits(seed, purpose, position))


def _bits(seed: int, purpose: int, *counter: int) -> np.random.Philox:
    """The first counter word is left to the generator: 2^64 numbers before it meets a neighbour."""
    words = sum(word << 64 * (index + 1) for index, word in enumerate(counter))
    return np.random.Philox(counter=words, key=seed % 2**64 | purpose << 64)


def _permutation(size: int, seed: int, purpose: int, *counter: int) -> Ints:
    """By sorting raw bits: numpy promises those for ever, and not what its `permutation` makes of them."""
    return np.argsort(_bits(seed, purpose, *counter).random_raw(size), kind="stable")


def slots(rank: int, world: int, batch: int) -> range:
    """The slots of the global batch that a rank owns; `world` need not divide `batch`."""
    return range(rank * batch // world, (rank + 1) * batch // world)


class _Epoch(NamedTuple):
    chunks: Ints  # (chunks,) permuted
    starts: Ints  # (chunks + 1,) where each begins on the line
    ranks: Ints  # (chunks,) chunk -> its rank in the permutation


class Order:
    """Position -> (chunk, index in the chunk).  `counts`: samples per chunk, in manifest order."""

    def __init__(self, counts: Sequence[int] | Ints, seed: int, batch: int, lanes: int = 0, window: int = 1024) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.batch, self.lanes, self.window = seed, batch, lanes or batch, window
        if not len(self.counts) or self.counts.min() < 1:
            raise DataError("there is nothing to stream: no chunks, or one without samples")
        if batch < 1 or self.lanes < 1 or batch % self.lanes or window < 1:
            raise ConfigError(f"train.lanes={lanes} must divide train.batch={batch}, and train.window={window} be > 0")
        self._total = int(self.counts.sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """N, samples per epoch."""
        return self._total

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Chunk number and index in the chunk of every position, each of their shape."""
        positions = np.asarray(positions, np.int64)
        chunk, index = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(positions // self._total):
            here = positions // self._total == epoch
            lane, place = self._lane(positions[here])
            line = self._line(int(epoch), lane, place)
            chunks, starts, _ = self.epoch(int(epoch))
            found = np.searchsorted(starts, line, side="right") - 1
            chunk[here], index[here] = chunks[found], line - starts[found]
        return chunk, index

    def last_use(self, epoch: int, chunk: int, mine: range) -> int:
        """One past the last position of the epoch at which the lanes of slots `mine` need the chunk."""
        width = self.batch // self.lanes
        at = self.epoch(epoch)
        begin, end = int(at.starts[at.ranks[chunk]]), int(at.starts[at.ranks[chunk] + 1])
        spans = self._span(epoch, np.arange(self.lanes + 1))
        first = max(int(np.searchsorted(spans, begin, side="right")) - 1, mine.start // width)
        last = min(int(np.searchsorted(spans, end - 1, side="right")) - 1, (mine.stop - 1) // width)
        until = 0
        for lane in range(first, last + 1):
            low, high = max(begin - int(spans[lane]), 0), min(end, int(spans[lane + 1])) - int(spans[lane])
            if low < high:
                number, left, right = (int(x) for x in self._bounds(epoch, np.int64(lane), np.int64(high - 1)))
                shuffled = self._window(epoch, lane, number, right - left) + left
                place = left + int(np.flatnonzero((shuffled >= low) & (shuffled < high))[-1])
                until = max(until, self._position(epoch, lane, place) + 1)
        return until

    def epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                chunks = _permutation(len(self.counts), self.seed, Purpose.CHUNKS, epoch)
                starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[chunks])])
                ranks = np.empty_like(chunks)
                ranks[chunks] = np.arange(len(chunks))
                self._epochs[epoch] = _Epoch(chunks, starts, ranks)
                while len(self._epochs) > 2:  # a batch straddles two at most
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    # With y = o + i, o = eN mod B, slot(y) = y mod B.  The number of y in [0, x) with slot < t is
    # below(x, t) = floor(x / B) t + min(x mod B, t); everything else is differences of it.

    def _below(self, x: Any, t: Any) -> Any:
        return x // self.batch * t + np.minimum(x % self.batch, t)

    def _span(self, epoch: int, lane: Any) -> Any:
        """Where a lane's span of the line begins; lane L: where the last one ends, N."""
        first = epoch * self._total % self.batch
        border = lane * (self.batch // self.lanes)
        return self._below(first + self._total, border) - self._below(first, border)

    def _lane(self, positions: Ints) -> tuple[Ints, Ints]:
        """Lane of each position, and its index among the positions that the lane has in the epoch."""
        width = self.batch // self.lanes
        lane = positions % self.batch // width
        index = positions % self._total
        first = (positions - index) % self.batch
        low, high = lane * width, (lane + 1) * width
        before = self._below(first + index, high) - self._below(first + index, low)
        return lane, before - (self._below(first, high) - self._below(first, low))

    def _position(self, epoch: int, lane: int, place: int) -> int:
        """The inverse of `_lane`."""
        width, first = self.batch // self.lanes, epoch * self._total % self.batch
        count = place + int(self._below(first, (lane + 1) * width) - self._below(first, lane * width))
        return count // width * self.batch + lane * width + count % width - first + epoch * self._total

    def _bounds(self, epoch: int, lane: Any, place: Any) -> tuple[Any, Any, Any]:
        """(number, begin, end) of the window around a lane's index.  The first is shorter, by lane: lanes that all
        began new windows at one step would ask for all their chunks at once."""
        size = self._span(epoch, lane + 1) - self._span(epoch, lane)
        short = self.window * (lane + 1) // self.lanes
        short = np.maximum(short, 1)
        number = (place - short) // self.window + 1
        begin = np.where(number == 0, 0, short + (number - 1) * self.window)
        return number, begin, np.minimum(short + number * self.window, size)

    def _line(self, epoch: int, lane: Ints, place: Ints) -> Ints:
        """Index on the epoch's line of sample `place` of each lane."""
        number, begin, end = self._bounds(epoch, lane, place)
        line = np.empty_like(place)
        key = lane * (int(number.max()) + 1) + number
        by_window = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[by_window], prepend=-1, append=-1))
        for start, stop in pairwise(edges):
            group = by_window[start:stop]
            one = group[0]
            shuffled = self._window(epoch, int(lane[one]), int(number[one]), int(end[one] - begin[one]))
            line[group] = begin[one] + shuffled[place[group] - begin[one]]
        return line + self._span(epoch, lane)

    def _window(self, epoch: int, lane: int, number: int, size: int) -> Ints:
        """Permutation of a window of `size` samples."""
        name = (epoch, lane, number)
        with self._lock:
            found = self._windows.get(name)
            if found is None:
                found = _permutation(size, self.seed, Purpose.WINDOW, epoch, lane, number)
                self._windows[name] = found
                while len(self._windows) > WINDOWS:
                    self._windows.popitem(last=False)
            else:
                self._windows.move_to_end(name)
            return found


@dataclass(frozen=True)
class Batch:
    """One rank's share of global batch `step`."""

    step: int
    positions: Ints  # (n,) global positions, one per sample
    samples: list[Sample]
    wait: float  # seconds that the consumer waited for it


@dataclass
class _Held:
    """A chunk that is on its way or in use."""

    chunk: Future[list[Sample]]
    epoch: int
    until: int  # position before which it is needed


class Stream(Iterable[Batch]):
    """One rank's batches, for ever.  A thread of its own plans ahead, others fetch chunks; `close` ends them.

    `position`: global, of the first batch.  The cursor is that of the batch after the one handed out last.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[Shard],
        *,
        seed: int,
        batch: int,
        lanes: int = 0,
        window: int = 1024,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
    ) -> None:
        counts = [shard.chunk_counts() for shard in shards]
        self.order = Order([n for each in counts for n in each], seed, batch, lanes, window)
        self.batch, self.slots = batch, slots(rank, world, batch)
        self._store, self._shards = store, tuple(shards)
        self._firsts = np.cumsum([0, *(len(each) for each in counts)])  # first chunk of every shard
        self._tables: dict[int, Future[tuple[Ints, tuple[str, ...]]]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.load_state_dict({"position": position})

    def state_dict(self) -> dict[str, int]:
        """The cursor; the same on every rank, and good for any world size."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a cursor; an iteration that is under way ends."""
        position = state["position"]
        if position < 0 or position % self.batch:
            raise DataError(f"position {position} is not the start of a batch of {self.batch}: train.batch was changed")
        self.close()
        self._position = position

    def close(self) -> None:
        """Stop reading; iterating again goes on from the cursor."""
        self._stop.set()

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._stop = stop = threading.Event()
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
        reader = threading.Thread(target=self._read, args=(self._position, ready, stop), daemon=True, name="stream")
        reader.start()
        try:
            while not stop.is_set():
                began = time.perf_counter()
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self._position = (item.step + 1) * self.batch
                yield replace(item, wait=time.perf_counter() - began)
        finally:
            stop.set()

    def _read(self, position: int, ready: queue.Queue[Batch | BaseException], stop: threading.Event) -> None:
        """Ask for the chunks of the next AHEAD batches, then hand out the first, over and over."""
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="chunk")
        planned: deque[tuple[int, Ints, Ints, Ints]] = deque()
        held = _Chunks(self.order, self.slots, lambda chunk: pool.submit(self._fetch, chunk))
        step = position // self.batch
        try:
            while not stop.is_set():
                while len(planned) < AHEAD:
                    positions = step * self.batch + np.arange(self.slots.start, self.slots.stop, dtype=np.int64)
                    chunks, indices = self.order.locate(positions)
                    held.request(positions, chunks)
                    planned.append((step, positions, chunks, indices))
                    step += 1
                number, positions, chunks, indices = planned.popleft()
                samples = [held.sample(int(chunk), int(index)) for chunk, index in zip(chunks, indices)]
                held.release((number + 1) * self.batch)
                _offer(ready, Batch(number, positions, samples, 0.0), stop)
        except Exception as error:  # whatever it is, the consumer must get it
            _offer(ready, error, stop)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, chunk: int) -> list[Sample]:
        number = int(np.searchsorted(self._firsts, chunk, side="right")) - 1
        index = chunk - int(self._firsts[number])
        offsets, hashes = self._table(number)
        start, stop = int(offsets[index]), int(offsets[index + 1])
        return open_chunk(self._store, self._shards[number], start, stop, hashes[index], index)

    def _table(self, number: int) -> tuple[Ints, tuple[str, ...]]:
        """Offsets and hashes of a shard's chunks.  Read once, by whoever comes first; the rest of the sidecar goes."""
        with self._lock:
            table = self._tables.get(number)
            mine = table is None
            if table is None:
                table = self._tables[number] = Future()
        if mine:
            try:
                sidecar = read_sidecar(self._store, self._shards[number])
                table.set_result((sidecar.offsets, sidecar.hashes))
            except BaseException as error:
                table.set_exception(error)
                with self._lock:
                    del self._tables[number]  # the next iteration may try again
        return table.result()


class _Chunks:
    """The chunks in memory: each from its first request until its last use in the epoch, then for as long as there
    is room, so that a small data set is downloaded once."""

    def __init__(self, order: Order, mine: range, fetch: Callable[[int], Future[list[Sample]]]) -> None:
        self._order, self._mine, self._fetch = order, mine, fetch
        self._held: dict[int, _Held] = {}
        self._ends: list[tuple[int, int]] = []  # heap of (until, chunk)
        self._spare: OrderedDict[int, Future[list[Sample]]] = OrderedDict()
        self._spare_bytes = 0

    def request(self, positions: Ints, chunks: Ints) -> None:
        for epoch, chunk in sorted({(int(p) // len(self._order), int(c)) for p, c in zip(positions, chunks)}):
            held = self._held.get(chunk)
            if held is None:
                held = self._held[chunk] = _Held(self._take(chunk), -1, 0)
            if held.epoch < epoch:
                held.epoch, held.until = epoch, self._order.last_use(epoch, chunk, self._mine)
                heapq.heappush(self._ends, (held.until, chunk))

    def sample(self, chunk: int, index: int) -> Sample:
        return self._held[chunk].chunk.result()[index]

    def release(self, position: int) -> None:
        """Everything before `position` was handed out."""
        while self._ends and self._ends[0][0] <= position:
            until, chunk = heapq.heappop(self._ends)
            if self._held[chunk].until == until:  # else it is needed again, in the next epoch
                future = self._held.pop(chunk).chunk
                self._spare[chunk] = future
                self._spare_bytes += _size(future)
        while self._spare_bytes > SPARE:
            self._spare_bytes -= _size(self._spare.popitem(last=False)[1])

    def _take(self, chunk: int) -> Future[list[Sample]]:
        future = self._spare.pop(chunk, None)
        if future is None:
            return self._fetch(chunk)
        self._spare_bytes -= _size(future)
        return future


def _size(chunk: Future[list[Sample]]) -> int:
    return sum(len(data) for sample in chunk.result() for data in sample.members.values())


def _offer(ready: queue.Queue[Batch | BaseException], item: Batch | BaseException, stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(queue.Full):
            ready.put(item, timeout=0.1)
            return
