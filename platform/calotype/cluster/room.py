"""Room for the ranks of a training: how many to start, and when they should start again, without a node or as more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from calotype.cluster.nodes import draining, lost
from calotype.cluster.watch import BEAT, DONE, Sign, ranks_of
from calotype.cluster.workers import POLL
from calotype.config import Cluster
from calotype.environment import STEP

log = logging.getLogger(__name__)

SETTLE = 20.0  # seconds in which workers of an attempt before are gone, or a cluster has grown
GROWN = 60.0  # seconds that there must be room for more ranks: starting again costs all of them a good part of that


def room_for(cluster: Cluster, asked: threading.Event) -> int:
    """How many ranks to start: the most, or after SETTLE seconds those that there is room for, at least the least; 0 if
    it was asked to stop meanwhile.
    """
    if cluster.least == cluster.most:
        return cluster.most  # Ray Train waits for the room
    began, told = time.monotonic(), False
    while not asked.wait(POLL):
        try:
            room = min(rooms(cluster, draining()), cluster.most)
        except Exception as error:  # a head that is busy for a moment
            log.debug("the cluster does not say what room there is: %s", error)
            continue
        if room == cluster.most:
            return room
        if time.monotonic() - began > SETTLE and room >= cluster.least:
            log.warning("starts with %d of cluster.workers=%s: there is no room for more", room, cluster.workers)
            return room
        if time.monotonic() - began > SETTLE and not told:
            told = True
            log.warning("waits: there is room for %d of cluster.workers=%s", room, cluster.workers)
    return 0


def rooms(cluster: Cluster, leaving: Collection[str]) -> int:
    """How many ranks there is room for now, not on the nodes that leave; a rank does not stretch over nodes."""
    from ray._private.state import available_resources_per_node

    needs = {"CPU": float(cluster.cpus)} | ({"GPU": cluster.gpus} if cluster.gpus else {})
    found = {
        node: min(int(free.get(name, 0.0) / need + 1e-6) for name, need in needs.items())
        for node, free in available_resources_per_node().items()
        if node not in leaving
    }
    roomy = {node for node, room in found.items() if room}
    return sum(found[node] for node in roomy - lost(roomy))


@dataclass
class Change:
    """Whether the ranks of one attempt, `world` of them, should save and start again."""

    cluster: Cluster
    world: int
    clock: Callable[[], float] = time.monotonic
    _roomy: float | None = None  # since when there is room for more
    _looked: float = float("-inf")

    def look(self, signs: Collection[Sign]) -> str:
        """Why they should, or ""."""
        now = self.clock()
        if now - self._looked < BEAT:
            return ""
        self._looked = now
        try:
            leaving = draining()
            wanted = self.cluster.most - self.world
            more = min(rooms(self.cluster, leaving), wanted) if wanted else 0
        except Exception:  # a head that is busy for a moment
            return ""
        for node, deadline in leaving.items():
            if there := [sign for sign in signs if sign.node == node and sign.phase != DONE]:
                when = f"in {deadline - time.time():.0f} s" if deadline else "soon"
                return f"node {node[:12]}, with {ranks_of(there)}, is taken away {when}"
        if not more:
            self._roomy = None
        elif self._roomy is None:
            self._roomy = now
        elif now - self._roomy >= GROWN and len(signs) == self.world and all(sign.phase == STEP for sign in signs):
            return f"there has been room for {more} more rank{'s' * (more > 1)} for {now - self._roomy:.0f} s"
        return ""
