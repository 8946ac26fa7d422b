"""A takedown, in the bytes: samples leave every latent shard, of every encoding and cache that holds them.

    survey -> (asked) -> mark -> rewrite -> succeed -> delete

mark      data/takedowns.py: from here on no job encodes them
rewrite   beside every latent shard that holds some, the same without them
succeed   every cache that names such a shard gets a newer manifest, which names the other
delete    the old shards, last of all: until then a reader sees one whole cache or the other

Every step looks at what there is and does what is lacking: killed at any moment, it is finished by another run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from calotype import caches, runs
from calotype.console import Progress
from calotype.data import cache, garbage, shards, statistics, takedowns
from calotype.data.elsewhere import dataset_store
from calotype.data.files import Entry
from calotype.data.manifest import (
    CACHE,
    Manifest,
    Shard,
    cache_versions,
    load_dataset,
    publish_cache,
    sidecar_key,
    versions_of,
)
from calotype.data.store import Store, open_store
from calotype.errors import CalotypeError, DataError
from calotype.tasks import accept
from calotype.tasks.cache import READERS
from calotype.tasks.encode import Latent
from calotype.tasks.made import NOT_RECORDED, Made, remember, remembered, written

T = TypeVar("T")
R = TypeVar("R")

REWRITERS = 2  # latent shards rewritten at once: each is held in memory


@dataclass
class Source:
    """A source shard: where it lies, and the datasets that name it.  `shard` None: none does, any more."""

    sha256: str
    store: Store | None = None
    shard: Shard | None = None
    datasets: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Survey:
    """What a takedown will do.

    Attributes:
        keys: of the list; `hits`: those of each source shard, by its SHA-256.
        sources: those that have some.
        taken: what will have been taken down, of this list and before; `unmarked`: samples that were not yet.
        stale: E -> files of the latent shards that hold some; caches: those that name them.
    """

    keys: Collection[str]
    hits: Mapping[str, Collection[str]]
    sources: Mapping[str, Source]
    taken: takedowns.Taken
    unmarked: int
    stale: Mapping[str, Sequence[Entry]]
    caches: Sequence[caches.Known]

    @property
    def unknown(self) -> int:
        return len(set(self.keys).difference(*self.hits.values()))

    def rows(self, manifest: Manifest) -> list[Shard]:
        return stale_rows(manifest, self.taken)

    def lost(self, rows: Iterable[Shard]) -> int:
        """Samples that these latent shards lose by this list."""
        return sum(len(self.hits.get(row.source_sha256, ())) for row in rows)

    def places(self) -> dict[str, tuple[int, int]]:
        """Dataset -> its samples that the list names, in how many of its shards."""
        found: dict[str, tuple[int, int]] = {}
        for source in self.sources.values():
            for name in source.datasets:
                samples, count = found.get(name, (0, 0))
                found[name] = samples + len(self.hits[source.sha256]), count + 1
        return found


# --------------------------------------------------------------------------------------------- beforehand


def survey(uri: str, keys: Collection[str]) -> Survey:
    """Look for the keys in every source shard of every dataset under a root, and in latents whose source is gone.

    Raises:
        CalotypeError: a job encodes a dataset that has some, just now.
        DataError: a manifest, or the only copy of some keys, is damaged.
    """
    root = open_store(uri)
    sources, files = _sources(uri), _files(root)
    for source in {cache.source_of(stem) for latents in files.values() for stem in latents}:
        if re.fullmatch(r"[0-9a-f]{64}", source):
            sources.setdefault(source, Source(source))

    def found(source: Source) -> list[str]:
        return [key for _, key in _keys(root, source) if key in keys]

    every = list(sources.values())
    hits = {source.sha256: some for source, some in zip(every, _each(found, every, "search")) if some}
    taken = {name: set(marks) for name, marks in takedowns.everything(root).items()}
    marked = sum(map(len, taken.values()))
    for name, some in hits.items():
        taken.setdefault(name, set()).update(map(takedowns.mark, some))
    unmarked = sum(map(len, taken.values())) - marked
    known = caches.known(uri)
    for one in known:
        if one.manifest is None and not one.encoding:
            raise CalotypeError(f"cache {one.id} is {one.state}: give it up first, with `calotype cache gc {one.id}`")
    _refuse_busy(uri, known, taken)
    named = [one for one in known if one.manifest is not None and stale_rows(one.manifest, taken)]
    mine = {name: sources[name] for name in hits}
    return Survey(keys, hits, mine, taken, unmarked, _stale(files, taken), named)


def _sources(uri: str) -> dict[str, Source]:
    """Every source shard of every version of every dataset, by its SHA-256."""
    found: dict[str, Source] = {}
    for name in open_store(uri).folders("datasets"):
        store = dataset_store(uri, name)
        for key in reversed(versions_of(store)):
            for shard in Manifest.from_bytes(store.read(key)).shards:
                source = found.setdefault(shard.sha256, Source(shard.sha256, store, shard))
                source.datasets.add(name)
    return found


def _files(root: Store) -> dict[str, dict[str, list[Entry]]]:
    """E -> latent shard, by its key without endings -> its files."""
    found: dict[str, dict[str, list[Entry]]] = {}
    for encoding in root.folders("latents"):
        mine = found.setdefault(encoding, {})
        for entry in root.at("latents", encoding).list():
            if entry.key != "encoding.json":
                mine.setdefault(garbage.stem(entry), []).append(entry)
    return found


def _keys(root: Store, source: Source) -> list[tuple[int, str]]:
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
    best: tuple[Store, Shard] | None = None  # the one from which the least was taken so far
    for encoding in root.folders("latents"):
        latents = root.at("latents", encoding)
        for key in [entry.key for entry in latents.list(source.sha256) if entry.key.endswith(".tar")]:
            row = shards.existing_shard(latents, key)
            if row is not None and (best is None or row.samples > best[1].samples):
                best = latents, row
    if best is not None:
        return _keys_of_latents(*best)
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


def _stale(files: Mapping[str, Mapping[str, list[Entry]]], taken: takedowns.Taken) -> dict[str, list[Entry]]:
    """E -> files of latent shards from which something was taken down."""
    found: dict[str, list[Entry]] = {}
    for encoding, latents in files.items():
        for stem, entries in latents.items():
            source = cache.source_of(stem)
            if source in taken and stem != _stem(source, taken):
                found.setdefault(encoding, []).extend(entries)
    return found


def _stem(source_sha256: str, taken: takedowns.Taken) -> str:
    return cache.latent_key_of(source_sha256, taken[source_sha256]).removesuffix(".tar")


def stale_rows(manifest: Manifest, taken: takedowns.Taken) -> list[Shard]:
    """Shards of a cache from which something was taken down."""
    mine = (row for row in manifest.shards if row.source_sha256 in taken)
    return [row for row in mine if row.key != f"{_stem(row.source_sha256, taken)}.tar"]


def _refuse_busy(uri: str, known: Iterable[caches.Known], taken: takedowns.Taken) -> None:
    """A job that has begun on a shard would still store what is taken down meanwhile."""
    for one in known:
        if one.manifest is not None or one.error:
            continue
        rows = load_dataset(dataset_store(uri, one.dataset), one.digest).shards
        for maker in one.makers if any(row.sha256 in taken for row in rows) else ():
            attempt = runs.last_attempt(maker.store)
            if attempt and (who := runs.alive(maker, attempt)):
                raise CalotypeError(f"cache_latents {maker.name} encodes dataset {one.dataset} on {who} just now: "
                                    "let it end, or `calotype cancel` it, first")  # fmt: skip


def _each(work: Callable[[T], R], items: Sequence[T], step: str, jobs: int = READERS) -> list[R]:
    """`work` of every item, in their order, with a bar."""
    made: list[R] = []
    with ThreadPoolExecutor(jobs, step) as pool, Progress(len(items), "shards", step) as bar:
        for one in pool.map(work, items):
            made.append(one)
            bar.update(len(made))
    return made


# ------------------------------------------------------------------------------------------------ the steps


def take_down(uri: str, found: Survey) -> int:
    """All of it; bytes that were deleted."""
    mark(uri, found)
    rewrite(uri)
    while succeed(uri):  # until no cache names what goes, also none that was committed meanwhile
        pass
    return delete(uri)


def mark(uri: str, found: Survey) -> None:
    root = open_store(uri)
    for source, keys in found.hits.items():
        takedowns.add(root, source, [takedowns.mark(key) for key in keys])


def rewrite(uri: str) -> None:
    """
    Raises:
        DataError: a latent shard is damaged, by name.
    """
    root = open_store(uri)
    taken, work = takedowns.everything(root), []
    for encoding, latents in _files(root).items():
        there = {entry.key for entries in latents.values() for entry in entries}
        for source in {cache.source_of(stem) for stem in latents}.intersection(taken):
            new = _stem(source, taken)
            old = [stem for stem in latents if stem != new and cache.source_of(stem) == source]
            old = [stem for stem in old if sidecar_key(f"{stem}.tar") in there]
            if old and not {sidecar_key(f"{new}.tar"), cache.made_key(f"{new}.tar")} <= there:
                work.append((root.at("latents", encoding), old[0], taken[source]))
    _each(_rewritten, work, "rewrite", REWRITERS)


def _rewritten(work: tuple[Store, str, Collection[str]]) -> None:
    """A latent shard without some of its samples: as the job would make it now; none where nothing is left."""
    latents, stem, marks = work
    old = shards.existing_shard(latents, f"{stem}.tar")
    assert old is not None
    unit = replace(old, sha256=old.source_sha256)  # what a latent shard says of its source shard
    bucket = [number for number, count in old.buckets or ((0, old.samples),) for _ in range(count)]
    rows = cache.source_rows(latents, old, ())  # which count with buckets alone
    every = map(Latent, bucket, rows, shards.iterate(latents, [old]))
    kept = [one for one in every if takedowns.mark(one.sample.key) not in marks]
    if not kept:
        return
    new, samples = written(latents, cache.latent_key(unit, marks), kept, unit, bool(old.buckets))
    made = remembered(latents, unit, old)
    lost = [one for one in made.lost if takedowns.mark(one.key) not in marks] if made else []
    decoded = [one for one in made.decoded if takedowns.mark(one.key) not in marks] if made else []
    device = made.device if made else NOT_RECORDED
    remember(latents, Made(unit, new, statistics.of_samples(samples), device, lost, decoded))


def succeed(uri: str) -> int:
    """Caches that got a newer manifest."""
    taken = takedowns.everything(open_store(uri))
    stale = [one for one in caches.known(uri) if one.manifest is not None and stale_rows(one.manifest, taken)]
    for one in stale:
        place = open_store(uri).at("caches", one.id)
        newest = cache_versions(place)[-1]
        manifest = Manifest.from_bytes(place.read(newest))
        publish_cache(place, _successor(uri, manifest, taken), newest)
    return len(stale)


def _successor(uri: str, manifest: Manifest, taken: takedowns.Taken) -> Manifest:
    """The manifest of the same cache without what was taken down."""
    root = open_store(uri)
    latents = root.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    stale = stale_rows(manifest, taken)
    rows = [new for row in manifest.shards if (new := _row(latents, row, taken) if row in stale else row) is not None]

    def made_of(row: Shard) -> Made:
        found = remembered(latents, row, row)
        figures = found.statistics if found else statistics.of_samples(shards.iterate(latents, [row]))
        return found or Made(row, row, figures, NOT_RECORDED)

    with ThreadPoolExecutor(READERS, "statistics") as pool:
        made = list(pool.map(made_of, rows))
    meta = {**manifest.meta, "supersedes": manifest.digest}
    before = {(one["shard"], one["key"]): one for one in meta.get("quarantined", ())}
    meta["quarantined"] = list((before | _taken_from(uri, manifest, stale, taken)).values())
    with suppress(DataError):  # what is left is all alike: what it was scaled by stays
        merged = statistics.merge([one.statistics for one in made]) if made else {}
        lost = [one for one in before.values() if one["reason"] != takedowns.REASON]
        decoded = [found for one in made for found in one.decoded]
        meta |= merged | ({"acceptance": accept.report(decoded, merged, lost)} if merged else {})
    return replace(manifest, format=CACHE, shards=tuple(rows), meta=meta)


def _row(latents: Store, row: Shard, taken: takedowns.Taken) -> Shard | None:
    """The shard in the place of one from which something was taken; None where nothing is left of it."""
    marks = taken[row.source_sha256]
    new = shards.existing_shard(latents, cache.latent_key(replace(row, sha256=row.source_sha256), marks))
    if new is not None:
        return replace(new, split=row.split)
    if all(takedowns.mark(one.key) in marks for one in shards.iterate(latents, [row])):
        return None
    raise DataError(f"{latents.uri}/{row.key} should have been written anew by now: run the same command again")


def _taken_from(
    uri: str, manifest: Manifest, stale: Iterable[Shard], taken: takedowns.Taken
) -> dict[tuple[str, str], dict[str, Any]]:
    """(source shard, key) -> what a manifest says of a sample that was taken from one of these shards."""
    root, store = open_store(uri), dataset_store(uri, manifest.name)
    try:
        rows = load_dataset(store, manifest.meta["dataset"]).shards
    except DataError:
        rows = ()  # its dataset is gone
    found = {}
    for name in dict.fromkeys(row.source_sha256 for row in stale):
        mine = [row for row in rows if row.sha256 == name]
        source = Source(name, store, mine[0]) if mine else Source(name)
        for row, key in _keys(root, source):
            for shard in [one.key for one in mine] or [name]:
                if takedowns.mark(key) in taken[name]:
                    found[shard, key] = takedowns.entry(shard, row, key)
    return found


def delete(uri: str) -> int:
    """Files of latent shards from which something was taken down; bytes."""
    root = open_store(uri)
    files, taken = _files(root), takedowns.everything(root)
    stale = _stale(files, taken)
    garbage.delete(root, stale)
    return sum(entry.size for entries in stale.values() for entry in entries)
