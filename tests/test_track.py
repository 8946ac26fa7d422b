"""The tracker against a real MLflow server, reached through a wire that can be cut."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from calotype import compose, provenance, runs, track
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.train import loop
from PIL import Image

from tests.proxy import Faults, Proxy


class Wire:
    """A TCP line to the server: `cut()` it, `mend()` it, or let answers get lost."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.up = True
        self.lose_answers = 0
        self.instead: tuple[str, str] | None = None  # (status, body) of all answers
        self.open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.up = False
        self._end(*self.open)

    def _end(self, *lines: socket.socket) -> None:
        for line in lines:  # closing alone would not wake a thread that reads from it
            self.open.discard(line)
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.up = True

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.open |= {near, far}
            if not self.up:  # asked last: cut() may come while the line is laid
                self._end(near, far)
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answer: bool) -> None:
        try:
            while data := source.recv(65536):
                if answer and self.lose_answers > 0:
                    self.lose_answers -= 1
                    break
                if self.instead and not answer:
                    status, body = self.instead
                    source.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                    continue
                target.sendall(data)
        except OSError:
            pass
        self._end(source, target)


@pytest.fixture
def wire(stack: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    address = urlsplit(stack.env["MLFLOW_TRACKING_URI"])
    made = Wire(str(address.hostname), int(address.port or 80))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{made.port}")
    monkeypatch.setattr("calotype.outbox.PAUSE", 0.1)
    monkeypatch.setattr(track, "SETTLE", 0.1)
    yield made
    made.cut()
    made._end(made.listener)


@pytest.fixture
def settings(bucket: str) -> Any:
    name = f"test {secrets.token_hex(4)}"
    return compose.compose("sample", ["run=run:x", f"root={bucket}", f"track.experiment={name}", "name=mine"])


def begin(config: Any, job: str = "sample") -> runs.Record:
    return runs.begin(job, config, lambda identity: track.create_run(config, job, identity), track.discard_run)


def seen(record: runs.Record) -> Any:
    return track.connect().get_run(record.mlflow_run_id)


def history(record: runs.Record, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in track.connect().get_metric_history(record.mlflow_run_id, key)]


def until(what: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ metrics


def test_logging_takes_microseconds_and_every_point_arrives_once(wire: Wire, settings: Any) -> None:
    record = begin(settings)
    with track.open_run(settings, record) as driver:
        worker = track.attach(settings, record)
        start = time.perf_counter()
        for step in range(600):
            worker.log({"loss": 1 / (step + 1), "lr": 0.1}, step * 64)
        assert (time.perf_counter() - start) / 600 < 1e-3
        worker.finish()
        assert worker.pending() == []
        driver.figures({"accuracy": 0.9, "images": 38_336, "loss": 1 / 600, "samples": {"not": "a number"}})
    assert history(record, "loss") == [(step * 64, 1 / (step + 1)) for step in range(600)]
    assert history(record, "accuracy") == [(38_336, 0.9)]
    assert seen(record).info.status == "FINISHED"


def test_a_restart_repeats_no_point_and_loses_none(wire: Wire, settings: Any) -> None:
    record = begin(settings)
    first = track.attach(settings, record)
    first.log({"loss": 0.0}, 0)
    until(lambda: first.pending() == [])
    wire.cut()
    for step in (1, 2, 3):
        first.log({"loss": float(step)}, step)
    travelled = json.loads(json.dumps(first.pending()))  # in a checkpoint, at step 3
    assert [point[2] for point in travelled] == [1, 2, 3]
    for step in (4, 5):
        first.log({"loss": float(step)}, step)
    wire.mend()
    until(lambda: first.pending() == [])  # all five are there, then the process dies
    second = track.attach(settings, record, travelled)
    for step in (4, 5, 6):  # steps 4 and 5 are trained again
        second.log({"loss": float(step)}, step)
    second.finish()
    assert history(record, "loss") == [(step, float(step)) for step in range(7)]


def test_an_answer_that_is_lost_makes_no_second_point(wire: Wire, settings: Any) -> None:
    record = begin(settings)
    tracker = track.attach(settings, record)
    tracker.log({"loss": 1.0}, 1)
    until(lambda: tracker.pending() == [])
    wire.lose_answers = 2
    tracker.log({"loss": 2.0}, 2)
    tracker.finish()
    assert wire.lose_answers == 0
    assert history(record, "loss") == [(1, 1.0), (2, 2.0)]


def test_errors_of_the_server_lose_and_repeat_nothing(
    stack: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but 500 for a while; then 500, 503, and answers that are lost or cut short, here and there."""
    monkeypatch.setattr("calotype.outbox.PAUSE", 0.0)
    monkeypatch.setattr("calotype.outbox.PATIENCE", 0.1)
    monkeypatch.setattr(track, "SETTLE", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.1")
    with Proxy(stack.env["MLFLOW_TRACKING_URI"]) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        record = begin(settings)
        tracker = track.attach(settings, record)
        tracker.log({"loss": 1.0, "lr": 0.1}, 1)
        until(lambda: tracker.pending() == [])
        proxy.faults(Faults(internal=1.0))
        for step in range(2, 20):
            tracker.log({"loss": 1 / step, "lr": 0.1}, step)
        until(lambda: proxy.counts().faults["internal"] >= 3)
        assert len(tracker.pending()) == 2 * 18
        kinds = {"internal": 0.2, "slow_down": 0.1, "reset": 0.2, "short": 0.2}
        proxy.faults(Faults(seed=1, **kinds))
        for step in range(20, 60):
            tracker.log({"loss": 1 / step, "lr": 0.1}, step)
            time.sleep(0.05)
        until(lambda: all(proxy.counts().faults[kind] for kind in kinds))
        proxy.faults(Faults())
        tracker.finish()
        assert history(record, "loss") == [(step, 1 / step) for step in range(1, 60)]
        assert history(record, "lr") == [(step, 0.1) for step in range(1, 60)]


def test_what_could_not_be_delivered_waits_beside_the_artifacts(
    wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    record = begin(settings)
    with track.open_run(settings, record) as driver:
        worker = track.attach(settings, record)
        until(lambda: "config.yaml" in {entry.key for entry in record.artifacts.list()})
        until(lambda: seen(record).data.params.get("name") == "mine")
        wire.cut()
        monkeypatch.setattr(track, "WAIT", 1.0)
        worker.log({"loss": 3.0}, 30)
        worker.inputs([track.Dataset("digits", "a1" * 32, "s3://b/datasets/digits")])
        worker.model("mine", "s3://b/checkpoints/30", "diffusion", 30)
        start = time.monotonic()
        worker.finish()
        driver.figures({"accuracy": 1.0})
        node = track.attach(settings, record, (), "node-driver.of.us")
        node.log({"system/driver.of.us/cpu": 5.0}, 30)
        node.finish()
    assert time.monotonic() - start < 10
    assert sorted(entry.key for entry in record.artifacts.list("unsent/")) == [
        "unsent/driver.json",
        "unsent/node-driver.of.us.json",
        "unsent/worker.json",
    ]
    assert "never told what it read and where the model mine lies: 1 s" in caplog.text
    assert "the end of the run: 1 s" in caplog.text
    wire.mend()
    monkeypatch.setattr(track, "WAIT", 20.0)
    track.settle(record)
    track.settle(record)
    assert history(record, "loss") == [(30, 3.0)]
    assert history(record, "accuracy") == [(0, 1.0)]
    assert history(record, "system/driver.of.us/cpu") == [(30, 5.0)]
    assert seen(record).info.status == "FINISHED"
    assert list(record.artifacts.list("unsent/")) == []


def test_what_waits_is_kept_as_long_as_mlflow_is_away(
    wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "WAIT", 0.5)
    record = begin(settings)
    wire.cut()

    def attempt(steps: range) -> None:
        worker = track.attach(settings, record)
        for step in steps:
            worker.log({"loss": float(step)}, step)
        worker.finish()

    with track.open_run(settings, record) as driver:
        attempt(range(1, 6))
        driver.figures({"accuracy": 1.0, "images": 5})
    kept = {entry.key: record.artifacts.read(entry.key) for entry in record.artifacts.list("unsent/")}
    assert set(kept) == {"unsent/driver.json", "unsent/worker.json"}
    track.settle(record)  # the same command, MLflow still away
    with track.open_run(settings, record):  # an attempt that is stopped
        pass
    assert {entry.key: record.artifacts.read(entry.key) for entry in record.artifacts.list("unsent/")} == kept
    attempt(range(4, 9))  # steps 4 and 5 are trained again
    wire.mend()
    monkeypatch.setattr(track, "WAIT", 20.0)
    track.settle(record)
    assert history(record, "loss") == [(step, float(step)) for step in range(1, 9)]
    assert history(record, "accuracy") == [(5, 1.0)]
    assert list(record.artifacts.list("unsent/")) == []


@pytest.mark.parametrize("back", ["between the worker's end and the driver's", "after both"])
def test_the_last_figures_do_not_take_the_place_of_a_curve_that_waits(
    wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch, back: str
) -> None:
    monkeypatch.setattr(track, "WAIT", 0.5)
    record = begin(settings)
    curve = [(step, 1 / step) for step in range(1, 11)]
    with track.open_run(settings, record) as driver:
        until(lambda: seen(record).data.params.get("name") == "mine")  # so it knew what MLflow held
        wire.cut()
        worker = track.attach(settings, record)
        for step, loss in curve:
            worker.log({"loss": loss} | ({"validation_loss": loss} if step == 8 else {}), step)
        worker.finish()
        if back != "after both":
            wire.mend()
            monkeypatch.setattr(track, "WAIT", 20.0)
        driver.figures({"loss": 0.1, "validation_loss": 1 / 8, "accuracy": 1.0, "images": 10})
    assert len(list(record.artifacts.list("unsent/"))) == (2 if back == "after both" else 1)
    wire.mend()
    monkeypatch.setattr(track, "WAIT", 20.0)
    track.settle(record)
    assert history(record, "loss") == curve
    assert history(record, "validation_loss") == [(8, 1 / 8)]
    assert history(record, "accuracy") == [(10, 1.0)]
    assert list(record.artifacts.list("unsent/")) == []


def test_a_point_that_mlflow_refuses_takes_no_other_with_it(wire: Wire, settings: Any, caplog: Any) -> None:
    record = begin(settings)
    tracker = track.attach(settings, record)
    for step in range(30):
        tracker.log({"good": 1.0} | ({"bad!key": 1.0} if step == 17 else {}), step)
    tracker.finish()
    assert [step for step, _ in history(record, "good")] == list(range(30))
    assert "bad!key" in caplog.text


@pytest.mark.parametrize(
    "instead",
    [
        ("404 Not Found", "default backend - 404"),
        (
            "400 Bad Request",
            '{"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 5 overflow 10 reached"}',
        ),
    ],
    ids=["ingress without a backend", "database without a connection"],
)
def test_what_is_said_for_mlflow_is_an_outage(wire: Wire, settings: Any, caplog: Any, instead: tuple[str, str]) -> None:
    record = begin(settings)
    worker = track.attach(settings, record)
    worker.log({"loss": 0.0}, 0)
    until(lambda: worker.pending() == [])
    wire.instead = instead
    late = track.attach(settings, record, [("late", 1.0, 1, 1)])  # MLflow cannot be asked what it holds
    late.tags({"late": "yes"})
    worker.tags({"told": "yes"})
    for step in range(1, 30):
        worker.log({"loss": float(step)}, step)
    until(lambda: caplog.text.count("its points wait here") >= 2)
    wire.instead = None
    late.finish()
    worker.finish()
    assert history(record, "late") == [(1, 1.0)]
    assert history(record, "loss") == [(step, float(step)) for step in range(30)]
    assert seen(record).data.tags.items() >= {"late": "yes", "told": "yes"}.items()
    assert "refuses" not in caplog.text


def test_what_waits_for_a_run_that_is_gone_stays_where_it_is(
    wire: Wire, settings: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = dataclasses.replace(begin(settings), mlflow_run_id="0" * 32)
    record.artifacts.write("unsent/worker.json", b'[["loss", 1.0, 1, 1]]')
    monkeypatch.setattr(track, "WAIT", 20.0)
    start = time.monotonic()
    track.settle(record)
    assert time.monotonic() - start < 10, "asking again does not help"
    assert "refuses all that waits" in caplog.text
    assert json.loads(record.artifacts.read("unsent/worker.json")) == [["loss", 1.0, 1, 1]]


def test_machine_figures_are_measured_and_rise_over_restarts(
    wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "SECONDS", 1.1)
    record = begin(settings)
    monkeypatch.setattr(track.socket, "gethostname", lambda: "node-1")

    def steps() -> list[list[int]]:
        names = [f"{prefix}cpu_utilization_percentage" for prefix in ("system/", "system/node-1/")]
        return [[step for step, _ in history(record, name)] for name in names]

    for _ in range(2):
        before = [len(found) for found in steps()]
        with track.open_run(settings, record):
            worker = track.attach(settings, record)
            until(lambda before=before: all(len(found) > had for found, had in zip(steps(), before, strict=True)))
            worker.finish()
    assert all(found == sorted(set(found)) for found in steps())


def test_the_first_rank_of_every_other_node_looks_at_its_machine(
    wire: Wire, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "SECONDS", 0.2)
    record = begin(settings)
    task = loop.Task({}, batches=None, prepare=None, step=None)

    def tracking(rank: int, local: int, host: str) -> Any:
        monkeypatch.setattr(socket, "gethostname", lambda: host)
        return loop.tracking(task, settings, Worker(rank, 4, local), record, {})

    with tracking(0, 0, "here") as first, tracking(1, 1, "nobody") as second, tracking(2, 0, "there") as third:
        assert first is not None
        assert (second, third) == (None, None)
        until(lambda: all(history(record, f"system/{node}/cpu_utilization_percentage") for node in ("here", "there")))
    assert "nobody" not in str(seen(record).data.metrics.keys())


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_says_what_it_ran(wire: Wire, settings: Any) -> None:
    long = dataclasses.replace(settings, prompts=["a seven " * 200])
    record = begin(long)
    with track.open_run(long, record):
        pass
    run = seen(record)
    assert run.info.run_name == "mine"
    assert run.info.status == "KILLED"  # no figures: it was stopped before its end
    assert run.data.params["sampler.steps"] == str(long.sampler.steps)
    assert run.data.params["prompts"].endswith("(1604 characters, see config.yaml)")
    assert run.data.tags["calotype.identity"] == record.identity
    assert run.data.tags["calotype.commit"].startswith(run.data.tags["mlflow.source.git.commit"])
    assert "a seven a seven" in record.artifacts.read("config.yaml").decode()
    assert record.artifact_root.startswith("s3://")

    moved = dataclasses.replace(long, sampler=dataclasses.replace(long.sampler, batch=7))
    with pytest.raises(RuntimeError), track.open_run(moved, record):
        raise RuntimeError
    run = seen(record)
    assert run.info.status == "FAILED"
    assert run.data.params["sampler.batch"] == "100"
    assert run.data.tags["calotype.changed"] == "sampler.batch: 100 -> 7"


def test_many_jobs_may_open_an_experiment_at_once(wire: Wire, settings: Any) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda number: track.create_run(settings, "sample", f"{number:032x}"), range(6)))
    assert len({run for run, _ in opened}) == 6
    experiments = {track.connect().get_run(run).info.experiment_id for run, _ in opened}
    assert len(experiments) == 1
    track.connect().delete_experiment(experiments.pop())
    with pytest.raises(ConfigError, match="deleted"):
        track.create_run(settings, "sample", "0" * 32)


def test_the_runs_of_a_sweep_are_children_of_one(wire: Wire, settings: Any) -> None:
    parent = track.open_parent(settings, "sample")
    child = dataclasses.replace(settings, track=dataclasses.replace(settings.track, parent=parent))
    assert seen(begin(child)).data.tags["mlflow.parentRunId"] == parent
    track.close_parent(parent, "FAILED")
    assert track.connect().get_run(parent).info.status == "FAILED"


def test_no_server_is_said_in_a_sentence(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(CalotypeError, match=r"127\.0\.0\.1:9 .*track=none"):
        track.create_run(settings, "sample", "0" * 32)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="calotype up"):
        track.create_run(settings, "sample", "0" * 32)


# ------------------------------------------------------------------------------------------------ pictures, lineage


def test_pictures_make_a_slider_and_come_once(wire: Wire, settings: Any) -> None:
    from mlflow import MlflowClient

    record = begin(settings)
    for _ in range(2):  # the second attempt draws the same again
        tracker = track.attach(settings, record)
        for step, colour in ((64, "red"), (128, "blue")):
            tracker.picture("samples/ema", Image.new("RGB", (300, 300), colour), step)
        tracker.finish()
    listed = [entry.path for entry in MlflowClient().list_artifacts(record.mlflow_run_id, "images")]
    full = [path for path in listed if path.endswith(".png")]
    assert [path.split("+")[:3] for path in sorted(full)] == [
        ["images/samples~ema", "step", "128"],
        ["images/samples~ema", "step", "64"],
    ]
    assert sorted(path.removesuffix("+compressed.webp") for path in listed if path.endswith(".webp")) == sorted(
        path.removesuffix(".png") for path in full
    )
    assert seen(record).data.tags["mlflow.loggedImages"] == "True"


def test_lineage_goes_from_dataset_over_autoencoder_to_denoiser(wire: Wire, settings: Any) -> None:
    autoencoder = begin(dataclasses.replace(settings, seed=1), "train_autoencoder")
    digits = track.Dataset("digits", "a1" * 32, "s3://b/datasets/digits")
    for images in (100, 200):  # two attempts
        with track.open_run(settings, autoencoder) as tracker:
            tracker.inputs([digits])
            tracker.model("mine", f"{autoencoder.artifact_root}/autoencoder", "autoencoder", images)
            tracker.figures({})
    made = seen(autoencoder)
    assert [(d.dataset.name, d.dataset.digest) for d in made.inputs.dataset_inputs] == [("digits", "a1" * 16)]
    assert json.loads(made.inputs.dataset_inputs[0].dataset.source)["uri"] == "s3://b/datasets/digits"
    (model,) = made.outputs.model_outputs
    stored = track.connect().get_logged_model(model.model_id)
    assert stored.status == "READY"
    assert stored.tags["calotype.images"] == "200"
    assert stored.source_run_id == autoencoder.mlflow_run_id

    denoiser = begin(dataclasses.replace(settings, seed=2), "train_denoiser")
    tracker = track.attach(settings, denoiser)
    tracker.inputs([track.Dataset("digits-latents", "b2" * 32, "s3://b/caches/x")], [autoencoder])
    tracker.inputs([track.Dataset("digits-latents", "b2" * 32, "s3://b/caches/x")], [autoencoder])
    tracker.finish()
    used = seen(denoiser).inputs
    assert [found.model_id for found in used.model_inputs] == [model.model_id]
    assert [found.dataset.name for found in used.dataset_inputs] == ["digits-latents"]


# ------------------------------------------------------------------------------------------------ without MLflow


def test_without_tracking_pictures_still_lie_beside_the_run(tmp_path: Path) -> None:
    config = compose.compose("sample", ["run=run:x", f"root={tmp_path}", "track=none", "name=mine"])
    record = begin(config)
    with track.open_run(config, record) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.picture("samples", Image.new("RGB", (8, 8)), 1)
        assert tracker.pending() == []
    assert sum(entry.key.endswith(".png") for entry in open_store(record.artifact_root).list("images/")) == 1
    assert track.open_parent(config, "sample") == ""


def test_importing_the_tracker_imports_no_mlflow() -> None:
    code = "import sys, calotype.track; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    platform = str(Path(track.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": platform}, timeout=60)


def test_the_commit_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_COMMIT", "abc-dirty")
    assert provenance.commit() == "abc-dirty"
    monkeypatch.delenv("CALOTYPE_COMMIT")
    package = tmp_path / "platform" / "calotype"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(provenance.commit()) == 40
    (package / "edited.py").write_text("")
    assert provenance.commit().endswith("-dirty")
