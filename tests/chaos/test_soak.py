"""A quarter of an hour in which a worker is killed every minute: what is lost is the restarts, and half an interval."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from typing import Any

import pytest

from tests.chaos.test_kill import TRAIN, calotype, prepared, processes, start  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]

SECONDS = float(os.environ.get("CALOTYPE_SOAK_SECONDS", "900"))
EVERY = 60.0  # seconds between two kills
INTERVAL = 3_200  # images between two checkpoints: some seconds
SLACK = 0.05


def test_goodput_with_a_kill_every_minute(prepared: list[str]) -> None:  # noqa: F811
    from mlflow import MlflowClient

    more = ["train.images=100000000", "train.log_every=1600", f"train.checkpoint_every={INTERVAL}"]
    words = ["submit", "train_denoiser", *prepared, *TRAIN, *more, "name=soak", "engine=zero1", "cluster.workers=2"]
    began, process = time.time(), start(*words)
    heard: list[tuple[float, str]] = []

    def listen() -> None:
        assert process.stdout is not None
        heard.extend((time.time(), line) for line in process.stdout)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    kills: list[float] = []
    while time.time() < began + SECONDS:
        time.sleep(EVERY)
        assert process.poll() is None, "".join(line for _, line in heard[-40:])
        (identifier,) = {line.split()[1] for _, line in heard if line.startswith("submitted ")}
        workers = processes(identifier, r"^ray::.*TrainWorker")
        if workers:
            random.choice(workers).send_signal(signal.SIGKILL)
            kills.append(time.time())
    calotype("cancel", identifier)
    process.wait(120)
    listener.join(10)

    resumed = [when for when, line in heard if "resumes at" in line]
    restarts = [min(when for when in resumed if when > kill) - kill for kill in kills if resumed[-1:] > [kill]]
    client, run = MlflowClient(), mlflow_run(prepared, "soak")
    history: dict[str, Any] = {name: client.get_metric_history(run, name) for name in ("goodput", "images_per_second")}
    goodput = history["goodput"][-1].value
    rate = statistics.median(point.value for point in history["images_per_second"])
    restart, interval = statistics.mean(restarts), INTERVAL / rate
    expected = 1 - (restart + interval / 2) / EVERY
    print(f"{len(kills)} kills in {time.time() - began:.0f} s, restart in {restart:.1f} s")
    print(f"a checkpoint every {interval:.1f} s, goodput {goodput:.3f}, expected {expected:.3f}")
    assert len(restarts) >= len(kills) - 1
    assert goodput >= expected - SLACK


def mlflow_run(settings: list[str], name: str) -> str:
    shown = json.loads(calotype("runs", "show", name, "--json", "--root", settings[0].removeprefix("root=")))
    (run,) = [run for run in shown["runs"] if run["job"] == "train_denoiser"]
    return str(run["mlflow_run_id"])
