"""Leases: who has a key in hand.  A hint that saves double work; which bytes a key has, `Store.publish` decides.

    KEY.lease    {"beat": 3, "owner": "GROUP/RANK"}     rewritten every BEAT seconds, deleted when the key is committed

Nobody compares clocks: a lease is stale when its bytes have not changed for STALE seconds of the watcher's own.  What a
dead worker, a machine that was frozen, or a lost race of two writers costs is work done twice.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from calotype.data.store import Missing, Store
from calotype.environment import Worker
from calotype.errors import CalotypeError

log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between two signs of life
STALE = 30.0  # seconds without one after which a lease is nobody's
LONGEST = 3600.0  # seconds after which there are no more: an encoder that hangs must not keep a shard for ever
LEASE = ".lease"
READ = 4096  # bytes: more are no lease, and are not fetched

_said: set[str] = set()  # stores that refused


def lease_key(key: str) -> str:
    """Of `<sha>.tar`: `<sha>.lease`."""
    return f"{key.removesuffix('.tar')}{LEASE}"


@contextmanager
def taken(store: Store, key: str, worker: Worker, dead: bytes | None = None) -> Iterator[bytes | None]:
    """Have the lease of a key during the block, which is told the bytes of another group's instead, where that has it.

    A lease of the worker's own group is taken over at once: its owner is dead, or the key would not have been dealt
    again.  A store that refuses leases is one without: the block goes on as if it had it.

    Args:
        dead: bytes of a lease that is stale: taken over if they still are what lies there.
    """
    name, owner = lease_key(key), f"{worker.group}/{worker.rank}"
    theirs = _tried(store, partial(_take, store, name, owner, worker.group, dead))
    if theirs is not None:
        yield theirs
        return
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, name, owner, over), name="lease", daemon=True)
    beating.start()
    try:
        yield None
    finally:
        over.set()
        beating.join()  # a beat that came after the deletion would make a lease of nobody's
        _tried(store, partial(store.delete, name))


def _take(store: Store, name: str, owner: str, group: str, dead: bytes | None) -> bytes | None:
    """None, or the bytes of another's that is not known to be dead."""
    first = _written(owner, 0)
    if store.publish(name, first):
        return None
    try:
        found = store.read(name, 0, READ)
    except Missing:  # deleted this moment
        return None if store.publish(name, first) else b""
    if found != dead and _group(found) != group:
        return found
    store.write(name, first)
    return None


def _beat(store: Store, name: str, owner: str, over: threading.Event) -> None:
    for beat in range(1, int(LONGEST / BEAT)):
        if over.wait(BEAT):
            return
        _tried(store, partial(store.write, name, _written(owner, beat)))


def _written(owner: str, beat: int) -> bytes:
    return json.dumps({"beat": beat, "owner": owner}).encode()


def _group(data: bytes) -> str | None:
    """Whose a lease is; None where it says nothing that can be understood."""
    try:
        return str(json.loads(data)["owner"]).rpartition("/")[0]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _tried(store: Store, act: Callable[[], bytes | None]) -> bytes | None:
    """None where the store will not: without leases work may be done twice, and that is all."""
    try:
        return act()
    except (CalotypeError, OSError) as error:
        if store.uri not in _said:
            _said.add(store.uri)
            log.warning("%s (leases are only hints: goes on without, other jobs may do the same work)", error)
        return None
