"""MLflow's server as it fails: its database locked, stopped, killed and started again; every point is there once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calotype import compose, runs, track
from calotype.cluster import services

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LOCKED = 25.0  # seconds: MLflow gives up on a lock after 20, and answers 503
OUTAGE = 60.0
STEP = 0.05  # seconds
SAVED = 60  # steps between two checkpoints


class Server:
    """One of our own, as `calotype up` starts it, with artifacts in a folder: no S3 is needed."""

    def __init__(self, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        state = {"services": {"mlflow": {"ports": {"mlflow": port}}}}
        command, self.folder, env = services.command("mlflow", home, state)
        self.command = [part if "artifact-root" not in part else f"--default-artifact-root={home}" for part in command]
        self.env = {**os.environ, **env}
        self.folder.mkdir()
        self.said = home / "said"

    def start(self) -> None:
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=said, stderr=said, start_new_session=True
            )
        until(lambda: services.probe("mlflow", self.url, {})[0] == "ok", 120)

    def signal(self, number: int) -> None:
        """To all of its processes."""
        os.killpg(self.process.pid, number)

    @contextlib.contextmanager
    def locked(self, kind: str) -> Iterator[None]:
        """Its database: IMMEDIATE keeps writers out, EXCLUSIVE readers too."""
        lock = sqlite3.connect(self.folder / "mlflow.db", isolation_level=None)
        lock.execute(f"BEGIN {kind}")
        yield
        lock.execute("ROLLBACK")
        lock.close()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", made.url)
        yield made
    made.kill()


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    return compose.compose("sample", ["run=run:x", f"root={tmp_path}", f"track.experiment={secrets.token_hex(4)}"])


def until(what: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.05)


def begin(config: Any) -> runs.Record:
    return runs.begin("sample", config, lambda run: track.create_run(config, "sample", run), track.discard_run)


def trains(url: str, config: Any, record: runs.Record, checkpoint: Path, steps: int) -> None:
    """A training, as the tracker sees it: from its checkpoint on, with the points that were unsent then."""
    os.environ |= {"MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # each error is seen
    at = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "unsent": []}
    tracker, told = track.attach(config, record, at["unsent"]), 0.0
    for step in range(at["step"] + 1, steps + 1):
        began = time.perf_counter()
        tracker.log({"loss": 1 / step, "lr": 0.1}, step)
        told = max(told, time.perf_counter() - began)
        if step % SAVED == 0:
            partial = checkpoint.with_suffix(".partial")
            partial.write_text(json.dumps({"step": step, "unsent": tracker.pending()}))
            partial.rename(checkpoint)
        time.sleep(STEP)
    tracker.finish()
    assert tracker.pending() == []
    assert told < 2 * STEP, told


def ended(process: Any) -> None:
    process.join(150)
    process.kill()
    assert process.exitcode == 0


def held(record: runs.Record) -> int:
    """How many steps the server knows."""
    return len(track.connect().get_metric_history(record.mlflow_run_id, "loss"))


def all_there(record: runs.Record, steps: int) -> None:
    for key, value in (("loss", lambda step: 1 / step), ("lr", lambda step: 0.1)):
        history = track.connect().get_metric_history(record.mlflow_run_id, key)
        assert [(point.step, point.value) for point in history] == [(step, value(step)) for step in range(1, steps + 1)]


def test_a_locked_database_loses_and_doubles_no_point(server: Server, warm: Any, settings: Any, tmp_path: Path) -> None:
    """Locked as by a backup, for longer than MLflow waits."""
    record, steps = begin(settings), round((LOCKED + 10) / STEP)
    process = warm.Process(target=trains, args=(server.url, settings, record, tmp_path / "checkpoint", steps))
    process.start()
    until(lambda: held(record) > 0, 60)
    with server.locked("EXCLUSIVE"):
        time.sleep(LOCKED)
    assert "database is locked" in server.said.read_text()
    ended(process)
    all_there(record, steps)


def test_an_outage_of_a_minute_loses_and_doubles_no_point(
    server: Server, warm: Any, settings: Any, tmp_path: Path
) -> None:
    """At first the server hangs, then its processes are gone; the training is killed, and takes steps again."""
    record, steps, checkpoint = begin(settings), round((OUTAGE + 10) / STEP), tmp_path / "checkpoint"
    what = (server.url, settings, record, checkpoint, steps)
    first, second = (warm.Process(target=trains, args=what) for _ in range(2))
    first.start()
    until(lambda: held(record) > 1.2 * SAVED, 60)
    server.signal(signal.SIGSTOP)
    first.kill()
    first.join()
    second.start()
    time.sleep(OUTAGE / 2)
    server.kill()
    time.sleep(OUTAGE / 2)
    server.start()
    ended(second)
    all_there(record, steps)


def test_what_a_dead_training_had_under_way_is_not_doubled(
    server: Server, warm: Any, settings: Any, tmp_path: Path
) -> None:
    """Its last points wait for a locked database, where the next attempt, which takes those steps again, may read."""
    record, steps, checkpoint = begin(settings), 4 * SAVED, tmp_path / "checkpoint"
    what = (server.url, settings, record, checkpoint, steps)
    first, second = (warm.Process(target=trains, args=what) for _ in range(2))
    first.start()
    until(lambda: held(record) > SAVED, 60)
    with server.locked("IMMEDIATE"):
        time.sleep(1.5)  # until a request is under way, and before the next checkpoint
        first.kill()
        first.join()
        second.start()
        time.sleep(12)
    ended(second)
    all_there(record, steps)
