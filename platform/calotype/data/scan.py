"""One reading of one foreign tar, through a window of memory: its samples, its chunks, and every hash."""

from __future__ import annotations

import hashlib
import io
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from calotype.data import tables, tar
from calotype.data.shards import CHUNK
from calotype.errors import DataError

CHUNK_SAMPLES = 256  # of one chunk, at most
LARGE = 8  # times CHUNK, which a chunk of several samples must not exceed
MAX_SAMPLES = 2**20  # of one shard: what is known of them is held in memory
MAX_JSON = 2**16  # bytes of a json member that is looked into
MAX_NUMBERS = 64  # of one json member
MAX_HEAD = 512  # bytes of a .npy header
RECORD, PADDING = 20 * tar.BLOCK, 2**20  # bytes of zeros that may end an archive: an empty one, any other
WHOLE = ("width", "height", "label")  # numbers that are whole ones; others are stored as floats

Read = Callable[[int, memoryview], int]


@dataclass
class Scan:
    """What one reading found.

    Attributes:
        keys: of the samples, in order.
        sizes: member -> bytes (samples,), -1 in samples without it.
        numbers: name -> values (samples,) of the numbers at the top of the json members, as the first one names them.
        passed_by: what is part of no sample, counted.
        content: of the sidecar.
    """

    keys: list[str] = field(default_factory=list)
    sizes: dict[str, array[int]] = field(default_factory=dict)
    numbers: dict[str, list[float | int | None]] = field(default_factory=dict)
    passed_by: Counter[str] = field(default_factory=Counter)
    content: dict[str, Any] = field(default_factory=dict)


class _TooLarge(Exception):
    """A chunk of so many samples is too large; carries the number to try instead."""


def scanned(read: Read, size: int, where: str, memory: memoryview) -> Scan:
    """Read a tar of `size` bytes.

    All chunks but the last hold the same number of samples, which the first CHUNK bytes decide.  Where later samples
    are so much larger that this makes chunks of more than LARGE times as many, the tar is read again with fewer.

    Args:
        read: (start, buffer) -> bytes read.
        memory: the window, of at least half a MiB; what is known of the samples comes on top.

    Raises:
        DataError: it is cut, damaged, hostile, packed, or holds a sample in parts; names `where` and the byte.
    """
    step = 0
    while True:
        try:
            return _Scanner(read, size, where, memory, step).run()
        except _TooLarge as error:
            step = error.args[0]


class _Window:
    """A piece of the tar in memory: bytes [base, end).  All bytes pass through it, and through the hashes, in order."""

    def __init__(self, read: Read, size: int, where: str, memory: memoryview) -> None:
        self._read, self.size, self._where, self._memory = read, size, where, memory
        self.base = self.end = self._fed = 0
        self.view = memory[:0]
        self.whole, self._chunk = hashlib.sha256(), blake3()
        self.offsets, self.hashes = [0], list[str]()

    def onto(self, at: int) -> None:
        """Read on.  Bytes from `at` on stay."""
        self._feed(min(at, self.end))
        kept = bytes(self.view[min(at, self.end) - self.base :])
        self._memory[: len(kept)] = kept
        want = min(len(self._memory) - len(kept), self.size - self.end)
        assert want, "the window is too small for what must be in it at once"
        got = self._read(self.end, self._memory[len(kept) : len(kept) + want])
        if got < want:
            raise DataError(f"{self._where} is cut: it has {self.end + got} of the {self.size} bytes that were listed")
        self.base = self.end - len(kept)
        self.end += got
        self.view = self._memory[: len(kept) + got]
        self.whole.update(self.view[len(kept) :])

    def cut(self, at: int) -> None:
        """A chunk ends before byte `at`, which is in the window."""
        self._feed(at)
        self.offsets.append(at)
        self.hashes.append(self._chunk.hexdigest())
        self._chunk = blake3()

    def bytes(self, start: int, size: int) -> bytes:
        """Some bytes, read on for where they are not there yet; nothing before them is kept."""
        if start + size > self.end:
            self.onto(start)
        return bytes(self.view[start - self.base : start - self.base + size])

    def _feed(self, until: int) -> None:
        self._chunk.update(self.view[self._fed - self.base : until - self.base])
        self._fed = until


class _Scanner:
    def __init__(self, read: Read, size: int, where: str, memory: memoryview, step: int) -> None:
        self.window, self.where, self.step = _Window(read, size, where, memory), where, step
        self.found, self.seen = Scan(), set[str]()
        self.first = 0  # sample with which the chunk begins
        self.members: list[str] = []  # of the current sample
        self.first_members: list[str] = []
        self.heads: dict[str, set[bytes]] = {}  # .npy member -> its headers

    def run(self) -> Scan:
        window, found = self.window, self.found
        end = self._walk()
        ends: list[Any] = []
        if found.keys:
            self._check_size(end)
            window.cut(end)
            last = sorted(self.members)
            ends = [[found.keys[0], self.first_members or last], [found.keys[-1], last]]
            for sizes in found.sizes.values():
                sizes.extend([-1] * (len(found.keys) - len(sizes)))
            for numbers in found.numbers.values():
                numbers.extend([None] * (len(found.keys) - len(numbers)))
        self._rest(end)
        offsets = window.offsets
        found.content = {
            "bytes": window.size,
            "samples": len(found.keys),
            "chunk_samples": self.step or len(found.keys),
            "chunk_bytes": int(np.diff(offsets).max(initial=0)),
            "buckets": [],
            "sha256": window.whole.hexdigest(),
            "chunks": {"offsets": offsets, "blake3": window.hashes},
            "members": sorted(found.sizes),
            "arrays": {name: _array(heads) for name, heads in self.heads.items()},
            "passed_by": dict(sorted(found.passed_by.items())),
            "ends": ends,
        }
        return found

    def _walk(self) -> int:
        """From header to header; where the archive's end begins."""
        window, at, name, ran = self.window, 0, "", 0
        while True:
            if at > window.size:
                raise DataError(f"{self.where} is cut at byte {window.size}: {name!r} should end at byte {at}")
            if at + tar.BLOCK > window.end < window.size:
                window.onto(at)
                if not window.base and bytes(window.view[:2]) == b"\x1f\x8b":
                    raise DataError(f"{self.where} is gzip: samples are read by range, so unpack it to a plain .tar")
                continue
            if ran != window.end > at:  # once per window
                ran = window.end
                files, size = tables.run(window.view[at - window.base :], at)
                at += size
                for entry in files if at <= window.size else files[:-1]:
                    self._entry(entry)
                name = files[-1].name if files else name
                continue
            if at == window.size:
                raise DataError(f"{self.where} is cut at byte {window.size}: its closing blocks are missing")
            try:
                met = tar.following(window.view, at - window.base, self.where, window.base)
            except tar.Cut:
                if window.end == window.size:
                    raise
                window.onto(at)
                continue
            if met is None:
                return at
            entry, following = met
            name, at = entry.name, window.base + following
            if at <= window.size:
                self._entry(entry)

    def _entry(self, entry: tar.Entry) -> None:
        if not entry.regular:
            self.found.passed_by["folders"] += 1
            return
        key, member = tar.split_name(entry.name, f"{self.where}, byte {entry.header}")
        if not member:
            hidden = entry.name.rpartition("/")[2].startswith((".", "__")) or entry.name.startswith("__")
            self.found.passed_by["hidden files" if hidden else "files without a suffix"] += 1
            return
        if not self.found.keys or self.found.keys[-1] != key:
            self._begin(key, entry.header)
        self._add(member, entry)

    def _begin(self, key: str, at: int) -> None:
        """A sample begins, and perhaps a chunk."""
        keys = self.found.keys
        if key in self.seen or len(keys) == MAX_SAMPLES:
            what = f"sample {key!r} comes again after others: its files must follow each other, and keys be unique"
            what = what if key in self.seen else f"more than {MAX_SAMPLES} samples: write smaller shards"
            raise DataError(f"{self.where}, byte {at}: {what}")
        if keys:
            here = self._check_size(at)
            enough = here == CHUNK_SAMPLES or at - self.window.offsets[-1] >= CHUNK
            if here == self.step if self.step else enough:
                self.window.cut(at)
                self.step, self.first = here, len(keys)
            if len(keys) == 1:
                self.first_members = sorted(self.members)
        self.seen.add(key)
        keys.append(key)
        self.members = []

    def _check_size(self, at: int) -> int:
        """Samples of the chunk, which might end here."""
        here, size = len(self.found.keys) - self.first, at - self.window.offsets[-1]
        if size > LARGE * CHUNK and here > 1:
            raise _TooLarge(max(1, here * CHUNK // size))
        return here

    def _add(self, member: str, entry: tar.Entry) -> None:
        found, index = self.found, len(self.found.keys) - 1
        column = found.sizes.get(member)
        if column is None:
            column = found.sizes[member] = array("q", [])
        column.extend([-1] * (index - len(column)))
        self.members.append(member)
        if len(column) > index or len(self.members) > tar.MAX_MEMBERS or len(found.sizes) > tar.MAX_KINDS:
            what = f"sample {found.keys[index]!r} has {member!r} twice, or more than {tar.MAX_MEMBERS} members"
            what += f", or samples have more than {tar.MAX_KINDS} kinds of them"
            raise DataError(f"{self.where}, byte {entry.header}: {what}")
        column.append(entry.size)
        if member == "json" and entry.size <= MAX_JSON:
            self._look(self.window.bytes(entry.start, entry.size), index)
        if member.endswith("npy"):
            heads = self.heads.setdefault(member, set())
            if len(heads) <= MAX_NUMBERS:
                head = self.window.bytes(entry.start, min(entry.size, MAX_HEAD))
                heads.add(head[: 10 + int.from_bytes(head[8:10], "little")])

    def _look(self, data: bytes, index: int) -> None:
        """The numbers of a json member, under the names that the first one has."""
        try:
            about = json.loads(data)
        except (ValueError, RecursionError):
            about = None
        if not isinstance(about, dict):
            self.found.passed_by["json members that are no objects"] += 1
            return
        if not self.found.numbers:
            names = [name for name, value in about.items() if _number(name, value) is not None and _nameable(name)]
            self.found.numbers = {name: [] for name in names[:MAX_NUMBERS]}
        for name, values in self.found.numbers.items():
            values.extend([None] * (index - len(values)))
            values.append(_number(name, about.get(name)))

    def _rest(self, at: int) -> None:
        """Behind an archive's end there may be zeros, some; anything else is a part that no reader would see."""
        window = self.window
        while True:
            behind = np.frombuffer(window.view[max(at - window.base, 0) :], np.uint8)
            if behind.any():
                byte = max(at, window.base) + int((behind != 0).argmax())
                raise DataError(
                    f"{self.where} ends at byte {at}, but more follows at byte {byte}: readers see only the first of "
                    "tars that `cat` joined, so join them with `tar --concatenate`"
                )
            if window.end == window.size:
                break
            window.onto(window.end)
        if window.size - at > (PADDING if self.found.keys else RECORD):
            raise DataError(
                f"{self.where} holds zeros from byte {at} to its end at {window.size}: it was not written whole"
            )


def _nameable(name: str) -> bool:
    return name.isprintable() and 0 < len(name) <= 64 and name != "key" and not name.startswith("bytes.")


def _number(name: str, value: Any) -> float | int | None:
    """A finite number as its column holds it, of true and false 1 and 0; None for anything else."""
    if type(value) not in (int, float, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if name in WHOLE:
        return int(value) if number.is_integer() and abs(number) < 2**62 else None
    return number if math.isfinite(number) else None


def _array(heads: set[bytes]) -> dict[str, Any]:
    """dtype and shape that all headers have; None where they differ or cannot be read."""
    found = {_dtype_and_shape(head) for head in heads} if len(heads) <= MAX_NUMBERS else set()
    dtypes, shapes = {dtype for dtype, _ in found}, {shape for _, shape in found}
    shape = shapes.pop() if len(shapes) == 1 else None
    return {"dtype": dtypes.pop() if len(dtypes) == 1 else None, "shape": None if shape is None else list(shape)}


def _dtype_and_shape(head: bytes) -> tuple[str | None, tuple[int, ...] | None]:
    stream = io.BytesIO(head)
    try:
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # it is evaluated as Python, whose parser raises anything on hostile bytes
        return None, None
    return dtype.str, shape
