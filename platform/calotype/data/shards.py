"""WebDataset shards with sidecars, and the manifests that name them (formats v1).

A shard is a plain tar, the same bytes whenever it is written.  Its samples lie in chunks: the unit of order, of range
GET and of verification.  The sidecar says where every chunk and member lies; the manifest holds one row per shard and
is written last.  Not one byte of a shard is used before its hash was checked: a tar library reads a cut tar silently.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from calotype.data.store import Missing, Store
from calotype.errors import DataError

DATASET, CACHE, SIDECAR = "calotype.dataset/1", "calotype.cache/1", "calotype.sidecar/1"
BLOCK = 512  # of a tar, in bytes
PART = 16 * 2**20  # bytes per read when a whole shard is compared
_KEY = re.compile(r"(?!__)[^./\\\x00-\x1f][^.\\\x00-\x1f]*(?<!/)")
_MEMBER = re.compile(r"(?!__)[a-z0-9_\-]+(\.[a-z0-9_\-]+)*")  # WebDataset lowers names and skips __meta__ files


@dataclass(frozen=True)
class Sample:
    """KEY.png KEY.txt KEY.json: a key without a dot, and its members by name (which may hold dots: `latent.npy`)."""

    key: str
    members: dict[str, bytes | memoryview]


@dataclass(frozen=True)
class Shard:
    """One manifest row.  Every chunk holds `chunk_samples` samples but the last: the order needs nothing else."""

    key: str
    bytes: int
    samples: int
    chunk_samples: int
    sha256: str
    sidecar_sha256: str
    columns_sha256: str = ""
    split: str = "train"
    source_sha256: str = ""  # of the shard that this one was encoded from

    @property
    def chunks(self) -> int:
        return -(-self.samples // self.chunk_samples)

    def chunk_counts(self) -> list[int]:
        """Samples per chunk."""
        return [min(self.chunk_samples, self.samples - start) for start in range(0, self.samples, self.chunk_samples)]


ROW = tuple(item.name for item in fields(Shard))


@dataclass(frozen=True)
class Sidecar:
    """Where everything of one shard lies.  Chunk i is bytes [offsets[i], offsets[i + 1]) with SHA-256 hashes[i]."""

    offsets: np.ndarray  # (chunks + 1,) int64
    hashes: tuple[str, ...]
    keys: tuple[str, ...]
    members: dict[str, dict[str, list[int]]]  # name -> {"offsets", "sizes"} of the data, -1 where a sample lacks it
    arrays: dict[str, dict[str, Any]]  # .npy members -> {"dtype", "shape"}, shape None where they differ


@dataclass(frozen=True)
class Manifest:
    """What a dataset or a cache is.  The SHA-256 of its canonical bytes names it in every run."""

    format: str
    name: str
    members: tuple[str, ...]
    shards: tuple[Shard, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON; rows as arrays under `fields`, because there may be 10^5 of them."""
        rows = [list(astuple(shard)) for shard in self.shards]
        head = {"format": self.format, "name": self.name, "members": list(self.members), "meta": self.meta}
        return _canonical(head | {"totals": self.totals(), "fields": list(ROW), "shards": rows})

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        found = _parsed(data, "a manifest")
        if found.get("format") not in (DATASET, CACHE):
            raise DataError(f"a manifest of format {found.get('format')!r} is newer or other than {DATASET}, {CACHE}")
        try:
            shards = tuple(Shard(**dict(zip(found["fields"], row, strict=True))) for row in found["shards"])
            head = (found["format"], found["name"], tuple(found["members"]))
            return Manifest(*head, shards, found["meta"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a manifest of format {found['format']} lacks or has too much of: {error}") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def split(self, name: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)

    def totals(self) -> dict[str, dict[str, int]]:
        """split -> {"shards", "samples", "bytes"}."""
        totals: dict[str, dict[str, int]] = {}
        for shard in self.shards:
            total = totals.setdefault(shard.split, {"shards": 0, "samples": 0, "bytes": 0})
            for name, amount in (("shards", 1), ("samples", shard.samples), ("bytes", shard.bytes)):
                total[name] += amount
        return totals


def held_out(key: str, share: float) -> bool:
    """Whether a sample belongs to the held-out split: by its key alone, so that it never moves."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2.0**64


# ---------------------------------------------------------------------------------------------- writing


def sidecar_key(key: str) -> str:
    return f"{key.removesuffix('.tar')}.sidecar.json"


def columns_key(key: str) -> str:
    return f"{key.removesuffix('.tar')}.columns.parquet"


def write_shard(
    store: Store,
    key: str,
    samples: Sequence[Sample],
    chunk_samples: int,
    split: str = "train",
    columns: Mapping[str, list[Any]] | None = None,
    source_sha256: str = "",
) -> Shard:
    """Publish tar, columns (one value per sample), sidecar, in this order; the sidecar says that all of it is there.

    Written again with the same samples it returns the same row; `DataError` if other bytes lie under the key.
    """
    if not samples or chunk_samples < 1:
        raise DataError(f"{store.uri}/{key}: a shard needs at least one sample, and one sample per chunk")
    with tempfile.TemporaryDirectory(prefix="calotype-") as folder:
        path = Path(folder, "shard.tar")
        content = _write_tar(path, samples, chunk_samples, f"{store.uri}/{key}")
        if not store.publish(key, path) and _sha256_of(store, key) != content["sha256"]:
            raise DataError(f"{store.uri}/{key} exists with other bytes: delete it if no manifest names it")
    columns_sha256 = _publish_columns(store, columns_key(key), samples, columns) if columns is not None else ""
    row = {"split": split, "source_sha256": source_sha256, "columns_sha256": columns_sha256}
    data = _canonical({"format": SIDECAR} | row | content)
    if not store.publish(sidecar_key(key), data) and store.read(sidecar_key(key)) != data:
        raise DataError(f"{store.uri}/{sidecar_key(key)} exists with other bytes: delete it if no manifest names it")
    return _row(key, data)


def existing_shard(store: Store, key: str) -> Shard | None:
    """The row of a shard that was finished before, from its sidecar; None if it was not."""
    try:
        shard = _row(key, store.read(sidecar_key(key)))
    except Missing:
        return None
    sizes = [entry.size for entry in store.list(key) if entry.key == key]
    if sizes != [shard.bytes]:
        raise DataError(f"{store.uri}/{key} has not the {shard.bytes} bytes of its sidecar: delete both, run again")
    return shard


def _row(key: str, sidecar: bytes) -> Shard:
    found = _parsed(sidecar, sidecar_key(key), SIDECAR)
    known = {name: found[name] for name in ROW if name not in ("key", "sidecar_sha256")}
    return Shard(key=key, sidecar_sha256=hashlib.sha256(sidecar).hexdigest(), **known)


def _write_tar(path: Path, samples: Sequence[Sample], chunk_samples: int, where: str) -> dict[str, Any]:
    """Write the tar; return what its sidecar says of it."""
    whole, chunk = hashlib.sha256(), hashlib.sha256()
    names = sorted({name for sample in samples for name in sample.members})
    members = {name: {"offsets": [-1] * len(samples), "sizes": [-1] * len(samples)} for name in names}
    offsets, hashes, position = [0], [], 0
    _check_names(samples, names, where)
    with open(path, "wb") as file:
        for index, sample in enumerate(samples):
            for name in sorted(sample.members):
                data = sample.members[name]
                size = len(data)
                members[name]["offsets"][index], members[name]["sizes"][index] = position + BLOCK, size
                for piece in (_header(f"{sample.key}.{name}", size, where), data, bytes(-size % BLOCK)):
                    file.write(piece)
                    whole.update(piece)
                    chunk.update(piece)
                position += BLOCK + size + (-size % BLOCK)
            if (index + 1) % chunk_samples == 0 or index + 1 == len(samples):
                offsets.append(position)
                hashes.append(chunk.hexdigest())
                chunk = hashlib.sha256()
        end = bytes(2 * BLOCK)
        file.write(end)
        whole.update(end)
    return {
        "bytes": position + len(end),
        "samples": len(samples),
        "chunk_samples": chunk_samples,
        "sha256": whole.hexdigest(),
        "chunks": {"offsets": offsets, "sha256": hashes},
        "keys": [sample.key for sample in samples],
        "members": members,
        "arrays": {name: _arrays(samples, name, where) for name in names if name.endswith("npy")},
    }


def _check_names(samples: Sequence[Sample], names: list[str], where: str) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen or not _KEY.fullmatch(sample.key) or "//" in sample.key or not sample.members:
            raise DataError(f"{where}: {sample.key!r} is a key twice, has a dot or control sign, or has no members")
        seen.add(sample.key)
    for name in names:
        if not _MEMBER.fullmatch(name):
            raise DataError(f"{where}: {name!r} is no member name: a-z 0-9 _ - and dots between them")


def _header(name: str, size: int, where: str) -> bytes:
    """A ustar header without time, owner or anything else that two writers could differ in."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except (ValueError, UnicodeError) as error:
        raise DataError(f"{where}: {name!r} does not fit into a tar header ({error}): shorten the key") from error


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


def _publish_columns(store: Store, key: str, samples: Sequence[Sample], columns: Mapping[str, list[Any]]) -> str:
    """Per-sample values as Parquet.  Its bytes may depend on pyarrow's version, so what exists is compared by value."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"key": [sample.key for sample in samples]} | dict(columns))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    if not store.publish(key, data):
        data = store.read(key)
        if not pyarrow.parquet.read_table(io.BytesIO(data)).equals(table):
            raise DataError(f"{store.uri}/{key} exists with other values: delete it if no manifest names it")
    return hashlib.sha256(data).hexdigest()


def _sha256_of(store: Store, key: str) -> str:
    total, start = hashlib.sha256(), 0
    while data := store.read(key, start, PART):
        total.update(data)
        start += len(data)
    return total.hexdigest()


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _parsed(data: bytes, what: str, expected: str = "") -> dict[str, Any]:
    try:
        found = json.loads(data)
        assert isinstance(found, dict)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{what} is not the JSON it should be: {error}") from error
    if expected and found.get("format") != expected:
        raise DataError(f"{what} has format {found.get('format')!r}, this version reads {expected}")
    return found


# ---------------------------------------------------------------------------------------------- reading


def read_sidecar(store: Store, shard: Shard) -> Sidecar:
    """The shard's sidecar, checked against its manifest row."""
    data = store.read(sidecar_key(shard.key))
    if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
        raise DataError(
            f"{store.uri}/{sidecar_key(shard.key)} is not what the manifest names: it was changed or replaced"
        )
    found = _parsed(data, sidecar_key(shard.key), SIDECAR)
    offsets = np.asarray(found["chunks"]["offsets"], np.int64)
    hashes, keys = tuple(found["chunks"]["sha256"]), tuple(found["keys"])
    if len(keys) != shard.samples or len(hashes) != shard.chunks or found["chunk_samples"] != shard.chunk_samples:
        raise DataError(f"{store.uri}/{shard.key}: the sidecar's samples or chunks are not those of the manifest")
    return Sidecar(offsets, hashes, keys, found["members"], found["arrays"])


def read_chunk(store: Store, shard: Shard, sidecar: Sidecar, index: int) -> list[Sample]:
    """The samples of one chunk, by one range GET, verified; members are views of its one buffer."""
    start, stop = int(sidecar.offsets[index]), int(sidecar.offsets[index + 1])
    return open_chunk(store, shard, start, stop, sidecar.hashes[index], index)


def open_chunk(store: Store, shard: Shard, start: int, stop: int, sha256: str, index: int) -> list[Sample]:
    """As `read_chunk`, for a reader that keeps no sidecars but (start, stop, hash) per chunk."""
    where = f"{store.uri}/{shard.key}"
    data = store.read(shard.key, start, stop - start)
    if len(data) != stop - start:
        raise DataError(f"{where} is cut: chunk {index} should end at byte {stop}, {len(data)} of its bytes are there")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{where} is damaged or replaced: chunk {index} (bytes {start}-{stop}) has another hash")
    samples = _untar(data)
    expected = min(shard.chunk_samples, shard.samples - index * shard.chunk_samples)
    if len(samples) != expected:
        raise DataError(f"{where}: chunk {index} holds {len(samples)} samples, the manifest says {expected}")
    return samples


def _untar(data: bytes) -> list[Sample]:
    """Consecutive ustar entries grouped by key; verified bytes, so they are as `_write_tar` left them."""
    samples: list[Sample] = []
    view, position = memoryview(data), 0
    while position < len(data):
        name = data[position : position + 100].rstrip(b"\0")
        if prefix := data[position + 345 : position + 500].rstrip(b"\0"):
            name = prefix + b"/" + name
        size = int(data[position + 124 : position + 135], 8)
        key, _, member = name.decode().partition(".")
        if not samples or samples[-1].key != key:
            samples.append(Sample(key, {}))
        samples[-1].members[member] = view[position + BLOCK : position + BLOCK + size]
        position += BLOCK + size + (-size % BLOCK)
    return samples


def read_tar(store: Store, key: str) -> list[Sample]:
    """The samples of a tar whose sidecar is not there (yet): what another writer of the same shard published."""
    data = store.read(key)
    try:
        assert data[-2 * BLOCK :] == bytes(2 * BLOCK)
        return _untar(data[: -2 * BLOCK])
    except (ValueError, AssertionError) as error:
        raise DataError(f"{store.uri}/{key} is no shard of Calotype's: delete it if no manifest names it") from error


def iterate(store: Store, shards: Sequence[Shard]) -> Iterator[Sample]:
    """Every sample in stored order, verified."""
    for shard in shards:
        sidecar = read_sidecar(store, shard)
        for index in range(shard.chunks):
            yield from read_chunk(store, shard, sidecar, index)


# -------------------------------------------------------------------------------------------- datasets


def publish_dataset(store: Store, manifest: Manifest) -> str:
    """Make it the newest version under `manifests/`, unless it is already; returns its digest."""
    data = manifest.to_bytes()
    while True:
        versions = _versions(store)
        if not versions or store.read(versions[-1]) != data:
            newest = int(Path(versions[-1]).stem) if versions else 0
            if not store.publish(f"manifests/{newest + 1:06d}.json", data):
                continue  # another writer took the number: look again
        return manifest.digest


def load_dataset(store: Store, digest: str = "") -> Manifest:
    """The version with this digest, or the newest."""
    for key in reversed(_versions(store)):
        data = store.read(key)
        if not digest or hashlib.sha256(data).hexdigest() == digest:
            return Manifest.from_bytes(data)
    if digest:
        raise DataError(f"{store.uri} has no version with digest {digest}: correct data.digest or leave it empty")
    raise DataError(f"there is no dataset at {store.uri}: run the job `prepare` first, or correct data.name")


def _versions(store: Store) -> list[str]:
    keys = [entry.key for entry in store.list("manifests/") if re.fullmatch(r"manifests/\d{6,}\.json", entry.key)]
    return sorted(keys, key=lambda key: int(Path(key).stem))
