"""One pool of chunks -> one global order of its samples, in closed form.

A position p counts samples from 0 for ever: epoch e = p // N, index i = p % N, slot s = p % B of the global batch.
Rank r of W owns slots floor(rB/W) .. floor((r+1)B/W); lane l of L has slots floor(lB/L) .. floor((l+1)B/L).  Within an
epoch the chunks are permuted and their samples laid in one line; every lane gets the span of the line that is as long
as the lane has slots in this epoch; windows of a lane's span are permuted.  So any position is located without walking
there, each sample comes exactly once per epoch, a batch may straddle two epochs, and nothing depends on W.  A rank's
lanes are neighbours on the line, so it reads about 1/W of the bytes (L >= W).

How far a sample travels: its chunk goes anywhere in the epoch; inside the lane, up to a window from its place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calotype.data.draws import Ints, Purpose, permutation
from calotype.errors import ConfigError, DataError

WINDOWS = 4096  # permutations of windows kept
BLOCK = 64  # chunks of the line between two remembered starts: 10^7 chunks need 1 MB, not 80


def slots(rank: int, world: int, batch: int) -> range:
    """The slots of the global batch that a rank owns; `world` need not divide `batch`."""
    return range(rank * batch // world, (rank + 1) * batch // world)


class _Epoch(NamedTuple):
    chunks: np.ndarray[Any, Any]  # (chunks,) permuted, int32 where that holds them
    starts: Ints  # (ceil(chunks / BLOCK) + 1,) where every BLOCK-th chunk begins on the line; at last N
    spans: Ints  # (lanes + 1,) where every lane's span of the line begins; at last N


class Order:
    """Position -> (chunk, index in the chunk).

    Args:
        counts: (chunks,) samples per chunk, in manifest order.
        lanes: at most `batch`; 0 for as many.
        window: samples of a lane that are shuffled together.
    """

    def __init__(
        self, counts: Sequence[int] | npt.NDArray[Any], seed: int, batch: int, lanes: int = 0, window: int = 128
    ) -> None:
        self.counts = np.asarray(counts)
        if not len(self.counts) or self.counts.min() < 1:
            raise DataError("there is nothing to stream: no chunks, or one without samples")
        if self.counts.max() < 2**31:
            self.counts = self.counts.astype(np.int32, copy=False)
        self.seed, self.batch, self.lanes, self.window = seed, batch, lanes or batch, window
        if batch < 1 or not 1 <= self.lanes <= batch or window < 1:
            raise ConfigError(f"lanes={lanes} must be 0 to batch={batch}, and window={window} be greater than 0")
        self._total = int(self.counts.sum(dtype=np.int64))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """N, samples per epoch."""
        return self._total

    def locate(self, positions: Ints) -> tuple[Ints, Ints, Ints]:
        """Chunk number, index in the chunk, and the chunk's place on the epoch's line, each of the positions' shape."""
        positions = np.asarray(positions, np.int64)
        chunk, index, place = np.empty_like(positions), np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(positions // self._total):
            here = positions // self._total == epoch
            at = self._epoch(int(epoch))
            line = self._line(int(epoch), at.spans, *self._lane(positions[here]))
            found, begin = self._find(at, line)
            chunk[here], index[here], place[here] = at.chunks[found], line - begin, found
        return chunk, index, place

    def last_use(self, epoch: int, place: int, mine: range) -> int:
        """One past the last position of the epoch at which the lanes of slots `mine` need the chunk at this place."""
        at = self._epoch(epoch)
        block = place // BLOCK
        begin = int(at.starts[block]) + int(self.counts[at.chunks[block * BLOCK : place]].sum(dtype=np.int64))
        end = begin + int(self.counts[at.chunks[place]])
        low_lane = max(int(np.searchsorted(at.spans, begin, side="right")) - 1, self._lane_of(mine.start))
        high_lane = min(int(np.searchsorted(at.spans, end - 1, side="right")) - 1, self._lane_of(mine.stop - 1))
        until = 0
        for lane in range(low_lane, high_lane + 1):
            first, size = int(at.spans[lane]), int(at.spans[lane + 1] - at.spans[lane])
            low, high = max(begin - first, 0), min(end - first, size)
            if low < high:
                number, left, right = (int(x) for x in self._bounds(lane, high - 1, size))
                shuffled = self._window(epoch, lane, number, right - left) + left
                last = left + int(np.flatnonzero((shuffled >= low) & (shuffled < high))[-1])
                until = max(until, self._position(epoch, lane, last) + 1)
        return until

    def lanes_of(self, mine: range) -> int:
        """How many lanes these slots take from."""
        return int(self._lane_of(mine.stop - 1) - self._lane_of(mine.start)) + 1 if mine else 0

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                chunks = permutation(len(self.counts), self.seed, Purpose.CHUNKS, epoch)
                if len(chunks) < 2**31:
                    chunks = chunks.astype(np.int32)
                sizes = np.add.reduceat(self.counts[chunks], np.arange(0, len(chunks), BLOCK), dtype=np.int64)
                starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
                self._epochs[epoch] = _Epoch(chunks, starts, self._spans(epoch))
                while len(self._epochs) > 2:  # a block of positions rarely straddles more
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _find(self, at: _Epoch, line: Ints) -> tuple[Ints, Ints]:
        """Place of the chunk that holds each index of the line, and where that chunk begins."""
        blocks = np.unique(np.searchsorted(at.starts, line, side="right") - 1)
        places = blocks[:, None] * BLOCK + np.arange(BLOCK)  # of few blocks: neighbours on the line are neighbours here
        counts = self.counts[at.chunks[np.minimum(places, len(at.chunks) - 1)]]
        counts[places >= len(at.chunks)] = 0
        ends = (at.starts[blocks][:, None] + np.cumsum(counts, 1, dtype=np.int64)).reshape(-1)  # never falling
        found = np.searchsorted(ends, line, side="right")
        return places.reshape(-1)[found], ends[found] - counts.reshape(-1)[found]

    # With y = o + i, o = eN mod B, slot(y) = y mod B.  The number of y in [0, x) with slot < t is
    # below(x, t) = floor(x / B) t + min(x mod B, t); everything else is differences of it.

    def _below(self, x: Any, t: Any) -> Any:
        return x // self.batch * t + np.minimum(x % self.batch, t)

    def _border(self, lane: Any) -> Any:
        """The first slot of a lane; lane L: B."""
        return lane * self.batch // self.lanes

    def _lane_of(self, slot: Any) -> Any:
        return ((slot + 1) * self.lanes - 1) // self.batch

    def _spans(self, epoch: int) -> Ints:
        first = epoch * self._total % self.batch
        border = self._border(np.arange(self.lanes + 1))
        return self._below(first + self._total, border) - self._below(first, border)

    def _lane(self, positions: Ints) -> tuple[Ints, Ints]:
        """Lane of each position, and its index among the positions that the lane has in the epoch."""
        lane = self._lane_of(positions % self.batch)
        index = positions % self._total
        first = (positions - index) % self.batch
        low, high = self._border(lane), self._border(lane + 1)
        before = self._below(first + index, high) - self._below(first + index, low)
        return lane, before - (self._below(first, high) - self._below(first, low))

    def _position(self, epoch: int, lane: int, index: int) -> int:
        """The inverse of `_lane`."""
        low, high = int(self._border(lane)), int(self._border(lane + 1))
        first = epoch * self._total % self.batch
        count = index + int(self._below(first, high) - self._below(first, low))
        return count // (high - low) * self.batch + low + count % (high - low) - first + epoch * self._total

    def _bounds(self, lane: Any, index: Any, size: Any) -> tuple[Any, Any, Any]:
        """(number, begin, end) of the window around the index of a lane of this size.  The first is shorter, by lane:
        lanes that all began new windows at one step would ask for all their chunks at once."""
        short = np.maximum(self.window * (lane + 1) // self.lanes, 1)
        number = (index - short) // self.window + 1
        begin = np.where(number == 0, 0, short + (number - 1) * self.window)
        return number, begin, np.minimum(short + number * self.window, size)

    def _line(self, epoch: int, spans: Ints, lane: Ints, index: Ints) -> Ints:
        """Index on the epoch's line of the samples with these indices in their lanes."""
        number, begin, end = self._bounds(lane, index, spans[lane + 1] - spans[lane])
        line = np.empty_like(index)
        key = lane * (int(number.max()) + 1) + number
        by_window = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[by_window], prepend=-1, append=-1))
        for start, stop in pairwise(edges):
            group = by_window[start:stop]
            one = group[0]
            left = int(begin[one])
            shuffled = self._window(epoch, int(lane[one]), int(number[one]), int(end[one]) - left)
            line[group] = left + shuffled[index[group] - left]
        return line + spans[lane]

    def _window(self, epoch: int, lane: int, number: int, size: int) -> Ints:
        """Permutation of a window of `size` samples."""
        name = (epoch, lane, number)
        with self._lock:
            found = self._windows.get(name)
            if found is None:
                found = permutation(size, self.seed, Purpose.WINDOW, epoch, lane, number)
                self._windows[name] = found
                while len(self._windows) > WINDOWS:
                    self._windows.popitem(last=False)
            else:
                self._windows.move_to_end(name)
            return found
