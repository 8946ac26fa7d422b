"""What the driver asks of the cluster's nodes: which will be taken away, which are gone, which ran out of memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ANSWER = 2.0  # seconds that a node has to take a connection
COUNT = 20.0  # seconds that a node has to start a task that counts


def draining() -> dict[str, float]:
    """Nodes that will be taken away -> when, in seconds since 1970; 0 if nobody says.

    A spot machine after its notice is one that Ray drains (`ray drain-node`, or whoever calls what that calls): until
    its deadline it keeps what runs there, and gets nothing new.
    """
    from ray._private.state import state

    return {node: milliseconds / 1000 for node, milliseconds in state.get_draining_nodes().items()}


def lost(nodes: Collection[str]) -> set[str]:
    """Those of them that take no connection; Ray needs about 17 s to find out that a node is gone."""
    import ray

    places = {one["NodeID"]: (one["NodeManagerAddress"], one["NodeManagerPort"]) for one in ray.nodes() if one["Alive"]}

    def answers(node: str) -> bool:
        with contextlib.suppress(OSError, KeyError):
            socket.create_connection(places[node], ANSWER).close()
            return True
        return False

    with ThreadPoolExecutor(16) as pool:
        return {node for node, there in zip(nodes, pool.map(answers, nodes), strict=True) if not there}


def kills_by_node(nodes: Collection[str]) -> dict[str, int]:
    """Node -> `kernel_kills` there, of those that say it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    asked = {}
    for node in set(nodes) - {here}:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ray.remote(kernel_kills).options(num_cpus=0, scheduling_strategy=strategy).remote()] = node
    found = {here: kernel_kills()} if here in nodes else {}
    for reference in ray.wait(list(asked), num_returns=len(asked), timeout=COUNT)[0] if asked else ():
        with contextlib.suppress(ray.exceptions.RayError):
            found[asked[reference]] = ray.get(reference)
    return found


def kernel_kills() -> int:
    """Processes that this machine's kernel has ended for want of memory, its own or a container's; 0 if it says none.

    It ends them by SIGKILL, which says nothing of why (proc_vmstat(5), `oom_kill`, of Linux 4.13 and later).
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
