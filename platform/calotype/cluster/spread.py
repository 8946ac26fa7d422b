"""Spread a task's body over workers: units over actors (`map`), ranks of one training (`train`), one worker (`one`).

With cluster.kind=local the same functions run the body here, in this process, and ray is never imported.

What ends how:
  - CalotypeError (a setting, the data, a loss that is not a number) is final and is raised here as it was raised there.
  - So is what can only be a bug (TypeError and its like), and any exception of a unit.
  - A worker that dies (killed, out of memory, its machine gone) is replaced: its unit is handed out again, or the ranks
    start again and the body goes on from its own checkpoint.  RETRIES times.
  - SIGTERM (`calotype cancel`, a preempted machine) and the first Ctrl-C ask a training to save and return, by
    `Worker.stop`; `map` and `one` end at once, for every unit is committed whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from calotype.cluster import jobs
from calotype.cluster.workers import POLL, Body, Units, get, put, run_one, run_rank, unpacked, worker_here
from calotype.config import Cluster, Job
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.runs import Record

Unit = TypeVar("Unit")
Made = TypeVar("Made")

ENDING = 60.0  # seconds that the other ranks have to end after a final error
RETRIES = 5  # deaths of a worker that one unit, or one training, survives
# Ray Train looks at its workers every 2 s by default (every 0.1 s would be felt in the step time of two slow cores);
# and parts of it that nothing here uses would each start a process.
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def map(
    make: Callable[[Any, Worker], Callable[[Unit], Made]], config: Job, units: Sequence[Unit]
) -> Iterator[tuple[Unit, Made]]:
    """Apply `make(config, worker)` to every unit, on cluster.workers actors; results as they come.

    Units are handed out one at a time, so a slow one holds up nobody.

    Raises:
        CalotypeError: as a unit raised it; or a unit whose worker died RETRIES times, named.
    """
    if config.cluster.kind == "local":
        work = make(config, worker_here(config.cluster))
        for unit in units:
            yield unit, work(unit)
        return
    import ray

    _connect(config.cluster)
    waiting = deque(range(len(units)))
    deaths = [0] * len(units)
    count = min(config.cluster.workers, len(units))
    actors: dict[Any, tuple[int, Any, int]] = {}  # future -> (rank, actor, index of its unit)

    def hand_out(rank: int, actor: Any) -> None:
        if waiting:
            index = waiting.popleft()
            actors[actor.work.remote(units[index])] = (rank, actor, index)

    with _ended_by_signal():
        try:
            for rank in range(count):
                hand_out(rank, _actor(make, config, rank, count))
            while actors:
                ready, _ = ray.wait(list(actors), timeout=POLL)
                for future in ready:
                    rank, actor, index = actors.pop(future)
                    try:
                        made = ray.get(future)
                    except ray.exceptions.RayTaskError as error:
                        raise _raised(error) from None
                    except ray.exceptions.RayError as error:
                        deaths[index] += 1
                        if deaths[index] > RETRIES:
                            what = f"the worker died {deaths[index]} times on {repr(units[index])[:300]}"
                            raise CalotypeError(f"{what}: {_first_line(error)}") from None
                        waiting.appendleft(index)
                        hand_out(rank, _actor(make, config, rank, count))
                    else:
                        hand_out(rank, actor)
                        yield units[index], made
        finally:
            for _, actor, _ in actors.values():
                ray.kill(actor)


def one(body: Body, config: Job, record: Record) -> dict[str, Any]:
    """Run `body(config, worker, record)` on one worker; its result."""
    if config.cluster.kind == "local":
        return body(config, worker_here(config.cluster), record)
    import ray

    _connect(config.cluster)
    with _ended_by_signal():
        run = ray.remote(run_one).options(**_resources(config.cluster), max_retries=RETRIES, retry_exceptions=False)
        future = run.remote(body, config, record)
        try:
            result: dict[str, Any] = ray.get(future)
            return result
        except ray.exceptions.RayTaskError as error:
            raise _raised(error) from None
        except ray.exceptions.RayError as error:
            raise CalotypeError(f"the worker died {RETRIES + 1} times: {_first_line(error)}") from None


def train(body: Body, config: Job, record: Record) -> dict[str, Any]:
    """Run `body(config, worker, record)` on cluster.workers ranks that form one torch process group; rank 0's result.

    `worker.stop()` may turn true at different steps on different ranks: the body agrees on one before it acts.
    """
    if config.cluster.kind == "local":
        with _stopped_by_signal() as asked:
            return body(config, worker_here(config.cluster, asked.is_set), record)

    _connect(config.cluster)
    _check_room(config.cluster)
    key = secrets.token_hex(8)
    done: dict[str, Any] = {}
    payload = {"body": body, "config": config, "record": record, "key": key}
    fit = threading.Thread(target=_fit, args=(payload, done), name="fit", daemon=True)
    with _stopped_by_signal() as asked:
        fit.start()
        while fit.is_alive():
            fit.join(POLL)
            if asked.is_set() and not get(f"{key}:stop"):
                put(f"{key}:stop", b"1")
            if error := get(f"{key}:error"):
                fit.join(ENDING)  # ranks that wait for the failed one end themselves
                raise unpacked(error)
    if "error" in done:
        raise done["error"]
    return dict(done["result"] or {})


# ------------------------------------------------------------------------------------------------ on the driver


def _fit(payload: dict[str, Any], done: dict[str, Any]) -> None:
    """Ray Train's side of `train`, in a thread: it would take over Ctrl-C in the main one."""
    for name, text in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, text)
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Lean(DataParallelTrainer):
        """Without two actors, seconds each: one for Ray Data, one that cleans up in drivers that outlive their job."""

        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [made for made in super()._create_default_callbacks() if not isinstance(made, unused)]

    cluster: Cluster = payload["config"].cluster
    scratch = tempfile.mkdtemp(prefix="calotype-train-")
    try:
        run_config: Any = RunConfig(
            name=payload["key"],
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=RETRIES),
            logging_config=LoggingConfig(log_level="WARNING"),
        )
        # Not TorchTrainer: it has the driver and the controller import torch, seconds before any worker starts.
        trainer: Any = Lean(
            run_rank,
            train_loop_config=payload,
            backend_config=_shared_devices(),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=cluster.gpus > 0,
                resources_per_worker={"CPU": cluster.cpus} | ({"GPU": cluster.gpus} if cluster.gpus else {}),
            ),
            run_config=run_config,
        )
        done["result"] = trainer.fit().return_value
    except BaseException as error:  # also the SystemExit that ray.shutdown raises in here
        done["error"] = CalotypeError(f"training failed {RETRIES + 1} times, the last time with: {_last_line(error)}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _shared_devices() -> Any:
    """Let the ranks of a machine see each other's GPUs, as NCCL wants."""
    from ray.train.backend import Backend, BackendConfig

    class Shared(Backend):
        share_cuda_visible_devices = True

    class SharedConfig(BackendConfig):
        @property
        def backend_cls(self) -> Any:
            return Shared

    return SharedConfig()


def _connect(cluster: Cluster) -> None:
    """Join the cluster as a driver: the one whose job this is, else the one that the environment names."""
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    runtime_env: dict[str, Any] | None = None
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # not a submitted job: the workers need this code
        runtime_env = {"working_dir": jobs.upload()}
    if address.startswith("http"):
        address = os.environ.get("CALOTYPE_RAY_GCS", "")
        if not address:
            raise ConfigError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is another machine's dashboard: use `calotype submit`, or "
                f"cluster=local to run here"
            )
    try:
        ray.init(address, runtime_env=runtime_env, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise CalotypeError(f"no Ray cluster at {address!r} ({_first_line(error)}): run `calotype up`") from None


def _check_room(cluster: Cluster) -> None:
    """The embedded cluster does not grow: refuse what would wait for ever."""
    import ray

    if "CALOTYPE_RAY_GCS" not in os.environ:
        return
    total = ray.cluster_resources()
    for name, each, setting in (("CPU", cluster.cpus, "cpus"), ("GPU", cluster.gpus, "gpus")):
        if cluster.workers * each > total.get(name, 0):
            raise ConfigError(
                f"cluster.workers={cluster.workers} with cluster.{setting}={each} want {cluster.workers * each:g} "
                f"{name}s, and this machine has {total.get(name, 0):g}: lower one of them"
            )


def _resources(cluster: Cluster) -> dict[str, float]:
    return {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}


def _actor(make: Any, config: Job, rank: int, world: int) -> Any:
    import ray

    return ray.remote(Units).options(**_resources(config.cluster)).remote(make, config, rank, world)


def _raised(error: Any) -> Exception:
    """What the body raised, as it was: CalotypeErrors speak for themselves, others bring their traceback along."""
    cause = error.cause
    return cause if isinstance(cause, CalotypeError) else error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C interrupts as usual."""
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    with _handlers(on_signal, signal.SIGTERM, signal.SIGINT):
        yield asked


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends this process in order; Ray's own handler would not let `finally` run."""

    def on_signal(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    with _handlers(on_signal, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handlers(on_signal: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
