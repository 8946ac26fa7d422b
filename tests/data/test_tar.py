"""What is read of a tar is what Python's tarfile reads, or a DataError that names the place; never anything else."""

from __future__ import annotations

import io
import resource
import tarfile
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import webdataset
from calotype.data import tables, tar
from calotype.errors import DataError
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.tars import HOSTILE, TWO, archives, changed, extended, made, mended, mutated, raw, shards, stranger


def theirs(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as found:
        return [(info.name, info.offset_data, info.size) for info in found if info.isreg()]


def ours(data: bytes) -> list[tuple[str, int, int]]:
    return [(entry.name, entry.start, entry.size) for entry in tar.entries(data, "x.tar")]


def plain(table: tables.Table) -> tuple[list[str], dict[str, tuple[list[int], list[int]]]]:
    return table.keys, {name: (at.tolist(), size.tolist()) for name, (at, size) in sorted(table.members.items())}


def careful(data: bytes) -> tables.Table:
    return tables._grouped(tar.entries(data, "x.tar"), "x.tar")


# ------------------------------------------------------------------------------------------------ any bytes


def tried(read: Callable[[bytes], Any], data: bytes) -> tuple[Any, str]:
    """(what is read, "") or (None, why it is refused); any other exception is a failure."""
    try:
        return read(data), ""
    except DataError as error:
        return None, str(error)


@settings(max_examples=400, deadline=None)
@given(data=mutated(st.one_of(archives(), stranger(), stranger(), shards())))
def test_tarfile_agrees_or_it_is_refused(data: bytes) -> None:
    found, refused = tried(ours, data)
    event("refused" if refused else "read")
    assert refused.startswith("x.tar") if refused else found == (theirs(data) if data else [])


@settings(max_examples=400, deadline=None)
@given(data=mutated(shards()))
def test_the_fast_way_agrees_with_the_careful_one(data: bytes) -> None:
    fast = tables._regular(data)
    event("fast" if fast else "careful")
    if fast is not None:
        assert plain(fast) == plain(careful(data))


@settings(max_examples=400, deadline=None)
@given(data=mutated(st.one_of(shards(), archives())))
def test_a_run_is_how_the_careful_way_begins(data: bytes) -> None:
    files, size = tables.run(data, 512)
    expected = tar.entries(data, "x.tar", 512)
    ends = [512, *(entry.start + tar.padded(entry.size) for entry in files)]
    event("run" if files else "none")
    whole = files if size <= len(data) else files[:-1]  # the last one's data may not be there
    assert whole == list(islice(expected, len(whole)))
    assert ends[-1] == 512 + size


@settings(max_examples=300, deadline=None)
@given(data=mutated(st.one_of(archives(), shards())))
def test_any_bytes_are_a_table_or_an_error(data: bytes) -> None:
    found, refused = tried(lambda data: tables.table(data, "x.tar"), data)
    assert refused.startswith("x.tar" if refused else "")
    for index in range(len(found.keys) if found else 0):
        assert all(0 < at <= at + size <= len(data) for at, size in found.sample(index).values())


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=2048).map(lambda data: mended(data + bytes(-len(data) % 512), 0) if data else data))
def test_garbage_is_refused(data: bytes) -> None:
    found, refused = tried(ours, data)
    assert refused or found == (theirs(data) if data else [])


# ------------------------------------------------------------------------------------------------ the fast way


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1754000000.123, 1754000000])
def test_usual_shards_go_the_fast_way(kind: int, mtime: float) -> None:
    noise = np.random.default_rng(0)
    same = [
        (f"{key:06d}.{name}", noise.bytes(size)) for key in range(9) for name, size in (("a.npy", 900), ("json", 7))
    ]
    vary = [(f"{key:06d}.{name}", noise.bytes(300 * key)) for key in range(9) for name in ("jpg", "txt")]
    for members in (same, vary, same[:2], same[:1]):
        data = made(members, kind, mtime)
        fast = tables._regular(data)
        assert fast is not None
        assert plain(fast) == plain(careful(data))
        assert len(fast.keys) == -(-len(members) // 2)


def test_what_webdataset_writes_goes_the_fast_way_and_is_read_as_webdataset_reads_it(tmp_path: Any) -> None:
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            writer.write({"__key__": f"s{number:03d}", "jpg": b"\xff" * number * 100, "txt": f"a {number}"})
    data = path.read_bytes()
    data = data[: next(at for at in range(0, len(data), 512) if not any(data[at:]))]
    fast = tables._regular(data)
    assert fast is not None
    assert plain(fast) == plain(careful(data))
    for number, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
        assert fast.keys[number] == sample["__key__"]
        for name, (at, size) in fast.sample(number).items():
            assert data[at : at + size] == sample[name]


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, b"a\0.jpg"),  # tarfile's name ends at NUL
        (0, b"a\\.jpg"),
        (0, b"/.jpg"),
        (0, b"__m__.jpg"),
        (0, b"a.JPG"),
        (0, "a.É".encode()),
        (0, b"a.\xff"),
        (0, b"a\xff.jpg"),
        (0, b"b.jpg"),
        (0, b"c/.jpg"),
        (108, b"123 456"),  # uid: no number
        (136, b"zzz"),  # time
        (124, b"000000000010"),  # twelve digits
        (124, b"0o000000001"),
        (329, b"9"),
        (345, b"folder"),
        (156, b"\0"),
        (156, b"7"),
        (156, b"2"),
        (257, b"USTAR"),
    ],
)
def test_unusual_headers_go_the_careful_way(at: int, new: bytes) -> None:
    for start in (0, 2048):  # of the first sample and of another
        data = changed(made(TWO), start + at, new.ljust(12, b"\0") if at == 0 else new, start)
        fast = tables._regular(data)
        assert fast is None or (plain(fast) == plain(careful(data)) and new == b"b.jpg")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "odd", ["a\0", "a\\", "a/", "/a", "a//b", "__m__/a", "__m__", "", "a.b", "a/.b", "a\nb", "..", "z"]
)
def test_odd_names_go_the_careful_way(odd: str, first: bool) -> None:
    for suffixes in ((".jpg",), (".jpg", ".txt"), (".jpg", "\0.txt"), (".jpg", "\\.txt"), (".a/b", ".txt"), (".É",)):
        for key in (odd, "b"):
            keys = [key, "z", "y"] if first else ["x", "z", key]
            data = b"".join(raw(f"{key}{suffix}".encode(), b"7") for key in keys for suffix in suffixes)
            fast = tables._regular(data)
            assert fast is None or plain(fast) == plain(careful(data))
    data = b"".join(raw(f"{key}{suffix}".encode(), b"7") for key in "ab" for suffix in (".jpg", ".txt"))
    assert tables._regular(data) is not None


@pytest.mark.parametrize(
    ("record", "size"),
    [
        (b"11 mtime=1\n", 12),
        (b"11 mtime=1\n", 10),
        (b"12 mtime=1\n", 11),
        (b"10 mtime=1\n", 11),
        (b"13 path=a.js\n", 13),
    ],
)
def test_a_time_is_a_time(record: bytes, size: int) -> None:
    good, bad = (extended(b"x", *data) for data in ((b"11 mtime=1\n", 11), (record, size)))
    assert tables._regular(good + made(TWO[:1])) is not None
    assert tables._regular(bad + made(TWO[:1])) is None
    assert tables._regular(good + good + made(TWO[:1])) is None
    assert tables._regular(made(TWO) + good) is None
    found, refused = tried(lambda data: plain(tables.table(data, "x.tar")), bad + made(TWO[:1]))
    assert "pax header is damaged" in refused or found[0] == ["a"]


def test_a_size_that_is_too_big_ends_a_run() -> None:
    data = changed(made(TWO), 2048 + 124, b"%011o" % (tar.MAX_MEMBER + 1), 2048)
    assert [entry.name for entry in tables.run(data)[0]] == ["a.jpg", "a.txt"]


def test_a_wrong_checksum_is_seen_by_both_ways() -> None:
    data = made(TWO)
    assert tables._regular(data) is not None
    for at in (1, 150, 300, 510):
        broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert tables._regular(broken) is None
        with pytest.raises(DataError, match=r"x\.tar, byte 0: not a tar header"):
            tables.table(broken, "x.tar")


def test_sums_of_signed_bytes_go_the_careful_way() -> None:
    """tarfile takes them for a header, and so must each header be: not only be like the first."""

    def summed(head: bytes, by: int) -> bytes:
        return head[:148] + b"%06o\0 " % (int(head[148:154], 8) + by) + head[156:]

    first, second = tar.header("é.txt", 3), tar.header("ab0.txt", 3)
    data = summed(first, -512) + b"abc" + bytes(509) + summed(second, -512) + b"abc" + bytes(509)
    assert tables._regular(data) is None
    with pytest.raises(DataError, match="not a tar header"):
        tables.table(data, "x.tar")


# ------------------------------------------------------------------------------------------------ hostile archives


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_one_sentence(name: str) -> None:
    make, said = HOSTILE[name]
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        with pytest.raises(DataError, match=said) as error:
            tables.table(data, "x.tar")
        assert str(error.value).startswith("x.tar")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 6000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_every_cut_is_seen() -> None:
    for kind in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = made([("a.txt", b"1" * 700), ("n" * 150 + ".txt", b"2" * 3)] if kind else TWO, kind, 1.5)
        whole, ends = ours(data), set()
        for entry in tar.entries(data, "x.tar"):
            ends.add(entry.start + tar.padded(entry.size))
        for length in range(1, len(data)):
            if length in ends:
                assert ours(data[:length]) == whole[: sorted(ends).index(length) + 1]
                continue
            with pytest.raises(DataError, match=r"x\.tar"):
                ours(data[:length])


def test_folders_and_times_and_long_names_are_passed_through() -> None:
    long = "folder/" * 30 + "a.b.txt"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = made([("folder/", b""), (long, b"1"), ("ü" * 80 + ".txt", b"22")], kind, 1.5)
        assert ours(data) == theirs(data)
        assert tables.table(data, "x.tar").keys == [long.removesuffix(".b.txt"), "ü" * 80]
        assert next(tar.entries(data, "x.tar")).header == tar.padded(1) * (3 if kind == tarfile.PAX_FORMAT else 1)
    data = extended(b"g", b"18 comment=a word\n") + made(TWO)
    assert ours(data) == theirs(data)


@pytest.mark.parametrize(
    ("name", "key", "member"),
    [
        ("a.jpg", "a", "jpg"),
        ("a.b.JPG", "a", "b.jpg"),
        ("x.y/a.b.c", "x.y/a", "b.c"),
        ("./a.jpg", "a", "jpg"),
        ("a\nb.txt", "a\nb", "txt"),
        ("._a.jpg", "", ""),
        ("d/._a.jpg", "", ""),
        (".hidden", "", ""),
        ("a", "", ""),
        ("a.", "", ""),
        ("__meta__/a.json", "", ""),
        ("__meta__.json", "", ""),
        ("__a.json", "__a", "json"),
    ],
)
def test_names_split_as_webdataset_splits_them(name: str, key: str, member: str) -> None:
    assert tar.split_name(name, "x.tar") == (key, member)
    if key and "\n" not in name and not name.startswith("./"):
        theirs = webdataset.tariterators.base_plus_ext(name)
        assert (theirs[0], theirs[1].lower()) == (key, member)
