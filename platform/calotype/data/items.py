"""Items of a source: their order, their shards, and how one becomes a sample or the reason why it cannot.

A source lists its items cheaply (names, no pixels).  Every item ends in a sample or is quarantined by name with a
reason: `items = samples + quarantined`, always.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from calotype.config import Data
from calotype.data.images import FORMATS, upright
from calotype.data.manifest import held_out
from calotype.data.shards import Sample
from calotype.errors import DataError

# Formats whose bytes are kept as they are when every reader sees the same RGB picture in them.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Item:
    """One thing to prepare.  `name` is unique in its source; `reason` says why it is unusable, as the list shows."""

    name: str
    key: str = ""
    label: int | None = None
    caption: bytes | None = None  # where the listing already knows it
    sidecar: str = ""  # the file that holds it, else
    reason: str = ""
    size: int = 0  # bytes of its image's file, where it is one


@dataclass(frozen=True)
class Raw:
    """An item's bytes as they lie in the source, or the reason why there are none."""

    image: bytes = b""
    caption: bytes | None = None
    reason: str = ""


@dataclass(frozen=True)
class Listing:
    """All items, the names of the classes that labels count, and the other files passed by, counted by suffix."""

    items: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    passed_by: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Where items come from."""

    def listing(self) -> Listing: ...

    def load(self, item: Item) -> Raw: ...

    def fingerprint(self) -> str:
        """Another one whenever the source may have changed: from names, sizes and times, never from content."""
        ...


# ------------------------------------------------------------------------------------------------ order and shards


def digest(*parts: str | bytes) -> str:
    """sha256, in hex, of a list of strings; no other list has the same."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def split(items: Sequence[Item], share: float) -> dict[str, list[Item]]:
    """`train` and `held_out`, each in the order that shards are cut from: by hash of the name.

    That mixes classes that lie in folders of their own, and an item's place does not depend on the other items.
    """
    parts: dict[str, list[Item]] = {"train": [], "held_out": []}
    for item in sorted(items, key=_place):
        parts["held_out" if held_out(item.key or item.name, share) else "train"].append(item)
    return parts


def _place(item: Item) -> str:
    return digest("place", item.name)


def cut(items: Sequence[Item], limit: int, most: float = math.inf) -> Iterator[tuple[int, int]]:
    """Ranges of 1 to `limit` items and `most` bytes (or one item): the range of the hash is halved, and halved again
    where it is too full.

    An item that comes, goes or changes touches its own range only (at most that splits, or joins its twin).
    """
    places = [int(_place(item), 16) for item in items]
    until = list(accumulate((item.size for item in items), initial=0))

    def halve(start: int, stop: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        fits = stop - start <= limit and (until[stop] - until[start] <= most or stop - start == 1)
        if fits or high - low == 1:
            if stop > start:
                yield start, stop
            return
        middle = (low + high) // 2
        at = bisect_left(places, middle, start, stop)
        yield from halve(start, at, low, middle)
        yield from halve(at, stop, middle, high)

    yield from halve(0, len(items), 0, 1 << 256)


# ------------------------------------------------------------------------------------------------ one item


class _Unusable(Exception):
    """Carries the reason to `read`; the same input gives the same words on every machine."""


def read(item: Item, raw: Raw, data: Data) -> tuple[Sample, dict[str, Any]] | str:
    """One sample and its columns, or the reason why the item is quarantined.

    Members: `jpg` | `png` | `webp` (the file's own bytes where every reader sees the same RGB picture in them, else
    an RGB PNG of it), `txt` if the source has captions, `json` {"width", "height", "label"?}.
    """
    if item.reason or raw.reason:
        return item.reason or raw.reason
    try:
        caption = None if raw.caption is None else _caption(raw.caption, data.max_caption)
        member, image, width, height = _image(raw.image, data.max_pixels)
    except _Unusable as unusable:
        return str(unusable)
    about: dict[str, Any] = {"width": width, "height": height}
    columns: dict[str, Any] = {"file": item.name, "member": member, "width": width, "height": height}
    members: dict[str, bytes | memoryview] = {member: image}
    if caption is not None:
        members["txt"] = caption.encode()
        columns["caption"] = caption
    if item.label is not None:
        about["label"] = columns["label"] = item.label
    members["json"] = json.dumps(about, sort_keys=True).encode()
    return Sample(item.key, members), columns


def _caption(data: bytes, longest: int) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _Unusable("caption is not UTF-8") from None
    if "\0" in text:
        raise _Unusable("caption is not UTF-8 text: it holds NUL")
    if not text:
        raise _Unusable("caption is empty")
    if len(text) > longest:
        raise _Unusable(f"caption of {len(text)} characters is longer than data.max_caption={longest}")
    return text


def _image(data: bytes, max_pixels: int) -> tuple[str, bytes, int, int]:
    """(member, bytes to store, width, height) of an image file; every pixel is decoded once to prove that it can be."""
    if not data:
        raise _Unusable("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.width * image.height > max_pixels:
                raise _Unusable(f"{image.width}x{image.height} pixels are more than data.max_pixels={max_pixels}")
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise _Unusable("more than one frame or page: only still images are taken")
            image.load()
            if _plain(image, data):
                return KEPT[str(image.format)], data, image.width, image.height
        picture, _, _ = upright(data, max_pixels=max_pixels)
        return "png", to_png(picture), picture.width, picture.height
    except _Unusable:
        raise
    except UnidentifiedImageError:
        raise _Unusable("not an image: none of " + ", ".join(FORMATS)) from None
    except MemoryError:
        raise  # of this machine, not of this file
    except DataError as error:
        raise _Unusable(str(error).removeprefix("image: ")) from None
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        reason = "truncated image" if truncated else f"damaged image ({type(error).__name__})"
        raise _Unusable(reason) from None


def _plain(image: Image.Image, data: bytes) -> bool:
    """Whether the file's own bytes may be stored: RGB, 8 bit, opaque and upright."""
    deep_png = image.format == "PNG" and data[24] != 8  # IHDR's bit depth: Pillow calls 16-bit colour RGB as well
    upright_already = image.getexif().get(ORIENTATION, 1) == 1
    opaque = "transparency" not in image.info
    return image.format in KEPT and image.mode == "RGB" and not deep_png and upright_already and opaque


def to_png(image: Image.Image) -> bytes:
    """PNG of the pixels and nothing else (no colour profile, no EXIF); the same bytes every time."""
    buffer = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
