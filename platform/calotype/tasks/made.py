"""One latent shard: how it is committed, and what its maker remembers of it beside it.

<sha>.made.json    statistics, samples left out, how good some of them are, the machine: a hint; all but the machine
                   can be had again from the bytes
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from calotype.data import cache, shards, statistics, takedowns
from calotype.data.manifest import Shard, parsed
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
SUMS = ("sum", "squares", "variance")
LARGEST, ROUNDED = 2.0**128, 1 + 1e-6  # above all of float32; sums of 10^9 numbers in float64 are nearer than that
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
    """What the maker of a latent shard left beside it; None if it died before it did, or no maker can have left it."""
    try:
        found = parsed(latents.read(cache.made_key(shard.key)), "what a maker remembers", MADE, MADE_1)
        lost, decoded = ([kind(*one) for one in found.get(name, ())] for name, kind in REMEMBERED.items())
        made = Made(unit, shard, found["statistics"], found["device"], lost, decoded)
        return made if found["sha256"] == shard.sha256 and _can_be(made) else None
    except (Missing, DataError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _can_be(made: Made) -> bool:
    """Whether these can be figures of such a shard.  Training whitens by them, so a hint that was damaged is none.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: a figure is missing, or no number.
    """
    figures, samples = made.statistics, made.shard.samples
    count, largest, sums = figures["count"], figures["largest"], [figures[name] for name in SUMS]
    numbers = [count, figures["labels"], figures["cut"], *(one.row for one in made.lost)]
    words = [made.device, *(one.key for one in made.decoded)]
    words += [word for one in made.lost for word in (one.key, one.reason)]
    if any(type(n) is not int or n < 0 for n in numbers) or not all(isinstance(word, str) for word in words):
        return False
    if not all(math.isfinite(value) for one in made.decoded for value in (one.psnr, one.fresh)):
        return False
    if not 0 <= largest <= LARGEST or count < samples or (count % samples and not made.shard.buckets):
        return False
    if not len(sums[0]) == len(sums[1]) == len(sums[2]) > 0:
        return False
    return all(
        total**2 <= squares * count * ROUNDED and squares <= largest**2 * count * ROUNDED
        and 0 <= variance <= LARGEST**2 * count
        for total, squares, variance in zip(*sums, strict=True)
    )  # fmt: skip


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
