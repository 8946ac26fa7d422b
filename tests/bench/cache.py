"""Caching latents beside the bare encoder and beside other people's ways of doing it, on two cores.

    python tests/bench/cache.py [--encoders dear cheap] [--images 2560] [--alone] [--rounds 1] [--bytes]

    bare      two processes encode tensors that are in memory already: no decoding, no store, no checks
    ours      the job cache_latents with two workers on Ray: S3 in, S3 out, verified, compared with its images
    files     two processes: webdataset -> encoder -> one .npy per image in S3, as most scripts do
    ray data  read_webdataset -> map_batches on two actors -> Parquet in S3

One thread each.  The dear encoder costs more than 50 ms an image, the cheap one less than 5.  A whole job is its start,
which is the same for a thousand images and a billion, and then a speed: both are said, and the size from which on the
whole job is 0.90 of the bare encoder.  At the end the job runs on 1, 2 and 3 workers, and must make the same bits.
Starts the embedded stack where it is not up.

And what a sample takes (cache_bytes.py; --bytes: this alone, without the stack).
"""

from __future__ import annotations

import argparse
import hashlib
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

from tests.bench import cache_bytes, cache_gpu  # noqa: E402

BATCH, WORKERS = 16, 2
SHARD = 320  # images at most, of both workers as many; the last batch of a shard is padded
ENCODERS = {"dear": (128, (20, 40)), "cheap": (32, (4, 4))}  # pixels, channels
ASKED = 0.90  # of the bare encoder


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


def decoded(data: bytes, size: int) -> np.ndarray[Any, Any]:
    from calotype.data import images

    return images.decode(data, size).pixels


# ------------------------------------------------------------------------------------------- entrants


def bare(weights: str, size: int, root: str, tars: Sequence[str], ready: Any, count: int) -> int:
    model = encoder(weights)
    batch = np.random.default_rng(0).integers(0, 256, (BATCH, 3, size, size), np.uint8)
    encoded(model, batch)
    ready.wait()
    for _ in range(count // BATCH):
        encoded(model, batch)
    return count // BATCH * BATCH


def files(weights: str, size: int, root: str, tars: Sequence[str], ready: Any, count: int) -> int:
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
        for name, latent in zip(names, encoded(model, np.stack([decoded(one, size) for one in raw]))):
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
        args[4].abort()
        raise


def together(body: Callable[..., int], weights: str, size: int, root: str, tars: Sequence[str], images: int) -> float:
    """Images per second of WORKERS processes, from when all of them are ready."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(WORKERS + 1), context.Queue()
    each = [(weights, size, root, tars[rank::WORKERS], ready, images // WORKERS) for rank in range(WORKERS)]
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


def ray_data(weights: str, size: int, root: str, tars: Sequence[str]) -> tuple[float, float]:
    """(images per second with its start, without it: from the first batch on)."""
    program = Path(__file__).with_name("cache_ray_data.py")
    words = [sys.executable, str(program), weights, str(size), root, *tars]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment())
    whole, steady = re.findall(r"^(?:whole|steady) ([\d.]+)$", done.stdout, re.MULTILINE)
    return float(whole), float(steady)


def ours(weights: str, size: int, root: str, workers: int = WORKERS) -> dict[str, float]:
    """Figures of the job, and `whole`: seconds of its process, from its start to its end."""
    settings = ["data=folder", "data.name=bench", f"encoding.resolution={size}", f"encoding.batch={BATCH}",
                "accept.psnr=0", "conditions=text_tiny", f"autoencoder.path={weights}", f"cluster.workers={workers}",
                "track=none", f"seed={secrets.randbelow(10**6)}"]  # fmt: skip
    began = time.perf_counter()
    words = [sys.executable, "jobs/cache_latents.py", f"root={root}", *settings]
    done = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, env=environment())
    whole = time.perf_counter() - began
    found = re.findall(r"^(\w+)\s+\S\s+([\d.,]+)\s*$", done.stdout, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found} | {"whole": whole}


def digest(root: str) -> str:
    """Of every latent shard's bytes."""
    from calotype.data.store import open_store

    store, whole = open_store(root).at("latents"), hashlib.sha256()
    for entry in store.list():
        if entry.key.endswith(".tar"):
            whole.update(entry.key.encode() + store.read(entry.key))
    return whole.hexdigest()


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def prepared(root: str, folder: str) -> list[str]:
    """Keys of a new dataset's shards, in its bucket."""
    from calotype.data.manifest import load_dataset
    from calotype.data.store import open_store

    words = ["jobs/prepare.py", f"root={root}", "data=folder", "data.name=bench", "track=none", "cluster=local",
             f"data.path={folder}", f"data.shard_samples={SHARD}", "data.held_out=0"]  # fmt: skip
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, env=environment())
    store = open_store(root).at("datasets", "bench")
    return [f"{root.split('/', 3)[3]}/datasets/bench/{row.key}" for row in load_dataset(store).shards]


def measured(weights: str, size: int, root: str, pictures: str, images: int, alone: bool) -> dict[str, float]:
    """Images per second of each; seconds under names that end so.  `alone`: of ours and the bare encoder."""
    tars = prepared(root, pictures)
    one = {"bare": together(bare, weights, size, root, tars, images)}
    job = ours(weights, size, root)
    one["ours, whole job"] = images / job["whole"]
    one["ours, after its start"] = images / (job["seconds"] - job["start_seconds"])
    one["ours: start, seconds"] = job["whole"] - (job["seconds"] - job["start_seconds"])
    for name in ("encoder_busy_percent", "decode_percent", "write_percent"):
        print(f"    {name} {job[name]:.1f}")
    if alone:
        return one
    one["files"] = together(files, weights, size, root, tars, images)
    one["ray data, whole job"], one["ray data, from its first batch"] = ray_data(weights, size, root, tars)
    return one


def said(name: str, found: dict[str, list[float]]) -> None:
    middle = {what: statistics.median(values) for what, values in found.items()}
    base, start = middle["bare"], middle.pop("ours: start, seconds")
    print(f"\n{name} encoder: {1000 * WORKERS / base:.1f} ms an image on one thread")
    for what, rate in middle.items():
        print(f"{what:<34}{rate:8.1f} images/s  {rate / base:5.2f} of bare")
    speed = middle["ours, after its start"]
    print(f"our job is {start:.1f} s of start and end, and then {speed / base:.2f} of the bare encoder", end="")
    if speed > ASKED * base:
        least = ASKED * base * start / (1 - ASKED * base / speed)
        print(f": the whole is {ASKED:.2f} of it from {least:,.0f} images on ({least / speed / 60:.1f} minutes)")
    else:
        print(f", which is less than {ASKED:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="*", choices=[*ENCODERS], default=[*ENCODERS])
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--alone", action="store_true", help="ours beside the bare encoder, without other people's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3], metavar="WORKERS", help="that are compared")
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
    from calotype.environment import load_services

    from tests.caches import autoencoder_folder

    subprocess.run([sys.executable, "-m", "calotype", "up"], check=True, env=environment())
    load_services()
    root = f"s3://bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pictures").mkdir()
        pictures(Path(folder, "pictures"), options.images)
        for name in options.encoders:
            size, channels = ENCODERS[name]
            weights = autoencoder_folder(Path(folder, name), channels=channels)
            found: dict[str, list[float]] = {}
            for number in range(options.rounds):
                place = f"{root}/{name}-{number}"
                given = (weights, size, place, f"{folder}/pictures", options.images, options.alone)
                for what, value in measured(*given).items():
                    found.setdefault(what, []).append(value)
                    print(f"  {name}, round {number + 1}: {what} {value:.1f}", flush=True)
            said(name, found)
        size, channels = ENCODERS["cheap"]
        weights, digests = autoencoder_folder(Path(folder, "bits"), channels=channels), set()
        for workers in options.bits:
            prepared(f"{root}/bits-{workers}", f"{folder}/pictures")
            ours(weights, size, f"{root}/bits-{workers}", workers)
            digests.add(made := digest(f"{root}/bits-{workers}"))
            print(f"SHA-256 of all latent shards, {workers} workers: {made}", flush=True)
    assert len(digests) <= 1, "the bits depend on the number of workers"


if __name__ == "__main__":
    main()
