"""Several datasets and shapes -> one order: which sample comes at every global position.

A global batch holds samples of one bucket (shape).  Within epoch e bucket k has the batches that its own stream of
samples completes, floor((e + 1) V_k / B) - floor(e V_k / B) of them for V_k samples; which step takes which bucket is a
permutation of these.  Within a bucket, slots are dealt to datasets by a pattern that repeats every K batches, so that
each dataset has its share of every batch and of every rank's slots, and goes through its own `Order`.  A dataset with
fewer slots in a batch than there are ranks is read by several of them: a small part of a mixture costs up to that many
times its bytes.

All of it is a pure function of (manifests, weights, seed, batch, lanes, window): position -> chunk and index, for any
position at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from calotype.data.dataset import Layout
from calotype.data.draws import Ints, Purpose, permutation
from calotype.data.order import Order
from calotype.errors import ConfigError

CYCLE = 64  # batches, at most, after which the pattern of a mixture repeats
FINE = 10**6  # samples of a virtual epoch, at least: small weights are not rounded away
EXACT = Fraction(1, 200)  # relative error that a dataset's share of the slots may have


class Places(NamedTuple):
    """Where samples lie, each (n,): chunk over all datasets, row in it, and what `last_use` wants to know."""

    chunk: Ints
    row: Ints
    pool: Ints
    epoch: Ints  # of the pool
    place: Ints  # of the chunk in the pool's epoch


@dataclass(frozen=True)
class _Pool:
    """The chunks of one dataset in one bucket."""

    dataset: int
    first: int  # chunk of the dataset, over all datasets
    chunks: Ints | None  # (chunks,) their numbers in the dataset; None: all of them
    order: Order

    def numbers(self, chunks: Ints) -> Ints:
        """Chunks of the order -> their numbers over all datasets."""
        return self.first + (chunks if self.chunks is None else self.chunks[chunks])


class Schedule:
    """Position -> dataset, chunk and row of its sample.

    Args:
        layouts: of every dataset.
        weights: of every dataset.
    """

    def __init__(
        self, layouts: Sequence[Layout], weights: Sequence[float], seed: int, batch: int, lanes: int, window: int
    ) -> None:
        if any(not weight > 0 for weight in weights):
            raise ConfigError(f"weights of datasets must be greater than 0, not {', '.join(map(str, weights))}")
        if lanes and not 1 <= lanes <= batch:
            raise ConfigError(f"lanes={lanes} must be 0 to batch={batch} (train.lanes, train.batch)")
        self.batch, self.seed, self._datasets = batch, seed, len(layouts)
        firsts = np.cumsum([0, *(len(layout.counts) for layout in layouts)])
        buckets = sorted({bucket for layout in layouts for bucket in layout.buckets()})
        sizes = [[_size(layout, bucket) for bucket in buckets] for layout in layouts]
        virtual = _virtual(sizes, weights)
        self.samples = sum(map(sum, sizes))  # of an epoch, where there is one dataset
        self._counts = [sum(row[k] for row in virtual) for k in range(len(buckets))]
        self._pools: list[_Pool] = []
        self._mixes: list[_Mix] = []
        for k, bucket in enumerate(buckets):
            mine = [d for d in range(len(layouts)) if sizes[d][k]]
            mix = _Mix([virtual[d][k] for d in mine], batch, len(self._pools))
            for d, quota in zip(mine, mix.quotas):
                chunks, counts = layouts[d].chunks_of(bucket), layouts[d].counts
                share = max(1, min(quota, round((lanes or batch) * quota / (mix.cycle * batch))))
                order = Order(counts if chunks is None else counts[chunks], seed, quota, share, window)
                self._pools.append(_Pool(d, int(firsts[d]), chunks, order))
            self._mixes.append(mix)
        self._epochs: OrderedDict[int, _Steps] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, positions: Ints) -> Places:
        """Where the samples of these global positions (n,) lie."""
        step, slot = np.divmod(np.asarray(positions, np.int64), self.batch)
        made = Places(*(np.empty(len(step), np.int64) for _ in Places._fields))
        if len(self._mixes) == 1:
            self._fill(made, np.arange(len(step)), self._mixes[0], step, slot)
            return made
        steps, back = np.unique(step, return_inverse=True)
        found = np.array([self._turn(int(one)) for one in steps], np.int64).reshape(-1, 2)[back]
        for k in np.unique(found[:, 0]):
            rows = np.flatnonzero(found[:, 0] == k)
            self._fill(made, rows, self._mixes[k], found[rows, 1], slot[rows])
        return made

    def _fill(self, made: Places, rows: Ints, mix: _Mix, turn: Ints, slot: Ints) -> None:
        """Places of the samples in these slots of the `turn`-th batches of a bucket."""
        cycle, within = np.divmod(turn, mix.cycle)
        line = slot * mix.cycle + within
        for number, quota in enumerate(mix.quotas):
            here = np.flatnonzero(mix.owner[line] == number)
            if len(here):
                pool = self._pools[mix.first + number]
                positions = cycle[here] * quota + mix.rank[line[here]]
                chunk, index, place = pool.order.locate(positions)
                rows_here = rows[here]
                made.chunk[rows_here], made.row[rows_here] = pool.numbers(chunk), index
                made.pool[rows_here], made.place[rows_here] = mix.first + number, place
                made.epoch[rows_here] = positions // len(pool.order)

    def lanes(self, mine: range) -> list[int]:
        """Of every dataset, how many lanes slots `mine` take from, in all of its buckets."""
        found = [0] * self._datasets
        for mix in self._mixes:
            for number, lines in enumerate(mix.lines):
                pool = self._pools[mix.first + number]
                low, high = np.searchsorted(lines, [mine.start * mix.cycle, mine.stop * mix.cycle])
                found[pool.dataset] += pool.order.lanes_of(range(int(low), int(high)))
        return found

    def last_use(self, pool: int, epoch: int, place: int, mine: range) -> int:
        """One past the last global position at which slots `mine` need the chunk in this epoch of its pool."""
        k, mix = next((k, mix) for k, mix in enumerate(self._mixes) if mix.first <= pool < mix.first + len(mix.quotas))
        lines = mix.lines[pool - mix.first]
        low, high = np.searchsorted(lines, [mine.start * mix.cycle, mine.stop * mix.cycle])
        last = self._pools[pool].order.last_use(epoch, place, range(int(low), int(high))) - 1
        cycle, rank = divmod(last, mix.quotas[pool - mix.first])
        if mix.cycle > 1:  # somewhere in the cycle: its end is late enough
            turn, slot = (cycle + 1) * mix.cycle - 1, self.batch - 1
        else:
            turn, slot = cycle, int(lines[rank])
        step = turn if len(self._mixes) == 1 else self._step_of(k, turn)
        return step * self.batch + slot + 1

    # ---------------------------------------------------------------------------------- buckets

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * count // self.batch for count in self._counts)

    def _turn(self, step: int) -> tuple[int, int]:
        """(bucket, which of its batches) of a step."""
        epoch = step * self.batch // sum(self._counts)
        while self._steps_before(epoch) > step:
            epoch -= 1
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        steps, at = self._steps(epoch), step - self._steps_before(epoch)
        k = int(steps.bucket[at])
        return k, epoch * self._counts[k] // self.batch + int(steps.turn[at])

    def _step_of(self, k: int, turn: int) -> int:
        """The inverse of `_turn`."""
        count = self._counts[k]
        epoch = turn * self.batch // count
        while (epoch + 1) * count // self.batch <= turn:
            epoch += 1
        while epoch * count // self.batch > turn:
            epoch -= 1
        return self._steps_before(epoch) + int(self._steps(epoch).of[k][turn - epoch * count // self.batch])

    def _steps(self, epoch: int) -> _Steps:
        with self._lock:
            if epoch not in self._epochs:
                sizes = [(epoch + 1) * count // self.batch - epoch * count // self.batch for count in self._counts]
                bucket = np.repeat(np.arange(len(sizes)), sizes)
                bucket = bucket[permutation(len(bucket), self.seed, Purpose.SHAPES, epoch)]
                turn = np.empty_like(bucket)
                by_bucket = np.argsort(bucket, kind="stable")
                turn[by_bucket] = np.concatenate([np.arange(size) for size in sizes])
                self._epochs[epoch] = _Steps(bucket, turn, np.split(by_bucket, np.cumsum(sizes)[:-1]))
                while len(self._epochs) > 4:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]


class _Steps(NamedTuple):
    """Per step of an epoch: its bucket, and how many of that bucket's batches of the epoch came before."""

    bucket: Ints
    turn: Ints
    of: list[Ints]  # the other way: a bucket's steps


class _Mix:
    """How the slots of K batches of one bucket are dealt to datasets: evenly along slots, so along ranks."""

    def __init__(self, sizes: Sequence[int], batch: int, first: int) -> None:
        self.first = first  # number of its first pool
        self.cycle, self.quotas = _quotas(sizes, batch)
        times = [(Fraction(2 * i + 1, 2 * quota), d, i) for d, quota in enumerate(self.quotas) for i in range(quota)]
        dealt = sorted(times) if len(self.quotas) > 1 else times
        self.owner = np.array([d for _, d, _ in dealt])  # (K B,) by slot, then by batch of the cycle
        self.rank = np.array([i for _, _, i in dealt])
        self.lines = [np.flatnonzero(self.owner == d) for d in range(len(self.quotas))]


def _size(layout: Layout, bucket: int) -> int:
    """Samples of a dataset in a bucket."""
    if bucket not in layout.buckets():
        return 0
    chunks = layout.chunks_of(bucket)
    return int((layout.counts if chunks is None else layout.counts[chunks]).sum(dtype=np.int64))


def _quotas(sizes: Sequence[int], batch: int) -> tuple[int, list[int]]:
    """(K, slots of each dataset in K batches): the smallest K that gives everyone its share, within EXACT."""
    total = sum(sizes)
    shares = [Fraction(size, total) for size in sizes]
    if len(sizes) == 1:
        return 1, [batch]
    cycle = 1
    while True:
        exact = [share * cycle * batch for share in shares]
        quotas = [int(one) for one in exact]
        by_rest = sorted(range(len(sizes)), key=lambda d: (quotas[d] - exact[d], d))
        for d in by_rest[: cycle * batch - sum(quotas)]:
            quotas[d] += 1
        near = all(abs(quota - one) <= EXACT * one for quota, one in zip(quotas, exact))
        if near or cycle == CYCLE:
            break
        cycle *= 2
    if min(quotas) < 1:
        raise ConfigError(f"a dataset with a share of {float(min(shares)):.2g} has no slot in {CYCLE} batches of "
                          f"{batch}: give it a greater weight, or raise the batch")  # fmt: skip
    return cycle, quotas


def _virtual(sizes: list[list[int]], weights: Sequence[float]) -> list[list[int]]:
    """[dataset][bucket] samples of a virtual epoch in which datasets have the shares that their weights say."""
    if len(sizes) == 1:
        return sizes
    total = max(sum(map(sum, sizes)), FINE)
    shares = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    scaled = [share / sum(shares) * total / sum(row) for share, row in zip(shares, sizes)]
    return [[max(1, round(scale * size)) if size else 0 for size in row] for scale, row in zip(scaled, sizes)]
