"""Training on the real stack, really killed: the curve has no scar."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

TRAIN = [
    "denoiser=unet_tiny",
    "denoiser.model.block_out_channels=[16,32]",
    "denoiser.model.norm_num_groups=8",
    "autoencoder=identity",
    "encoding.resolution=8",
    "train.images=3200",
    "train.batch=32",
    "train.log_every=32",
    "train.validate_every=0",
    "train.sample_every=0",
    "train.checkpoint_every=320",
    "track.experiment=chaos",
]


def start(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "calotype", *words],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def submission(process: subprocess.Popen[str]) -> str:
    """The id that it was given."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("submitted "):
            return line.split()[1]
    raise AssertionError("it ended without submitting anything")


def calotype(*words: str, fails: bool = False) -> str:
    process = start(*words)
    out, _ = process.communicate(timeout=600)
    assert (process.returncode != 0) == fails, out[-4000:]
    return out


@pytest.fixture(scope="module")
def prepared(stack: Any) -> list[str]:
    """Settings of a root with a cache in it, pixels, so that no autoencoder has to be trained."""
    settings = [f"root=s3://calotype/chaos-{os.urandom(4).hex()}"]
    calotype("submit", "prepare", *settings)
    calotype("submit", "cache_latents", *settings, "autoencoder=identity", "encoding.resolution=8")
    return settings


def curve(settings: list[str], name: str) -> list[tuple[int, float]]:
    """(images, loss) of every point that MLflow holds."""
    from mlflow import MlflowClient

    shown = json.loads(calotype("runs", "show", name, "--json", "--root", settings[0].removeprefix("root=")))
    (run,) = [run for run in shown["runs"] if run["job"] == "train_denoiser"]
    client = MlflowClient()
    return [(point.step, point.value) for point in client.get_metric_history(run["mlflow_run_id"], "loss")]


def images_seen(artifacts: str) -> int:
    """How far the run with those artifacts has been checkpointed."""
    import boto3

    bucket, prefix = artifacts.removeprefix("s3://").split("/", 1)
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/checkpoints/")
    found = [re.search(r"/(\d+)/COMMIT.json$", entry["Key"]) for entry in listed.get("Contents", [])]
    return max((int(match.group(1)) for match in found if match), default=0)


def wait_for_checkpoint(settings: list[str], name: str, process: subprocess.Popen[str]) -> str:
    """Its artifacts, once there is a checkpoint among them."""
    until, artifacts = time.monotonic() + 180, ""
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[0][-4000:]
        if artifacts and images_seen(artifacts) > 0:
            return artifacts
        if not artifacts:
            listed = json.loads(calotype("runs", "--json", "--root", settings[0].removeprefix("root=")))
            artifacts = next((run["artifacts"] for run in listed if run["name"] == name), "")
        time.sleep(1)
    raise AssertionError("no checkpoint within three minutes")


def processes(submission: str, *patterns: str) -> list[psutil.Process]:
    """Those of that submission (`jobs.environment`), on this machine: workers of another stack have the same names."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        mine = (process.info["environ"] or {}).get("CALOTYPE_SUBMISSION") == submission
        if mine and all(re.search(pattern, line) for pattern in patterns):
            found.append(process)
    return found


def same(ours: list[tuple[int, float]], golden: list[tuple[int, float]], tolerance: float) -> None:
    assert [step for step, _ in ours] == [step for step, _ in golden], "a point is missing, doubled or out of order"
    worst = max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, golden, strict=True))
    assert worst <= tolerance, worst


@pytest.fixture(scope="module")
def golden(prepared: list[str]) -> list[tuple[int, float]]:
    """The curve of an undisturbed run on one worker."""
    calotype("submit", "train_denoiser", *prepared, *TRAIN, "name=golden", "engine=torch", "cluster.cpus=2")
    return curve(prepared, "golden")


def test_a_killed_worker_costs_at_most_a_checkpoint_interval(prepared: list[str], golden: Any) -> None:
    # seed 0 is golden's identity: another name would be the same run, so another setting must differ without effect
    settings = [*prepared, *TRAIN, "name=worker", "engine=zero1", "cluster.workers=2", "ema.halflife=1000"]
    process = start("submit", "train_denoiser", *settings)
    identifier = submission(process)
    wait_for_checkpoint(prepared, "worker", process)
    workers = processes(identifier, r"^ray::.*(RayTrainWorker|TrainWorker)")
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-4000:]
    same(curve(prepared, "worker"), golden, 1e-5)


def test_a_killed_job_resumes_at_another_size_and_stage(prepared: list[str], golden: Any) -> None:
    settings = [*prepared, *TRAIN, "name=job", "ema.halflife=2000"]
    process = start("submit", "train_denoiser", *settings, "engine=zero2", "cluster.workers=2")
    identifier = submission(process)
    wait_for_checkpoint(prepared, "job", process)
    drivers = processes(identifier, r"jobs/train_denoiser\.py --resolved")
    assert drivers
    for driver in drivers:
        driver.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode != 0, out[-2000:]
    assert out.strip().endswith("was killed, by somebody or for want of memory: the same command goes on"), out[-2000:]
    calotype("submit", "train_denoiser", *settings, "engine=zero3", "cluster.workers=1", "cluster.cpus=2")
    same(curve(prepared, "job"), golden, 1e-5)


def test_cancel_keeps_a_checkpoint_and_the_same_command_goes_on(prepared: list[str], golden: Any) -> None:
    settings = [*prepared, *TRAIN, "name=cancelled", "ema.halflife=3000", "engine=torch", "cluster.cpus=2"]
    process = start("submit", "train_denoiser", *settings)
    identifier = submission(process)
    artifacts = wait_for_checkpoint(prepared, "cancelled", process)
    calotype("cancel", identifier)
    process.communicate(timeout=120)
    assert process.returncode != 0
    before = images_seen(artifacts)
    assert 0 < before < 3200
    calotype("submit", "train_denoiser", *settings)
    same(curve(prepared, "cancelled"), golden, 1e-5)
