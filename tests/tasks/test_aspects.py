"""A cache in aspect buckets: a folder of images of all shapes, modes and kinds of damage -> latents -> batches."""

from __future__ import annotations

import io
import json
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from calotype import config as C
from calotype.checks import check
from calotype.compose import as_data
from calotype.data import Dataset, Sample, Stream, cache, filters, shards
from calotype.data.buckets import nearest
from calotype.data.manifest import DATASET, Manifest, Shard, load_dataset, publish_dataset
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import ConfigError
from calotype.tasks import batches, denoiser
from calotype.tasks import cache as task
from PIL import Image

from tests.caches import CONDITIONS, autoencoder_folder, config_of, latents_of, run

ENCODING = C.Encoding(resolution=16, bucket_step=4, bucket_aspect=3.0, batch=4)
SHAPES = [(30, 20), (20, 30), (24, 24), (60, 16), (16, 60), (33, 21), (21, 33), (64, 8), (1, 1), (17, 16)]
MODES = ("RGB", "L", "RGBA", "1", "P", "CMYK", "LA", "I;16", "YCbCr")
SOUND, EACH = 40, 12
SPAWNED = Path(__file__).with_name("spawned.py")


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int) -> tuple[str, bytes]:
    """(member, file): another shape, mode and file type for each number; every seventh turned by EXIF."""
    width, height = SHAPES[number % len(SHAPES)]
    mode = MODES[number % len(MODES)]
    random = np.random.default_rng(number)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (height, width), np.uint16))
    else:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    kind, member = ("JPEG", "jpg") if mode in ("CMYK", "YCbCr", "RGB") else ("PNG", "png")
    exif = Image.Exif()
    exif[0x0112] = 6
    return member, file_of(image, kind, **({"exif": exif} if number % 7 == 0 and mode != "I;16" else {}))


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says so much and holds this."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(data)) + part(b"IEND", b"")


def broken() -> dict[str, dict[str, bytes]]:
    """Name -> members of a sample that has no latent, each for another reason."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    png, jpg, webp, gif = (file_of(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
    bmp, tiff = file_of(noise, "BMP"), file_of(noise, "TIFF")
    middle = len(png) // 2
    return {
        "empty": {"png": b""},
        "text-named-as-an-image": {"jpg": b"this is not an image at all"},
        "half-a-png": {"png": png[:middle]},
        "half-a-jpeg": {"jpg": jpg[: len(jpg) // 2]},
        "half-a-webp": {"webp": webp[: len(webp) // 2]},
        "half-a-gif": {"gif": gif[: len(gif) // 2]},
        "half-a-bmp": {"bmp": bmp[: len(bmp) // 2]},
        "a-tiff-without-its-directory": {"tif": tiff[: len(tiff) // 2]},
        "a-header-alone": {"png": png[:33]},
        "a-flipped-byte": {"png": png[:middle] + bytes([png[middle] ^ 255]) + png[middle + 1 :]},
        "no-width": {"png": png_of(0, 9, b"")},
        "more-pixels-than-allowed": {"png": png_of(60_000, 60_000, b"")},
        "fewer-pixels-than-said": {"png": png_of(64, 64, b"\0" * 50)},
        "postscript": {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
        "numbers-without-a-range": {"tif": file_of(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF")},
        "no-image-member": {"svg": b"<svg/>"},
        "no-utf8": {"txt": b"\xff\xfe caption"},
        "no-json": {"json": b"{"},
        "no-label": {"json": b"{}"},
        "a-word-as-label": {"json": b'{"label": "cat"}'},
    }


def folder(root: Path, held_out: bool = False) -> list[str]:
    """Shards of EACH samples, sound and broken ones in turn; the names of the broken ones, in order."""
    bad = broken()
    samples: list[Sample] = []
    for number in range(SOUND):
        member, data = picture(number)
        about = json.dumps({"label": number % 10}).encode()
        samples.append(Sample(f"s{number:03d}", {member: data, "txt": f"a {number}".encode(), "json": about}))
        if number < len(bad):
            name, members = list(bad.items())[number]
            sound = {} if {"png", "jpg", "webp", "gif", "bmp", "tif", "svg"} & set(members) else {"png": data}
            if member != "png" and sound:
                sound = {member: data}
            samples.append(Sample(name, {"txt": b"a", "json": about, **sound, **members}))
    store = open_store(str(root)).at("datasets", "toy")
    rows = []
    for first in range(0, len(samples), EACH):
        split = "held_out" if held_out and not first else "train"
        rows.append(shards.write_shard(store, f"shards/{first:03d}.tar", samples[first : first + EACH], 5, split, {}))
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), tuple(rows)))
    return list(bad)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return autoencoder_folder(tmp_path_factory.mktemp("autoencoder"))


def config_in(root: Path, weights: str, **changes: Any) -> C.CacheLatents:
    data = C.Data(name="toy", error_budget=len(broken()))
    return config_of(root, weights, **{"encoding": ENCODING, "data": data, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, weights: str) -> tuple[C.CacheLatents, list[str], dict[str, Any]]:
    root = tmp_path_factory.mktemp("aspects")
    bad = folder(root)
    config = config_in(root, weights)
    return config, bad, run(config)


def manifest_of(config: Any) -> Manifest:
    return cache.load_cache(open_store(config.root), config)


def test_exactly_the_broken_ones_are_left_out_by_name(made: tuple[C.CacheLatents, list[str], dict[str, Any]]) -> None:
    config, bad, figures = made
    assert len(bad) == 20
    lost = manifest_of(config).meta["quarantined"]
    assert [one["key"] for one in lost] == bad
    assert len({one["reason"] for one in lost}) > 12
    assert (figures["samples"], figures["quarantined"]) == (SOUND, 20)


def test_every_image_lies_in_the_bucket_of_its_shape(made: tuple[C.CacheLatents, list[str], dict[str, Any]]) -> None:
    config, _, _ = made
    manifest, sizes = manifest_of(config), cache.sizes_of(ENCODING)
    assert manifest.meta["buckets"] == [[4, height // 2, width // 2] for width, height in sizes]
    assert {bucket for shard in manifest.shards for bucket, _ in shard.buckets} == set(range(len(sizes)))
    source = load_dataset(open_store(config.root).at("datasets", "toy"))
    keys = []
    for shard, original in zip(manifest.shards, source.shards, strict=True):
        samples = list(shards.iterate(latents_of(config), [shard]))
        inside = [bucket for bucket, count in shard.buckets for _ in range(count)]
        assert inside == sorted(inside)
        rows = cache.source_rows(latents_of(config), shard, ())
        originals = list(shards.iterate(open_store(config.root).at("datasets", "toy"), [original]))
        for bucket, row, sample in zip(inside, rows, samples, strict=True):
            assert originals[row].key == sample.key
            about = json.loads(bytes(sample.members["json"]))
            assert bucket == nearest(about["width"], about["height"], sizes)
            left, top, right, bottom = about["crop"]
            assert 0 <= left < right <= about["width"]
            assert 0 <= top < bottom <= about["height"]
            shape = cache.decode_sample(sample, ())["latent"].shape
            assert list(shape[1:]) == manifest.meta["buckets"][bucket]
            keys.append(sample.key)
        assert rows == [row for _, row in sorted(zip(inside, rows, strict=True))]
    assert sorted(keys) == [f"s{number:03d}" for number in range(SOUND)]


def test_webdataset_alone_reads_it(made: tuple[C.CacheLatents, list[str], dict[str, Any]]) -> None:
    config, _, _ = made
    tars = [str(path) for path in Path(latents_of(config).uri.removeprefix("file://")).glob("*.tar")]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(read) == SOUND
    assert {one["latent.npy"].shape[:2] for one in read} == {(2, 4)}


def encode_in_process(config: C.CacheLatents, units: list[Shard]) -> list[task.Made]:
    torch.set_num_threads(1)
    encode_shard = task.make(config, Worker(device="cpu", threads=2))
    return [encode_shard(unit) for unit in units]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bytes_for_any_number_of_workers(
    made: tuple[C.CacheLatents, list[str], dict[str, Any]], tmp_path: Path, weights: str, warm: Any, workers: int
) -> None:
    folder(tmp_path)
    config = config_in(tmp_path, weights)
    units = task.plan(config)
    with ProcessPoolExecutor(workers, mp_context=warm) as pool:
        parts = pool.map(
            encode_in_process, [config] * workers, [units[index::workers] for index in reversed(range(workers))]
        )
        task.commit(config, [one for part in parts for one in part])
    stores = [latents_of(one) for one in (config, made[0])]
    found, expected = ({entry.key: store.read(entry.key) for entry in store.list()} for store in stores)
    assert found == expected
    assert manifest_of(config).to_bytes() == manifest_of(made[0]).to_bytes()


def test_what_was_left_out_is_found_again_when_its_maker_died(tmp_path: Path, weights: str) -> None:
    folder(tmp_path)
    config = config_in(tmp_path, weights)
    encode_shard, unit = task.make(config, Worker()), task.plan(config)[0]
    first = encode_shard(unit)
    latents_of(config).delete(cache.latent_key(unit).replace(".tar", ".made.json"))
    again = encode_shard(unit)
    assert again.images == 0
    assert [(one.row, one.key) for one in again.lost] == [(one.row, one.key) for one in first.lost]
    assert again.decoded == first.decoded


def trainer(config: C.CacheLatents, **changes: Any) -> C.TrainDenoiser:
    model = {"_target_": "diffusers.UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1,
             "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "mid_block_type": None,
             "up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4}  # fmt: skip
    encoder = {"_target_": "transformers.CLIPTextModel",
               "config": {"_target_": "transformers.CLIPTextConfig", "hidden_size": 16, "intermediate_size": 32,
                          "num_hidden_layers": 1, "num_attention_heads": 2}}  # fmt: skip
    text = replace(CONDITIONS["text"], encoder=encoder)
    train = {"images": 64, "batch": 4, "window": 8, "log_every": 4, "validate_every": 32, "sample_every": 0}
    return C.TrainDenoiser(
        name="t", root=config.root, seed=3, data=C.Data(name="toy"), autoencoder=config.autoencoder,
        encoding=config.encoding, conditions={**CONDITIONS, "text": text}, denoiser=C.Denoiser(model=model),
        train=C.Train(**{**train, **changes.pop("train", {})}), engine=C.Engine(kind="torch"),
        cluster=C.Cluster(kind="local"), track=C.Track(kind="none"),
    )  # fmt: skip


def test_a_batch_holds_one_shape_and_taken_down_samples_are_in_none(
    made: tuple[C.CacheLatents, list[str], dict[str, Any]], tmp_path: Path
) -> None:
    config, _, _ = made
    taken = tmp_path / "taken.txt"
    taken.write_text("s003\ns017\nempty\n")
    wanted = trainer(config)
    wanted = replace(wanted, data=replace(wanted.data, digest=config.data.digest, takedown=str(taken)))
    root, manifest, store = open_store(config.root), manifest_of(config), latents_of(config)
    data = batches.resolve(wanted.data, config.root, (store, manifest))
    assert batches.resolve(wanted.data, config.root, (store, manifest)) == data
    assert data.selection == filters.publish(  # whatever the cache: it is part of what a run is
        root.at("datasets", "toy"), load_dataset(root.at("datasets", "toy")), [], frozenset({"s003", "s017", "empty"})
    )
    dataset: Dataset = batches.source_of(data, config.root, store, manifest)("train")
    assert len(dataset) == SOUND - 2
    seen: list[str] = []
    with closing(Stream(dataset, seed=1, batch=2, window=8, arrays=("latent",))) as stream:
        for batch, _ in zip(stream, range(60)):
            assert batch.arrays["latent"].shape[0] == 2
            seen += batch.keys
    assert set(seen) == {f"s{number:03d}" for number in range(SOUND) if number not in (3, 17)}


def test_a_denoiser_trains_and_is_validated_on_all_shapes_at_any_world_size(
    tmp_path: Path, weights: str, started: Any
) -> None:
    folder(tmp_path, held_out=True)
    config = config_in(tmp_path, weights)
    run(config)
    wanted = denoiser.resolve(trainer(config))
    held_out = manifest_of(config).split("held_out")
    assert len(held_out[0].buckets) > 2  # so that one of three workers lacks a shape
    points = {}
    for world in (1, 3):
        record = {"job": "train_denoiser", "identity": f"w{world}", "name": "t", "root": config.root,
                  "artifact_root": str(tmp_path / f"w{world}")}  # fmt: skip
        plan = tmp_path / f"plan{world}.json"
        out = tmp_path / f"out{world}.json"
        job = {"config": as_data(wanted), "record": record, "out": str(out)}
        plan.write_text(json.dumps({"world": world, "store": str(tmp_path / f"store{world}"), "jobs": [job]}))
        said = [tmp_path / f"said{world}-{rank}" for rank in range(world)]
        workers = [started(SPAWNED, str(plan), str(rank), said=file) for rank, file in enumerate(said)]
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0] * world, "\n".join(file.read_text() for file in said)
        points[world] = [(images, {name: found[name] for name in ("loss", "validation_loss") if name in found})
                         for images, found in json.loads(out.read_text())["points"]]  # fmt: skip
    assert [images for images, _ in points[1]] == [images for images, _ in points[3]]
    assert sum("validation_loss" in found for _, found in points[1]) == 2
    for (_, one), (_, three) in zip(points[1], points[3], strict=True):
        assert three == pytest.approx(one, rel=1e-4)
    odd = replace(wanted, encoding=replace(ENCODING, bucket_step=2))
    with pytest.raises(ConfigError, match=r"bucket_step=2 makes latents that cannot be halved 1 times"):
        check(odd)


def test_steps_that_the_autoencoder_cannot_halve_are_refused(tmp_path: Path, weights: str) -> None:
    folder(tmp_path)
    config = config_in(tmp_path, weights)
    for step in (3, 5):
        with pytest.raises(ConfigError, match=f"encoding.bucket_step={step} must be a multiple of 2"):
            check(replace(config, encoding=replace(ENCODING, bucket_step=step)))
