"""What training a denoiser will take, before it starts: memory by ZeRO stage, arithmetic, hours, cost, bytes.

parameters, FLOPs, activations   of the network, run without numbers (model/cost.py)
weights, gradients, moments ...  by formula (train/memory.py)
rate                             a few steps timed in this process, in plain PyTorch; or a figure that is given
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from calotype import checks
from calotype.config import TrainDenoiser
from calotype.data import cache
from calotype.data.manifest import CACHE, Manifest
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import ConfigError
from calotype.tasks.memory import ROOM, Option, advice, measured, options, wanted
from calotype.train.memory import averages

SECONDS, STEPS = 5.0, 3  # a timed step takes about that long at most, if one image does; timed steps
CPU_IMAGES = 8  # of a timed step without a GPU, where more images make none of them faster


@dataclass(frozen=True)
class Budget:
    """Bytes, unless a name says otherwise.  `rate`: images per second of one worker; 0 where nobody knows.

    Attributes:
        memory: of one worker.
        wanted: micro-batch that the settings ask for.
        advice: settings of the smallest option that fits; empty where none does.
        latents: read per epoch, by all workers; 0 while there is no cache.
        checkpoints: how many are written, of which `kept` stay.
    """

    parameters: int
    flops_per_image: float
    memory: int
    workers: int
    wanted: int
    options: list[Option]
    advice: list[str]
    images: int
    rate: float
    timed: bool
    hours: float
    cost: float
    latents: int
    latents_read: int
    checkpoint: int
    checkpoints: int
    kept: int


def budget(config: TrainDenoiser, memory: int = 0, rate: float = 0.0, price: float = 0.0) -> Budget:
    """What the whole training takes; times a few steps here unless `rate` is given.

    Args:
        config: of which the inputs are resolved; there need be no cache yet.
        memory: bytes of one worker; 0: as the settings say, or as this machine has.
        rate: images per second of one worker; 0 times a few steps here, where they fit.
        price: of one worker for an hour; 0: as the settings say.

    Raises:
        ConfigError: nobody knows the memory.
    """
    from calotype.model import cost

    worker, own = here(config)
    memory = memory or round(config.cluster.memory_gb * 1e9) or own
    if not memory:
        raise ConfigError(
            f"cluster.gpus={config.cluster.gpus:g} and this machine has no GPU: say --memory (GB of a worker's GPU)"
        )
    shape = checks.latent_shape(config.autoencoder, config.encoding.resolution)
    train, world = config.train, config.cluster.most
    needs = measured(config, False, True)
    found = options(config, needs, memory)
    plain = next(one for one in found if one.checkpoint_activations == config.engine.checkpoint_activations)
    fits = int((ROOM * own - plain.memory.whole - plain.once) // max(plain.each, 1))
    timed = not rate and worker is not None and fits > 0
    if timed:
        assert worker is not None
        rate = _timed(config, worker, min(fits, wanted(config)))
    hours = train.images / (rate * world) / 3600 if rate else 0.0
    size = 4 * needs[0].parameters * (3 + averages(config.ema))
    latents, samples = _latents(config)
    saved = math.ceil(train.images / train.checkpoint_every)
    return Budget(
        parameters=needs[0].parameters,
        flops_per_image=cost.flops_per_image(config, shape),
        memory=memory,
        workers=world,
        wanted=wanted(config),
        options=found,
        advice=advice(config, found),
        images=train.images,
        rate=rate,
        timed=timed,
        hours=hours,
        cost=hours * world * (price or config.cluster.price),
        latents=latents,
        latents_read=round(latents / max(samples, 1) * train.images),
        checkpoint=size,
        checkpoints=saved,
        kept=min(saved, train.keep),
    )


# --------------------------------------------------------------------------------------------- time, bytes


def _latents(config: TrainDenoiser) -> tuple[int, int]:
    """(bytes, samples) of an epoch; (0, 0) while there is no cache."""
    found = cache.find_cache(open_store(config.root), config)
    rows = found.split("train") if found else ()
    return sum(row.bytes for row in rows), sum(row.samples for row in rows)


def _timed(config: TrainDenoiser, worker: Worker, most: int) -> float:
    """Images per second of one worker, of steps on latents of noise: without waiting for data, or for other workers."""
    import numpy as np
    import torch

    from calotype.model import conditioner
    from calotype.model.build import checkpoint_activations
    from calotype.model.denoiser import build_denoiser
    from calotype.model.diffusion import Diffusion
    from calotype.tasks.denoiser import Rows, losses
    from calotype.tasks.start import NAME
    from calotype.train.engine import Engine

    shape = checks.latent_shape(config.autoencoder, config.encoding.resolution)
    model = build_denoiser(replace(config, denoiser=replace(config.denoiser, init_from="")), shape)
    if config.engine.checkpoint_activations:
        checkpoint_activations(model)
    plain = replace(config.engine, kind="torch", stage=0, offload="none")
    engine = Engine(model, config.optim, plain, worker, 1, config.ema)
    nothing, diffusion = conditioner.empty(config.conditions), Diffusion(config.diffusion)
    meta = {"channel_mean": [0.0] * shape[0], "channel_std": [1.0] * shape[0], "shape": shape}
    rows = Rows(config, Manifest(CACHE, NAME, (), (), meta), nothing)
    dice = np.random.default_rng(0)

    def step(count: int) -> float:
        stored = {name: value.expand(count, *value.shape[1:]).numpy() for name, value in nothing.items()}
        stored["latent"] = np.ones((count, 1, 1, 1, 1), np.float32) * dice.standard_normal((1, *shape), np.float32)
        part = {name: value.to(worker.device) for name, value in rows.of(stored, list(range(count))).items()}
        began = time.monotonic()
        engine.backward(losses(engine, diffusion, part).mean())
        float(engine.step(config.optim.lr, count, count))
        if worker.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.monotonic() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(worker.threads)
    try:
        step(1)
        count = max(1, min(most, int(SECONDS / step(1)), most if config.cluster.gpus else CPU_IMAGES))
        step(count)
        return count * STEPS / sum(step(count) for _ in range(STEPS))
    finally:
        torch.set_num_threads(threads)


def here(config: TrainDenoiser) -> tuple[Worker | None, int]:
    """(a worker of this machine, bytes that it has): of its GPU, or a share of its RAM; None, 0 without such a GPU."""
    import psutil
    import torch

    if not config.cluster.gpus:
        return Worker(threads=config.cluster.cpus), int(psutil.virtual_memory().total / config.cluster.most)
    if not torch.cuda.is_available():
        return None, 0
    worker = Worker(device="cuda:0", threads=config.cluster.cpus)
    return worker, int(torch.cuda.get_device_properties(0).total_memory * min(config.cluster.gpus, 1.0))
