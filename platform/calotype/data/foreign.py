"""`calotype data index`: a manifest for WebDataset shards that somebody else wrote; elsewhere.py says what lies where.

Every tar is read once, from its first byte to its last, through a window of memory, and neither copied nor changed.
Its sidecar says that this was done: an index that was killed goes on after the last finished shard, and one that is
run again reads new shards only.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from calotype.data import elsewhere
from calotype.data.manifest import (
    DATASET,
    Manifest,
    Shard,
    held_out,
    load_dataset,
    parsed,
    publish_dataset,
    sidecar_key,
    versions_of,
)
from calotype.data.scan import WHOLE, Scan, scanned
from calotype.data.shards import SIDECAR, publish_columns, publish_sidecar, row_of
from calotype.data.store import Entry, Store, open_store
from calotype.data.threads import Memory, Passed, Told, over
from calotype.errors import ConfigError, DataError

log = logging.getLogger(__name__)

WINDOW = 8 * 2**20  # bytes of a shard in memory, and of one range GET
KIND = "webdataset"  # of the source, in the manifest
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Known:
    """An indexed shard: its row, and what its sidecar says beside it.  `ends`: (key, members) of its first and last."""

    shard: Shard
    members: tuple[str, ...]
    passed_by: dict[str, int]
    ends: tuple[tuple[str, frozenset[str]], ...]


@dataclass(frozen=True)
class Indexed:
    """What came of it.  Nothing is published, and `digest` is empty, while some shards are `bad`: (shard, reason)."""

    digest: str
    shards: tuple[Shard, ...]
    members: tuple[str, ...]
    read: frozenset[str]  # keys of the shards that were read now; the others had a sidecar
    passed_by: dict[str, int]  # what is part of no sample -> how many
    beside: dict[str, int]  # other files below the place: suffix -> how many
    bad: tuple[tuple[str, str], ...]


def index(root: str, name: str, uri: str, jobs: int = 8, share: float = 0.0, told: Told | None = None) -> Indexed:
    """Index every *.tar below `uri` that has not been, and publish the dataset `name` under `root`.

    Memory: about `jobs` windows, and what is known of the samples of as many shards (some hundred bytes a sample).

    Args:
        share: of the shards that are held out, whole, by their names.

    Raises:
        DataError: there is no tar, or packed ones, or none for a split, or the dataset has shards that are not there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--name={name!r} must be letters, digits, - _ and . and begin with a letter or digit")
    home, place = open_store(root).at("datasets", name), open_store(uri)
    tars, beside = _listed(place)
    _check_shares([entry.key for entry in tars], share, place)
    moves = _check_moved(home, place, {elsewhere.PREFIX + entry.key for entry in tars})
    known, new, bad = _known(home, place, tars, jobs)
    if moves and not bad:  # before a shard is read that is only there: a sidecar is of the place that is named
        elsewhere.put_at(home, place.uri)
    read = _read_all(home, place, new, sum(entry.size for entry in tars), jobs, told)
    known |= {key: found for key, found in read.items() if isinstance(found, Known)}
    bad += [(key, found) for key, found in read.items() if isinstance(found, str)]
    passed_by = Counter({"empty shards": sum(found is None for found in read.values())})
    ordered = [known[entry.key] for entry in tars if entry.key in known]
    bad += _split_samples(ordered, place)
    for one in ordered:
        passed_by.update(one.passed_by)
    passed = {what: count for what, count in sorted(passed_by.items()) if count}
    rows = tuple(replace(one.shard, split=_split(one.shard.key, share)) for one in ordered)
    members = tuple(sorted({member for one in ordered for member in one.members}))
    if not bad and not rows:
        raise DataError(f"the shards below {place.uri} hold no sample")
    digest = ""
    if not bad:
        meta = {"source": {"kind": KIND, "held_out": share}, "quarantined": [], "passed_by": passed}
        if (now := elsewhere.shards_at(home)) != place.uri:
            raise DataError(f"{home.uri} is being indexed from {now} at the same time: choose another --name")
        digest = publish_dataset(home, Manifest(DATASET, name, members, rows, meta))
    fresh = frozenset(elsewhere.PREFIX + entry.key for entry in new)
    return Indexed(digest, rows, members, fresh, passed, dict(beside), tuple(sorted(bad)))


# ------------------------------------------------------------------------------------------------ what there is


def _listed(place: Store) -> tuple[list[Entry], Counter[str]]:
    """The tars below a place, sorted, and the other files, counted by suffix."""
    tars: list[Entry] = []
    others: Counter[str] = Counter()
    for entry in place.list():
        if entry.key.endswith(PACKED):
            raise DataError(
                f"{place.where(entry.key)} is packed: samples are read by range, so unpack it to a plain .tar"
            )
        path = PurePosixPath(entry.key)
        if path.suffix == ".tar" and not path.name.startswith("."):
            tars.append(entry)
        else:
            others[path.suffix or path.name] += 1
    if not tars:
        seen = ", ".join(f"{count} {what} files" for what, count in others.most_common(5))
        seen = f" (but {seen})" if seen else ""
        raise DataError(f"there is no .tar below {place.uri}{seen}: give the folder or prefix of the shards")
    return sorted(tars, key=lambda entry: entry.key), others


def _split(key: str, share: float) -> str:
    """Of a whole shard, for its bytes are not ours to sort; its name decides, so that it never moves."""
    return "held_out" if held_out(key.removeprefix(elsewhere.PREFIX), share) else "train"


def _check_shares(keys: Sequence[str], share: float, place: Store) -> None:
    splits = {_split(key, share) for key in keys}
    if share and splits != {"train", "held_out"}:
        raise DataError(
            f"all {len(keys)} shards of {place.uri} fall into {splits.pop()!r}: whole shards are held out, by their "
            f"names, so with --held-out={share:g} there must be more of them, or set another share"
        )


def _check_moved(home: Store, place: Store, keys: set[str]) -> bool:
    """Whether a dataset moves to this place, as it may with all of its shards; a new one is begun here.

    Raises:
        DataError: it is another dataset: shards are missing, or one of this name is being made from another place.
    """
    before = elsewhere.begun_at(home, place.uri)
    if before == place.uri:
        return False
    if not versions_of(home):
        raise DataError(
            f"{home.uri} was begun with the shards at {before}: index those to the end, choose another --name, or, if "
            f"nothing of it is wanted, delete {home.where(elsewhere.PLACE)} and what lies beside it"
        )
    lost = [one.key for one in load_dataset(home).shards if one.key.startswith(elsewhere.PREFIX)]
    lost = sorted(set(lost) - keys)
    if lost:
        raise DataError(
            f"{home.uri} has {lost[0].removeprefix(elsewhere.PREFIX)} from {before}, which {place.uri} lacks: "
            "copy it there, or give these shards another --name"
        )
    log.warning(
        "%s moves from %s: the shards there that have the same names and sizes are taken to be the same; "
        "`calotype data verify` reads them all", home.uri, before,
    )  # fmt: skip
    return True


def _known(
    home: Store, place: Store, tars: Sequence[Entry], jobs: int
) -> tuple[dict[str, Known], list[Entry], list[tuple[str, str]]]:
    """(shards that were indexed before, those to read, those that are not what they were)."""
    there = {entry.key for entry in home.list(elsewhere.PREFIX)}
    old = [entry for entry in tars if sidecar_key(elsewhere.PREFIX + entry.key) in there]
    new = [entry for entry in tars if sidecar_key(elsewhere.PREFIX + entry.key) not in there]
    with ThreadPoolExecutor(jobs, "sidecars") as pool:
        found = dict(zip((entry.key for entry in old), pool.map(lambda entry: _from_sidecar(home, entry.key), old)))
    bad = [
        (entry.key, f"{place.where(entry.key)} has {entry.size} bytes, and {found[entry.key].shard.bytes} when it was "
                    "indexed: a shard must not change under its name; index what lies there now under another --name")
        for entry in old if entry.size != found[entry.key].shard.bytes
    ]  # fmt: skip
    return found, new, bad


def _from_sidecar(home: Store, path: str) -> Known:
    key = elsewhere.PREFIX + path
    data = home.read(sidecar_key(key))
    said = parsed(data, home.where(sidecar_key(key)), SIDECAR)
    ends = tuple((name, frozenset(members)) for name, members in said["ends"])
    return Known(row_of(key, data), tuple(said["members"]), said["passed_by"], ends)


def _split_samples(ordered: Sequence[Known], place: Store) -> list[tuple[str, str]]:
    """Samples of which one shard has some members and the next shard others."""
    bad = []
    for one, other in pairwise(ordered):
        (key, last), (first_key, first) = one.ends[-1], other.ends[0]
        if key == first_key and not last & first:
            here, there = (each.shard.key.removeprefix(elsewhere.PREFIX) for each in (one, other))
            bad.append((here, f"{place.where(here)} ends with a part of sample {key!r}, and {there} begins with the "
                              "rest: write both again with whole samples"))  # fmt: skip
    return bad


# ------------------------------------------------------------------------------------------------ reading


def _read_all(
    home: Store, place: Store, new: Sequence[Entry], total: int, jobs: int, told: Told | None
) -> dict[str, Known | str | None]:
    """path -> what was found, why it cannot be used, or None for a tar without samples."""
    memory = Memory()

    def one(entry: Entry, passed: Passed) -> Known | str | None:
        try:
            return read_one(home, place, entry, memory.take(WINDOW), passed)
        except DataError as error:
            return str(error)

    done = total - sum(entry.size for entry in new)
    return dict(zip((entry.key for entry in new), over(new, one, jobs, total, done, told)))


def read_one(home: Store, place: Store, entry: Entry, memory: memoryview, passed: Passed) -> Known | None:
    """Read one tar and publish its columns and its sidecar; None, and nothing published, if it holds no sample.

    Raises:
        DataError: it is cut, damaged, hostile, or holds a sample in parts; names the shard and the byte.
    """

    def read(start: int, buffer: memoryview) -> int:
        size = place.read_into(entry.key, start, buffer)
        passed(size)
        return size

    found = scanned(read, entry.size, place.where(entry.key), memory)
    if not found.keys:
        return None
    key = elsewhere.PREFIX + entry.key
    content = found.content | {"columns_sha256": publish_columns(home, key, _columns(found))}
    publish_sidecar(home, key, content)
    return _from_sidecar(home, entry.key)


def _columns(found: Scan) -> dict[str, Any]:
    """key, bytes.MEMBER of every member (null where a sample lacks it), and the numbers of the json members."""
    import pyarrow

    columns: dict[str, Any] = {"key": pyarrow.array(found.keys, pyarrow.string())}
    for member, sizes in sorted(found.sizes.items()):
        values = np.frombuffer(sizes, np.int64)
        columns[f"bytes.{member}"] = pyarrow.array(values, mask=values < 0)
    for name, numbers in sorted(found.numbers.items()):
        columns[name] = pyarrow.array(numbers, pyarrow.int64() if name in WHOLE else pyarrow.float64())
    return columns
