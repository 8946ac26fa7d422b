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
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from calotype import caches, runs
from calotype.console import Progress, many, size
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
)
from calotype.data.store import Missing, Store, open_store
from calotype.errors import CalotypeError, DataError
from calotype.tasks import accept, holders
from calotype.tasks.cache import READERS
from calotype.tasks.encode import Latent
from calotype.tasks.made import NOT_RECORDED, Made, remember, remembered, written

T = TypeVar("T")
R = TypeVar("R")

Damaged = Mapping[tuple[str, str], str]

REWRITERS = 2  # latent shards rewritten at once: each is held in memory


@dataclass(frozen=True)
class Survey:
    """What a takedown will do.

    Attributes:
        keys: of the list; `hits`: those of each source shard, by its SHA-256.
        sources: those that have some.
        taken: what will have been taken down, of this list and before; `unmarked`: samples that were not yet.
        stale: E -> files of the latent shards that hold some; caches: those that name them.
        unread: why keys of some source shards, and of all latents of these, could not be read: nobody knows whether the
            list names samples of them.
    """

    keys: Collection[str]
    hits: Mapping[str, Collection[str]]
    sources: Mapping[str, holders.Source]
    taken: takedowns.Taken
    unmarked: int
    stale: Mapping[str, Sequence[Entry]]
    caches: Sequence[caches.Known]
    unread: Sequence[str] = ()

    @property
    def unknown(self) -> int:
        return len(set(self.keys).difference(*self.hits.values()))

    @property
    def orphans(self) -> int:
        """Samples whose source shard no dataset names."""
        return sum(len(self.hits[name]) for name, source in self.sources.items() if not source.datasets)

    def rows(self, manifest: Manifest) -> list[Shard]:
        return holders.stale_rows(manifest, self.taken)

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
        DataError: a manifest is damaged.
    """
    root = open_store(uri)
    sources, files = holders.sources(uri), holders.files_of(root)
    for source in {cache.source_of(stem) for latents in files.values() for stem in latents}:
        if re.fullmatch(r"[0-9a-f]{64}", source):
            sources.setdefault(source, holders.Source(source))

    def found(source: holders.Source) -> list[str] | DataError:
        try:
            return [key for _, key in holders.keys_of(root, source) if key in keys]
        except DataError as error:
            return error

    every = list(sources.values())
    searched = dict(zip(sources, _each(found, every, "search"), strict=True))
    unread = [str(why) for why in searched.values() if isinstance(why, DataError)]
    hits = {name: some for name, some in searched.items() if some and not isinstance(some, DataError)}
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
    named = [one for one in known if one.manifest is not None and holders.stale_rows(one.manifest, taken)]
    mine = {name: sources[name] for name in hits}
    return Survey(keys, hits, mine, taken, unmarked, holders.stale_files(files, taken), named, unread)


def _refuse_busy(uri: str, known: Iterable[caches.Known], taken: takedowns.Taken, then: str = "first") -> None:
    """A job that has begun on a shard would still store what is taken down meanwhile."""
    for one in known:
        if one.manifest is not None or one.error:
            continue
        rows = load_dataset(dataset_store(uri, one.dataset), one.digest).shards
        for maker in one.makers if any(row.sha256 in taken for row in rows) else ():
            attempt = runs.last_attempt(maker.store)
            if attempt and (who := runs.alive(maker, attempt)):
                raise CalotypeError(f"cache_latents {maker.name} encodes dataset {one.dataset} on {who} just now: "
                                    f"let it end, or `calotype cancel` it, {then}")  # fmt: skip


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
    """All of it; bytes that were deleted.

    Raises:
        CalotypeError: a job that encodes some of them began after the survey.
        DataError: latent shards that hold some are damaged; all others were rewritten, and the old ones deleted.
    """
    root = open_store(uri)
    mark(uri, found)
    begun = "and give the same command again: the samples are marked, but nothing is deleted yet"
    _refuse_busy(uri, caches.known(uri), takedowns.everything(root), begun)
    while True:  # until nothing was marked or committed meanwhile
        taken = takedowns.everything(root)
        damaged, changed = rewrite(uri), succeed(uri)
        left = holders.stale_named(root, taken)
        if not changed and takedowns.everything(root) == taken:
            break
    deleted = delete(uri)
    if left:
        raise _unfinished(root, left, damaged, deleted)
    return deleted


def mark(uri: str, found: Survey) -> None:
    root = open_store(uri)
    for source, keys in found.hits.items():
        takedowns.add(root, source, [takedowns.mark(key) for key in keys])


def rewrite(uri: str) -> Damaged:
    """(E, SHA-256 of a source shard) -> why its latent shard could not be read; all others are rewritten."""
    root, damaged = open_store(uri), dict[tuple[str, str], str]()
    taken, work = takedowns.everything(root), []
    held = set()  # source shards of which something is left
    for encoding, latents in holders.files_of(root).items():
        there = {entry.key for entries in latents.values() for entry in entries}
        for source in {cache.source_of(stem) for stem in latents}.intersection(taken):
            new = holders.stem_now(source, taken)
            old = [stem for stem in latents if stem != new and cache.source_of(stem) == source]
            old = [stem for stem in old if sidecar_key(f"{stem}.tar") in there]
            if old and not {sidecar_key(f"{new}.tar"), cache.made_key(f"{new}.tar")} <= there:
                work.append((root.at("latents", encoding), old, taken[source]))
            elif new in latents:
                held.add(source)
    empty: dict[str, set[str]] = {}
    for (latents_of, stems, _), done in zip(work, _each(_rewritten, work, "rewrite", REWRITERS), strict=True):
        source = cache.source_of(stems[0])
        if isinstance(done, DataError):
            damaged[latents_of.uri.rpartition("/")[2], source] = str(done)
        if isinstance(done, set):
            empty.setdefault(source, set()).update(map(takedowns.mark, done))
        else:
            held.add(source)
    for source in empty.keys() - held:  # else a job would look for latents where there can be none
        takedowns.add(root, source, empty[source])
    return damaged


def _rewritten(work: tuple[Store, Sequence[str], Collection[str]]) -> Shard | set[str] | DataError:
    """A latent shard without some of its samples: as the job would make it now.

    Returns:
        where nothing is left, keys of those that could not be encoded; why none of the old ones can be read.
    """
    latents, stems, marks = work
    why = DataError("")
    for stem in stems:
        try:
            return _without(latents, stem, marks)
        except (DataError, Missing) as error:
            why = DataError(str(error))
    return why


def _without(latents: Store, stem: str, marks: Collection[str]) -> Shard | set[str]:
    old = shards.existing_shard(latents, f"{stem}.tar")
    if old is None:
        raise DataError(f"{latents.uri}/{stem}.tar was deleted just now: run the same command again")
    unit = replace(old, sha256=old.source_sha256)  # what a latent shard says of its source shard
    bucket = [number for number, count in old.buckets or ((0, old.samples),) for _ in range(count)]
    rows = cache.source_rows(latents, old, ())  # which count with buckets alone
    every = map(Latent, bucket, rows, shards.iterate(latents, [old]))
    kept = [one for one in every if takedowns.mark(one.sample.key) not in marks]
    made = remembered(latents, unit, old)
    if not kept:
        return {one.key for one in made.lost} if made else set()
    new, samples = written(latents, cache.latent_key(unit, marks), kept, unit, bool(old.buckets))
    if made is not None:  # else a job finds out from the source shard what it lacks
        lost = [one for one in made.lost if takedowns.mark(one.key) not in marks]
        decoded = [one for one in made.decoded if takedowns.mark(one.key) not in marks]
        remember(latents, Made(unit, new, statistics.of_samples(samples), made.device, lost, decoded))
    return new


def succeed(uri: str) -> int:
    """Caches that got a newer manifest: without what was taken down, but for shards that are damaged."""
    taken, made = takedowns.everything(open_store(uri)), 0
    stale = [one for one in caches.known(uri) if one.manifest is not None and holders.stale_rows(one.manifest, taken)]
    for one in stale:
        place = open_store(uri).at("caches", one.id)
        newest = cache_versions(place)[-1]
        manifest = Manifest.from_bytes(place.read(newest))
        latents = open_store(uri).at("latents", cache.encoding_id(manifest.meta["encoding"]))
        instead = {row.key: _row(latents, row, taken) for row in holders.stale_rows(manifest, taken)}
        instead = {key: new for key, new in instead.items() if new is None or new.key != key}
        if instead:
            publish_cache(place, _successor(uri, manifest, taken, instead), newest)
            made += 1
    return made


def _successor(uri: str, manifest: Manifest, taken: takedowns.Taken, instead: Mapping[str, Shard | None]) -> Manifest:
    """The manifest of the same cache, with other shards instead of some, or none."""
    latents = open_store(uri).at("latents", cache.encoding_id(manifest.meta["encoding"]))
    stale = [row for row in manifest.shards if row.key in instead]
    rows = [new for row in manifest.shards if (new := instead.get(row.key, row)) is not None]

    def made_of(row: Shard) -> Made:
        found = remembered(latents, row, row)
        figures = found.statistics if found else statistics.of_samples(shards.iterate(latents, [row]))
        return found or Made(row, row, figures, NOT_RECORDED)

    meta = {**manifest.meta, "supersedes": manifest.digest}
    before = {(one["shard"], one["key"]): one for one in meta.get("quarantined", ())}
    meta["quarantined"] = list((before | _taken_from(uri, manifest, stale, taken)).values())
    with suppress(DataError, Missing):  # what is left is all alike, or damaged: what it was scaled by stays
        with ThreadPoolExecutor(READERS, "statistics") as pool:
            made = list(pool.map(made_of, rows))
        merged = statistics.merge([one.statistics for one in made]) if made else {}
        lost = [one for one in meta["quarantined"] if one["reason"] != takedowns.REASON]
        decoded = [found for one in made for found in one.decoded]
        meta |= merged | ({"acceptance": accept.report(decoded, merged, lost)} if merged else {})
    return replace(manifest, format=CACHE, shards=tuple(rows), meta=meta)


def _row(latents: Store, row: Shard, taken: takedowns.Taken) -> Shard | None:
    """The shard in the place of one from which something was taken; None where nothing is left of it.

    It stays where it is damaged, or was not rewritten by now.
    """
    marks = taken[row.source_sha256]
    with suppress(DataError, Missing):
        new = shards.existing_shard(latents, cache.latent_key(replace(row, sha256=row.source_sha256), marks))
        if new is not None:
            return replace(new, split=row.split)
        if all(takedowns.mark(one.key) in marks for one in shards.iterate(latents, [row])):
            return None
    return row


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
        source = holders.Source(name, store, mine[0]) if mine else holders.Source(name)
        for row, key in holders.keys_of(root, source):
            for shard in [one.key for one in mine] or [name]:
                if takedowns.mark(key) in taken[name]:
                    found[shard, key] = takedowns.entry(shard, row, key)
    return found


def delete(uri: str) -> int:
    """Files of latent shards from which something was taken down; bytes.

    What another takedown writes meanwhile may look stale, or be all there is: files are listed before marks are read,
    and these before manifests, and none goes that a manifest names, or whose samples are nowhere else.
    """
    root = open_store(uri)
    files, taken = holders.files_of(root), takedowns.everything(root)
    stale, named = holders.stale_files(files, taken), holders.named(root)
    for encoding, entries in stale.items():
        latents, mine = root.at("latents", encoding), named.get(encoding, {})
        there = {entry.key for some in files[encoding].values() for entry in some}
        stems = {garbage.stem(entry) for entry in entries} - mine.keys()
        going = {stem for stem in stems if not _only_copy(latents, stem, taken, there)}
        stale[encoding] = [entry for entry in entries if garbage.stem(entry) in going]
    garbage.delete(root, stale)
    return sum(entry.size for entries in stale.values() for entry in entries)


def _only_copy(latents: Store, stem: str, taken: takedowns.Taken, there: Collection[str]) -> bool:
    """Whether samples of a stale latent shard would be lost with it: it is not rewritten yet."""
    source = cache.source_of(stem)
    new = holders.stem_now(source, taken)
    if sidecar_key(f"{new}.tar") in there or sidecar_key(f"{stem}.tar") not in there:
        return False
    with suppress(DataError, Missing):  # of a damaged one nothing can be kept
        row = shards.existing_shard(latents, f"{stem}.tar")
        every = shards.iterate(latents, [row] if row else [])
        return any(takedowns.mark(one.key) not in taken[source] for one in every)
    return False


def _unfinished(root: Store, left: Iterable[holders.Named], damaged: Damaged, deleted: int) -> DataError:
    """That caches still name latent shards which hold what was taken down."""
    said = []
    for encoding, stem, ids in left:
        why = damaged.get((encoding, cache.source_of(stem)), "it is not there, or damaged")
        said.append(f"{root.uri}/latents/{encoding}/{stem}.tar of cache {', '.join(one[:8] for one in ids)} ({why})")
    return DataError(f"{size(deleted)} deleted, but {many(len(said), 'latent shard')} could not be rewritten: "
                     f"{'; '.join(said)}: see `calotype cache verify CACHE`, give such a cache up (`calotype cache gc "
                     "CACHE`), give the same command again, and encode anew")  # fmt: skip
