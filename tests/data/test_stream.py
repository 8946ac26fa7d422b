"""One order: the same batches at any world size, every sample once per epoch, a rank's bytes its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from calotype.data import stream as rooms
from calotype.data.files import FolderStore
from calotype.data.manifest import Shard
from calotype.data.shards import Sample, write_shard
from calotype.data.store import open_store
from calotype.data.stream import Order, Purpose, Stream, philox, slots
from calotype.errors import ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st

BATCH = 64


def flat(order: Order, positions: np.ndarray) -> np.ndarray:
    """Sample numbers in manifest order."""
    chunk, index = order.locate(positions)
    assert (index < order.counts[chunk]).all()
    return np.concatenate([[0], np.cumsum(order.counts)])[chunk] + index


COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=60)  # shards of one sample, fewer chunks than lanes, ...
BATCHES = st.sampled_from([(1, 1), (12, 3), (64, 0), (64, 1), (64, 8), (64, 64), (7, 7)])
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
    assert flat(fresh, np.array([asked], np.int64)).shape == (1, len(asked))


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, shape=BATCHES, window=WINDOWS, world=st.integers(1, 5), epoch=st.integers(0, 2))
def test_last_use_is_never_too_early(
    counts: list[int], shape: tuple[int, int], window: int, world: int, epoch: int
) -> None:
    order = Order(counts, 1, *shape, window)
    positions = np.arange(epoch * len(order), (epoch + 1) * len(order))
    chunk, _ = order.locate(positions)
    for rank in range(world):
        mine = slots(rank, world, shape[0])
        owned = np.isin(positions % shape[0], list(mine))
        for one in np.unique(chunk[owned]):
            true = positions[owned & (chunk == one)].max() + 1
            found = order.last_use(epoch, int(one), mine)
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
    names = ["NOISE", "TIMESTEP", "DROP", "POSTERIOR", "FLIP", "CHUNKS", "WINDOW"]
    assert {purpose.name: purpose.value for purpose in Purpose} == dict(zip(names, [*range(1, 6), 101, 102]))


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


@pytest.mark.parametrize("lanes", [3, 65, -64])
def test_impossible_lanes_are_refused(lanes: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.lanes"):
        Order([10], 0, BATCH, lanes)
    with pytest.raises(DataError):
        Order([], 0, BATCH)


@pytest.mark.parametrize(("lanes", "window", "bound"), [(0, 1024, 1.15), (16, 1024, 1.3), (64, 64, 1.3)])
def test_sorted_classes_come_out_mixed(lanes: int, window: int, bound: float) -> None:
    """Classes per batch spread like those of a true shuffle: chi-squared per degree of freedom is 1 there."""
    classes, each = 10, 4000
    order = Order([100] * (classes * each // 100), 0, BATCH, lanes, window)
    labels = flat(order, np.arange(classes * each)) // each
    assert spread(labels, classes) < bound * spread(np.random.default_rng(0).permutation(labels), classes)
    assert spread(np.sort(labels), classes) > 50


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


# ------------------------------------------------------------------------------------------- streams


@dataclass(frozen=True)
class Counting(FolderStore):
    """A real folder that remembers what was read of it."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        data = super().read(key, start, length)
        READS.append((key, start, len(data)))
        return data


READS: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, list[Shard]]:
    store = Counting(tmp_path_factory.mktemp("shards"))
    sizes = [100, 101, 1, 102, 90, 7, 64]
    return store, [
        write_shard(store, f"{n}.tar", [Sample(f"{n}-{i}", {"txt": b"%d" % i * 50}) for i in range(size)], 16)
        for n, size in enumerate(sizes)
    ]


def keys(written: tuple[Counting, list[Shard]], world: int, steps: int, position: int = 0, **more: int) -> list[str]:
    """Keys by position over all ranks."""
    found: dict[int, str] = {}
    for rank in range(world):
        with Closing(*written, seed=5, batch=BATCH, rank=rank, world=world, position=position, **more) as stream:
            for step, batch in enumerate(islice(stream, steps), position // BATCH):
                assert batch.step == step
                owned = slots(rank, world, BATCH)
                assert list(batch.positions) == list(range(step * BATCH + owned.start, step * BATCH + owned.stop))
                found |= zip(batch.positions.tolist(), (sample.key for sample in batch.samples), strict=True)
                assert all(sample.members["txt"] == sample.key.split("-")[1].encode() * 50 for sample in batch.samples)
    assert sorted(found) == list(range(position, position + steps * BATCH))
    return [found[place] for place in sorted(found)]


class Closing(Stream):
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.mark.parametrize("lanes", [0, 8])
@pytest.mark.parametrize("world", [2, 3, 5, 64, 70])
def test_batches_are_the_same_at_any_world_size(written: tuple[Counting, list[Shard]], world: int, lanes: int) -> None:
    steps = 8 if world > 10 else 23  # 23 x 64 samples: over three epochs of 465
    alone = keys(written, 1, steps, lanes=lanes, window=8)
    assert keys(written, world, steps, lanes=lanes, window=8) == alone
    for epoch in range(steps * BATCH // 465):
        assert len(set(alone[epoch * 465 : (epoch + 1) * 465])) == 465


def test_a_cursor_goes_on_with_the_next_batch(written: tuple[Counting, list[Shard]]) -> None:
    whole = keys(written, 1, 20)
    with Closing(*written, seed=5, batch=BATCH, rank=1, world=3) as stream:
        for _ in islice(stream, 9):
            pass
        state = stream.state_dict()
    assert state == {"position": 9 * BATCH}
    assert keys(written, 5, 11, **state) == whole[9 * BATCH :]
    with Closing(*written, seed=5, batch=BATCH) as stream:
        old = iter(stream)
        next(old)
        stream.load_state_dict(state)
        assert [sample.key for sample in next(iter(stream)).samples] == whole[9 * BATCH : 10 * BATCH]
        assert list(old) == []
        with pytest.raises(DataError, match=r"train\.batch"):
            stream.load_state_dict({"position": 100})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_reads_its_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(rooms, "SPARE", 0)
    store = Counting(tmp_path)
    shards = [
        write_shard(store, f"{n}.tar", [Sample(f"{n}-{i}", {"bin": bytes(2000)}) for i in range(800)], 20)
        for n in range(4)
    ]
    total, steps = sum(shard.bytes for shard in shards), 3200 // BATCH
    held: list[int] = []
    release = rooms._Chunks.release

    def watched(self: rooms._Chunks, position: int) -> None:
        release(self, position)
        held.append(len(self._held))

    monkeypatch.setattr(rooms._Chunks, "release", watched)
    for rank in range(world):
        READS.clear()
        with Closing(store, shards, seed=0, batch=BATCH, lanes=8, window=40, rank=rank, world=world) as stream:
            for _ in islice(stream, steps - 6):  # the plan, six steps ahead, must not reach the next epoch
                pass
            time.sleep(0.2)
        chunks = Counter((key, start) for key, start, _ in READS if key.endswith(".tar"))
        assert max(chunks.values()) == 1, "a chunk was read twice in an epoch"
        assert sum(size for key, _, size in READS if key.endswith(".tar")) < 1.1 * total / world
        assert sum(key.endswith("json") for key, _, _ in READS) == 4
    assert max(held) <= 8 // world * (40 // 20 + 3), "chunks are kept longer than their windows need"


def test_a_small_data_set_is_read_once(written: tuple[Counting, list[Shard]]) -> None:
    READS.clear()
    keys(written, 1, 40)
    assert max(Counter(READS).values()) == 1


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shards = [write_shard(store, f"{n}.tar", [Sample(f"{i}", {"txt": b"x"}) for i in range(64)], 16) for n in range(2)]
    data = bytearray(store.read("1.tar"))
    data[20_000] ^= 1
    store.write("1.tar", bytes(data))
    with Closing(store, shards, seed=0, batch=BATCH) as stream, pytest.raises(DataError, match=r"1\.tar is damaged"):
        list(islice(stream, 3))


def test_closing_ends_the_threads(written: tuple[Counting, list[Shard]]) -> None:
    def alive() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(("stream", "chunk"))]

    with Closing(*written, seed=5, batch=BATCH) as stream:
        next(iter(stream))
        assert stream.state_dict() == {"position": BATCH}
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == []


LEFT = """
import sys
from calotype.data.shards import Sample, write_shard
from calotype.data.store import open_store
from calotype.data.stream import Stream
store = open_store(sys.argv[1])
row = write_shard(store, "x.tar", [Sample(str(i), {"txt": b"x"}) for i in range(64)], 16)
batches = iter(Stream(store, [row], seed=0, batch=8))
next(batches)
assert "torch" not in sys.modules
"""


def test_a_stream_left_open_does_not_hold_the_process_and_needs_no_torch(tmp_path: Path) -> None:
    path = str(Path(__file__).parents[2] / "platform")
    command = [sys.executable, "-c", LEFT, str(tmp_path)]
    subprocess.run(command, env={"PYTHONPATH": path, "PATH": ""}, check=True, timeout=60)


def test_over_real_s3(bucket: str, written: tuple[Counting, list[Shard]]) -> None:
    store = open_store(bucket)
    for entry in written[0].list():
        store.publish(entry.key, written[0].read(entry.key))
    assert keys((store, written[1]), 3, 10) == keys(written, 1, 10)  # type: ignore[arg-type]
