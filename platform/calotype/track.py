"""Where a run is seen: metrics, pictures and lineage in MLflow, or nowhere; nothing here holds up a step."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from calotype import machine, unsent
from calotype.compose import as_data
from calotype.errors import CalotypeError, ConfigError
from calotype.outbox import Outbox, Point
from calotype.pictures import surely, write_picture
from calotype.provenance import as_yaml, commit, parameters
from calotype.runs import Record, driver_host

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two measurements of the machine
WAIT = 60.0  # seconds at the end of an attempt for what has not been delivered
SETTLE = 1.0  # seconds from a write of ours until those that waited for the same lock are done too
PATIENCE = 30.0  # seconds that a server gets to open a new run


@dataclass(frozen=True)
class Dataset:
    """A dataset or cache that a run read: one node of the lineage."""

    name: str
    digest: str
    uri: str
    context: str = "training"


class Tracker:
    """What tasks and the loop may ask of a tracker; as it stands, track=none: only pictures go somewhere.

    All of it returns at once but `finish`.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def log(self, metrics: Mapping[str, float], images: int) -> None:
        """One point per metric at step = images seen."""

    def figures(self, result: Mapping[str, Any]) -> None:
        """The numbers that the run ends with, but for the last points of its curves; the run counts as finished."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

    def picture(self, name: str, image: Any, images: int) -> None:
        """Show a PIL image at step = images seen; MLflow makes a slider of the steps of one name."""
        write_picture(self.record.artifacts, name, image, images)

    def inputs(self, datasets: Sequence[Dataset] = (), used: Sequence[Record] = ()) -> None:
        """Lineage into this run: what it read, and the runs whose models it used."""

    def model(self, name: str, uri: str, kind: str, images: int) -> None:
        """Lineage out of this run: one model, its weights at `uri`; told again, it has moved there."""

    def pending(self) -> list[Point]:
        """Points the server does not have yet: they travel in checkpoints, back in through `attach`."""
        return []

    def finish(self, status: str = "") -> None:
        """Deliver what waits, for at most WAIT seconds; with a status (FINISHED, FAILED, KILLED) the run ends."""


def create_run(config: Any, job: str, identity: str) -> tuple[str, str]:
    """A new run in MLflow: (run id, artifact root); ("", "") with track=none.

    Raises:
        CalotypeError: MLflow cannot be reached in PATIENCE seconds.
        ConfigError: MLflow keeps artifacts where Calotype cannot write them.
    """
    if config.track.kind == "none":
        return "", ""
    tags = {"calotype.job": job, "calotype.identity": identity, "calotype.root": config.root}
    if config.track.parent:
        tags["mlflow.parentRunId"] = config.track.parent
    return _create(config, config.name, tags)


def discard_run(run_id: str) -> None:
    """Delete a run that lost the race for its identity."""
    if run_id:
        connect().delete_run(run_id)


@contextlib.contextmanager
def open_run(config: Any, record: Record) -> Iterator[Tracker]:
    """The driver's tracker of one attempt: says what runs, and at the end how it went.  MLflow may be away."""
    if config.track.kind == "none" or not record.mlflow_run_id:
        yield Tracker(record)
        return
    tracker = MlflowTracker(record, "driver")
    tracker.begin(config)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED" if tracker.finished else "KILLED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def attach(config: Any, record: Record, pending: Iterable[Sequence[Any]] = (), role: str = "worker") -> Tracker:
    """A worker's tracker of the same run, the one of its role; takes back points unsent when a checkpoint was cut."""
    if config.track.kind == "none" or not record.mlflow_run_id:
        return Tracker(record)
    tracker = MlflowTracker(record, role, pending)
    tracker.watch(socket.gethostname())
    return tracker


def settle(record: Record) -> None:
    """Deliver what a finished run could not while MLflow was away; does nothing if there is nothing."""
    for role in unsent.roles(record) if record.mlflow_run_id else ():
        MlflowTracker(record, role, unsent.read(record, role)).finish("FINISHED" if role == "driver" else "")


def open_parent(config: Any, job: str) -> str:
    """The id of a new MLflow run that holds the runs of a sweep; empty with track=none."""
    return "" if config.track.kind == "none" else _create(config, f"{job} sweep", {"calotype.job": "sweep"})[0]


def close_parent(run_id: str, status: str) -> None:
    """End a sweep's run."""
    if run_id:
        connect().set_terminated(run_id, status)


def page(run_id: str) -> str:
    """Where a browser finds the run; empty without MLflow, or while it does not answer."""
    address = re.sub(r"//[^/@]*@", "//", os.environ.get("MLFLOW_TRACKING_URI", ""))  # no password in a log
    with contextlib.suppress(Exception):  # a finished job stays finished
        if run_id and address:
            experiment = connect().get_run(run_id).info.experiment_id
            where = f"{address.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
            return f"{where}?workflowType=machine_learning"  # or the page has a menu of language models' things
    return ""


# ------------------------------------------------------------------------------------------------ trackers


class MlflowTracker(Tracker):
    """One run in MLflow, seen from one process; `role` names who logs: driver, worker and nodes log other keys."""

    def __init__(self, record: Record, role: str, pending: Iterable[Sequence[Any]] = ()) -> None:
        super().__init__(record)
        self._run = record.mlflow_run_id
        self._role = role
        curves: Callable[[], list[Point]] = (lambda: unsent.read(record, "worker")) if role == "driver" else list
        server = _Server(self._run, lambda: unsent.read(record, role), curves, fence=role == "worker")
        self._outbox = Outbox(server, pending)
        self._painter = ThreadPoolExecutor(1, "pictures")
        self._drawn = False
        self._watching: threading.Thread | None = None
        self._stop = threading.Event()
        self.finished = False

    def begin(self, config: Any) -> None:
        """This attempt: the run is running (again), on this code, with this config."""
        data = as_data(config)
        values = parameters(data)
        code = commit()

        def send(client: Any) -> None:
            from mlflow.entities import Param, RunTag

            client.update_run(self._run, status="RUNNING")
            # MLflow's parameters never change: settings that differ after a restart are named in a tag.
            known = client.get_run(self._run).data.params
            new = [Param(key, value) for key, value in values.items() if key not in known]
            for start in range(0, len(new), 100):
                client.log_batch(self._run, params=new[start : start + 100])
            changed = [f"{k}: {known[k]} -> {v}" for k, v in values.items() if k in known and known[k] != v]
            tags = {"calotype.changed": "; ".join(changed)[:5000], "calotype.commit": code}
            tags |= {"mlflow.source.git.commit": code.removesuffix("-dirty"), "mlflow.source.name": sys.argv[0]}
            client.log_batch(self._run, tags=[RunTag(key, value) for key, value in tags.items() if value])

        self._outbox.act("parameters and commit", send)
        self.watch()
        self._painter.submit(surely, "config.yaml", lambda: self.record.artifacts.write("config.yaml", as_yaml(data)))

    def log(self, metrics: Mapping[str, float], images: int) -> None:
        now = int(time.time() * 1000)
        self._outbox.put([(key, float(value), int(images), now) for key, value in metrics.items()])

    def figures(self, result: Mapping[str, Any]) -> None:
        self._outbox.ask_again()  # the workers' curves end with the same figures at the same step
        self.log({k: v for k, v in result.items() if isinstance(v, int | float)}, int(result.get("images", 0)))
        self.finished = True

    def tags(self, tags: Mapping[str, str]) -> None:
        def send(client: Any) -> None:
            for key, value in tags.items():
                client.set_tag(self._run, key, value)

        self._outbox.act(f"the tags {', '.join(tags)}", send)

    def picture(self, name: str, image: Any, images: int) -> None:
        copy = image.copy()
        self._painter.submit(surely, name, lambda: write_picture(self.record.artifacts, name, copy, images))
        if not self._drawn:
            self._drawn = True
            self.tags({"mlflow.loggedImages": "True"})

    def inputs(self, datasets: Sequence[Dataset] = (), used: Sequence[Record] = ()) -> None:
        def send(client: Any) -> None:
            from mlflow import entities

            read = []
            for item in datasets:
                kind = "s3" if item.uri.startswith("s3://") else "local"
                source = json.dumps({"uri": item.uri, "sha256": item.digest})
                node = entities.Dataset(item.name, item.digest[:32], kind, source)
                read.append(entities.DatasetInput(node, [entities.InputTag("mlflow.data.context", item.context)]))
            runs = [client.get_run(record.mlflow_run_id) for record in used if record.mlflow_run_id]
            models = dict.fromkeys(output.model_id for run in runs for output in _outputs(run))
            client.log_inputs(self._run, read or None, [entities.LoggedModelInput(model) for model in models] or None)

        self._outbox.act("what it read", send)

    def model(self, name: str, uri: str, kind: str, images: int) -> None:
        def send(client: Any) -> None:
            from mlflow.entities import LoggedModelOutput

            run = client.get_run(self._run)
            tags = {"calotype.uri": uri, "calotype.images": str(images)}
            if known := _outputs(run):
                client.set_logged_model_tags(known[0].model_id, tags)
                return
            # A crash between create and log_outputs leaves a model without an edge: that one is taken up again.
            where, by = [run.info.experiment_id], f"source_run_id = '{self._run}'"
            stray = list(client.search_logged_models(where, by))
            made = stray[0] if stray else client.create_logged_model(where[0], name, self._run, tags, model_type=kind)
            client.finalize_logged_model(made.model_id, "READY")
            client.log_outputs(self._run, [LoggedModelOutput(made.model_id, images)])

        self._outbox.act(f"where the model {name} lies", send)

    def watch(self, node: str = "") -> None:
        """Log CPU, memory, disk, network and GPUs of this machine every ten seconds, under MLflow's own system/[NODE/].

        The driver does, without a node's name; so does one worker on each machine but the driver's."""
        self._watching = threading.Thread(target=self._measure, args=(node,), name="system metrics", daemon=True)
        self._watching.start()

    def pending(self) -> list[Point]:
        return self._outbox.pending()

    def finish(self, status: str = "") -> None:
        self._stop.set()
        self._painter.shutdown(wait=True)
        if self._watching:
            self._watching.join(5)
        final = (lambda client: client.set_terminated(self._run, status)) if status else None
        left, untold = self._outbox.close(final, WAIT)
        keep = partial(unsent.keep, self.record, self._role, left, self._outbox.asked, bool(untold))
        surely(unsent.place(self._role), keep)

    def _measure(self, node: str) -> None:
        if (start := self._outbox.start(self._stop)) is None or (node and node == driver_host(self.record)):
            return
        monitors = machine.monitors()
        while not self._stop.wait(SECONDS):
            found = machine.measured(monitors)
            # The step of a system metric is the run's age in seconds: it rises over restarts too.
            prefix = f"system/{node}/" if node else "system/"
            self.log({prefix + key: value for key, value in found.items()}, int(time.time() - start))


# ------------------------------------------------------------------------------------------------ MLflow


@dataclass(frozen=True)
class _Server:
    """MLflow, as the outbox of one run sees it."""

    run: str
    left: Callable[[], list[Point]]
    curves: Callable[[], list[Point]] = list  # of another role, that wait: their keys are not for this one
    fence: bool = False

    def connect(self) -> Any:
        return connect()

    def held(self, client: Any) -> tuple[float, dict[str, int], list[Point]]:
        if self.fence:  # what a killed attempt had under way waits for a locked database, as this does; reading may not
            client.set_tag(self.run, "calotype.attached", f"{socket.gethostname()} {os.getpid()} {time.time():.0f}")
            time.sleep(SETTLE)
        # Read first: what is delivered meanwhile is among the run's.  One later point would make a curve a replay.
        waiting = {point[0]: sys.maxsize for point in self.curves()}
        run = client.get_run(self.run)
        held = {m.key: m.step for m in run.data.to_proto().metrics}
        return run.info.start_time / 1000, held | waiting, self.left()

    def send(self, client: Any, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        client.log_batch(self.run, metrics=[Metric(key, value, when, step) for key, value, step, when in points])

    def refused(self, error: Exception) -> bool:
        """MLflow understood and said no; a timeout, a lock, a missing right may pass, and so may an ingress's 404, and
        the bad request that it calls one for which its database had no free connection."""
        status = getattr(error, "get_http_status_code", lambda: 500)()
        no = 400 <= status < 500 and status not in (401, 403, 408, 425, 429) and "QueuePool limit" not in str(error)
        return isinstance(error, ConfigError) or (no and _code(error) != "")

    def gone(self, error: Exception) -> bool:
        return _code(error) == "RESOURCE_DOES_NOT_EXIST"


def _code(error: Exception) -> str:
    """The reason that MLflow itself gave, server or client; "" for what a proxy before it made of a request."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException):
        return str(error.json.get("error_code", ""))
    # The client alone says this; an answer of status 400 that is no JSON becomes a BAD_REQUEST.
    own = isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"
    return "INVALID_PARAMETER_VALUE" if own else ""


def connect() -> Any:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("MLFLOW_TRACKING_URI is not set: start the embedded stack with `calotype up`, or track=none")
    # The client's own retries would hold a thread for minutes; the outbox has its own.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking.client import MlflowClient

    return MlflowClient()


def _create(config: Any, name: str, tags: dict[str, str]) -> tuple[str, str]:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client = connect()
            run = client.create_run(_experiment(client, config), tags=tags, run_name=name)
            break
        except Exception as error:  # as in Outbox: whatever a server that is not well makes of a request
            if isinstance(error, ConfigError):
                raise
            if _Server("", list).refused(error) or time.monotonic() > deadline:
                raise CalotypeError(
                    f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} opened no run: check MLFLOW_TRACKING_URI, "
                    f"or use track=none ({str(error)[:200]})"
                ) from None
            time.sleep(1)
    uri = str(run.info.artifact_uri)
    if ":" in uri and not uri.startswith(("s3://", "file:///")):
        client.delete_run(run.info.run_id)
        raise ConfigError(
            f"MLflow keeps the artifacts of track.experiment={config.track.experiment} at {uri}, where Calotype cannot "
            "write: choose another track.experiment, or start mlflow with --default-artifact-root s3://..."
        )
    return str(run.info.run_id), uri


def _experiment(client: Any, config: Any) -> str:
    """The id of the experiment, made if it is missing; many jobs may try at once."""
    name = config.track.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        direct = client.get_experiment("0").artifact_location.startswith(("s3://", "file:", "/"))
        # A server that proxies its artifacts: ours go straight to the object store all the same.
        place = None if direct else f"{config.root}/mlflow/{name}"
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:
            found = client.get_experiment_by_name(name)  # somebody else was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(f"track.experiment={name} was deleted in MLflow: restore it, or choose another name")
    return str(found.experiment_id)


def _outputs(run: Any) -> list[Any]:
    return list(run.outputs.model_outputs) if run.outputs else []
