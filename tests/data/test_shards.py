"""Shards say the same bytes again, plain WebDataset reads them, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import webdataset
from calotype.data import Dataset, Stream, tar
from calotype.data import manifest as rooms
from calotype.data.manifest import (
    CACHE,
    DATASET,
    Manifest,
    Shard,
    columns_key,
    held_out,
    load_dataset,
    publish_dataset,
    sidecar_key,
)
from calotype.data.shards import (
    CHUNK,
    Sample,
    existing_shard,
    iterate,
    keys_of,
    read_chunk,
    read_sidecar,
    write_shard,
)
from calotype.data.store import Missing, Store, open_store
from calotype.errors import DataError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FIXTURES = Path(__file__).parents[1] / "fixtures"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(number: int) -> Sample:
    members = {"png": b"\x89PNG" + bytes([number]) * (number * 37), "txt": f"a {number} – drawn".encode()}
    return Sample(f"digit-{number:03d}", members | {"json": json.dumps({"label": number % 10}).encode()})


def latent(number: int) -> Sample:
    mean = (np.arange(2 * 4 * 2 * 2).reshape(2, 4, 2, 2) / 8 + number).astype(np.float16)
    return Sample(f"a folder/{number:03d}", {"latent.npy": npy(mean), "text.npy": npy(np.arange(8, dtype=np.int32))})


def plain(samples: list[Sample]) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, {name: bytes(data) for name, data in sorted(sample.members.items())}) for sample in samples]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "root"))


@pytest.fixture
def shard(store: Store) -> Shard:
    return write_shard(store, "shards/train-0.tar", [picture(n) for n in range(20)], 6, columns={"n": list(range(20))})


def test_what_is_written_is_read(store: Store, shard: Shard) -> None:
    sidecar = read_sidecar(store, shard)
    assert (shard.samples, shard.chunks, shard.chunk_counts()) == (20, 4, [6, 6, 6, 2])
    assert plain(list(iterate(store, [shard]))) == plain([picture(n) for n in range(20)])
    assert plain(read_chunk(store, shard, sidecar, 3)) == plain([picture(18), picture(19)])
    assert sidecar.members == ("json", "png", "txt")
    assert shard.chunk_bytes == max(np.diff(sidecar.offsets))
    table = pyarrow.parquet.read_table(io.BytesIO(store.read(columns_key(shard.key))))
    assert table.to_pydict() == {"key": keys_of(store, shard), "n": list(range(20))}
    assert keys_of(store, shard) == [f"digit-{n:03d}" for n in range(20)]


def test_plain_webdataset_and_tar_read_it(store: Store, shard: Shard, tmp_path: Path) -> None:
    path = tmp_path / "root" / shard.key
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(item["__key__"], item["txt"], item["png"]) for item in found] == [
        (sample.key, sample.members["txt"], sample.members["png"]) for sample in map(picture, range(20))
    ]
    row = write_shard(store, "latents.tar", [latent(n) for n in range(5)], 2)
    found = list(webdataset.WebDataset(str(tmp_path / "root" / row.key), shardshuffle=False).decode())
    assert [float(item["latent.npy"][0, 0, 0, 0]) for item in found] == [0, 1, 2, 3, 4]
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    assert len(infos) == 60
    assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in infos} == {(0, 0, 0, "", 0o644)}


def test_the_sidecar_knows_arrays_and_absent_members(store: Store) -> None:
    mixed = [latent(0), latent(1), Sample("b", {"latent.npy": npy(np.zeros((1, 2), np.float16)), "jpg": b"x"})]
    sidecar = read_sidecar(store, write_shard(store, "x.tar", mixed, 2))
    assert sidecar.arrays["text.npy"] == {"dtype": "<i4", "shape": [8]}
    assert sidecar.arrays["latent.npy"] == {"dtype": "<f2", "shape": None}
    assert sidecar.members == ("jpg", "latent.npy", "text.npy")


def test_written_again_it_is_the_same(store: Store, shard: Shard) -> None:
    before = {entry.key: (entry.modified, store.read(entry.key)) for entry in store.list()}
    again = write_shard(store, shard.key, [picture(n) for n in range(20)], 6, columns={"n": list(range(20))})
    assert again == shard == existing_shard(store, shard.key)
    assert {entry.key: (entry.modified, store.read(entry.key)) for entry in store.list()} == before
    assert existing_shard(store, "shards/other.tar") is None
    with pytest.raises(DataError, match="other bytes"):
        write_shard(store, shard.key, [picture(n) for n in range(19)], 6)
    with pytest.raises(DataError, match="other values"):
        write_shard(store, shard.key, [picture(n) for n in range(20)], 6, columns={"n": [0] * 20})


@pytest.mark.parametrize("step", ["tar", "columns"])
def test_a_writer_killed_between_its_files_is_finished_by_the_next(store: Store, shard: Shard, step: str) -> None:
    store.delete(sidecar_key(shard.key))
    if step == "tar":
        store.delete(columns_key(shard.key))
    assert existing_shard(store, shard.key) is None
    assert write_shard(store, shard.key, [picture(n) for n in range(20)], 6, columns={"n": list(range(20))}) == shard


def damaged(kind: str, path: Path, store: Store, shard: Shard) -> None:
    tar = path / shard.key
    data = bytearray(tar.read_bytes())
    if kind == "flipped bit":
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    elif kind == "flipped bit in a header":
        data[3] ^= 1
        tar.write_bytes(data)
    elif kind == "flipped bit in the sidecar":
        sidecar = path / sidecar_key(shard.key)
        sidecar.write_bytes(sidecar.read_bytes().replace(b'"samples":20', b'"samples":21'))
    elif kind == "cut":
        tar.write_bytes(data[: len(data) * 2 // 3])
    elif kind == "missing":
        tar.unlink()
    elif kind == "missing sidecar":
        (path / sidecar_key(shard.key)).unlink()
    else:
        samples = [picture(n) for n in range(20)]
        if kind == "missing member":
            samples[11].members.pop("txt")
        else:
            samples.reverse()
        other = write_shard(store, "other.tar", samples, 6)
        shutil.copy(path / other.key, tar)
        if kind == "replaced with its sidecar":
            shutil.copy(path / sidecar_key(other.key), path / sidecar_key(shard.key))


KINDS = [
    *("flipped bit", "flipped bit in a header", "flipped bit in the sidecar", "cut", "missing", "missing sidecar"),
    *("missing member", "replaced", "replaced with its sidecar"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_that_names_the_shard(store: Store, shard: Shard, tmp_path: Path, kind: str) -> None:
    damaged(kind, tmp_path / "root", store, shard)
    with pytest.raises(DataError, match=r"shards/train-0"):
        list(iterate(store, [shard]))


def test_every_cut_of_a_tar_is_seen(store: Store, tmp_path: Path) -> None:
    """webdataset alone loses samples here without a word."""
    row = write_shard(store, "x.tar", [latent(n) for n in range(4)], 2)
    whole = (tmp_path / "root" / "x.tar").read_bytes()
    for length in range(0, len(whole) - 2 * tar.BLOCK, 331):
        (tmp_path / "root" / "x.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.tar"):
            list(iterate(store, [row]))


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [picture(1), picture(1)],
        [Sample("a.b", {"txt": b""})],
        [Sample("", {"txt": b""})],
        [Sample("/a", {"txt": b""})],
        [Sample("a/", {"txt": b""})],
        [Sample("__meta__", {"txt": b""})],
        [Sample("a\nb", {"txt": b""})],
        [Sample("a", {})],
        [Sample("a", {"TXT": b""})],
        [Sample("a", {".txt": b""})],
        [Sample("a", {"../txt": b""})],
        [Sample("a" * 300, {"txt": b""})],
        [Sample("a", {"latent.npy": b"not an array"})],
    ],
)
def test_what_readers_would_misread_is_not_written(store: Store, samples: list[Sample]) -> None:
    with pytest.raises(DataError, match=r"bad\.tar"):
        write_shard(store, "bad.tar", samples, 4)
    assert list(store.list()) == []


KEYS = st.text(st.characters(exclude_categories=("C",), exclude_characters="./\\"), min_size=1, max_size=12)
MEMBERS = st.dictionaries(st.sampled_from(["png", "txt", "a.b-c", "json"]), st.binary(max_size=1500), min_size=1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(KEYS.filter(lambda key: not key.startswith("__")), MEMBERS, min_size=1),
    chunk=st.integers(1, 5),
)
def test_any_samples_come_back(tmp_path_factory: pytest.TempPathFactory, data: dict, chunk: int) -> None:
    store = open_store(str(tmp_path_factory.mktemp("any")))
    samples = [Sample(key, members) for key, members in data.items()]
    row = write_shard(store, "x.tar", samples, chunk)
    assert plain(list(iterate(store, [row]))) == plain(samples)
    with tarfile.open(Path(store.uri) / "x.tar") as tar:
        assert len(tar.getmembers()) == sum(map(len, data.values()))


def test_manifests_have_versions(store: Store, shard: Shard) -> None:
    with pytest.raises(DataError, match="prepare"):
        load_dataset(store)
    first = Manifest(DATASET, "digits", ("png", "txt"), (shard, replace(shard, split="held_out")), {"source": {"a": 1}})
    digest = publish_dataset(store, first)
    assert publish_dataset(store, first) == digest == first.digest
    second = replace(first, shards=(shard,))
    assert publish_dataset(store, second) != digest
    assert [entry.key for entry in store.list("manifests/")] == ["manifests/000001.json", "manifests/000002.json"]
    assert load_dataset(store) == second
    assert load_dataset(store, digest) == load_dataset(store, digest[:8]) == first
    assert first.split("held_out") == (replace(shard, split="held_out"),)
    assert second.totals() == {"train": {"shards": 1, "samples": 20, "bytes": shard.bytes}}
    for wrong in ("0" * 64, digest[:7], "newest"):
        with pytest.raises(DataError, match=r"data\.digest"):
            load_dataset(store, wrong)
    for bad in (b"{}", b"[]", b"\xff", b'{"format":"calotype.dataset/9"}', b'{"format":"calotype.dataset/2"}'):
        with pytest.raises(DataError, match="manifest"):
            Manifest.from_bytes(bad)


@pytest.mark.parametrize(
    "odd",
    [
        {"samples": "20"},
        {"samples": 20.0},
        {"samples": True, "chunk_samples": 1},
        {"samples": None},
        {"samples": 10**12, "chunk_samples": 1},
        {"samples": 0},
        {"bytes": -1},
        {"bytes": float("inf")},
        {"chunk_bytes": -1},
        {"key": 7},
        {"key": ["a"]},
        {"split": {}},
        {"sha256": None},
        {"buckets": [[0, 30], [1, -10]]},
        {"buckets": [[0, 20], [1, 0]]},
        {"buckets": [[0.5, 20]]},
        {"buckets": [20]},
        {"buckets": 3},
        {"name": 1},
        {"members": [1]},
        {"meta": []},
        {"shards": None},
        {"shards": [1]},
        {"fields": None},
    ],
)
def test_hostile_manifests_are_one_sentence(shard: Shard, odd: dict[str, Any]) -> None:
    """The types and sizes of all that a manifest says: a listing of datasets must not end at one of them."""
    found = json.loads(Manifest(DATASET, "x", ("png",), (shard,), {}).to_bytes())
    assert Manifest.from_bytes(json.dumps(found).encode()).shards == (shard,)
    for name, value in odd.items():
        if name in found:
            found[name] = value
        else:
            found["shards"][0][found["fields"].index(name)] = value
    with pytest.raises(DataError, match="manifest") as caught:
        Manifest.from_bytes(json.dumps(found).encode())
    assert "\n" not in str(caught.value)


def test_many_publishers_make_many_versions(store: Store, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that another took in between is not overwritten."""
    manifests = [Manifest(DATASET, str(n), (), (shard,)) for n in range(2)]
    seen, versions = [], rooms.versions_of

    def late(store: Store) -> list[str]:
        found = versions(store)
        if not seen:
            seen.append(1)
            publish_dataset(store, manifests[0])
        return found

    monkeypatch.setattr(rooms, "versions_of", late)
    publish_dataset(store, manifests[1])
    assert load_dataset(store).name == "1"
    assert load_dataset(store, manifests[0].digest).name == "0"


def test_a_manifest_of_many_shards_is_small() -> None:
    row = Shard("shards/train-0123456789ab-00000.tar", 10**9, 10_000, 256, "0" * 64, "1" * 64, "2" * 64)
    assert len(Manifest(DATASET, "x", (), (row,) * 100).to_bytes()) / 100 < 350


def test_held_out_is_a_pure_share() -> None:
    keys = [f"key-{n}" for n in range(20_000)]
    chosen = {key for key in keys if held_out(key, 0.1)}
    assert 0.09 < len(chosen) / len(keys) < 0.11
    assert chosen < {key for key in keys if held_out(key, 0.2)}
    assert not any(held_out(key, 0.0) for key in keys)
    assert all(held_out(key, 1.0) for key in keys)


def test_over_real_s3(bucket: str) -> None:
    store = open_store(bucket)
    row = write_shard(store, "a b/x.tar", [latent(n) for n in range(9)], 4)
    assert (
        row == write_shard(store, "a b/x.tar", [latent(n) for n in range(9)], 4) == existing_shard(store, "a b/x.tar")
    )
    assert plain(list(iterate(store, [row]))) == plain([latent(n) for n in range(9)])
    store.delete(row.key)
    with pytest.raises(Missing, match=r"x\.tar"):
        list(iterate(store, [row]))


# ---------------------------------------------------------------- formats, for ever


def golden(root: Path) -> None:
    """What lies in fixtures/formats-v2.  Never change it: data was written like this."""
    dataset, cache = open_store(str(root / "dataset")), open_store(str(root / "cache"))
    columns = {"caption": [f"a {n} – drawn" for n in range(7)], "label": list(range(7))}
    rows = [
        write_shard(
            dataset, "shards/train-0123456789ab-00000.tar", [picture(n) for n in range(7)], 3, "train", columns
        ),
        write_shard(dataset, "shards/held_out-0123456789ab-00000.tar", [picture(n) for n in (8, 9)], 3, "held_out"),
    ]
    meta = {"source": {"kind": "golden"}, "quarantined": [{"name": "ü.png", "reason": "not an image"}]}
    publish_dataset(dataset, Manifest(DATASET, "golden", ("png", "txt", "json"), tuple(rows), meta))
    source = rows[0].sha256
    buckets = [0, 0, 0, 0, 2, 2, 2]
    samples = [latent(n) for n in range(7)]
    row = write_shard(cache, f"{source}.tar", samples, 3, source_sha256=source, buckets=buckets)
    manifest = Manifest(CACHE, "golden", ("latent.npy", "text.npy"), (row,), {"channel_mean": [0.1, 1e-9, -3.0, 2.5]})
    cache.publish("manifest.json", manifest.to_bytes())


@pytest.mark.parametrize(
    ("version", "dataset_digest", "cache_digest", "chunks"),
    [
        (
            "formats-v1",
            "d9cffebd5e4cb6b1b1b3013bf5bca287d49c5db46acac411e8dffd3a97c9a56e",
            "e586e344539a7ef89a3c08f424d177abb0f5b1f0225fec3d28b8ebe7f3c8e1bf",
            [3, 3, 1],
        ),
        (
            "formats-v2",
            "20b070b8e2c5bb40a5519f19e66ee5b3b437bed325a5c3ca64efedb10126484b",
            "cdddb25fada2b46f9fe76b6ca6f180c9518cfe3b22336b2055a15a5a7fd3d02d",
            [3, 1, 3],
        ),
    ],
)
def test_golden_formats_are_read(version: str, dataset_digest: str, cache_digest: str, chunks: list[int]) -> None:
    dataset, cache = (open_store(str(FIXTURES / version / name)) for name in ("dataset", "cache"))
    manifest = load_dataset(dataset, dataset_digest)
    assert plain(list(iterate(dataset, manifest.split("train")))) == plain([picture(n) for n in range(7)])
    assert plain(list(iterate(dataset, manifest.split("held_out")))) == plain([picture(8), picture(9)])
    assert existing_shard(dataset, manifest.shards[0].key) == manifest.shards[0]
    assert manifest.digest == dataset_digest
    assert manifest.meta["quarantined"] == [{"name": "ü.png", "reason": "not an image"}]
    latents = Manifest.from_bytes(cache.read("manifest.json"))
    assert latents.digest == cache_digest
    assert plain(list(iterate(cache, latents.shards))) == plain([latent(n) for n in range(7)])
    assert latents.shards[0].source_sha256 == manifest.shards[0].sha256
    assert latents.shards[0].chunk_counts() == chunks
    assert latents.meta["channel_mean"] == [0.1, 1e-9, -3.0, 2.5]
    with closing(Stream(Dataset(cache, latents.shards), seed=0, batch=7, arrays=["latent"])) as stream:
        assert len(set(next(iter(stream)).keys)) == (7 if version == "formats-v1" else 4)


def test_golden_v2_is_written_again(tmp_path: Path) -> None:
    golden(tmp_path)
    there = FIXTURES / "formats-v2"
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert written.keys() == expected.keys()
    parquet = [path for path in expected if path.suffix == ".parquet"]
    for path in parquet:  # its bytes are pyarrow's, which may change with its version; so may the hashes of them
        assert pyarrow.parquet.read_table(there / path).equals(pyarrow.parquet.read_table(tmp_path / path))
    for path in expected.keys() - set(parquet):
        assert hashless(written[path]) == hashless(expected[path]), path


def test_a_chunk_is_some_megabytes(store: Store) -> None:
    big = [Sample(str(n), {"bin": bytes(CHUNK // 10)}) for n in range(25)]
    row = write_shard(store, "x.tar", big, 256)
    assert row.chunk_counts() == [9, 9, 7]
    assert row.chunk_bytes <= CHUNK
    assert write_shard(store, "y.tar", [Sample(str(n), {"bin": bytes(2 * CHUNK)}) for n in range(2)], 256).chunks == 2


def test_buckets_lie_together(store: Store) -> None:
    samples = [picture(n) for n in range(6)]
    for buckets in ([0, 1, 0, 1, 1, 1], [0, 0, 0], [0] * 7):
        with pytest.raises(DataError, match=r"bad\.tar.*bucket for every sample"):
            write_shard(store, "bad.tar", samples, 4, buckets=buckets)


def hashless(data: bytes) -> bytes:
    """With the hash of columns, and the sidecar hash that follows from it, blanked."""
    if not data.startswith(b"{"):
        return data
    found = json.loads(data)
    if found.get("columns_sha256"):
        return data.replace(found["columns_sha256"].encode(), b"")
    for row in found.get("shards", ()):
        if row[6]:
            data = data.replace(row[6].encode(), b"").replace(row[5].encode(), b"")
    return data


@pytest.mark.parametrize(
    "chunks",
    [*({"offsets": lie} for lie in ([0, 2**50], [0, 2**70], 7, [0, float("nan")])), {"blake3": 1}, None],
)
def test_a_sidecar_that_lies_is_refused_in_a_sentence(tmp_path: Path, chunks: dict[str, object] | None) -> None:
    store = open_store(str(tmp_path))
    row = write_shard(store, "0.tar", [Sample("a", {"txt": b"x"})], 8)
    said = json.loads(store.read(sidecar_key("0.tar")))
    said["chunks"] = said["chunks"] | chunks if chunks else []
    data = json.dumps(said).encode()
    store.write(sidecar_key("0.tar"), data)
    with pytest.raises(DataError, match=r"not one of this shard|no number of JSON"):
        read_sidecar(store, replace(row, sidecar_sha256=hashlib.sha256(data).hexdigest()))
