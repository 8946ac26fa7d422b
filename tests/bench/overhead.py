"""Step time of our loop next to a bare PyTorch loop: same model, batch, threads, optimizer, clip and average.

    python tests/bench/overhead.py [STEPS] [BATCH] [THREADS]

Ours is all of it (stream of a real cache, rows, figures, `engine`); each of its steps is followed by a step of the bare
loop in the same process, so that both see the same machine.  Prints medians and their ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from calotype import config
from calotype.compose import compose
from calotype.data import Dataset, Stream, cache, shards
from calotype.data.manifest import CACHE, Manifest
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.model import conditioner
from calotype.model.denoiser import build_denoiser
from calotype.model.diffusion import Diffusion
from calotype.tasks import denoiser
from calotype.train import loop
from calotype.train.engine import Engine
from torch import Tensor, nn

SHAPE = (4, 8, 8)
OVERRIDES = ["denoiser=unet_tiny", "autoencoder.path=x", "track=none", "cluster=local", "train.images=1"]


def latents(folder: str, settings: config.TrainDenoiser) -> Manifest:
    """Shards of 1,024 random latents with captions."""
    random = np.random.default_rng(0)
    tokens = conditioner.inputs(settings.conditions["text"], ["a handwritten digit seven"])[0]
    samples = [
        cache.encode_sample(
            shards.Sample(f"{index:05d}", {}),
            random.standard_normal((2, *SHAPE)).astype(np.float16),
            {"text": tokens},
            {"width": 32, "height": 32},
        )
        for index in range(1024)
    ]
    row = shards.write_shard(open_store(folder), "latents.tar", samples, 128)
    meta = {"channel_mean": [0.0] * SHAPE[0], "channel_std": [1.0] * SHAPE[0]}
    return Manifest(CACHE, "bench", ("latent.npy", "text.npy", "json"), (row,), meta)


def bare(settings: config.TrainDenoiser, diffusion: Diffusion) -> Callable[[Mapping[str, Tensor]], None]:
    """A step of training in plain PyTorch."""
    torch.manual_seed(0)
    model = build_denoiser(settings, SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.optim.lr, weight_decay=0.0, fused=True)
    parameters = list(model.parameters())
    mean = [parameter.detach().clone() for parameter in parameters]

    def step(rows: Mapping[str, Tensor]) -> None:
        noisy = diffusion.add_noise(rows["latent"], rows["noise"], rows["timestep"])
        target = diffusion.target(rows["latent"], rows["noise"], rows["timestep"])
        loss = (model(noisy, rows["timestep"], {"text": rows["cond.text"]}) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.optim.clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, [parameter.detach() for parameter in parameters], 0.001)

    return step


def measure(kind: str, steps: int, batch: int) -> dict[str, Any]:
    settings = compose("train_denoiser", [*OVERRIDES, f"train.batch={batch}", f"train.log_every={4 * batch}"])
    settings = config.TrainDenoiser(
        **{**vars(settings), "engine": config.Engine(kind=kind, stage=0),
           "train": config.Train(**{**vars(settings.train), "images": steps * batch, "validate_every": 0,
                                    "sample_every": 0})}
    )  # fmt: skip
    diffusion = Diffusion(settings.diffusion)
    with tempfile.TemporaryDirectory() as folder:
        manifest = latents(folder, settings)
        source = Dataset(open_store(folder), manifest.shards)
        torch.manual_seed(0)
        engine = Engine(build_denoiser(settings, SHAPE), settings.optim, settings.engine, Worker(), 1, settings.ema)
        rows = denoiser.Rows(settings, manifest, conditioner.empty(settings.conditions))
        beside = bare(settings, diffusion)
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        ended: list[float] = []

        def step(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            began = time.perf_counter()
            if ended:
                times["ours"].append(began - ended[-1])  # one whole turn of the loop
            beside(part)
            ended.append(time.perf_counter())
            times["bare"].append(ended[-1] - began)
            return {"denoiser": denoiser.losses(engine, diffusion, part)}

        task = loop.Task(
            engines={"denoiser": engine},
            batches=Stream(source, seed=0, batch=batch, arrays=("latent", "text")).at,
            prepare=lambda share: rows.of(share.arrays, share.positions.tolist()),
            step=step,
        )
        loop.run(task, settings, Worker())
    medians = {name: statistics.median(values[3:]) for name, values in times.items()}
    return {"engine": kind, "batch": batch, "steps": steps, "threads": torch.get_num_threads(),
            "ours_ms": round(1000 * medians["ours"], 2), "bare_ms": round(1000 * medians["bare"], 2),
            "ratio": round(medians["ours"] / medians["bare"], 4)}  # fmt: skip


if __name__ == "__main__":
    steps, batch, threads = (int(value) for value in (*sys.argv[1:], *("60", "64", "1")[len(sys.argv) - 1 :]))
    torch.set_num_threads(threads)
    for kind in ("torch", "deepspeed"):
        print(json.dumps(measure(kind, steps, batch)), flush=True)
