"""Encode a dataset once, so that the denoiser trains on latents.

python jobs/cache_latents.py data=digits autoencoder.path=run:mine
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import CacheLatents
from calotype.console import Progress
from calotype.runs import Record, makers
from calotype.tasks import cache, forecast
from calotype.tasks.tally import Tally
from calotype.track import Dataset, Tracker

resolve = cache.resolve


def run(config: CacheLatents, record: Record, tracker: Tracker) -> dict[str, Any]:
    began = time.monotonic()
    units, made = cache.plan(config), []
    shards, images = cache.there_before(config, units)
    tally = Tally(images=images)
    make = partial(cache.make_leased, seen=cache.shown(units) if units else None)
    with Progress(shards + len(units), "shards", "encode") as progress:
        for _, result in spread.map(make, config, cache.largest_first(units), tally.in_hand, record.identity):
            made.append(result)
            tally.add(result)
            cache.leave_out(result, tally.lost, config, record)
            progress.update(shards + len(made), leased=tally.leased, **{"images/s": tally.rate})
            if tally.due(len(units)):
                tracker.log(tally.figures(len(units)), tally.seen)
            if result.grid is not None:
                tracker.picture("reconstructions", result.grid, 0)
    figures = cache.commit(config, made, record)
    figures |= {"start_seconds": round(tally.began - began, 1)} if tally.encoded else {}
    figures |= forecast.compared(config, figures, time.monotonic() - began)
    tracker.tags({f"calotype.{name}": figures[name] for name in ("cache", "encoding")})
    data = Dataset(config.data.name, config.data.digest, f"{config.root}/datasets/{config.data.name}", "encoding")
    tracker.inputs([data], makers(config.root, "train_autoencoder", config.autoencoder.path))
    return figures


if __name__ == "__main__":
    job_main("cache_latents", resolve, run)
