"""`make bench-paper`: the same UNet in latent space and in pixel space, given the same seconds of training.

Rombach et al. 2022, section 4.1, on real handwritten digits: FID after equal compute, and compute to equal FID, over
several seeds.  One autoencoder serves all seeds; its training time is shown beside the table.  Everything runs in this
process through the jobs' own functions; the same command goes on where it was stopped.

    python tests/bench/paper.py                                       about two hours on two cores
    python tests/bench/paper.py --seconds 5 --seeds 1 --fid-images 32 --autoencoder-images 256 --steps 2     smoke
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from calotype import cli, compose, runs
from calotype.data.manifest import load_dataset
from calotype.data.store import open_store
from calotype.environment import home
from calotype.tasks import evaluate, sample
from calotype.train import checkpoint

SPACES = ("latent", "pixel")
POINTS = 4  # of a curve: FID after 1/4, 2/4, 3/4 and all of the seconds


@dataclass(frozen=True)
class Point:
    seconds: float  # of training, without waiting for data
    images: int
    fid: float


@dataclass(frozen=True)
class Curve:
    space: str
    seed: int
    parameters: int
    points: tuple[Point, ...]

    @property
    def speed(self) -> float:
        return self.points[-1].images / self.points[-1].seconds


def job(args: argparse.Namespace, name: str, *overrides: str) -> runs.Record:
    """Run a job here, or recognise that it is done."""
    base = [f"root={args.root}", "cluster=local", "track=none", f"cluster.cpus={args.threads}"]
    config = compose.compose(name, [*base, *overrides])
    module = cli.job_module(name)
    config = module.resolve(config)
    if runs.done(name, config) is None:
        cli.execute(name, config, module.run)
    found = runs.load(config.root, compose.identity(name, config))
    assert found is not None
    return found


def space(args: argparse.Namespace, name: str) -> list[str]:
    where = ["autoencoder=pretrained", "autoencoder.path=run:paper"] if name == "latent" else ["autoencoder=identity"]
    return [*where, f"encoding.resolution={args.resolution}"]


def curve(args: argparse.Namespace, where: str, seed: int) -> Curve:
    """Train for `args.seconds` and measure FID along the way."""
    batch = args.batch

    def train(images: int, every: int) -> runs.Record:
        return job(
            args,
            "train_denoiser",
            *space(args, where),
            *("denoiser=unet_tiny", "engine=torch", f"optim.lr={args.lr}", "ema.halflife=2000", f"seed={seed}"),
            *("train.keep=1000", "train.validate_every=0", "train.sample_every=0", f"train.batch={batch}"),
            *(f"train.images={images}", f"train.checkpoint_every={every}", f"name=paper-{where}-{seed}"),
        )

    # How fast is it?  The first steps warm up; a longer run continues a shorter one.
    record = train(2 * batch, batch)
    warm = _trained(record, 2 * batch)
    record = train(8 * batch, batch)
    per_batch = (_trained(record, 8 * batch) - warm) / 6
    every = max(8, round(args.seconds / POINTS / per_batch)) * batch
    images = every * POINTS
    record = train(images, every)
    while _trained(record, images) < 0.98 * args.seconds:
        images += every
        record = train(images, every)
    points = tuple(
        Point(_trained(record, here), here, fid(args, record, here)) for here in range(every, images + 1, every)
    )
    parameters = sum(weight.numel() for weight in sample.load_denoiser(record).denoiser.parameters())
    return Curve(where, seed, parameters, points)


def _trained(record: runs.Record, images: int) -> float:
    with checkpoint.opened(record.artifacts, images, ()) as found:
        return float(found.state["trained"])


def fid(args: argparse.Namespace, record: runs.Record, images: int) -> float:
    """FID of a checkpoint on features of digits, for captions of the training split, without guidance."""
    asked = [f"fid_images={args.fid_images}", "sampler.guidance=1", f"sampler.steps={args.steps}"]
    where = [f"root={args.root}", f"run={record.identity}"]
    settings = compose.compose("evaluate", ["cluster=local", "track=none", *where, *asked])
    model = sample.load_denoiser(record, True, checkpoint.digest(record.artifacts, images))
    data = open_store(args.root).at("datasets", model.settings.data.name)
    return float(evaluate.distances(settings, model, data, load_dataset(data, model.settings.data.digest))["fid"])


def fid_at(curve: Curve, seconds: float) -> float:
    """FID after so much training: on the straight line of log FID between points, or of the nearest one outside."""
    for before, after in pairwise(curve.points):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / (after.seconds - before.seconds)
            return math.exp((1 - share) * math.log(before.fid) + share * math.log(after.fid))
    return min(curve.points, key=lambda point: abs(point.seconds - seconds)).fid


def seconds_to(curve: Curve, fid: float) -> float:
    """When the curve first reaches `fid`, on the same line; infinite if it does not."""
    if curve.points[0].fid <= fid:
        return curve.points[0].seconds
    for before, after in pairwise(curve.points):
        if after.fid <= fid:
            share = (math.log(before.fid) - math.log(fid)) / (math.log(before.fid) - math.log(after.fid))
            return before.seconds + share * (after.seconds - before.seconds)
    return math.inf


def table(curves: list[Curve], seconds: float, autoencoder_seconds: float) -> str:
    """Markdown: a row per run, then what follows from them."""
    lines = [
        f"| space | seed | parameters | images/s | images | FID after {seconds:.0f} s | measured |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for each in curves:
        end = each.points[-1]
        way = ", ".join(f"{point.fid:.3g} at {point.seconds:.0f} s" for point in each.points)
        cells = [each.space, str(each.seed), f"{each.parameters:,}", f"{each.speed:.3g}"]
        lines.append(f"| {' | '.join([*cells, f'{end.images:,}', f'{fid_at(each, seconds):.3g}', way])} |")
    pairs = [
        (latent, pixel)
        for latent in curves
        for pixel in curves
        if (latent.space, pixel.space) == SPACES and latent.seed == pixel.seed
    ]
    faster = [seconds / seconds_to(latent, fid_at(pixel, seconds)) for latent, pixel in pairs]
    rows = {
        f"FID after {seconds:.0f} s of training, latent space": [fid_at(latent, seconds) for latent, _ in pairs],
        f"FID after {seconds:.0f} s of training, pixel space": [fid_at(pixel, seconds) for _, pixel in pairs],
        "compute to pixel space's FID: pixel / latent": faster,
        "images/s in training: latent / pixel": [latent.speed / pixel.speed for latent, pixel in pairs],
    }
    lines += ["", f"| over {len(pairs)} seeds | mean | standard deviation |", "|---|---:|---:|"]
    for name, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
        lines.append(f"| {name} | {statistics.fmean(values):.3g} | {spread:.2g} |")
    note = f"The autoencoder took {autoencoder_seconds:.0f} s, once for all seeds; it is not in the seconds above."
    if 0.0 in faster:
        note += "  A 0 means that latent space did not reach pixel space's FID."
    return "\n".join([*lines, "", note])


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--seconds", type=float, default=900, help="of training, per space and seed (%(default)s)")
    parse.add_argument("--seeds", type=int, default=3)
    parse.add_argument("--fid-images", type=int, default=1000)
    parse.add_argument("--autoencoder-images", type=int, default=60_000)
    parse.add_argument("--steps", type=int, default=25, help="of the sampler (%(default)s)")
    parse.add_argument("--batch", type=int, default=64)
    parse.add_argument("--lr", type=float, default=1e-3)
    parse.add_argument("--resolution", type=int, default=32, help="edge in pixels (%(default)s)")
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--root", default=str(home() / "bench-paper"), help="where its runs lie (%(default)s)")
    parse.add_argument("--out", default="", help="also write the table into this file")
    args = parse.parse_args()

    job(args, "prepare", f"data.image_size={args.resolution}", "name=paper")
    autoencoder = job(args, "train_autoencoder", "autoencoder=kl_f4_tiny", "engine=torch", "optim.lr=1e-3",
                      f"train.images={args.autoencoder_images}", "train.batch=64", "train.validate_every=0",
                      "train.sample_every=0", f"resolution={args.resolution}", "name=paper")  # fmt: skip
    for name in SPACES:
        job(args, "cache_latents", *space(args, name), f"name=paper-{name}")
    curves: list[Curve] = []
    for seed in range(args.seeds):
        for name in SPACES:
            curves.append(curve(args, name, seed))
            print(curves[-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = autoencoder.result()
    told = table(curves, args.seconds, float(result["seconds"]))
    print(told)
    if args.out:
        Path(args.out).write_text(told + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
