"""`calotype plan JOB`: what a job will take, before it is paid for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from calotype import compose, console, runs
from calotype.config import CacheLatents
from calotype.environment import Worker, home
from calotype.errors import CalotypeError

ABOUT = """Hours, bytes and cost of a job with these settings, which are those of `calotype submit JOB`.  A few batches
are timed here, in this process; for workers on other machines say what one of them does.  The run of the same settings
will show what was predicted beside what it took.

jobs: cache_latents"""

EXAMPLE = "example: calotype plan cache_latents autoencoder.path=run:mine cluster.workers=8 --rate 580 --price 2.5"


def plan(argv: Sequence[str]) -> int:
    """`calotype plan JOB [--rate R] [--price P] [--json] [overrides...]`."""
    parser = argparse.ArgumentParser(
        "calotype plan", description=ABOUT, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="calotype plan JOB [--rate R] [--price P] [--json] [OVERRIDES...]", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("job", metavar="JOB")
    parser.add_argument(
        "--rate", type=_positive, default=0.0, help="images per second of one worker; timed here without"
    )
    parser.add_argument("--price", type=_positive, default=0.0, help="of one worker for an hour, in your currency")
    parser.add_argument("--json", action="store_true", help="for programs")
    args, overrides = parser.parse_known_args(argv)
    if args.job != "cache_latents":
        raise CalotypeError(f"there is no plan for the job {args.job!r} yet, only for cache_latents")

    def body(config: CacheLatents, _: list[str] | None) -> None:
        from calotype.cluster import local
        from calotype.tasks import cache, forecast

        local.check_up(home(), config.root)
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

    compose.hydra_main(args.job, body, overrides)
    return 0


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
