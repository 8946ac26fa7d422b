"""Where the samples of a run of tar bytes lie: in whole-array steps where its headers are usual, else one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from calotype.data.draws import Ints
from calotype.data.tar import (
    BLOCK,
    MAX_KINDS,
    MAX_MEMBER,
    MAX_MEMBERS,
    USUAL,
    Bytes,
    Entry,
    entries,
    padded,
    parse,
    split_name,
)
from calotype.errors import DataError

_TIME = re.compile(rb"(\d\d) mtime=[\d.]+\n(?=\0*\Z)")  # the pax header that webdataset's writer gives every member
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
    files = _alike(blocks) or _chosen(blocks)
    if files is None:
        return None
    keys, suffixes, starts, sizes = files
    lines, ends = b"\n".join([b"", *keys, b""]), b"".join(suffixes)
    odd = any(mark in lines for mark in (b".", b"//", b"\n/", b"/\n", b"\n\n", b"\n__", b"\\", b"\0"))
    odd = odd or lines.count(b"\n") > len(keys) + 1 or any(mark in ends for mark in (b"/", b"\\", b"\0"))
    if odd or len(suffixes) > MAX_MEMBERS or len(set(suffixes)) < len(suffixes):
        return None
    if any(one == other for one, other in pairwise(keys)):
        return None
    try:
        texts = b"\n".join(keys).decode().split("\n")
        members = {s[1:].decode(): (starts[:, i], sizes[:, i]) for i, s in enumerate(suffixes)}
    except UnicodeDecodeError:
        return None
    return Table(texts, members) if all(name and name == name.lower() for name in members) else None


# Keys of samples; what stands behind a key in the names of its members, with the dot; starts, sizes (samples, members)
_Files = tuple[list[bytes], list[bytes], Ints, Ints]


def _alike(blocks: Array) -> _Files | None:
    """Where all samples have headers at the places of the first one's, and these differ in nothing but a key of one
    length, and perhaps sizes: so it is with latents.  No block but these is looked at."""
    suffixes: list[bytes] = []
    places: list[int] = []
    sizes: list[int] = []
    at, key = 0, b""
    while at < len(blocks) and len(places) <= MAX_MEMBERS:
        head = blocks[at].tobytes()
        here, dot, suffix = head[:100].rstrip(b"\0").partition(b".")
        if places and here != key:
            break
        try:
            _, size, kind = parse(head, "")
        except DataError:
            return None
        if kind != b"0" or not here or not dot or not USUAL.fullmatch(head) or head[329:345] not in _DEVICES:
            return None
        key = here
        suffixes.append(dot + suffix)
        places.append(at)
        sizes.append(size)
        at += 1 + padded(size) // BLOCK
    if len(blocks) % at:
        return None
    heads, long = blocks.reshape(-1, at, BLOCK)[:, places], len(key)  # (samples, members, 512)
    keys, words = heads[:, 0, :long], heads.view(np.uint64)
    differ = np.bitwise_or.reduce(words ^ words[0], 0).view(np.uint8).any(0)  # (512,) byte of a header
    sums = _octal(heads[:, :, _SUM])
    if sums is None or (sums[0] != _checksums(heads[0])).any():  # tarfile takes sums of signed bytes too
        return None
    if any((heads[:, member, :long] != keys).any() for member in range(1, len(places))):
        return None
    sums -= keys.sum(1, dtype=np.int64)[:, None]
    found = np.repeat(np.array([sizes]), len(heads), 0)
    if differ[_SIZE].any():
        octal = _octal(heads[:, :, _SIZE])
        if octal is None or (-(-octal // BLOCK) != -(-found // BLOCK)).any():
            return None
        sums -= heads[:, :, _SIZE].sum(2, dtype=np.int64)
        found = octal
    differ[:long] = differ[_SIZE] = differ[_SUM] = False
    if differ.any() or (sums != sums[0]).any():
        return None
    whole = keys.tobytes()
    starts = (np.arange(0, len(blocks), at)[:, None] + places + 1) * BLOCK
    return [whole[i : i + long] for i in range(0, len(whole), long)], suffixes, starts, found


def _chosen(blocks: Array) -> _Files | None:
    """Where all samples have as many members as the first."""
    found = _chained(blocks, _marked(blocks))
    if found is None or found.end != len(blocks):
        return None
    names = _names(found)
    key, dot, _ = names[0].partition(b".")
    width = next((i for i, name in enumerate(names) if not name.startswith(key + dot)), len(names))
    suffixes = [name[len(key) :] for name in names[:width]]
    keys = [name[: -len(suffixes[0])] for name in names[::width]]
    if not dot or len(names) % width:
        return None
    if any(names[i::width] != [one + suffix for one in keys] for i, suffix in enumerate(suffixes)):
        return None
    return keys, suffixes, (found.marked.reshape(-1, width) + 1) * BLOCK, found.sizes.reshape(-1, width)


def _names(chain: _Chain) -> list[bytes]:
    return np.ascontiguousarray(chain.heads[:, :100]).view("S100")[:, 0].tolist()


def _octal(digits: Array) -> Ints | None:
    """Numbers (...,) of digits (..., n); None if anything else is among them."""
    if not (digits & 0xF8 == ord("0")).all():
        return None
    return ((digits & 7).astype(np.float64) @ _OCTAL[-digits.shape[-1] :]).astype(np.int64)  # exact, and fast


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
_SIZE, _SUM = slice(124, 135), slice(148, 154)  # digits of a header's size and checksum
_BYTES = np.uint64(0x00FF00FF00FF00FF)


def _checksums(heads: Array) -> Ints:
    """Sums of the bytes of headers (n, 512), their checksum's own field counted as blanks."""
    words = heads.view(np.uint64)
    lanes = ((words & _BYTES) + (words >> np.uint64(8) & _BYTES)).sum(1).view(np.uint16).reshape(-1, 4)
    return lanes.sum(1, dtype=np.int64) - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")


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
