"""An object store in this process, in place of boto3's client below `S3Store`: it counts requests, by virtual time.

Every request is one that S3 would have got: 412s, HEADs and pages of listings are counted as what they are.
"""

from __future__ import annotations

import io
import os
import threading
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from botocore.exceptions import ClientError

SMALL = 2**20  # bytes of a file that are kept; of a bigger one only their number
PAGE = 1000  # keys of one listing request
READS, WRITES = ("get", "head", "list"), ("put", "delete")
LIMITS = {"reads": 5500, "writes": 3500}  # of S3, per second and prefix
LATENCY = {"get": 0.03, "head": 0.03, "list": 0.1, "put": 0.06, "delete": 0.03}  # seconds, with S3's first byte
BANDWIDTH = 87e6  # bytes per second and connection


@dataclass
class Bucket:
    """Keys -> bytes, or only their number where the bytes do not matter."""

    now: float = 0.0  # virtual seconds
    seconds: float = 0.0  # that requests took since `took` was asked
    counts: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    flows: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # by their changes
    spreads: Counter[tuple[str, str]] = field(default_factory=Counter)
    _objects: dict[str, tuple[bytes | int, str, datetime]] = field(default_factory=dict)
    _keys: list[str] = field(default_factory=list)  # sorted
    _lock: Any = field(default_factory=threading.Lock)

    # --------------------------------------------------------------------------- what S3Store asks of a client

    def get_object(self, Bucket: str, Key: str, Range: str = "") -> dict[str, Any]:
        held = self._objects.get(Key)
        start, _, last = Range.removeprefix("bytes=").partition("-")
        data = b"" if held is None else self._span(held[0], int(start or 0), int(last or 2**62) + 1)
        self._count("get", Key, len(data))
        if held is None:
            raise _error("NoSuchKey")
        return {"Body": io.BytesIO(data), "ResponseMetadata": {"RetryAttempts": 0}}

    def put_object(self, Bucket: str, Key: str, Body: Any, Metadata: Any = None, IfNoneMatch: str = "") -> None:
        small = isinstance(Body, io.BytesIO) or os.fstat(Body.fileno()).st_size < SMALL
        data = Body.read() if small else os.fstat(Body.fileno()).st_size
        self._count("put", Key, data if isinstance(data, int) else len(data))
        with self._lock:
            if IfNoneMatch and Key in self._objects:
                raise _error("PreconditionFailed")
            if Key not in self._objects:
                insort(self._keys, Key)
            self._objects[Key] = data, (Metadata or {}).get("writer", ""), datetime.fromtimestamp(self.now, UTC)

    def upload_fileobj(self, Body: Any, Bucket: str, Key: str, Config: Any) -> None:
        self.put_object(Bucket, Key, Body)

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        self._count("head", Key)
        if Key not in self._objects:
            raise _error("404")
        return {"Metadata": {"writer": self._objects[Key][1]}}

    def delete_object(self, Bucket: str, Key: str) -> None:
        self._count("delete", Key)
        if Key in self._objects:
            self.forget(Key)

    def get_paginator(self, _: str) -> Bucket:
        return self

    def paginate(self, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        at = bisect_left(self._keys, Prefix)
        while True:
            page = [key for key in self._keys[at : at + PAGE] if key.startswith(Prefix)]
            self._count("list", Prefix)
            yield {"Contents": [self._entry(key) for key in page]}
            if len(page) < PAGE:
                return
            at = bisect_right(self._keys, page[-1])  # after the last one, whatever came meanwhile

    # ------------------------------------------------------------------------------------------------- figures

    def took(self) -> float:
        """Seconds that the requests since the last call would have taken, one after the other."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def spread(self, kind: str, folder: str, count: int, begin: float, end: float) -> None:
        """Requests that nobody answers here: `count` of them, evenly over a time."""
        first, last = int(begin), max(int(begin) + 1, round(end))
        self.flows[kind, folder][first] += count / (last - first)
        self.flows[kind, folder][last] -= count / (last - first)
        self.spreads[kind, folder] += count

    def holds(self, name: str) -> bool:
        return name in self._objects

    def forget(self, name: str) -> None:
        del self._objects[name]
        del self._keys[bisect_left(self._keys, name)]

    def during(self, body: Callable[[], Any]) -> Counter[tuple[str, str]]:
        """(kind, folder) -> requests that something made."""
        before = self.asked()
        body()
        return self.asked() - before

    def asked(self) -> Counter[tuple[str, str]]:
        """(kind, folder) -> requests so far."""
        return self.spreads + Counter({name: each.total() for name, each in self.counts.items()})

    def rates(self, kinds: tuple[str, ...], folder: str) -> list[float]:
        """Requests of some kinds in every second."""
        names = [(kind, folder) for kind in kinds]
        found = np.zeros(
            1 + max((second for name in names for second in (*self.counts[name], *self.flows[name])), default=0)
        )
        for name in names:
            flow = np.zeros_like(found)
            flow[list(self.flows[name])] = list(self.flows[name].values())
            found += np.cumsum(flow)
            found[list(self.counts[name])] += list(self.counts[name].values())
        return list(found.tolist())

    def begin(self) -> None:
        """Count from here on."""
        self.counts.clear()
        self.flows.clear()
        self.spreads.clear()

    def _count(self, kind: str, key: str, size: int = 0) -> None:
        with self._lock:
            self.counts[kind, key.rpartition("/")[0]][int(self.now + self.seconds)] += 1
            self.seconds += LATENCY[kind] + size / BANDWIDTH

    def _entry(self, key: str) -> dict[str, Any]:
        data, _, modified = self._objects[key]
        return {"Key": key, "Size": data if isinstance(data, int) else len(data), "LastModified": modified}

    def _span(self, data: bytes | int, start: int, end: int) -> bytes:
        return bytes(max(0, min(end, data) - start)) if isinstance(data, int) else data[start:end]


def _error(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}}, "simulated")
