"""Tar headers, both ways.  Hostile input is refused, never followed.

What is read is what Python's `tarfile` reads, or a `DataError`: a tar library stops at damage without a word.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple
from zlib import adler32

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
USUAL = re.compile(
    rb"(.{100})(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}([0Lxg]).{100}"
    rb"ustar.{67}(?:[0-7]{7}[\0 ]|\0{8}){2}\0.{166}",
    re.DOTALL,
)
_RECORD = re.compile(rb"([1-9]\d{0,7}) ([^=\n]+)=")  # of a pax header: bytes of the whole record, keyword

Bytes = memoryview | bytes | bytearray


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
    if usual := USUAL.fullmatch(head):
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
