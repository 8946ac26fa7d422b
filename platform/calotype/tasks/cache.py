"""Every image of a dataset, encoded once: one latent shard per source shard, then the cache's manifest.

    resolve -> plan -> make (on workers, per source shard) -> commit

What a shard's bytes are depends on the shard and the encoding alone; a shard that is there is never made again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calotype import runs
from calotype.config import Autoencoder, CacheLatents, Condition, TrainDenoiser
from calotype.data import cache, images, shards
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import CACHE, Manifest, Shard, load_dataset
from calotype.data.shards import Sample
from calotype.data.store import Missing, Store, open_store
from calotype.environment import Worker
from calotype.errors import ConfigError, DataError
from calotype.model import digests
from calotype.tasks import encode
from calotype.tasks.autoencoder import published

if TYPE_CHECKING:
    from PIL import Image

Job = TypeVar("Job", CacheLatents, TrainDenoiser)
T = TypeVar("T")
R = TypeVar("R")

MADE = "calotype.made/1"
SHOWN = 16  # images whose reconstructions are drawn
CHUNK_SAMPLES = 256  # of latents, at most: those of the source may be few, for images are bigger
READERS = 16  # sidecars read at once when a cache is committed


@dataclass(frozen=True)
class Made:
    """One latent shard.  `images` is 0 where it was there already.

    Of the shard that is shown, `grid` is the picture of `reconstructions`, and `psnr` (dB) says how good they are.
    """

    shard: Shard
    statistics: cache.Statistics
    device: str
    images: int = 0
    seconds: float = 0.0
    grid: Image.Image | None = None
    psnr: float = 0.0


# ------------------------------------------------------------------------------------------------ on submit


def resolve(config: Job) -> Job:
    """Names become digests: of the dataset, the autoencoder's encoder half, tokenizers and frozen text encoders.

    Raises:
        CalotypeError: there is no such dataset, run or folder, or its sizes contradict the config.
    """
    dataset = load_dataset(open_store(config.root).at("datasets", config.data.name), config.data.digest)
    autoencoder = resolve_autoencoder(config.autoencoder, config.root, config.encoding.resolution)
    conditions = {name: replace(c, digest=digests.condition_digest(c)) for name, c in config.conditions.items()}
    for name, condition in conditions.items():
        _check_source(name, condition, dataset)
    return replace(
        config, data=replace(config.data, digest=dataset.digest), autoencoder=autoencoder, conditions=conditions
    )


def resolve_autoencoder(autoencoder: Autoencoder, root: str, resolution: int) -> Autoencoder:
    """`run:NAME` becomes the folder that run wrote; f, channels and digest are read from it."""
    if autoencoder.kind != "pretrained":
        return autoencoder
    path = autoencoder.path
    if path.startswith("run:"):
        record = runs.find(root, "train_autoencoder", path)
        if record.status() != "finished":
            raise ConfigError(
                f"autoencoder.path={path} is {record.status()}, not finished: run train_autoencoder again"
            )
        path = published(record, record.result()["images"]).uri
    f, channels = digests.autoencoder_shape(path)
    if resolution % f:
        raise ConfigError(f"encoding.resolution={resolution} is not a multiple of {f}, the autoencoder's factor")
    return replace(autoencoder, path=path, f=f, channels=channels, digest=digests.encoder_digest(path))


def _check_source(name: str, condition: Condition, dataset: Manifest) -> None:
    member = "txt" if condition.source == "text" else "json"
    if member not in dataset.members:
        raise ConfigError(f"conditions.{name}.source={condition.source} but the samples of dataset {dataset.name} have "
                          f"no .{member}: choose conditions=none or another dataset")  # fmt: skip


def plan(config: CacheLatents) -> list[Shard]:
    """The source shards, of both splits, whose latents are not there yet, and the one that is shown.

    None when the cache is finished.
    """
    root = open_store(config.root)
    if cache.find_cache(root, config) is not None:
        return []
    dataset = load_dataset(_dataset_store(config), config.data.digest)
    done = set(cache.finished(cache.latents_of(root, cache.encoding_of(config)), dataset.shards))
    return [shard for shard in dataset.shards if shard not in done or shard == shown(dataset)]


def shown(dataset: Manifest) -> Shard:
    """The source shard of which a few reconstructions are drawn: held out, where there is such a one."""
    return next((shard for shard in dataset.shards if shard.split != "train"), dataset.shards[0])


# ----------------------------------------------------------------------------------------------- on workers


def make(config: CacheLatents, worker: Worker) -> Callable[[Shard], Made]:
    """A function that encodes one source shard and commits its latents, or recognises that they are there."""
    from calotype.model import conditioner
    from calotype.model.autoencoder import load_autoencoder

    source = _dataset_store(config)
    latents = cache.latents_of(open_store(config.root), cache.encoding_of(config))
    model = load_autoencoder(config.autoencoder).to(worker.device).eval()
    _check_unchanged(config)
    for condition in config.conditions.values():
        if condition.source == "text":
            conditioner.inputs(condition, [""], worker.device)  # loads it once, before threads ask for it

    seen = shown(load_dataset(source, config.data.digest))

    def made(unit: Shard) -> Made:
        found = encode_shard(unit)
        if unit != seen:
            return found
        grid, psnr = reconstructions(model, (source, unit), (latents, found.shard), config, worker.device)
        return replace(found, grid=grid, psnr=psnr)

    def encode_shard(unit: Shard) -> Made:
        key = cache.latent_key(unit)
        if (there := shards.existing_shard(latents, key)) is not None:
            return recognised(latents, there)
        start = time.monotonic()
        with encode.exactly(worker.threads) as pool:
            batches = _batches(shards.iterate(source, [unit]), config.encoding.batch)
            work = partial(encode.batch, model, config=config, device=worker.device)
            parts = _in_order(pool, work, batches, ahead=2 * worker.threads)
            samples = [sample for part in parts for sample in part]
        shard, samples = _written(latents, key, samples, unit)
        figures = cache.statistics(samples)
        made_on = _remember(latents, shard, figures, worker.device)
        return Made(shard, figures, made_on, len(samples), time.monotonic() - start)

    return made


def reconstructions(
    model: Any, original: tuple[Store, Shard], cached: tuple[Store, Shard], config: CacheLatents, device: str
) -> tuple[Image.Image, float]:
    """A few originals, each beside what the decoder makes of its stored latent, and their PSNR in dB: what a denoiser
    will be able to draw.
    """
    import torch

    from calotype.model import metrics

    (source, unit), (latents, shard) = original, cached
    pictures = encode.decoded(list(islice(shards.iterate(source, [unit]), SHOWN)), config)
    stored = [cache.decode_sample(s, ())["latent"][0] for s in islice(shards.iterate(latents, [shard]), SHOWN)]
    raw = torch.from_numpy(np.stack(stored).astype(np.float32)).to(device)
    made = model.decode(raw).clamp(-1, 1).cpu()
    real = images.signed(torch.from_numpy(np.stack([picture.pixels for picture in pictures])))
    grid = metrics.grid(torch.stack([real, made], 1).flatten(0, 1), columns=8)
    return grid, float(metrics.psnr(made, real).mean())


def _check_unchanged(config: CacheLatents) -> None:
    """The tokenizers and text encoders that the encoding names are those that lie there now."""
    for name, condition in config.conditions.items():
        if digests.condition_digest(condition) != condition.digest:
            raise DataError(f"conditions.{name}: tokenizer or encoder changed after this job was submitted: submit it "
                            "again")  # fmt: skip


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterator[T], ahead: int) -> Iterator[R]:
    """What `work` makes of each item, in order; at most `ahead` of them before they are asked for."""
    coming: deque[Future[R]] = deque()
    for item in items:
        coming.append(pool.submit(work, item))
        if len(coming) > ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _written(latents: Store, key: str, samples: list[Sample], unit: Shard) -> tuple[Shard, list[Sample]]:
    """Commit a latent shard; its row and samples.  Of two writers whose machines differ in a bit the first wins."""

    def write(made: list[Sample]) -> Shard:
        split, sha256 = unit.split, unit.sha256
        return shards.write_shard(latents, key, made, CHUNK_SAMPLES, split=split, source_sha256=sha256)

    assert len(samples) == unit.samples, f"{len(samples)} of {unit.samples} samples"
    try:
        return write(samples), samples
    except DataError:
        theirs = shards.read_tar(latents, key)
        if [sample.key for sample in theirs] != [sample.key for sample in samples]:
            raise
        return write(theirs), theirs


# ---------------------------------------------------------------------------------------------- statistics


def _remember(latents: Store, shard: Shard, figures: cache.Statistics, device: str) -> str:
    made_on = encode.machine(device)
    data = {"format": MADE, "sha256": shard.sha256, "statistics": figures, "device": made_on}
    latents.publish(_made_key(shard), json.dumps(data, sort_keys=True).encode())
    return made_on


def recognised(latents: Store, shard: Shard) -> Made:
    """A finished shard with its statistics: remembered, or computed from its bytes if its maker died in between."""
    try:
        found = json.loads(latents.read(_made_key(shard)))
    except Missing:
        found = {}
    if found.get("format") == MADE and found.get("sha256") == shard.sha256:
        return Made(shard, found["statistics"], found["device"])
    return Made(shard, cache.statistics(shards.iterate(latents, [shard])), "not recorded")


def _made_key(shard: Shard) -> str:
    return f"{shard.key.removesuffix('.tar')}.made.json"


# -------------------------------------------------------------------------------------------------- at the end


def commit(config: CacheLatents, results: Iterable[Made]) -> dict[str, Any]:
    """Write the cache's manifest, once every source shard has its latents; the figures of the job.

    Raises:
        DataError: a latent shard is missing or has not the samples of its source.
    """
    root, encoding = open_store(config.root), cache.encoding_of(config)
    identity = cache.cache_id(cache.encoding_id(encoding), config.data.digest)
    manifest = cache.find_cache(root, config)
    results = list(results)
    if manifest is None:
        dataset = load_dataset(_dataset_store(config), config.data.digest)
        manifest = _manifest(dataset, cache.latents_of(root, encoding), encoding, results)
        store = root.at("caches", identity)
        if not store.publish("manifest.json", manifest.to_bytes()):
            manifest = Manifest.from_bytes(store.read("manifest.json"))
    totals = manifest.totals().values()
    encoded, busy = sum(made.images for made in results), sum(made.seconds for made in results)
    figures = {
        "cache": identity,
        "encoding": manifest_encoding(manifest),
        "dataset": config.data.digest,
        "shards": len(manifest.shards),
        "shards_encoded": sum(made.images > 0 for made in results),
        "samples": sum(total["samples"] for total in totals),
        "samples_encoded": encoded,
        "bytes": sum(total["bytes"] for total in totals),
        "captions_cut": manifest.meta["captions_cut"],
    }
    if drawn := [made.psnr for made in results if made.grid is not None]:
        figures["psnr_sample"] = round(drawn[0], 2)
    if encoded:
        figures["images_per_second"] = round(encoded / busy * min(config.cluster.workers, len(results)), 1)
    return figures


def manifest_encoding(manifest: Manifest) -> str:
    """E of a cache's manifest."""
    return cache.encoding_id(manifest.meta["encoding"])


def _manifest(dataset: Manifest, latents: Store, encoding: Mapping[str, Any], results: Sequence[Made]) -> Manifest:
    made = {result.shard.source_sha256: result for result in results}
    missing = [shard for shard in dataset.shards if shard.sha256 not in made]

    def recognise(source: Shard) -> Made:
        shard = shards.existing_shard(latents, cache.latent_key(source))
        if shard is None:
            raise DataError(f"the latents of {source.key} are missing under {latents.uri}: run the job again")
        return recognised(latents, shard)

    with ThreadPoolExecutor(READERS, "sidecars") as pool:
        made |= {found.shard.source_sha256: found for found in pool.map(recognise, missing)}
    rows = []
    for source in dataset.shards:
        row = made[source.sha256].shard
        if row.samples != source.samples:
            raise DataError(
                f"{latents.uri}/{row.key} has {row.samples} samples, its source {source.key} {source.samples}"
            )
        rows.append(replace(row, split=source.split))  # another dataset version may have dealt the splits otherwise
    in_order = [made[source.sha256] for source in dataset.shards]
    meta = {
        "encoding": dict(encoding),
        "dataset": dataset.digest,
        "shape": list(cache.shape_of(encoding)),
        **cache.merge(found.statistics for found in in_order),
        "devices": sorted({found.device for found in in_order}),
    }
    return Manifest(CACHE, dataset.name, cache.members_of(encoding), tuple(rows), meta)


def _dataset_store(config: CacheLatents) -> Store:
    return dataset_store(config.root, config.data.name)
