"""A training job's config -> the stream that feeds it, and what that stream had to leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from calotype.config import Data, TrainAutoencoder, TrainDenoiser
from calotype.config import Stream as Settings
from calotype.data import Dataset, Reading, Stream, filters
from calotype.data.manifest import CACHES, Manifest, load_dataset
from calotype.data.reader import Decode
from calotype.data.store import Store, open_store
from calotype.environment import Worker


def reading(settings: Settings, decoders: int) -> Reading:
    """The group `stream`, in bytes."""
    return Reading(
        memory=settings.memory_mb * 2**20,
        readers=settings.readers,
        workers=settings.workers,
        decoders=decoders,
        on_error=settings.on_error,
        error_budget=settings.error_budget,
        cache=settings.cache,
        cache_bytes=round(settings.cache_gb * 1e9),
    )


def resolve(data: Data, root: str, cached: tuple[Store, Manifest] | None = None) -> Data:
    """`data` with its filter and takedown list turned into a selection of the dataset that its digest names.

    Args:
        cached: the cache that is read instead of the dataset.

    Raises:
        ConfigError: a column, operator or list that is not there, or nothing is left.
    """
    if not data.filter and not data.takedown:
        return data
    store = open_store(root).at("datasets", data.name)
    taken_down = filters.takedown_keys(data.takedown) if data.takedown else frozenset[str]()
    dataset = load_dataset(store, data.digest)
    selection = filters.publish(store, dataset, data.filter, taken_down)
    if cached is not None and "buckets" in cached[1].meta:
        filters.publish_sorted(store, selection, dataset, cached[1], cached[0])
    return replace(data, selection=selection)


def check(config: TrainAutoencoder | TrainDenoiser, dataset: Dataset) -> None:
    """Open the stream of the least and the most workers, without reading.

    Raises:
        ConfigError: on submit already, what a worker could not hold in memory, or an order that cannot be.
    """
    for world in {min(workers, config.train.batch) for workers in (config.cluster.least, config.cluster.most)}:
        for rank in {0, world // 2, world - 1}:  # their shares differ by a sample
            stream(config, dataset, Worker(rank=rank, world=world))


def source_of(data: Data, root: str, store: Store, manifest: Manifest) -> Callable[[str], Dataset]:
    """Split -> its samples that may be used: of the dataset, or of the cache of it, that `manifest` in `store` is."""
    keep = None
    if data.selection:
        place = open_store(root).at("datasets", data.name)
        dataset = load_dataset(place, data.digest)
        if "buckets" in manifest.meta:
            keep = filters.load(place, filters.sorted_id(data.selection, manifest), manifest)
        else:
            keep = filters.load(place, data.selection, dataset)
            keep = filters.of_cache(keep, dataset, manifest) if manifest.format in CACHES else keep
    return lambda split: Dataset(store, manifest.split(split), keep=keep, meta=manifest.meta)


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
        until=config.train.images,
        rank=worker.rank,
        world=worker.world,
        arrays=arrays,
        decode=decode,
        reading=reading(config.stream, worker.threads),
    )
