"""Samples that were taken down: whatever is encoded from now on, no latent of them is stored again.

    takedowns/<SHA-256 of a source shard>/<SHA-256 of a key>    an empty file: that sample, of that shard

Facts are only ever added, so those who add them at once agree; nobody's name is in them.  What a source shard has lost
names its latent shard (`cache.latent_key`), so that an old one cannot be taken for one without them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from calotype.data.manifest import Shard
from calotype.data.shards import iterate, keys_of
from calotype.data.store import Store

FOLDER = "takedowns"
REASON = "taken down"
SHA256 = re.compile(r"[0-9a-f]{64}")  # other files are somebody else's: of a file browser, of a mount

Taken = Mapping[str, Collection[str]]  # SHA-256 of a source shard -> marks of its samples


def mark(key: str) -> str:
    """What stands for a sample's key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def everything(root: Store) -> dict[str, frozenset[str]]:
    """All that was taken down, by one listing."""
    found: dict[str, set[str]] = {}
    for entry in root.at(FOLDER).list():
        shard, _, name = entry.key.partition("/")
        if SHA256.fullmatch(shard) and SHA256.fullmatch(name):
            found.setdefault(shard, set()).add(name)
    return {shard: frozenset(names) for shard, names in found.items()}


def of_shard(root: Store, source_sha256: str) -> frozenset[str]:
    """Of one source shard, as of now."""
    return frozenset(entry.key for entry in root.at(FOLDER, source_sha256).list() if SHA256.fullmatch(entry.key))


def add(root: Store, source_sha256: str, marks: Collection[str]) -> None:
    store = root.at(FOLDER, source_sha256)
    for name in sorted(marks):
        store.publish(name, b"")


def gone(source: Shard, taken: Taken) -> bool:
    """Whether every sample of a source shard was taken down: it has no latent shard."""
    return len(taken.get(source.sha256, ())) >= source.samples


def keys_in(store: Store, source: Shard) -> list[str]:
    """Keys of a source shard's samples, in their order: from its columns, or from all of its bytes."""
    keys = keys_of(store, source)
    return [sample.key for sample in iterate(store, [source])] if keys is None else keys


def rows(store: Store, source: Shard, marks: Collection[str]) -> set[int]:
    """Which of a source shard's samples these are."""
    return {one["row"] for one in left_out(store, source, marks)}


def left_out(store: Store, source: Shard, marks: Collection[str]) -> list[dict[str, Any]]:
    """What a cache's manifest says of those of a source shard, beside the samples that could not be encoded."""
    keys = keys_in(store, source) if marks else ()
    return [entry(source.key, row, key) for row, key in enumerate(keys) if mark(key) in marks]


def entry(shard: str, row: int, key: str) -> dict[str, Any]:
    return {"shard": shard, "row": row, "key": key, "reason": REASON}
