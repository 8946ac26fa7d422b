"""Checkpoints (format 2): what every rank saved of its share, committed at once, readable at any world size and stage.

    checkpoints/<images seen, 12 digits>/
        <engine>.<kind>-<rank>-<part>-<hash>.safetensors  fp32 pieces of parameters, by name, one after the other
        index-<hash>.json    shapes of the parameters; which elements of them each part holds
        state-<hash>.json    steps, loss scale, cursor, clock, unsent points
        COMMIT.json          sha256 of each, last, by conditional put

File names hold hashes of their contents, so what an attempt left behind when it died is either the same bytes or in
nobody's way.  Nothing is a checkpoint before its COMMIT.json is there.  No pickle.  In format 1 rank 0 had gathered
whole parameters: such checkpoints are read for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.data.store import Missing, Store
from calotype.errors import CalotypeError, DataError

if TYPE_CHECKING:  # this page is also read at submit, where torch is not
    from torch import Tensor

FORMAT, FIRST_FORMAT = "calotype.checkpoint/2", "calotype.checkpoint/1"
FOLDER, COMMIT = "checkpoints", "COMMIT.json"
KEPT = "KEPT"  # beside a commit: somebody points to this checkpoint, so it is not forgotten
BUFFERS = "buffers"  # a kind of its own: the weights and their averages have them in common
BLOCK = 2**24  # bytes per read
FETCHED = 4  # files that are downloaded at once

Piece = tuple[str, int, int]  # (parameter, its first element here, how many)


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, verified, on this machine.

    Attributes:
        state: the loop's plain data.
        tensors: "<engine>.<kind>" -> parameter name -> fp32 tensor, read from disk when asked for.
    """

    images: int
    state: dict[str, Any]
    tensors: dict[str, Mapping[str, Tensor]]


def committed(store: Store) -> list[int]:
    """Images seen of every committed checkpoint, rising."""
    found = (entry.key.split("/") for entry in store.list(f"{FOLDER}/"))
    return sorted(int(parts[1]) for parts in found if len(parts) == 3 and parts[2] == COMMIT and parts[1].isdigit())


def latest(store: Store) -> int | None:
    """The newest committed one, as images seen."""
    return max(committed(store), default=None)


def digest(store: Store, images: int) -> str:
    """sha256 of the commit, which names every byte of the checkpoint."""
    return hashlib.sha256(_commit(store, images)[1]).hexdigest()


def check(store: Store, images: int) -> None:
    """Refuse, without reading it all, one that was never committed or that has lost files; `opened` hashes them.

    Raises:
        DataError: names the file, or the checkpoints that there are.
    """
    files = _commit(store, images)[0]["files"]
    place = store.at(FOLDER, f"{images:012d}")
    sizes = {entry.key: entry.size for entry in place.list()}
    for key, row in sorted(files.items()):
        if sizes.get(key) != row["bytes"]:
            what = f"has {sizes[key]} bytes instead of {row['bytes']}" if key in sizes else "is gone"
            raise DataError(f"{place.uri}/{key} {what}: choose another checkpoint")


@contextlib.contextmanager
def opened(
    store: Store,
    images: int,
    kinds: tuple[str, ...] | None = None,
    needed: Mapping[str, Sequence[Piece]] | None = None,
) -> Iterator[Checkpoint]:
    """Download and verify; the files live as long as the context.

    Args:
        kinds: only these of "<engine>.<kind>"; all if None.
        needed: engine -> what is going to be read; all if None.  Other elements may be NaN: a rank that holds a share
            need not download what others hold.

    Raises:
        DataError: there is no such checkpoint, or its bytes are not what was committed; names the file.
        CalotypeError: it is of a format that came later.
    """
    commit, _ = _commit(store, images)
    place = store.at(FOLDER, f"{images:012d}")
    with tempfile.TemporaryDirectory(prefix="calotype-") as name:
        folder = Path(name)

        def fetched(key: str) -> Path:
            _fetch(place, key, commit["files"][key], folder / key)
            return folder / key

        plain = {key.split("-")[0]: json.loads(fetched(key).read_bytes()) for key in commit["files"] if _is_plain(key)}
        index = plain.get("index")  # format 1 has none
        missed = _missed(index["pieces"], needed) if index and needed is not None else set()
        files: dict[str, dict[str, Path]] = {}  # kind -> which part -> file
        for key, (kind, part) in _tensor_files(commit).items():
            shared = kind.endswith(f".{BUFFERS}")
            if kinds is None or kind in kinds or (kinds and shared):
                paths = files.setdefault(kind, {})
                if shared or (_engine(kind), part) not in missed:
                    paths[part] = folder / key
        with ThreadPoolExecutor(FETCHED) as pool:
            list(pool.map(fetched, [path.name for paths in files.values() for path in paths.values()]))
        buffers = {kind: _Whole(files.pop(kind).values()) for kind in list(files) if kind.endswith(f".{BUFFERS}")}
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for kind, paths in files.items():
            engine = _engine(kind)
            if index:
                also: Mapping[str, Tensor] = {} if ".exp_avg" in kind else buffers.get(f"{engine}.{BUFFERS}", {})
                tensors[kind] = _Pieced(index["shapes"][engine], index["pieces"][engine], paths, also)
            else:
                tensors[kind] = _Whole(paths.values())
        yield Checkpoint(images, plain["state"], tensors)


def weights(store: Store, images: int, engine: str, ema: bool = True, halflife: int = 0) -> dict[str, Tensor]:
    """All weights of one engine by parameter name.

    Args:
        ema: the averaged ones, where there are any.
        halflife: of the average, where a run keeps several; 0 for the first.

    Raises:
        DataError: the run keeps no average of that halflife; names those that it has.
    """
    names = {kind for kind, _ in _tensor_files(_commit(store, images)[0]).values()}
    kind = f"{engine}.ema@{halflife}" if ema and halflife else f"{engine}.ema"
    if not ema or (not halflife and kind not in names):
        kind = f"{engine}.weights"
    if kind not in names:
        others = ", ".join(sorted(name.partition("@")[2] for name in names if name.startswith(f"{engine}.ema@")))
        raise DataError(f"{store.uri}/{FOLDER}/{images:012d} holds no {kind} (further averages: {others or 'none'})")
    with opened(store, images, (kind,)) as found:
        return {name: tensor.clone() for name, tensor in found.tensors[kind].items()}


class _Whole(Mapping[str, "Tensor"]):
    """Tensors of some safetensors files, read one at a time: a rank keeps only its share of a model."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(path, framework="pt") for path in paths]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _Pieced(Mapping[str, "Tensor"]):
    """Parameters of one kind put together, when asked for, from the pieces that the ranks saved; and the buffers."""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        pieces: Mapping[str, Sequence[Piece]],
        paths: Mapping[str, Path],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._shapes, self._buffers = shapes, buffers
        self._where: dict[str, list[tuple[int, int, _Whole]]] = {name: [] for name in shapes}
        for part, path in paths.items():
            file = _Whole([path])
            for name, begin, count in pieces[part]:
                self._where[name].append((begin, count, file))

    def __getitem__(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._buffers[name]
        import torch

        whole = torch.full((prod(self._shapes[name]),), torch.nan)
        for begin, count, file in self._where[name]:
            whole[begin : begin + count] = file[name]
        return whole.view(tuple(self._shapes[name]))

    def __iter__(self) -> Iterator[str]:
        yield from self._shapes
        yield from self._buffers

    def __len__(self) -> int:
        return len(self._shapes) + len(self._buffers)


def forget(store: Store, images: int, keep: int, keep_every: int = 0) -> None:
    """Collect what is not wanted any more, once `images` are committed.

    Kept are the newest `keep`, the first one at or after each multiple of `keep_every`, and those that `hold` marked.
    Deleted are older ones, what was never committed before `images`, and what died attempts left beside the files of
    `images`.
    """
    known = committed(store)
    kept = set(known[-keep:])
    if keep_every:  # the first of a span is never deleted: it is the first of those that are left, too
        spans = [number // keep_every for number in known]
        kept |= {known[spans.index(span)] for span in spans if span}
    for folder in store.folders(FOLDER):
        old = folder.isdigit() and int(folder) < images and int(folder) not in kept
        if old and not store.exists(f"{FOLDER}/{folder}/{KEPT}"):
            discard(store, int(folder))
    place = store.at(FOLDER, f"{images:012d}")
    named = {COMMIT, KEPT, *_commit(store, images)[0]["files"]}  # of the commit that stands, if another was first
    for key in [entry.key for entry in place.list() if entry.key not in named]:
        place.delete(key)


def hold(store: Store, images: int) -> None:
    """Keep a checkpoint for ever.

    Raises:
        DataError: it is not there any more.
    """
    store.write(f"{FOLDER}/{images:012d}/{KEPT}", b"")
    try:
        check(store, images)  # it may have been forgotten in this very moment
    except DataError:
        store.delete(f"{FOLDER}/{images:012d}/{KEPT}")
        raise


def discard(store: Store, images: int) -> None:
    """Delete a checkpoint, commit first; one that is damaged would stand in the way of the same images saved anew."""
    place = store.at(FOLDER, f"{images:012d}")
    for key in sorted((entry.key for entry in place.list()), key=lambda key: key != COMMIT):
        place.delete(key)


def _missed(
    pieces: Mapping[str, Mapping[str, Sequence[Piece]]], needed: Mapping[str, Sequence[Piece]]
) -> set[tuple[str, str]]:
    """(engine, part) of the parts that hold nothing of what is needed."""
    missed = set()
    for engine, parts in pieces.items():
        spans: dict[str, list[tuple[int, int]]] = {}
        for name, begin, count in needed.get(engine, ()):
            spans.setdefault(name, []).append((begin, begin + count))
        for part, held in parts.items():
            if not any(
                low < begin + count and begin < high for name, begin, count in held for low, high in spans.get(name, ())
            ):
                missed.add((engine, part))
    return missed


def _engine(kind: str) -> str:
    return kind.rsplit(".", 1)[0]


def _is_plain(key: str) -> bool:
    return key.endswith(".json")


def _tensor_files(commit: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Key -> ("<engine>.<kind>", "<rank>-<part>"), in format 1 ("<engine>.<kind>", "<part>")."""
    numbers = 1 if commit["format"] == FIRST_FORMAT else 2
    found = {}
    for key in sorted(key for key in commit["files"] if not _is_plain(key)):
        kind, *part, _ = key.rsplit("-", numbers + 1)
        found[key] = kind, "-".join(part)
    return found


def _commit(store: Store, images: int) -> tuple[dict[str, Any], bytes]:
    where = f"{store.uri}/{FOLDER}/{images:012d}"
    try:
        data = store.read(f"{FOLDER}/{images:012d}/{COMMIT}")
        commit = json.loads(data)
    except Missing:
        raise DataError(f"{where} is no checkpoint: it was never committed (committed are "
                        f"{', '.join(map(str, committed(store))) or 'none'})") from None  # fmt: skip
    except ValueError:
        raise DataError(f"{where}/{COMMIT} is damaged: choose another checkpoint") from None
    if any("/" in key or key.startswith(".") for key in commit.get("files", ())):  # they become files here
        raise DataError(f"{where}/{COMMIT} names files outside its folder: choose another checkpoint")
    if commit.get("format") not in (FORMAT, FIRST_FORMAT):
        raise CalotypeError(
            f"{where} is of format {commit.get('format')!r}, this Calotype reads {FORMAT} and before: use a newer one"
        )
    return commit, data


def _fetch(place: Store, key: str, row: Mapping[str, Any], path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, int(row["bytes"]), BLOCK):
            try:
                data = place.read(key, start, min(BLOCK, row["bytes"] - start))
            except Missing:
                data = b""
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != row["sha256"]:
        raise DataError(f"{place.uri}/{key} is damaged: its sha256 is not the committed one; choose another checkpoint")
