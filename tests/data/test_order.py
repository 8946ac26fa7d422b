"""One order, in closed form: every sample once per epoch, any position alone, mixed well, never changed."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from calotype.data.draws import Purpose, philox
from calotype.data.order import Order, slots
from calotype.errors import ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st

BATCH = 64


def flat(order: Order, positions: np.ndarray) -> np.ndarray:
    """Sample numbers in manifest order."""
    chunk, index, _ = order.locate(positions)
    assert (index < order.counts[chunk]).all()
    return np.concatenate([[0], np.cumsum(order.counts)])[chunk] + index


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=60)  # shards of one sample, fewer chunks than lanes, ...
BATCHES = st.sampled_from([(1, 1), (12, 3), (64, 0), (64, 1), (64, 8), (64, 64), (7, 7), (64, 5), (10, 3)])
WINDOWS = st.sampled_from([1, 5, 64, 1024])


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, shape=BATCHES, window=WINDOWS, seed=st.integers(0, 2**63))
def test_every_sample_once_per_epoch(counts: list[int], shape: tuple[int, int], window: int, seed: int) -> None:
    order = Order(counts, seed, *shape, window)
    total = len(order)
    assert total == sum(counts)
    for epoch in range(3):  # N is rarely a multiple of B: epochs begin in the middle of batches
        assert sorted(flat(order, np.arange(epoch * total, (epoch + 1) * total))) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, shape=BATCHES, window=WINDOWS, data=st.data())
def test_any_position_is_located_alone(
    counts: list[int], shape: tuple[int, int], window: int, data: st.DataObject
) -> None:
    order = Order(counts, 3, *shape, window)
    whole = flat(order, np.arange(4 * len(order)))
    asked = data.draw(st.lists(st.integers(0, 4 * len(order) - 1), max_size=20))
    fresh = Order(counts, 3, *shape, window)
    assert list(flat(fresh, np.array(asked, np.int64))) == list(whole[asked])


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, shape=BATCHES, window=WINDOWS, world=st.integers(1, 5), epoch=st.integers(0, 2))
def test_last_use_is_never_too_early(
    counts: list[int], shape: tuple[int, int], window: int, world: int, epoch: int
) -> None:
    order = Order(counts, 1, *shape, window)
    positions = np.arange(epoch * len(order), (epoch + 1) * len(order))
    chunk, _, place = order.locate(positions)
    for rank in range(world):
        mine = slots(rank, world, shape[0])
        owned = np.isin(positions % shape[0], list(mine))
        for one in np.unique(chunk[owned]):
            true = positions[owned & (chunk == one)].max() + 1
            found = order.last_use(epoch, int(place[chunk == one][0]), mine)
            assert found == true if world == 1 else found >= true


def test_orders_differ_by_seed_and_epoch() -> None:
    order, other = Order([10] * 20, 0, BATCH), Order([10] * 20, 1, BATCH)
    first, second = flat(order, np.arange(200)), flat(order, np.arange(200, 400))
    assert (first != second).mean() > 0.9
    assert (first != flat(other, np.arange(200))).mean() > 0.9
    assert (flat(Order([10] * 20, 0, BATCH), np.arange(200)) == first).all()


def test_order_v1_is_for_ever() -> None:
    """Runs resume by it: never change these."""
    order = Order([256, 256, 100, 1, 256, 31], 7, 64, 16, 32)
    places = flat(order, np.arange(10_000))
    assert places[:8].tolist() == [613, 614, 638, 643, 673, 674, 676, 675]
    assert (
        hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()
        == "e0104b5bb7577c1addc50990dd20aaa53c19994623052f71412eb5f15c1c13e9"
    )
    assert philox(7, 2**40, Purpose.NOISE).bit_generator.random_raw(2).tolist() == [
        16108002432955230236,
        5842217651416551070,
    ]
    names = ["NOISE", "TIMESTEP", "DROP", "POSTERIOR", "FLIP", "CHUNKS", "WINDOW", "SHAPES"]
    assert {purpose.name: purpose.value for purpose in Purpose} == dict(zip(names, [*range(1, 6), 101, 102, 103]))


def test_random_numbers_belong_to_sample_and_purpose() -> None:
    draws = [
        philox(seed, position, purpose).standard_normal(1000)
        for seed in (0, 1, -1, 2**64 - 2)
        for position in (0, 1, 2**40)
        for purpose in (Purpose.NOISE, Purpose.DROP)
    ]
    for number, draw in enumerate(draws):
        assert abs(draw.mean()) < 0.15
        assert all(abs(np.corrcoef(draw, other)[0, 1]) < 0.15 for other in draws[:number])
    assert (philox(3, 5, 1).random(4) == philox(3, 5, 1).random(4)).all()


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_slots_are_a_partition(world: int, batch: int) -> None:
    owned = [slots(rank, world, batch) for rank in range(world)]
    assert [slot for each in owned for slot in each] == list(range(batch))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("lanes", [65, -64])
def test_impossible_lanes_are_refused(lanes: int) -> None:
    with pytest.raises(ConfigError, match=r"lanes=.* must be 0 to batch=64"):
        Order([10], 0, BATCH, lanes)
    with pytest.raises(DataError):
        Order([], 0, BATCH)


@pytest.mark.parametrize(("lanes", "window", "bound"), [(0, 128, 1.15), (16, 1024, 1.3), (64, 64, 1.3)])
def test_sorted_classes_come_out_mixed(lanes: int, window: int, bound: float) -> None:
    """Classes per batch spread like those of a true shuffle: chi-squared per degree of freedom is 1 there."""
    classes, each = 10, 4000
    order = Order([100] * (classes * each // 100), 0, BATCH, lanes, window)
    labels = flat(order, np.arange(classes * each)) // each
    assert spread(labels, classes) < bound * spread(np.random.default_rng(0).permutation(labels), classes)
    assert spread(np.sort(labels), classes) > 50


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, shape=BATCHES, window=WINDOWS, seed=st.integers(0, 100))
def test_a_sample_stays_within_a_window_of_its_chunk(
    counts: list[int], shape: tuple[int, int], window: int, seed: int
) -> None:
    """How far it travels: its chunk anywhere; inside the lane, less than a window from where the chunk lies."""
    order = Order(counts, seed, *shape, window)
    total = len(order)
    positions = np.arange(total)
    chunk, index, place = order.locate(positions)
    chunks = order._epoch(0).chunks
    starts = np.concatenate([[0], np.cumsum(order.counts[chunks])])
    assert (chunks[place] == chunk).all()
    line = starts[place] + index
    lane = order._lane_of(positions % order.batch)
    for one in np.unique(lane):
        mine = line[lane == one]  # in the order of positions: what the lane had without windows would be sorted
        assert np.abs(mine - np.sort(mine)).max(initial=0) < window


def test_chunks_go_anywhere() -> None:
    order = Order([10] * 500, 0, BATCH)
    first = np.array([[order._epoch(epoch).chunks.tolist().index(7) for epoch in range(200)]])
    assert first.std() > 100  # uniform over 0..499: 144


def spread(labels: np.ndarray, classes: int) -> float:
    batches = labels[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    counts = np.stack([(batches == label).sum(1) for label in range(classes)], 1)
    expected = BATCH / classes
    return float((((counts - expected) ** 2 / expected).sum(1) / (classes - 1)).mean())


def test_a_million_chunks_are_located_fast() -> None:
    order = Order(np.full(1_000_000, 256), 0, 1024)
    began = time.perf_counter()
    order.locate(np.arange(10**11, 10**11 + 1024))  # epoch 390: permutes a million chunks
    first = time.perf_counter() - began
    began = time.perf_counter()
    for step in range(1, 11):
        order.locate(np.arange(1024) + 10**11 // 1024 * 1024 + step * 1024)
    assert first < 5
    assert (time.perf_counter() - began) / 10 < 0.2
