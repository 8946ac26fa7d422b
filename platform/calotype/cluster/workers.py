"""What runs on the cluster's workers: units of a `map`, the ranks of a training; and the flags between them and the
driver, which are small values in the cluster's key-value store.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from calotype.cluster.nodes import kernel_kills
from calotype.cluster.watch import BEAT, DONE, Pulse, Sign
from calotype.config import Cluster, Job
from calotype.environment import Worker
from calotype.errors import CalotypeError, Unreachable
from calotype.runs import Record

Body = Callable[[Any, Worker, Record], dict[str, Any]]

POLL = 0.5  # seconds between two looks for a stop or an error
PATIENCE = timedelta(days=7)  # of a collective: its hang is found by watch.py
SPACE = "calotype"  # of the key-value store
# What can only be a bug, and would fail the same way again.  Not RuntimeError: a rank whose neighbour died raises it.
BUGS = (TypeError, ValueError, LookupError, AttributeError, NameError, ImportError, AssertionError, NotImplementedError)


class Units:
    """An actor that makes units, one at a time."""

    def __init__(self, make: Any, config: Job, rank: int, world: int, group: str) -> None:
        self._start = (make, config, rank, world, group)
        self._work: Any = None

    def ready(self) -> None:
        """Answers once there is room for the actor and it has started."""

    def work(self, *unit: Any) -> Any:
        if self._work is None:  # here and not in the constructor: what `make` raises comes through as it is
            make, config, rank, world, group = self._start
            _use_threads(config.cluster.cpus)
            device = "cuda:0" if config.cluster.gpus else "cpu"
            self._work = make(config, Worker(rank, world, 0, device, config.cluster.cpus, group=group))
        return self._work(*unit)


def run_one(body: Body, config: Job, record: Record) -> dict[str, Any]:
    _use_threads(config.cluster.cpus)
    return body(config, worker_here(config.cluster), record)


def worker_here(cluster: Cluster, stop: Callable[[], bool] = lambda: False) -> Worker:
    return Worker(0, 1, 0, "cuda:0" if cluster.gpus else "cpu", cluster.cpus, stop)


def run_rank(payload: dict[str, Any]) -> dict[str, Any] | None:
    """One rank: join the process group, run the body, leave."""
    import ray.train

    faulthandler.register(signal.SIGUSR1, 2)  # its stacks into its log: see watch.py
    rank, key, pulse = ray.train.get_context().get_world_rank(), payload["key"], Pulse()
    try:
        with _heard(key, f"{key}:{payload['attempt']}", rank, pulse) as asked:
            return _in_group(payload, pulse, asked)
    except BaseException as error:
        if isinstance(error, (CalotypeError, *BUGS)) and not isinstance(error, Unreachable):
            put(f"{key}:error", packed(error), overwrite=False)
            return None  # the driver raises it, and says it better than Ray Train's traceback
        raise


def _in_group(payload: dict[str, Any], pulse: Pulse, asked: threading.Event) -> dict[str, Any] | None:
    for library in ("botocore", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)  # Ray Train has every library speak at INFO
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    config: Job = payload["config"]
    context = ray.train.get_context()
    rank, world, local = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    where = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    assert where is not None
    _use_threads(config.cluster.cpus)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    numbers = (rank, world, local, context.get_local_world_size(), *where)
    os.environ.update(zip(names, [str(number) for number in numbers], strict=True))  # DeepSpeed reads them

    import torch

    torch.set_num_threads(config.cluster.cpus)
    device = "cpu"
    if config.cluster.gpus:
        from ray.train.torch import get_device

        device = str(get_device())
        torch.cuda.set_device(device)
    if config.cluster.hang_seconds:
        _leave_hangs_to_the_watch()
    torch.distributed.init_process_group("nccl" if config.cluster.gpus else "gloo")
    worker = Worker(rank, world, local, device, config.cluster.cpus, asked.is_set, beat=pulse)
    result = payload["body"](config, worker, payload["record"])
    torch.distributed.destroy_process_group()
    return result if rank == 0 else None


@contextlib.contextmanager
def _heard(key: str, attempt: str, rank: int, pulse: Pulse) -> Iterator[threading.Event]:
    """Tell the driver how far this rank is, and follow its flag: an event that is set when this attempt is to end.

    Both in a thread, so that they cost a step nothing.  A final error of another rank ends this process: it may wait
    in a collective for the one that failed.
    """
    import ray

    asked, over = threading.Event(), threading.Event()
    node = ray.get_runtime_context().get_node_id()

    def tell(ticks: int, phase: str) -> None:
        with contextlib.suppress(Exception):  # a head that is busy for a moment
            sign = Sign(rank, node, os.getpid(), ticks, pulse.count, phase, pulse.began, pulse.images, kernel_kills())
            put(f"{attempt}:{rank}", sign.packed())

    def follow() -> None:
        ticks = 0
        while True:
            if ticks % round(BEAT / POLL) == 0:
                tell(ticks, pulse.phase)
            if over.wait(POLL):
                return
            ticks += 1
            with contextlib.suppress(Exception):
                if get(f"{attempt}:stop"):
                    asked.set()
                if get(f"{key}:error") and not over.is_set():
                    os._exit(1)

    thread = threading.Thread(target=follow, name="signs", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join()
        tell(-1, DONE)  # also of one that failed: where, exactly


def _use_threads(count: int) -> None:
    """cluster.cpus is also the number of compute threads; to be said before numpy or torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(count)


def _leave_hangs_to_the_watch() -> None:
    """Collectives wait as long as the driver's watch lets them: start, validation and saving may take long.

    PyTorch's own limits (NCCL 10 minutes, gloo 30) are set for all groups, for DeepSpeed makes some and says none.
    """
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, PATIENCE)


def _free_address() -> tuple[str, int]:
    import socket

    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])


# ------------------------------------------------------------------------------- the cluster's key-value store


def put(name: str, value: bytes, overwrite: bool = True) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(name, value, overwrite, namespace=SPACE)


def get(name: str) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(name, namespace=SPACE)


def forget(prefix: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(prefix, del_by_prefix=True, namespace=SPACE)


def packed(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        return pickle.dumps((error, text))
    except Exception:  # an exception of a kind that does not travel
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))


def unpacked(data: bytes) -> BaseException:
    error, text = pickle.loads(data)  # written by our own workers, behind the cluster's token
    if not isinstance(error, CalotypeError):
        error.__cause__ = RuntimeError(f"on a worker:\n{text}")
    return error
