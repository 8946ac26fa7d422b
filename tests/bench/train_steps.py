"""Turns of our loop next to steps of others, in one process, so that both see the same machine: for train.py.

Ours is all of it: a stream of a real cache, rows, figures, `Engine`, average.  Right before each of its steps another
one is taken: of plain PyTorch, of DeepSpeed, or of a loop that encodes its images anew in every step.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from calotype import config, runs, track
from calotype.compose import compose
from calotype.data import Dataset, Stream, cache, shards
from calotype.data.manifest import CACHE, Manifest
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.model import conditioner
from calotype.model.cost import Shape
from calotype.model.denoiser import build_denoiser
from calotype.model.diffusion import Diffusion
from calotype.tasks import denoiser
from calotype.train import loop, zero
from calotype.train.engine import Engine, import_deepspeed
from torch import Tensor, nn

SHAPE = (4, 8, 8)
DECAY = 0.999
WARM = 3  # steps that are not counted
OVERRIDES = ["denoiser=unet_tiny", "autoencoder.path=x", "track=none", "cluster=local", "train.images=1"]

Step = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Case:
    """`beside`: torch | deepspeed | online.  `mlflow`: where points go; "" is nowhere."""

    beside: str = "torch"
    kind: str = "torch"
    stage: int = 0
    world: int = 1
    steps: int = 60
    batch: int = 64
    mlflow: str = ""


def measured(case: Case, rank: int, store: str) -> dict[str, float]:
    """Median milliseconds of a turn of ours, of a step of the other, and their ratio; the same on every rank."""
    if case.world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.world)
    torch.set_num_threads(1)
    settings = _settings(case)
    worker = Worker(rank=rank, world=case.world, local_rank=rank)
    times: dict[str, list[float]] = {"ours": [], "beside": []}
    ended: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, root=folder)
        tokens = conditioner.inputs(settings.conditions["text"], ["a handwritten digit seven"])[0]
        manifest = latents(folder, SHAPE, 32, 1024, 128, lambda random: tokens)
        rows = denoiser.Rows(settings, manifest, conditioner.empty(settings.conditions))
        record = _record(settings, case) if case.mlflow else None
        torch.manual_seed(0)
        engine = Engine(build_denoiser(settings, SHAPE), settings.optim, settings.engine, worker, 1, settings.ema)
        diffusion = Diffusion(settings.diffusion)
        beside = _beside(case, settings, diffusion, worker)

        def step(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
            began = time.perf_counter()
            if ended:
                times["ours"].append(began - ended[-1])  # one whole turn of the loop
            beside(part)
            ended.append(time.perf_counter())
            times["beside"].append(ended[-1] - began)
            return {denoiser.NAME: denoiser.losses(engine, diffusion, part)}

        source = Dataset(open_store(folder), manifest.shards)
        shares = {"rank": rank, "world": case.world, "arrays": ("latent", "text")}
        stream = Stream(source, seed=0, batch=case.batch, **shares)
        task = loop.Task({denoiser.NAME: engine}, stream.seek, lambda s: rows.of(s.arrays, s.positions.tolist()), step)
        loop.run(task, settings, worker, record)
    medians = {name: 1000 * statistics.median(values[WARM:]) for name, values in times.items()}
    return {**medians, "ratio": medians["ours"] / medians["beside"]}


def _settings(case: Case) -> config.TrainDenoiser:
    settings = compose("train_denoiser", [*OVERRIDES, f"train.batch={case.batch}"])
    every = case.batch if case.mlflow else 4 * case.batch
    last = 2**62  # no checkpoint: that is measured by itself
    train = replace(settings.train, images=case.steps * case.batch, log_every=every, checkpoint_every=last,
                    validate_every=0, sample_every=0)  # fmt: skip
    return replace(settings, train=train, engine=config.Engine(kind=case.kind, stage=case.stage))


def latents(folder: str, shape: Shape, edge: int, count: int, chunk: int, text: Callable[[Any], Any]) -> Manifest:
    """A shard of random latents (C, h, w) of images of `edge` pixels, each with the text that a generator gives."""
    random, samples, about = np.random.default_rng(0), [], {"width": edge, "height": edge}
    for index in range(count):
        latent = random.standard_normal((2, *shape)).astype(np.float16)
        samples.append(cache.encode_sample(shards.Sample(f"{index:05d}", {}), latent, {"text": text(random)}, about))
    row = shards.write_shard(open_store(folder), f"latents-{edge}.tar", samples, chunk)
    meta = {"channel_mean": [0.0] * shape[0], "channel_std": [1.0] * shape[0], "shape": list(shape)}
    return Manifest(CACHE, "bench", ("latent.npy", "text.npy", "json"), (row,), meta)


def _record(settings: config.TrainDenoiser, case: Case) -> runs.Record:
    """A run in the MLflow that answers; its points go to the one that the case names."""
    tracked = replace(settings, track=config.Track(experiment="bench"), seed=int.from_bytes(os.urandom(4)))
    record = runs.begin("train_denoiser", tracked, lambda i: track.create_run(tracked, "train_denoiser", i), print)
    os.environ["MLFLOW_TRACKING_URI"] = case.mlflow
    track.WAIT = 1.0  # seconds at the end for what a server that is down will not take
    return record


# ---------------------------------------------------------------------------------------------------- the others


def _beside(case: Case, settings: config.TrainDenoiser, diffusion: Diffusion, worker: Worker) -> Step:
    torch.manual_seed(0)
    model = build_denoiser(settings, SHAPE)
    if case.beside == "deepspeed":
        return _deepspeed(model, case, settings, diffusion, worker)
    return _torch(model, settings, diffusion, _online(case.batch) if case.beside == "online" else None)


def _loss(model: Any, diffusion: Diffusion, rows: Mapping[str, Tensor], latent: Tensor) -> Tensor:
    noisy = diffusion.add_noise(latent, rows["noise"], rows["timestep"])
    target = diffusion.target(latent, rows["noise"], rows["timestep"])
    return (model(noisy, rows["timestep"], {"text": rows["cond.text"]}) - target).square().mean()


def _torch(
    model: nn.Module, settings: config.TrainDenoiser, diffusion: Diffusion, encode: Callable[[], Tensor] | None
) -> Step:
    """Plain PyTorch: the same optimizer, clip and average."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.optim.lr, weight_decay=0.0, fused=True)
    mean = [parameter.detach().clone() for parameter in parameters]

    def step(rows: Mapping[str, Tensor]) -> None:
        loss = _loss(model, diffusion, rows, encode() if encode else rows["latent"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.optim.clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, [parameter.detach() for parameter in parameters], 1 - DECAY)

    return step


def _deepspeed(
    model: nn.Module, case: Case, settings: config.TrainDenoiser, diffusion: Diffusion, worker: Worker
) -> Step:
    """DeepSpeed as its own examples use it: the same stage, optimizer and clip, told what ours is told of buckets and
    thresholds, and the average of what a rank owns."""
    deepspeed = import_deepspeed(worker)
    numel = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.optim.lr, weight_decay=0.0, fused=True)
    options = zero.settings(numel, settings.engine, 1, settings.optim.clip, gpu=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
    names = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups",
             3: "fp32_partitioned_groups_flat"}  # fmt: skip
    own = list(getattr(engine.optimizer, names[case.stage])) if case.stage else list(model.parameters())
    mean = [tensor.detach().clone() for tensor in own]

    def step(rows: Mapping[str, Tensor]) -> None:
        engine.backward(_loss(engine, diffusion, rows, rows["latent"]))
        engine.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, [tensor.detach() for tensor in own], 1 - DECAY)

    return step


def _online(batch: int) -> Callable[[], Tensor]:
    """What diffusers' `train_text_to_image.py` does in every step: pixels -> autoencoder -> a draw of the posterior.
    Its images lie decoded in memory here."""
    from calotype.model.build import instantiate

    architecture = compose("train_autoencoder", ["autoencoder=kl_f4_tiny", "track=none", "cluster=local"]).autoencoder
    encoder = instantiate(dict(architecture.model)).eval().requires_grad_(False)
    pixels = torch.rand(batch, 3, SHAPE[1] * architecture.f, SHAPE[2] * architecture.f) * 2 - 1

    def encode() -> Tensor:
        with torch.no_grad():
            return encoder.encode(pixels).latent_dist.sample() * encoder.config["scaling_factor"]

    return encode
