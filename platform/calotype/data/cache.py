"""What a latent cache is: its encoding and identity, its samples; raw <-> model latents.

    latents/E/encoding.json            what E stands for
              <sha>.tar                latents of the source shard with that SHA-256: the same samples, in its order or,
                                       with aspect buckets, sorted by bucket and in its order within each
              <sha>.columns.parquet    with aspect buckets: `key`, and `row` of the sample in the source shard
              <sha>.sidecar.json       written last: the shard is finished
              <sha>.made.json          a hint: statistics of the shard, samples left out, the machine that made it
              <sha>.lease              a hint: a worker has the shard in hand (lease.py)
              <sha>-<taken>.tar        the same without samples that were taken down (takedowns.py), in its place
    caches/<cache id>/manifest.json    E and one dataset version: its latent shards, channel statistics and acceptance
                                       report (tasks/accept.py); written last
                      manifests/000002.json  of the same cache after samples were taken down; the newest counts

Members of a latent shard: `latent.npy` (2, C, h, w) posterior mean and standard deviation, or (1, C, h, w) where the
encoding is deterministic; `mirrored.npy` the same of the mirrored image, where encoding.mirrored asks for it;
`<condition>.npy` a class number (), token ids (length,), embeddings (length, D), or (n, D) of mode=masked, where n of
the length tokens are the caption's own; `json` {"text"?, "label"?, "width", "height"} of the original, "crop" with
aspect buckets ([left, top, right, bottom] in the original; else it is the centred square), and "cut": names of
conditions that hold its caption only in part.  Latents are stored raw, as the autoencoder gives them: draws and scaling
happen when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import calotype.data.buckets as buckets
from calotype.compose import digest_of
from calotype.config import CacheLatents, Condition, Encoding, TrainDenoiser
from calotype.data.buckets import Size
from calotype.data.differences import differences
from calotype.data.images import PREPROCESSING
from calotype.data.manifest import (
    Manifest,
    Shard,
    cache_manifest,
    cache_versions,
    load_dataset,
    sidecar_key,
    stored_encoding,
)
from calotype.data.npy import from_npy, mask_of, padded, to_npy
from calotype.data.shards import Sample, columns_of
from calotype.data.store import Missing, Store
from calotype.data.takedowns import Taken, everything, gone
from calotype.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "calotype.encoding/1"
LATENT = "latent.npy"
MIRRORED = "mirrored"  # a latent of the mirrored image, for encoding.mirrored
ROW = "row"  # column of a latent shard whose samples are sorted by bucket


# -------------------------------------------------------------------------------------------- identity


def encoding_of(config: CacheLatents | TrainDenoiser) -> dict[str, Any]:
    """Everything that the bytes of a latent depend on, except the image; its digest is E.

    Args:
        config: resolved: digests of autoencoder and conditions are filled in.
    """
    autoencoder, encoding = config.autoencoder, config.encoding
    pixels = autoencoder.kind == "identity"
    assert pixels or autoencoder.digest, "resolve the config first"
    return {
        "format": ENCODING,
        "preprocessing": PREPROCESSING,
        "autoencoder": {
            "encoder": "identity" if pixels else autoencoder.digest,
            "f": autoencoder.f,
            "channels": autoencoder.channels,
        },
        "resolution": encoding.resolution,
        "dtype": encoding.dtype,
        "posterior": "deterministic" if pixels else encoding.posterior,
        "batch": encoding.batch,
        "conditions": {name: _stored_form(name, condition) for name, condition in sorted(config.conditions.items())},
    } | _if_chosen(encoding)


def _if_chosen(encoding: Encoding) -> dict[str, Any]:
    """Fields that came later, where they are not what was done before: so that E stays what it was."""
    made: dict[str, Any] = {"buckets": [list(size) for size in sizes_of(encoding)]} if encoding.bucket_step else {}
    made |= {"precision": encoding.precision} if encoding.precision != "fp32" else {}
    made |= {"mirrored": True} if encoding.mirrored else {}
    return made | ({"compile": True} if encoding.compile else {})


def sizes_of(encoding: Encoding) -> list[Size]:
    """(width, height) in pixels of every bucket; the one square where there are none."""
    return buckets.sizes(encoding.resolution, encoding.bucket_step, encoding.bucket_aspect)


def _stored_form(name: str, condition: Condition) -> dict[str, Any]:
    """What of a condition decides its stored bytes: neither how often it is dropped nor who reads it."""
    if name in ("latent", "mirrored", "json"):
        raise ConfigError(f"conditions.{name}: {name} is the name of a member of every sample, choose another")
    if condition.source == "label":
        return {"source": "label"}
    assert condition.digest, "resolve the config first"
    form = {"source": "text", "mode": condition.mode, "length": condition.length}
    return form | {"tokenizer" if condition.mode == "tokens" else "encoder": condition.digest}


def encoding_id(encoding: Mapping[str, Any]) -> str:
    """E, 32 hex digits."""
    return digest_of(dict(encoding))[:32]


def cache_id(encoding: str, dataset_digest: str) -> str:
    """32 hex digits, of E and a dataset's manifest."""
    return digest_of({"encoding": encoding, "dataset": dataset_digest})[:32]


def members_of(encoding: Mapping[str, Any]) -> tuple[str, ...]:
    also = (f"{MIRRORED}.npy",) if encoding.get("mirrored") else ()
    return (LATENT, *also, *(f"{name}.npy" for name in encoding["conditions"]), "json")


def shape_of(encoding: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, h, w) of the latent of a square."""
    edge = encoding["resolution"] // encoding["autoencoder"]["f"]
    return encoding["autoencoder"]["channels"], edge, edge


def shapes_of(encoding: Mapping[str, Any]) -> list[list[int]]:
    """[C, h, w] of the latents of every bucket; [] where there are none."""
    own = encoding["autoencoder"]
    return [[own["channels"], height // own["f"], width // own["f"]] for width, height in encoding.get("buckets", ())]


def latents_of(root: Store, encoding: Mapping[str, Any]) -> Store:
    """`latents/E`, in which encoding.json says what E is.

    Raises:
        DataError: encoding.json is there and says something else.
    """
    store = root.at("latents", encoding_id(encoding))
    data = json.dumps(encoding, indent=1, sort_keys=True).encode()
    if not store.publish("encoding.json", data) and store.read("encoding.json") != data:
        raise DataError(f"{store.uri}/encoding.json is not the encoding of its folder: it was changed")
    return store


# --------------------------------------------------------------------------------------------- loading


def cache_store(root: Store, config: CacheLatents | TrainDenoiser) -> Store:
    """`caches/<cache id>` of a resolved config."""
    return root.at("caches", cache_id(encoding_id(encoding_of(config)), config.data.digest))


def find_cache(root: Store, config: CacheLatents | TrainDenoiser, digest: str = "") -> Manifest | None:
    """The finished cache of a resolved config, or None.

    Args:
        digest: of an older manifest; the newest if empty.
    """
    store = cache_store(root, config)
    try:
        found = cache_manifest(store, digest)
    except Missing:
        return None
    if found.meta["encoding"] != encoding_of(config) or found.meta["dataset"] != config.data.digest:
        raise DataError(f"{store.uri} holds a manifest that is not of this cache: it was changed")
    return found


def held_digest(root: Store, config: TrainDenoiser) -> str:
    """Digest of the manifest that a run of this config began with; a run that says none began with the first."""
    store = cache_store(root, config)
    versions = cache_versions(store)
    return config.cache or (hashlib.sha256(store.read(versions[0])).hexdigest() if versions else "")


def load_cache(root: Store, config: CacheLatents | TrainDenoiser, digest: str = "") -> Manifest:
    """The cache that a resolved config trains on; its shards lie in `root.at("latents", encoding_id(...))`.

    Args:
        digest: of an older manifest, some of whose shards may be gone; the newest if empty.

    Raises:
        DataError: there is none, and what the nearest one differs in; or its labels do not fit the config.
    """
    found = find_cache(root, config, digest)
    if found is None:
        raise DataError(_why_missing(root, config))
    for name, condition in config.conditions.items():
        if condition.source == "label" and found.meta["labels"] > condition.classes:
            raise DataError(f"conditions.{name}.classes={condition.classes} but the cache has labels up to "
                            f"{found.meta['labels'] - 1}: set conditions.{name}.classes={found.meta['labels']}"
                            )  # fmt: skip
    return found


def _why_missing(root: Store, config: CacheLatents | TrainDenoiser) -> str:
    """One sentence: the dataset is not encoded, not wholly, or otherwise than the config says."""
    encoding, name = encoding_of(config), config.data.name
    make = "run the job `cache_latents` with the same data, autoencoder, encoding and conditions"
    shards = load_dataset(root.at("datasets", name), config.data.digest).shards
    taken = everything(root)
    done = finished(root.at("latents", encoding_id(encoding)), shards, taken)
    if done:
        return (
            f"the latent cache of dataset {name} is not finished ({len(done)} of {len(shards)} shards encoded): {make}"
        )
    nearest: list[str] = []
    for folder in root.folders("latents"):
        if (other := stored_encoding(root, folder)) is None:
            continue
        differing = differences(other, encoding)
        if finished(root.at("latents", folder), shards, taken) and (not nearest or len(differing) < len(nearest)):
            nearest = differing
    if not nearest:
        return f"dataset {name} has no latent cache under {root.uri}: {make}"
    return (f"dataset {name} has no latent cache for this model; the nearest one differs in {'; '.join(nearest)}: "
            f"change that setting, or {make}")  # fmt: skip


def finished(latents: Store, shards: Iterable[Shard], taken: Taken, judged: bool = False) -> list[Shard]:
    """Those source shards whose latents are committed and there, or all taken down, by one listing.

    Args:
        judged: only those of which their maker has also said how they are.
    """
    there = {entry.key for entry in latents.list()}

    def done(shard: Shard) -> bool:
        key = latent_key(shard, taken.get(shard.sha256, ()))
        return gone(shard, taken) or {key, sidecar_key(key), *([made_key(key)] if judged else ())} <= there

    return [shard for shard in shards if done(shard)]


def made_key(key: str) -> str:
    """Of what the maker of a latent shard remembers of it."""
    return f"{key.removesuffix('.tar')}.made.json"


def latent_key(source: Shard, taken: Collection[str] = ()) -> str:
    """Key of the latent shard of a source shard, in `latents/E`."""
    return latent_key_of(source.sha256, taken)


def latent_key_of(source_sha256: str, taken: Collection[str] = ()) -> str:
    """Key of the latents of a source shard, without what was taken down.

    Args:
        taken: marks of its samples that were taken down.
    """
    lost = hashlib.sha256(" ".join(sorted(taken)).encode()).hexdigest()[:16]
    return f"{source_sha256}-{lost}.tar" if taken else f"{source_sha256}.tar"


def source_of(stem: str) -> str:
    """SHA-256 of the source shard that a file of `latents/E` belongs to, by its name without endings."""
    return stem.partition("-")[0]


def source_rows(latents: Store, shard: Shard, lost: Collection[int]) -> list[int]:
    """Rows, in the source shard, of the samples of a latent shard.

    Args:
        lost: rows of the source shard that have no latent.

    Raises:
        DataError: its columns do not say it.
    """
    if not shard.buckets:
        return [row for row in range(shard.samples + len(lost)) if row not in lost]
    table = columns_of(latents, shard, [ROW])
    rows = table[ROW].to_pylist() if table is not None and ROW in table.column_names else []
    if len({row for row in rows if type(row) is int and row >= 0}) != shard.samples:
        raise DataError(f"the columns of {latents.uri}/{shard.key} do not say of which row of its source each of its "
                        "samples is: they were changed")  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------- samples


def encode_sample(
    sample: Sample,
    latent: np.ndarray[Any, Any],
    conditions: Mapping[str, np.ndarray[Any, Any]],
    about: Mapping[str, Any],
) -> Sample:
    """The stored form of a sample.

    Args:
        sample: the source sample; its key is kept.
        latent: float16 or float32 (2, C, h, w) or (1, C, h, w).
        conditions: name -> array.
        about: goes into `json`.
    """
    members: dict[str, bytes | memoryview] = {LATENT: to_npy(latent)}
    members |= {f"{name}.npy": to_npy(array) for name, array in conditions.items()}
    members["json"] = json.dumps(about, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    return Sample(sample.key, members)


def stacked(
    samples: Iterable[Sample], conditions: Iterable[str], lengths: Mapping[str, int] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of stored samples, as a stream gives them: `latent` (n, 2, C, h, w), each named condition (n, ...).

    Args:
        lengths: conditions that are padded, with a mask (`Dataset.lengths`).
    """
    names, lengths = ("latent", *conditions), lengths or {}
    stored = [decode_sample(sample, names[1:]) for sample in samples]
    made: dict[str, np.ndarray[Any, Any]] = {}
    for name in names:
        arrays = [entry[name] for entry in stored]
        if name in lengths:
            made[name], made[mask_of(name)] = padded(arrays, lengths[name])
        else:
            made[name] = np.stack(arrays)
    return made


def decode_sample(sample: Sample, conditions: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a stored sample: `latent`, and each named condition; views of its bytes, read-only.

    Raises:
        DataError: a member is missing or not an array.
    """
    made = {}
    for name in ("latent", *conditions):
        if f"{name}.npy" not in sample.members:
            raise DataError(
                f"cached sample {sample.key} has no {name}.npy: its members are {', '.join(sample.members)}"
            )
        made[name] = from_npy(sample.members[f"{name}.npy"])
    return made


# ------------------------------------------------------------------------------ raw latents <-> model latents


def to_model(
    mean: Tensor, std: Tensor | None, noise: Tensor | None, channel_mean: Iterable[float], channel_std: Iterable[float]
) -> Tensor:
    """Raw latents => drawn, whitened model latents, float32.

    Args:
        mean, std: (B, C, h, w) of the posterior; std None for a deterministic encoding.
        noise: (B, C, h, w) standard normal; None takes the mean.
        channel_mean, channel_std: C numbers each, from the cache's manifest.
    """
    drawn = mean.float() if std is None or noise is None else mean.float() + std.float() * noise
    return (drawn - _channels(drawn, channel_mean)) / _channels(drawn, channel_std)


def from_model(latents: Tensor, channel_mean: Iterable[float], channel_std: Iterable[float]) -> Tensor:
    """Model latents (B, C, h, w) => raw latents, for the decoder."""
    return latents.float() * _channels(latents, channel_std) + _channels(latents, channel_mean)


def _channels(like: Tensor, values: Iterable[float]) -> Tensor:
    return like.new_tensor(list(values)).float().view(1, -1, 1, 1)
