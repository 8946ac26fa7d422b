"""Checkpoints (format v1): named states and a cursor, committed at once, readable at any world size and stage.

    checkpoints/<images seen, 12 digits>/<engine>.<kind>-<part>-<hash>.safetensors   fp32, by parameter name
                                         state-<hash>.json       steps, loss scale, cursor, clock, unsent points
                                         COMMIT.json             sha256 of each, last, by conditional put

File names hold hashes of their contents, so what an attempt left behind when it died is either the same bytes or in
nobody's way.  Nothing is a checkpoint before its COMMIT.json is there.  No pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype.data.store import Missing, Store
from calotype.errors import CalotypeError, DataError

if TYPE_CHECKING:  # this page is also read at submit, where torch is not
    from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = "calotype.checkpoint/1"
FOLDER, COMMIT = "checkpoints", "COMMIT.json"
PART = 2**30  # bytes of tensors per file, unless one tensor is larger
BLOCK = 2**24  # bytes per read


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


def save(
    store: Store,
    images: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 0,
    allowed: Callable[[], None] = lambda: None,
) -> bool:
    """Write and commit.

    Args:
        store: the run's artifact root.
        tensors: "<engine>.<kind>" -> parameter name -> CPU tensor.
        keep: older checkpoints than the newest `keep` are deleted; 0 keeps all.
        allowed: raises if this attempt of the run may not write any more; asked right before the commit.

    Returns:
        False if these images were committed already (the older commit stands).
    """
    from safetensors.torch import save as serialise

    place = store.at(FOLDER, f"{images:012d}")
    files: dict[str, dict[str, Any]] = {}

    def put(name: str, suffix: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        key = f"{name}-{digest[:16]}.{suffix}"
        place.publish(key, data)
        files[key] = {"sha256": digest, "bytes": len(data)}

    for kind, named in sorted(tensors.items()):
        for index, part in enumerate(_parts(named)):
            put(f"{kind}-{index:05d}", "safetensors", serialise(part))
    put("state", "json", json.dumps(state, indent=1, sort_keys=True).encode())
    commit = {"format": FORMAT, "images": images, "files": files}
    allowed()
    fresh = place.publish(COMMIT, json.dumps(commit, indent=1, sort_keys=True).encode())
    if not fresh:
        log.warning("%s was committed before: that one stands", place.uri)
    if keep:
        _forget(store, images, keep)
    return fresh


def committed(store: Store) -> list[int]:
    """Images seen of every committed checkpoint, rising."""
    found = (entry.key.split("/") for entry in store.list(f"{FOLDER}/"))
    return sorted(int(parts[1]) for parts in found if len(parts) == 3 and parts[2] == COMMIT and parts[1].isdigit())


def latest(store: Store) -> int | None:
    """The newest committed one, as images seen."""
    return max(committed(store), default=None)


def discard(store: Store, images: int) -> None:
    """Delete a checkpoint, commit first; one that is damaged would stand in the way of the same images saved anew."""
    place = store.at(FOLDER, f"{images:012d}")
    for key in sorted((entry.key for entry in place.list()), key=lambda key: key != COMMIT):
        place.delete(key)


def digest(store: Store, images: int) -> str:
    """sha256 of the commit, which names every byte of the checkpoint."""
    return hashlib.sha256(_commit(store, images)[1]).hexdigest()


@contextlib.contextmanager
def opened(store: Store, images: int, kinds: tuple[str, ...] | None = None) -> Iterator[Checkpoint]:
    """Download and verify; the files live as long as the context.

    Args:
        kinds: only these of "<engine>.<kind>"; all if None.

    Raises:
        DataError: there is no such checkpoint, or its bytes are not what was committed; names the file.
        CalotypeError: it is of a format that came later.
    """
    commit, _ = _commit(store, images)
    place = store.at(FOLDER, f"{images:012d}")
    with tempfile.TemporaryDirectory(prefix="calotype-") as name:
        folder, state = Path(name), {}
        files: dict[str, list[Path]] = {}
        for key, row in sorted(commit["files"].items()):
            kind = key.rsplit("-", 2)[0]
            if key.startswith("state-"):
                _fetch(place, key, row, folder / key)
                state = json.loads((folder / key).read_bytes())
            elif kinds is None or kind in kinds:
                _fetch(place, key, row, folder / key)
                files.setdefault(kind, []).append(folder / key)
        yield Checkpoint(images, state, {kind: _Lazy(paths) for kind, paths in files.items()})


def weights(store: Store, images: int, engine: str, ema: bool = True) -> dict[str, Tensor]:
    """All weights of one engine by parameter name; the averaged ones where there are any and `ema` asks for them."""
    names = {key.rsplit("-", 2)[0] for key in _commit(store, images)[0]["files"]}
    kind = f"{engine}.ema" if ema and f"{engine}.ema" in names else f"{engine}.weights"
    with opened(store, images, (kind,)) as found:
        if kind not in found.tensors:
            raise DataError(f"{store.uri}/{FOLDER}/{images:012d} holds no {kind}")
        return {name: tensor.clone() for name, tensor in found.tensors[kind].items()}


class _Lazy(Mapping[str, "Tensor"]):
    """Tensors of some safetensors files, read one at a time: a rank keeps only its share of a model."""

    def __init__(self, paths: list[Path]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(path, framework="pt") for path in paths]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _parts(named: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in sorted(named.items()):
        if part and size + tensor.nbytes > PART:
            yield part
            part, size = {}, 0
        part[name] = tensor.contiguous()
        size += tensor.nbytes
    yield part


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
    if commit.get("format") != FORMAT:
        raise CalotypeError(
            f"{where} is of format {commit.get('format')!r}, this Calotype reads {FORMAT}: use a newer one"
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


def _forget(store: Store, images: int, keep: int) -> None:
    """Delete checkpoints before the newest `keep`, and what was never committed before `images`."""
    kept = committed(store)[-keep:]
    for folder in store.folders(FOLDER):
        if folder.isdigit() and int(folder) < images and int(folder) not in kept:
            discard(store, int(folder))
