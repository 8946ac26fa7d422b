"""What caching the latents of a dataset will take: hours, bytes, cost; and how near that came.

    rate   a few batches timed in this process, on this machine's threads or GPU; or a figure that is given
    bytes  those of a shard written from the same batches

Kept under `forecasts/<run identity>.json`, so that the run can say beside its figures what was expected of it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from calotype import compose
from calotype.config import CacheLatents
from calotype.data import cache, shards, takedowns
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import load_dataset
from calotype.data.shards import Sample
from calotype.data.store import Missing, open_store
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.tasks import encode
from calotype.tasks.made import CHUNK_SAMPLES

BATCHES = 3  # timed, of every thread; one more warms it up


@dataclass(frozen=True)
class Forecast:
    """`images`: without latents yet, of `samples`.  `rate`: images per second of one worker."""

    samples: int
    images: int
    rate: float
    timed: bool
    workers: int
    hours: float
    bytes: int  # of the whole cache
    bytes_per_sample: float
    price: float  # of one worker for an hour
    cost: float
    epochs: float | None  # of encoding while training instead, after which the cache has paid for itself; if timed


def forecast(config: CacheLatents, worker: Worker, rate: float = 0.0, price: float = 0.0) -> Forecast:
    """What caching will take: time, bytes, money.

    Args:
        config: resolved.
        rate: images per second of one worker; 0 times a few batches here.  Else one is encoded, for its bytes.
        price: of one worker for an hour.

    Raises:
        DataError: a sample of the first shard cannot be encoded.
    """
    store = dataset_store(config.root, config.data.name)
    rows = load_dataset(store, config.data.digest).shards
    root = open_store(config.root)
    latents, taken = cache.latents_of(root, cache.encoding_of(config)), takedowns.everything(root)
    done = set(cache.finished(latents, rows, taken))
    samples = sum(row.samples for row in rows)
    images = sum(row.samples for row in rows if row not in done)
    many = config.encoding.batch * (1 if rate else (1 + BATCHES) * worker.threads)
    how = replace(config, encoding=replace(config.encoding, compile=False)) if rate else config
    measured, share, size = _timed(how, worker, list(islice(shards.iterate(store, rows), many)))
    chosen = rate or measured
    hours = images / chosen / config.cluster.most / 3600
    return Forecast(
        samples=samples,
        images=images,
        rate=round(chosen, 2),
        timed=not rate,
        workers=config.cluster.most,
        hours=hours,
        bytes=round(size * samples),
        bytes_per_sample=round(size, 1),
        price=price,
        cost=hours * config.cluster.most * price,
        epochs=None if rate else round(images / samples / share, 2),
    )


def _timed(config: CacheLatents, worker: Worker, samples: Sequence[Sample]) -> tuple[float, float, float]:
    """(images per second, share of that time which encoding while training would take too, bytes per stored sample)."""
    from calotype.model.autoencoder import load_autoencoder

    model = load_autoencoder(config.autoencoder).for_encoding(config.encoding, worker.device)
    batches = list(encode.batches(samples, config))
    batches = [one for one in batches if len(one.samples) == config.encoding.batch] or batches  # tails are rare
    work = partial(encode.batch, model, config=config, device=worker.device)
    with encode.exactly(worker.threads) as pool, tempfile.TemporaryDirectory() as folder:
        warm = min(worker.threads, len(batches) - 1)
        list(pool.map(work, batches[:warm]))
        began = time.monotonic()
        parts = list(pool.map(work, batches[warm:]))
        encoded = time.monotonic() - began
        made = [one.sample for part in parts for one in part.samples]
        if not made:
            raise DataError(f"no sample of dataset {config.data.name} can be encoded: {parts[0].lost[0].reason}")
        row = shards.write_shard(open_store(folder), "timed.tar", made, CHUNK_SAMPLES)
        whole = time.monotonic() - began
    return len(made) / whole, encoded / whole, row.bytes / len(made)


# ---------------------------------------------------------------------------------------- and then


def keep(config: CacheLatents, found: Forecast) -> None:
    """For the run of this config, whenever it comes."""
    store = open_store(config.root).at("forecasts")
    store.write(f"{compose.identity('cache_latents', config)}.json", json.dumps(asdict(found), indent=1).encode())


def compared(config: CacheLatents, figures: dict[str, Any], seconds: float) -> dict[str, float]:
    """What was expected of this run, beside what it took; {} where nobody asked, or nothing was encoded now."""
    try:
        data = open_store(config.root).at("forecasts").read(f"{compose.identity('cache_latents', config)}.json")
    except Missing:
        return {}
    expected = json.loads(data)
    if not figures["samples_encoded"]:
        return {}
    share = figures["samples_encoded"] / max(expected["images"], 1) * expected["workers"] / config.cluster.most
    made = {
        "predicted_hours": round(expected["hours"] * share, 4),
        "actual_hours": round(seconds / 3600, 4),
        "predicted_bytes": expected["bytes"],
    }
    if price := expected.get("price", 0.0):
        costs = (hours * config.cluster.most * price for hours in (expected["hours"] * share, seconds / 3600))
        made |= dict(zip(("predicted_cost", "actual_cost"), (round(cost, 4) for cost in costs)))
    return made
