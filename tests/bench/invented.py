"""Source shards that nobody wrote, and what workers would have made of them: for cache_scale.py."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from calotype.config import Accept, Autoencoder, CacheLatents, Condition, Data, Encoding
from calotype.data import shards
from calotype.data.manifest import DATASET, Manifest, Shard, publish_dataset
from calotype.data.store import open_store
from calotype.tasks.accept import Decoded
from calotype.tasks.made import CHUNK_SAMPLES, Made, Spent

CHANNELS, EDGE, TOKENS = 4, 32, 77  # latents of 256 px, token ids: 16 KB of posterior and 0.3 KB of text
IMAGE = 100_000  # bytes of a source image


def config_of(name: str) -> CacheLatents:
    """A resolved config: digests are filled in, but the dataset's."""
    autoencoder = Autoencoder(kind="pretrained", path="simulated", f=8, channels=CHANNELS, digest="e" * 64)
    return CacheLatents(
        name=name, root=f"s3://simulated/{name}", data=Data(name="photographs"), autoencoder=autoencoder,
        encoding=Encoding(resolution=8 * EDGE), conditions={"text": Condition(digest="7" * 64)}, accept=Accept(psnr=20),
    )  # fmt: skip


def dataset(name: str, count: int, images: int) -> CacheLatents:
    """The config of a cache of so many source shards, with their manifest's digest; only that is written."""
    config = config_of(name)
    step = shards.CHUNK // IMAGE
    size = images * IMAGE
    splits = ["train"] * (count - 1) + ["held_out"]
    rows = tuple(
        Shard(f"shards/{at:06d}.tar", size, images, step, sha(at), sha(~at), "", split, "", step * IMAGE)
        for at, split in enumerate(splits)
    )
    store = open_store(config.root).at("datasets", config.data.name)
    digest = publish_dataset(store, Manifest(DATASET, "photographs", ("jpg", "json", "txt"), rows))
    return replace(config, data=replace(config.data, digest=digest))


def sparse(size: int) -> Path:
    """A file of so many bytes that takes no room."""
    path = Path(tempfile.gettempdir(), f"calotype-{os.getpid()}.tar")
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def sha(number: int) -> str:
    return f"{random.Random(number).getrandbits(256):064x}"


def content(unit: Shard) -> dict[str, Any]:
    """What the sidecar of a latent shard says; its figures depend on the source alone."""
    draw = random.Random(unit.sha256)
    sample = 2 * 2 * CHANNELS * EDGE**2 + 4 * TOKENS + 3 * 512 + 400
    each = max(1, min(CHUNK_SAMPLES, shards.CHUNK // sample))
    offsets = [min(at, unit.samples) * sample for at in range(0, unit.samples + each, each)]
    hashes = [f"{draw.getrandbits(256):064x}" for _ in offsets[1:]]
    arrays = {"latent.npy": {"dtype": "<f2", "shape": [2, CHANNELS, EDGE, EDGE]}}
    return {
        "split": unit.split, "source_sha256": unit.sha256, "columns_sha256": "", "bytes": unit.samples * sample + 1024,
        "samples": unit.samples, "chunk_samples": each, "chunk_bytes": each * sample, "buckets": [],
        "sha256": f"{draw.getrandbits(256):064x}", "chunks": {"offsets": offsets, "blake3": hashes},
        "members": ["json", "latent.npy", "text.npy"],
        "arrays": arrays | {"text.npy": {"dtype": "<i4", "shape": [TOKENS]}},
    }  # fmt: skip


def judged(unit: Shard, shard: Shard, worker: int, spent: float) -> Made:
    draw = random.Random(unit.sha256)
    count = unit.samples * EDGE**2
    sums = {name: [draw.gauss(0.5, 0.01) * count for _ in range(CHANNELS)] for name in ("sum", "squares", "variance")}
    figures = {"count": count, **sums, "largest": draw.uniform(3, 9), "labels": 0, "cut": draw.randrange(9)}
    decoded = tuple(Decoded(f"{unit.key[7:13]}{at:04d}", round(draw.gauss(31, 2), 2), 31.0) for at in range(2))
    device = "NVIDIA H100 80GB HBM3; torch 2.13.0; diffusers 0.42.1"
    return Made(unit, shard, figures, device, (), decoded, unit.samples, Spent(worker, 8, spent, spent, spent, 2.0))
