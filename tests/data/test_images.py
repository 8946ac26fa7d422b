"""One image -> one picture of a given size: every mode, every orientation, and nothing hostile."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from calotype.data.images import decode, image_bytes, measured, upright
from calotype.data.shards import Sample
from calotype.errors import DataError
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = noise(32, 32)
    made = decode(encoded(Image.fromarray(pixels)), 32)
    assert np.array_equal(made.pixels, pixels.transpose(2, 0, 1))
    assert (made.width, made.height) == (32, 32)
    assert made.pixels.dtype == np.uint8
    assert made.pixels.flags.c_contiguous


def test_the_centre_of_the_longer_side_is_kept() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = (255, 0, 0)
    made = decode(encoded(Image.fromarray(image)), 20)
    assert (made.pixels[0, :, 2:-2] == 255).all()
    assert (made.width, made.height) == (60, 20)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    made = decode(encoded(Image.fromarray(stripes)), 32)
    assert (
        np.abs(made.pixels[:, :, 1:-1].astype(int) - 127).max() <= 3
    )  # nearest or bilinear sampling would give 0 or 255


def test_a_large_jpeg_decoded_small_is_the_picture_it_was() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 1024).astype(np.uint8)[:, None, None], (1024, 1024, 3))
    data = encoded(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=95)
    made = decode(data, 64)
    whole, _, _ = upright(data)
    direct = np.asarray(whole.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(made.pixels.astype(int) - direct).max() <= 3
    assert (made.width, made.height) == (1024, 1024)


def test_exif_turns_the_picture_and_its_sides() -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    made = decode(encoded(Image.fromarray(image), exif=exif), 16)
    assert (made.width, made.height) == (16, 32)
    turned, width, height = upright(encoded(Image.fromarray(image), exif=exif))
    assert turned.size == (width, height) == (16, 32)
    assert turned.getpixel((8, 2)) == (255, 255, 255)
    assert turned.getpixel((8, 29)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_lies_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        image, options = Image.new("P", (8, 8), 1), {"transparency": 1}
        image.putpalette([0, 0, 0, 200, 0, 0])
        image.paste(0, (0, 0, 4, 8))
    else:
        image, options = clear.convert("LA" if mode == "PA" else mode), {}
    made = decode(encoded(image, **options), 8).pixels
    assert (made[:, :, 5:] == 255).all()
    assert (made[:, :, :3] == 0).all()


def test_sixteen_bits_become_eight_by_rounding_not_by_clipping() -> None:
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        made = decode(encoded(Image.fromarray(values), kind), 64).pixels
        assert np.array_equal(made[0], np.round(values / 257).astype(np.uint8))
        assert np.array_equal(made[0], made[2])


def test_the_centre_of_any_shape_is_kept_in_one_resampling() -> None:
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 20:100] = (255, 0, 0)  # of which 2:1 is left
    made = decode(encoded(Image.fromarray(image)), (64, 32))
    assert made.pixels.shape == (3, 32, 64)
    assert (made.pixels[0, :, 2:-2] == 255).all()
    assert (made.width, made.height) == (120, 40)
    tall = decode(encoded(Image.fromarray(image.transpose(1, 0, 2).copy())), (32, 64))
    assert np.array_equal(tall.pixels, made.pixels.transpose(0, 2, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_what_exif_turns_is_measured_turned(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(20, 60)), kind, exif=exif)
    assert measured(data) == (20, 60) == upright(data)[1:]
    assert decode(data, (8, 24)).pixels.shape == (3, 24, 8)
    plain = encoded(Image.fromarray(noise(20, 60)), kind)
    assert measured(plain) == (60, 20) == upright(plain)[1:]


def test_exif_behind_the_pixels_of_a_png_counts_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(20, 60)), exif=exif)
    at, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    size = 12 + int.from_bytes(data[at : at + 4], "big")
    moved = data[:at] + data[at + size : end] + data[at : at + size] + data[end:]
    assert upright(moved)[1:] == (20, 60) == measured(moved)


def test_what_has_no_header_cannot_be_measured() -> None:
    with pytest.raises(DataError, match=r"^sample a: not a readable image"):
        measured(b"not an image", "sample a")


def test_a_large_turned_jpeg_is_not_decoded_smaller_than_twice_its_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = np.zeros((1024, 512, 3), np.uint8)
    rows[::2] = 255  # turned they are columns: a JPEG decoded at 1/8 would have forgotten them
    data = encoded(Image.fromarray(rows), "JPEG", quality=100, exif=exif)
    image, width, height = upright(data, at_least=(1000, 500))
    assert (width, height) == (1024, 512)
    assert image.size == (1024, 512)
    assert upright(data, at_least=(128, 64))[0].size == (128, 64)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (16, 16), "white").convert(mode)
    data = encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    assert (decode(data, 16).pixels >= 250).all()


def test_one_pixel_and_one_line_are_images_too() -> None:
    assert (decode(encoded(Image.new("RGB", (1, 1), "red")), 8).pixels[0] == 255).all()
    assert decode(encoded(Image.new("RGB", (500, 1), "red")), 8).pixels.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a readable image"),
        (b"not an image at all", "not a readable image"),
        (encoded(Image.fromarray(noise(64, 64)))[:-3000], "not a readable image"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-900], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "no known range"),
    ],
)
def test_what_is_broken_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=f"^sample a: .*{reason}"):
        decode(data, 16, "sample a")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(DataError, match=r"^sample a: 20000x20000 .*max_pixels=100000000"):
        decode(bomb, 16, "sample a")
    with pytest.raises(DataError, match=r"^sample a: 20000x20000 .*max_pixels=100000000"):
        measured(bomb, "sample a")
    with pytest.raises(DataError, match="max_pixels=63"):
        decode(encoded(Image.new("RGB", (8, 8))), 8, max_pixels=63)


def test_the_image_of_a_sample_is_found_by_its_member() -> None:
    assert image_bytes(Sample("a", {"txt": b"x", "webp": b"y"})) == b"y"
    with pytest.raises(DataError, match="sample a has no image"):
        image_bytes(Sample("a", {"txt": b"x"}))
