"""Seconds from the death of a worker to the next step of its training, beside those of a fresh start; for train.py.

On the embedded cluster, two ZeRO workers: `calotype submit` until the first line of figures; then one worker is killed
with -9 after a checkpoint, until the first line after its training goes on.  What is told is the arrival of lines.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from calotype.environment import load_services

from tests.chaos.test_kill import processes

ROOT = Path(__file__).parents[2]
SPACE = ["autoencoder=identity", "encoding.resolution=16"]
BATCH = 64
FIGURES = re.compile(r"^(?:\S+ )?\d[\d,]* images  ", re.MULTILINE)


def calotype(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "calotype", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def once(root: str, seed: int) -> tuple[float, float]:
    """Seconds of (a fresh start, a restart)."""
    words = ["submit", "train_denoiser", root, *SPACE, f"name=kill{seed}", f"seed={seed}", "denoiser=unet_tiny",
             "engine=zero1", "cluster.workers=2", f"train.batch={BATCH}", f"train.images={10**6 * BATCH}",
             f"train.log_every={BATCH}", f"train.checkpoint_every={8 * BATCH}", "train.validate_every=0",
             "train.sample_every=0"]  # fmt: skip
    began, process = time.time(), calotype(*words)
    assert process.stdout is not None
    submission, fresh, killed, steps = "", 0.0, 0.0, 0
    for line in process.stdout:
        if line.startswith("submitted "):
            submission = line.split()[1]
        elif FIGURES.search(line):
            steps += 1
            fresh = fresh or time.time() - began
            if killed and time.time() > killed + 2:  # lines that were on their way when it died
                break
            if steps == 24:
                processes(submission, r"^ray::.*TrainWorker")[0].send_signal(signal.SIGKILL)
                killed = time.time()
    else:
        raise RuntimeError("the training ended before it went on")
    restart = time.time() - killed
    calotype("cancel", submission).wait()
    process.communicate()
    return fresh, restart


def measured(rounds: int) -> None:
    """Print medians and their ratio."""
    load_services()
    root = f"root=s3://calotype/bench-{os.urandom(4).hex()}"
    for words in (["prepare", root], ["cache_latents", root, *SPACE]):
        assert calotype("submit", *words).wait() == 0
    found = [once(root, seed) for seed in range(rounds)]
    fresh, restart = (statistics.median(values) for values in zip(*found))
    print(f"from submit to the first step {fresh:.1f} s, from kill -9 to the next {restart:.1f} s")
    print(f"ratio {restart / fresh:.2f}")
