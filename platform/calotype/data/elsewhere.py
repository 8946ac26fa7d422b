"""Datasets of foreign shards: the tars stay where they lie, what is known of them lies with the other datasets.

    URI/a/00000.tar                                       theirs: only read
    ROOT/datasets/NAME/place.json                         {"shards_at": URI}
    ROOT/datasets/NAME/foreign/a/00000.sidecar.json       and .columns.parquet, as beside any shard
    ROOT/datasets/NAME/manifests/000001.json              names the shard foreign/a/00000.tar

The URI is in no manifest: a bucket that moves is the same dataset, with the same digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from calotype.data.files import Entry, Missing, Names, Store
from calotype.data.manifest import canonical, parsed
from calotype.data.store import open_store
from calotype.errors import DataError

PLACE, PREFIX = "place.json", "foreign/"
FORMAT = "calotype.place/1"


def dataset_store(root: str, name: str) -> Store:
    """`ROOT/datasets/NAME`: manifests, sidecars, columns and shards of a dataset, wherever its shards lie."""
    home = open_store(root).at("datasets", name)
    place = shards_at(home)
    return Elsewhere(home, open_store(place)) if place else home


def shards_at(home: Store) -> str:
    """The URI of a dataset's foreign shards; "" where it has none."""
    try:
        data = home.read(PLACE)
    except Missing:
        return ""
    place = parsed(data, f"{home.uri}/{PLACE}", FORMAT).get("shards_at")
    if not isinstance(place, str) or not place:
        raise DataError(f"{home.uri}/{PLACE} names no place: run `calotype data index URI --name NAME` again")
    return place


def begun_at(home: Store, uri: str) -> str:
    """Where the foreign shards of a dataset lie: at `uri`, if nobody has said so before."""
    return uri if home.publish(PLACE, _said(uri)) else shards_at(home)


def put_at(home: Store, uri: str) -> None:
    """They lie at another place now."""
    home.write(PLACE, _said(uri))


def _said(uri: str) -> bytes:
    return canonical({"format": FORMAT, "shards_at": uri})


@dataclass(frozen=True)
class Elsewhere(Store):
    """`home`, but for the keys foreign/PATH.tar: those are PATH.tar of `shards`, and are never written."""

    home: Store
    shards: Store

    @property
    def uri(self) -> str:
        return self.home.uri

    def where(self, key: str) -> str:
        store, name = self._at(key)
        return store.where(name)

    def at(self, *parts: str) -> Store:
        return self.home.at(*parts) if parts else self

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        store, name = self._at(key)
        return store.read(name, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview, stop: Event | None = None) -> int:
        store, name = self._at(key)
        return store.read_into(name, start, buffer, stop)

    def publish(self, key: str, data: bytes | Path) -> bool:
        return self._mine(key).publish(key, data)

    def write(self, key: str, data: bytes | Path) -> None:
        self._mine(key).write(key, data)

    def delete(self, key: str) -> None:
        self._mine(key).delete(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        found = list(self.home.list(prefix))
        if prefix.startswith(PREFIX):
            theirs = self.shards.list(prefix.removeprefix(PREFIX))
            found += [Entry(PREFIX + one.key, one.size, one.modified) for one in theirs if one.key.endswith(".tar")]
        yield from sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str = "") -> Names:
        return self.home.folders(prefix)

    def exists(self, key: str) -> bool:
        store, name = self._at(key)
        return store.exists(name)

    def ensure(self) -> None:
        self.home.ensure()

    def _at(self, key: str) -> tuple[Store, str]:
        theirs = key.startswith(PREFIX) and key.endswith(".tar")
        return (self.shards, key.removeprefix(PREFIX)) if theirs else (self.home, key)

    def _mine(self, key: str) -> Store:
        store, name = self._at(key)
        if store is not self.home:
            raise DataError(f"{store.where(name)} is a foreign shard: it is only read, never changed")
        return store
