"""Shards that somebody else wrote: indexed in one pass where they lie, read like our own, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from calotype.data import Stream, filters, foreign, open_dataset, scan, tar
from calotype.data.elsewhere import Elsewhere, dataset_store, shards_at
from calotype.data.files import FolderStore
from calotype.data.manifest import columns_key, load_dataset, versions_of
from calotype.data.shards import Sample, existing_shard, iterate, keys_of, read_columns, read_sidecar
from calotype.data.store import open_store
from calotype.data.tables import table
from calotype.data.verify import verify
from calotype.errors import CalotypeError, ConfigError, DataError
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.tars import HOSTILE, archives, made, mutated, raw, shards

ROOT = Path(__file__).parents[2]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample(shard: int, number: int) -> dict[str, Any]:
    about = {"width": 64 + number, "height": 48, "score": number / 8, "caption": "x", "nsfw": True}
    data = np.random.default_rng(number).bytes(1000 + 37 * number)
    return {"__key__": f"{shard:02d}/{number:04d}", "jpg": data, "txt": f"a {number}", "json": json.dumps(about)}


def write(path: Path, shard: int, samples: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=1754000000.25) as writer:
        for number in range(samples):
            writer.write({name: v.encode() if isinstance(v, str) and name != "__key__" else v
                          for name, v in sample(shard, number).items()})  # fmt: skip


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Three shards below a folder."""
    for shard in range(3):
        write(tmp_path / "theirs" / "part" / f"{shard:05d}.tar", shard)
    return tmp_path / "theirs"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK", 16_000)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tar -> bytes read of it."""
    counted: Counter[str] = Counter()
    into = FolderStore.read_into

    def counting(self: FolderStore, key: str, start: int, buffer: memoryview, stop: object = None) -> int:
        size = into(self, key, start, buffer)
        counted[key] += size
        return size

    monkeypatch.setattr(FolderStore, "read_into", counting)
    return counted


def plain(samples: Any) -> dict[str, dict[str, bytes]]:
    return {one.key: {name: bytes(data) for name, data in one.members.items()} for one in samples}


def read_by_webdataset(folder: Path) -> dict[str, dict[str, bytes]]:
    urls = [str(path) for path in sorted(folder.rglob("*.tar"))]
    return {
        one["__key__"]: {name: data for name, data in one.items() if not name.startswith("__")}
        for one in webdataset.WebDataset(urls, shardshuffle=False)
    }


def streamed(root: str, name: str) -> dict[str, dict[str, bytes]]:
    stream = Stream(open_dataset(root, name), seed=1, batch=8)
    found: list[Sample] = []
    for batch in stream:
        found += [one for one in batch.samples if one is not None]
        if len(found) >= stream.epoch_samples:
            return plain(found)
    raise AssertionError


# ------------------------------------------------------------------------------------------------ what it is for


def test_the_stream_reads_what_webdataset_reads(theirs: Path, tmp_path: Path, reads: Counter[str]) -> None:
    root, before = str(tmp_path / "root"), {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    found = foreign.index(root, "laion", str(theirs), jobs=2)
    assert (len(found.shards), found.bad, found.members, found.passed_by) == (3, (), ("jpg", "json", "txt"), {})
    assert {key: reads[key] for key in reads} == {f"part/{n:05d}.tar": found.shards[n].bytes for n in range(3)}
    assert streamed(root, "laion") == read_by_webdataset(theirs)
    assert {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()} == before
    assert not list(Path(root).rglob("*.tar"))
    store = dataset_store(root, "laion")
    manifest = load_dataset(store)
    assert manifest.digest == found.digest
    assert verify(store, manifest, 2) == []
    for shard in manifest.shards:
        sidecar = read_sidecar(store, shard)
        assert shard.chunks == len(sidecar.hashes) > 3
        assert 8_000 < shard.chunk_bytes < 32_000
        assert existing_shard(store, shard.key) == shard


def test_over_real_s3_in_another_bucket(theirs: Path, bucket: str, tmp_path: Path) -> None:
    place, root = f"{bucket}/some where/deep", f"{bucket}-root"
    open_store(root).ensure()
    open_store(place).upload(theirs)
    open_store(place).write("part/00000_stats.json", b"{}")
    found = foreign.index(root, "laion", place, jobs=3)
    assert found.beside == {".json": 1}
    assert streamed(root, "laion") == read_by_webdataset(theirs)
    store = dataset_store(root, "laion")
    assert verify(store, load_dataset(store), 3) == []
    here = foreign.index(str(tmp_path / "root"), "laion", str(theirs))
    assert here.digest == found.digest, "where they lie is no part of what they are"
    data = open_store(place).read("part/00001.tar")
    open_store(place).write("part/00001.tar", data[:9000] + b"\1" + data[9001:])
    open_store(place).delete("part/00002.tar")
    wrong = verify(store, load_dataset(store), 3)
    assert len(wrong) == 2
    assert wrong[0].startswith(f"{place}/part/00001.tar is damaged or replaced: chunk 0")
    assert wrong[1].startswith(f"{place}/part/00002.tar does not exist")
    with pytest.raises(DataError, match="part/0000"):
        streamed(root, "laion")


def test_columns_are_there_to_filter_by(theirs: Path, tmp_path: Path) -> None:
    found = foreign.index(str(tmp_path / "root"), "laion", str(theirs))
    store = dataset_store(str(tmp_path / "root"), "laion")
    data = read_columns(store, found.shards[1])
    assert data is not None
    table = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
    whole = [sample(1, number) for number in range(40)]
    assert table == {
        "key": [one["__key__"] for one in whole],
        **{f"bytes.{name}": [len(one[name]) for one in whole] for name in ("jpg", "json", "txt")},
        "width": [64 + number for number in range(40)],
        "height": [48] * 40,
        "score": [number / 8 for number in range(40)],
        "nsfw": [1] * 40,
    }


def test_their_columns_filter_the_stream(theirs: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    foreign.index(root, "laion", str(theirs))
    store, dataset = dataset_store(root, "laion"), open_dataset(root, "laion")
    manifest = load_dataset(store)
    chosen = filters.publish(store, manifest, [["width", ">=", 84], ["bytes.jpg", "<", 2200]], {"01/0022"})
    stream = Stream(replace(dataset, keep=filters.load(store, chosen, manifest)), seed=1, batch=8)
    expected = {f"{shard:02d}/{n:04d}" for shard in range(3) for n in range(20, 33)} - {"01/0022"}
    assert stream.epoch_samples == len(expected)
    keys = [key for batch, _ in zip(stream, range(-(-stream.epoch_samples // 8))) for key in batch.keys]
    assert set(keys[: len(expected)]) == expected


# ------------------------------------------------------------------------------------------------ again, and again


def test_run_again_it_reads_nothing_and_changes_nothing(theirs: Path, tmp_path: Path, reads: Counter[str]) -> None:
    root = tmp_path / "root"
    first = foreign.index(str(root), "laion", str(theirs))
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    reads.clear()
    again = foreign.index(str(root), "laion", str(theirs))
    assert (again.digest, again.read, not reads) == (first.digest, frozenset(), True)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == files


def test_new_shards_are_a_new_version(theirs: Path, tmp_path: Path, reads: Counter[str]) -> None:
    root = str(tmp_path / "root")
    first = foreign.index(root, "laion", str(theirs))
    reads.clear()
    write(theirs / "part" / "00001b.tar", 9)
    second = foreign.index(root, "laion", str(theirs))
    assert list(reads) == ["part/00001b.tar"]
    assert second.read == {"foreign/part/00001b.tar"}
    assert [shard.key[-10:] for shard in second.shards] == ["/00000.tar", "/00001.tar", "00001b.tar", "/00002.tar"]
    store = dataset_store(root, "laion")
    assert load_dataset(store, first.digest).shards == first.shards
    assert len(versions_of(store)) == 2
    assert streamed(root, "laion") == read_by_webdataset(theirs)


def test_killed_it_goes_on_where_it_was(tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK", 4 * 2**20)  # as in the other process
    for shard in range(12):
        write(tmp_path / "theirs" / f"{shard:05d}.tar", shard, 400)
    root, place = tmp_path / "root", str(tmp_path / "theirs")
    program = "import sys; from calotype.data import foreign; foreign.index(*sys.argv[1:], jobs=2)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    process = subprocess.Popen([sys.executable, "-c", program, str(root), "laion", place], env=env)
    while not (finished := set(root.rglob("*.sidecar.json"))) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name.removesuffix(".sidecar.json") for path in root.rglob("*.sidecar.json")}
    assert 0 < len(finished) < 12
    assert versions_of(open_store(str(root)).at("datasets", "laion")) == []
    with pytest.raises(DataError, match="there is no dataset"):
        open_dataset(str(root), "laion")
    reads.clear()
    found = foreign.index(str(root), "laion", place)
    assert {key.removesuffix(".tar") for key in reads} == {f"{n:05d}" for n in range(12)} - finished
    assert len(found.read) == 12 - len(finished)
    whole = foreign.index(str(tmp_path / "other"), "laion", place)
    assert whole.digest == found.digest


def test_a_place_that_moved_is_the_same_dataset(theirs: Path, tmp_path: Path, reads: Counter[str]) -> None:
    root, moved = str(tmp_path / "root"), tmp_path / "moved"
    first = foreign.index(root, "laion", str(theirs))
    expected = read_by_webdataset(theirs)
    theirs.rename(moved)
    with pytest.raises(DataError, match=f"{theirs}/part/0000"):
        streamed(root, "laion")
    reads.clear()
    again = foreign.index(root, "laion", str(moved))
    assert (again.digest, not reads) == (first.digest, True)
    assert shards_at(open_store(root).at("datasets", "laion")) == str(moved)
    assert streamed(root, "laion") == expected
    (tmp_path / "other").mkdir()
    shutil.copy(moved / "part" / "00000.tar", tmp_path / "other" / "x.tar")
    with pytest.raises(DataError, match=r"has part/00000\.tar from .*moved, which .*other lacks.*--name"):
        foreign.index(root, "laion", str(tmp_path / "other"))


def test_shards_must_not_change_under_one_name(theirs: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    foreign.index(root, "laion", str(theirs))
    write(theirs / "part" / "00001.tar", 7, 41)
    found = foreign.index(root, "laion", str(theirs))
    assert found.digest == ""
    ((name, why),) = found.bad
    assert name == "part/00001.tar"
    assert "must not change under its name" in why
    assert "--name" in why
    assert foreign.index(root, "other", str(theirs)).digest
    write(theirs / "part" / "00001.tar", 8, 40)  # as long as it was
    assert foreign.index(root, "laion", str(theirs)).digest, "known by its size"
    store = dataset_store(root, "laion")
    wrong = verify(store, load_dataset(store))
    assert "part/00001.tar is damaged or replaced: chunk 0" in wrong[0]


def test_whole_shards_are_held_out_by_their_names(theirs: Path, tmp_path: Path) -> None:
    for shard in range(3, 9):
        write(theirs / "part" / f"{shard:05d}.tar", shard)
    root = str(tmp_path / "root")
    found = foreign.index(root, "laion", str(theirs), share=0.5)
    splits = {shard.key: shard.split for shard in found.shards}
    assert set(splits.values()) == {"train", "held_out"}
    assert len(open_dataset(root, "laion", split="held_out").shards) == list(splits.values()).count("held_out")
    for shard in range(9, 12):
        write(theirs / "part" / f"{shard:05d}.tar", shard)
    more = {shard.key: shard.split for shard in foreign.index(root, "laion", str(theirs), share=0.5).shards}
    assert {key: more[key] for key in splits} == splits, "none moves"
    with pytest.raises(DataError, match="whole shards are held out"):
        foreign.index(root, "few", str(theirs), share=1e-9)


# ------------------------------------------------------------------------------------------------ every shape of tar


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def indexed(tmp_path: Path, data: bytes, **others: bytes) -> foreign.Indexed:
    put(tmp_path / "theirs" / "a.tar", data)
    for name, other in others.items():
        put(tmp_path / "theirs" / f"{name}.tar", other)
    return foreign.index(str(tmp_path / "root"), "x", str(tmp_path / "theirs"), jobs=1)


def samples_of(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    store = dataset_store(str(tmp_path / "root"), "x")
    return plain(iterate(store, load_dataset(store).shards))


def test_what_is_part_of_no_sample_is_passed_by_and_counted(tmp_path: Path) -> None:
    files = [("d/", b""), ("d/a.jpg", b"1" * 700), ("d/._a.jpg", b"x"), ("d/a.txt", b"2"), ("__MACOSX/._a.jpg", b"x"),
             ("__meta__/info.json", b"{}"), ("README", b"x"), ("d/b.c/", b""), ("d/b.c/e.f.JPG", b"3")]  # fmt: skip
    found = indexed(tmp_path, made(files, tarfile.PAX_FORMAT) + tar.END)
    assert found.passed_by == {"files without a suffix": 1, "folders": 2, "hidden files": 3}
    assert samples_of(tmp_path) == {"d/a": {"jpg": b"1" * 700, "txt": b"2"}, "d/b.c/e": {"f.jpg": b"3"}}
    manifest = load_dataset(dataset_store(str(tmp_path / "root"), "x"))
    assert manifest.meta["passed_by"] == found.passed_by
    assert verify(dataset_store(str(tmp_path / "root"), "x"), manifest) == []


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_begin_chunks_too(tmp_path: Path, kind: int) -> None:
    name = "folder/" * 12 + "n" * 60
    files = [(f"{name}{n:03d}.{member}", bytes([n]) * 3000) for n in range(30) for member in ("jpg", "txt")]
    found = indexed(tmp_path, made(files, kind) + tar.END)
    assert found.shards[0].chunks > 5
    assert len(samples_of(tmp_path)) == 30
    assert samples_of(tmp_path) == read_by_webdataset(tmp_path / "theirs")


def test_arrays_and_absent_members_are_known(tmp_path: Path) -> None:
    arrays = {"a.x": np.zeros((2, 3), np.float16), "b.x": np.ones((2, 3), np.float16), "b.y": np.zeros(4)}
    files = [(f"{name}.npy", npy(array)) for name, array in arrays.items()]
    files += [("c.x.npy", b"\x93NUMPY\1\0\x0f\0{'descr': (((("), ("c.z.npy", npy(np.zeros(1)))]
    files += [("d.y.npy", npy(np.zeros(5)))]
    found = indexed(tmp_path, made(files[:2] + files[2:3]) + tar.END)
    store = dataset_store(str(tmp_path / "root"), "x")
    assert read_sidecar(store, found.shards[0]).arrays["x.npy"] == {"dtype": "<f2", "shape": [2, 3]}
    found = indexed(tmp_path, made(files[:3]) + tar.END, b=made(files[2:]) + tar.END)
    arrays = read_sidecar(store, found.shards[1]).arrays
    assert arrays == {
        "x.npy": {"dtype": None, "shape": None},
        "y.npy": {"dtype": "<f8", "shape": None},
        "z.npy": {"dtype": "<f8", "shape": [1]},
    }
    data = read_columns(store, found.shards[1])
    assert data is not None
    assert pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()["bytes.z.npy"] == [None, 136, None]


def test_hostile_json_is_no_number(tmp_path: Path) -> None:
    texts = [
        b'{"width": 1, "score": 0.5, "bytes.jpg": 1, "key": 2, "a\\u0000b": 1, "ok": 1}',
        *(b"[" * 60000, b"\xff", b"[1]", b'{"width": ' + b"9" * 5000 + b"}"),  # no objects
        b'{"width": 1e999, "score": NaN}',
        b'{"width": 99999999999999999999}',
        b'{"width": 1.5, "score": true, "ok": "1"}',
        b'{"width": 7.0, "score": 3, "new": 1}',
        b"{}" + b" " * 70000,
    ]
    files = [(f"{n}.{name}", data) for n, text in enumerate(texts) for name, data in (("jpg", b"x"), ("json", text))]
    found = indexed(tmp_path, made(files) + tar.END)
    data = read_columns(dataset_store(str(tmp_path / "root"), "x"), found.shards[0])
    assert data is not None
    table = pyarrow.parquet.read_table(io.BytesIO(data)).to_pydict()
    assert sorted(set(table)) == ["bytes.jpg", "bytes.json", "key", "ok", "score", "width"]
    assert table["width"] == [1, *[None] * 7, 7, None]
    assert table["score"] == [0.5, *[None] * 6, 1.0, 3.0, None]
    assert found.passed_by == {"json members that are no objects": 4}


def test_chunks_stay_small_where_samples_grow(tmp_path: Path, reads: Counter[str]) -> None:
    files = [(f"{n:04d}.jpg", bytes(10 if n < 300 else 50_000)) for n in range(320)]
    found = indexed(tmp_path, made(files) + tar.END)
    shard = found.shards[0]
    assert shard.chunk_bytes <= 8 * 16_000 + 2 * 50_000
    assert reads["a.tar"] <= 3 * shard.bytes, "read again, because what came first misled it"
    assert len(samples_of(tmp_path)) == 320
    last = made([(f"{n}.jpg", b"1") for n in range(10)] + [("x.jpg", bytes(200_000))]) + tar.END
    assert indexed(tmp_path / "last", last).shards[0].chunk_counts() == [1] * 11


def test_chunks_hold_few_samples_where_they_are_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK", 4 * 2**20)
    found = indexed(tmp_path, made([(f"{n:04d}.txt", b"1") for n in range(1000)]) + tar.END)
    assert found.shards[0].chunk_counts() == [256, 256, 256, 232]


def test_the_window_changes_nothing() -> None:
    """Whatever piece of a shard is in memory at once: the same chunks, hashes and columns."""
    name = "folder/" * 20
    files = [(f"{name}{n:03d}.{kind}", b"%d" % n * (n * 13)) for n in range(60) for kind in ("jpg", "json", "npy")]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = made(files, format, 1754000000.5) + tar.END + bytes(7000)

        def read(start: int, buffer: memoryview, data: bytes = data) -> int:
            piece = data[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            return len(piece)

        whole = scan.scanned(read, len(data), "x.tar", memoryview(bytearray(2**20)))
        assert len(whole.content["chunks"]["blake3"]) > 5
        for size in (4000, 4096, 5120, 7777, 65536, len(data) - 1, len(data)):
            found = scan.scanned(read, len(data), "x.tar", memoryview(bytearray(size)))
            assert found == whole, size


@settings(max_examples=150, deadline=None)
@given(data=mutated(archives() | shards()), size=st.integers(5000, 9000), closed=st.sampled_from([True, True, False]))
def test_any_tar_is_indexed_as_tarfile_reads_it_or_refused(data: bytes, size: int, closed: bool) -> None:
    data += tar.END * closed

    def read(start: int, buffer: memoryview) -> int:
        piece = data[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    found, refused = None, ""
    try:
        found = scan.scanned(read, len(data), "x.tar", memoryview(bytearray(size)))
    except DataError as error:
        refused = str(error)
    event("refused" if found is None else "read")
    assert refused.startswith("x.tar") if found is None else not refused
    if found is None:
        return
    expected: list[tuple[str, dict[str, int]]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as entries:
        for info in entries:
            key, member = tar.split_name(info.name, "") if info.isreg() else ("", "")
            if member and (not expected or expected[-1][0] != key):
                expected.append((key, {}))
            if member:
                expected[-1][1][member] = info.size
    assert found.keys == [key for key, _ in expected]
    for number, (_, sizes) in enumerate(expected):
        assert {name: column[number] for name, column in found.sizes.items() if column[number] >= 0} == sizes
    offsets = found.content["chunks"]["offsets"]
    chunks = [table(data[start:stop], "x.tar") for start, stop in pairwise(offsets)]
    assert [key for chunk in chunks for key in chunk.keys] == found.keys


def test_memory_does_not_grow_with_members(tmp_path: Path) -> None:
    """A member of 600 MB, which is nowhere in memory at once; in a process of its own, so that its peak is its own."""
    path = put(tmp_path / "theirs" / "a.tar", tar.header("a.jpg", 600 * 10**6))
    with open(path, "r+b") as file:
        file.truncate(512 + tar.padded(600 * 10**6) + 1024)
    program = (
        "import sys, resource; from calotype.data import foreign; import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = foreign.index(*sys.argv[1:], jobs=1)\n"
        "assert found.digest\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    words = [sys.executable, "-c", program, str(tmp_path / "root"), "x", str(tmp_path / "theirs")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB


# ------------------------------------------------------------------------------------------------ refusals

GOOD = made([("z.jpg", b"1"), ("z.txt", b"2")]) + tar.END


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shards_are_named_and_the_others_kept(tmp_path: Path, name: str, reads: Counter[str]) -> None:
    make, said = HOSTILE[name]
    data = make()
    found = indexed(tmp_path, data + tar.END, good=GOOD)
    assert found.digest == ""
    ((bad, why),) = found.bad
    assert bad == "a.tar"
    assert why.startswith(f"{tmp_path}/theirs/a.tar")
    assert "\n" not in why
    if name not in ("gzip", "climbing in pax", "garbage", "zeros and garbage", "many members", "many kinds", "twice"):
        with pytest.raises(DataError, match=said):
            raise DataError(why)
    assert versions_of(open_store(str(tmp_path / "root")).at("datasets", "x")) == []
    reads.clear()
    assert indexed(tmp_path, made([("a.jpg", b"")]) + tar.END).read == {"foreign/a.tar"}, "good.tar is known"
    assert "good.tar" not in reads


BAD: dict[str, tuple[bytes, str]] = {
    "interleaved": (
        made([("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"")]) + tar.END,
        r"byte 1024: sample 'a' comes again",
    ),
    "a key twice": (made([("a.jpg", b""), ("b.jpg", b""), ("a.jpg", b"")]) + tar.END, "sample 'a' comes again"),
    "a member twice": (made([("a.jpg", b""), ("a.jpg", b"")]) + tar.END, r"byte 512: sample 'a' has 'jpg' twice"),
    "no end": (made([("a.jpg", b"12")]), "cut at byte 1024: its closing blocks are missing"),
    "cut in a member": (made([("a.jpg", b"1" * 5000)])[:3000], r"cut at byte 3000: 'a\.jpg' should end at byte 5632"),
    "cut in a json": (made([("a.json", b"1" * 5000)])[:3000], r"cut at byte 3000: 'a\.json' should end at byte 5632"),
    "cut in a header": (
        made([("a.jpg", b"1")]) + made([("b.jpg", b"")])[:100],
        "byte 1024: cut: a header should be there",
    ),
    "cut in a long name": (
        made([("n" * 200 + ".txt", b"")], tarfile.GNU_FORMAT)[:700],
        "cut: an extended header should",
    ),
    "joined by cat": (GOOD + GOOD, r"ends at byte 2048, but more follows at byte 3072"),
    "gzip": (b"\x1f\x8b\x08" + bytes(2000), "is gzip"),
    "empty file": (b"", "cut at byte 0"),
    "zeros": (bytes(20_000), "zeros from byte 0"),
    "filled with zeros": (GOOD + bytes(2**20 + 1), "zeros from byte 2048"),
    "a page": (b"<html>not found</html>" + bytes(1000), "byte 0: not a tar header"),
    "key of a folder": (raw(b"a/b.jpg\0", b"") + raw(b"..", b"") + tar.END, "climbs out"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, said = BAD[name]
    found = indexed(tmp_path, data, good=GOOD)
    assert [bad for bad, _ in found.bad] == ["a.tar"]
    with pytest.raises(DataError, match=rf"^{tmp_path}/theirs/a\.tar.*{said}"):
        raise DataError(found.bad[0][1])


def test_a_sample_in_two_shards_is_named(tmp_path: Path) -> None:
    one, two = made([("a.jpg", b""), ("b.jpg", b"")]) + tar.END, made([("b.txt", b""), ("c.jpg", b"")]) + tar.END
    for _ in range(2):  # found by reading, and by sidecars
        found = indexed(tmp_path, one, b=two)
        assert found.digest == ""
        assert found.bad[0][0] == "a.tar"
        assert "ends with a part of sample 'b', and b.tar begins with the rest" in found.bad[0][1]


def test_keys_may_repeat_in_other_shards(tmp_path: Path) -> None:
    assert indexed(tmp_path, GOOD, b=GOOD, c=GOOD).digest
    assert len(open_dataset(str(tmp_path / "root"), "x").shards) == 3


def test_shards_without_samples_are_passed_by(tmp_path: Path) -> None:
    found = indexed(tmp_path, tar.END, b=GOOD, c=made([("d/", b""), ("README", b"")]) + tar.END)
    assert found.digest
    assert [shard.key for shard in found.shards] == ["foreign/b.tar"]
    assert found.passed_by == {"empty shards": 2}
    with pytest.raises(DataError, match="hold no sample"):
        foreign.index(str(tmp_path / "root"), "y", str(put(tmp_path / "none" / "a.tar", tar.END).parent))


def test_an_end_may_be_padded(tmp_path: Path) -> None:
    assert indexed(tmp_path, GOOD[:-512], b=GOOD + bytes(2**19), c=GOOD + bytes(100)).bad == ()


def test_every_cut_is_refused(tmp_path: Path) -> None:
    data = made([(f"{n}.{kind}", b"x" * 700) for n in range(3) for kind in ("jpg", "txt")], tarfile.PAX_FORMAT, 1.5)
    data += bytes(-len(data) % 10240) + bytes(10240)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for length in (*range(0, end + 1, 256), end + 511):
        found = indexed(tmp_path, data[:length])
        assert [name for name, _ in found.bad] == ["a.tar"], length
    assert indexed(tmp_path, data[: end + 512]).digest


def test_packed_shards_and_empty_places_are_refused_at_once(tmp_path: Path, theirs: Path) -> None:
    root = str(tmp_path / "root")
    with pytest.raises(DataError, match=r"there is no \.tar below .*nowhere: give"):
        foreign.index(root, "x", str(tmp_path / "nowhere"))
    put(tmp_path / "other" / "a.parquet", b"")
    with pytest.raises(DataError, match=r"but 1 \.parquet files"):
        foreign.index(root, "x", str(tmp_path / "other"))
    for name in ("a.tar.gz", "a.tgz", "a.tar.zst"):
        path = put(theirs / name, b"")
        with pytest.raises(DataError, match=rf"{name} is packed.*unpack"):
            foreign.index(root, "x", str(theirs))
        path.unlink()
    for name in ("", "a/b", "..", "-a", "a" * 101):
        with pytest.raises(ConfigError, match="--name"):
            foreign.index(root, name, str(theirs))
    with pytest.raises(ConfigError, match="other schemes"):
        foreign.index(root, "x", "http://host/shards")
    assert not (tmp_path / "root").exists()


def test_a_shard_that_goes_away_meanwhile_is_named(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = foreign._listed

    def late(place: Any) -> Any:
        found = listed(place)
        (theirs / "part" / "00001.tar").unlink()
        data = (theirs / "part" / "00002.tar").read_bytes()
        (theirs / "part" / "00002.tar").write_bytes(data[:5000])
        return found

    monkeypatch.setattr(foreign, "_listed", late)
    found = foreign.index(str(tmp_path / "root"), "x", str(theirs))
    assert "00001.tar does not exist" in found.bad[0][1]
    assert "00002.tar is cut: it has 5000 of the" in found.bad[1][1]


def test_foreign_shards_are_never_written(theirs: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    foreign.index(root, "x", str(theirs))
    store = dataset_store(root, "x")
    assert isinstance(store, Elsewhere)
    key = "foreign/part/00000.tar"
    for act in (lambda: store.publish(key, b""), lambda: store.write(key, b""), lambda: store.delete(key)):
        with pytest.raises(DataError, match="never changed"):
            act()
    assert store.exists(key)
    assert store.where(key) == f"{theirs}/part/00000.tar"
    assert [entry.key for entry in store.list(key)] == [key]
    assert store.read(key, 257, 5) == b"ustar"
    store.write("selections/a.bits", b"1")
    assert (tmp_path / "root/datasets/x/selections/a.bits").read_bytes() == b"1"
    (tmp_path / "root/datasets/x/place.json").write_text('{"format": "calotype.place/1"}')
    with pytest.raises(DataError, match=r"place\.json names no place: run"):
        dataset_store(root, "x")


def test_an_error_in_one_thread_ends_all(tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also Ctrl-C: what other threads are reading is not read to its end."""
    for name in "ab":
        path = put(tmp_path / "theirs" / f"{name}.tar", tar.header("a.jpg", 10**9))
        os.truncate(path, 512 + tar.padded(10**9) + 1024)
    counting = FolderStore.read_into

    def refused(self: FolderStore, key: str, start: int, buffer: memoryview, stop: object = None) -> int:
        if key == "b.tar" and start:
            raise CalotypeError("403")
        return counting(self, key, start, buffer)

    monkeypatch.setattr(FolderStore, "read_into", refused)
    with pytest.raises(CalotypeError, match="403"):
        foreign.index(str(tmp_path / "root"), "x", str(tmp_path / "theirs"), jobs=2)
    assert 0 < reads["a.tar"] < 5 * 10**8


# ------------------------------------------------------------------------------------------------ verify


def test_verify_lists_all_that_is_wrong(theirs: Path, tmp_path: Path) -> None:
    for shard in range(3, 9):
        write(theirs / "part" / f"{shard:05d}.tar", shard)
    root = tmp_path / "root"
    foreign.index(str(root), "x", str(theirs))
    store = dataset_store(str(root), "x")
    manifest = load_dataset(store)
    assert verify(store, manifest, 3) == []
    beside = root / "datasets" / "x" / "foreign" / "part"

    def change(path: Path, at: int, new: bytes) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:at] + new + data[at + len(new) :])

    size = manifest.shards[0].bytes
    change(theirs / "part/00000.tar", 100, b"\1")
    change(theirs / "part/00000.tar", size // 2, b"\1")
    change(theirs / "part/00001.tar", manifest.shards[1].bytes - 1, b"\1")  # behind the last chunk
    os.truncate(theirs / "part/00002.tar", 30_000)
    (theirs / "part/00003.tar").unlink()
    change(beside / "00004.sidecar.json", 30, b"9")
    (beside / "00005.sidecar.json").unlink()
    (beside / "00006.columns.parquet").unlink()
    shutil.copy(beside / "00008.columns.parquet", beside / "00007.columns.parquet")
    with open(theirs / "part/00008.tar", "ab") as file:
        file.write(bytes(512))
    wrong = verify(store, manifest, 3)
    assert [next(n for n in range(9) if f"0000{n}." in what) for what in wrong] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    said = [
        "chunk 0",
        "chunk ",
        "another SHA-256",
        "is cut: it has 30000 of",
        "does not exist",
        "not what the manifest",
    ]
    said += ["does not exist", "does not exist", "not what the manifest names", "is longer than"]
    for what, expected in zip(wrong, said, strict=True):
        assert expected in what
    data = (theirs / "part/00000.tar").read_bytes()
    (theirs / "part/00000.tar").write_bytes(bytes(len(data)))
    wrong = [what for what in verify(store, manifest) if "00000" in what]
    assert len(wrong) == 4
    assert f"{manifest.shards[0].chunks - 3} more of its {manifest.shards[0].chunks} chunks" in wrong[3]


def test_verify_reads_a_shard_whose_sidecar_is_lost(theirs: Path, tmp_path: Path) -> None:
    foreign.index(str(tmp_path / "root"), "x", str(theirs))
    store = dataset_store(str(tmp_path / "root"), "x")
    manifest = load_dataset(store)
    (tmp_path / "root/datasets/x/foreign/part/00000.sidecar.json").unlink()
    data = bytearray((theirs / "part/00000.tar").read_bytes())
    data[5000] ^= 1
    (theirs / "part/00000.tar").write_bytes(data)
    wrong = verify(store, manifest)
    assert len(wrong) == 2
    assert "another SHA-256" in wrong[1]


def test_keys_in_columns_are_compared(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.index(str(tmp_path / "root"), "x", str(theirs))
    store = dataset_store(str(tmp_path / "root"), "x")
    manifest = load_dataset(store)
    from calotype.data import verify as room

    monkeypatch.setattr(room, "keys_of", lambda store, shard: (keys_of(store, shard) or [])[::-1])
    assert "holds other keys than the columns say" in verify(store, manifest)[0]


def test_columns_must_have_a_row_for_every_sample(theirs: Path, tmp_path: Path) -> None:
    foreign.index(str(tmp_path / "root"), "x", str(theirs))
    store = dataset_store(str(tmp_path / "root"), "x")
    manifest = load_dataset(store)
    few, no_key, junk = io.BytesIO(), io.BytesIO(), b"PAR1 and then nothing"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), few)
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a"] * manifest.shards[1].samples}), no_key)
    rows = []
    for row, data in zip(manifest.shards, [few.getvalue(), no_key.getvalue(), junk]):
        store.write(columns_key(row.key), data)
        rows.append(replace(row, columns_sha256=hashlib.sha256(data).hexdigest()))
    wrong = verify(store, replace(manifest, shards=tuple(rows)))
    said = ["has 1 rows, the manifest says 40", "has no column `key`", "cannot be read as Parquet"]
    assert len(wrong) == 3
    for what, expected in zip(wrong, said):
        assert expected in what


def test_a_file_that_the_disk_does_not_give_is_named_and_the_others_verified(theirs: Path, tmp_path: Path) -> None:
    foreign.index(str(tmp_path / "root"), "x", str(theirs))
    store = dataset_store(str(tmp_path / "root"), "x")
    manifest = load_dataset(store)
    (theirs / "part/00000.tar").unlink()
    (theirs / "part/00000.tar").symlink_to("/proc/self/mem")  # reading its first page is an I/O error
    (theirs / "part/00002.tar").write_bytes(b"")
    wrong = verify(store, manifest)
    assert len(wrong) == 2
    assert "00000.tar cannot be read (Input/output error)" in wrong[0]
    assert "00002.tar is cut" in wrong[1]


def test_a_name_that_was_begun_elsewhere_is_refused(theirs: Path, tmp_path: Path) -> None:
    root, other = str(tmp_path / "root"), tmp_path / "other"
    other.mkdir()
    write(other / "a.tar", 9)
    (other / "b.tar").write_bytes((other / "a.tar").read_bytes()[:5000])  # cut: nothing is published
    assert foreign.index(root, "x", str(other)).digest == ""
    with pytest.raises(DataError, match=r"was begun with the shards at .*other: .*--name"):
        foreign.index(root, "x", str(theirs))
    assert foreign.index(root, "y", str(theirs)).digest


def test_a_move_that_fails_leaves_the_place_that_its_sidecars_are_of(theirs: Path, tmp_path: Path) -> None:
    root, moved = str(tmp_path / "root"), tmp_path / "moved"
    home = open_store(root).at("datasets", "x")
    foreign.index(root, "x", str(theirs))
    shutil.copytree(theirs, moved)
    write(moved / "part" / "00001.tar", 7, 41)  # another size: it does not move
    assert foreign.index(root, "x", str(moved)).digest == ""
    assert shards_at(home) == str(theirs)
    shutil.copy(theirs / "part" / "00001.tar", moved / "part" / "00001.tar")
    write(moved / "part" / "00005.tar", 5)
    (moved / "part" / "00006.tar").write_bytes(b"cut")
    assert foreign.index(root, "x", str(moved)).digest == ""  # of the new ones one cannot be used
    assert shards_at(home) == str(moved), "the sidecar of 00005 is of there"
    (moved / "part" / "00006.tar").unlink()
    assert foreign.index(root, "x", str(moved)).digest
