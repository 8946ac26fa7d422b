"""A training job's config -> the stream that feeds it, and what that stream had to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.config import Stream as Settings
from calotype.config import TrainAutoencoder, TrainDenoiser
from calotype.data import Dataset, Reading, Stream
from calotype.data.reader import Decode
from calotype.environment import Worker


def reading(settings: Settings) -> Reading:
    """The group `stream`, in bytes."""
    return Reading(
        memory=settings.memory_mb * 2**20,
        readers=settings.readers,
        workers=settings.workers,
        on_error=settings.on_error,
        error_budget=settings.error_budget,
        cache=settings.cache,
        cache_bytes=round(settings.cache_gb * 1e9),
    )


def stream(
    config: TrainAutoencoder | TrainDenoiser,
    dataset: Dataset,
    worker: Worker,
    arrays: Sequence[str] = (),
    decode: Decode | None = None,
) -> Stream:
    """The worker's share of the one order that seed, batch, lanes and window of the config give."""
    return Stream(
        dataset,
        seed=config.seed,
        batch=config.train.batch,
        lanes=config.train.lanes,
        window=config.train.window,
        rank=worker.rank,
        world=worker.world,
        arrays=arrays,
        decode=decode,
        reading=reading(config.stream),
    )
