"""One stored image -> one uint8 picture of a given size: the preprocessing that every encoder and every trainer shares.

`PREPROCESSING` names these rules inside the encoding of a cache: whoever changes a pixel must change it too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from calotype.data.buckets import Size
from calotype.data.shards import Sample
from calotype.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

PREPROCESSING = "calotype.images/1"
MAX_PIXELS = 100_000_000

MEMBERS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "pgm")
# Never EPS, PDF or the like, which run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")

# Pillow's own limit is one global number that only warns up to twice itself: `max_pixels` is checked here instead.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Picture:
    """`pixels`: uint8 (3, H, W), RGB.  `width`, `height`: the upright original's, in pixels."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    width: int
    height: int


def image_bytes(sample: Sample) -> bytes | memoryview:
    """The member of `sample` that is its image.

    Raises:
        DataError: it has none.
    """
    for name in MEMBERS:
        if name in sample.members:
            return sample.members[name]
    raise DataError(f"sample {sample.key} has no image: its members are {', '.join(sample.members)}")


def decode(data: bytes | memoryview, size: int | Size, name: str = "image", max_pixels: int = MAX_PIXELS) -> Picture:
    """Upright, on white, RGB; the largest centred part of the size's shape, resized with antialiasing.

    That is: the image is made as small as covers the size, then its centre is cropped, in one resampling and without
    rounding.  Bicubic.  JPEGs much larger than the size are decoded at 1/2, 1/4 or 1/8, never below twice the size.

    Args:
        size: (width, height), or the edge of a square.

    Raises:
        DataError: not an image, broken, or more than `max_pixels`; the sentence starts with `name`.
    """
    size = (size, size) if isinstance(size, int) else size
    image, width, height = upright(data, name, max_pixels, at_least=(2 * size[0], 2 * size[1]))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, box=cropped(*image.size, size))
    return Picture(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), width, height)


def cropped(width: int, height: int, size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred part of an image that has the size's shape."""
    narrow = width * size[1] <= height * size[0]
    part = (width, width * size[1] / size[0]) if narrow else (height * size[0] / size[1], height)
    left, top = (width - part[0]) / 2, (height - part[1]) / 2
    return left, top, left + part[0], top + part[1]


def signed(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as encoders and decoders have it."""
    return pixels.float() / 127.5 - 1


def measured(data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS) -> Size:
    """Width and height of the upright original, by its header; its pixels are decoded only where EXIF lies behind them.

    Raises:
        DataError: not an image, or more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, name, max_pixels)
            if image.format == "TIFF":  # its size is that of the upright image already
                return image.size
            behind = image.format == "PNG" and "exif" not in image.info
            turned = (not behind or b"eXIf" in bytes(data)) and _turned(image)
            return (image.height, image.width) if turned else image.size
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def upright(
    data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS, at_least: Size | None = None
) -> tuple[Image.Image, int, int]:
    """RGB image with EXIF's rotation applied and transparency laid on white, and its original width and height.

    Args:
        at_least: a JPEG may be decoded smaller, but not below this; None for full size.

    Raises:
        DataError: not an image, broken, or more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = _check_size(image, name, max_pixels)
            if at_least and image.format == "JPEG":
                image.draft(None, at_least[::-1] if _turned(image) else at_least)
            turned = ImageOps.exif_transpose(image)
            if _turned(image):
                width, height = height, width
            return _rgb(turned), width, height
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise _unreadable(name, error) from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> Size:
    if image.width * image.height > max_pixels:
        raise DataError(f"{name}: {image.width}x{image.height} pixels are more than data.max_pixels={max_pixels}")
    return image.size


def _unreadable(name: str, error: Exception) -> DataError:
    # Pillow's own words would name an address in memory, another one every time; and reasons are kept in manifests.
    foreign = isinstance(error, UnidentifiedImageError)
    why = f"none of {', '.join(FORMATS)}" if foreign else str(error) or type(error).__name__
    return DataError(f"{name}: not a readable image ({why})")


def _turned(image: Image.Image) -> bool:
    """Whether EXIF's orientation swaps the sides."""
    return bool(image.getexif().get(0x0112, 1) >= 5)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's own `convert` would clip at 255, to RGB."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(f"pixels of mode {image.mode} have no known range: store 8 or 16 bits per channel")
    grey = (values.astype(np.uint32) * 255 + 32767) // 65535
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
