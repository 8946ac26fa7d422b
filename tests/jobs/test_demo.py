"""`calotype demo`, whole: the pictures are the digits that were asked for, and a second one finds everything done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ("prepare", "train_autoencoder", "cache_latents", "train_denoiser", "sample", "evaluate")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def calotype(*words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "calotype", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_demo_draws_what_it_is_told_and_a_second_one_finds_it_done(stack: Any) -> None:
    out = calotype("demo")
    figures = json.loads(calotype("runs", "show", "demo", "--json"))
    assert sorted(run["job"] for run in figures["runs"]) == sorted(STEPS)  # the last two start side by side
    assert figures["accuracy"] >= 0.90
    assert figures["accuracy_unseen_phrasing"] >= 0.80
    assert figures["accuracy_shuffled"] < 0.15
    assert figures["psnr_heldout"] >= 34
    assert figures["training_speedup"] > 4
    assert figures["sampling_speedup"] > 4
    assert (stack.home / "demo" / "samples.png").stat().st_size > 10_000
    assert list((stack.home / "demo").glob("export-*/model_index.json"))
    assert all(f"== {step}" in out for step in STEPS)
    again = calotype("demo")
    assert again.count("finished already") == len(STEPS)
    assert "submitted" not in again.replace("submitted/", "")
