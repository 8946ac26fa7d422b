"""The gate, repeated on a finished cache: what is wrong is named, what cannot be looked at is said."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calotype.config import Accept, Autoencoder, CacheLatents, TrainDenoiser
from calotype.data import Sample, cache, shards, statistics
from calotype.data.manifest import Manifest, Shard
from calotype.data.store import open_store

from tests.caches import autoencoder_folder, config_of, dataset, latents_of, recorded, run

Say = Callable[..., tuple[int, str]]
Change = Callable[[list[Sample]], list[Sample]]
PIXELS = Autoencoder(kind="identity", f=1, channels=3)


def cached(root: Path, weights: str = "", job: bool = True, mirrored: bool = False) -> tuple[CacheLatents, str]:
    """A finished cache of 22 samples in 3 shards, and its id."""
    dataset(root)
    config = config_of(root, weights, **({} if weights else {"autoencoder": PIXELS}), accept=Accept(psnr=0))
    config = replace(config, encoding=replace(config.encoding, mirrored=mirrored))
    identity = run(config)["cache"]
    if job:
        recorded("cache_latents", config)
    return config, identity


def forged(config: CacheLatents, change: Change) -> None:
    """Other samples in its first shard, of which sidecar and manifest say what is true."""
    root, store = open_store(config.root), latents_of(config)
    manifest = cache.load_cache(root, config)
    row = manifest.shards[0]
    samples = change(list(shards.iterate(store, [row])))
    for ending in (".tar", ".sidecar.json"):
        store.delete(row.key.replace(".tar", ending))
    new = shards.write_shard(store, row.key, samples, 256, row.split, source_sha256=row.source_sha256)
    rows: tuple[Shard, ...] = (new, *manifest.shards[1:])
    figures = statistics.merge(statistics.of_samples(shards.iterate(store, [one])) for one in rows)
    if not np.isfinite(figures["channel_mean"]).all():
        figures = {}  # no manifest can say so
    place = cache.cache_store(root, config)
    place.write("manifest.json", Manifest.to_bytes(replace(manifest, shards=rows, meta=manifest.meta | figures)))


def other_latents(change: Callable[[np.ndarray], np.ndarray]) -> Change:  # type: ignore[type-arg]
    def changed(samples: list[Sample]) -> list[Sample]:
        made = []
        for one in samples:
            latent = cache.to_npy(change(cache.decode_sample(one, ())["latent"].copy()))
            made.append(Sample(one.key, {**one.members, cache.LATENT: latent}))
        return made

    return changed


def broken(latent: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    latent[0, 0, 0, 0] = np.nan
    return latent


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_latents(lambda latent: latent * np.float16(2)), r"costs [\d.]+ dB, more than accept\.psnr_loss=1"),
        (other_latents(broken), r"latent of sample s000 not finite"),
        (other_latents(broken), r"6 samples more"),
        (other_latents(lambda latent: latent.astype(np.float32)), r"latent of sample s000 is float32 \(1, 3, 16"),
        (lambda samples: samples[:-1], r"shards/train-2-00000\.tar has 9 samples, the cache 8 of them, and names 0"),
        (lambda samples: [Sample(f"x{one.key}", one.members) for one in samples], r"xs000 lies in the place of s000"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bytes_whose_hashes_agree_may_still_be_wrong(tmp_path: Path, typed: Say, change: Change, said: str) -> None:
    config, identity = cached(tmp_path)
    forged(config, change)
    status, out = typed("cache", "verify", identity, "--root", config.root)
    assert re.search(said, out), out
    assert status == 1, out


def test_latents_of_mirrored_images_are_looked_at_too(tmp_path: Path, typed: Say) -> None:
    config, identity = cached(tmp_path, mirrored=True)
    assert typed("cache", "verify", identity, "--root", config.root)[0] == 0

    def changed(samples: list[Sample]) -> list[Sample]:
        last = samples[-1]
        latent = cache.decode_sample(last, (cache.MIRRORED,))[cache.MIRRORED].copy()
        mirrored = cache.to_npy(broken(latent))
        return [*samples[:-1], Sample(last.key, {**last.members, f"{cache.MIRRORED}.npy": mirrored})]

    forged(config, changed)
    status, out = typed("cache", "verify", identity, "--root", config.root)
    assert (status, "mirrored of sample s008 not finite" in out) == (1, True), out


def test_latents_that_are_not_those_of_the_mirrored_image_are_seen(tmp_path: Path, typed: Say) -> None:
    config, identity = cached(tmp_path, mirrored=True)

    def unmirrored(samples: list[Sample]) -> list[Sample]:
        return [Sample(one.key, {**one.members, f"{cache.MIRRORED}.npy": one.members[cache.LATENT]}) for one in samples]

    forged(config, unmirrored)
    status, out = typed("cache", "verify", identity, "--root", config.root)
    assert (status, bool(re.search(r"costs [\d.]+ dB, more than accept\.psnr_loss=1", out))) == (1, True), out


def test_what_was_decoded_is_said_and_may_be_asked_for(tmp_path: Path, typed: Say) -> None:
    config, identity = cached(tmp_path, autoencoder_folder(tmp_path / "weights"))
    words = ("cache", "verify", identity, "--root", config.root)
    status, out = typed(*words)
    assert (status, "6 samples decoded: " in out, "(accept.psnr=0, accept.psnr_loss=1)" in out) == (0, True, True), out
    assert "5 samples decoded" not in out
    status, out = typed(*words, "--samples", "7")
    assert (status, "19 samples decoded: " in out) == (0, True), out
    status, out = typed(*words, "--samples", "0")
    assert (status, "not decoded: no sample of a shard was asked for" in out) == (0, True), out


def test_what_cannot_be_looked_at_any_more_is_said(tmp_path: Path, typed: Say) -> None:
    weights = autoencoder_folder(tmp_path / "weights")
    config, identity = cached(tmp_path / "root", weights, job=False)
    words = ("cache", "verify", identity, "--root", config.root)

    def says(what: str) -> None:
        status, out = typed(*words)
        assert (status, what in out) == (0, True), out
        assert "all as its manifest says" in out

    says("not decoded: no run is left that says where the autoencoder lies")
    shared = {name: getattr(config, name) for name in ("root", "data", "autoencoder", "encoding", "conditions")}
    recorded("train_denoiser", TrainDenoiser(name="d", **shared))
    says("6 samples decoded: ")  # by the run that trains on it
    recorded("cache_latents", config)
    autoencoder_folder(tmp_path / "weights", seed=1)
    says(f"not decoded: the autoencoder at {weights} is another now (encoder ")
    shutil.rmtree(weights)
    says("not decoded: autoencoder.path=")
    autoencoder_folder(tmp_path / "weights")
    store = open_store(config.root).at("datasets", "toy")
    first = next(iter(store.list("shards/"))).key
    for entry in [one for one in store.list("shards/") if one.key.startswith(first.removesuffix(".sidecar.json"))]:
        store.delete(entry.key)
    says("not decoded: 1 shard (")
    for entry in list(store.list()):
        store.delete(entry.key)
    says("not compared with its dataset: ")
