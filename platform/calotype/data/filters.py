"""Which samples of a dataset count: by their columns and by takedown lists.  Shards and caches stay as they are.

A selection is one bit per sample, in the manifest's order, stored under the digest of what it was made from:

    datasets/NAME/selections/<id>.bits     a line of JSON: counts and the SHA-256 of the rest
                                           bits, packed, shard after shard, each beginning a byte

It is made once, where the job is submitted, so that no worker reads columns.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calotype.data.cache import source_rows
from calotype.data.manifest import Manifest, Shard, canonical, parsed
from calotype.data.shards import columns_of
from calotype.data.store import Missing, Store, open_store
from calotype.errors import ConfigError, DataError

READERS = 16  # columns read at once
OPERATORS = ("==", "=", "!=", "<", "<=", ">", ">=", "in", "not in")
PLAIN = (str, int, float, bool)  # values that columns are compared with
FORMAT = "calotype.selection/1"

log = logging.getLogger(__name__)

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


def takedown_keys(uri: str, setting: str = "data.takedown=") -> frozenset[str]:
    """Keys of a list: a text file, here or in S3, one per line; lines that begin with # are remarks.

    Args:
        setting: what the user typed before the URI, for the error.

    Raises:
        ConfigError: it is not there, or not text.
    """
    folder, _, name = uri.rpartition("/")
    try:
        text = open_store(folder).read(name) if "://" in uri else Path(uri).expanduser().read_bytes()
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except (OSError, Missing, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}{uri!r} cannot be read as a text file of keys ({error})") from error
    return frozenset(line for line in lines if line and not line.startswith("#"))


def selection_id(dataset_digest: str, conditions: Sequence[Any], taken_down: Collection[str]) -> str:
    """32 hex digits: another dataset version, filter or list has another."""
    lost = hashlib.sha256("\n".join(sorted(taken_down)).encode()).hexdigest()
    return hashlib.sha256(canonical([FORMAT, dataset_digest, list(conditions), lost])).hexdigest()[:32]


def publish(store: Store, manifest: Manifest, conditions: Sequence[Any], taken_down: Collection[str]) -> str:
    """Make a selection, unless it is there; its id.  Says how much it leaves, and how many keys it found.

    Args:
        conditions: [[column, operator, value], ...], all of which must hold, as pyarrow's `filters` takes them; or a
            list of such lists, one of which must hold.
        taken_down: keys that must not be used, in whatever shard they are.

    Raises:
        ConfigError: no such column or operator, or nothing is left.
        DataError: columns are missing or changed.
    """
    _check(conditions)
    name = selection_id(manifest.digest, conditions, taken_down)
    if store.exists(_key(name)):
        _say(_read(store, name)[0], manifest)
        return name

    def kept(shard: Shard) -> tuple[Bits, set[str]]:
        return _kept(store, shard, conditions, taken_down)

    with ThreadPoolExecutor(READERS, "columns") as pool:
        parts = list(pool.map(kept, manifest.shards))
    left = sum(int(part.sum()) for part, _ in parts)
    if not left:
        named = [f"data.filter={list(conditions)}"] * bool(conditions) + ["data.takedown"] * bool(taken_down)
        raise ConfigError(f"{' with '.join(named)} leaves none of {manifest.name}'s samples")
    told = {"taken_down": len(taken_down), "found": len(set().union(*(found for _, found in parts)))}
    _say(_write(store, name, [part for part, _ in parts], told), manifest)
    return name


def sorted_id(name: str, cache: Manifest) -> str:
    """Of the selection `name` of a dataset for a cache of it whose samples are sorted by bucket."""
    return hashlib.sha256(canonical([FORMAT, name, cache.digest])).hexdigest()[:32]


def publish_sorted(store: Store, name: str, dataset: Manifest, cache: Manifest, latents: Store) -> None:
    """Make it, unless it is there.

    Raises:
        DataError: columns of a latent shard are missing or changed.
    """
    made = sorted_id(name, cache)
    if store.exists(_key(made)):
        return
    keep, source, lost = load(store, name, dataset), _sources(dataset), _lost(cache)

    def kept(shard: Shard) -> Bits:
        key = source[shard.source_sha256]
        rows = source_rows(latents, shard, lost.get(key, ()))
        if max(rows) >= len(keep[key]):
            raise DataError(f"{latents.uri}/{shard.key} names row {max(rows)} of {key}, which has {len(keep[key])}")
        return keep[key][rows]

    with ThreadPoolExecutor(READERS, "columns") as pool:
        _write(store, made, list(pool.map(kept, cache.shards)), {"selection": name, "cache": cache.digest})


def _write(store: Store, name: str, parts: Sequence[Bits], told: Mapping[str, Any]) -> dict[str, Any]:
    bits = b"".join(np.packbits(part).tobytes() for part in parts)
    kept = sum(int(part.sum()) for part in parts)
    head = {"format": FORMAT, "sha256": hashlib.sha256(bits).hexdigest(), "kept": kept, **told}
    store.publish(_key(name), canonical(head) + bits)
    return head


def _say(head: Mapping[str, Any], manifest: Manifest) -> None:
    """What a selection comes to.  A list of which no key is found is a list of something else, more often than not."""
    samples = sum(shard.samples for shard in manifest.shards)
    log.info("%s: %d of %d samples are left by data.filter and data.takedown", manifest.name, head["kept"], samples)
    if head["taken_down"]:
        level = logging.INFO if head["found"] == head["taken_down"] else logging.WARNING
        log.log(level, "data.takedown: %d of its %d keys are in %s", head["found"], head["taken_down"], manifest.name)


def _read(store: Store, name: str) -> tuple[dict[str, Any], bytes]:
    """What a selection says of itself, and its bits.

    Raises:
        DataError: it is not there, or damaged.
    """
    line, _, bits = store.read(_key(name)).partition(b"\n")
    where = f"{store.uri}/{_key(name)}"
    head = parsed(line, where, FORMAT)
    if head.get("sha256") != hashlib.sha256(bits).hexdigest():
        raise DataError(f"{where} is damaged or was changed: delete it and submit again")
    return head, bits


class Selection(Mapping[str, Bits]):
    """Shard key -> which of its samples count: held as bits, for there may be 10^9."""

    def __init__(self, packed: Mapping[str, tuple[Bytes, int]]) -> None:
        self._packed = packed  # shard key -> (bits, samples)

    def __getitem__(self, key: str) -> Bits:
        bits, samples = self._packed[key]
        return np.unpackbits(bits, count=samples).astype(np.bool_)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def renamed(self, names: Mapping[str, str], lacking: Mapping[str, Sequence[int]]) -> Selection:
        """The same for other shards: their key -> key of the one that holds the same samples, but for `lacking`, rows
        by that one's key."""
        made = {name: self._packed[key] for name, key in names.items()}
        for name, key in names.items():
            if key in lacking:
                kept = np.delete(self[key], lacking[key])
                made[name] = np.packbits(kept), len(kept)
        return Selection(made)


def load(store: Store, name: str, manifest: Manifest) -> Selection:
    """Shard key -> which of its samples count.

    Raises:
        DataError: it is not there, damaged, or of another manifest.
    """
    data = np.frombuffer(_read(store, name)[1], np.uint8)
    if len(data) != sum(-(-shard.samples // 8) for shard in manifest.shards):
        raise DataError(f"{store.uri}/{_key(name)} is no selection of this version of {manifest.name}: submit again")
    made, first = {}, 0
    for shard in manifest.shards:
        size = -(-shard.samples // 8)
        made[shard.key] = data[first : first + size], shard.samples
        first += size
    return Selection(made)


def of_cache(keep: Selection, dataset: Manifest, cache: Manifest) -> Selection:
    """The same selection for the latents of a dataset, whose samples lie in the same order; some have none."""
    source = _sources(dataset)
    return keep.renamed({shard.key: source[shard.source_sha256] for shard in cache.shards}, _lost(cache))


def _sources(dataset: Manifest) -> dict[str, str]:
    """SHA-256 of a shard -> its key."""
    return {shard.sha256: shard.key for shard in dataset.shards}


def _lost(cache: Manifest) -> dict[str, list[int]]:
    """Key of a source shard -> its rows that have no latent."""
    lost: dict[str, list[int]] = {}
    for one in cache.meta.get("quarantined", ()):
        if one["row"] < 0:
            raise DataError(f"nobody knows any more which samples of {one['shard']} the cache lacks: encode it again")
        lost.setdefault(one["shard"], []).append(one["row"])
    return lost


def _key(name: str) -> str:
    return f"selections/{name}.bits"


def _check(conditions: Sequence[Any]) -> None:
    parts = (part if isinstance(part, list | tuple) else [part] for part in _alternatives(conditions))
    for one in chain.from_iterable(parts):
        triple = isinstance(one, list | tuple) and len(one) == 3 and isinstance(one[0], str) and one[1] in OPERATORS
        listed = triple and isinstance(one[2], list | tuple)
        plain = triple and all(isinstance(value, PLAIN) for value in (one[2] if listed else [one[2]]))
        if not plain or listed != (one[1] in ("in", "not in")):
            raise ConfigError(
                f"data.filter has {one!r}: write [column, operator, value] with one of {', '.join(OPERATORS)} and a "
                "number or text, of which `in` and `not in` take a list"
            )


def _alternatives(conditions: Sequence[Any]) -> Sequence[Any]:
    """Lists of conditions, one of which must hold: one list of conditions is the only alternative."""
    first = conditions[0] if conditions else None
    nested = isinstance(first, list | tuple) and bool(first) and not isinstance(first[0], str)
    return conditions if nested else [conditions]


def _kept(store: Store, shard: Shard, conditions: Sequence[Any], taken_down: Collection[str]) -> tuple[Bits, set[str]]:
    """(which samples count, keys that are taken down)."""
    import pyarrow
    import pyarrow.parquet

    table = columns_of(store, shard)
    if table is None:
        raise ConfigError(f"{store.uri}/{shard.key} has no columns: data.filter and data.takedown need them")
    kept = np.ones(shard.samples, np.bool_)
    if conditions:
        parts = [[tuple(one) for one in part] for part in _alternatives(conditions)]
        for name in {name for part in parts for name, _, _ in part} - set(table.column_names):
            raise ConfigError(
                f"data.filter names the column {name!r}, the samples have {', '.join(table.column_names)}"
            )
        row = "row"
        while row in table.column_names:
            row += "_"
        numbered = table.append_column(row, pyarrow.array(np.arange(shard.samples)))
        try:
            rows = numbered.filter(pyarrow.parquet.filters_to_expression(parts))[row].to_numpy()
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise ConfigError(
                f"data.filter={list(conditions)} cannot be applied ({error}): compare like with like"
            ) from error
        kept = np.isin(np.arange(shard.samples), rows)
    if not taken_down:
        return kept, set()
    keys = table["key"].to_pylist()
    lost = np.fromiter((key in taken_down for key in keys), np.bool_, shard.samples)
    return kept & ~lost, {keys[row] for row in np.flatnonzero(lost)}
