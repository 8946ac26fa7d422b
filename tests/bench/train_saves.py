"""What a checkpoint costs the training: by a copy and a thread, or by writing it while everybody waits; for train.py.

The demo's denoiser, in this process, to the embedded S3.  A save in the background costs the copy, and what steps take
longer while it is on its way.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace

import torch
from calotype import config, runs
from calotype.compose import compose
from calotype.environment import Worker, load_services
from calotype.model.denoiser import build_denoiser
from calotype.train.engine import Engine
from calotype.train.figures import Clock
from calotype.train.saving import Saving

from tests.bench.train_steps import OVERRIDES, SHAPE

BATCH, QUIET = 64, 20  # images of a step; steps that are timed without a save
NOTHING = {"unsent": [], "left_out": {}, "guard": {}}


def measured(rounds: int) -> None:
    """Print the seconds of both, and their ratio."""
    load_services()
    torch.set_num_threads(1)
    settings = compose("train_denoiser", [*OVERRIDES, f"train.batch={BATCH}"])
    settings = replace(settings, engine=config.Engine(kind="torch"))
    torch.manual_seed(0)
    engine = Engine(build_denoiser(settings, SHAPE), settings.optim, settings.engine, Worker(), 1, settings.ema)
    x, t = torch.randn(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.long)
    cond = {"text": torch.zeros(BATCH, settings.conditions["text"].length, dtype=torch.long)}
    numel = sum(parameter.numel() for parameter in engine.module.parameters())

    def step() -> float:
        began = time.perf_counter()
        engine.backward(engine(x, t, cond).square().mean())
        engine.step(1e-4, BATCH, BATCH)
        return time.perf_counter() - began

    usual = statistics.median([step() for _ in range(QUIET + 3)][3:])
    waits, stalls = [], []
    record = runs.Record("train_denoiser", "bench", "bench", "", f"s3://calotype/bench-{os.urandom(4).hex()}")
    saving = Saving({"denoiser": engine}, settings, Worker(), record)
    for number in range(2 * rounds):
        began = time.perf_counter()
        saving.begin((number + 1) * BATCH, Clock(), {}, NOTHING)
        if number % 2:
            saving.check(wait=True)
            waits.append(time.perf_counter() - began)
            continue
        lost = time.perf_counter() - began
        while not saving.check():
            lost += step() - usual
        stalls.append(lost)
    wait, stall = statistics.median(waits), statistics.median(stalls)
    print(f"{16 * numel / 1e6:.0f} MB: while everybody waits {wait:.2f} s, in the background {stall:.3f} s, "
          f"ratio {stall / wait:.3f} (a step takes {usual:.3f} s)")  # fmt: skip
