"""Ranks that form one training, started again as often as it takes: each attempt goes on from the last commit.

The driver watches them (watch.py) and decides what a failure means (failures.py); Ray Train starts one attempt and
says how it ended.  SIGTERM and `calotype cancel` have the ranks save and end, or end a wait between two attempts at
once.  So does a cluster in which other ranks should start in their place (room.py): that is no failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import asdict
from typing import Any

from calotype.cluster.failures import Failure, Streak, failure_of, looked_into
from calotype.cluster.room import Change, room_for
from calotype.cluster.watch import Watch, end_hung
from calotype.cluster.workers import POLL, Body, forget, get, put, run_rank, unpacked
from calotype.config import Cluster, Job
from calotype.errors import CalotypeError
from calotype.runs import Record

log = logging.getLogger(__name__)

ENDING = 60.0  # seconds that the other ranks have to end after a final error
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


def run(body: Body, config: Job, record: Record, asked: threading.Event) -> dict[str, Any]:
    """Rank 0's result; {} if it was asked to stop while no rank ran.

    Raises:
        CalotypeError: as a rank raised it; or the same failure at the same images again and again.
    """
    key, streak = secrets.token_hex(8), Streak()
    payload = {"body": body, "config": config, "record": record, "key": key}
    try:
        for attempt in itertools.count(1):
            if not (workers := room_for(config.cluster, asked)):
                break
            ended = _attempt({**payload, "workers": workers, "attempt": attempt}, asked)
            if ended is None and not asked.is_set():
                log.warning("goes on from where the ranks have ended, with those that there is room for")
                continue
            if not isinstance(ended, Failure):
                return ended or {}
            if asked.is_set():  # it had its chance to save: what was committed before stands
                log.warning("%s while it was being stopped", ended.why)
                return {}
            try:
                delay = streak.add(ended)
            except CalotypeError as error:
                raise CalotypeError(f"{error}{_evidence(record, streak)}") from None
            log.warning(
                "%s %s (%s): failure %d of this job; goes on from the last checkpoint in %g s",
                ended.why, ended.where(), ended.kind, streak.total, delay,
            )  # fmt: skip
            if asked.wait(delay):
                break
        return {}
    finally:
        with contextlib.suppress(Exception):  # a head that is busy: what the training came to counts
            forget(f"{key}:")


def _attempt(payload: dict[str, Any], asked: threading.Event) -> dict[str, Any] | Failure | None:
    """Start the ranks once and see how they end; None: they saved because others should start in their place."""
    key, cluster = payload["key"], payload["config"].cluster
    attempt = f"{key}:{payload['attempt']}"
    done: dict[str, Any] = {}
    watch = Watch(lambda rank: get(f"{attempt}:{rank}"), payload["workers"], cluster.hang_seconds)
    change = Change(cluster, payload["workers"])
    hung, ending, told = "", "", False
    fit = threading.Thread(target=_fit, args=(payload, done), name="fit", daemon=True)
    fit.start()
    while fit.is_alive():
        fit.join(POLL)
        if not ending and (ending := "asked to stop" if asked.is_set() else change.look(watch.signs.values())):
            log.warning("%s: all ranks save and end", ending)
        if ending and not told:
            with contextlib.suppress(Exception):  # a head that is busy for a moment: at the next look
                put(f"{attempt}:stop", b"1")
                told = True
        if error := _final(key):
            fit.join(ENDING)  # ranks that wait for the failed one end themselves
            raise unpacked(error)
        if not hung and (hung := watch.look()):
            log.error("hung: %s; %s", hung, watch.told())
            end_hung(list(watch.signs.values()))
    if error := _final(key, ENDING):
        raise unpacked(error)
    if "error" not in done:
        return dict(done["result"] or {}) or (None if ending else {})
    watch.look(last=True)
    kind, why = looked_into(*(("hung", hung) if hung else failure_of(done["error"])), watch.signs.values())
    return Failure(kind, why, watch.began, watch.low, watch.low + watch.pace)


def _final(key: str, patience: float = 0.0) -> bytes | None:
    """What a rank raised that is final.  Without patience, a head that is busy for a moment is asked at the next look;
    with some, it must have answered by then.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return get(f"{key}:error")
        except Exception:
            if not patience:
                return None
            if time.monotonic() > until:
                raise
            time.sleep(POLL)


def _evidence(record: Record, streak: Streak) -> str:
    """Leave what happened among the run's artifacts; says where."""
    images = streak.same[-1].low
    failures = [asdict(failure) for failure in streak.same]
    data = {"images": images, "failures": failures, "at": time.time()}
    try:
        record.artifacts.write(f"evidence/{images:012d}-ranks.json", json.dumps(data, indent=1).encode())
    except Exception as error:
        log.warning("the evidence could not be written: %s", error)
        return ""
    return f"; evidence/{images:012d}-ranks.json of the run's artifacts lists them"


def _fit(payload: dict[str, Any], done: dict[str, Any]) -> None:
    """Ray Train's side of one attempt, in a thread: it would take over Ctrl-C in the main one."""
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
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        )
        # Not TorchTrainer: it has the driver and the controller import torch, seconds before any worker starts.
        trainer: Any = Lean(
            run_rank,
            train_loop_config=payload,
            backend_config=_shared_devices(),
            scaling_config=ScalingConfig(
                num_workers=payload["workers"],
                use_gpu=cluster.gpus > 0,
                resources_per_worker={"CPU": cluster.cpus} | ({"GPU": cluster.gpus} if cluster.gpus else {}),
            ),
            run_config=run_config,
        )
        done["result"] = trainer.fit().return_value
    except BaseException as error:  # also the SystemExit that ray.shutdown raises in here
        done["error"] = error
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
