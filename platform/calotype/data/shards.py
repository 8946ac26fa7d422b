"""WebDataset shards and their sidecars (formats v2; v1 is read).

A shard is a plain tar, the same bytes whenever it is written.  Its samples lie in chunks: the unit of order, of range
GET and of verification.  The sidecar says where every chunk lies, and its hash; what it would say of single members
stands in the tar's own headers, so that a reader of a few chunks does not fetch a list of all samples.  Not one byte of
a shard is used before its hash was checked: a tar library reads a cut tar silently.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

import calotype.data.tables as tables
import calotype.data.tar as tar
from calotype.data.draws import Ints
from calotype.data.manifest import ROW, Shard, canonical, columns_key, parsed, shard_of, sidecar_key
from calotype.data.store import Missing, Store
from calotype.errors import DataError

SIDECAR, SIDECAR_1 = "calotype.sidecar/2", "calotype.sidecar/1"
CHUNK = 4 * 2**20  # bytes that a chunk should not exceed by much: enough for one connection, few enough to mix
PART = 16 * 2**20  # bytes per read when a whole shard is compared
_KEY = re.compile(r"(?!__)[^./\\\x00-\x1f][^.\\\x00-\x1f]*(?<!/)")
_MEMBER = re.compile(r"(?!__)[a-z0-9_\-]+(\.[a-z0-9_\-]+)*")  # WebDataset lowers names and skips __meta__ files


@dataclass(frozen=True)
class Sample:
    """KEY.png KEY.txt KEY.json: a key without a dot, and its members by name (which may hold dots: `latent.npy`)."""

    key: str
    members: dict[str, bytes | memoryview]


@dataclass(frozen=True)
class Sidecar:
    """Where everything of one shard lies.  Chunk i is bytes [offsets[i], offsets[i + 1]) with hash hashes[i]."""

    offsets: Ints  # (chunks + 1,)
    hashes: tuple[str, ...]
    blake3: bool  # else SHA-256, in sidecars of version 1
    members: tuple[str, ...]
    arrays: dict[str, dict[str, Any]]  # .npy members -> {"dtype", "shape"}, None where they differ

    def span(self, index: int) -> tuple[int, int]:
        """(start, bytes) of a chunk."""
        return int(self.offsets[index]), int(self.offsets[index + 1] - self.offsets[index])

    def fits(self, index: int, data: tar.Bytes) -> bool:
        """Whether these are the bytes of the chunk."""
        made = blake3(data).hexdigest() if self.blake3 else hashlib.sha256(data).hexdigest()
        return made == self.hashes[index]


# ---------------------------------------------------------------------------------------------- writing


def write_shard(
    store: Store,
    key: str,
    samples: Sequence[Sample],
    chunk_samples: int,
    split: str = "train",
    columns: Mapping[str, list[Any]] | None = None,
    source_sha256: str = "",
    buckets: Sequence[int] = (),
) -> Shard:
    """Publish tar, columns (one value per sample), sidecar, in this order; the sidecar says that all of it is there.

    Written again with the same samples it returns the same row; `DataError` if other bytes lie under the key.

    Args:
        chunk_samples: at most; fewer where that many would be more than about CHUNK bytes.
        buckets: of every sample, for samples of several shapes; samples of one bucket lie together.
    """
    if not samples or chunk_samples < 1:
        raise DataError(f"{store.uri}/{key}: a shard needs at least one sample, and one sample per chunk")
    with tempfile.TemporaryDirectory(prefix="calotype-") as folder:
        path = Path(folder, "shard.tar")
        content = _write_tar(path, samples, chunk_samples, _runs(buckets), f"{store.uri}/{key}")
        if not store.publish(key, path) and _sha256_of(store, key) != content["sha256"]:
            raise DataError(f"{store.uri}/{key} exists with other bytes: delete it if no manifest names it")
    columns_sha256 = ""
    if columns is not None:
        columns_sha256 = publish_columns(store, key, {"key": [sample.key for sample in samples]} | dict(columns))
    row = {"split": split, "source_sha256": source_sha256, "columns_sha256": columns_sha256}
    return publish_sidecar(store, key, row | content)


def publish_sidecar(store: Store, key: str, content: Mapping[str, Any]) -> Shard:
    """Finish a shard: the row that its sidecar gives.  `content`: the fields of a row, chunks, members, arrays."""
    data = canonical({"format": SIDECAR, **content})
    if not store.publish(sidecar_key(key), data) and store.read(sidecar_key(key)) != data:
        raise DataError(f"{store.uri}/{sidecar_key(key)} exists with other bytes: delete it if no manifest names it")
    return row_of(key, data)


def existing_shard(store: Store, key: str, sizes: Mapping[str, int] | None = None) -> Shard | None:
    """The row of a shard that was finished before, from its sidecar; None if it was not, or its tar was deleted.

    Args:
        sizes: of the store's keys, where they have been listed: many shards are not asked for one by one.
    """
    try:
        shard = row_of(key, store.read(sidecar_key(key)))
    except Missing:
        return None
    if sizes is None:
        sizes = {entry.key: entry.size for entry in store.list(key)}
    if key not in sizes:
        return None
    if sizes[key] != shard.bytes:
        raise DataError(f"{store.uri}/{key} has not the {shard.bytes} bytes of its sidecar: delete both, run again")
    return shard


def row_of(key: str, sidecar: bytes) -> Shard:
    """The manifest row that a sidecar gives."""
    found = parsed(sidecar, sidecar_key(key), SIDECAR, SIDECAR_1)
    known = {name: found[name] for name in ROW if name in found}
    return shard_of(known | {"key": key, "sidecar_sha256": hashlib.sha256(sidecar).hexdigest()})


def _runs(buckets: Sequence[int]) -> list[list[int]]:
    """[bucket, samples] of every run of equal numbers."""
    runs: list[list[int]] = []
    for bucket in buckets:
        if not runs or runs[-1][0] != bucket:
            runs.append([bucket, 0])
        runs[-1][1] += 1
    return runs


def _write_tar(
    path: Path, samples: Sequence[Sample], most: int, buckets: list[list[int]], where: str
) -> dict[str, Any]:
    """Write the tar; return what its sidecar says of it."""
    names = sorted({name for sample in samples for name in sample.members})
    _check_names(samples, names, where)
    if len({bucket for bucket, _ in buckets}) < len(buckets) or sum(n for _, n in buckets) != len(samples) * bool(
        buckets
    ):
        raise DataError(f"{where}: there must be a bucket for every sample, and those of one bucket must lie together")
    sizes = [sum(tar.BLOCK + tar.padded(len(data)) for data in sample.members.values()) for sample in samples]
    chunk_samples = max(1, min(most, CHUNK * len(samples) // sum(sizes)))
    ends = set(np.cumsum(_chunks(len(samples), chunk_samples, buckets)).tolist())
    whole, chunk = hashlib.sha256(), blake3()
    offsets, hashes, position = [0], [], 0
    with open(path, "wb") as file:
        for index, sample in enumerate(samples):
            for name in sorted(sample.members):
                data = sample.members[name]
                for piece in (_header(f"{sample.key}.{name}", len(data), where), data, bytes(-len(data) % tar.BLOCK)):
                    file.write(piece)
                    whole.update(piece)
                    chunk.update(piece)
            position += sizes[index]
            if index + 1 in ends:
                offsets.append(position)
                hashes.append(chunk.hexdigest())
                chunk = blake3()
        file.write(tar.END)
        whole.update(tar.END)
    return {
        "bytes": position + len(tar.END),
        "samples": len(samples),
        "chunk_samples": chunk_samples,
        "chunk_bytes": int(np.diff(offsets).max()),
        "buckets": buckets,
        "sha256": whole.hexdigest(),
        "chunks": {"offsets": offsets, "blake3": hashes},
        "members": names,
        "arrays": {name: _arrays(samples, name, where) for name in names if name.endswith("npy")},
    }


def _chunks(samples: int, most: int, buckets: list[list[int]]) -> list[int]:
    return [min(most, size - start) for _, size in buckets or [[0, samples]] for start in range(0, size, most)]


def _header(name: str, size: int, where: str) -> bytes:
    try:
        return tar.header(name, size)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _check_names(samples: Sequence[Sample], names: list[str], where: str) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen or not _KEY.fullmatch(sample.key) or "//" in sample.key or not sample.members:
            raise DataError(f"{where}: {sample.key!r} is a key twice, has a dot or control sign, or has no members")
        seen.add(sample.key)
    for name in names:
        if not _MEMBER.fullmatch(name):
            raise DataError(f"{where}: {name!r} is no member name: a-z 0-9 _ - and dots between them")


def _arrays(samples: Sequence[Sample], name: str, where: str) -> dict[str, Any]:
    """dtype and shape of a .npy member, None where samples differ."""
    dtypes, shapes = set(), set()
    for sample in (sample for sample in samples if name in sample.members):
        try:
            array = np.load(io.BytesIO(sample.members[name]), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{where}: {sample.key}.{name} is not an array in .npy format ({error})") from error
        dtypes.add(array.dtype.str)
        shapes.add(array.shape)
    shape = list(shapes.pop()) if len(shapes) == 1 else None
    return {"dtype": dtypes.pop() if len(dtypes) == 1 else None, "shape": shape}


def publish_columns(store: Store, key: str, columns: Mapping[str, Any]) -> str:
    """Per-sample values of a shard, `key` among them, as Parquet; its SHA-256.

    Its bytes may depend on pyarrow's version, so what exists is compared by value.
    """
    import pyarrow
    import pyarrow.parquet

    table, name = pyarrow.table(dict(columns)), columns_key(key)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    if not store.publish(name, data):
        data = store.read(name)
        if not pyarrow.parquet.read_table(io.BytesIO(data)).equals(table):
            raise DataError(f"{store.uri}/{name} exists with other values: delete it if no manifest names it")
    return hashlib.sha256(data).hexdigest()


def _sha256_of(store: Store, key: str) -> str:
    total, start = hashlib.sha256(), 0
    while data := store.read(key, start, PART):
        total.update(data)
        start += len(data)
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def read_sidecar(store: Store, shard: Shard) -> Sidecar:
    """The shard's sidecar, checked against its manifest row."""
    data = store.read(sidecar_key(shard.key))
    if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
        raise DataError(
            f"{store.uri}/{sidecar_key(shard.key)} is not what the manifest names: it was changed or replaced"
        )
    found = parsed(data, sidecar_key(shard.key), SIDECAR, SIDECAR_1)
    modern = found["format"] == SIDECAR
    try:
        offsets = np.asarray(found["chunks"]["offsets"], np.int64)
        hashes = tuple(found["chunks"]["blake3" if modern else "sha256"])
        sizes = np.diff(offsets)
        rising = len(offsets) == len(hashes) + 1 and not offsets[0] and (sizes > 0).all()
        inside = offsets[-1] <= shard.bytes and sizes.max() <= (shard.chunk_bytes or shard.bytes)
        fitting = len(hashes) == shard.chunks and found["chunk_samples"] == shard.chunk_samples
        if not (rising and inside and fitting):
            raise ValueError("its samples or chunks are not those of the manifest")
        return Sidecar(offsets, hashes, modern, tuple(found["members"]), dict(found["arrays"]))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{store.where(shard.key)}: the sidecar is not one of this shard ({error})") from error


def verified(where: str, shard: Shard, sidecar: Sidecar, index: int, data: tar.Bytes, have: int) -> tables.Table:
    """What lies where in a chunk whose first `have` bytes are in `data`, after all of it was checked.

    Raises:
        DataError: it is cut, damaged, or holds other samples than it should; names the shard (`where`) and chunk.
    """
    start, size = sidecar.span(index)
    if have != size:
        raise DataError(f"{where} is cut: chunk {index} should end at byte {start + size}, has {have} of {size} bytes")
    if not sidecar.fits(index, data):
        raise DataError(f"{where} is damaged or replaced: chunk {index} (from byte {start} on) has another hash")
    found = tables.table(data, f"{where}, chunk {index}")
    if len(found.keys) != (expected := shard.chunk_counts()[index]):
        raise DataError(f"{where}: chunk {index} holds {len(found.keys)} samples, the manifest says {expected}")
    return found


def read_chunk(store: Store, shard: Shard, sidecar: Sidecar, index: int) -> list[Sample]:
    """The samples of one chunk, by one range GET, verified; members are views of its one buffer."""
    data = store.read(shard.key, *sidecar.span(index))
    return samples_of(data, verified(store.where(shard.key), shard, sidecar, index, data, len(data)))


def samples_of(data: tar.Bytes, table: tables.Table) -> list[Sample]:
    """Samples whose members are views of the data."""
    view = memoryview(data)
    made = [Sample(key, {}) for key in table.keys]
    for name, (offsets, sizes) in table.members.items():
        for sample, offset, size in zip(made, offsets.tolist(), sizes.tolist()):
            if offset >= 0:
                sample.members[name] = view[offset : offset + size]
    return made


def read_tar(store: Store, key: str) -> list[Sample]:
    """The samples of a tar whose sidecar is not there (yet): what another writer of the same shard published."""
    data = store.read(key)
    where = f"{store.uri}/{key}"
    if data[-2 * tar.BLOCK :] != tar.END:
        raise DataError(f"{where} is no shard of Calotype's: delete it if no manifest names it")
    return samples_of(data, tables.table(memoryview(data)[: -2 * tar.BLOCK], where))


def iterate(store: Store, shards: Sequence[Shard]) -> Iterator[Sample]:
    """Every sample in stored order, verified."""
    for shard in shards:
        sidecar = read_sidecar(store, shard)
        for index in range(shard.chunks):
            yield from read_chunk(store, shard, sidecar, index)


def read_rows(store: Store, shard: Shard, rows: Iterable[int]) -> list[Sample]:
    """These samples of a shard, verified; of each chunk that holds some, one range GET."""
    ends = np.cumsum(shard.chunk_counts())
    sidecar, chunks = read_sidecar(store, shard), dict[int, list[Sample]]()
    made = []
    for row in rows:
        index = int(np.searchsorted(ends, row, "right"))
        if index not in chunks:
            chunks = {index: read_chunk(store, shard, sidecar, index)}
        made.append(chunks[index][row - int(ends[index])])
    return made


def read_columns(store: Store, shard: Shard) -> bytes | None:
    """The shard's columns, as Parquet, checked against its manifest row; None where it has none."""
    if not shard.columns_sha256:
        return None
    data = store.read(columns_key(shard.key))
    if hashlib.sha256(data).hexdigest() != shard.columns_sha256:
        raise DataError(f"{store.uri}/{columns_key(shard.key)} is not what the manifest names: it was changed")
    return data


def columns_of(store: Store, shard: Shard, names: list[str] | None = None) -> Any | None:
    """The shard's columns (all, or those named) as a pyarrow table of a row per sample; None where it has none.

    Raises:
        DataError: they were changed, are no Parquet, lack a column, or have not a row for every sample.
    """
    import pyarrow
    import pyarrow.parquet

    if (data := read_columns(store, shard)) is None:
        return None
    where = f"{store.uri}/{columns_key(shard.key)}"
    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(data)) as file:
            rows = file.metadata.num_rows
            if rows != shard.samples:  # said before memory is made for as many
                raise DataError(f"{where} has {rows} rows, the manifest says {shard.samples} samples")
            return file.read(names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{where} cannot be read as Parquet ({error}): prepare or index the shard again") from error


def keys_of(store: Store, shard: Shard) -> list[str] | None:
    """Keys of the shard's samples, from its columns; None where it has none."""
    table = columns_of(store, shard, ["key"])
    if table is None:
        return None
    if table.column_names != ["key"]:
        raise DataError(f"{store.uri}/{columns_key(shard.key)} has no column `key`: prepare or index the shard again")
    return list(table["key"].to_pylist())
