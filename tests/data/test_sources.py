"""Every item of a source ends in a sample or in a named reason: hostile files, captions, names, order and shards."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calotype.config import Data
from calotype.data.items import Item, cut, read, split, to_png
from calotype.data.sources import PHRASINGS, UNSEEN_PHRASINGS, WORDS, caption_of, open_source
from calotype.errors import ConfigError
from PIL import Image

rng = np.random.default_rng(7)
PHOTO = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))  # 40 wide, 24 high: a rotation shows


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def folder(tmp_path: Path, files: dict[str, bytes], captions: str = "none", **settings: Any) -> Data:
    root = tmp_path / "pictures"
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    root.mkdir(exist_ok=True)
    return Data(name="pictures", kind="folder", path=str(root), captions=captions, **settings)


def outcomes(data: Data) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> (sample, columns) of what is usable, and name -> reason of the rest; together they are all items."""
    source = open_source(data)
    items = source.listing().items
    samples, reasons = {}, {}
    for item in items:
        outcome = read(item, source.load(item), data)
        if isinstance(outcome, str):
            reasons[item.name] = outcome
        else:
            samples[item.name] = outcome
    assert len(samples) + len(reasons) == len(items)
    return samples, reasons


def pixels(sample: Any) -> np.ndarray[Any, Any]:
    member = next(name for name in ("jpg", "png", "webp") if name in sample.members)
    image = Image.open(io.BytesIO(sample.members[member]))
    assert image.mode == "RGB"
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("kind", "member", "options"),
    [("JPEG", "jpg", {"quality": 90}), ("PNG", "png", {}), ("WEBP", "webp", {"lossless": True})],
)
def test_fine_images_keep_their_bytes(tmp_path: Path, kind: str, member: str, options: dict[str, Any]) -> None:
    data = encoded(PHOTO, kind, **options)
    samples, reasons = outcomes(folder(tmp_path, {"a/photo.bin.jpg": data}))  # the suffix is not what decides
    assert not reasons
    sample, columns = samples["a/photo.bin.jpg"]
    assert sample.members[member] == data
    assert json.loads(bytes(sample.members["json"])) == {"width": 40, "height": 24}
    assert columns == {"file": "a/photo.bin.jpg", "member": member, "width": 40, "height": 24}
    assert set(sample.members) == {member, "json"}


def test_an_upright_exif_keeps_bytes_and_a_rotated_one_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    upright = encoded(PHOTO, "JPEG", quality=95, exif=exif.tobytes())
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = encoded(PHOTO, "JPEG", quality=95, exif=exif.tobytes())
    samples, reasons = outcomes(folder(tmp_path, {"upright.jpg": upright, "turned.jpg": turned}))
    assert not reasons
    assert samples["upright.jpg"][0].members["jpg"] == upright
    sample, columns = samples["turned.jpg"]
    assert (columns["member"], columns["width"], columns["height"]) == ("png", 24, 40)
    plain = np.asarray(Image.open(io.BytesIO(upright)))
    assert np.array_equal(pixels(sample), np.rot90(plain, -1))


def test_a_rotated_tiff_is_turned_once(tmp_path: Path) -> None:
    samples, reasons = outcomes(folder(tmp_path, {"a.tif": encoded(PHOTO, "TIFF", tiffinfo={0x0112: 6})}))
    assert not reasons
    assert np.array_equal(pixels(samples["a.tif"][0]), np.rot90(np.asarray(PHOTO), -1))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    samples, reasons = outcomes(folder(tmp_path, {"red.jpg": encoded(cmyk, "JPEG", quality=95)}))
    assert not reasons
    sample, columns = samples["red.jpg"]
    assert columns["member"] == "png"
    red, green, blue = pixels(sample)[4, 4]
    assert red > 240
    assert max(green, blue) < 15


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    rgba = Image.new("RGBA", (4, 4), (0, 255, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 0, 255))
    keyed = Image.new("RGB", (4, 4), (9, 9, 9))
    keyed.putpixel((0, 0), (1, 2, 3))
    files = {
        "palette.png": encoded(palette, "PNG", transparency=0),
        "rgba.png": encoded(rgba, "PNG"),
        "rgba.webp.png": encoded(rgba, "WEBP", lossless=True, exact=True),
        "keyed.png": encoded(keyed, "PNG", transparency=(9, 9, 9)),
    }
    samples, reasons = outcomes(folder(tmp_path, files))
    assert not reasons
    for name, first in (("palette", (0, 0, 255)), ("rgba", (0, 0, 0)), ("rgba.webp", (0, 0, 0)), ("keyed", (1, 2, 3))):
        got = pixels(samples[f"{name}.png"][0])
        assert tuple(got[0, 0]) == first, name
        assert (got[2:, 2:] == 255).all(), name
        assert samples[f"{name}.png"][1]["member"] == "png"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    rows = b"".join(b"\0" + b"".join(struct.pack(">HHH", v, v, v) for v in row) for row in ramp)
    files = {"grey.png": encoded(Image.fromarray(ramp), "PNG"), "colour.png": png_of_size(16, 16, 16, 2, rows)}
    files["tiff.tif"] = encoded(Image.fromarray(ramp), "TIFF")
    samples, reasons = outcomes(folder(tmp_path, files))
    assert not reasons
    for name in files:
        got = pixels(samples[name][0])
        assert np.array_equal(got[..., 0], (ramp // 257).astype(np.uint8)), name
        stored = samples[name][0].members["png"]
        assert stored != files[name]
        assert stored[24] == 8  # IHDR's bit depth


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_other_formats_become_png(tmp_path: Path, kind: str) -> None:
    image = PHOTO.quantize(16)
    samples, reasons = outcomes(folder(tmp_path, {f"a.{kind.lower()}": encoded(image, kind)}))
    assert not reasons
    assert np.array_equal(pixels(samples[f"a.{kind.lower()}"][0]), np.asarray(image.convert("RGB")))


def test_a_phone_picture_with_a_second_picture_inside_is_a_jpeg(tmp_path: Path) -> None:
    data = encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((10, 6))])
    samples, reasons = outcomes(folder(tmp_path, {"phone.jpg": data}))
    assert not reasons
    assert samples["phone.jpg"][0].members["jpg"] == data


def test_grey_and_a_single_pixel(tmp_path: Path) -> None:
    files = {
        "grey.jpg": encoded(Image.new("L", (8, 8), 77), "JPEG"),
        "dot.png": encoded(PHOTO.crop((0, 0, 1, 1)), "PNG"),
    }
    samples, reasons = outcomes(folder(tmp_path, files))
    assert not reasons
    assert (pixels(samples["grey.jpg"][0]) == 77).all()
    assert samples["dot.png"][0].members["png"] == files["dot.png"]
    assert pixels(samples["dot.png"][0]).shape == (1, 1, 3)


def test_normalised_images_carry_no_colour_profile(tmp_path: Path) -> None:
    grey = encoded(Image.new("L", (8, 8), 77), "PNG", icc_profile=b"not of RGB")
    samples, _ = outcomes(folder(tmp_path, {"grey.png": grey}))
    assert b"iCCP" in grey
    assert b"iCCP" not in samples["grey.png"][0].members["png"]


def test_broken_images_are_quarantined_by_name(tmp_path: Path) -> None:
    jpeg, progressive = encoded(PHOTO, "JPEG"), encoded(PHOTO, "JPEG", progressive=True)
    png, webp = encoded(PHOTO, "PNG"), encoded(PHOTO, "WEBP")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    files = {
        "cut.jpg": jpeg[: len(jpeg) * 2 // 3],
        "cut_progressive.jpg": progressive[: len(progressive) * 2 // 3],
        "cut_header.jpg": jpeg[:30],
        "cut_p.png": png[: len(png) * 2 // 3],
        "cut_w.webp": webp[: len(webp) * 2 // 3],
        "text.png": b"this is no image at all\n" * 20,
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "empty.jpg": b"",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "drawing.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",  # must never reach Ghostscript
        "film.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "float.tif": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    }
    samples, reasons = outcomes(folder(tmp_path, {**files, "good.jpg": jpeg}))
    assert set(samples) == {"good.jpg"}
    assert set(reasons) >= {"cut_header.jpg", "phone.heic", "float.tif"}
    for name in ("cut.jpg", "cut_progressive.jpg", "cut_p.png"):
        assert reasons[name] == "truncated image", name
    for name in ("text.png", "page.jpg", "drawing.png"):
        assert reasons[name].startswith("not an image"), name
    for name in ("film.gif", "pages.tif"):
        assert reasons[name].startswith("more than one frame"), name
    assert reasons["empty.jpg"] == "empty file"
    assert outcomes(folder(tmp_path, {}))[1] == reasons  # the same words every time: they are part of the manifest
    assert not [reason for reason in reasons.values() if "0x" in reason]


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    data = folder(tmp_path, {"bomb.png": png_of_size(50_000, 50_000), "strip.png": png_of_size(200_000_001, 1)})
    _, reasons = outcomes(data)
    assert reasons["bomb.png"] == "50000x50000 pixels are more than data.max_pixels=100000000"
    assert "200000001x1 pixels" in reasons["strip.png"]


def test_the_pixel_limit_is_a_setting_and_exact(tmp_path: Path) -> None:
    files = {"a.png": encoded(PHOTO, "PNG")}
    assert not outcomes(folder(tmp_path, files, max_pixels=40 * 24))[1]
    assert outcomes(folder(tmp_path, files, max_pixels=40 * 24 - 1))[1]


def test_a_file_longer_than_any_image_is_not_read(tmp_path: Path) -> None:
    data = folder(tmp_path, {"huge.png": b""}, max_pixels=100)
    with open(tmp_path / "pictures" / "huge.png", "r+b") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it would fail this test
    assert "longer than any" in outcomes(data)[1]["huge.png"]


# ------------------------------------------------------------------------------------------------ captions

PNG = encoded(PHOTO, "PNG")


def test_sidecar_captions(tmp_path: Path) -> None:
    files = {
        "a/good.png": PNG, "a/good.txt": "\ufeff Ein Kätzchen\n".encode(),
        "long.png": PNG, "long.txt": b"x" * 10_000,
        "just.png": PNG, "just.txt": "ä".encode() * 4_096,
        "latin.png": PNG, "latin.txt": "Kätzchen".encode("latin-1"),
        "wide.png": PNG, "wide.txt": "cat".encode("utf-16-le"),
        "empty.png": PNG, "empty.txt": b" \n",
        "alone.png": PNG,
        "lost.txt": b"an image that went missing",
        "twice.png": PNG, "twice.txt": b"1", "twice.TXT": b"2",
        "gb.png": PNG, "gb.txt": b"x" * 200_000,
    }  # fmt: skip
    samples, reasons = outcomes(folder(tmp_path, files, "sidecar"))
    assert {name: bytes(sample.members["txt"]).decode() for name, (sample, _) in samples.items()} == {
        "a/good.png": "Ein Kätzchen",
        "just.png": "ä" * 4_096,
    }
    assert samples["a/good.png"][1]["caption"] == "Ein Kätzchen"
    assert reasons == {
        "long.png": "caption of 10000 characters is longer than data.max_caption=4096",
        "latin.png": "caption is not UTF-8",
        "wide.png": "caption is not UTF-8 text: it holds NUL",
        "empty.png": "caption is empty",
        "alone.png": "caption is missing: no .txt beside it",
        "lost.txt": "caption without an image",
        "twice.png": "more than one caption",
        "gb.png": "caption file of 200000 bytes is longer than any that is allowed",
    }


ROWS = [
    ("a.png", "a cat"),
    ("sub/../b.png", "a dog, asleep"),
    ("missing.png", "nobody"),
    ("../outside.png", "a secret"),
    ("twice.png", "one"),
    ("twice.png", "two"),
    ("long.png", "x" * 200_000),
]
ROW_REASONS = {
    "missing.png": "row of data.table that names no image under data.path",
    "../outside.png": "row of data.table that names no image under data.path",
    "twice.png": "2 rows of data.table name it",
    "long.png": "caption of 200000 characters is longer than data.max_caption=4096",
    "extra.png": "caption is missing: no row names it",
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_captions_in_a_table(tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"captions{suffix}"
    if suffix == ".csv":
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("path", "text"), *ROWS])
    elif suffix == ".jsonl":
        table.write_text("\n".join(json.dumps({"path": name, "text": text}) for name, text in ROWS))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"path": [name for name, _ in ROWS], "text": [text for _, text in ROWS]}), table)
    (tmp_path / "outside.png").write_bytes(PNG)
    files = dict.fromkeys(("a.png", "b.png", "twice.png", "long.png", "extra.png"), PNG)
    data = folder(tmp_path, files, "table", table=str(table), file_column="path", caption_column="text")
    samples, reasons = outcomes(data)
    assert {name: columns["caption"] for name, (_, columns) in samples.items()} == {
        "a.png": "a cat",
        "b.png": "a dog, asleep",
    }
    assert reasons == ROW_REASONS


def test_rows_that_cannot_be_understood_are_named(tmp_path: Path) -> None:
    files = dict.fromkeys(("a.png", "b.png", "c.png", "d.png"), PNG)
    (tmp_path / "t.csv").write_bytes(
        b"file,caption\na.png,a cat, asleep\nb.png,caf\xe9\nc.png\n,nothing\nd.png,fine\nodd\xff.png,x\n"
    )
    samples, reasons = outcomes(folder(tmp_path, files, "table", table=str(tmp_path / "t.csv")))
    assert set(samples) == {"d.png"}
    assert reasons == {
        "a.png": "row has more cells than the header: put its caption in quotes",
        "b.png": "caption is not UTF-8",
        "c.png": "caption is missing in its row",
        "data.table row 4": "row without file",
        "odd\\xff.png": "row of data.table that names no image under data.path",
    }
    (tmp_path / "t.jsonl").write_bytes(
        b'{"file": "d.png", "caption": "fine"}\n{"file": "a.png"\n[1]\n\n'
        b'{"file": "b.png", "caption": "\\ud800"}\n{"file": "c.png", "caption": null}\n'
    )
    samples, reasons = outcomes(folder(tmp_path, files, "table", table=str(tmp_path / "t.jsonl")))
    assert set(samples) == {"d.png"}
    assert reasons == {
        "a.png": "caption is missing: no row names it",
        "b.png": "caption is not UTF-8",
        "c.png": "caption is missing in its row",
        "data.table row 2": "row is not a JSON object",
        "data.table row 3": "row is not a JSON object",
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "is not a file"),
        ("t.xlsx", b"", "must be a .csv, .jsonl or .parquet"),
        ("t.csv", b"image,caption\n", "no column 'file' but image, caption: set data.file_column"),
        ("t.jsonl", b'{"file": "a.png", "alt": "x"}\n', "no column 'caption' but alt, file: set data.caption_column"),
        ("t.parquet", b"file,caption\n", "is not a Parquet file"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    data = folder(tmp_path, {"a.png": PNG}, "table", table=str(tmp_path / name))
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_source(data).listing()


def test_folders_that_name_classes(tmp_path: Path) -> None:
    names = ("tabby_cat/1.png", "tabby_cat/deep/2.png", "dog/1.png", "dog/notes.md", "loose.png")
    data = folder(tmp_path, dict.fromkeys(names, PNG), "folder_name")
    listing = open_source(data).listing()
    assert listing.classes == ("dog", "tabby_cat")
    assert listing.passed_by == {".md": 1}
    samples, reasons = outcomes(data)
    about = {name: (columns["label"], columns["caption"]) for name, (_, columns) in samples.items()}
    assert about == {
        "tabby_cat/1.png": (1, "tabby cat"),
        "tabby_cat/deep/2.png": (1, "tabby cat"),
        "dog/1.png": (0, "dog"),
    }
    assert json.loads(bytes(samples["dog/1.png"][0].members["json"]))["label"] == 0
    assert set(reasons) == {"loose.png"}


# ------------------------------------------------------------------------------------------------ names, links, keys


def test_two_files_with_one_stem_are_both_quarantined(tmp_path: Path) -> None:
    decomposed = "caf\u0065\u0301.png"  # as a Mac writes it
    files = dict.fromkeys(("cat.png", "cat.jpg", "caf\u00e9.png", decomposed, "sub/cat.png", "only.png"), PNG)
    samples, reasons = outcomes(folder(tmp_path, files))
    assert set(samples) == {"sub/cat.png", "only.png"}
    assert set(reasons) == {"cat.png", "cat.jpg", "caf\u00e9.png", decomposed}
    assert set(reasons.values()) == {"2 files have this stem: rename all but one"}


def test_links_never_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "secret.txt").write_bytes(b"password")
    data = folder(
        tmp_path, {"real.png": PNG, "real.txt": b"fine", "bait.png": PNG, "sub/x.png": PNG, "sub/x.txt": b"x"}
    )
    data = folder(tmp_path, {}, "sidecar")
    root = tmp_path / "pictures"
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "bait.txt").symlink_to(tmp_path / "secret.txt")
    (root / "up.png").symlink_to("../secret.png")
    (root / "nothing.png").symlink_to("gone.png")
    (root / "loop").symlink_to(root)
    (root / "inside.png").symlink_to("sub/x.png")
    (root / "inside.txt").symlink_to("sub/x.txt")
    samples, reasons = outcomes(data)
    assert set(samples) == {"real.png", "sub/x.png", "inside.png"}
    assert reasons == {
        "out.png": "link that leads out of data.path",
        "up.png": "link that leads out of data.path",
        "bait.png": "caption is a link that leads out of data.path",
        "nothing.png": "broken link",
        "loop": "link to a folder, which is not followed",
    }


def test_names_that_cannot_be_keys_and_files_that_are_none(tmp_path: Path) -> None:
    data = folder(tmp_path, {"good.png": PNG, "日本 語.png": PNG, ".hidden.png": PNG, "README": b"", "x.md": b""})
    root = os.fsencode(tmp_path / "pictures")
    with open(root + b"/bad\xff.png", "wb") as file:
        file.write(PNG)
    os.mkfifo(root + b"/pipe.png")  # opening it would wait for ever
    samples, reasons = outcomes(data)
    assert set(samples) == {"good.png", "日本 語.png"}
    assert reasons == {
        "bad\\xff.png": "name is not UTF-8: it cannot become a key",
        "pipe.png": "not a regular file",
    }
    assert open_source(data).listing().passed_by == {".md": 1, "hidden": 1, "no suffix": 1}


def test_a_file_that_vanishes_after_the_listing_is_named(tmp_path: Path) -> None:
    data = folder(tmp_path, {"a.png": PNG})
    source = open_source(data)
    (item,) = source.listing().items
    (tmp_path / "pictures" / "a.png").unlink()
    assert read(item, source.load(item), data) == "image cannot be opened: No such file or directory"


def test_keys_are_safe_unique_and_stable(tmp_path: Path) -> None:
    names = ["a/b c.png", "a/b-c.png", "a-b/c.png", "Über.png", "ber.png", "日本.png", "日木.png", "v1.2/x.y.z.png"]
    names += ["x" * 200 + ".png", "new\nline.png", "-.png", "deep/" * 20 + "x.png"]
    keys = {name: sample.key for name, (sample, _) in outcomes(folder(tmp_path, dict.fromkeys(names, PNG)))[0].items()}
    assert len(set(keys.values())) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,64}", key) for key in keys.values()), keys
    more = folder(tmp_path, {"a/a.png": PNG, "zzz.png": PNG})
    (tmp_path / "pictures" / "ber.png").unlink()
    after = {name: sample.key for name, (sample, _) in outcomes(more)[0].items()}
    assert {name: key for name, key in after.items() if name in keys} == {
        n: k for n, k in keys.items() if n != "ber.png"
    }
    assert keys["a/b c.png"] == "a-b-c-" + keys["a/b c.png"][-16:]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path=.*nowhere.* is not a folder"):
        open_source(Data(name="x", kind="folder", path=str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------ order and shards


def test_shards_are_full_ranges_and_one_new_item_costs_one_shard() -> None:
    items = [Item(f"class{i % 10}/{i}.png", f"k{i}") for i in range(3_000)]
    parts = split(items, 0.1)
    assert 200 < len(parts["held_out"]) < 400

    def shards(items: list[Item]) -> set[tuple[str, ...]]:
        ranges = list(cut(items, 256))
        assert ranges[0][0] == 0
        assert ranges[-1][1] == len(items)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
        assert all(0 < stop - start <= 256 for start, stop in ranges)
        return {tuple(item.name for item in items[start:stop]) for start, stop in ranges}

    before = shards(parts["train"])
    assert len(before) <= 2 * len(parts["train"]) / 256
    assert min(len({name[:6] for name in names}) for names in before) == 10  # classes are mixed
    for index in range(20):
        more = split([*items, Item(f"new{index}.png", f"new{index}")], 0.1)
        changed = {name for name in parts if more[name] != parts[name]}
        assert len(changed) == 1
        assert len(before - shards(more["train"])) == (changed == {"train"})
    reordered = split(items[::-1], 0.1)
    assert reordered == parts


def test_cutting_ends_even_for_one_item_a_shard() -> None:
    items = split([Item(f"{i}.png", f"k{i}") for i in range(50)], 0)["train"]
    assert list(cut(items, 1)) == [(i, i + 1) for i in range(50)]
    assert list(cut([], 10)) == []


def test_shards_of_big_files_hold_fewer() -> None:
    """A worker holds a whole shard."""
    items = split([Item(f"{i}.png", f"k{i}", size=10 + 90 * (i % 7 == 0)) for i in range(700)], 0)["train"]
    ranges = list(cut(items, 256, 1000))
    assert [ranges[0][0], ranges[-1][1]] == [0, 700]
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    assert all(sum(item.size for item in items[start:stop]) <= 1000 for start, stop in ranges)
    assert len(ranges) < 60
    assert len(list(cut(items, 256, 1))) == 700, "one is never too many"


# ------------------------------------------------------------------------------------------------ digits


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    data = Data(name="digits", image_size=32)
    source = open_source(data)
    listing = source.listing()
    assert len(listing.items) == 1_797
    assert listing.classes == WORDS
    for index in (0, 17, 1_796):
        item = listing.items[index]
        outcome = read(item, source.load(item), data)
        assert not isinstance(outcome, str)
        sample, _ = outcome
        assert set(sample.members) == {"png", "txt", "json"}
        label = int(load_digits().target[index])
        assert json.loads(bytes(sample.members["json"])) == {"width": 32, "height": 32, "label": label}
        assert bytes(sample.members["txt"]).decode() in {caption_of(label, phrasing) for phrasing in PHRASINGS}
        got = pixels(sample)
        assert got.shape == (32, 32, 3)
        means = got[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        real = load_digits().images[index] * 255 / 16
        assert np.corrcoef(means.ravel(), real.ravel())[0, 1] > 0.97
        assert source.load(item) == source.load(item)


def test_every_digit_is_described_in_every_way_and_unseen_phrasings_are_unseen() -> None:
    captions = Counter(
        (item.label, (item.caption or b"").decode()) for item in open_source(Data(name="digits")).listing().items
    )
    assert {(digit, caption_of(digit, phrasing)) for digit in range(10) for phrasing in PHRASINGS} == set(captions)
    assert caption_of(8, "{a} {word}") == "an eight"
    assert caption_of(7, "digit {numeral}, written by hand") == "digit 7, written by hand"
    trained = {caption for _, caption in captions}
    words = {word for caption in trained for word in re.findall(r"\w+|,", caption)}
    for digit in range(10):
        for phrasing in UNSEEN_PHRASINGS:
            caption = caption_of(digit, phrasing)
            assert caption not in trained
            assert set(re.findall(r"\w+|,", caption)) <= words
    assert "{word}, handwritten" in UNSEEN_PHRASINGS


def test_png_bytes_depend_on_pixels_only() -> None:
    marked = PHOTO.copy()
    marked.info["icc_profile"] = b"x"
    assert to_png(marked) == to_png(PHOTO)
