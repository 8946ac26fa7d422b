"""Tar headers, both ways, and where the members of a run of bytes lie.  Hostile input is refused, never followed.

What is read is what Python's `tarfile` reads, or a `DataError`: a tar library stops at damage without a word.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import adler32

import numpy as np

from calotype.data.draws import Ints
from calotype.errors import DataError

BLOCK = 512  # bytes
END = bytes(2 * BLOCK)
MAX_MEMBER = 2**31  # bytes of one member
MAX_MEMBERS = 64  # of one sample
MAX_KINDS = 256  # of members that samples of one chunk or shard have: memory grows with kinds times samples
MAX_NAME = 4096  # bytes of a name
MAX_HEADER = 2**16  # bytes of a pax header; macOS puts extended attributes there
MAX_HEADERS = 4  # extended headers before one file
_ZERO = bytes(BLOCK)
_FILE, _FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL, _SPARSE = b"0\0", b"5", b"L", b"xX", b"g", b"S"
_META = re.compile(r"__[^/]*__(?:$|[/.])")  # what WebDataset keeps for itself
# The header that all writers write: no prefix, no base-256 numbers.
_USUAL = re.compile(
    rb"(.{100})(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}([0Lxg]).{100}"
    rb"ustar.{67}(?:[0-7]{7}[\0 ]|\0{8}){2}\0.{166}",
    re.DOTALL,
)
_RECORD = re.compile(rb"([1-9]\d{0,7}) ([^=\n]+)=")  # of a pax header: bytes of the whole record, keyword
_TIME = re.compile(rb"(\d\d) mtime=[\d.]+\n(?=\0*\Z)")  # the pax header that webdataset's writer gives every member

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


class Entry(NamedTuple):
    """One entry of a tar: its data is [start, start + size); `header` is where its headers begin."""

    name: str
    start: int
    size: int
    header: int
    regular: bool = True  # else a folder


class Cut(DataError):
    """The data ends inside an entry's headers."""


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


def run(data: Bytes, base: int = 0) -> tuple[list[Entry], int]:
    """What is quickly read of the files that come first, and where the next header begins: (none, 0) is no error.

    Args:
        base: what is added to every offset of an entry.
    """
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    found = _chained(blocks, _marked(blocks))
    if found is None:
        return [], 0
    names = [name.partition(b"\0")[0].decode("utf-8", "surrogateescape") for name in _names(found)]
    starts, began = (found.marked + 1) * BLOCK + base, found.began * BLOCK + base
    return list(map(Entry, names, starts.tolist(), found.sizes.tolist(), began.tolist())), found.end * BLOCK


# ------------------------------------------------------------------------------------------------ the fast way


def _regular(data: Bytes) -> Table | None:
    """As `table`, in whole-array steps, where all samples have the members of the first and usual headers; else None.

    A pax header before a file may hold its time and nothing else.
    """
    if not len(data) or len(data) % BLOCK:
        return None
    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCK)
    found = _chained(blocks, _strided(blocks))
    if found is None or found.end != len(blocks):
        found = _chained(blocks, _marked(blocks))
    if found is None or found.end != len(blocks):
        return None
    names, starts, sizes = _names(found), (found.marked + 1) * BLOCK, found.sizes
    key, dot, _ = names[0].partition(b".")
    width = next((i for i, name in enumerate(names) if not name.startswith(key + dot)), len(names))
    suffixes = [name[len(key) :] for name in names[:width]]
    keys = [name[: -len(suffixes[0])] for name in names[::width]]
    lines, ends = b"\n".join([b"", *keys, b""]), b"".join(suffixes)
    odd = any(mark in lines for mark in (b".", b"//", b"\n/", b"/\n", b"\n\n", b"\n__", b"\\", b"\0"))
    odd = odd or lines.count(b"\n") > len(keys) + 1 or any(mark in ends for mark in (b"/", b"\\", b"\0"))
    if odd or not dot or len(names) % width or width > MAX_MEMBERS or len(set(suffixes)) < width:
        return None
    if any(names[i::width] != [one + suffix for one in keys] for i, suffix in enumerate(suffixes)):
        return None
    if any(one == other for one, other in pairwise(keys)):
        return None
    try:
        texts = [one.decode() for one in keys]
        members = {s[1:].decode(): (starts[i::width], sizes[i::width]) for i, s in enumerate(suffixes)}
    except UnicodeDecodeError:
        return None
    return Table(texts, members) if all(name and name == name.lower() for name in members) else None


def _names(chain: _Chain) -> list[bytes]:
    return np.ascontiguousarray(chain.heads[:, :100]).view("S100")[:, 0].tolist()


def _strided(blocks: Array) -> Ints:
    """Where headers would be if all samples were as long as the first: most are, and no other block is looked at."""
    heads, at, key = [0], 0, b""
    while at < len(blocks):
        head = blocks[at].tobytes()
        here = key if head[156:157] == b"x" else head[:100].partition(b".")[0]
        if head[257:262] != b"ustar" or (key and here != key) or len(heads) > 2 * MAX_MEMBERS:
            break
        key = here
        with suppress(ValueError):
            at += 1 + padded(int(head[124:135], 8)) // BLOCK
            heads.append(at)
            continue
        break
    if len(heads) > 2 and at < len(blocks) and blocks[heads[-2], 156] == ord("x"):
        heads.pop()  # the extended header belongs to the next sample
    within, stride = np.array(heads[:-1] or [0]), max(heads[-1], 1)
    return (np.arange(0, len(blocks), stride)[:, None] + within).reshape(-1)


def _marked(blocks: Array) -> Ints:
    """Blocks that look like headers."""
    found = np.flatnonzero(blocks[:, 257] == ord("u"))
    return found[(blocks[found, 257:262] == _USTAR).all(1)]


class _Chain(NamedTuple):
    """Files with usual headers, one after the other."""

    marked: Ints  # blocks of their headers
    heads: Array  # (files, 512)
    sizes: Ints
    began: Ints  # blocks of their first headers, extended ones included
    end: int  # block behind the last one's data


def _chained(blocks: Array, marked: Ints) -> _Chain | None:
    """The longest run of files from the first block on, if `marked` names all headers of it in order."""
    if not len(marked) or marked[0] != 0 or marked[-1] >= len(blocks):
        return None
    heads = blocks[marked]
    numbers, devices = heads[:, 100:156], heads[:, 329:345]
    octal = (numbers & 7).astype(np.float64)  # exact, and faster than integers
    sizes = (octal[:, 24:35] @ _OCTAL).astype(np.int64)
    following = marked + 1 + (sizes + BLOCK - 1) // BLOCK
    good = (numbers & _MASK == _WANT).all(1) & (devices == devices[0]).all(1) & (sizes <= MAX_MEMBER)
    good &= (heads[:, 257:262] == _USTAR).all(1) & (heads[:, 345] == 0) & (devices[0].tobytes() in _DEVICES)
    good &= _checksums(heads) == octal[:, 48:54] @ _OCTAL[-6:]
    files, extended = heads[:, 156] == ord("0"), heads[:, 156] == ord("x")
    good &= files | extended
    good[1:] &= following[:-1] == marked[1:]
    good[:-1] &= files[:-1] | files[1:]  # one extended header, and then its file
    count = len(good) if good.all() else int(good.argmin())
    for index in np.flatnonzero(extended[:count]).tolist():
        at, size = marked[index] + 1, int(sizes[index])
        time = _TIME.match(blocks[at].tobytes()) if at < len(blocks) else None
        if time is None or not int(time[1]) == size == len(time[0]):
            count = index
            break
    count -= int(count > 0 and extended[count - 1])
    if not count:
        return None
    files = files[:count]
    began = marked[:count] - np.concatenate([[False], extended[: count - 1]]) * 2  # a time's header takes two blocks
    mine = marked[:count][files]
    return _Chain(mine, heads[:count][files], sizes[:count][files], began[files], int(following[count - 1]))


_USTAR = np.frombuffer(b"ustar", np.uint8)
_OCTAL = 8.0 ** np.arange(10, -1, -1)
# Bytes 100 to 156, six numbers: octal digits are 0x30 to 0x37; what ends a number is NUL or a blank.
_DIGIT = np.array([size - 1 > at for size in (8, 8, 8, 12, 12) for at in range(size)] + [True] * 6 + [False] * 2)
_MASK, _WANT = np.where(_DIGIT, 0xF8, 0xDF).astype(np.uint8), np.where(_DIGIT, 0x30, 0).astype(np.uint8)
_DEVICES = (bytes(16), b"0000000\0" * 2, b"0000000 " * 2, b"000000 \0" * 2)  # major and minor number
_BYTES = np.uint64(0x00FF00FF00FF00FF)


def _checksums(heads: Array) -> Ints:
    """Sums of the bytes of headers (n, 512), their checksum's own field counted as blanks."""
    words = heads.view(np.uint64)
    lanes = ((words & _BYTES) + (words >> np.uint64(8) & _BYTES)).sum(1).view(np.uint16).reshape(-1, 4)
    return lanes.sum(1, dtype=np.int64) - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")


# ------------------------------------------------------------------------------------------------ the careful way


def entries(data: Bytes, where: str, base: int = 0) -> Iterator[Entry]:
    """Regular files, one after the other, until the data or the archive ends.

    Args:
        base: what is added to every offset.
    """
    view, position = memoryview(data), 0
    while position < len(view):
        found = following(view, position, where, base)
        if found is None:
            return
        entry, position = found
        if position > len(view):
            raise DataError(f"{where} is cut: {entry.name!r} at byte {entry.start} should have {entry.size} bytes")
        if entry.regular:
            yield entry


def following(view: memoryview, position: int, where: str, base: int = 0) -> tuple[Entry, int] | None:
    """The entry whose headers begin at `position`, and where the next ones begin (in the view); None at the end.

    Raises:
        Cut: its headers go on behind the view.
        DataError: they are damaged, or it is neither a regular file nor a folder; names the byte.
    """
    name, began = None, position
    for _ in range(MAX_HEADERS + 1):
        place = f"{where}, byte {base + position}"
        head = bytes(view[position : position + BLOCK])
        if len(head) < BLOCK:
            raise Cut(f"{place}: cut: a header should be there")
        if head == _ZERO:
            if position > began:
                raise DataError(f"{place}: the archive ends where a file should follow its extended header")
            return None
        own, size, kind = parse(head, place)
        start = position + BLOCK
        if kind in _FILE:
            return Entry(own if name is None else name, base + start, size, base + began), start + padded(size)
        if kind in _FOLDER:  # tarfile, too, takes their size for a hint and not for data
            return Entry(own, base + start, 0, base + began, False), start
        if kind not in _LONG_NAME and kind not in _PAX and kind not in _PAX_GLOBAL:
            what = "sparse" if kind == _SPARSE else f"a link or a device (type {kind!r})"
            raise DataError(f"{place}: {own!r} is {what}: only regular files are read")
        if size > MAX_HEADER:
            raise DataError(f"{place}: an extended header of {size} bytes is longer than {MAX_HEADER}")
        position = start + padded(size)
        if position > len(view):
            raise Cut(f"{place}: cut: an extended header should have {size} bytes")
        said = _said(bytes(view[start:position]), size, kind, place)
        name = said if name is None else name  # the outermost counts
    raise DataError(f"{where}, byte {base + began}: more than {MAX_HEADERS} extended headers before one file")


def parse(head: bytes, where: str) -> tuple[str, int, bytes]:
    """(name, size, type) of one header block.

    Raises:
        DataError: it is none, by its checksum, or its member is bigger than MAX_MEMBER.
    """
    if usual := _USUAL.fullmatch(head):
        total = (adler32(head[:256]) & 0xFFFF) + (adler32(head[256:]) & 0xFFFF) - 2  # of so few bytes a plain sum
        size = int(usual[2], 8)
        if total - sum(head[148:156]) + 8 * ord(" ") == int(usual[3], 8) and size <= MAX_MEMBER:
            return usual[1].partition(b"\0")[0].decode("utf-8", "surrogateescape"), size, usual[4]
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"{where}: not a tar header ({error})") from error
    if not 0 <= info.size <= MAX_MEMBER:
        raise DataError(f"{where}: {info.name!r} has {info.size} bytes: at most {MAX_MEMBER} can be read")
    return info.name, info.size, info.type


def _said(data: bytes, size: int, kind: bytes, where: str) -> str | None:
    """The name that an extended header gives to its file; `data` with its padding."""
    if kind in _LONG_NAME:
        name: bytes | None = data.partition(b"\0")[0]
    else:
        found = _records(data, size, where)
        if b"size" in found or b"hdrcharset" in found or any(keyword.startswith(b"GNU.sparse") for keyword in found):
            raise DataError(f"{where}: sparse files, and sizes in pax headers, are not read: write plain tars")
        if kind in _PAX_GLOBAL and b"path" in found:
            raise DataError(f"{where}: a global pax header names all files {found[b'path']!r}: write plain tars")
        name = found.get(b"path")
        name = name.rstrip(b"/") if name is not None else None
    if name is not None and len(name) > MAX_NAME:
        raise DataError(f"{where}: a name of {len(name)} bytes is longer than {MAX_NAME}")
    return None if name is None else name.decode("utf-8", "surrogateescape")


def _records(data: bytes, size: int, where: str) -> dict[bytes, bytes]:
    """keyword -> value of a pax header.  Stricter than tarfile, which skips what it does not understand."""
    found, at = {}, 0
    while at < size:
        record = _RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if record is None or not record.end() < end <= size or data[end - 1] != ord("\n"):
            raise DataError(f"{where}: a pax header is damaged at its byte {at}")
        found[record[2]] = data[record.end() : end - 1]
        at = end
    if data.count(0, size) < len(data) - size:
        raise DataError(f"{where}: a pax header is damaged: it goes on behind its {size} bytes")
    return found


def _grouped(files: Iterator[Entry], where: str) -> Table:
    keys: list[str] = []
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}  # member -> samples, offsets, sizes
    members = 0
    for file in files:
        key, member = split_name(file.name, f"{where}, byte {file.header}")
        if not member:
            continue
        if not keys or keys[-1] != key:
            keys.append(key)
            members = 0
        members += 1
        column = found.get(member)
        if column is None:
            column = found[member] = ([], [], [])
        if (column[0] and column[0][-1] == len(keys) - 1) or members > MAX_MEMBERS or len(found) > MAX_KINDS:
            what = f"sample {key!r} has {member!r} twice, or more than {MAX_MEMBERS} members"
            raise DataError(f"{where}, byte {file.header}: {what}, or samples have more than {MAX_KINDS} kinds of them")
        for part, value in zip(column, (len(keys) - 1, file.start, file.size)):
            part.append(value)
    made: dict[str, tuple[Ints, Ints]] = {}
    for name in sorted(found):
        rows, offsets, sizes = found[name]
        made[name] = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        made[name][0][rows], made[name][1][rows] = offsets, sizes
    return Table(keys, made)


def split_name(name: str, where: str) -> tuple[str, str]:
    """(key, member) as WebDataset splits them: the key ends at the first dot of the file's own name.

    Both are "" for a file that is part of no sample: it is hidden, has no suffix, or is WebDataset's own.

    Raises:
        DataError: the name climbs out, is absolute, or is not UTF-8.
    """
    name = name.removeprefix("./")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the name {name!r} is not UTF-8") from error
    if name.startswith("/") or (".." in name and ".." in name.split("/")) or "\\" in name or "\0" in name:
        raise DataError(f"{where}: the name {name!r} is absolute or climbs out of its folder")
    stem, _, member = name.rpartition("/")[2].partition(".")
    if not stem or not member or (name.startswith("__") and _META.match(name)):
        return "", ""
    return name[: -len(member) - 1], member.lower()
