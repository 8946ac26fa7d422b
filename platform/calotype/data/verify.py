"""`calotype data verify`: every byte of a dataset against its manifest, and all that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from calotype.data.manifest import Manifest, Shard
from calotype.data.shards import Sidecar, keys_of, read_sidecar, verified
from calotype.data.store import Store
from calotype.data.threads import Memory, Passed, Told, over
from calotype.errors import DataError

PART = 8 * 2**20  # bytes of one range GET, where chunks are smaller
NAMED = 3  # damaged chunks of one shard that are named


def verify(store: Store, manifest: Manifest, jobs: int = 8, told: Told | None = None) -> list[str]:
    """Hash every shard, chunk, sidecar and columns file again, and count samples and members; what is wrong, by shard.

    Memory: `jobs` buffers of PART bytes, or of the largest chunk.

    Raises:
        Unreachable: the store does not answer, which is no damage.
    """
    memory = Memory()

    def one(shard: Shard, passed: Passed) -> list[str]:
        return list(_Check(store, manifest, shard, memory, passed).run())

    total = sum(shard.bytes for shard in manifest.shards)
    return [what for found in over(manifest.shards, one, jobs, total, 0, told) for what in found]


class _Check:
    """Of one shard."""

    def __init__(self, store: Store, manifest: Manifest, shard: Shard, memory: Memory, passed: Passed) -> None:
        self.store, self.manifest, self.shard, self.passed = store, manifest, shard, passed
        self.where, self.memory = store.where(shard.key), memory
        self.whole, self.sound = hashlib.sha256(), True  # so far

    def run(self) -> Iterator[str]:
        """What is wrong with it, a sentence each."""
        keys: list[str] | None = None
        sidecar: Sidecar | None = None
        try:
            keys = keys_of(self.store, self.shard)
        except DataError as error:
            yield str(error)
        try:
            sidecar = read_sidecar(self.store, self.shard)
        except DataError as error:
            yield str(error)
        try:
            yield from self._chunks(sidecar, keys) if sidecar else ()
            yield from self._rest(int(sidecar.offsets[-1]) if sidecar else 0)
        except DataError as error:  # missing, or a file that a disk does not give: the other shards are looked at
            yield str(error)

    def _chunks(self, sidecar: Sidecar, keys: list[str] | None) -> Iterator[str]:
        """Hashes, samples, keys and members of all chunks, in their order, in ranges of about PART bytes."""
        members: set[str] = set()
        first, wrong, counts = 0, 0, self.shard.chunk_counts()
        for start, size, numbers in _ranges(sidecar):
            view = self._read(start, size)
            if len(view) < size:
                yield f"{self.where} is cut: it has {start + len(view)} of {self.shard.bytes} bytes"
                self.sound = False
                return
            for number in numbers:
                begin, length = sidecar.span(number)
                count = counts[number]
                try:
                    data = view[begin - start : begin - start + length]
                    found = verified(self.where, self.shard, sidecar, number, data, length)
                    members.update(found.members)
                    if keys is not None and found.keys != keys[first : first + count]:
                        raise DataError(f"{self.where}: chunk {number} holds other keys than the columns say")
                except DataError as error:
                    self.sound = False
                    wrong += 1
                    if wrong <= NAMED:
                        yield str(error)
                first += count
        if wrong > NAMED:
            yield f"{self.where}: {wrong - NAMED} more of its {len(counts)} chunks are damaged"
        named = members == set(sidecar.members) and members <= set(self.manifest.members)
        if self.sound and not named:
            yield f"{self.where} has members {', '.join(sorted(members))}, its sidecar or the manifest says others"

    def _rest(self, at: int) -> Iterator[str]:
        """What follows the chunks (all of it, where no sidecar says what chunks there are), and the SHA-256 of all."""
        if not self.sound:
            return
        while at < self.shard.bytes:
            got = len(self._read(at, min(PART, self.shard.bytes - at)))
            at += got
            if not got:
                yield f"{self.where} is cut: it has {at} of {self.shard.bytes} bytes"
                return
        if self.store.read_into(self.shard.key, self.shard.bytes, self.memory.take(1)[:1]):
            yield f"{self.where} is longer than its {self.shard.bytes} bytes"
        if self.whole.hexdigest() != self.shard.sha256:
            yield f"{self.where} has another SHA-256 than the manifest says: it was changed or replaced"

    def _read(self, start: int, size: int) -> memoryview:
        buffer = self.memory.take(max(size, PART))[:size]
        view = buffer[: self.store.read_into(self.shard.key, start, buffer)]
        self.whole.update(view)
        self.passed(len(view))
        return view


def _ranges(sidecar: Sidecar) -> Iterator[tuple[int, int, range]]:
    """(start, bytes, chunks) of runs of chunks that are read at once."""
    first = 0
    while first < len(sidecar.hashes):
        last = first + 1
        while last < len(sidecar.hashes) and sidecar.offsets[last + 1] - sidecar.offsets[first] <= PART:
            last += 1
        start = int(sidecar.offsets[first])
        yield start, int(sidecar.offsets[last]) - start, range(first, last)
        first = last
