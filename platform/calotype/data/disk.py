"""Verified chunks on a local disk: a bounded cache that all ranks and loaders of a node, and several jobs, share.

    FOLDER/total             bytes booked, and bytes booked since they were last counted; its flock is the cache's lock
    FOLDER/.partial-*        being written, each under its writer's flock
    FOLDER/ab/abcd….chunk    entries by digest, whole; mtime: when last used, to the minute

Bytes are booked before they are written: a kill leaves too many booked, never too few, and the next count puts that
right.  A dead writer's flock is free, whichever host, container or pid it had: that, and no clock, tells a leftover.
Nothing is synced: after a power cut an entry may hold anything, and the reader's hash finds it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from calotype.data.files import PARTIAL
from calotype.errors import ConfigError, DataError

FREE = 2**30  # bytes of the disk that are left to others; 1/20 of a disk of more than 20 GiB
SHARE = 10  # 1/SHARE of the limit is evicted at once, and is written before entries are counted again
COARSE = 60.0  # seconds that an mtime may be off: a chunk read often must not write its inode as often
PATIENCE = 0.1  # seconds to wait for the lock: a chunk that is not kept costs one more download, no stall

_ENTRY = re.compile(r"[0-9a-f]{16,128}\.chunk")
_NUMBERS = re.compile(rb"(\d{20}) (\d{20})\n")

log = logging.getLogger(__name__)


class Disk:
    """At most `limit` bytes of chunks in `folder`, the least recently used going first.

    Jobs with different limits may share a folder: each write leaves it within the limit of its own writer, so the
    smallest limit holds whenever its job writes, and in between a job with a larger one may go up to that.  FREE bytes
    or 1/20 of the disk, whichever is more, stay free: where others need more, the cache shrinks.  Safe to use from
    many threads and processes, and after a fork.  No failure of the disk is raised: a read misses; a write that fails
    is said once, and is this object's last.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes.  `ConfigError` if it is below 1, or if the folder is not one that only we can write to."""
        self.folder, self.limit = folder.absolute(), limit
        self._stopped = self._said = False
        if limit < 1:
            raise ConfigError(f"the chunk cache {folder} has a limit of {limit} bytes: give it more than 0")
        try:
            try:
                with self._root(make=True):
                    pass
            except FileNotFoundError:  # somebody removed it at this very moment
                with self._root(make=True):
                    pass
        except OSError as error:
            raise ConfigError(
                f"the chunk cache {folder} cannot be used ({error.strerror}): name a folder that can be made, or one, "
                "not a link, that you own and nobody else can write to (chmod go-w)"
            ) from error

    def read(self, digest: str, buffer: memoryview) -> bool:
        """Whether the chunk was there with `len(buffer)` bytes; they are in `buffer` then, else anything may be.

        Hash the bytes before use, and `discard` the chunk if they are others.  `DataError` if `digest` is none.
        """
        fan, name = _names(digest)
        try:
            with self._root() as root, _opened(fan, os.O_DIRECTORY, root) as sub, _opened(name, at=sub) as file:
                status = os.fstat(file)
                if status.st_size != len(buffer):
                    return False
                while buffer:
                    count = os.readv(file, [buffer])
                    if not count:  # not as long as it said
                        return False
                    buffer = buffer[count:]
                if abs(time.time() - status.st_mtime) > COARSE:
                    with suppress(OSError):  # read-only: still a hit
                        os.utime(file)
                return True
        except OSError:
            return False

    def discard(self, digest: str) -> None:
        """Remove the chunk, if it is there and can be; its bytes stay booked until the next count."""
        fan, name = _names(digest)
        with suppress(OSError), self._root() as root, _opened(fan, os.O_DIRECTORY, root) as sub:
            os.unlink(name, dir_fd=sub)

    def write(self, digest: str, data: memoryview) -> None:
        """Keep the chunk, whole or not at all, after evicting what must go for it.

        Not kept: where it is there, is larger than the limit, finds too little of the disk free, or finds the lock
        taken for PATIENCE seconds.  Every limit/SHARE bytes one write counts all entries: about 1 s for 10^5.
        """
        fan, name = _names(digest)
        try:
            if len(data) > self.limit:
                self._say(f"{name} has {len(data)} bytes, more than the limit of {self.limit}: raise it")
            elif not self._stopped:
                self._write(fan, name, data)
        except (BlockingIOError, FileNotFoundError):  # the lock was taken, or the folder removed meanwhile
            pass
        except OSError as error:
            self._stopped = True
            what = "make room on its disk or in its quota, make it writable, or name another folder; reading goes on"
            log.warning("the chunk cache %s takes no more chunks from this process (%s): %s", self.folder, error, what)

    def _write(self, fan: str, name: str, data: memoryview) -> None:
        partial = f"{PARTIAL}{uuid.uuid4().hex}"
        with ExitStack() as stack:
            root = stack.enter_context(self._root(make=True))
            with suppress(FileExistsError):
                os.mkdir(fan, 0o700, dir_fd=root)
            sub = stack.enter_context(_opened(fan, os.O_DIRECTORY, root))
            with _locked(root) as counter:
                with suppress(FileNotFoundError):
                    if os.stat(name, dir_fd=sub, follow_symlinks=False).st_size == len(data):
                        return
                if not self._book(root, counter, len(data)):
                    return
                file = stack.enter_context(_opened(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, root))
                stack.callback(_remove, root, partial)  # there is none after the rename
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, len(data))  # whoever counts sees all bytes that were booked
            while data:
                data = data[os.write(file, data) :]
            os.rename(partial, name, src_dir_fd=root, dst_dir_fd=sub)

    def _book(self, root: int, counter: int, size: int) -> bool:
        """Whether there is room for `size` bytes more, after evictions if need be; they are booked then.  Locked."""
        found = _NUMBERS.fullmatch(os.pread(counter, 64, 0))
        total, fresh = map(int, found.groups()) if found else (0, self.limit)
        if fresh > self.limit // SHARE or total + size > self._bound(root, total):
            total, fresh = self._count(root, size), 0
        bound = self._bound(root, total)
        fits = total + size <= bound
        if fits:
            total, fresh = total + size, fresh + size
        elif bound < self.limit:
            self._say("its disk has too little left for others: make room on it, or name a folder on another")
        os.pwrite(counter, b"%020d %020d\n" % (total, fresh), 0)
        return fits

    def _bound(self, root: int, total: int) -> int:
        """Bytes that the cache may hold now that it holds `total`."""
        disk = os.fstatvfs(root)
        return min(self.limit, total + disk.f_bavail * disk.f_frsize - max(FREE, disk.f_blocks * disk.f_frsize // 20))

    def _count(self, root: int, size: int) -> int:
        """Bytes in the cache, leftovers removed and, if `size` more are too many, 1/SHARE of it evicted.  Locked."""
        # in this order: what is renamed in between is counted twice, not never
        total = sum(_in_flight(root, name) for name in os.listdir(root) if name.startswith(PARTIAL))
        entries = [entry for fan in range(256) for entry in _entries(root, f"{fan:02x}")]
        total += sum(each for _, each, _ in entries)
        bound = self._bound(root, total)
        if total + size > bound:
            for _, each, path in sorted(entries):
                if total + size <= bound - bound // SHARE:
                    break
                _remove(root, path)
                total -= each
        return total

    @contextmanager
    def _root(self, make: bool = False) -> Iterator[int]:
        """The folder, looked at anew each time: somebody may have removed it, and somebody else made another."""
        if make:
            with suppress(FileExistsError):  # whatever is there, opening it says more
                self.folder.mkdir(0o700, parents=True)
        with _opened(self.folder, os.O_DIRECTORY) as root:
            status = os.fstat(root)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise PermissionError(errno.EPERM, "others own it or can write to it", str(self.folder))
            yield root

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            log.warning("the chunk cache %s does not keep all chunks: %s", self.folder, what)


def _names(digest: str) -> tuple[str, str]:
    """Subfolder and file name; a digest comes from a sidecar, that is, from outside."""
    name = f"{digest}.chunk"
    if not _ENTRY.fullmatch(name):
        raise DataError(f"{digest!r} is no digest of a chunk: its sidecar must give 16 to 128 of 0-9 a-f")
    return digest[:2], name


@contextmanager
def _opened(path: str | Path, flags: int = os.O_RDONLY, at: int | None = None) -> Iterator[int]:
    """A descriptor.  No link is followed, and no pipe waited for, that somebody put in the way."""
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=at)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _locked(root: int) -> Iterator[int]:
    """The counter's descriptor, under its lock; `BlockingIOError` if others had that for PATIENCE seconds."""
    with _opened("total", os.O_RDWR | os.O_CREAT, root) as counter:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(counter, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.002)
        try:
            yield counter
        finally:
            fcntl.flock(counter, fcntl.LOCK_UN)  # closing is not enough where a fork has copied the descriptor


def _remove(root: int, path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path, dir_fd=root)


def _in_flight(root: int, partial: str) -> int:
    """Bytes of a file that is being written; 0 if nobody holds its lock: its writer is dead, and it is removed."""
    with suppress(FileNotFoundError, IsADirectoryError), _opened(partial, os.O_RDWR, root) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(file).st_size
        _remove(root, partial)
    return 0


def _entries(root: int, fan: str) -> list[tuple[int, int, str]]:
    """(mtime in ns, bytes, path from the root) of each entry in a subfolder."""
    entries = []
    with suppress(FileNotFoundError), _opened(fan, os.O_DIRECTORY, root) as sub:
        for name in filter(_ENTRY.fullmatch, os.listdir(sub)):
            with suppress(FileNotFoundError):  # discarded meanwhile
                status = os.stat(name, dir_fd=sub, follow_symlinks=False)
                if not stat.S_ISDIR(status.st_mode):  # which nobody here has made, and which cannot be unlinked
                    entries.append((status.st_mtime_ns, status.st_size, f"{fan}/{name}"))
    return entries
