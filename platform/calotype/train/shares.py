"""Whole states <=> each rank's share of them; what a rank writes of a checkpoint (its format: `checkpoint.py`), and
the commit that makes one of all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calotype.data.store import Store
from calotype.data.threads import Daemons, Steps
from calotype.environment import Worker
from calotype.train import checkpoint, plain
from calotype.train.checkpoint import BUFFERS, COMMIT, FORMAT, Piece

log = logging.getLogger(__name__)

PART = 2**26  # bytes of tensors per file, unless one piece is larger: a copy of so many lies in memory while it is sent
SENT = 4  # files that one rank sends at once: S3 gives each connection some 90 MB/s


@dataclass(frozen=True)
class Share:
    """What one rank holds of one engine, on the CPU.

    Attributes:
        shapes: of all whole parameters.
        pieces: this rank's, in the order in which they lie in each of `kinds`.
        kinds: "weights", "exp_avg", "ema" ... -> fp32, 1-D: all pieces, one after the other.
        buffers: whole; of one rank only.
        ready: returns when `kinds` are filled; seconds that a GPU took for it.
    """

    shapes: Mapping[str, Sequence[int]]
    pieces: Sequence[Piece]
    kinds: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    ready: Callable[[], float] = lambda: 0.0


class Copies:
    """Copies of one rank's pieces in host memory, pinned beside a GPU; the same memory every time."""

    def __init__(self, pieces: Sequence[plain.Placed], device: str) -> None:
        self.pieces = pieces
        self._cuda = device.startswith("cuda")
        self._memory: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, kinds: Mapping[str, Sequence[Tensor]]) -> tuple[dict[str, Tensor], Callable[[], float]]:
        """Kind -> partitions => kind -> pieces, one after the other; and what waits until they are there.

        On a GPU the copies are queued behind the steps taken, and before the next one: this thread does not wait.
        """
        began = _event() if self._cuda else None
        counts = [piece.count for piece in self.pieces]
        for kind, partitions in kinds.items():
            if kind not in self._memory:
                self._memory[kind] = torch.empty(sum(counts), pin_memory=self._cuda)
            flat = {piece.partition: partitions[piece.partition].detach().reshape(-1) for piece in self.pieces}
            parts = [flat[piece.partition][piece.start : piece.start + piece.count] for piece in self.pieces]
            if parts:
                torch._foreach_copy_(list(self._memory[kind].split(counts)), parts, non_blocking=self._cuda)
        if began is None:
            return dict(self._memory), lambda: 0.0
        copied = _event()

        def ready() -> float:
            copied.synchronize()
            return float(began.elapsed_time(copied)) / 1000

        return dict(self._memory), ready


def _event() -> torch.cuda.Event:
    """A mark in the queue of the GPU."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.no_grad()
def whole_tensors(
    tensors: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Sequence[plain.Placed],
    replicated: bool,
    worker: Worker,
) -> dict[str, Tensor]:
    """Partition-wise tensors of all ranks => {parameter: whole tensor} on rank 0's CPU, {} elsewhere.  Collective."""
    first = worker.rank == 0
    made = {name: torch.empty(shape) for name, shape in shapes.items()} if first else {}
    for index, tensor in enumerate(tensors):
        ranks: list[Tensor] | None = [tensor.detach().contiguous()]
        if not replicated:
            own = tensor.detach().to(worker.device)  # NCCL takes no tensors that were offloaded
            ranks = [torch.empty_like(own) for _ in range(worker.world)] if first else None
            dist.gather(own, ranks)
        for piece in pieces if first else ():
            if piece.partition == index:
                assert ranks is not None
                part = ranks[0 if replicated else piece.rank].view(-1)[piece.start : piece.start + piece.count]
                made[piece.name].view(-1)[piece.begin : piece.begin + piece.count] = part.cpu()
    return made


@torch.no_grad()
def take_over(
    named: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Sequence[plain.Placed],
    replicated: bool,
    worker: Worker,
) -> None:
    """{parameter: whole tensor} => this rank's partition-wise tensors."""
    for piece in pieces:
        if piece.begin == 0 if replicated else piece.rank == worker.rank:
            whole, target = named[piece.name], tensors[piece.partition].data
            assert tuple(whole.shape) == shapes[piece.name], piece.name
            if replicated:
                target.copy_(whole)
                continue
            part = whole.reshape(-1)[piece.begin : piece.begin + piece.count]
            target.view(-1)[piece.start : piece.start + piece.count].copy_(part)


def write(store: Store, images: int, rank: int, shares: Mapping[str, Share]) -> dict[str, Any]:
    """Upload what one rank holds, by engine, once it is ready; what `commit` must know of it, as plain data."""
    place = checkpoint.place(store, images)
    files: dict[str, dict[str, Any]] = {}
    pieces: dict[str, dict[str, list[Piece]]] = {}
    with _sending(place) as send:
        for engine, share in sorted(shares.items()):
            for number, (some, first, last) in enumerate(_parts(share.pieces)):
                where = f"{rank:05d}-{number:05d}"
                pieces.setdefault(engine, {})[where] = some
                for kind, values in sorted(share.kinds.items()):
                    data = _safetensors(values[first:last], some)
                    files |= _named(f"{engine}.{kind}-{where}", "safetensors", data, send)
            if share.buffers:
                from safetensors.torch import save as serialise

                whole = {name: buffer.contiguous() for name, buffer in share.buffers.items()}
                name = f"{engine}.{BUFFERS}-{rank:05d}-00000"
                files |= _named(name, "safetensors", serialise(whole), send)
    return {"files": files, "pieces": pieces}


def commit(
    store: Store,
    images: int,
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    parts: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    allowed: Callable[[], None] = lambda: None,
) -> bool:
    """Make a checkpoint of what all ranks wrote.

    Args:
        store: the run's artifact root.
        shapes: engine -> parameter -> shape.
        parts: what `write` gave, of every rank.
        allowed: raises if this attempt of the run may not write any more; asked right before the commit.

    Returns:
        False if these images were committed already (the older commit stands).
    """
    place = checkpoint.place(store, images)
    files = {key: row for part in parts for key, row in part["files"].items()}
    pieces: dict[str, dict[str, list[Piece]]] = {engine: {} for engine in shapes}
    for part in parts:
        for engine, some in part["pieces"].items():
            pieces[engine] |= some
    _check_whole(shapes, pieces)
    index = {"shapes": shapes, "pieces": pieces}
    plain = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    files |= _named("index", "json", plain, place.publish)
    files |= _named("state", "json", json.dumps(state, indent=1, sort_keys=True).encode(), place.publish)
    allowed()
    made = {"format": FORMAT, "images": images, "files": files}
    fresh = place.publish(COMMIT, json.dumps(made, indent=1, sort_keys=True).encode())
    if not fresh:
        log.warning("%s was committed before: that one stands", place.uri)
    return fresh


def _parts(pieces: Sequence[Piece]) -> Iterator[tuple[list[Piece], int, int]]:
    """Pieces of one file, and which elements of the share they are."""
    part: list[Piece] = []
    first = last = 0
    for piece in pieces:
        if part and 4 * (last - first + piece[2]) > PART:
            yield part, first, last
            part, first = [], last
        part.append(piece)
        last += piece[2]
    if part:
        yield part, first, last


def _safetensors(values: Tensor, pieces: Sequence[Piece]) -> bytes:
    """fp32 values of the pieces, one after the other, as a safetensors file.

    Laid out here and not by the library, which copies twice and holds the interpreter that takes the next step.
    """
    header, last = {}, 0
    for name, _, count in pieces:
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [last, last := last + 4 * count]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, values.numpy().data.cast("B")])


def _named(name: str, suffix: str, data: bytes, send: Callable[[str, bytes], Any]) -> dict[str, dict[str, Any]]:
    """Send a file under a name that holds its hash; its row in the commit."""
    digest = hashlib.sha256(data).hexdigest()
    key = f"{name}-{digest[:16]}.{suffix}"
    send(key, data)
    return {key: {"sha256": digest, "bytes": len(data)}}


@contextmanager
def _sending(place: Store) -> Iterator[Callable[[str, bytes], None]]:
    """A function that publishes files, some at once; all are there at the end, or it raises what one of them raised."""
    threads, sent = Daemons(SENT, "send"), deque[Future[bool]]()

    def publish(key: str, data: bytes) -> Steps[bool]:
        yield threads
        return place.publish(key, data)

    def send(key: str, data: bytes) -> None:
        if len(sent) == SENT:
            sent.popleft().result()
        sent.append(threads.submit(publish(key, data)))

    try:
        yield send
        for future in sent:
            future.result()
    finally:
        threads.close()


def _check_whole(
    shapes: Mapping[str, Mapping[str, Sequence[int]]], pieces: Mapping[str, Mapping[str, Sequence[Piece]]]
) -> None:
    """Every element of every parameter lies in one piece."""
    for engine, named in shapes.items():
        there: dict[str, list[tuple[int, int]]] = {name: [] for name in named}
        for name, begin, count in (piece for part in pieces[engine].values() for piece in part):
            there[name].append((begin, count))
        for name, shape in named.items():
            last = 0
            for begin, count in sorted(there[name]):
                assert begin == last, f"{engine} {name}: saved twice, or not at all, from element {min(begin, last)} on"
                last = begin + count
            assert last == prod(shape), f"{engine} {name}: {last} of {prod(shape)} elements are saved"
