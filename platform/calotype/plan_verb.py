"""`calotype plan JOB`: what a job will take, before it is paid for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from calotype import compose, console, runs
from calotype.config import CacheLatents, TrainDenoiser
from calotype.environment import Worker, home
from calotype.errors import CalotypeError

ABOUT = """What a job with these settings will take, which are those of `calotype submit JOB`: hours, bytes and cost; of
train_denoiser also parameters, arithmetic, and the memory of a worker at every ZeRO stage.  A few batches or steps are
timed here, in this process; for workers on other machines say what one of them does.  The run of the same settings will
show what was predicted beside what it took (cache_latents).

jobs: cache_latents, train_denoiser"""

EXAMPLE = """examples:
  calotype plan cache_latents autoencoder.path=run:mine cluster.workers=8 --rate 580 --price 2.5
  calotype plan train_denoiser autoencoder.path=run:mine cluster.workers=8 cluster.gpus=1 --memory 80 --rate 120"""


def plan(argv: Sequence[str]) -> int:
    """`calotype plan JOB [--rate R] [--memory GB] [--price P] [--json] [overrides...]`."""
    parser = argparse.ArgumentParser(
        "calotype plan", description=ABOUT, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="calotype plan JOB [--rate R] [--memory GB] [--price P] [--json] [OVERRIDES...]", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("job", metavar="JOB")
    parser.add_argument(
        "--rate", type=_positive, default=0.0, help="images per second of one worker; timed here without"
    )
    parser.add_argument(
        "--memory", type=_positive, default=0.0, metavar="GB",
        help="train_denoiser: of one worker; without, cluster.memory_gb, or what this machine has for each",
    )  # fmt: skip
    parser.add_argument("--price", type=_positive, default=0.0, help="of one worker for an hour, in your currency")
    parser.add_argument("--json", action="store_true", help="for programs")
    args, overrides = parser.parse_known_args(argv)
    if args.job not in BODIES:
        raise CalotypeError(f"there is no plan for the job {args.job!r}, only for {' and '.join(BODIES)}")

    def body(make: Callable[[], Any], _: list[str] | None) -> None:
        from calotype.cluster import local

        config = make()
        local.check_up(home(), config.root)
        BODIES[args.job](config, args)

    compose.hydra_main(args.job, body, overrides)
    return 0


def _cache_latents(config: CacheLatents, args: argparse.Namespace) -> None:
    from calotype.tasks import cache, forecast

    resolved = cache.resolve(config)
    if (record := runs.done(args.job, resolved)) is not None:
        print(f"{args.job} {resolved.name}: finished already, nothing to do (run {record.identity[:8]})")
        return
    device = "cuda:0" if resolved.cluster.gpus and not args.rate else "cpu"
    found = forecast.forecast(resolved, Worker(device=device, threads=resolved.cluster.cpus), args.rate, args.price)
    forecast.keep(resolved, found)
    if args.json:
        print(json.dumps(vars(found), indent=1))
    else:
        _show(found, resolved, bool(args.price))


def _train_denoiser(config: TrainDenoiser, args: argparse.Namespace) -> None:
    from calotype.tasks import budget
    from calotype.tasks.cache import resolve_inputs

    resolved = resolve_inputs(config)  # not the cache: this is known before it is made
    found = budget.budget(resolved, round(args.memory * 1e9), args.rate, args.price)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    _show_training(found, resolved)
    _show_memory(found, resolved.cluster.least)
    advised = " ".join(found.advice) or "none, not even one image: use more workers or a smaller denoiser"
    print(f"\nof {console.size(found.memory)} per worker, less a tenth, the smallest stage that fits: {advised}")


BODIES: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "cache_latents": _cache_latents,
    "train_denoiser": _train_denoiser,
}


def _show_training(found: Any, config: TrainDenoiser) -> None:
    rows: list[list[Any]] = [
        ["parameters", found.parameters],
        ["FLOPs per image", f"{found.flops_per_image / 1e9:,.4g} G, forward and backward"],
    ]
    if found.rate:
        how = "timed here" if found.timed else "as you said"
        rows += [
            ["images/s", f"{console.figure(found.rate)} by each of {console.many(found.workers, 'worker')} ({how})"],
            ["time", f"{console.duration(found.hours * 3600)} to {found.images:,} images, without what goes wrong"],
        ]
    else:
        rows.append(["images/s", "not timed: no such device here, or too little memory; say --rate"])
    if found.cost:
        rows.append(["cost", console.figure(found.cost)])
    latents = f"{console.size(found.latents)} per epoch, {console.size(found.latents_read)} in all"
    rows += [
        ["latents read", latents if found.latents else "no cache yet: calotype plan cache_latents tells its bytes"],
        ["a checkpoint", f"{console.size(found.checkpoint)}, {found.checkpoints:,} written, {found.kept:,} kept"],
    ]
    console.table(f"plan: train_denoiser {config.name}", ["what", "value"], rows)


def _show_memory(found: Any, workers: int) -> None:
    columns = ["engine", "activations", "weights", "gradients", "moments", "EMA", "buffers", "per image", "micro-batch"]
    columns += ["in host memory"] * any(one.memory.host for one in found.options)
    rows = []
    for one in found.options:
        held, how = one.memory, "again" if one.checkpoint_activations else "kept"
        parts = (held.weights + one.once, held.gradients, held.moments, held.ema, held.buffers, one.each)
        name = one.engine + (" offloaded" if one.offload == "cpu" else "")
        row = [name, how, *(console.size(part) for part in parts), one.micro_batch or "none"]
        rows.append(row + [console.size(held.host) if held.host else "-"] * (len(columns) - len(row)))
    print()
    console.table(f"memory of one of {console.many(workers, 'worker')}", columns, rows)


def _show(found: Any, config: CacheLatents, priced: bool) -> None:
    how = "timed here" if found.timed else "as you said"
    rows: list[list[Any]] = [
        ["images to encode", f"{found.images:,} of {found.samples:,}"],
        ["images/s", f"{console.figure(found.rate)} by each of {console.many(found.workers, 'worker')} ({how})"],
        ["time", console.duration(found.hours * 3600)],
        ["cache", f"{console.size(found.bytes)}, {console.size(round(found.bytes_per_sample))} per sample"],
    ]
    if found.epochs is not None:
        rows.append(
            ["pays for itself after", f"{console.figure(found.epochs)} epochs, against encoding while training"]
        )
    if priced:
        rows.insert(3, ["cost", console.figure(found.cost)])
    console.table(f"plan: cache_latents {config.name}", ["what", "value"], rows)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number greater than 0")
    return value
