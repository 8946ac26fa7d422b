"""Tar headers, both ways, and where the members of a run of bytes lie.  Hostile input is refused, never followed."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from calotype.data.draws import Ints
from calotype.errors import DataError

BLOCK = 512  # bytes
END = bytes(2 * BLOCK)
MAX_MEMBER = 2**31  # bytes of one member
MAX_MEMBERS = 64  # of one sample
MAX_NAME = 4096  # bytes of a long name, or of a pax header's record
_FILE, _FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL = b"0\0", b"5", b"L", b"xX", b"g"
# As WebDataset reads names: the key ends at the first dot of the file's own name.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)

Bytes = memoryview | bytes | bytearray
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """Where samples lie: for every member name its byte offset in the data, and its size; -1 in samples without it."""

    keys: list[str]
    members: dict[str, tuple[Ints, Ints]]  # name -> offsets (samples,), sizes (samples,)

    def sample(self, index: int) -> dict[str, tuple[int, int]]:
        """Member -> (offset, size) of one sample."""
        here = {name: (int(at[index]), int(size[index])) for name, (at, size) in self.members.items()}
        return {name: span for name, span in here.items() if span[0] >= 0}


@dataclass(frozen=True)
class Entry:
    """One regular file of a tar: its data is [start, start + size); `header` is where its headers begin."""

    name: str
    start: int
    size: int
    header: int


def header(name: str, size: int) -> bytes:
    """A ustar header without time, owner or anything else that two writers could differ in.

    Raises:
        DataError: the name does not fit.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except (ValueError, UnicodeError) as error:
        raise DataError(f"{name!r} does not fit into a tar header ({error}): shorten the key") from error


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take."""
    return -(-size // BLOCK) * BLOCK


def table(data: Bytes, where: str) -> Table:
    """The samples of whole entries: consecutive files whose names share a key.

    Raises:
        DataError: links, devices, names that climb, cut or damaged headers, a member twice or too big; names `where`.
    """
    return _regular(data) or _grouped(entries(data, where), where)


# ------------------------------------------------------------------------------------------------ the fast way


def _regular(data: Bytes) -> Table | None:
    """As `table`, in whole-array steps, for plain ustar whose samples all have the members of the first; else None."""
    if not len(data) or len(data) % BLOCK:
        return None
    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCK)
    found = _chained(blocks, _strided(blocks)) or _chained(blocks, np.flatnonzero(blocks[:, 257] == ord("u")))
    if found is None:
        return None
    marked, heads, sizes = found
    names = np.ascontiguousarray(heads[:, :100]).view("S100")[:, 0].tolist()
    key, dot, _ = names[0].partition(b".")
    width = next((i for i, name in enumerate(names) if not name.startswith(key + dot)), len(names))
    suffixes = [name[len(key) :] for name in names[:width]]
    keys = [name[: -len(suffixes[0])] for name in names[::width]]
    lines = b"\n".join([b"", *keys, b""])
    odd = any(mark in lines for mark in (b".", b"//", b"\n/", b"\n\n")) or lines.count(b"\n") > len(keys) + 1
    if odd or not dot or len(names) % width or width > MAX_MEMBERS or len(set(suffixes)) < width:
        return None
    if any(names[i::width] != [one + suffix for one in keys] for i, suffix in enumerate(suffixes)):
        return None
    if any(one == other for one, other in pairwise(keys)) or any(s.lower() != s or b"/" in s for s in suffixes):
        return None
    starts = (marked + 1) * BLOCK
    try:
        texts = [one.decode() for one in keys]
        members = {s[1:].decode(): (starts[i::width], sizes[i::width]) for i, s in enumerate(suffixes)}
    except UnicodeDecodeError:
        return None
    return Table(texts, members) if all(members) else None


def _strided(blocks: Array) -> Ints:
    """Where headers would be if all samples were as long as the first: most are, and no other block is looked at."""
    heads, at, key = [0], 0, b""
    while at < len(blocks):
        head = blocks[at].tobytes()
        here = head[:100].partition(b".")[0]
        if head[257:262] != b"ustar" or (at and here != key) or len(heads) > MAX_MEMBERS:
            break
        key = here
        with suppress(ValueError):
            at += 1 + padded(int(head[124:135], 8)) // BLOCK
            heads.append(at)
            continue
        break
    within, stride = np.array(heads[:-1] or [0]), max(heads[-1], 1)
    return (np.arange(0, len(blocks), stride)[:, None] + within).reshape(-1)


def _chained(blocks: Array, marked: Ints) -> tuple[Ints, Array, Ints] | None:
    """(blocks, headers, sizes) if these are the headers of plain regular files, one after the other, without a gap."""
    if not len(marked) or marked[-1] >= len(blocks):
        return None
    heads = blocks[marked]
    digits = heads[:, 124:135].astype(np.int64) - ord("0")
    sizes = digits @ 8 ** np.arange(10, -1, -1)
    following = marked + 1 + -(-sizes // BLOCK)
    chained = marked[0] == 0 and following[-1] == len(blocks) and (following[:-1] == marked[1:]).all()
    ustar = (heads[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all()
    plain = ((heads[:, 156] == ord("0")) & (heads[:, 345] == 0)).all() and ((digits >= 0) & (digits < 8)).all()
    return (marked, heads, sizes) if chained and ustar and plain else None


# ------------------------------------------------------------------------------------------------ the careful way


def entries(data: Bytes, where: str, base: int = 0) -> Iterator[Entry]:
    """Regular files, one after the other, until the data or the archive ends; folders and global headers are skipped.

    Args:
        base: what is added to every offset.
    """
    view, position, long_name, began = memoryview(data), 0, "", 0
    while position < len(view):
        head = bytes(view[position : position + BLOCK])
        if head == bytes(BLOCK):
            return
        name, size, kind = parse(head, f"{where}, byte {base + position}")
        start, position = position + BLOCK, position + BLOCK + padded(size)
        if position > len(view):
            raise DataError(f"{where} is cut: {name!r} at byte {base + start} should have {size} bytes")
        if kind in _LONG_NAME or kind in _PAX:
            long_name = _long_name(bytes(view[start : start + size]), kind, where)
            continue
        if kind in _FILE:
            yield Entry(long_name or name, base + start, size, base + began)
        elif kind not in _FOLDER and kind not in _PAX_GLOBAL:
            raise DataError(f"{where}: {name!r} is a link or a device (type {kind!r}): only regular files are read")
        long_name, began = "", position


def parse(head: bytes, where: str) -> tuple[str, int, bytes]:
    """(name, size, type) of one header block.

    Raises:
        DataError: it is none, by its checksum, or its member is bigger than MAX_MEMBER.
    """
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{where}: not a tar header ({error})") from error
    if info.sparse is not None or not 0 <= info.size <= MAX_MEMBER:
        raise DataError(f"{where}: {info.name!r} has {info.size} bytes: at most {MAX_MEMBER}, and not sparse")
    return info.name, info.size, info.type


def _long_name(data: bytes, kind: bytes, where: str) -> str:
    if len(data) > MAX_NAME:
        raise DataError(f"{where}: a name of {len(data)} bytes is longer than {MAX_NAME}")
    if kind in _LONG_NAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    records = [record.partition(b" ")[2].partition(b"=") for record in data.split(b"\n")]
    found = {key: value for key, _, value in records}
    if b"size" in found or any(key.startswith(b"GNU.sparse") for key in found):
        raise DataError(f"{where}: sparse files and sizes in extended headers are not read: write plain tars")
    return found.get(b"path", b"").decode("utf-8", "surrogateescape")


def _grouped(files: Iterator[Entry], where: str) -> Table:
    samples: list[tuple[str, dict[str, Entry]]] = []
    for file in files:
        key, member = split_name(file.name, where)
        if not member:
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if member in samples[-1][1] or len(samples[-1][1]) == MAX_MEMBERS:
            raise DataError(f"{where}: sample {key!r} has {member!r} twice, or more than {MAX_MEMBERS} members")
        samples[-1][1][member] = file
    names = sorted({name for _, members in samples for name in members})
    made: dict[str, tuple[Any, Any]] = {}
    for name in names:
        found = [members.get(name) for _, members in samples]
        offsets = np.array([-1 if file is None else file.start for file in found], np.int64)
        made[name] = offsets, np.array([-1 if file is None else file.size for file in found], np.int64)
    return Table([key for key, _ in samples], made)


def split_name(name: str, where: str) -> tuple[str, str]:
    """(key, member) as WebDataset splits them; member "" for a file that is part of no sample.

    Raises:
        DataError: the name climbs out, is absolute, or is not UTF-8.
    """
    name = name.removeprefix("./")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the name {name!r} is not UTF-8") from error
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise DataError(f"{where}: the name {name!r} is absolute or climbs out of its folder")
    found = _NAME.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")
