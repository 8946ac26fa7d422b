"""Manifests: the rows that name every shard of a dataset or cache, written last (formats v2; v1 is read).

A manifest holds one row per shard and nothing per sample, so that 10^5 shards are some 30 MB.  Its SHA-256 names it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from calotype.data.store import Missing, Store
from calotype.errors import DataError

DATASET, CACHE = "calotype.dataset/2", "calotype.cache/2"
DATASETS, CACHES = (DATASET, "calotype.dataset/1"), (CACHE, "calotype.cache/1")  # of v1, rows lack the last two
FIRST = "manifest.json"  # of a cache
_VERSION = re.compile(r"manifests/\d{6,}\.json")
_ENCODING = {"autoencoder": dict, "conditions": dict, "resolution": int, "batch": int, "dtype": str, "posterior": str}
_AUTOENCODER = {"encoder": str, "f": int, "channels": int}
MAX_CHUNKS = 2**20  # of one shard: a row of a few bytes must not ask for memory without end


@dataclass(frozen=True)
class Shard:
    """One manifest row.  Every chunk holds `chunk_samples` samples but the last of each bucket."""

    key: str
    bytes: int
    samples: int
    chunk_samples: int
    sha256: str
    sidecar_sha256: str
    columns_sha256: str = ""
    split: str = "train"
    source_sha256: str = ""  # of the shard that this one was encoded from
    chunk_bytes: int = 0  # of the largest chunk; 0 in manifests of version 1
    buckets: tuple[tuple[int, int], ...] = ()  # (bucket, samples), in order; empty: all samples have one shape

    @property
    def chunks(self) -> int:
        return len(self.chunk_counts())

    def chunk_counts(self) -> list[int]:
        """Samples per chunk; no chunk holds two buckets."""
        return [count for _, count in self.chunk_buckets()]

    def chunk_buckets(self) -> list[tuple[int, int]]:
        """(bucket, samples) per chunk."""
        step = self.chunk_samples
        parts = self.buckets or ((0, self.samples),)
        return [(bucket, min(step, size - start)) for bucket, size in parts for start in range(0, size, step)]


ROW = tuple(item.name for item in fields(Shard))
_KINDS = tuple((item.name, {"int": int, "str": str}.get(str(item.type), tuple)) for item in fields(Shard))


@dataclass(frozen=True)
class Manifest:
    """What a dataset or a cache is.

    `meta["buckets"]` lists the shape of every bucket that rows name, where samples have several.
    """

    format: str
    name: str
    members: tuple[str, ...]
    shards: tuple[Shard, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON; rows as arrays under `fields`, because there may be 10^5 of them.

        A manifest that was read as v1 is written as v1 again: its digest is its name.
        """
        names = ROW if self.format in (DATASET, CACHE) else ROW[: ROW.index("chunk_bytes")]
        rows = [list(astuple(shard))[: len(names)] for shard in self.shards]
        head = {"format": self.format, "name": self.name, "members": list(self.members), "meta": self.meta}
        return canonical(head | {"totals": self.totals(), "fields": list(names), "shards": rows})

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        found = parsed(data, "a manifest")
        if found.get("format") not in (*DATASETS, *CACHES):
            raise DataError(f"a manifest of format {found.get('format')!r} is newer or other than {DATASET}, {CACHE}")
        try:
            names, (name, members, meta) = found["fields"], (found[key] for key in ("name", "members", "meta"))
            if not (isinstance(name, str) and isinstance(meta, dict) and all(isinstance(one, str) for one in members)):
                raise TypeError("its name, members or meta have another type")
            rows = (dict(zip(names, row, strict=True)) for row in found["shards"])
            return Manifest(found["format"], name, tuple(members), tuple(shard_of(row) for row in rows), meta)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a manifest of format {found['format']} lacks or has too much of: {error}") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def split(self, name: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)

    def totals(self) -> dict[str, dict[str, int]]:
        """split -> {"shards", "samples", "bytes"}."""
        totals: dict[str, dict[str, int]] = {}
        for shard in self.shards:
            total = totals.setdefault(shard.split, {"shards": 0, "samples": 0, "bytes": 0})
            for name, amount in (("shards", 1), ("samples", shard.samples), ("bytes", shard.bytes)):
                total[name] += amount
        return totals


def shard_of(row: dict[str, Any]) -> Shard:
    """The shard that a row of a manifest describes.

    Raises:
        ValueError, TypeError: what no shard can have.
    """
    shard = Shard(**row | {"buckets": tuple((bucket, size) for bucket, size in row.get("buckets", ()))})
    for name, kind in _KINDS:
        if type(value := getattr(shard, name)) is not kind:
            raise TypeError(f"{name} {value!r} of shard {shard.key!r} is no {kind.__name__}")
    parts = [number for part in shard.buckets for number in part]
    if any(type(number) is not int or number < 0 for number in parts) or 0 in parts[1::2]:
        raise ValueError(f"buckets of shard {shard.key!r}: {shard.buckets[:3]} ...")
    counted = sum(parts[1::2]) if shard.buckets else shard.samples
    sound = shard.samples > 0 < shard.chunk_samples and shard.bytes > 0 <= shard.chunk_bytes
    if not sound or counted != shard.samples or shard.samples // shard.chunk_samples > MAX_CHUNKS:
        raise ValueError(f"shard {shard.key!r} of {shard.samples} samples in chunks of {shard.chunk_samples}")
    return shard


def sidecar_key(key: str) -> str:
    return f"{key.removesuffix('.tar')}.sidecar.json"


def columns_key(key: str) -> str:
    return f"{key.removesuffix('.tar')}.columns.parquet"


def held_out(key: str, share: float) -> bool:
    """Whether a sample belongs to the held-out split: by its key alone, so that it never moves."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2.0**64


def canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def parsed(data: bytes, what: str, *expected: str) -> dict[str, Any]:
    """The JSON object that a file of ours is.

    Raises:
        DataError: not a JSON object, or of a format other than those expected.
    """
    try:
        found = json.loads(data, parse_constant=_no_number)
        assert isinstance(found, dict)
    except (ValueError, AssertionError, RecursionError) as error:
        raise DataError(f"{what} is not the JSON it should be: {error}") from error
    if expected and found.get("format") not in expected:
        raise DataError(f"{what} has format {found.get('format')!r}, this version reads {', '.join(expected)}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


# -------------------------------------------------------------------------------------------- datasets


def publish_dataset(store: Store, manifest: Manifest) -> str:
    """Make it the newest version under `manifests/`, unless it is already; returns its digest."""
    data = manifest.to_bytes()
    while True:
        versions = versions_of(store)
        if not versions or store.read(versions[-1]) != data:
            newest = int(Path(versions[-1]).stem) if versions else 0
            if not store.publish(f"manifests/{newest + 1:06d}.json", data):
                continue  # another writer took the number: look again
        return manifest.digest


def load_dataset(store: Store, digest: str = "") -> Manifest:
    """The newest version whose digest is this one, or begins so (with at least 8 digits); the newest of all for ""."""
    if digest and not re.fullmatch(r"[0-9a-f]{8,64}", digest):
        raise DataError(f"{digest!r} is no digest of a version of {store.uri}: give 8 to 64 hex digits of data.digest")
    for key in reversed(versions_of(store)):
        data = store.read(key)
        if hashlib.sha256(data).hexdigest().startswith(digest):
            return Manifest.from_bytes(data)
    if digest:
        raise DataError(f"{store.uri} has no version with digest {digest}: correct data.digest or leave it empty")
    raise DataError(
        f"there is no dataset at {store.uri}: run the job `prepare` or `calotype data index` first, or correct its name"
    )


def versions_of(store: Store) -> list[str]:
    """Keys of a dataset's manifests, oldest first."""
    return _numbered(entry.key for entry in store.list("manifests/"))


def _numbered(keys: Iterable[str]) -> list[str]:
    return sorted((key for key in keys if _VERSION.fullmatch(key)), key=lambda key: int(Path(key).stem))


# -------------------------------------------------------------------------------------------- caches


def cache_versions(store: Store) -> list[str]:
    """Keys of a cache's manifests, oldest first: the job's, then one for every time that samples were taken down."""
    keys = [entry.key for entry in store.list("manifest")]
    return [key for key in keys if key == FIRST] + _numbered(keys)


def cache_manifest(store: Store, digest: str = "") -> Manifest:
    """The newest manifest of a cache, or the newest whose digest begins so.

    Raises:
        Missing: there is none.
        DataError: it is not the manifest of a cache, or does not say of which encoding and dataset.
    """
    for key in reversed(cache_versions(store)):
        data = store.read(key)
        if hashlib.sha256(data).hexdigest().startswith(digest):
            found = Manifest.from_bytes(data)
            if found.format not in CACHES:
                raise DataError(f"{store.uri}/{key} is no latent cache but a {found.format}")
            check_encoding(found.meta.get("encoding"), f"meta.encoding of {store.uri}/{key}")
            if not isinstance(found.meta.get("dataset"), str):
                raise DataError(f"meta.dataset of {store.uri}/{key} is no digest of a dataset: it was changed")
            return found
    raise Missing(f"{store.uri} has no manifest" + (f" with digest {digest}" if digest else ""))


def check_encoding(found: Any, what: str) -> None:
    """Refuse what is not an encoding of latents.

    Raises:
        DataError: it is not what the identity of an encoding stands for: a field is missing, or has another type.
    """

    def fits(data: Any, kinds: dict[str, type]) -> bool:
        return isinstance(data, dict) and all(type(data.get(name)) is kind for name, kind in kinds.items())

    sound = fits(found, _ENCODING) and fits(found["autoencoder"], _AUTOENCODER) and found["autoencoder"]["f"] > 0
    sound = sound and all(fits(form, {"source": str}) for form in found["conditions"].values())
    buckets = found.get("buckets", []) if sound else None
    if not isinstance(buckets, list) or any(
        not isinstance(size, list) or [type(edge) for edge in size] != [int, int] for size in buckets
    ):
        raise DataError(f"{what} is no encoding of latents: it was changed, or is of another version")


def stored_encoding(root: Store, folder: str) -> dict[str, Any] | None:
    """What E, the name of a folder of `latents`, stands for; None where its encoding.json was deleted or is another."""
    try:
        found = parsed(root.at("latents", folder).read("encoding.json"), "encoding.json")
        check_encoding(found, "encoding.json")
    except (Missing, DataError):
        return None
    return found


def publish_cache(store: Store, manifest: Manifest, newest: str = "") -> bool:
    """Make it the manifest of a cache, or the one that takes the place of `newest`; False if there is one already."""
    if not newest:
        return store.publish(FIRST, manifest.to_bytes())
    number = 1 if newest == FIRST else int(Path(newest).stem)
    return store.publish(f"manifests/{number + 1:06d}.json", manifest.to_bytes())
