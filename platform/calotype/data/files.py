"""What a store of bytes promises, and its plain form: a folder.

`publish` is what correctness rests on: a key appears whole, once, and never changes (DESIGN L7).  `write` replaces a
key atomically; use it for hints only.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event
from typing import BinaryIO, TypeAlias

from calotype.errors import CalotypeError, ConfigError, DataError

PART = 16 * 2**20  # bytes per streamed read
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
DAMAGE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ESTALE)
PARTIAL = ".partial-"  # prefix of files that have not got their name yet

Names: TypeAlias = list[str]  # inside the classes below, `list` is the method


class Missing(DataError):
    """No such key."""


@dataclass(frozen=True)
class Entry:
    """One listed key, relative to its store; `modified` in seconds since the epoch, by the store's clock."""

    key: str
    size: int
    modified: float


def checked(key: str, where: str) -> str:
    """A key that cannot leave its root nor meet a folder's unfinished files."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or part.startswith(PARTIAL) for part in parts) or "\0" in key or "\\" in key:
        raise DataError(f"{key!r} is not a key under {where}: no empty, '.', '..' or '{PARTIAL}' parts, no backslash")
    return key


class Store(ABC):
    """Keys -> bytes under one URI.  Picklable; safe to use from many threads."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """Without a slash at the end."""

    def where(self, key: str) -> str:
        """What a person calls the key."""
        return f"{self.uri}/{key}"

    @abstractmethod
    def at(self, *parts: str) -> Store:
        """The same store, further down."""

    @abstractmethod
    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of a key, fewer where it ends before; `Missing` if there is none."""

    def read_into(self, key: str, start: int, buffer: memoryview, stop: Event | None = None) -> int:
        """Fill `buffer` from byte `start` of a key on; how many bytes there were, fewer where the key ends before.

        Args:
            stop: ends the patience with a server that does not answer.
        """
        data = self.read(key, start, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    @abstractmethod
    def publish(self, key: str, data: bytes | Path) -> bool:
        """Make the key, whole or not at all; False, and nothing changed, if it exists already."""

    @abstractmethod
    def write(self, key: str, data: bytes | Path) -> None:
        """Make or replace the key, whole or not at all."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Keys that start with `prefix` (any string), at any depth, sorted."""

    @abstractmethod
    def folders(self, prefix: str = "") -> Names:
        """Names of the non-empty folders directly below the folder `prefix`, sorted."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether the key was published."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the key; nothing happens if there is none."""

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """What writers that were killed left below the folder `prefix`, and living ones write, that has no key yet.

        Empty for a bucket: a put is whole or nothing there, and what is left of one in parts (only keys above 8 MB that
        are replaced, and above 5 GiB, come in parts) is its lifecycle rules' to end.
        """
        yield from ()

    def give_up(self, unfinished: Entry) -> None:
        """Remove one of those; nothing happens if it is gone."""
        self.delete(unfinished.key)

    @abstractmethod
    def ensure(self) -> None:
        """Create the bucket or folder if it is missing, or say why it cannot be used."""

    def upload(self, folder: Path, prefix: str = "") -> None:
        """Every file below `folder`, to `prefix`/its relative path."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            self.write(f"{prefix.rstrip('/')}/{name}" if prefix else name, path)

    def download(self, prefix: str, folder: Path) -> None:
        """Every key below the folder `prefix`, to `folder`/its relative path; `Missing` if there is none."""
        base = f"{prefix.rstrip('/')}/" if prefix else ""
        found = False
        for entry in self.list(base):
            target = folder / checked(entry.key[len(base) :], f"{self.uri}/{base}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                for start in range(0, entry.size, PART):
                    file.write(self.read(entry.key, start, PART))
            found = True
        if not found:
            raise Missing(f"nothing lies below {self.uri}/{base}")


# ---------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class FolderStore(Store):
    """A local or shared file system.  A file gets its name by link (publish) or rename (write), after fsync."""

    path: Path

    @property
    def uri(self) -> str:
        return str(self.path)

    def at(self, *parts: str) -> Store:
        return FolderStore(self.path / checked("/".join(parts), self.uri)) if parts else self

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._opened(key) as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def read_into(self, key: str, start: int, buffer: memoryview, stop: Event | None = None) -> int:
        with self._opened(key) as file:
            file.seek(start)
            return file.readinto(buffer)  # type: ignore[attr-defined]  # of a BufferedReader

    def publish(self, key: str, data: bytes | Path) -> bool:
        partial, final = self._partial(key, data)
        try:
            os.link(partial, final)  # fails if the name is taken: the folder's conditional put
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(final.parent)
        return True

    def write(self, key: str, data: bytes | Path) -> None:
        partial, final = self._partial(key, data)
        os.replace(partial, final)
        _sync_folder(final.parent)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._folder(prefix.rpartition("/")[0])
        entries = []
        for path in _files(folder):
            key = path.relative_to(self.path).as_posix()
            if key.startswith(prefix):
                try:
                    status = path.stat()
                except OSError as error:
                    if error.errno in NOWHERE:  # deleted since it was listed, or a link to nothing
                        continue
                    raise _unreadable(path, error) from error
                entries.append(Entry(key, status.st_size, status.st_mtime))
        yield from sorted(entries, key=lambda entry: entry.key)

    def folders(self, prefix: str = "") -> Names:
        folder = self._folder(prefix.rstrip("/"))
        if not folder.is_dir():
            return []
        found = [Path(item.path) for item in os.scandir(folder) if os.path.isdir(item.path)]
        return sorted(path.name for path in found if next(_files(path), None))

    def exists(self, key: str) -> bool:
        return (self.path / checked(key, self.uri)).is_file()

    def delete(self, key: str) -> None:
        (self.path / checked(key, self.uri)).unlink(missing_ok=True)

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        for path in [*self._folder(prefix).rglob(f"{PARTIAL}*")]:
            with suppress(FileNotFoundError):  # it got its name meanwhile
                status = path.stat()
                yield Entry(path.relative_to(self.path).as_posix(), status.st_size, status.st_mtime)

    def give_up(self, unfinished: Entry) -> None:
        (self.path / unfinished.key).unlink(missing_ok=True)

    def ensure(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder {self.path} cannot be made ({error.strerror}): set root to another"
            ) from error
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"the folder {self.path} is not writable: change its owner or set root to another")

    def _folder(self, prefix: str) -> Path:
        return self.path / checked(prefix, self.uri) if prefix else self.path

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        path = self.path / checked(key, self.uri)
        try:
            with open(path, "rb") as file:
                yield file
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Missing(f"{path} does not exist") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def _partial(self, key: str, data: bytes | Path) -> tuple[Path, Path]:
        """The bytes on disk under a name that no listing shows, and the name they are to get."""
        final = self.path / checked(key, self.uri)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.parent / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            with open(partial, "wb") as target:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, target, PART)
                else:
                    target.write(data)
                target.flush()
                os.fsync(target.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial, final


def _unreadable(path: Path, error: OSError) -> CalotypeError:
    """What is wrong with one file is damage, and others may be sound; what is wrong with this process is not."""
    kind = DataError if error.errno in DAMAGE else CalotypeError
    return kind(f"{path} cannot be read ({error.strerror}): check its owner, the disk, and limits of this process")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name itself must survive a power cut
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    """Every published file below, links to folders followed; none twice, as where a link leads back up.

    Raises:
        DataError: a folder cannot be listed: what lies in it must not go missing without a word.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed since it was listed, or never made
            raise DataError(f"{error.filename} cannot be listed ({error.strerror}): check its owner") from error

    seen: set[tuple[int, int]] = set()
    starts = [folder]
    # Folders first, then links to some: a folder's own name counts, in whatever order they lie.
    while starts:
        links: list[Path] = []
        for parent, folders, names in chain.from_iterable(os.walk(start, onerror=fail) for start in sorted(starts)):
            with suppress(FileNotFoundError):
                status = os.stat(parent)
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
            folders.sort()
            links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            yield from (Path(parent, name) for name in names if not name.startswith(PARTIAL))
        starts = links
