"""The latent caches under a root: which there are, how far they are, and which runs refer to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from calotype import compose, runs
from calotype.config import JOBS
from calotype.console import many
from calotype.data import cache, takedowns
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import Manifest, cache_manifest, cache_versions, load_dataset
from calotype.data.store import Missing, Store, open_store
from calotype.errors import CalotypeError, DataError


@dataclass
class Known:
    """A cache that is there, or that a run has begun.

    Attributes:
        manifest: None while it is not finished.
        makers, users: runs that encode it, and that train on it.
        done: source shards whose latents are there, of `shards`.
    """

    id: str
    encoding: dict[str, Any]
    dataset: str
    digest: str
    manifest: Manifest | None = None
    modified: float = 0.0
    makers: list[runs.Record] = field(default_factory=list)
    users: list[runs.Record] = field(default_factory=list)
    done: int = 0
    shards: int = 0
    error: str = ""

    @property
    def samples(self) -> int:
        return sum(part["samples"] for part in self.manifest.totals().values()) if self.manifest else 0

    @property
    def bytes(self) -> int:
        return sum(part["bytes"] for part in self.manifest.totals().values()) if self.manifest else 0

    @property
    def state(self) -> str:
        if self.error:
            return self.error
        return "finished" if self.manifest else f"{self.done:,} of {many(self.shards, 'shard')}"


def known(root: str) -> list[Known]:
    """Every cache that is finished or that a run refers to, newest first."""
    store, found = open_store(root), dict[str, Known]()
    for name in store.folders("caches"):
        place = store.at("caches", name)
        try:
            made = cache_manifest(place)
            found[name] = Known(name, made.meta["encoding"], made.name, made.meta["dataset"], made)
        except (Missing, DataError) as error:
            if isinstance(error, Missing) and not any(place.list()):
                continue  # it was given up: some stores keep folders of which all is gone
            found[name] = Known(name, {}, "", "", error=f"unreadable: {error}")
        found[name].modified = max((entry.modified for entry in place.list("manifest")), default=0.0)
    for record, encoding, digest, dataset in references(root):
        identity = cache.cache_id(cache.encoding_id(encoding), digest)
        one = found.setdefault(identity, Known(identity, encoding, dataset, digest, modified=record.created))
        (one.makers if record.job == "cache_latents" else one.users).append(record)
    for one in [one for one in found.values() if one.manifest is None and not one.error]:
        one.makers = [record for record in one.makers if record.status() != "given up"]
        if one.makers or one.users:
            _progress(store, one)
        else:
            del found[one.id]
    return sorted(found.values(), key=lambda one: -one.modified)


def references(root: str) -> Iterable[tuple[runs.Record, dict[str, Any], str, str]]:
    """(run, encoding, digest and name of its dataset) of every run that encodes or trains on a cache."""
    for record in runs.every(root):
        if record.job in ("cache_latents", "train_denoiser"):
            config: Any = compose.build(JOBS[record.job], record.config)
            yield record, cache.encoding_of(config), config.data.digest, config.data.name


def _progress(store: Store, one: Known) -> None:
    try:
        rows = load_dataset(dataset_store(store.uri, one.dataset), one.digest).shards
    except DataError as error:
        one.error = f"its dataset cannot be read: {error}"
        return
    one.shards = len(rows)
    latents = store.at("latents", cache.encoding_id(one.encoding))
    one.done = len(cache.finished(latents, rows, takedowns.everything(store)))


def found_by(root: str, reference: str) -> Known:
    """The cache of an id, its beginning, or the name of a run that made it.

    Raises:
        CalotypeError: none, or more than one.
    """
    name = reference.removeprefix("run:")
    names = runs.names(root)
    every = known(root)
    fitting = [one for one in every if one.id == name]
    fitting = fitting or [one for one in every if any(name in names.get(run.identity, ()) for run in one.makers)]
    fitting = fitting or [one for one in every if len(name) >= 4 and one.id.startswith(name)]
    if not fitting:
        raise CalotypeError(f"there is no cache {reference!r} under {root}: `calotype cache ls` lists what there is")
    if len({one.id for one in fitting}) > 1 and not reference.startswith("run:"):
        which = ", ".join(one.id[:12] for one in fitting)
        raise CalotypeError(f"{reference!r} may be any of {which}: give more of its id (or run:{name} for the newest)")
    return fitting[0]


def finished(root: str, reference: str) -> tuple[Known, Manifest, Store]:
    """A cache that can be read: it, its manifest, and where its shards lie."""
    one = found_by(root, reference)
    if one.manifest is None:
        of = f" of dataset {one.dataset}" if one.dataset else ""
        raise CalotypeError(f"cache {one.id[:8]}{of} is not finished ({one.state}): run its job cache_latents again")
    return one, one.manifest, open_store(root).at("latents", cache.encoding_id(one.encoding))


def older(root: str, one: Known) -> list[Manifest]:
    """Manifests of a cache that newer ones took the place of when samples were taken down, newest first."""
    place = open_store(root).at("caches", one.id)
    return [Manifest.from_bytes(place.read(key)) for key in reversed(cache_versions(place)[:-1])]


def kept(root: str, given_up: Collection[str]) -> dict[str, set[str]]:
    """E -> latent shards, by their keys without endings, that a cache or run refers to.

    Args:
        given_up: ids of caches that do not count, nor their runs.

    Raises:
        CalotypeError: of one it cannot be told.
    """
    found: dict[str, set[str]] = {}
    taken = takedowns.everything(open_store(root))
    for one in known(root):
        if one.id in given_up:
            continue
        if one.manifest is None and not one.encoding:
            raise CalotypeError(f"cache {one.id} is {one.state}: nobody knows what it needs, so nothing is deleted")
        keys: Iterable[str] = ()
        if one.manifest is not None:
            keys = (shard.key for shard in one.manifest.shards)
        elif not one.error:
            rows = load_dataset(dataset_store(root, one.dataset), one.digest).shards
            keys = (cache.latent_key(shard, taken.get(shard.sha256, ())) for shard in rows)
        found.setdefault(cache.encoding_id(one.encoding), set()).update(key.removesuffix(".tar") for key in keys)
    return found
