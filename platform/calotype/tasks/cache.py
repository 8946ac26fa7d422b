"""Every image of a dataset, encoded once: one latent shard per source shard, then the cache's manifest.

    resolve -> plan -> make (on workers, per source shard) -> commit

What a shard's bytes are depends on the shard and the encoding alone; a shard that is there is never made again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from calotype import checks, runs
from calotype.config import Autoencoder, CacheLatents, Condition, TrainDenoiser
from calotype.data import cache, get, lease, shards, statistics, takedowns
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import CACHE, Manifest, Shard, cache_manifest, load_dataset, publish_cache, sidecar_key
from calotype.data.store import Store, open_store
from calotype.environment import Held, Worker
from calotype.errors import ConfigError, DataError
from calotype.model import digests
from calotype.tasks import accept, encode
from calotype.tasks.autoencoder import published
from calotype.tasks.encode import Lost
from calotype.tasks.made import Made, Spent, recognised, remember, written
from calotype.tasks.tally import Tally

Job = TypeVar("Job", CacheLatents, TrainDenoiser)
T = TypeVar("T")
R = TypeVar("R")

SHOWN = 8  # images whose reconstructions are drawn
log = logging.getLogger(__name__)

READERS = 64  # sidecars read at once when a cache is committed


# ------------------------------------------------------------------------------------------------ on submit


def resolve(config: CacheLatents) -> CacheLatents:
    """Of the job itself: also what its images must reach, by what is known of the autoencoder.

    Raises:
        CalotypeError: as `resolve_inputs`.
    """
    if config.accept.psnr < 0:
        config = replace(config, accept=replace(config.accept, psnr=_expected(config.autoencoder.path, config.root)))
    return resolve_inputs(config)


def resolve_inputs(config: Job) -> Job:
    """Names become digests: of the dataset, the autoencoder's encoder half, tokenizers and frozen text encoders.

    Raises:
        CalotypeError: there is no such dataset, run or folder, or its sizes contradict the config.
    """
    dataset = load_dataset(open_store(config.root).at("datasets", config.data.name), config.data.digest)
    autoencoder = resolve_autoencoder(config.autoencoder, config.root, config.encoding.resolution)
    conditions = {name: replace(c, digest=digests.condition_digest(c)) for name, c in config.conditions.items()}
    for name, condition in conditions.items():
        _check_source(name, condition, dataset)
    resolved = replace(
        config, data=replace(config.data, digest=dataset.digest), autoencoder=autoencoder, conditions=conditions
    )
    checks.check(resolved)  # once more, now that the factor and the channels of the autoencoder are known
    return resolved


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


def _expected(path: str, root: str) -> float:
    """dB that the images of a cache must reach, by what is known of its autoencoder."""
    known = runs.find(root, "train_autoencoder", path).result() if path.startswith("run:") else {}
    return accept.expected(known.get("psnr_heldout"))


def _check_source(name: str, condition: Condition, dataset: Manifest) -> None:
    member = "txt" if condition.source == "text" else "json"
    if member not in dataset.members:
        raise ConfigError(f"conditions.{name}.source={condition.source} but the samples of dataset {dataset.name} have "
                          f"no .{member}: choose conditions=none or another dataset")  # fmt: skip


def plan(config: CacheLatents) -> list[Shard]:
    """The source shards, of both splits, whose latents are not there yet, or whose maker died before it judged them,
    and the one that is shown.  Empty when the cache is finished.
    """
    root = open_store(config.root)
    if cache.find_cache(root, config) is not None:
        return []
    dataset = load_dataset(_dataset_store(config), config.data.digest)
    taken = takedowns.everything(root)
    latents = cache.latents_of(root, cache.encoding_of(config))
    done = set(cache.finished(latents, dataset.shards, taken, judged=True))
    seen = shown(dataset.shards)
    return [s for s in dataset.shards if s not in done or (s == seen and not takedowns.gone(s, taken))]


def there_before(config: CacheLatents, units: Sequence[Shard]) -> tuple[int, int]:
    """(source shards, samples) of the dataset that are not in `units`: a job that goes on begins there."""
    rows = load_dataset(_dataset_store(config), config.data.digest).shards
    return len(rows) - len(units), sum(row.samples for row in rows) - sum(unit.samples for unit in units)


def largest_first(units: Iterable[Shard]) -> list[Shard]:
    """The order in which shards are dealt: a large one at the end leaves all workers but one idle (Graham 1969)."""
    return sorted(units, key=lambda unit: -unit.samples)


def shown(units: Sequence[Shard]) -> Shard:
    """The source shard of which a few reconstructions are drawn: held out, where there is such a one.

    Args:
        units: all source shards, or those that `plan` gave, of which it is the same one.
    """
    return next((shard for shard in units if shard.split != "train"), units[0])


# ----------------------------------------------------------------------------------------------- on workers


def make_leased(config: CacheLatents, worker: Worker, seen: Shard | None = None) -> Callable[..., Made | Held]:
    """As `make`, but a shard that another job has in hand is left to it, until that job gives no more signs of life."""
    work = make(config, worker, seen)
    root = open_store(config.root)
    latents = root.at("latents", cache.encoding_id(cache.encoding_of(config)))

    def made(unit: Shard, dead: bytes | None = None) -> Made | Held:
        taken, before = takedowns.of_shard(root, unit.sha256), get.counts.retries
        key = cache.latent_key(unit, taken)
        with lease.taken(latents, key, worker, dead) as theirs:
            if theirs is not None and shards.existing_shard(latents, key) is None:
                return Held(theirs, lease.STALE)
            return replace(work(unit, taken), retries=get.counts.retries - before)

    return made


def make(config: CacheLatents, worker: Worker, seen: Shard | None = None) -> Callable[..., Made]:
    """A function that encodes one source shard and commits its latents, or recognises that they are there; of samples
    that were taken down, which it may be told, it makes none.

    Args:
        seen: the source shard that is `shown`.  Said by the driver: 1,000 workers need not read 30 MB of manifest each.
    """
    from calotype.model import conditioner, metrics
    from calotype.model.autoencoder import load_autoencoder

    source, root = _dataset_store(config), open_store(config.root)
    latents = cache.latents_of(root, cache.encoding_of(config))
    model = load_autoencoder(config.autoencoder).for_encoding(config.encoding, worker.device)
    _check_unchanged(config)
    for condition in config.conditions.values():
        if condition.source == "text":
            conditioner.inputs(condition, [""], worker.device)  # loads it once, before threads ask for it

    def made(unit: Shard, taken: Collection[str] | None = None) -> Made:
        taken = takedowns.of_shard(root, unit.sha256) if taken is None else taken
        found = encode_shard(unit, taken)
        if found.decoded and unit != seen:
            return found
        with encode.exactly(1) as pool:
            count = max(SHOWN, config.accept.samples) if unit == seen else config.accept.samples
            lost = {one.row for one in found.lost} | takedowns.rows(source, unit, taken)
            compared = (source, unit), (latents, found.shard), lost, count, config, worker.device
            decoded, pictures = pool.submit(accept.decoded, model, *compared).result()
        new, found = not found.decoded, replace(found, decoded=decoded)
        if new:
            remember(latents, found)
        return replace(found, grid=metrics.grid(pictures, columns=8)) if unit == seen else found

    def encode_shard(unit: Shard, taken: Collection[str]) -> Made:
        key = cache.latent_key(unit, taken)
        if (there := shards.existing_shard(latents, key)) is not None:
            return recognised(source, latents, unit, there, taken)
        start = time.monotonic()
        parts = _encoded(model, source, unit, taken, config, worker)
        # Only now: a latent's bits depend on its place in the batch, and the others' must stay what they were.
        kept = (one for part in parts for one in part.samples if takedowns.mark(one.sample.key) not in taken)
        latent = sorted(kept, key=lambda one: (one.bucket, one.row))
        lost = sorted((one for part in parts for one in _left(part.lost, taken)), key=lambda one: one.row)
        if not latent:
            reason = lost[0].reason if lost else takedowns.REASON
            raise DataError(f"{source.where(unit.key)}: no sample can be encoded ({reason}): leave this shard out of "
                            "the dataset")  # fmt: skip
        began = time.monotonic()
        shard, samples = written(latents, key, latent, unit, bool(config.encoding.bucket_step))
        now = time.monotonic()
        decode, encoding = sum(part.decode for part in parts), sum(part.encode for part in parts)
        spent = Spent(worker.rank, worker.threads, now - start, decode, encoding, now - began)
        figures, made_on = statistics.of_samples(samples), encode.machine(worker.device)
        return Made(unit, shard, figures, made_on, lost, (), len(samples), spent)

    return made


def _encoded(
    model: Any, source: Store, unit: Shard, taken: Collection[str], config: CacheLatents, worker: Worker
) -> list[encode.Encoded]:
    """Every batch of a source shard; refused as soon as too many of its samples have no latent."""
    parts: list[encode.Encoded] = []
    with encode.exactly(worker.threads) as pool:
        batches = encode.batches(shards.iterate(source, [unit]), config)
        work = partial(encode.batch, model, config=config, device=worker.device)
        for part in _in_order(pool, work, batches, ahead=2 * worker.threads):
            parts.append(part)
            if part.lost:
                accept.within_budget([(unit, one) for each in parts for one in _left(each.lost, taken)], config)
    return parts


def _left(lost: Iterable[Lost], taken: Collection[str]) -> Iterator[Lost]:
    """Without those that were taken down: nobody misses them."""
    return (one for one in lost if takedowns.mark(one.key) not in taken)


def _check_unchanged(config: CacheLatents) -> None:
    """The tokenizers and text encoders that the encoding names are those that lie there now."""
    for name, condition in config.conditions.items():
        if digests.condition_digest(condition) != condition.digest:
            raise DataError(f"conditions.{name}: tokenizer or encoder changed after this job was submitted: submit it "
                            "again")  # fmt: skip


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterator[T], ahead: int) -> Iterator[R]:
    """What `work` makes of each item, in order; at most `ahead` of them before they are asked for."""
    coming: deque[Future[R]] = deque()
    for item in items:
        coming.append(pool.submit(work, item))
        if len(coming) > ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


# -------------------------------------------------------------------------------------------------- at the end


def leave_out(made: Made, lost: Sequence[tuple[Shard, Lost]], config: CacheLatents, record: runs.Record) -> None:
    """Name the samples of a shard that have no latent: in the log, and in the run if they end it.

    Args:
        lost: these, and those of the shards before.

    Raises:
        DataError: more than `data.error_budget`: said now, and not after days.
    """
    for one in made.lost:
        log.warning("left out: %s/%s: %s", made.source.key, one.key, one.reason)
    listed = record.list_left_out(_names(_named(lost))) if len(lost) > config.data.error_budget else ""
    accept.within_budget(lost, config, listed)


def _named(lost: Iterable[tuple[Shard, Lost]]) -> list[dict[str, Any]]:
    return [{"shard": source.key, **asdict(one)} for source, one in lost]


def _names(lost: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(f"{one['shard']}/{one['key']}", one["reason"]) for one in lost]


def commit(config: CacheLatents, results: Iterable[Made], record: runs.Record | None = None) -> dict[str, Any]:
    """Write the cache's manifest, once every source shard has its latents; the figures of the job.

    Args:
        record: the run, which gets a list of the samples that are left out.

    Raises:
        DataError: a latent shard is missing or has not the samples of its source; or the cache is not accepted.
    """
    root, encoding = open_store(config.root), cache.encoding_of(config)
    identity = cache.cache_id(cache.encoding_id(encoding), config.data.digest)
    manifest = cache.find_cache(root, config)
    results = list(results)
    if manifest is None:
        dataset = load_dataset(_dataset_store(config), config.data.digest)
        manifest = _manifest(config, dataset, cache.latents_of(root, encoding), encoding, results)
        store = root.at("caches", identity)
        if not publish_cache(store, manifest):
            manifest = cache_manifest(store)
    if record is not None and manifest.meta.get("quarantined"):
        record.list_left_out(_names(manifest.meta["quarantined"]))
    totals, accepted = manifest.totals().values(), manifest.meta.get("acceptance", {})
    tally = Tally(results)
    figures: dict[str, Any] = {
        "cache": identity,
        "encoding": manifest_encoding(manifest),
        "dataset": config.data.digest,
        "shards": len(manifest.shards),
        "shards_encoded": tally.encoded,
        "samples": sum(total["samples"] for total in totals),
        "samples_encoded": tally.images,
        "bytes": sum(total["bytes"] for total in totals),
        "captions_cut": manifest.meta["captions_cut"],
        "quarantined": accepted.get("lost", 0),
        "taken_down": len(manifest.meta.get("quarantined", ())) - accepted.get("lost", 0),
        "images": sum(total["samples"] for total in totals) + len(manifest.meta.get("quarantined", ())),
        **{name: accepted[name] for name in ("psnr", "psnr_fresh") if name in accepted},
    }
    return figures | tally.speeds()


def manifest_encoding(manifest: Manifest) -> str:
    """E of a cache's manifest."""
    return cache.encoding_id(manifest.meta["encoding"])


def _manifest(
    config: CacheLatents, dataset: Manifest, latents: Store, encoding: Mapping[str, Any], results: Sequence[Made]
) -> Manifest:
    taken = takedowns.everything(open_store(config.root))
    kept = [shard for shard in dataset.shards if not takedowns.gone(shard, taken)]
    if not kept:
        raise DataError(f"every sample of dataset {dataset.name} was taken down: there is nothing to cache")
    keys = {source.sha256: cache.latent_key(source, taken.get(source.sha256, ())) for source in kept}
    # What a worker said was there may be deleted since (`calotype cache gc`): a manifest names only what is found now.
    sizes, store = {entry.key: entry.size for entry in latents.list()}, _dataset_store(config)
    made = {one.source.sha256: one for one in results if one.shard.key == keys.get(one.source.sha256)}
    made = {sha256: one for sha256, one in made.items() if {one.shard.key, sidecar_key(one.shard.key)} <= sizes.keys()}
    missing = [shard for shard in kept if shard.sha256 not in made]

    def recognise(source: Shard) -> Made:
        shard = shards.existing_shard(latents, keys[source.sha256], sizes)
        if shard is None:
            raise DataError(f"the latents of {source.key} are missing under {latents.uri}: run the job again")
        return recognised(store, latents, source, shard, taken.get(source.sha256, ()))

    with ThreadPoolExecutor(READERS, "sidecars") as pool:
        made |= {found.source.sha256: found for found in pool.map(recognise, missing)}
    in_order = [made[source.sha256] for source in kept]
    rows = []
    for source, found in zip(kept, in_order, strict=True):
        left = len(found.lost) + len(taken.get(source.sha256, ()))
        if found.shard.samples + left != source.samples:
            raise DataError(f"{latents.uri}/{found.shard.key} has {found.shard.samples} samples, its source "
                            f"{source.key} {source.samples}, of which {left} were left out")  # fmt: skip
        rows.append(replace(found.shard, split=source.split))  # another version may have dealt the splits otherwise
    lost = [(found.source, one) for found in in_order for one in found.lost]
    accept.within_budget(lost, config)
    merged = statistics.merge(found.statistics for found in in_order)
    report = accept.report([one for found in in_order for one in found.decoded], merged, lost)
    accept.check(report, encoding["autoencoder"]["channels"], config.accept, f"dataset {dataset.name}")
    meta = {
        "encoding": dict(encoding),
        "dataset": dataset.digest,
        "shape": list(cache.shape_of(encoding)),
        **({"buckets": cache.shapes_of(encoding)} if "buckets" in encoding else {}),
        **merged,
        "devices": sorted({found.device for found in in_order}),
        "acceptance": report,
        "accept": asdict(config.accept),
        "quarantined": _named(lost)
        + [one for s in dataset.shards for one in takedowns.left_out(store, s, taken.get(s.sha256, ()))],
    }
    return Manifest(CACHE, dataset.name, cache.members_of(encoding), tuple(rows), meta)


def _dataset_store(config: CacheLatents) -> Store:
    return dataset_store(config.root, config.data.name)
