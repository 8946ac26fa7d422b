"""Caching latents beside the bare encoder and beside other people's ways of doing it, on two cores.

    python tests/bench/cache.py [--images 2400] [--rounds 1] [--cheap] [--bytes]

    bare      two processes encode tensors that are in memory already: no decoding, no store, no checks
    ours      the job cache_latents with two workers on Ray: S3 in, S3 out, verified, its start included
    files     two processes: webdataset -> encoder -> one .npy per image in S3, as most scripts do
    ray data  read_webdataset -> map_batches on two actors -> Parquet in S3

One thread each.  The encoder costs more than 50 ms an image (--cheap: some 20).  Starts the embedded stack where it is
not up.

And what a sample takes (cache_bytes.py; --bytes: this alone, without the stack).
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "platform")]

import cache_bytes  # noqa: E402
import cache_gpu  # noqa: E402

SIZE, BATCH, WORKERS = 128, 16, 2
SHARD = 96  # images: whole batches, for the last one of a shard is padded
CHANNELS = {False: (16, 32), True: (4, 4)}  # of the encoder, by --cheap


def pictures(folder: Path, count: int) -> None:
    """JPEGs of 160 x 128 px, smooth as photographs are, each with a caption."""
    from PIL import Image

    for number in range(count):
        draw = np.random.default_rng(number)
        small = Image.fromarray(draw.integers(0, 256, (8, 10, 3), np.uint8))
        small.resize((160, 128), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)
        (folder / f"{number:05d}.txt").write_text(f"picture {number}")


def encoder(folder: str) -> Any:
    import torch
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def encoded(model: Any, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 (B, 3, S, S) -> float16 (B, 2, C, h, w)."""
    import torch

    with torch.no_grad():
        found = model.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist
        return torch.stack([found.mean, found.std], 1).half().numpy()


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    from calotype.data import images

    return images.decode(data, SIZE).pixels


# ------------------------------------------------------------------------------------------- entrants


def bare(weights: str, root: str, tars: Sequence[str], ready: Any, count: int) -> int:
    model = encoder(weights)
    batch = np.random.default_rng(0).integers(0, 256, (BATCH, 3, SIZE, SIZE), np.uint8)
    encoded(model, batch)
    ready.wait()
    for _ in range(count // BATCH):
        encoded(model, batch)
    return count // BATCH * BATCH


def files(weights: str, root: str, tars: Sequence[str], ready: Any, count: int) -> int:
    import boto3
    import webdataset as wds

    client = boto3.client("s3")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")

    def opened(url: str, *_: Any, **__: Any) -> Any:
        return io.BufferedReader(client.get_object(Bucket=bucket, Key=url.split("/", 3)[3])["Body"]._raw_stream)

    wds.gopen_schemes["s3"] = opened
    model, done = encoder(weights), 0
    ready.wait()
    data = wds.WebDataset([f"s3://{bucket}/{key}" for key in tars], shardshuffle=False).to_tuple("__key__", "jpg")
    for names, raw in data.batched(BATCH, collation_fn=lambda rows: tuple(zip(*rows))):
        for name, latent in zip(names, encoded(model, np.stack([decoded(one) for one in raw]))):
            file = io.BytesIO()
            np.save(file, latent)
            client.put_object(Bucket=bucket, Key=f"{prefix}/files/{name}.npy", Body=file.getvalue())
            done += 1
    return done


def _child(body: Callable[..., int], told: Any, *args: Any) -> None:
    try:
        told.put(body(*args))
    except BaseException as error:
        told.put(error)
        args[3].abort()
        raise


def together(body: Callable[..., int], weights: str, root: str, tars: Sequence[str], images: int) -> float:
    """Images per second of WORKERS processes, from when all of them are ready."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(WORKERS + 1), context.Queue()
    each = [(weights, root, tars[rank::WORKERS], ready, images // WORKERS) for rank in range(WORKERS)]
    processes = [context.Process(target=_child, args=(body, told, *args)) for args in each]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    done = 0
    for _ in processes:
        if isinstance(one := told.get(), BaseException):
            raise one
        done += one
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return done / seconds


def ray_data(weights: str, root: str, tars: Sequence[str]) -> tuple[float, float]:
    """(images per second with its start, without it: from the first batch on)."""
    program = Path(__file__).with_name("cache_ray_data.py")
    words = [sys.executable, str(program), weights, root, *tars]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment())
    whole, steady = re.findall(r"^(?:whole|steady) ([\d.]+)$", done.stdout, re.MULTILINE)
    return float(whole), float(steady)


def ours(weights: str, root: str, images: int) -> tuple[float, float]:
    """(images per second of the whole job, of its workers while they encode)."""
    words = [sys.executable, "jobs/cache_latents.py", f"root={root}", *settings(weights)]
    began = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, env=environment())
    whole = time.perf_counter() - began
    steady = re.search(r"^images_per_second\s+\S\s+([\d.,]+)", done.stdout, re.MULTILINE)
    assert steady, done.stdout[-2000:]
    for line in re.findall(r"^(?:\w+_percent|samples_encoded|psnr)\s.*", done.stdout, re.MULTILINE):
        print("   ", " ".join(line.split()))
    return images / whole, float(steady[1].replace(",", ""))


def settings(weights: str) -> list[str]:
    return ["data=folder", "data.name=bench", f"encoding.resolution={SIZE}", f"encoding.batch={BATCH}", "accept.psnr=0",
            "conditions=text_tiny", f"autoencoder.path={weights}", f"cluster.workers={WORKERS}", "track=none",
            f"seed={secrets.randbelow(10**6)}"]  # fmt: skip


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cheap", action="store_true", help="an encoder of some 20 ms an image")
    parser.add_argument("--bytes", action="store_true", help="only what a sample takes")
    gpu = parser.add_argument_group("on one GPU (cache_gpu.py), without Ray and MLflow")
    gpu.add_argument("--gpu", action="store_true", help="with Stable Diffusion's architecture, instead of all above")
    gpu.add_argument("--edges", type=int, nargs="+", default=[256, 512], help="in pixels")
    gpu.add_argument("--device", default="cuda:0")
    gpu.add_argument("--batch", type=int, default=32, help="images of one encoder call")
    options = parser.parse_args()
    if options.gpu:
        cache_gpu.main(options.images, options.edges, options.device, options.batch)
        return
    cache_bytes.tell()
    if options.bytes:
        return
    from calotype.data.manifest import load_dataset
    from calotype.data.store import open_store
    from calotype.environment import load_services

    from tests.caches import autoencoder_folder

    subprocess.run([sys.executable, "-m", "calotype", "up"], check=True, env=environment())
    load_services()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = autoencoder_folder(Path(folder, "weights"), channels=CHANNELS[options.cheap])
        Path(folder, "pictures").mkdir()
        pictures(Path(folder, "pictures"), options.images)
        root = f"s3://bench-{secrets.token_hex(4)}/cache"
        for number in range(options.rounds):
            place = f"{root}-{number}"
            words = ["jobs/prepare.py", f"root={place}", "data=folder", "data.name=bench", "track=none",
                     "cluster=local", f"data.path={folder}/pictures", f"data.shard_samples={SHARD}",
                     "data.held_out=0"]  # fmt: skip
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, env=environment())
            store = open_store(place).at("datasets", "bench")
            tars = [f"{place.split('/', 3)[3]}/datasets/bench/{row.key}" for row in load_dataset(store).shards]
            one = {"bare": together(bare, weights, place, tars, options.images)}
            one["ours, whole job"], one["ours, workers"] = ours(weights, place, options.images)
            one["files"] = together(files, weights, place, tars, options.images)
            one["ray data, whole job"], one["ray data, from its first batch"] = ray_data(weights, place, tars)
            for name, rate in one.items():
                found.setdefault(name, []).append(rate)
                print(f"  round {number + 1}: {name} {rate:.1f} images/s", flush=True)
    base = statistics.median(found["bare"])
    print(f"\nbare encoder: {1000 * WORKERS / base:.0f} ms an image on one thread")
    for name, rates in found.items():
        print(f"{name:<34}{statistics.median(rates):8.1f} images/s  {statistics.median(rates) / base:5.2f} of bare")


if __name__ == "__main__":
    main()
