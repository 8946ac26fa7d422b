"""The gate of a latent cache, repeated on one that is finished: bytes, counts, figures, images.

bytes    every hash, sidecars, numbers of samples (data/verify.py), and those of the dataset beside them
figures  latents that are no numbers; channel mean and deviation, computed anew; channels that say nothing
images   some samples of every shard decoded and compared with their images, within the limits that the job had
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calotype import caches, compose
from calotype.config import Accept, CacheLatents, TrainDenoiser
from calotype.console import Progress, many
from calotype.data import cache, shards, statistics
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import Manifest, Shard, load_dataset
from calotype.data.shards import Sample
from calotype.data.store import Store
from calotype.data.threads import Passed, Told, over
from calotype.errors import CalotypeError, DataError
from calotype.tasks import accept, encode
from calotype.tasks.accept import Decoded

NAMED = 3  # samples that are named of a shard, shards that are named of a cache
SAME = 1e-6  # of a deviation: sums may differ in their last bits from machine to machine


@dataclass
class Found:
    """`wrong`: a sentence each.  `said`: what was looked at, and what could not be."""

    wrong: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- counts


def counts(root: str, manifest: Manifest) -> Found:
    """The numbers of a cache's samples beside those of its dataset: none is missing without a word."""
    found = Found()
    try:
        rows = load_dataset(dataset_store(root, manifest.name), manifest.meta["dataset"]).shards
    except DataError as error:
        found.said.append(f"not compared with its dataset: {error}")
        return found
    have = {row.source_sha256: row.samples for row in manifest.shards}
    lost: dict[str, int] = {}
    for one in manifest.meta.get("quarantined", ()):
        lost[one["shard"]] = lost.get(one["shard"], 0) + 1
    for row in rows:
        mine, without = have.get(row.sha256, 0), lost.get(row.key, 0)
        if mine + without != row.samples:
            found.wrong.append(f"source shard {row.key} has {many(row.samples, 'sample')}, the cache {mine:,} of them, "
                               f"and names {without:,} that it lacks")  # fmt: skip
    for sha256 in have.keys() - {row.sha256 for row in rows}:
        found.wrong.append(f"{sha256}.tar holds latents of a source shard that is not of its dataset")
    return found


# --------------------------------------------------------------------------------------------- figures


def figures(
    latents: Store, manifest: Manifest, jobs: int, total: int, done: int, told: Told
) -> tuple[Found, dict[str, Any]]:
    """What is wrong with the numbers in its latents; and their statistics, computed anew, {} where that cannot be."""

    def of_shard(shard: Shard, passed: Passed) -> tuple[list[str], Any]:
        wrong: list[str] = []
        sums = None
        try:
            sums = statistics.of_samples(_sound(shards.iterate(latents, [shard]), manifest, wrong))
        except (DataError, KeyError, ValueError, AttributeError) as error:
            wrong.append(str(error))
        passed(shard.bytes)
        more = [f"{many(len(wrong) - NAMED, 'sample')} more"] if len(wrong) > NAMED else []
        return [f"{latents.uri}/{shard.key}: {what}" for what in (*wrong[:NAMED], *more)], sums

    parts = over(manifest.shards, of_shard, jobs, total, done, told)
    found = Found([what for wrong, _ in parts for what in wrong])
    if found.wrong or not parts:
        return found, {}
    try:
        merged = statistics.merge(sums for _, sums in parts)
    except DataError as error:
        found.wrong.append(str(error))
        return found, {}
    scale = np.asarray(merged["channel_std"])
    for name in ("channel_mean", "channel_std"):
        said = np.asarray(manifest.meta[name])
        if said.shape != scale.shape or (np.abs(said - merged[name]) > SAME * scale).any():
            found.wrong.append(f"{name} of the manifest is {numbers(said)}, of its latents {numbers(merged[name])}")
    return found, merged


def numbers(values: Any) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)


def _sound(samples: Iterator[Sample], manifest: Manifest, wrong: list[str]) -> Iterator[Sample]:
    """Those samples whose arrays are what their encoding says; what is wrong with the others."""
    encoding = manifest.meta["encoding"]
    draws = 2 if encoding["posterior"] == "gaussian" else 1
    shapes = [(draws, *shape) for shape in manifest.meta.get("buckets", [manifest.meta["shape"]])]
    names = [cache.MIRRORED] if encoding.get("mirrored") else []
    for sample in samples:
        arrays = cache.decode_sample(sample, [*names, *encoding["conditions"]])
        latents = [arrays[name] for name in ("latent", *names)]
        if other := [one for one in latents if one.dtype != encoding["dtype"] or one.shape not in shapes]:
            wrong.append(f"the latent of sample {sample.key} is {other[0].dtype} {other[0].shape}")
        elif strange := [name for name, one in arrays.items() if one.dtype.kind == "f" and not np.isfinite(one).all()]:
            wrong.append(f"{' and '.join(strange)} of sample {sample.key} not finite")
        else:
            yield sample


# ---------------------------------------------------------------------------------------------- images


def images(
    one: caches.Known, root: str, latents: Store, merged: dict[str, Any], samples: int | None, jobs: int
) -> Found:
    """Samples of every shard, decoded and compared with their images.

    Args:
        merged: statistics of the latents, computed anew.
        samples: of each shard; None for as many as the job did, 0 for none.
    """
    assert one.manifest is not None
    config, found = settings(one, root), Found()
    limits = config.accept if config else Accept()
    with suppress(KeyError, TypeError):  # older manifests do not say it
        limits = Accept(**one.manifest.meta["accept"])
    if limits.psnr < 0:  # no job that is known: what the cache had when it was made
        limits = replace(limits, psnr=accept.expected((one.manifest.meta.get("acceptance") or {}).get("psnr")))
    each = limits.samples if samples is None else samples
    made: list[Decoded] = []
    if not each:
        found.said.append("not decoded: no sample of a shard was asked for")
    elif config is None:
        found.said.append("not decoded: no run is left that says where the autoencoder lies")
    else:
        try:
            asked = replace(config, accept=replace(limits, samples=each))
            made = _decoded(asked, one.manifest, latents, jobs, found)
        except CalotypeError as error:
            found.said.append(f"not decoded: {error}")
    report = accept.report(made, merged, ())
    channels = one.encoding["autoencoder"]["channels"]
    found.wrong += [f"its latents are not accepted: {what}" for what in accept.wrong(report, channels, limits)]
    if made:
        reached = f"{report['psnr']:g} dB, {report['psnr_fresh']:g} encoded anew"
        found.said.append(f"{many(len(made), 'sample')} decoded: {reached} (accept.psnr={limits.psnr:g}, "
                          f"accept.psnr_loss={limits.psnr_loss:g})")  # fmt: skip
    return found


def settings(one: caches.Known, root: str) -> CacheLatents | None:
    """Of the job that made a cache, the newest finished one; else of a run that trains on it; None without runs."""
    for record in sorted(one.makers, key=lambda run: (run.status() == "finished", run.created), reverse=True):
        return replace(compose.build(CacheLatents, record.config), root=root)
    for record in sorted(one.users, key=lambda run: run.created, reverse=True):
        user = compose.build(TrainDenoiser, record.config)
        shared = {name: getattr(user, name) for name in ("name", "data", "autoencoder", "encoding", "conditions")}
        return CacheLatents(root=root, **shared)
    return None


def _decoded(config: CacheLatents, manifest: Manifest, latents: Store, jobs: int, found: Found) -> list[Decoded]:
    """Samples of the cache, decoded, beside their originals.

    Raises:
        CalotypeError: the autoencoder or the dataset is gone, or another.
    """
    import torch

    source = dataset_store(config.root, manifest.name)
    originals = {row.sha256: row for row in load_dataset(source, manifest.meta["dataset"]).shards}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = _autoencoder(config, manifest.meta["encoding"]["autoencoder"]["encoder"])
    model = model.for_encoding(config.encoding, device)

    lost: dict[str, set[int]] = {}
    for one in manifest.meta.get("quarantined", ()):
        lost.setdefault(one["shard"], set()).add(one["row"])

    def decoded(row: Shard) -> Sequence[Decoded]:
        original = originals[row.source_sha256]
        compared = (source, original), (latents, row), lost.get(original.key, ()), config.accept.samples, config, device
        return accept.decoded(model, *compared)[0]

    made, gone = list[Decoded](), list[str]()
    threads = 1 if device != "cpu" else min(jobs, os.cpu_count() or 1)
    rows = [row for row in manifest.shards if row.source_sha256 in originals]
    with encode.exactly(threads) as pool, Progress(len(rows), "shards", "decode") as bar:
        coming: list[Future[Sequence[Decoded]]] = [pool.submit(decoded, row) for row in rows]
        for number, future in enumerate(coming):
            try:
                made += future.result()
            except accept.Stranger as error:
                found.wrong.append(str(error))
            except DataError as error:
                gone.append(str(error))
            bar.update(number + 1)
    if gone:
        more = "; ..." if len(gone) > NAMED else ""
        found.said.append(f"not decoded: {many(len(gone), 'shard')} ({'; '.join(gone[:NAMED])}{more})")
    return made


def _autoencoder(config: CacheLatents, encoder: str) -> Any:
    """The one that made the cache.

    Raises:
        CalotypeError: it is gone, or its encoder half is another now.
    """
    from calotype.model.autoencoder import load_autoencoder
    from calotype.model.digests import encoder_digest

    model = load_autoencoder(replace(config.autoencoder, digest=""))
    if model.model is not None:
        there = encoder_digest(model.model.state_dict(), model.model.config)
        if there != encoder:
            raise DataError(f"the autoencoder at {config.autoencoder.path} is another now (encoder {there[:12]}, of "
                            f"the cache {encoder[:12]})")  # fmt: skip
    return model
