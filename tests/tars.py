"""Tars as tests want them: by any writer, hostile, and mutated."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

from calotype.data import tar
from hypothesis import assume
from hypothesis import strategies as st

Member = tuple[str, bytes]


def made(members: list[Member], kind: int = tarfile.USTAR_FORMAT, mtime: float = 0, **fields: Any) -> bytes:
    """Whole entries of plain files, folders where a name ends in a slash, without the closing blocks."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as out:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/") if name.endswith("/") else name)
            info.size, info.mtime, info.type = len(data), mtime, tarfile.DIRTYPE if name.endswith("/") else b"0"  # type: ignore[assignment]
            for field, value in fields.items():
                setattr(info, field, value)
            out.addfile(info, io.BytesIO(data))
        return file.getvalue()[: out.offset]


def mended(data: bytes, at: int) -> bytes:
    """The header at byte `at` with the checksum that it should have."""
    head = bytearray(data[at : at + 512])
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:at] + bytes(head) + data[at + 512 :]


def changed(data: bytes, at: int, new: bytes, header: int = 0) -> bytes:
    return mended(data[:at] + new + data[at + len(new) :], header)


def extended(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    """An extended header before the next file."""
    info = tarfile.TarInfo("././@Header")
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def raw(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    """One entry, whatever its name."""
    return changed(extended(kind, data), 0, name.ljust(100, b"\0"))


TWO = [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3"), ("b.txt", b"4")]


# ------------------------------------------------------------------------------------------------ hostile


def link(kind: bytes) -> bytes:
    return made([("a.txt", b"")], type=kind, linkname="/etc/passwd")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "symbolic link": (lambda: link(b"2"), r"byte 0: 'a\.txt' is a link or a device"),
    "hard link": (lambda: link(b"1"), "is a link or a device"),
    "character device": (lambda: link(b"3"), "is a link or a device"),
    "block device": (lambda: link(b"4"), "is a link or a device"),
    "pipe": (lambda: link(b"6"), "is a link or a device"),
    "long link": (lambda: extended(b"K", b"x\0") + link(b"2"), "is a link or a device"),
    "unknown type": (lambda: link(b"Q"), "is a link or a device"),
    "old sparse": (lambda: link(b"S"), "is sparse"),
    "climbing": (
        lambda: made([("a/../../b.txt", b"")]),
        r"byte 0: the name 'a/\.\./\.\./b\.txt' is absolute or climbs",
    ),
    "absolute": (lambda: made([("/etc/a.txt", b"")]), "absolute or climbs"),
    "backslash": (lambda: made([("a\\..\\b.txt", b"")]), "absolute or climbs"),
    "climbing in pax": (
        lambda: extended(b"x", b"19 path=../b.txt\n\n"[:17].replace(b"19", b"17")) + made(TWO),
        "climbs",
    ),
    "climbing in a long name": (lambda: extended(b"L", b"../b.txt\0") + made(TWO), "climbs"),
    "not UTF-8": (lambda: changed(made(TWO), 0, b"\xff"), "not UTF-8"),
    "too big": (lambda: changed(made(TWO), 124, b"77777777777"), r"has 8589934591 bytes: at most 2147483648"),
    "too big in base 256": (lambda: changed(made(TWO), 124, b"\x80" + bytes(3) + b"\x01" + bytes(7)), "at most"),
    "negative": (lambda: changed(made(TWO), 124, b"\xff" * 12), "at most"),
    "size in pax": (lambda: extended(b"x", b"10 size=1\n") + made(TWO), "sizes in pax headers"),
    "sparse in pax": (lambda: extended(b"x", b"22 GNU.sparse.major=1\n") + made(TWO), "sparse files"),
    "path for all": (lambda: extended(b"g", b"14 path=b.txt\n") + made(TWO), "names all files"),
    "pax of another charset": (lambda: extended(b"x", b"21 hdrcharset=BINARY\n") + made(TWO), "write plain tars"),
    "huge pax": (lambda: extended(b"x", b"", 2**30) + made(TWO), "extended header of 1073741824 bytes is longer"),
    "huge pax record": (lambda: extended(b"x", b"99999999 path=x\n") + made(TWO), "damaged at its byte 0"),
    "pax record of no length": (lambda: extended(b"x", b"0 path=x\n") + made(TWO), "damaged at its byte 0"),
    "pax without an end": (lambda: extended(b"x", b"12 path=abcde") + made(TWO), "damaged at its byte 0"),
    "pax that goes on": (lambda: extended(b"x", b"11 mtime=1\n14 path=b.txt\n", 11) + made(TWO), "goes on behind"),
    "many extended headers": (lambda: extended(b"L", b"a.txt\0") * 5000 + made(TWO), "more than 4 extended headers"),
    "long name of a folder": (lambda: extended(b"L", b"n" * 5000 + b".txt\0") + made(TWO), "longer than 4096"),
    "a name for nothing": (lambda: extended(b"L", b"a.txt\0") + tar.END, "archive ends where a file should follow"),
    "many members": (lambda: made([(f"a.{n}", b"") for n in range(65)]), "byte 32768: sample 'a' has .* more than 64"),
    "many kinds": (lambda: made([(f"{n}.{n}", b"") for n in range(300)]), "more than 256 kinds"),
    "twice": (lambda: made([("a.txt", b""), ("a.txt", b"")]), r"byte 512: sample 'a' has 'txt' twice"),
    "twice by case": (lambda: made([("a.txt", b""), ("a.TXT", b"")]), "twice"),
    "garbage": (lambda: b"\xa5" * 4096, "byte 0: not a tar header"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(600), "byte 0: not a tar header"),
    "garbage behind a file": (lambda: made(TWO)[:1024] + b"\xa5" * 1024, "byte 1024: not a tar header"),
    "zeros and garbage": (lambda: extended(b"L", bytes(512)) + b"\0" * 511 + b"\1", "not a tar header"),
}


# ------------------------------------------------------------------------------------------------ any

NAMES = st.one_of(
    st.sampled_from(["a.txt", "b.jpg", "a b/c.x.npy", "./d.txt", "dir/", "._a.jpg", "__meta__/x.json", "é.TXT", "a"]),
    st.text("ab./_\n", min_size=1, max_size=8),
    st.integers(95, 300).map(lambda n: "n" * n + ".txt"),
    st.integers(60, 150).map(lambda n: "d" * n + "/" + "n" * 60 + ".txt"),
)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    members = draw(st.lists(st.tuples(NAMES, st.integers(0, 1100)), min_size=1, max_size=5))
    files = [(name, b"\x07" * (0 if name.endswith("/") else size)) for name, size in members]
    try:
        return made(files, draw(FORMATS), draw(st.sampled_from([0, 1.5])))
    except ValueError:  # a name that ustar cannot hold
        assume(False)
        raise


@st.composite
def stranger(draw: st.DrawFn) -> bytes:
    """Entries that no writer makes in this order: names of any bytes, several extended headers, folders with a size."""
    names = st.sampled_from([b"a.txt", b"a.jpg", b"b.txt", b"c/", b"a\0b.txt", b"\xff.txt", b"a/.x", b"", b"d.txt/"])
    records = [b"14 path=p.txt\n", b"15 path=p.txt/\n", b"11 mtime=1\n", b"8 path=\n", b"13 path=a\nb.x\n", b""]
    data = b""
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from([b"0", b"0", b"0", b"\0", b"5", b"L", b"x", b"g"]))
        content = draw(names) + b"\0" if kind == b"L" else draw(st.sampled_from(records)) if kind in b"xg" else b"\7"
        data += raw(draw(names), content, kind)
        if kind == b"5" and draw(st.booleans()):  # its size is a hint, and no data follows
            data = data[:-512]
    return data


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """Samples that all have the same members, as the fast way wants them."""
    keys, members = ["a", "b", "c/d", "e", "f g", "ü"], ["jpg", "txt", "a.npy"]
    odd = draw(st.sampled_from(["", "", "", "keys", "members", "twice"]))
    if odd == "keys":
        keys = [*keys[:2], "a\0", "a\\b", "/a", "a/", "a//b", "__m__/a", "__m__", "a\nb", "", "a.b"]
    if odd == "members":
        members = [*members[:1], "TXT", "É", "a\\b", "a\0b", "a/b", ""]
    members = draw(st.lists(st.sampled_from(members), min_size=1, max_size=3, unique=True))
    keys = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5, unique=True))
    keys = keys[:1] + keys if odd == "twice" else keys
    size, kind = draw(st.one_of(st.none(), st.integers(0, 700))), draw(FORMATS)
    data, time = b"", draw(st.sampled_from([0, 1.5, 1e9 + 0.25]))
    for key in keys:
        for member in members:
            name, own = f"{key}.{member}".encode(), draw(st.integers(0, 700)) if size is None else size
            one = made([("x", b"\7" * own)], kind, time)
            at = len(one) - tar.padded(own) - 512
            data += changed(one, at, name.ljust(100, b"\0"), at)
    return data


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes set, blocks dropped, doubled or zeroed, tails cut; the checksums of headers mended, often."""
    data = draw(whole)
    interesting = st.sampled_from(b"\0 /.\\0127xLgKS5\xff\x80=\n_")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 4]))):
        block = draw(st.integers(0, max(len(data) // 512 - 1, 0))) * 512
        change = draw(st.sampled_from(["byte", "byte", "byte", "drop", "double", "zero", "cut"]))
        if change == "byte" and data:
            field = st.sampled_from(
                [0, 1, 2, 3, 99, 100, 107, 110, 124, 131, 134, 135, 136, 147, 153, 156, 257, 329, 345]
            )
            at = block + draw(st.one_of(field, st.integers(0, 511)))
            if at < len(data):
                data = data[:at] + bytes([draw(st.one_of(interesting, st.integers(0, 255)))]) + data[at + 1 :]
            if draw(st.integers(0, 3)) and len(data) >= block + 512:
                data = mended(data, block)
        elif change == "cut":
            data = data[: draw(st.integers(0, len(data)))]
        else:
            piece = {"drop": b"", "double": data[block : block + 512] * 2, "zero": bytes(512)}
            data = data[:block] + piece.get(change, b"") + data[block + 512 :]
    return data
