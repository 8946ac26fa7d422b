"""The whole line through the real command line, in one process: no Ray, no MLflow, no S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

TINY_AUTOENCODER = [
    "autoencoder=kl_f4_tiny",
    "autoencoder.model.block_out_channels=[8,8,16]",
    "++autoencoder.model.norm_num_groups=4",
]
TINY_DENOISER = ["denoiser=unet_tiny", "denoiser.model.block_out_channels=[16,32]", "denoiser.model.norm_num_groups=8"]

Job = Callable[..., str]


@pytest.fixture(scope="module")
def job(ran: Callable[..., str]) -> Job:
    """`job(NAME, OVERRIDES..., home=FOLDER)` runs jobs/NAME.py; its output."""

    def run(name: str, *overrides: str, home: Path, fails: bool = False) -> str:
        return ran(ROOT / "jobs" / f"{name}.py", *overrides, fails=fails, CALOTYPE_HOME=str(home))

    return run


def result(home: Path, name: str) -> dict[str, Any]:
    found = [
        json.loads(path.read_text()) | {"record": json.loads((path.parent / "run.json").read_text())}
        for path in home.glob("debug/runs/*/result.json")
    ]
    return next(entry for entry in found if entry["record"]["job"] == name)


@pytest.fixture(scope="module")
def line(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which every job ran once."""
    home = tmp_path_factory.mktemp("a home with spaces")
    job("prepare", "debug=local", home=home)
    job("train_autoencoder", "debug=tiny", *TINY_AUTOENCODER, "engine=torch", home=home)
    job("cache_latents", "debug=local", "autoencoder.path=run:train_autoencoder", home=home)
    job(
        "train_denoiser",
        "debug=tiny",
        "autoencoder.path=run:train_autoencoder",
        *TINY_DENOISER,
        "engine=torch",
        "prompts=[a seven]",
        home=home,
    )
    drawn = ["run=run:train_denoiser", "prompts=[a seven, a one]", "sampler.steps=3"]
    job("sample", "debug=local", *drawn, home=home)
    assert "finished already" in job("sample", "debug=local", *drawn, f"out={home / 'drawn'}", home=home)
    assert (home / "drawn" / "grid.png").stat().st_size > 100
    # In a fresh interpreter: the other jobs are started cold, on Ray, by test_submit.
    words = ["jobs/evaluate.py", "debug=local", "run=run:train_denoiser", "images=20", "sampler.steps=3"]
    env = {**os.environ, "CALOTYPE_HOME": str(home), "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True, timeout=240)
    return home


def test_every_job_leaves_its_result(line: Path) -> None:
    assert result(line, "prepare")["samples"] == 1797
    assert result(line, "train_autoencoder")["psnr_heldout"] > 5
    assert result(line, "cache_latents")["samples"] == 1797
    assert result(line, "train_denoiser")["images"] == 256
    assert 0 <= result(line, "evaluate")["accuracy"] <= 1
    artifacts = Path(result(line, "sample")["record"]["artifact_root"].removeprefix("file://"))
    assert (artifacts / "samples" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_finds_it_finished(job: Job, line: Path) -> None:
    out = job(
        "train_denoiser",
        "debug=tiny",
        "autoencoder.path=run:train_autoencoder",
        *TINY_DENOISER,
        "engine=torch",
        "prompts=[a seven]",
        home=line,
    )
    assert "finished already" in out


def test_a_longer_run_continues_the_shorter_one(job: Job, line: Path) -> None:
    out = job(
        "train_denoiser",
        "debug=tiny",
        "autoencoder.path=run:train_autoencoder",
        *TINY_DENOISER,
        "engine=torch",
        "prompts=[a seven]",
        "train.images=320",
        home=line,
    )
    assert "256" in out
    assert result(line, "train_denoiser")["images"] == 320


def test_a_job_that_cannot_start_says_why_in_one_line(job: Job, line: Path) -> None:
    out = job("train_denoiser", "debug=tiny", "autoencoder.path=run:nobody", home=line, fails=True)
    assert out.strip().splitlines()[-1].startswith("calotype: ")
    assert "nobody" in out.strip().splitlines()[-1]
    assert "Traceback" not in out


def test_hydra_flags_work_as_hydra_users_expect(job: Job, line: Path) -> None:
    out = job("train_denoiser", "autoencoder.path=run:mine", "--cfg", "job", "optim.lr=3e-4", home=line)
    assert "lr: 0.0003" in out
    assert "groups (choose with GROUP=OPTION)" in job("prepare", "--help", home=line)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "COMP_LINE": "x engine=ze", "COMP_POINT": "99"}
    done = subprocess.run(
        [sys.executable, "jobs/train_denoiser.py", "-sc", "query=bash"],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert "engine=zero3" in done.stdout, done.stderr


def test_a_sweep_runs_every_combination_and_fails_if_one_does(job: Job, line: Path) -> None:
    words = ["debug=local", "-m", "run=run:train_denoiser", "prompts=[a two]"]
    out = job("sample", *words, "sampler.steps=1,0,2", home=line, fails=True)
    *_, one, refused, two, last = out.strip().splitlines()
    assert [one.split()[0], two.split()[0]] == ["sampler.steps=1", "sampler.steps=2"]
    assert all("finished" in line and "images 1" in line for line in (one, two))
    assert refused.split()[0] == "sampler.steps=0"
    assert " refused " in refused
    assert "sampler.steps=0: sampler.steps=0" in last
    out = job(
        "sample",
        "-m",
        "debug=local",
        "run=run:train_denoiser,run:nobody",
        "prompts=[a two]",
        "sampler.steps=1",
        home=line,
        fails=True,
    )
    assert "nobody" in out.strip().splitlines()[-1]
