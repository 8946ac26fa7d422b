"""Latents that no cache and no run refers to."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from calotype.data.files import Entry
from calotype.data.lease import LEASE
from calotype.data.manifest import sidecar_key
from calotype.data.store import Store

DELETERS = 16  # shards deleted at once
WRITTEN = 3600.0  # seconds that no file takes to be written
SIDECAR = sidecar_key("")  # how the keys of sidecars end


def find(root: Store, kept: Mapping[str, Collection[str]], spared: float) -> dict[str, list[Entry]]:
    """E -> files in `latents/E` that may go; `encoding.json` too, where nothing else is left.

    Args:
        kept: E -> latent shards that are referred to, by their keys without endings.
        spared: seconds: files younger than that stay, for the job that wrote them may not have told anybody yet.
    """
    found: dict[str, list[Entry]] = {}
    for encoding in root.folders("latents"):
        entries = list(root.at("latents", encoding).list())
        mine = kept.get(encoding, ())
        lost = [entry for entry in entries if stem(entry) not in mine or entry.key.endswith(LEASE)]
        lost = [entry for entry in lost if entry.modified < time.time() - spared]
        if len(lost) < len(entries):
            lost = [entry for entry in lost if entry.key != "encoding.json"]
        if lost:
            found[encoding] = lost
    return found


def unfinished(root: Store, spared: float) -> list[Entry]:
    """What workers that were killed left of files that never got their names.

    Args:
        spared: seconds: what is younger stays, and in any case what somebody may be writing.
    """
    last = time.time() - max(spared, WRITTEN)
    return [entry for entry in root.unfinished("latents") if entry.modified < last]


def stem(entry: Entry) -> str:
    """What the files of one latent shard have in common."""
    return entry.key.partition(".")[0]


def delete(root: Store, found: Mapping[str, Sequence[Entry]]) -> None:
    """Shard by shard, of each its sidecar first: without it a shard is no shard, however this ends.  Its other files at
    once after that: a job that begins meanwhile would finish again what it still finds.  What E is, last of all.
    """
    for encoding, entries in found.items():
        store, shards = root.at("latents", encoding), dict[str, list[str]]()
        for entry in entries:
            shards.setdefault(stem(entry), []).append(entry.key)
        about = shards.pop("encoding", [])

        def shard(keys: list[str], store: Store = store) -> None:
            for key in sorted(keys, key=lambda key: not key.endswith(SIDECAR)):
                store.delete(key)

        with ThreadPoolExecutor(DELETERS, "delete") as pool:
            list(pool.map(shard, shards.values()))
        shard(about)
