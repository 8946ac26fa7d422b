"""Caching latents on one GPU, with the architecture of Stable Diffusion's autoencoder: images per second.

    python tests/bench/cache.py --gpu [--images 2048] [--edges 256 512] [--device cuda:0] [--batch 32]

    bare   its encoder on a batch that lies on the device: bf16, channels_last, compiled
    ours   the body of the job cache_latents in this process: WebDataset shards of JPEGs -> decoded beside the encoder
           -> latents, hashed and committed; without Ray and MLflow, which need not be installed

Weights are random: they cost as much as any.  On a CPU (--device cpu) it computes in float32.  The ceiling is what an
H100's 798 TF/s (bf16, dense) would give for 0.273 TFLOP an image at 256 px and 1.117 at 512.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

WARM = 2  # shards that compile and fill caches
TFLOP = {256: 0.273, 512: 1.117}  # of one image, forward
PEAK = 798.0  # TF/s


def weights(folder: Path) -> str:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **kinds)
    model.save_pretrained(folder)
    return str(folder)


def dataset(root: Path, edge: int, images: int, shard: int) -> None:
    """JPEGs a quarter larger than what they are resized to, as data sets are."""
    import io

    from calotype.data import shards
    from calotype.data.manifest import DATASET, Manifest, publish_dataset
    from calotype.data.store import open_store
    from PIL import Image

    store, rows, large = open_store(str(root)).at("datasets", "bench"), [], edge * 5 // 4
    random = np.random.default_rng(0)
    files = []
    for _ in range(16):
        small = Image.fromarray(random.integers(0, 256, (large // 8, large // 8, 3), np.uint8))
        file = io.BytesIO()
        small.resize((large, large), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    for first in range(0, images, shard):
        samples = [
            shards.Sample(f"{number:06d}", {"jpg": files[number % 16], "txt": b"a picture", "json": b"{}"})
            for number in range(first, min(first + shard, images))
        ]
        rows.append(shards.write_shard(store, f"shards/{first:06d}.tar", samples, 256))
    publish_dataset(store, Manifest(DATASET, "bench", ("jpg", "json", "txt"), tuple(rows)))


def bare(config: Any, device: str, edge: int, images: int) -> float:
    import torch
    from calotype.model.autoencoder import load_autoencoder
    from calotype.tasks import encode

    model = load_autoencoder(config.autoencoder).for_encoding(config.encoding, device)
    size = config.encoding.batch
    batch, batches = torch.rand(size, 3, edge, edge, device=device) * 2 - 1, max(images // size, 1)
    with encode.exactly(1) as pool:

        def run(many: int) -> float:
            began = time.perf_counter()
            for _ in range(many):
                found = model.encode(batch)[0]
            found.cpu()
            return time.perf_counter() - began

        pool.submit(run, 3).result()
        return size * batches / pool.submit(run, batches).result()


def ours(config: Any, device: str, threads: int) -> tuple[float, dict[str, float]]:
    from calotype.environment import Worker
    from calotype.tasks import cache
    from calotype.tasks.tally import Tally

    encode_shard, units = cache.make(config, Worker(device=device, threads=threads)), cache.plan(config)
    first = [encode_shard(unit) for unit in units[:WARM]]
    began = time.perf_counter()
    made = [encode_shard(unit) for unit in units[WARM:]]
    seconds = time.perf_counter() - began
    cache.commit(config, first + made)
    return sum(one.images for one in made) / seconds, Tally(made).speeds()


def main(images: int, edges: list[int], device: str, batch: int) -> None:
    import torch
    from calotype.config import Accept, Autoencoder, CacheLatents, Cluster, Data, Encoding, Track
    from calotype.tasks import cache

    cuda = device.startswith("cuda")
    threads = len(os.sched_getaffinity(0))
    print(f"{torch.cuda.get_device_name(device) if cuda else device}, torch {torch.__version__}, {threads} threads")
    print(f"{'':6}{'bare':>10}{'ours':>10}{'of bare':>9}{'of ceiling':>12}  busy %, decode % of the threads")
    with tempfile.TemporaryDirectory() as folder:
        path = weights(Path(folder, "weights"))
        for edge in edges:
            root = Path(folder, str(edge))
            dataset(root, edge, images, max(images // 8, batch))
            encoding = Encoding(resolution=edge, batch=batch, precision="bf16" if cuda else "fp32", compile=cuda)
            config = CacheLatents(
                name="bench", root=str(root), data=Data(name="bench"), encoding=encoding, accept=Accept(psnr=0),
                autoencoder=Autoencoder(kind="pretrained", path=path), track=Track(kind="none"),
                cluster=Cluster(kind="local", gpus=float(cuda), cpus=threads),
            )  # fmt: skip
            config = cache.resolve(replace(config, conditions={}))
            alone = bare(config, device, edge, images)
            rate, spent = ours(config, device, threads)
            share = f"{rate * TFLOP[edge] / PEAK:12.2f}" if cuda and edge in TFLOP else f"{'-':>12}"
            print(f"{edge:4}px{alone:10.1f}{rate:10.1f}{rate / alone:9.2f}{share}  "
                  f"{spent['encoder_busy_percent']:.0f}, {spent['decode_percent']:.0f}", flush=True)  # fmt: skip
