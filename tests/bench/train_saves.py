"""What a checkpoint costs the training: by a copy and a thread, or by writing it while everybody waits; for train.py.

A denoiser of 20 M parameters, in this process, to the embedded S3.  A save in the background stalls the training by the
copy (what the loop waits for), and slows its steps down while it is on its way: only by memory bandwidth where a GPU
takes them; here hashing, sending, and the server itself run on the cores that compute.  Both are told.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
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

WIDE = ["denoiser.model.block_out_channels=[128,256]"]
BATCH, QUIET = 8, 20  # images of a step; steps that are timed without a save
NOTHING = {"unsent": [], "left_out": {}, "guard": {}}


def measured(rounds: int) -> None:
    """Print the seconds of both, and their ratio."""
    load_services()
    torch.set_num_threads(1)
    settings = compose("train_denoiser", [*OVERRIDES, *WIDE, f"train.batch={BATCH}"])
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
    with tempfile.TemporaryDirectory() as folder:
        for place in (f"s3://calotype/bench-{os.urandom(4).hex()}", folder):
            record = runs.Record("train_denoiser", "bench", "bench", "", place)
            saving = Saving({"denoiser": engine}, settings, Worker(), record)
            wait, stall, lost = saves(saving, step, usual, rounds)
            print(
                f"{16 * numel / 1e6:.0f} MB to {place}: written while everybody waits in {wait:.2f} s; in the "
                f"background steps stall for {stall:.3f} s, ratio {stall / wait:.3f}"
            )
            print(f"and take {lost:.2f} s longer in all meanwhile (a step takes {usual:.3f} s)")


def saves(saving: Saving, step: Callable[[], float], usual: float, rounds: int) -> tuple[float, float, float]:
    """Medians, in seconds: a save that is waited for, the stall of one that is not, and what steps took longer."""
    waits, stalls, slower = [], [], []
    for number in range(2 * rounds):
        began = time.perf_counter()
        saving.begin((number + 1) * BATCH, Clock(), {}, NOTHING)
        stall = time.perf_counter() - began
        if number % 2:
            saving.check(wait=True)
            waits.append(time.perf_counter() - began)
            continue
        lost = 0.0
        while True:
            began = time.perf_counter()
            over = saving.check()
            stall += time.perf_counter() - began
            if over:
                break
            lost += step() - usual
        stalls.append(stall)
        slower.append(lost)
    wait, stall, lost = (statistics.median(values) for values in (waits, stalls, slower))
    return wait, stall, lost
