"""A folder of images as a source: found recursively, with captions beside them, in a table, or by folder name."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import stat
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calotype.config import Data
from calotype.data.items import Item, Listing, Raw, digest
from calotype.errors import ConfigError

# What counts as an image by name; those that cannot be read (.heic) are quarantined, not overlooked.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp"),
    *(".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".exr", ".hdr", ".dng"),
)


@dataclass
class Found:
    """What lies in the folder: names relative to it; a value says why the file is unusable, or is empty."""

    images: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # folders not entered
    passed_by: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)  # of images that are usable


class Folder:
    """`data.path`.  Hidden files are passed by; no link leads out of the folder, none to a folder is followed."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.root = Path(data.path)
        if not data.path or not self.root.is_dir():
            raise ConfigError(f"data.path={data.path!r} is not a folder on this machine: name the folder of images")
        self.inside = self.root.resolve()

    def listing(self) -> Listing:
        """All images, with what the captions or the table say of each.

        Raises:
            ConfigError: the table cannot be read or lacks a column.
        """
        found = Found()
        self._walk("", found)
        classes: tuple[str, ...] = ()
        if self.data.captions == "sidecar":
            items = _with_sidecars(found)
        elif self.data.captions == "table":
            items = _with_rows(found, _rows(self.data), str(self.inside))
        elif self.data.captions == "folder_name":
            classes = tuple(sorted({name.split("/")[0] for name in found.images if "/" in name and _is_text(name)}))
            items = [_with_class(name, classes) for name in found.images]
        else:
            items = [Item(name) for name in found.images]
        items = [_finished(item, found) if item.name in found.images else item for item in items]
        items = _one_per_stem(items) + [Item(name, reason=reason) for name, reason in found.lost.items()]
        items = sorted((replace(item, name=_printable(item.name)) for item in items), key=lambda item: item.name)
        return Listing(tuple(items), classes, dict(sorted(found.passed_by.items())))

    def _walk(self, folder: str, found: Found) -> None:
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError as error:
            found.lost[folder or "."] = f"folder cannot be opened: {error.strerror}"
            return
        for entry in entries:
            name, reason = posixpath.join(folder, entry.name), ""
            suffix = posixpath.splitext(name)[1].lower()
            if entry.name.startswith("."):
                found.passed_by["hidden"] += 1
                continue
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if target.is_dir():
                    found.lost[name] = "link to a folder, which is not followed"
                    continue
                inside = target.is_relative_to(self.inside)
                reason = "link that leads out of data.path" if not inside else "" if target.is_file() else "broken link"
            elif entry.is_dir():
                self._walk(name, found)
                continue
            elif not entry.is_file():
                reason = "not a regular file"
            if suffix in SUFFIXES:
                found.images[name] = reason
                with suppress(OSError):  # it went, and `load` will say so
                    found.sizes[name] = entry.stat().st_size if not reason else 0
            elif suffix == ".txt" and self.data.captions == "sidecar":
                found.texts[name] = reason
            else:
                found.passed_by[suffix or "no suffix"] += 1

    def load(self, item: Item) -> Raw:
        """Bytes of the image and of its caption; what cannot be had is a reason, never an exception."""
        if item.reason:
            return Raw(reason=item.reason)
        try:
            # No image of max_pixels needs more than 8 bytes a pixel and some room for its metadata.
            image = _bytes(self.root / item.name, 8 * self.data.max_pixels + (1 << 26), "image")
            if not item.sidecar:
                return Raw(image, item.caption)
            return Raw(image, _bytes(self.root / item.sidecar, 8 * self.data.max_caption + (1 << 16), "caption"))
        except _Unreadable as unreadable:
            return Raw(reason=str(unreadable))

    def fingerprint(self) -> str:
        """Digest of names, sizes and modification times."""
        listing = self.listing()
        names = [file for item in listing.items if not item.reason for file in (item.name, item.sidecar) if file]
        paths = [self.root / name for name in names]
        if self.data.captions == "table":
            paths.append(Path(self.data.table))
        doomed = (f"{item.name} {item.reason}" for item in listing.items if item.reason)
        return digest(*names, *map(_state, paths), *doomed)


def _state(path: Path) -> str:
    try:
        about = path.stat()
    except OSError as error:  # it went between the listing and here
        return str(error.strerror)
    return f"{about.st_size} {about.st_mtime_ns}"


class _Unreadable(Exception):
    """Carries the reason to `load`."""


def _bytes(path: Path, limit: int, what: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would block for ever
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise _Unreadable(f"{what} is not a regular file")
            if about.st_size > limit:
                raise _Unreadable(f"{what} file of {about.st_size} bytes is longer than any that is allowed")
            return file.read()
    except OSError as error:
        raise _Unreadable(f"{what} cannot be opened: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------ names and keys


def key_of(stem: str) -> str:
    """A readable and unique key of `folder/name` without suffix: letters, digits, - and _; it depends on nothing else.

    `cats/Über 1` -> `cats-ber-1-<16 hex>`: at most 65 characters, no dot, no slash.
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", stem)[-48:].strip("-")
    return f"{slug}-{digest('key', stem)[:16]}".lstrip("-")


def _stem(name: str) -> str:
    """Name without suffix; the two ways to write é are one (a folder copied from a Mac has the other)."""
    return unicodedata.normalize("NFC", posixpath.splitext(name)[0])


def _is_text(name: str) -> bool:
    return _printable(name) == name


def _printable(name: str) -> str:
    """A name that JSON and Parquet hold: bytes of a file name that are not UTF-8 are written as \\xNN."""
    return re.sub("[\ud800-\udfff]", lambda odd: f"\\x{ord(odd[0]) & 0xFF:02x}", name)


def _finished(item: Item, found: Found) -> Item:
    """The item with its key and size; what the walk found wrong with the file comes before what the captions lack."""
    if not _is_text(item.name):
        return replace(item, reason="name is not UTF-8: it cannot become a key")
    reason = found.images[item.name] or item.reason
    return replace(item, key=key_of(_stem(item.name)), reason=reason, size=found.sizes.get(item.name, 0))


def _one_per_stem(items: Iterable[Item]) -> list[Item]:
    """Two files with one stem would share a key and a caption: nobody can tell which was meant, so neither is taken."""
    items = list(items)
    found = Counter(item.key for item in items if item.key)
    clash = "{} files have this stem: rename all but one"
    return [replace(item, reason=clash.format(found[item.key])) if found[item.key] > 1 else item for item in items]


# ------------------------------------------------------------------------------------------------ captions


def _with_class(name: str, classes: tuple[str, ...]) -> Item:
    """The first folder below `data.path` is the class: its place among `classes` the label, its words the caption."""
    first = name.split("/")[0]
    if first == name or first not in classes:
        return Item(name, reason="caption is missing: it lies in no folder that names its class")
    return Item(name, label=classes.index(first), caption=re.sub(r"[_\s]+", " ", first).encode())


def _with_sidecars(found: Found) -> list[Item]:
    """`cat.jpg` is described by `cat.txt`; a caption without an image is an item too, and quarantined."""
    texts: dict[str, list[str]] = defaultdict(list)
    for name in found.texts:
        texts[_stem(name)].append(name)
    items = []
    for name in found.images:
        mine = texts.get(_stem(name), [])
        if len(mine) == 1:
            reason = found.texts[mine[0]]
            items.append(Item(name, sidecar=mine[0], reason=f"caption is a {reason}" if reason else ""))
        else:
            items.append(
                Item(name, reason="more than one caption" if mine else "caption is missing: no .txt beside it")
            )
    stems = {_stem(name) for name in found.images}
    return items + [Item(name, reason="caption without an image") for name in found.texts if _stem(name) not in stems]


def _with_rows(found: Found, rows: Iterable[Item], inside: str) -> list[Item]:
    """Every image takes the one row that names it; rows that name none, and images that none names, are quarantined."""
    named: dict[str, list[Item]] = defaultdict(list)
    for row in rows:
        named[_row_name(row.name, inside)].append(row)
    items = []
    for name in found.images:
        mine = named.pop(_row_name(name, inside), [])
        if len(mine) == 1:
            items.append(replace(mine[0], name=name))
        else:
            reason = f"{len(mine)} rows of data.table name it" if mine else "caption is missing: no row names it"
            items.append(Item(name, reason=reason))
    nowhere = "row of data.table that names no image under data.path"
    return items + [Item(name, reason=mine[0].reason or nowhere) for name, mine in named.items()]


def _row_name(name: str, inside: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name).removeprefix(f"{inside}/"))


def _rows(data: Data) -> Iterator[Item]:
    """(file, caption) of every row; a row that cannot be understood is an item with a reason."""
    path = Path(data.table)
    if not data.table or not path.is_file():
        raise ConfigError(f"data.table={data.table!r} is not a file on this machine: name a .csv, .jsonl or .parquet")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"data.table={data.table!r} must be a .csv, .jsonl or .parquet file")
    for number, row in enumerate(readers[path.suffix.lower()](path, (data.file_column, data.caption_column)), 1):
        if isinstance(row, str):
            yield Item(f"data.table row {number}", reason=row)
            continue
        name, caption = row.get(data.file_column), row.get(data.caption_column)
        if not isinstance(name, str) or not name:
            yield Item(f"data.table row {number}", reason=f"row without {data.file_column}")
        elif caption is None:
            yield Item(name, reason="caption is missing in its row")
        elif None in row:
            yield Item(name, reason="row has more cells than the header: put its caption in quotes")
        else:
            yield Item(name, caption=_encoded(caption))


def _encoded(caption: Any) -> bytes:
    """UTF-8; of a text that is none, bytes that are none either, so that its item is quarantined when it is read."""
    return caption if isinstance(caption, bytes) else str(caption).encode("utf-8", "surrogatepass")


def _need(columns: Iterable[Any], wanted: tuple[str, str], path: Path) -> None:
    known = [str(column) for column in columns]
    for setting, column in zip(("file_column", "caption_column"), wanted, strict=True):
        if column not in known:
            raise ConfigError(f"{path} has no column {column!r} but {', '.join(known)}: set data.{setting}")


def _csv(path: Path, wanted: tuple[str, str]) -> Iterator[dict[Any, Any] | str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a caption that is too long is quarantined alone, later
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        _need(reader.fieldnames or (), wanted, path)
        yield from reader


def _jsonl(path: Path, wanted: tuple[str, str]) -> Iterator[dict[Any, Any] | str]:
    known: set[str] = set()
    for line in io.BytesIO(path.read_bytes().removeprefix(b"\xef\xbb\xbf")):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except ValueError:
            row = None
        known |= set(row) if isinstance(row, dict) else set()
        yield row if isinstance(row, dict) else "row is not a JSON object"
    _need(sorted(known), wanted, path)


def _parquet(path: Path, wanted: tuple[str, str]) -> Iterator[dict[Any, Any] | str]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(path) as file:
            _need(file.schema_arrow.names, wanted, path)
            for batch in file.iter_batches(columns=list(wanted)):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ConfigError(f"data.table={path} is not a Parquet file ({error})") from None
