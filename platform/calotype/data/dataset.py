"""What a stream reads: the shards of a split of a dataset or cache, how often they are drawn, which samples count."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from calotype.data.draws import Ints
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import Manifest, Shard, cache_manifest, load_dataset
from calotype.data.shards import Sample, iterate
from calotype.data.store import Missing, Store, open_store
from calotype.errors import ConfigError, DataError


@dataclass(frozen=True)
class Dataset:
    """Shards in the order of their manifest.

    Attributes:
        weight: of its samples in a mixture, relative to the other datasets'.
        keep: shard key -> which of its samples count (samples,) bool; None: all of all shards.
        meta: of the manifest; a cache's has `channel_mean` and `channel_std`, for `calotype.data.cache.to_model`.
    """

    store: Store
    shards: Sequence[Shard]
    weight: float = 1.0
    keep: Mapping[str, npt.NDArray[np.bool_]] | None = field(default=None, repr=False)
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> dict[str, int]:
        """Arrays of a cache whose first axes differ (mode=masked) -> rows that they are padded to, for batches."""
        forms = self.meta.get("encoding", {}).get("conditions", {})
        return {name: form["length"] for name, form in forms.items() if form.get("mode") == "masked"}

    def layout(self) -> Layout:
        return _layout(self.shards, self.keep)

    def __len__(self) -> int:
        """Samples that count."""
        if self.keep is None:
            return sum(shard.samples for shard in self.shards)
        return sum(int(self.keep[shard.key].sum()) for shard in self.shards if shard.key in self.keep)

    def samples(self) -> Iterator[Sample]:
        """Those that count, one after the other as they are stored, verified."""
        for shard in self.shards:
            if self.keep is not None and shard.key not in self.keep:
                continue
            keep = None if self.keep is None else self.keep[shard.key]
            for index, sample in enumerate(iterate(self.store, [shard])):
                if keep is None or keep[index]:
                    yield sample


@dataclass(frozen=True)
class Layout:
    """Every chunk that holds a sample that counts, in manifest order; one number per chunk, because there may be 10^7.

    Attributes:
        counts: (chunks,) samples that count.
        firsts: (shards + 1,) number of every shard's first chunk, of all chunks.
        bucket: (chunks,); None where all samples have one shape.
        chosen: (chunks,) numbers among all chunks; None where all of them count.
    """

    counts: npt.NDArray[np.int32]
    firsts: Ints
    bucket: npt.NDArray[np.int32] | None = None
    chosen: npt.NDArray[np.int32] | None = None

    def find(self, chunk: int) -> tuple[int, int]:
        """(number of its shard, its number in the shard)."""
        chunk = chunk if self.chosen is None else int(self.chosen[chunk])
        shard = int(np.searchsorted(self.firsts, chunk, side="right")) - 1
        return shard, chunk - int(self.firsts[shard])

    def buckets(self) -> list[int]:
        """Which there are."""
        return [0] if self.bucket is None else np.unique(self.bucket).tolist()

    def chunks_of(self, bucket: int) -> Ints | None:
        """The bucket's chunks; None: all of them."""
        return None if self.bucket is None else np.flatnonzero(self.bucket == bucket)


def open_dataset(
    root: str,
    name: str,
    digest: str = "",
    split: str = "train",
    weight: float = 1.0,
    filter: Sequence[Any] = (),
    takedown: Collection[str] = (),
) -> Dataset:
    """A dataset that `prepare` or `calotype data index` made: the newest version, or the one with this digest.

    Args:
        root: s3://BUCKET[/PREFIX] or a folder, as the jobs' `root`.
        weight: of its samples in a mixture, relative to the other datasets'.
        filter: [[column, operator, value], ...], as pyarrow takes them and as `data.filter` of the jobs.
        takedown: keys that must not be used.
    """
    from calotype.data.filters import load, publish

    store = dataset_store(root, name)
    manifest = load_dataset(store, digest)
    keep = None
    if filter or takedown:
        keep = load(store, publish(store, manifest, filter, takedown), manifest)
    return replace(_opened(store, manifest, split), weight=weight, keep=keep)


def open_cache(root: str, cache: str, split: str = "train", weight: float = 1.0) -> Dataset:
    """A latent cache by its id, or how that begins (`calotype cache ls`; the `cache` of its cache_latents run)."""
    from calotype.data.cache import encoding_id

    fitting = [one for one in open_store(root).folders("caches") if len(cache) >= 4 and one.startswith(cache)]
    found = open_store(root).at("caches", fitting[0] if len(fitting) == 1 else cache)
    try:
        manifest = cache_manifest(found)
    except Missing as error:
        have = ", ".join(open_store(root).folders("caches")) or "none"
        raise DataError(f"there is no finished cache {cache!r} under {root} (but {have}): `calotype runs show NAME` of "
                        "a cache_latents run tells its id") from error  # fmt: skip
    latents = open_store(root).at("latents", encoding_id(manifest.meta["encoding"]))
    return replace(_opened(latents, manifest, split), weight=weight)


def _opened(store: Store, manifest: Manifest, split: str) -> Dataset:
    shards = manifest.split(split)
    if not shards:
        raise ConfigError(f"{store.uri} has no samples in split {split!r}: it has {', '.join(manifest.totals())}")
    return Dataset(store, shards, meta=manifest.meta)


def _layout(shards: Sequence[Shard], keep: Mapping[str, Any] | None) -> Layout:
    """In whole-array steps where shards have one shape."""
    bucket = None
    if any(shard.buckets for shard in shards):
        parts = [shard.chunk_buckets() for shard in shards]
        counts = np.array([count for part in parts for _, count in part], np.int32)
        bucket = np.array([bucket for part in parts for bucket, _ in part], np.int32)
        chunks = np.array([len(part) for part in parts], np.int64)
    else:
        samples = np.array([shard.samples for shard in shards], np.int64)
        step = np.array([shard.chunk_samples for shard in shards], np.int64)
        chunks = -(-samples // step)
        counts = np.repeat(step.astype(np.int32), chunks)
        counts[np.cumsum(chunks) - 1] = samples - (chunks - 1) * step
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunks)])
    if keep is None:
        return Layout(counts, firsts, bucket)
    kept = np.concatenate([_kept(one, keep, counts[first:last])
                           for one, (first, last) in zip(shards, pairwise(firsts.tolist()))])  # fmt: skip
    chosen = np.flatnonzero(kept).astype(np.int32)
    return Layout(kept[chosen].astype(np.int32), firsts, None if bucket is None else bucket[chosen], chosen)


def _kept(shard: Shard, keep: Mapping[str, Any], counts: npt.NDArray[np.int32]) -> Ints:
    """Samples that count, per chunk of a shard."""
    if shard.key not in keep:
        return np.zeros(len(counts), np.int64)
    flags = keep[shard.key]
    if len(flags) != shard.samples:
        raise DataError(f"the filter knows {len(flags)} samples of {shard.key}, the manifest {shard.samples}")
    return np.add.reduceat(flags, np.cumsum(counts) - counts, dtype=np.int64)
