"""Where samples lie: source shards and their keys, latent shards of every encoding, and which of them are stale.

A latent shard is stale from which something was taken down since it was written: its name says what was before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from calotype.data import cache, garbage, shards, takedowns
from calotype.data.elsewhere import dataset_store
from calotype.data.files import Entry
from calotype.data.manifest import Manifest, Shard, cache_manifest, versions_of
from calotype.data.store import Missing, Store, open_store
from calotype.errors import DataError
from calotype.tasks.made import remembered

Named = tuple[str, str, list[str]]  # E, a latent shard by its key without endings, ids of caches


@dataclass
class Source:
    """A source shard: where it lies, and the datasets that name it.  `shard` None: none does, any more."""

    sha256: str
    store: Store | None = None
    shard: Shard | None = None
    datasets: set[str] = field(default_factory=set)


def sources(uri: str) -> dict[str, Source]:
    """Every source shard of every version of every dataset, by its SHA-256."""
    found: dict[str, Source] = {}
    for name in open_store(uri).folders("datasets"):
        store = dataset_store(uri, name)
        for key in reversed(versions_of(store)):
            for shard in Manifest.from_bytes(store.read(key)).shards:
                source = found.setdefault(shard.sha256, Source(shard.sha256, store, shard))
                source.datasets.add(name)
    return found


def files_of(root: Store) -> dict[str, dict[str, list[Entry]]]:
    """E -> latent shard, by its key without endings -> its files."""
    found: dict[str, dict[str, list[Entry]]] = {}
    for encoding in root.folders("latents"):
        mine = found.setdefault(encoding, {})
        for entry in root.at("latents", encoding).list():
            if entry.key != "encoding.json":
                mine.setdefault(garbage.stem(entry), []).append(entry)
    return found


def keys_of(root: Store, source: Source) -> list[tuple[int, str]]:
    """(row, key) of a source shard's samples; from latents of it where it cannot be read itself.

    Raises:
        DataError: neither can be.
    """
    why: DataError | None = None
    if source.store is not None and source.shard is not None:
        try:
            return list(enumerate(takedowns.keys_in(source.store, source.shard)))
        except DataError as error:
            why = error
    found: list[tuple[Store, Shard]] = []
    for encoding in root.folders("latents"):
        latents = root.at("latents", encoding)
        for key in [entry.key for entry in latents.list(source.sha256) if entry.key.endswith(".tar")]:
            try:
                row = shards.existing_shard(latents, key)
                found += [(latents, row)] if row is not None else []
            except DataError as error:
                why = error
    for latents, row in sorted(found, key=lambda one: -one[1].samples):  # from which the least was taken so far
        try:
            return _keys_of_latents(latents, row)
        except (DataError, Missing) as error:
            why = DataError(str(error))
    if why is not None:
        raise why
    return []


def _keys_of_latents(latents: Store, shard: Shard) -> list[tuple[int, str]]:
    """The same from a latent shard; rows are -1 where nobody knows which these are."""
    made = remembered(latents, shard, shard)
    lost = {one.row: one.key for one in made.lost} if made else {}
    stored = [sample.key for sample in shards.iterate(latents, [shard])]
    known = shard.buckets or (made and shard.key == cache.latent_key_of(shard.source_sha256))
    rows = cache.source_rows(latents, shard, lost) if known else [-1] * len(stored)
    return [*zip(rows, stored, strict=True), *lost.items()]


def stale_files(files: Mapping[str, Mapping[str, list[Entry]]], taken: takedowns.Taken) -> dict[str, list[Entry]]:
    """E -> files of latent shards from which something was taken down."""
    found: dict[str, list[Entry]] = {}
    for encoding, latents in files.items():
        for stem, entries in latents.items():
            source = cache.source_of(stem)
            if source in taken and stem != stem_now(source, taken):
                found.setdefault(encoding, []).extend(entries)
    return found


def stem_now(source_sha256: str, taken: takedowns.Taken) -> str:
    """Of the latent shards of a source shard, as they are named since."""
    return cache.latent_key_of(source_sha256, taken[source_sha256]).removesuffix(".tar")


def stale_rows(manifest: Manifest, taken: takedowns.Taken) -> list[Shard]:
    """Shards of a cache from which something was taken down."""
    mine = (row for row in manifest.shards if row.source_sha256 in taken)
    return [row for row in mine if row.key != f"{stem_now(row.source_sha256, taken)}.tar"]


def named(root: Store) -> dict[str, dict[str, list[str]]]:
    """E -> latent shard, by its key without endings -> ids of the caches whose newest manifest names it.

    Raises:
        DataError: a manifest is damaged.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for identity in root.folders("caches"):
        with suppress(Missing):  # given up just now
            manifest = cache_manifest(root.at("caches", identity))
            mine = found.setdefault(cache.encoding_id(manifest.meta["encoding"]), {})
            for row in manifest.shards:
                mine.setdefault(row.key.removesuffix(".tar"), []).append(identity)
    return found


def stale_named(root: Store, taken: takedowns.Taken) -> list[Named]:
    """Latent shards that caches name and from which something was taken down."""
    found = []
    for encoding, stems in named(root).items():
        for stem, ids in stems.items():
            source = cache.source_of(stem)
            if source in taken and stem != stem_now(source, taken):
                found.append((encoding, stem, ids))
    return found
