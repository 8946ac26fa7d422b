"""Which samples of a dataset count: by their columns and by takedown lists.  Shards and caches stay as they are.

A selection is one bit per sample, in the manifest's order, stored under the digest of what it was made from:

    datasets/NAME/selections/<id>.bits     packed, shard after shard, each beginning a byte

It is made once, where the job is submitted, so that no worker reads columns.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calotype.data.manifest import Manifest, Shard, canonical
from calotype.data.shards import read_columns
from calotype.data.store import Missing, Store, open_store
from calotype.errors import ConfigError, DataError

READERS = 16  # columns read at once
OPERATORS = ("==", "=", "!=", "<", "<=", ">", ">=", "in", "not in")

Bits = npt.NDArray[np.bool_]


def takedown_keys(uri: str) -> frozenset[str]:
    """Keys of a list: a text file, here or in S3, one per line; lines that begin with # are remarks.

    Raises:
        ConfigError: it is not there, or not text.
    """
    folder, _, name = uri.rpartition("/")
    try:
        text = open_store(folder).read(name) if "://" in uri else Path(uri).expanduser().read_bytes()
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except (OSError, Missing, UnicodeDecodeError) as error:
        raise ConfigError(f"data.takedown={uri!r} cannot be read as a text file of keys ({error})") from error
    return frozenset(line for line in lines if line and not line.startswith("#"))


def selection_id(dataset_digest: str, conditions: Sequence[Any], taken_down: Collection[str]) -> str:
    """32 hex digits: another dataset version, filter or list has another."""
    lost = hashlib.sha256("\n".join(sorted(taken_down)).encode()).hexdigest()
    return hashlib.sha256(canonical([dataset_digest, list(conditions), lost])).hexdigest()[:32]


def publish(store: Store, manifest: Manifest, conditions: Sequence[Any], taken_down: Collection[str]) -> str:
    """Make a selection, unless it is there; its id.

    Args:
        conditions: [[column, operator, value], ...], all of which must hold, as pyarrow's `filters` takes them; or a
            list of such lists, one of which must hold.
        taken_down: keys that must not be used.

    Raises:
        ConfigError: no such column or operator, or nothing is left.
        DataError: columns are missing or changed.
    """
    name = selection_id(manifest.digest, conditions, taken_down)
    if store.exists(_key(name)):
        return name
    _check(conditions)

    def kept(shard: Shard) -> Bits:
        return _kept(store, shard, conditions, taken_down)

    with ThreadPoolExecutor(READERS, "columns") as pool:
        parts = list(pool.map(kept, manifest.shards))
    if not any(part.any() for part in parts):
        raise ConfigError(f"data.filter={list(conditions)} with data.takedown leaves none of {manifest.name}'s samples")
    store.publish(_key(name), b"".join(np.packbits(part).tobytes() for part in parts))
    return name


def load(store: Store, name: str, manifest: Manifest) -> dict[str, Bits]:
    """Shard key -> which of its samples count.

    Raises:
        DataError: it is not there, or of another manifest.
    """
    data = np.frombuffer(store.read(_key(name)), np.uint8)
    if len(data) != sum(-(-shard.samples // 8) for shard in manifest.shards):
        raise DataError(f"{store.uri}/{_key(name)} is no selection of this version of {manifest.name}: submit again")
    made, first = {}, 0
    for shard in manifest.shards:
        size = -(-shard.samples // 8)
        made[shard.key] = np.unpackbits(data[first : first + size], count=shard.samples).astype(np.bool_)
        first += size
    return made


def of_cache(keep: Mapping[str, Bits], dataset: Manifest, cache: Manifest) -> dict[str, Bits]:
    """The same selection for the latents of a dataset, whose samples lie in the same order."""
    source = {shard.sha256: shard.key for shard in dataset.shards}
    return {shard.key: keep[source[shard.source_sha256]] for shard in cache.shards}


def _key(name: str) -> str:
    return f"selections/{name}.bits"


def _check(conditions: Sequence[Any]) -> None:
    alternatives = conditions if _nested(conditions) else [conditions]
    for one in (one for part in alternatives for one in part):
        if not isinstance(one, Sequence) or len(one) != 3 or one[1] not in OPERATORS or not isinstance(one[0], str):
            raise ConfigError(
                f"data.filter has {one!r}: write [column, operator, value] with one of {', '.join(OPERATORS)}"
            )


def _nested(conditions: Sequence[Any]) -> bool:
    return bool(conditions) and bool(conditions[0]) and not isinstance(conditions[0][0], str)


def _kept(store: Store, shard: Shard, conditions: Sequence[Any], taken_down: Collection[str]) -> Bits:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    data = read_columns(store, shard)
    if data is None:
        raise ConfigError(f"{store.uri}/{shard.key} has no columns: data.filter and data.takedown need them")
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    kept = np.ones(shard.samples, np.bool_)
    if conditions:
        parts = [[tuple(one) for one in part] for part in (conditions if _nested(conditions) else [conditions])]
        for name in {name for part in parts for name, _, _ in part} - set(table.column_names):
            raise ConfigError(
                f"data.filter names the column {name!r}, the samples have {', '.join(table.column_names)}"
            )
        numbered = table.append_column("__row__", pyarrow.array(np.arange(shard.samples)))
        try:
            rows = numbered.filter(pyarrow.parquet.filters_to_expression(parts))["__row__"].to_numpy()
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise ConfigError(
                f"data.filter={list(conditions)} cannot be applied ({error}): compare like with like"
            ) from error
        kept = np.isin(np.arange(shard.samples), rows)
    if taken_down:
        kept &= np.fromiter((key not in taken_down for key in table["key"].to_pylist()), np.bool_, shard.samples)
    return kept
