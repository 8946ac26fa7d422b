"""One stored image -> one square uint8 picture: the preprocessing that every encoder and every trainer shares.

`PREPROCESSING` names these rules inside the encoding of a cache: whoever changes a pixel must change it too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from calotype.data.shards import Sample
from calotype.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

PREPROCESSING = "calotype.images/1"

MEMBERS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "pgm")
# Never EPS, PDF or the like, which run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")

# Pillow's own limit is one global number that only warns up to twice itself: `max_pixels` is checked here instead.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Picture:
    """`pixels`: uint8 (3, S, S), RGB.  `width`, `height`: the upright original's, in pixels."""

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


def decode(data: bytes | memoryview, size: int, name: str = "image", max_pixels: int = 100_000_000) -> Picture:
    """Upright, on white, RGB; the centre square, resized with antialiasing to `size` x `size`.

    That is: the shorter side becomes `size`, then the centre is cropped, in one resampling and without rounding the
    longer side.  Bicubic.  JPEGs much larger than `size` are decoded at 1/2, 1/4 or 1/8, never below 2 `size`.

    Raises:
        DataError: not an image, broken, or more than `max_pixels`; the sentence starts with `name`.
    """
    image, width, height = upright(data, name, max_pixels, at_least=2 * size)
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    if image.size != (size, size):
        box = (left, top, left + edge, top + edge)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return Picture(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), width, height)


def signed(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as encoders and decoders have it."""
    return pixels.float() / 127.5 - 1


def upright(
    data: bytes | memoryview, name: str = "image", max_pixels: int = 100_000_000, at_least: int = 0
) -> tuple[Image.Image, int, int]:
    """RGB image with EXIF's rotation applied and transparency laid on white, and its original width and height.

    Args:
        at_least: a JPEG may be decoded smaller, but no side below this; 0 for full size.

    Raises:
        DataError: not an image, broken, or more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{name}: {width}x{height} pixels are more than data.max_pixels={max_pixels}")
            if at_least:
                image.draft(None, (at_least, at_least))
            turned = ImageOps.exif_transpose(image)
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientations that swap the sides
                width, height = height, width
            return _rgb(turned), width, height
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise DataError(f"{name}: not a readable image ({str(error) or type(error).__name__})") from error


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
