"""What a stream reads: the shards of a split of a dataset or cache, how often they are drawn, which samples count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from calotype.data.draws import Ints
from calotype.data.manifest import CACHES, Manifest, Shard, load_dataset
from calotype.data.store import Store, open_store
from calotype.errors import ConfigError, DataError


@dataclass(frozen=True)
class Dataset:
    """Shards in the order of their manifest.

    Attributes:
        weight: of its samples in a mixture, relative to the other datasets'.
        keep: shard key -> which of its samples count (samples,) bool; None: all of all shards.
    """

    store: Store
    shards: Sequence[Shard]
    weight: float = 1.0
    keep: Mapping[str, npt.NDArray[np.bool_]] | None = field(default=None, repr=False)

    def layout(self) -> Layout:
        return _layout(self.shards, self.keep)


@dataclass(frozen=True)
class Layout:
    """Every chunk that holds a sample that counts, in manifest order."""

    counts: npt.NDArray[np.int32]  # (chunks,) samples that count
    shard: npt.NDArray[np.int32]  # (chunks,) number of its shard
    number: npt.NDArray[np.int32]  # (chunks,) its number in the shard
    bucket: npt.NDArray[np.int32]  # (chunks,)


def open_dataset(root: str, name: str, digest: str = "", split: str = "train") -> Dataset:
    """A dataset that `prepare` or `calotype data index` made: the newest version, or the one with this digest.

    Args:
        root: s3://BUCKET[/PREFIX] or a folder, as the jobs' `root`.
    """
    store = open_store(root).at("datasets", name)
    return _opened(store, load_dataset(store, digest), split)


def open_cache(root: str, cache: str, split: str = "train") -> Dataset:
    """A latent cache by its id (`calotype runs show NAME` of its cache_latents run tells it)."""
    from calotype.data.cache import encoding_id

    found = open_store(root).at("caches", cache)
    manifest = Manifest.from_bytes(found.read("manifest.json"))
    if manifest.format not in CACHES:
        raise DataError(f"{found.uri}/manifest.json is no latent cache but a {manifest.format}")
    return _opened(open_store(root).at("latents", encoding_id(manifest.meta["encoding"])), manifest, split)


def _opened(store: Store, manifest: Manifest, split: str) -> Dataset:
    shards = manifest.split(split)
    if not shards:
        raise ConfigError(f"{store.uri} has no samples in split {split!r}: it has {', '.join(manifest.totals())}")
    return Dataset(store, shards)


def _layout(shards: Sequence[Shard], keep: Mapping[str, Any] | None) -> Layout:
    """In whole-array steps where shards have one shape: there may be 10^7 chunks."""
    if any(shard.buckets for shard in shards):
        parts = [shard.chunk_buckets() for shard in shards]
        counts = np.array([count for part in parts for _, count in part], np.int32)
        bucket = np.array([bucket for part in parts for bucket, _ in part], np.int32)
        chunks = np.array([len(part) for part in parts], np.int64)
    else:
        samples = np.array([shard.samples for shard in shards], np.int64)
        step = np.array([shard.chunk_samples for shard in shards], np.int64)
        chunks = -(-samples // step)
        counts = np.repeat(step, chunks).astype(np.int32)
        counts[np.cumsum(chunks) - 1] = samples - (chunks - 1) * step
        bucket = np.zeros(len(counts), np.int32)
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), chunks)
    firsts = np.cumsum(chunks) - chunks
    number = (np.arange(len(counts)) - np.repeat(firsts, chunks)).astype(np.int32)
    if keep is None:
        return Layout(counts, shard, number, bucket)
    kept = np.concatenate([_kept(one, keep, counts[first : first + n])
                           for one, first, n in zip(shards, firsts.tolist(), chunks.tolist())])  # fmt: skip
    some = kept > 0
    return Layout(kept[some].astype(np.int32), shard[some], number[some], bucket[some])


def _kept(shard: Shard, keep: Mapping[str, Any], counts: npt.NDArray[np.int32]) -> Ints:
    """Samples that count, per chunk of a shard."""
    if shard.key not in keep:
        return np.zeros(len(counts), np.int64)
    flags = keep[shard.key]
    if len(flags) != shard.samples:
        raise DataError(f"the filter knows {len(flags)} samples of {shard.key}, the manifest {shard.samples}")
    return np.add.reduceat(flags, np.cumsum(counts) - counts, dtype=np.int64)
