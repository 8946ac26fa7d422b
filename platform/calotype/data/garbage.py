"""Latents that no cache and no run refers to."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from calotype.data.files import Entry
from calotype.data.lease import LEASE
from calotype.data.manifest import sidecar_key
from calotype.data.store import Store

DELETERS = 16  # files deleted at once


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


def stem(entry: Entry) -> str:
    """What the files of one latent shard have in common."""
    return entry.key.partition(".")[0]


def delete(root: Store, found: Mapping[str, Sequence[Entry]]) -> None:
    """Sidecars first: without its sidecar a shard is no shard, however this ends.  What E is, last of all."""
    for encoding, entries in found.items():
        store = root.at("latents", encoding)
        finishing = {sidecar_key(entry.key) for entry in entries if entry.key.endswith(".tar")}
        keys = {entry.key for entry in entries}
        for part in (keys & finishing, keys - finishing - {"encoding.json"}, keys & {"encoding.json"}):
            with ThreadPoolExecutor(DELETERS, "delete") as pool:
                list(pool.map(store.delete, part))
