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
import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from calotype.data.store import Missing, Store
from calotype.errors import CalotypeError, DataError, Unreachable
from calotype.train.whole import Pieced, Whole

if TYPE_CHECKING:  # this page is also read at submit, where torch is not
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT, FIRST_FORMAT = "calotype.checkpoint/2", "calotype.checkpoint/1"
FOLDER, COMMIT = "checkpoints", "COMMIT.json"
KEPT = "KEPT"  # beside a commit: somebody points to this checkpoint, so it is not forgotten
BUFFERS = "buffers"  # a kind of its own: the weights and their averages have them in common
BLOCK = 2**24  # bytes per read
FETCHED = 4  # files that are downloaded at once
# What a read that fails so says nothing of: the bytes may be whole.
AWAY = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT)

Piece = tuple[str, int, int]  # (parameter, its first element here, how many)
T = TypeVar("T")


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


def place(store: Store, images: int) -> Store:
    """Where the checkpoint of that many images lies in the run's artifact root."""
    return store.at(FOLDER, f"{images:012d}")


def committed(store: Store) -> list[int]:
    """Images seen of every committed checkpoint, rising."""
    with _reached():
        found = [entry.key.split("/") for entry in store.list(f"{FOLDER}/")]
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
    there = place(store, images)
    sizes = {entry.key: entry.size for entry in there.list()}
    for key, row in sorted(files.items()):
        if sizes.get(key) != row["bytes"]:
            what = f"has {sizes[key]} bytes instead of {row['bytes']}" if key in sizes else "is gone"
            raise DataError(f"{there.uri}/{key} {what}: choose another checkpoint")


@contextlib.contextmanager
def opened(
    store: Store,
    images: int,
    kinds: tuple[str, ...] | None = None,
    needed: Mapping[str, Sequence[Piece]] | None = None,
) -> Iterator[Checkpoint]:
    """Download and verify, to files without a name: nothing stays on disk, however this process ends.

    Args:
        kinds: only these of "<engine>.<kind>"; all if None.
        needed: engine -> what is going to be read; all if None.  Other elements may be NaN: a rank that holds a share
            need not download what others hold.

    Raises:
        DataError: there is no such checkpoint, or its bytes are not what was committed, twice; names the file.
        Unreachable: it could not be read, which says nothing of its bytes.
        CalotypeError: it is of a format that came later.
    """
    commit, _ = _commit(store, images)
    there = place(store, images)

    def fetched(key: str) -> BinaryIO:
        return _twice(lambda: _fetched(there, key, commit["files"][key]))

    def parsed(key: str) -> Any:
        with fetched(key) as file:
            return _parsed(file.read())

    def mapped(key: str) -> Any:
        from safetensors import safe_open

        with fetched(key) as file:
            return safe_open(f"/dev/fd/{file.fileno()}", framework="pt")  # the mapping outlives the file

    plain = {key.split("-")[0]: parsed(key) for key in commit["files"] if _is_plain(key)}
    if not _is_content(commit, plain):
        raise DataError(f"{there.uri}: its index or state does not describe it; choose another checkpoint")
    index = plain.get("index")  # format 1 has none
    missed = _missed(index["pieces"], needed) if index and needed is not None else set()
    keys: dict[str, dict[str, str]] = {}  # kind -> which part -> key
    for key, (kind, part) in _tensor_files(commit).items():
        shared = kind.endswith(f".{BUFFERS}")
        if kinds is None or kind in kinds or (kinds and shared):
            parts = keys.setdefault(kind, {})
            if shared or (_engine(kind), part) not in missed:
                parts[part] = key
    wanted = [key for parts in keys.values() for key in parts.values()]
    with ThreadPoolExecutor(FETCHED) as pool:
        files = dict(zip(wanted, pool.map(mapped, wanted), strict=True))
    held = {kind: {part: files[key] for part, key in parts.items()} for kind, parts in keys.items()}
    yield Checkpoint(images, plain["state"], _tensors(held, index))


def _tensors(held: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any] | None) -> dict[str, Mapping[str, Tensor]]:
    """Kind -> which part -> open file => kind -> parameters; without the kinds of buffers, which lie among them."""
    buffers = {kind: Whole(parts.values()) for kind, parts in held.items() if kind.endswith(f".{BUFFERS}")}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for kind in held.keys() - buffers.keys():
        engine = _engine(kind)
        if index:
            also: Mapping[str, Tensor] = {} if ".exp_avg" in kind else buffers.get(f"{engine}.{BUFFERS}", {})
            pieces = {part: Whole([file]) for part, file in held[kind].items()}
            tensors[kind] = Pieced(index["shapes"][engine], index["pieces"][engine], pieces, also)
        else:
            tensors[kind] = Whole(held[kind].values())
    return tensors


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
        raise DataError(f"{place(store, images).uri} holds no {kind} (further averages: {others or 'none'})")
    with opened(store, images, (kind,)) as found:
        return {name: tensor.clone() for name, tensor in found.tensors[kind].items()}


def forget(store: Store, images: int, keep: int, keep_every: int = 0, since: float = 0.0) -> None:
    """Collect what is not wanted any more, once `images` are committed.

    Kept are the newest `keep`, the first one at or after each multiple of `keep_every`, and those that `hold` marked.
    Deleted are older ones, what was never committed before `images`, and what died attempts left beside the files of
    `images`; and of unfinished files those from before `since`, when this attempt began.
    """
    known = committed(store)
    kept = set(known[-keep:])
    if keep_every:  # the first of a span is never deleted: it is the first of those that are left, too
        spans = [number // keep_every for number in known]
        kept |= {known[spans.index(span)] for span in spans if span}
    for folder in store.folders(FOLDER):
        old = folder.isdigit() and int(folder) < images and int(folder) not in kept
        if old and not place(store, int(folder)).exists(KEPT):
            discard(store, int(folder))
    there = place(store, images)
    named = {COMMIT, KEPT, *_commit(store, images)[0]["files"]}  # of the commit that stands, if another was first
    for key in [entry.key for entry in there.list() if entry.key not in named]:
        there.delete(key)
    for entry in store.unfinished(FOLDER):
        if entry.modified < since:
            store.give_up(entry)


def damaged(store: Store, images: int) -> bool:
    """Whether it is, all of it read anew: what one rank met may have been its own machine's fault."""
    try:
        with opened(store, images):
            return False
    except DataError:
        return True


def hold(store: Store, images: int) -> None:
    """Keep a checkpoint for ever.

    Raises:
        DataError: it is not there any more.
    """
    there = place(store, images)
    there.write(KEPT, b"")
    try:
        check(store, images)  # it may have been forgotten in this very moment
    except DataError:
        there.delete(KEPT)
        raise


def discard(store: Store, images: int) -> None:
    """Delete a checkpoint, commit first; one that is damaged would stand in the way of the same images saved anew."""
    there = place(store, images)
    for key in sorted((entry.key for entry in there.list()), key=lambda key: key != COMMIT):
        there.delete(key)


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


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Raises Unreachable where a disk, a mount or a permission failed: the bytes may be whole, and come later."""
    try:
        yield
    except CalotypeError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in AWAY:
            raise Unreachable(str(error)) from error
        raise


def _twice(read: Callable[[], T], level: int = logging.WARNING) -> T:
    """What is wrong with bytes may have come about on their way: they are read once more."""
    try:
        return read()
    except DataError as error:
        log.log(level, "%s: it is read once more", error)
        return read()


def _commit(store: Store, images: int) -> tuple[dict[str, Any], bytes]:
    return _twice(lambda: _read_commit(store, images), logging.DEBUG)  # often a user asks for what never was


def _read_commit(store: Store, images: int) -> tuple[dict[str, Any], bytes]:
    there = place(store, images)
    where = there.uri
    try:
        with _reached():
            data = there.read(COMMIT)
    except Missing:
        raise DataError(f"{where} is no checkpoint: it was never committed (committed are "
                        f"{', '.join(map(str, committed(store))) or 'none'})") from None  # fmt: skip
    commit = _parsed(data)
    made, files = (commit.get("format"), commit.get("files")) if isinstance(commit, dict) else (None, None)
    if isinstance(files, dict) and any("/" in key or key.startswith(".") for key in files):  # they become files here
        raise DataError(f"{where}/{COMMIT} names files outside its folder: choose another checkpoint")
    if isinstance(made, str) and made.startswith(f"{FORMAT.partition('/')[0]}/") and made not in (FORMAT, FIRST_FORMAT):
        raise CalotypeError(f"{where} is of format {made!r}, this Calotype reads {FORMAT} and before: use a newer one")
    if not _is_commit(commit):
        raise DataError(f"{where}/{COMMIT} is damaged: choose another checkpoint")
    return commit, data


def _parsed(data: bytes) -> Any:
    """None for what is not JSON, or too deep."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _is_commit(commit: Any) -> bool:
    """Whether it is one of a format that is read here."""
    if not isinstance(commit, dict) or commit.get("format") not in (FORMAT, FIRST_FORMAT):
        return False
    files = commit.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(row, dict) and type(row.get("bytes")) is int and row["bytes"] >= 0 and type(row.get("sha256")) is str
        for row in files.values()
    ):
        return False
    plain = sorted(key.partition("-")[0] for key in files if _is_plain(key))
    named = (key.rsplit("-", 3 if commit["format"] == FORMAT else 2) for key in files if not _is_plain(key))
    return (
        plain == (["index", "state"] if commit["format"] == FORMAT else ["state"])
        and all("." in kind and len(part) == (3 if commit["format"] == FORMAT else 2) for kind, *part in named)
        and all(key.isprintable() for key in files)
    )


def _is_content(commit: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether state and index are such, and the index knows each part that holds pieces of parameters."""
    if not all(isinstance(part, dict) for part in plain.values()):
        return False
    if (index := plain.get("index")) is None:
        return True
    try:
        for engine, parts in index["pieces"].items():
            sizes = {name: prod(shape) for name, shape in index["shapes"][engine].items()}
            for name, begin, count in (piece for part in parts.values() for piece in part):
                if not 0 <= begin < begin + count <= sizes[name]:
                    return False
        parts = ((kind, part) for kind, part in _tensor_files(commit).values() if not kind.endswith(f".{BUFFERS}"))
        return all(part in index["pieces"][_engine(kind)] for kind, part in parts)
    except (LookupError, TypeError, ValueError, AttributeError):
        return False


def _fetched(place: Store, key: str, row: Mapping[str, Any]) -> BinaryIO:
    """One file, verified."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened_here:
        file = opened_here.enter_context(tempfile.TemporaryFile())
        for start in range(0, int(row["bytes"]), BLOCK):
            try:
                with _reached():
                    data = place.read(key, start, min(BLOCK, row["bytes"] - start))
            except Missing:
                data = b""
            digest.update(data)
            file.write(data)
            if len(data) < min(BLOCK, row["bytes"] - start):
                break  # it ends there, whatever the commit says
        if digest.hexdigest() != row["sha256"] or file.tell() != row["bytes"]:
            raise DataError(f"{place.uri}/{key} is damaged: it is not what was committed; choose another checkpoint")
        file.seek(0)
        opened_here.pop_all()  # it is the caller's
        return file
