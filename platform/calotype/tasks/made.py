"""One latent shard: how it is committed, and what its maker remembers of it beside it.

<sha>.made.json    statistics, samples left out, how good some of them are, the machine: a hint; all but the machine
                   can be had again from the bytes
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from calotype.data import cache, shards, statistics, takedowns
from calotype.data.manifest import Shard
from calotype.data.shards import Sample
from calotype.data.statistics import Statistics
from calotype.data.store import Missing, Store
from calotype.errors import DataError
from calotype.tasks.accept import Decoded
from calotype.tasks.encode import Latent, Lost

if TYPE_CHECKING:
    from PIL import Image

MADE, MADE_1 = "calotype.made/2", "calotype.made/1"
REMEMBERED: dict[str, Callable[..., Any]] = {"lost": Lost, "decoded": Decoded}
NOT_RECORDED = "not recorded"
CHUNK_SAMPLES = 256  # of latents, at most: those of the source may be few, for images are bigger


@dataclass(frozen=True)
class Spent:
    """Seconds that a worker took for a shard; `decode` and `encode` are those of its `threads`, together."""

    worker: int
    threads: int
    whole: float
    decode: float
    encode: float
    write: float


@dataclass(frozen=True)
class Made:
    """One latent shard of a source shard.

    Attributes:
        lost: source samples that have no latent.
        decoded: how good its first samples are; of the shard that is shown, `grid` is their picture.
        images: that were encoded now: 0 where it was there already.
        spent: seconds, where it was encoded now.
        retries: requests to the store that reading for it made again.
    """

    source: Shard
    shard: Shard
    statistics: Statistics
    device: str
    lost: Sequence[Lost] = ()
    decoded: Sequence[Decoded] = ()
    images: int = 0
    spent: Spent | None = None
    grid: Image.Image | None = None
    retries: int = 0


def written(
    latents: Store, key: str, made: Sequence[Latent], unit: Shard, bucketed: bool
) -> tuple[Shard, list[Sample]]:
    """Commit a latent shard; its row and samples.  Of two writers whose machines differ in a bit the first wins."""
    samples = [one.sample for one in made]
    columns = {cache.ROW: [one.row for one in made]} if bucketed else None
    buckets = [one.bucket for one in made] if bucketed else ()

    def write(samples: list[Sample]) -> Shard:
        return shards.write_shard(latents, key, samples, CHUNK_SAMPLES, unit.split, columns, unit.sha256, buckets)

    try:
        return write(samples), samples
    except DataError:
        theirs = shards.read_tar(latents, key)
        if [sample.key for sample in theirs] != [sample.key for sample in samples]:
            raise
        return write(theirs), theirs


def remember(latents: Store, made: Made) -> None:
    data: dict[str, Any] = {"format": MADE, "sha256": made.shard.sha256}
    data.update(statistics=made.statistics, device=made.device)
    data.update({name: [astuple(one) for one in getattr(made, name)] for name in REMEMBERED})
    latents.publish(cache.made_key(made.shard.key), json.dumps(data, sort_keys=True).encode())


def remembered(latents: Store, unit: Shard, shard: Shard) -> Made | None:
    """What the maker of a latent shard left beside it; None if it died before it did."""
    try:
        found = json.loads(latents.read(cache.made_key(shard.key)))
    except Missing:
        return None
    if found.get("format") not in (MADE, MADE_1) or found.get("sha256") != shard.sha256:
        return None
    lost, decoded = ([kind(*one) for one in found.get(name, ())] for name, kind in REMEMBERED.items())
    return Made(unit, shard, found["statistics"], found["device"], lost, decoded)


def recognised(source: Store, latents: Store, unit: Shard, shard: Shard, taken: Collection[str] = frozenset()) -> Made:
    """A finished shard, with what its maker remembered of it; computed from its bytes, if that died in between."""
    if (found := remembered(latents, unit, shard)) is not None:
        return found
    figures = statistics.of_samples(shards.iterate(latents, [shard]))
    lost = [one for one in _lost(source, latents, unit, shard) if takedowns.mark(one.key) not in taken]
    return Made(unit, shard, figures, NOT_RECORDED, lost)


def _lost(source: Store, latents: Store, unit: Shard, shard: Shard) -> list[Lost]:
    """The samples of a source shard that its latent shard lacks, found by their keys."""
    if shard.samples == unit.samples:
        return []
    kept = Counter(sample.key for sample in shards.iterate(latents, [shard]))
    lost = []
    for row, sample in enumerate(shards.iterate(source, [unit])):
        if not kept[sample.key]:
            lost.append(Lost(row, sample.key, NOT_RECORDED))
        kept[sample.key] -= 1
    return lost
