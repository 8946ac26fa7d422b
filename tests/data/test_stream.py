"""Streams: one golden order at any world size, with any loaders, after any stop; a rank's bytes its own; no loss."""

from __future__ import annotations

import io
import pickle
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calotype.data import Dataset, Reading, Sample, Stream, disk, open_cache
from calotype.data.files import FolderStore
from calotype.data.manifest import Shard
from calotype.data.npy import to_npy
from calotype.data.order import slots
from calotype.data.reader import OrderSettings, Reader, shares_of
from calotype.data.shards import read_sidecar, write_shard
from calotype.data.store import open_store
from calotype.errors import CalotypeError, ConfigError, DataError
from hypothesis import given
from hypothesis import strategies as st

BATCH = 64


@dataclass(frozen=True)
class Counting(FolderStore):
    """A real folder that remembers what was read of it."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        data = super().read(key, start, length)
        READS.append((key, start, len(data)))
        return data

    def read_into(self, key: str, start: int, buffer: memoryview, stop: threading.Event | None = None) -> int:
        READS.append((key, start, len(buffer)))
        return super().read_into(key, start, buffer, stop)


READS: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, list[Shard]]:
    store = Counting(tmp_path_factory.mktemp("shards"))
    sizes = [100, 101, 1, 102, 90, 7, 64]
    return store, [
        write_shard(store, f"{n}.tar", [sample(n, i) for i in range(size)], 16) for n, size in enumerate(sizes)
    ]


def sample(shard: int, index: int) -> Sample:
    array = np.full((2, 3), 1000 * shard + index, np.float32)
    return Sample(f"{shard}-{index}", {"txt": b"%d" % index * 50, "x.npy": to_npy(array)})


def keys(written: tuple[FolderStore, list[Shard]], world: int, steps: int, position: int = 0, **more: int) -> list[str]:
    """Keys by position over all ranks."""
    found: dict[int, str] = {}
    reading = Reading(workers=more.pop("workers", 0), memory=2**24)
    for rank in range(world):
        stream = Stream(Dataset(*written), seed=5, batch=BATCH, rank=rank, world=world, reading=reading, **more)
        with closing(stream.seek(position)):
            for step, batch in enumerate(islice(stream, steps), position // BATCH):
                assert batch.step == step
                owned = slots(rank, world, BATCH)
                assert list(batch.positions) == list(range(step * BATCH + owned.start, step * BATCH + owned.stop))
                assert [one.key for one in batch.samples] == batch.keys
                found |= zip(batch.positions.tolist(), batch.keys, strict=True)
                assert all(one.members["txt"] == one.key.split("-")[1].encode() * 50 for one in batch.samples)
    assert sorted(found) == list(range(position, position + steps * BATCH))
    return [found[place] for place in sorted(found)]


@pytest.mark.parametrize("lanes", [0, 8])
@pytest.mark.parametrize("world", [2, 3, 5, 64])
def test_batches_are_the_same_at_any_world_size(written: tuple[Counting, list[Shard]], world: int, lanes: int) -> None:
    steps = 4 if world > 10 else 23  # 23 x 64 samples: over three epochs of 465
    alone = keys(written, 1, steps, lanes=lanes, window=8)
    assert keys(written, world, steps, lanes=lanes, window=8) == alone
    for epoch in range(steps * BATCH // 465):
        assert len(set(alone[epoch * 465 : (epoch + 1) * 465])) == 465


@pytest.fixture(scope="module")
def golden(written: tuple[Counting, list[Shard]]) -> list[str]:
    """Ids of two epochs (465 samples) and more, by position."""
    made = keys(written, 1, 23, window=8)
    assert len(set(made[:465])) == len(set(made[465:930])) == 465
    return made


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_the_golden_order(written: tuple[Counting, list[Shard]], golden: list[str], world: int) -> None:
    """Two epochs, stopped at random places and each time taken up by another number of ranks."""
    dice = random.Random(world)
    position = 0
    while position < 15 * BATCH:
        steps = min(dice.randint(1, 9), 15 - position // BATCH)
        assert keys(written, world, steps, position, window=8) == golden[position : position + steps * BATCH]
        position += steps * BATCH
        world = dice.choice([1, 2, 3, 4, 5])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_golden_order_with_loaders(
    written: tuple[Counting, list[Shard]], golden: list[str], world: int, workers: int
) -> None:
    steps = 3 + world  # then another world goes on
    assert keys(written, world, steps, window=8, workers=workers) == golden[: steps * BATCH]
    assert keys(written, 1, 15 - steps, steps * BATCH, window=8, workers=workers) == golden[steps * BATCH : 15 * BATCH]


KILLED = """
import sys, pathlib, pickle
from calotype.data import Dataset, Reading, Stream
dataset, position, workers = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
stream = Stream(dataset, seed=5, batch=64, window=8, reading=Reading(workers=workers, memory=2**24)).seek(position)
for batch in stream:
    print(batch.cursor["position"], *batch.keys, flush=True)
"""


def test_killed_at_random_points_it_goes_on(
    written: tuple[Counting, list[Shard]], golden: list[str], tmp_path: Path
) -> None:
    """A real process, killed with its loaders; the next one begins at the last cursor that was written down."""
    found: list[str] = []
    for turn in range(4):
        state = (Dataset(FolderStore(written[0].path), written[1]), len(found), turn % 3)
        (tmp_path / "state").write_bytes(pickle.dumps(state))
        command = [sys.executable, "-c", KILLED, str(tmp_path / "state")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": PLATFORM, "PATH": ""})
        assert process.stdout is not None
        for line in islice(process.stdout, 2 + turn):
            position, *names = line.split()
            found += names
            assert int(position) == len(found)
        process.kill()
        process.wait()
        process.stdout.close()
    assert found == golden[: len(found)]
    assert len(found) == 14 * BATCH


PLATFORM = str(Path(__file__).parents[2] / "platform")


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_are_stacked(written: tuple[Counting, list[Shard]], golden: list[str], workers: int) -> None:
    reading = Reading(workers=workers, memory=2**24)
    with closing(Stream(Dataset(*written), seed=5, batch=BATCH, window=8, arrays=["x"], reading=reading)) as stream:
        kept = list(islice(stream, 12))  # all of them held at once: none may be written over
    for batch in kept:
        assert batch.arrays["x"].shape == (BATCH, 2, 3)
        assert batch.keys == golden[batch.step * BATCH : (batch.step + 1) * BATCH]
        numbers = [1000 * int(shard) + int(index) for shard, index in (key.split("-") for key in batch.keys)]
        assert batch.arrays["x"][:, 1, 2].tolist() == numbers


def test_what_is_no_array_of_one_shape_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    mixed = [Sample(str(i), {"x.npy": to_npy(np.zeros(1 + i // 8))}) for i in range(16)]
    row = write_shard(store, "x.tar", mixed, 8)
    for arrays, said in ((["y"], r"x\.tar.*y\.npy.*they have x\.npy"), (["x"], "in buckets by shape")):
        stream = Stream(Dataset(store, [row]), seed=0, batch=8, arrays=arrays)
        with closing(stream), pytest.raises(DataError, match=said):
            next(iter(stream))
    row = write_shard(store, "y.tar", mixed, 16)
    stream = Stream(Dataset(store, [row]), seed=0, batch=8, arrays=["x"])
    with closing(stream), pytest.raises(DataError, match="differ in dtype or shape"):
        next(iter(stream))


def texts(folder: Path, sizes: list[int], width: int = 3, length: int = 9, name: str = "0") -> Dataset:
    """As a cache holds embeddings: array i is (sizes[i], width), of numbers that tell i and the row."""
    store = open_store(str(folder))
    made = [
        Sample(f"{i}", {"t.npy": to_npy(np.full((size, width), i) + np.arange(size)[:, None] / 16),
                        "x.npy": to_npy(np.array(i))})
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    row = write_shard(store, f"{name}.tar", made, 16)
    return Dataset(store, [row], meta={"encoding": {"conditions": {"t": {"mode": "masked", "length": length}}}})


@pytest.mark.parametrize(("workers", "longest"), [(0, 9), (0, 4), (0, 1), (2, 9)])
def test_rows_are_padded_to_one_length_with_a_mask(tmp_path: Path, workers: int, longest: int) -> None:
    """The same whatever a batch or a dataset holds; what lies in reused memory does not shine through."""
    dataset = texts(tmp_path, [1 + i % longest for i in range(64)])
    for world, rank in ((1, 0), (3, 1)):
        order = {"seed": 0, "batch": 16, "world": world, "rank": rank}
        reading = Reading(workers=workers)
        with closing(Stream(dataset, **order, arrays=["x", "t"], reading=reading)) as stream:
            batches = list(islice(stream, 12))
        for batch in batches:
            assert list(batch.arrays) == ["x", "t", "t.mask"]
            assert batch.arrays["t"].shape == (len(batch.keys), 9, 3)
            assert batch.arrays["t.mask"].dtype == np.bool_
            for key, array, own in zip(batch.keys, batch.arrays["t"], batch.arrays["t.mask"], strict=True):
                rows = 1 + int(key) % longest
                assert own.tolist() == [True] * rows + [False] * (9 - rows)
                assert (array[:rows] == int(key) + np.arange(rows)[:, None] / 16).all()
                assert not array[rows:].any()


def test_what_is_left_out_has_an_empty_mask(tmp_path: Path) -> None:
    dataset = texts(tmp_path, [1 + i % 9 for i in range(64)])
    data = bytearray(dataset.store.read("0.tar"))
    for chunk in range(3):
        data[read_sidecar(dataset.store, dataset.shards[0]).span(chunk)[0] + 600] ^= 1
    dataset.store.write("0.tar", bytes(data))
    reading = Reading(on_error="quarantine", error_budget=48)
    with closing(Stream(dataset, seed=0, batch=4, lanes=1, window=4, arrays=["t"], reading=reading)) as stream:
        batches = list(islice(stream, 16))
    assert sorted({batch.present.all() for batch in batches}) == [False, True]
    for batch in batches:
        assert (batch.arrays["t"].shape, batch.arrays["t.mask"].shape) == ((4, 9, 3), (4, 9))
        assert (batch.arrays["t.mask"].any(1) == batch.present).all()
        assert not batch.arrays["t"][~batch.present].any()


def test_rows_that_cannot_be_padded_are_refused(tmp_path: Path) -> None:
    def first(datasets: Dataset | list[Dataset]) -> None:
        with closing(Stream(datasets, seed=0, batch=8, lanes=1, arrays=["t"])) as stream:
            next(iter(stream))

    with pytest.raises(DataError, match=r"arrays t\.npy of chunk 0 of .*0\.tar have 1 to 9 rows, not 1 to 8"):
        first(texts(tmp_path, [1 + i % 9 for i in range(16)], length=8))
    with pytest.raises(DataError, match="have 0 to 2 rows"):
        first(texts(tmp_path / "none", [0, 2] * 8))
    wide, other = texts(tmp_path / "wide", [3, 4] * 8, width=4), texts(tmp_path / "other", [3, 4] * 8)
    with pytest.raises(DataError, match=r"is float64 \(9, \d\), of others in its batch float64 \(9, \d\)"):
        first([wide, other])
    with pytest.raises(ConfigError, match=r"t has up to 5 rows in .*and 9 in another .*one conditions\.t\.length"):
        first([other, texts(tmp_path / "short", [3, 4] * 8, length=5)])
    bare = replace(other, meta={})
    with pytest.raises(DataError, match="differ in dtype or shape: read them as samples"):
        first(bare)


def sums(sample: Sample) -> dict[str, np.ndarray]:
    return {"sum": np.load(io.BytesIO(sample.members["x.npy"]))}


def odd_dtype(sample: Sample) -> dict[str, np.ndarray]:
    return {"a": np.zeros(3, np.uint8 if sample.key.endswith("7") else np.float32)}


def odd_shape(sample: Sample) -> dict[str, np.ndarray]:
    return {"a": np.zeros((1 if sample.key.endswith("7") else 3, 4))}


def odd_names(sample: Sample) -> dict[str, np.ndarray]:
    return {"a": np.zeros(3)} | ({"b": np.zeros(3)} if sample.key.endswith("7") else {})


def fussy(sample: Sample) -> dict[str, np.ndarray]:
    if sample.key == "3-7":
        raise ValueError("odd")
    return {"a": np.zeros(3)}


def nothing(sample: Sample) -> Any:
    return None


def number(sample: Sample) -> Any:
    return {"n": len(sample.key)}


class Special(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} {other}")


def special(sample: Sample) -> dict[str, np.ndarray]:
    if sample.key == "0-1":
        raise Special(1, 2)
    return {"a": np.zeros(3)}


def leaving(sample: Sample) -> dict[str, np.ndarray]:
    error = SystemExit("with a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def lengths(sample: Sample) -> dict[str, np.ndarray]:
    if sample.key == "0-13":
        raise DataError("sample 0-13 cannot be decoded")
    return {"length": np.array(len(sample.members["txt"]))}


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_decoded_in_parallel(
    written: tuple[Counting, list[Shard]], golden: list[str], workers: int
) -> None:
    reading = Reading(workers=workers, memory=2**24, on_error="quarantine", error_budget=1)
    stream = Stream(Dataset(*written), seed=5, batch=BATCH, window=8, decode=lengths, reading=reading)
    with closing(stream):
        for batch in islice(stream, 8):
            assert batch.keys == golden[batch.step * BATCH : (batch.step + 1) * BATCH]
            expected = [0 if key == "0-13" else 50 * len(key.split("-")[1]) for key in batch.keys]
            assert batch.arrays["length"].tolist() == expected
            assert batch.present.tolist() == [key != "0-13" for key in batch.keys]
    assert stream.skipped == {f"{written[0].uri}/0.tar/0-13": "sample 0-13 cannot be decoded"}


def test_a_cursor_goes_on_with_the_next_batch(written: tuple[Counting, list[Shard]]) -> None:
    whole = keys(written, 1, 20)
    with closing(Stream(Dataset(*written), seed=5, batch=BATCH, rank=1, world=3)) as stream:
        cursors = [batch.cursor for batch in islice(stream, 9)]
        state = stream.state_dict()
    order = {"seed": 5, "batch": BATCH, "lanes": BATCH, "window": 128}
    assert state == cursors[-1] == {"position": 9 * BATCH, **order, "samples": state["samples"]}
    Stream(Dataset(*written), **order).load_state_dict(state)  # as many lanes as slots: the same order
    fewer = Dataset(written[0], written[1][1:])
    for datasets in (fewer, [Dataset(*written), fewer], Dataset(*written, weight=2)):
        with pytest.raises(DataError, match="other datasets, filters or weights"):
            Stream(datasets, seed=5, batch=BATCH).load_state_dict(state)
    assert stream.where(9 * BATCH) == "cursor 576: epoch 2, sample 111 of 465"
    assert keys(written, 5, 11, position=state["position"]) == whole[9 * BATCH :]
    for name, value in (("seed", 6), ("batch", 32), ("lanes", 8), ("window", 64)):
        with pytest.raises(DataError, match=f"{name}={state[name]}, this one has {name}={value}"):
            Stream(Dataset(*written), **{"seed": 5, "batch": BATCH, name: value}).load_state_dict(state)
    with closing(Stream(Dataset(*written), seed=5, batch=BATCH)) as stream:
        old = iter(stream)
        next(old)
        stream.load_state_dict(state)
        assert next(iter(stream)).keys == whole[9 * BATCH : 10 * BATCH]
        assert list(old) == []
        with pytest.raises(DataError, match="the batch was changed"):
            stream.load_state_dict({"position": 100})


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rank_reads_its_share_once_in_bounded_memory(tmp_path: Path, world: int) -> None:
    store = Counting(tmp_path)
    shards = [
        write_shard(store, f"{n}.tar", [Sample(f"{n}-{i}", {"bin": bytes(2000)}) for i in range(800)], 20)
        for n in range(4)
    ]
    total, steps = sum(shard.bytes for shard in shards), 3200 // BATCH
    memory = 8 // world * 6 * shards[0].chunk_bytes
    for rank in range(world):
        READS.clear()
        order = {"seed": 0, "batch": BATCH, "lanes": 8, "window": 40, "rank": rank, "world": world}
        with closing(Stream(Dataset(store, shards), reading=Reading(memory=memory * 4 // 3), **order)) as stream:
            for _ in islice(stream, steps - 28):  # what is read ahead must not reach the next epoch
                pass
            time.sleep(0.2)
        chunks = Counter((key, start) for key, start, _ in READS if key.endswith(".tar"))
        assert max(chunks.values()) == 1, "a chunk was read twice in an epoch"
        assert sum(size for key, _, size in READS if key.endswith(".tar")) < 1.1 * total / world
        assert sum(key.endswith("json") for key, _, _ in READS) == 4


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_end_is_kept_and_nothing_behind_it_is_read(written: tuple[Counting, list[Shard]], workers: int) -> None:
    store, shards = written
    total = sum(shard.samples for shard in shards)
    until = total // 3
    READS.clear()
    order = {"seed": 0, "batch": BATCH, "lanes": 4, "window": 16, "until": until}
    stream = Stream(Dataset(store, shards), **order, reading=Reading(workers=workers))
    steps = [batch.step for batch in stream]
    assert steps == list(range(-(-until // BATCH)))
    assert list(stream) == []
    assert sum(size for key, _, size in READS if key.endswith(".tar")) < 0.8 * sum(shard.bytes for shard in shards)
    assert [batch.step for batch in stream.seek(BATCH)] == steps[1:]


def test_whole_samples_come_from_a_loader_process_for_ever(written: tuple[Counting, list[Shard]]) -> None:
    """Nothing of them lies in shared memory: nothing must be handed back, or the pipe fills up."""
    stream = Stream(Dataset(*written), seed=0, batch=1, lanes=1, until=1000, reading=Reading(workers=1))
    assert sum(len(batch.samples) for batch in stream) == 1000


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"world": 100}, "rank 0 of 100"),
        ({"rank": 4, "world": 4}, "rank=4 must be at least 0, and less than world=4"),
        ({"rank": -1}, "rank=-1"),
        ({"until": -1}, "until=-1 is no"),
    ],
)
def test_ranks_and_ends_that_cannot_be_are_refused(
    written: tuple[Counting, list[Shard]], more: dict[str, int], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        Stream(Dataset(*written), seed=0, batch=64, **more)


def test_what_a_library_user_may_give_is_a_sentence(written: tuple[Counting, list[Shard]], tmp_path: Path) -> None:
    dataset = Dataset(*written)
    for datasets in ([], [dataset, "own"], replace(dataset, shards=[])):
        with pytest.raises(ConfigError, match="at least one Dataset"):
            Stream(datasets, seed=0, batch=64)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"arrays='x' must be a list of names: \['x'\]"):
        Stream(dataset, seed=0, batch=64, arrays="x")
    with pytest.raises(DataError, match="not the start of a batch"):
        Stream(dataset, seed=0, batch=64).load_state_dict({})
    open_store(str(tmp_path)).write("caches/abc/manifest.json", b"{}")
    with pytest.raises(DataError, match=r"no finished cache 'abd' .*\(but abc\)"):
        open_cache(str(tmp_path), "abd")


@pytest.mark.parametrize(
    "settings", [{"on_error": "Strict"}, {"readers": 0}, {"workers": -1}, {"memory": -1}, {"error_budget": -1}]
)
def test_settings_of_reading_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Reading(**settings)


def test_memory_is_kept_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    row = write_shard(store, "x.tar", [Sample(str(i), {"bin": bytes(3000)}) for i in range(2000)], 10)
    budget, seen = 30 * row.chunk_bytes, []
    made = Reader._made

    def watched(self: Reader, step: object, chunks: object, pool: object) -> object:
        seen.append(chunks.used)  # type: ignore[attr-defined]
        return made(self, step, chunks, pool)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "_made", watched)
    stream = Stream(
        Dataset(store, [row]), seed=0, batch=16, lanes=8, window=20, reading=Reading(memory=budget * 4 // 3)
    )
    with closing(stream):
        for _ in islice(stream, 200):
            pass
    assert max(seen) <= budget + 16 * row.chunk_bytes  # the chunks of one batch, asked for when it was nearly full
    assert np.median(seen) > budget / 2
    with pytest.raises(ConfigError, match=r"stream\.memory_mb"):
        Stream(Dataset(store, [row]), seed=0, batch=64, reading=Reading(memory=10 * row.chunk_bytes))


def test_memory_that_is_not_told_is_what_the_order_needs(tmp_path: Path) -> None:
    """256 lanes of four chunks of 4 MiB, as of latents of 512 x 512 images: no need to know of it."""
    row = Shard("x.tar", 2**34, 10**6, 62, "", "", chunk_bytes=4 * 2**20)
    dataset = Dataset(open_store(str(tmp_path)), [row])
    assert Stream(dataset, seed=0, batch=32).reading.memory == 2 * 2**30
    for world, workers in ((1, 0), (4, 0), (1, 4)):
        stream = Stream(dataset, seed=0, batch=256, world=world, reading=Reading(workers=workers))
        each = stream.reading.shared(max(workers, 1))
        assert each.for_chunks >= 256 // world // max(workers, 1) * 4 * row.chunk_bytes
        Stream(dataset, seed=0, batch=256, world=world, reading=stream.reading)
        if stream.reading.memory > 2 * 2**30:
            less = replace(stream.reading, memory=stream.reading.memory * 9 // 10)
            with pytest.raises(ConfigError, match="hold up to"):
                Stream(dataset, seed=0, batch=256, world=world, reading=less)


def test_a_filter_that_keeps_few_takes_more_memory(tmp_path: Path) -> None:
    row = Shard("x.tar", 2**34, 10**5, 50, "", "", chunk_bytes=2**20)
    store, dice = open_store(str(tmp_path)), np.random.default_rng(0)
    few = Dataset(store, [row], keep={row.key: dice.random(row.samples) < 0.1})
    order: dict[str, Any] = {"seed": 0, "batch": 64, "window": 1000}
    all_of_it, some = (Stream(data, **order).reading.memory for data in (Dataset(store, [row]), few))
    assert some > 5 * all_of_it
    with pytest.raises(ConfigError, match="hold up to"):
        Stream(few, **order, reading=Reading(memory=all_of_it))
    none = Dataset(store, [row], keep={row.key: np.zeros(row.samples, np.bool_)})
    for datasets in (none, [few, none]):
        with pytest.raises(ConfigError, match=f"no sample of {tmp_path} is left"):
            Stream(datasets, **order)


@given(
    batch=st.integers(1, 200), share=st.floats(0.01, 1), workers=st.integers(1, 9), world=st.integers(1, 5),
    window=st.integers(1, 300),
)  # fmt: skip
def test_memory_that_is_not_told_is_enough_for_each_loader(
    batch: int, share: float, workers: int, world: int, window: int
) -> None:
    row = Shard("x.tar", 2**36, 10**4, 62, "", "", chunk_bytes=40 * 2**20)
    dataset = Dataset(open_store("/nowhere"), [row])
    order = OrderSettings(0, batch, max(1, int(batch * share)), window)
    for rank in range(min(world, batch)):
        mine = slots(rank, min(world, batch), batch)
        reading = Reader([dataset], order, mine, Reading(workers=workers)).reading
        shares = shares_of(mine, workers)
        assert [slot for part in shares for slot in part] == list(mine)
        for part in shares:
            Reader([dataset], order, part, reading.shared(len(shares)))


def test_zeros_of_a_shape_are_not_taken_from_a_dataset_of_another(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plain = write_shard(store, "p.tar", [Sample(f"p{i}", {"x.npy": to_npy(np.ones(9))}) for i in range(32)], 8)
    made = [Sample(f"b{i}", {"x.npy": to_npy(np.ones(9 if i < 32 else 2))}) for i in range(64)]
    row = write_shard(store, "b.tar", made, 8, buckets=[i // 32 for i in range(64)])
    data = bytearray(store.read("b.tar"))
    for chunk in range(4, 7):  # all but one of the second shape
        data[read_sidecar(store, row).span(chunk)[0] + 600] ^= 1
    store.write("b.tar", bytes(data))
    reading = Reading(on_error="quarantine", error_budget=100)
    datasets = [Dataset(store, [plain]), Dataset(store, [row])]
    for rank in range(4):
        stream = Stream(datasets, seed=0, batch=4, rank=rank, world=4, arrays=["x"], reading=reading)
        with closing(stream):
            for batch in islice(stream, 40):
                number = int(batch.keys[0].strip("pb#"))
                other = batch.keys[0].startswith("b") or not batch.present[0]
                assert batch.arrays["x"].shape == (1, 2 if other and number >= 32 else 9)


def test_every_bucket_and_dataset_takes_memory(tmp_path: Path) -> None:
    """Each has lanes of its own, whose chunks are held while others have their turn."""
    store, shards, chunks = open_store(str(tmp_path)), [], 6
    for n in range(4):
        made = [Sample(f"{n}-{i}", {"x.npy": to_npy(np.zeros(2000 + i // 24))}) for i in range(12 * 24)]
        shards.append(write_shard(store, f"{n}.tar", made, 4, buckets=[i // 24 for i in range(12 * 24)]))
    small = write_shard(store, "s.tar", [Sample(f"s{i}", {"x.npy": to_npy(np.zeros(2000))}) for i in range(64)], 4)
    for datasets in ([Dataset(store, shards)], [Dataset(store, shards), Dataset(store, [small], weight=0.01)]):
        stream = Stream(datasets, seed=0, batch=16, lanes=8, window=8, arrays=["x"])
        lanes = stream._reader.schedule.lanes(range(16))
        assert lanes[0] >= 12 * 6, "some, of each shape"
        seen: list[int] = []
        original: Any = Reader._made

        def watched(
            self: Reader, step: Any, chunks: Any, *rest: Any, seen: Any = seen, original: Any = original
        ) -> Any:
            seen.append(sum(one.bytes for one in chunks._held.values()))
            return original(self, step, chunks, *rest)

        need = min(lanes[0] * 3 * shards[0].chunk_bytes, sum(one.bytes for one in shards))
        with pytest.raises(ConfigError, match="hold up to"):
            Stream(datasets, seed=0, batch=16, lanes=8, window=8, reading=Reading(memory=need))
        with pytest.MonkeyPatch.context() as patch, closing(stream):
            patch.setattr(Reader, "_made", watched)
            for _ in islice(stream, 100):
                pass
        assert max(seen) > chunks * 12 * shards[0].chunk_bytes, "or it need not be asked for"


def test_a_small_data_set_is_read_once(written: tuple[Counting, list[Shard]]) -> None:
    READS.clear()
    keys(written, 1, 40)
    assert max(Counter(READS).values()) == 1


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shards = [
        write_shard(store, f"{n}.tar", [Sample(f"{n}-{i}", {"txt": b"x"}) for i in range(64)], 16) for n in range(2)
    ]
    data = bytearray(store.read("1.tar"))
    data[20_000] ^= 1
    store.write("1.tar", bytes(data))
    stream = Stream(Dataset(store, shards), seed=0, batch=BATCH)
    with closing(stream), pytest.raises(DataError, match=r"1\.tar is damaged"):
        list(islice(stream, 3))


def test_closing_ends_the_threads(written: tuple[Counting, list[Shard]]) -> None:
    def alive() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(("stream", "chunk"))]

    with closing(Stream(Dataset(*written), seed=5, batch=BATCH)) as stream:
        batches = iter(stream)  # it is held, and yet it ends
        next(batches)
        assert stream.state_dict()["position"] == BATCH
        assert alive()
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive() == []


LEFT = """
import sys
from calotype.data import Dataset, Reading, Sample, Stream
from calotype.data.shards import write_shard
from calotype.data.store import open_store
store = open_store(sys.argv[1])
row = write_shard(store, "x.tar", [Sample(str(i), {"txt": b"x"}) for i in range(64)], 16)
batches = iter(Stream(Dataset(store, [row]), seed=0, batch=8, reading=Reading(workers=int(sys.argv[2]))))
next(batches)
assert not {"torch", "ray", "mlflow", "deepspeed"} & set(sys.modules)
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_stream_left_open_does_not_hold_the_process_and_needs_no_torch(tmp_path: Path, workers: str) -> None:
    command = [sys.executable, "-c", LEFT, str(tmp_path), workers]
    subprocess.run(command, env={"PYTHONPATH": PLATFORM, "PATH": ""}, check=True, timeout=60)


def test_a_loader_that_dies_is_an_error(written: tuple[Counting, list[Shard]]) -> None:
    stream = Stream(Dataset(*written), seed=5, batch=BATCH, reading=Reading(workers=2))
    with closing(stream):
        batches = iter(stream)
        next(batches)
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
        loaders = [pid for pid in children if b"data.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(loaders) == 2
        subprocess.run(["kill", "-9", loaders[1]], check=True)
        with pytest.raises(CalotypeError, match=r"loader process died \(signal 9\).*stream\.workers"):
            list(islice(batches, 50))


# ------------------------------------------------------------------------------------------- quarantine


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_has_the_shape_of_its_batch(tmp_path: Path, workers: int) -> None:
    """A loader process may have lost all of its rows of a batch, after batches of another shape."""
    store = open_store(str(tmp_path))
    made = [Sample(f"{i}", {"x.npy": to_npy(np.ones(2 + i // 64, np.float32))}) for i in range(128)]
    row = write_shard(store, "0.tar", made, 8, buckets=[i // 64 for i in range(128)])
    data = bytearray(store.read("0.tar"))
    for chunk in range(9, 16, 3):  # of the second shape
        data[read_sidecar(store, row).span(chunk)[0] + 600] ^= 1
    store.write("0.tar", bytes(data))
    reading = Reading(on_error="quarantine", error_budget=24, workers=workers)
    order = {"seed": 0, "batch": 4, "lanes": 2, "window": 8, "until": 512}
    batches = list(Stream(Dataset(store, [row]), **order, arrays=["x"], reading=reading))
    assert len(batches) == 128
    for batch in batches:
        numbers = [int(re.findall(r"\d+", key)[-1]) for key in batch.keys]
        assert {batch.arrays["x"].shape} == {(4, 2 + number // 64) for number in numbers}
        assert (batch.arrays["x"][~batch.present] == 0).all()


def test_a_budget_that_is_passed_is_passed_each_time(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    row = write_shard(store, "0.tar", [sample(0, i) for i in range(64)], 16)
    data = bytearray(store.read("0.tar"))
    data[600] ^= 1
    store.write("0.tar", bytes(data))
    reading = Reading(on_error="quarantine", error_budget=3)
    stream = Stream(Dataset(store, [row]), seed=0, batch=16, lanes=1, window=4, arrays=["x"], reading=reading)
    for _ in range(2):
        with pytest.raises(DataError, match=r"error_budget=3 .*chunk 0.*another hash"):
            list(islice(stream, 8))


def test_quarantine_names_what_it_leaves_out_and_keeps_step(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = [
        write_shard(store, f"{n}.tar", [sample(n, i) for i in range(64)], 16, columns={"n": list(range(64))})
        for n in range(2)
    ]
    data = bytearray(store.read("1.tar"))
    data[40_000] ^= 1  # in chunk 1 of the second shard
    store.write("1.tar", bytes(data))
    lost = {f"{tmp_path}/1.tar/1-{i}" for i in range(16, 32)}
    for workers in (0, 2):
        reading = Reading(on_error="quarantine", error_budget=16, workers=workers)
        stream = Stream(Dataset(store, rows), seed=0, batch=32, arrays=["x"], reading=reading)
        with closing(stream):
            batches = list(islice(stream, 8))
        assert set(stream.skipped) == lost
        assert all("damaged" in reason for reason in stream.skipped.values())
        for batch in batches:
            assert batch.present.tolist() == [f"{tmp_path}/1.tar/{key}" not in lost for key in batch.keys]
            assert (batch.arrays["x"][~batch.present] == 0).all()
            assert (batch.arrays["x"][batch.present].reshape(-1, 6).std(1) == 0).all()
        assert sorted(key for batch in batches[:4] for key in batch.keys) == sorted(
            f"{n}-{i}" for n in range(2) for i in range(64)
        ), "each once, the left out among them"
    reading = Reading(on_error="quarantine", error_budget=15)
    stream = Stream(Dataset(store, rows), seed=0, batch=32, arrays=["x"], reading=reading)
    with closing(stream), pytest.raises(DataError, match=r"16 samples.*error_budget=15 \(stream\.error_budget\)"):
        list(islice(stream, 8))


@pytest.mark.parametrize("how", [{"arrays": ["x"]}, {"decode": sums}])
def test_a_batch_that_is_wholly_left_out_has_the_shape_of_the_others(tmp_path: Path, how: dict[str, Any]) -> None:
    """Though it is the first, on every rank alone; another sample tells."""
    store = open_store(str(tmp_path))
    rows = [write_shard(store, f"{n}.tar", [sample(n, i) for i in range(64)], 16) for n in range(2)]
    store.write("0.tar", bytes(rows[0].bytes))
    reading = Reading(on_error="quarantine", error_budget=128)
    for world in (1, 4):
        alone = 0
        for rank in range(world):
            order = {"seed": 0, "batch": 4, "until": 128, "world": world, "rank": rank}
            with closing(Stream(Dataset(store, rows), **order, **how, reading=reading)) as stream:
                batches = list(stream)
            assert len(batches) == 32
            alone += sum(not batch.present.any() for batch in batches)
            assert {array.shape[1:] for batch in batches for array in batch.arrays.values()} == {(2, 3)}
        if world == 4:
            assert alone == 64
    store.write("1.tar", bytes(rows[1].bytes))
    stream = Stream(Dataset(store, rows), seed=0, batch=4, **how, reading=reading)
    with (
        closing(stream),
        pytest.raises(DataError, match=r"of no sample like .*tar/#\d+ the shape can be told: .*damaged"),
    ):
        next(iter(stream))


def test_samples_with_one_key_are_counted_apart(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = [write_shard(store, f"{n}.tar", [sample(0, i) for i in range(8)], 8, columns={}) for n in range(3)]
    for n in range(2):
        store.write(f"{n}.tar", bytes(rows[n].bytes))
    for budget in (15, 16):
        reading = Reading(on_error="quarantine", error_budget=budget)
        stream = Stream(Dataset(store, rows), seed=0, batch=8, until=24, arrays=["x"], reading=reading)
        if budget == 15:
            with pytest.raises(DataError, match=r"16 samples .*error_budget=15"):
                list(stream)
        else:
            assert sum(int((~batch.present).sum()) for batch in stream) == len(stream.skipped) == 16
            assert {f"{tmp_path}/0.tar/0-3", f"{tmp_path}/1.tar/0-3"} < set(stream.skipped)


# ------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("workers", [0, 2])
def test_what_decode_makes_must_be_alike(written: tuple[Counting, list[Shard]], workers: int) -> None:
    """Not cast to what comes first, which would differ with the world."""
    for decode in (odd_dtype, odd_shape, odd_names):
        stream = Stream(Dataset(*written), seed=5, batch=BATCH, decode=decode, reading=Reading(workers=workers))
        with closing(stream), pytest.raises(DataError, match="batch"):
            list(islice(stream, 8))


def test_whatever_decode_raises_is_of_a_sample(written: tuple[Counting, list[Shard]]) -> None:
    stream = Stream(Dataset(*written), seed=5, batch=BATCH, decode=fussy)
    with closing(stream), pytest.raises(DataError, match=r"sample 3-7 cannot be decoded \(ValueError: odd\)"):
        list(islice(stream, 8))
    reading = Reading(on_error="quarantine", error_budget=1)
    quarantined = Stream(Dataset(*written), seed=5, batch=BATCH, decode=fussy, reading=reading)
    with closing(quarantined):
        list(islice(quarantined, 8))
    stream = Stream(Dataset(*written), seed=5, batch=BATCH, decode=nothing)
    with closing(stream), pytest.raises(DataError, match=r"sample .* cannot be decoded \(AttributeError: 'NoneType'"):
        next(iter(stream))
    with closing(Stream(Dataset(*written), seed=5, batch=BATCH, decode=number)) as stream:
        assert next(iter(stream)).arrays["n"].shape == (BATCH,)
    assert quarantined.skipped == {f"{written[0].uri}/3.tar/3-7": "sample 3-7 cannot be decoded (ValueError: odd)"}


def test_decode_must_be_of_a_module_for_loader_processes(
    written: tuple[Counting, list[Shard]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "__module__", "__main__")
    with pytest.raises(ConfigError, match="move it to a module"):
        Stream(Dataset(*written), seed=5, batch=BATCH, decode=lengths, reading=Reading(workers=1))


def test_what_a_loader_process_meets_is_told(written: tuple[Counting, list[Shard]]) -> None:
    for decode, said in (
        (special, "sample 0-1 cannot"),
        (leaving, "a loader process failed .*SystemExit: with a lock"),
    ):
        stream = Stream(Dataset(*written), seed=5, batch=BATCH, decode=decode, reading=Reading(workers=2))
        with closing(stream), pytest.raises(CalotypeError, match=said):
            list(islice(stream, 8))


# ------------------------------------------------------------------------------------------- more of it


def test_filters_change_the_stream_not_the_data(written: tuple[Counting, list[Shard]]) -> None:
    store, shards = written
    keep = {shard.key: np.arange(shard.samples) % 3 == 0 for shard in shards}
    wanted = {f"{n}-{i}" for n, shard in enumerate(shards) for i in range(0, shard.samples, 3)}
    for world in (1, 3):
        found: list[str] = []
        for rank in range(world):
            dataset = Dataset(store, shards, keep=keep)
            stream = Stream(dataset, seed=5, batch=len(wanted), rank=rank, world=world)
            with closing(stream):
                assert stream.epoch_samples == len(wanted)
                found += next(iter(stream)).keys
        assert sorted(found) == sorted(wanted)


def test_shapes_do_not_meet_in_a_batch(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    shapes = [(2, 2), (2, 3), (1, 4)]
    rows = []
    for n in range(3):
        samples = [
            Sample(f"{n}-{k}-{i}", {"x.npy": to_npy(np.full(shapes[k], i))}) for k in range(3) for i in range(20)
        ]
        rows.append(write_shard(store, f"{n}.tar", samples, 8, buckets=[i // 20 for i in range(60)]))
    assert rows[0].buckets == ((0, 20), (1, 20), (2, 20))
    assert rows[0].chunk_counts() == [8, 8, 4] * 3
    everything: list[list[str]] = []
    for workers in (0, 2):
        reading = Reading(workers=workers)
        with closing(Stream(Dataset(store, rows), seed=1, batch=12, arrays=["x"], reading=reading)) as stream:
            batches = list(islice(stream, 30))
        for batch in batches:
            (kind,) = {key.split("-")[1] for key in batch.keys}
            assert batch.arrays["x"].shape == (12, *shapes[int(kind)])
        everything.append([key for batch in batches for key in batch.keys])
        assert set(Counter(everything[-1][:180]).values()) == {1}
    assert everything[0] == everything[1]


def test_mixtures_are_one_stream(tmp_path: Path, written: tuple[Counting, list[Shard]]) -> None:
    store = open_store(str(tmp_path))
    other = Dataset(store, [write_shard(store, "x.tar", [sample(9, i) for i in range(50)], 8)], weight=1.0)
    mine = Dataset(*written, weight=3.0)
    found = []
    for world in (1, 3):
        share: dict[int, str] = {}
        for rank in range(world):
            stream = Stream([mine, other], seed=2, batch=16, rank=rank, world=world, arrays=["x"])
            with closing(stream.seek(16 * 5)):
                for batch in islice(stream, 40):
                    share |= zip(batch.positions.tolist(), batch.keys)
        found.append([share[place] for place in sorted(share)])
    assert found[0] == found[1]
    assert sum(key.startswith("9-") for key in found[0]) == 160  # a quarter


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_torch_loaders_read_it_and_resume(
    written: tuple[Counting, list[Shard]], golden: list[str], workers: int
) -> None:
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    def stream() -> Stream:
        dataset = Dataset(FolderStore(written[0].path), written[1])
        return Stream(dataset, seed=5, batch=BATCH, window=8, arrays=["x"])

    loader = DataLoader(stream().seek(2 * BATCH).as_torch(), batch_size=None, num_workers=workers)
    batches = list(islice(loader, 5))
    assert [batch["cursor"]["position"] for batch in batches] == [BATCH * step for step in range(3, 8)]
    assert [key for batch in batches for key in batch["key"]] == golden[2 * BATCH : 7 * BATCH]
    assert batches[0]["x"].shape == (BATCH, 2, 3)
    assert batches[0]["position"].tolist() == list(range(2 * BATCH, 3 * BATCH))
    stateful = StatefulDataLoader(stream().as_torch(), batch_size=None, num_workers=workers)
    found = [key for batch in islice(stateful, 7) for key in batch["key"]]
    state = stateful.state_dict()
    resumed = StatefulDataLoader(stream().as_torch(), batch_size=None, num_workers=workers)
    resumed.load_state_dict(state)
    found += [key for batch in islice(resumed, 6) for key in batch["key"]]
    assert found == golden[: 13 * BATCH]


@pytest.mark.parametrize("settings", [{"workers": 1}, {"on_error": "quarantine", "error_budget": 5}])
def test_worker_processes_of_a_loader_do_not_count_what_is_left_out(
    written: tuple[Counting, list[Shard]], settings: dict[str, Any]
) -> None:
    from torch.utils.data import DataLoader

    dataset = Dataset(FolderStore(written[0].path), written[1])
    stream = Stream(dataset, seed=5, batch=BATCH, arrays=["x"], reading=Reading(**settings))
    for workers in (1, 2):
        with pytest.raises(ConfigError, match="num_workers=0"):
            next(iter(DataLoader(stream.as_torch(), batch_size=None, num_workers=workers)))


def test_a_local_disk_is_read_instead(
    written: tuple[Counting, list[Shard]], golden: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 60.0)  # else a busy machine leaves a chunk out, as it may

    def read(steps: int) -> list[str]:
        READS.clear()
        reading = Reading(cache=str(tmp_path / "cache"), cache_bytes=10**8, memory=2**24)
        with closing(Stream(Dataset(*written), seed=5, batch=BATCH, window=8, reading=reading)) as stream:
            return [key for batch in islice(stream, steps) for key in batch.keys]

    assert read(15) == golden[: 15 * BATCH]
    assert sum(key.endswith(".tar") for key, _, _ in READS) > 0
    assert read(15) == golden[: 15 * BATCH]
    assert sum(key.endswith(".tar") for key, _, _ in READS) == 0
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 5000]
    for path in files:
        data = bytearray(path.read_bytes())
        data[4000] ^= 1
        path.write_bytes(data)
    assert read(15) == golden[: 15 * BATCH], "what the disk changed is read anew"
    assert sum(key.endswith(".tar") for key, _, _ in READS) >= len(files)


def test_over_real_s3(bucket: str, written: tuple[Counting, list[Shard]]) -> None:
    store = open_store(bucket)
    for entry in written[0].list():
        store.publish(entry.key, written[0].read(entry.key))
    assert keys((store, written[1]), 3, 10) == keys(written, 1, 10)  # type: ignore[arg-type]
    assert keys((store, written[1]), 1, 3, workers=2) == keys(written, 1, 3)  # type: ignore[arg-type]
