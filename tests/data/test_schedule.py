"""Mixtures and shapes: one shape per batch, each dataset its share of every rank, and still one order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from calotype.data.dataset import Dataset, Layout
from calotype.data.files import FolderStore
from calotype.data.manifest import Shard
from calotype.data.order import Order, slots
from calotype.data.schedule import Schedule
from calotype.errors import ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st

CHUNKS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=3, max_size=40)


def layout(chunks: list[tuple[int, int]], shapes: int) -> Layout:
    """Of (samples, bucket) per chunk."""
    counts = np.array([count for count, _ in chunks], np.int32)
    bucket = np.array([b % shapes for _, b in chunks], np.int32) if shapes > 1 else None
    return Layout(counts, np.array([0, len(counts)]), bucket)


@settings(max_examples=60, deadline=None)
@given(
    datasets=st.lists(CHUNKS, min_size=1, max_size=3),
    shapes=st.integers(1, 4),
    weights=st.lists(st.sampled_from([1.0, 0.3, 2.5]), min_size=3, max_size=3),
    batch=st.sampled_from([7, 16, 64]),
    lanes=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 100),
)
def test_any_mixture_of_any_shapes(
    datasets: list[list[tuple[int, int]]], shapes: int, weights: list[float], batch: int, lanes: int, seed: int
) -> None:
    layouts = [layout(chunks, shapes) for chunks in datasets]
    try:
        schedule = Schedule(layouts, weights[: len(layouts)], seed, batch, lanes, 16)
    except ConfigError:  # a dataset with few samples of a shape among many: said (below), not dropped
        return
    steps = 3 * schedule.samples // batch + 20
    positions = np.arange(steps * batch)
    found = schedule.locate(positions)
    counts = np.concatenate([one.counts for one in layouts])
    assert (found.row < counts[found.chunk]).all()
    of_chunk = [one.bucket if one.bucket is not None else np.zeros_like(one.counts) for one in layouts]
    bucket = np.concatenate(of_chunk)[found.chunk].reshape(-1, batch)
    assert (bucket == bucket[:, :1]).all(), "a batch has one shape"
    taken = Counter(zip(*(column.tolist() for column in (found.pool, found.epoch, found.chunk, found.row))))
    assert max(taken.values()) == 1, "once per epoch of its pool"
    for pool in np.unique(found.pool):
        mine = found.pool == pool
        mix = next(mix for mix in schedule._mixes if mix.first <= pool < mix.first + len(mix.quotas))
        batches = int((bucket[:, 0] == bucket.reshape(-1)[mine][0]).sum())
        done = batches // mix.cycle * mix.quotas[pool - mix.first]
        size = len(schedule._pools[pool].order)
        assert all((found.epoch[mine] == epoch).sum() == size for epoch in range(done // size)), "all of it"
    alone = np.random.default_rng(seed).integers(0, len(positions), 20)
    fresh = Schedule(layouts, weights[: len(layouts)], seed, batch, lanes, 16).locate(alone)
    assert (fresh.chunk == found.chunk[alone]).all()
    assert (fresh.row == found.row[alone]).all()


@settings(max_examples=25, deadline=None)
@given(
    datasets=st.lists(CHUNKS, min_size=1, max_size=2),
    shapes=st.integers(1, 3),
    world=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_chunks_are_held_long_enough(datasets: list[list[tuple[int, int]]], shapes: int, world: int, seed: int) -> None:
    schedule = Schedule([layout(chunks, shapes) for chunks in datasets], [1.0] * len(datasets), seed, 16, 0, 8)
    positions = np.arange((2 * schedule.samples // 16 + 5) * 16)
    found = schedule.locate(positions)
    for rank in range(world):
        mine = slots(rank, world, 16)
        owned = np.isin(positions % 16, list(mine))
        keys = np.stack([found.pool, found.epoch, found.place], 1)
        for key in np.unique(keys[owned], axis=0)[:50]:
            last = positions[owned & (keys == key).all(1)].max() + 1
            assert schedule.last_use(*(int(part) for part in key), mine) >= last


def test_one_dataset_of_one_shape_is_the_plain_order() -> None:
    chunks = [(5, 0), (9, 0), (3, 0)] * 9
    positions = np.arange(400)
    chunk, row, _ = Order([count for count, _ in chunks], 4, 16, 4, 8).locate(positions)
    found = Schedule([layout(chunks, 1)], [0.7], 4, 16, 4, 8).locate(positions)
    assert (found.chunk == chunk).all()
    assert (found.row == row).all()


@pytest.mark.parametrize("world", [1, 2, 5])
def test_each_rank_has_each_datasets_share(world: int) -> None:
    layouts = [layout([(10, 0)] * 100, 1), layout([(10, 0)] * 30, 1)]
    schedule = Schedule(layouts, [3.0, 1.0], 0, 64, 0, 16)
    chunk = schedule.locate(np.arange(64 * 400)).chunk.reshape(-1, 64)
    for rank in range(world):
        mine = slots(rank, world, 64)
        share = (chunk[:, mine.start : mine.stop] >= 100).mean()
        assert abs(share - 0.25) < 1 / len(mine) + 0.002  # a slot
    assert abs((chunk >= 100).mean() - 0.25) < 0.002


def test_weights_that_cannot_be() -> None:
    layouts = [layout([(10, 0)] * 10, 1)] * 2
    with pytest.raises(ConfigError, match="greater than 0"):
        Schedule(layouts, [1.0, 0.0], 0, 64, 0, 16)
    with pytest.raises(ConfigError, match="share"):
        Schedule(layouts, [1.0, 1e-5], 0, 8, 0, 16)


def test_shapes_come_mixed() -> None:
    schedule = Schedule([layout([(64, 0)] * 50 + [(64, 1)] * 50, 2)], [1.0], 0, 64, 0, 16)
    shapes = (schedule.locate(np.arange(100) * 64).chunk >= 50).astype(int)
    assert shapes.sum() == 50
    assert 30 < (np.diff(shapes) != 0).sum() < 70  # a fair coin: 50


def test_order_v1_of_shapes_and_mixtures_is_for_ever() -> None:
    """Runs resume by it: never change these."""
    layouts = [layout([(7, 0), (9, 1), (30, 0), (4, 1)], 2), layout([(20, 0), (5, 1), (6, 0)], 2)]
    found = Schedule(layouts, [2.0, 1.0], 3, 8, 0, 4).locate(np.arange(64))
    assert found.chunk[:16].tolist() == [2, 2, 4, 2, 4, 2, 2, 4, 6, 2, 2, 4, 2, 4, 2, 2]
    assert int((found.chunk * 31 + found.row).sum()) == 6287


def test_layout_of_rows() -> None:
    plain = Shard("a.tar", 10, 10, 4, "", "")
    shaped = Shard("b.tar", 10, 7, 3, "", "", buckets=((2, 4), (5, 3)))
    store = FolderStore(Path("/"))
    made = Dataset(store, [plain, plain]).layout()
    assert made.counts.tolist() == [4, 4, 2, 4, 4, 2]
    assert [made.find(chunk) for chunk in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert made.buckets() == [0]
    made = Dataset(store, [shaped, plain]).layout()
    assert made.counts.tolist() == [3, 1, 3, 4, 4, 2]
    assert made.bucket is not None
    assert made.bucket.tolist() == [2, 2, 5, 0, 0, 0]
    keep = {"a.tar": np.array([1, 0, 0, 1, 0, 0, 0, 0, 1, 1], np.bool_)}
    made = Dataset(store, [plain, shaped], keep=keep).layout()
    assert made.counts.tolist() == [2, 2]
    assert [made.find(chunk) for chunk in range(2)] == [(0, 0), (0, 2)]
    with pytest.raises(DataError, match=r"knows 10 samples of a\.tar"):
        Dataset(store, [Shard("a.tar", 10, 9, 4, "", "")], keep=keep).layout()
