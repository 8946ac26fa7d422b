"""Training the UNet of Stable Diffusion 2 on cached latents on one GPU: images per second and MFU, for train.py.

    bare   its step on tensors that lie on the device: bf16, fused AdamW with fp32 weights, an average; its input is in
           channels_last, its weights are not, as ours
    ours   the loop over a real cache of latents and 77 x 1024 embeddings; each eager and compiled

Weights are random: they cost as much as any.  FLOPs of an image, forward and backward, and the device's dense peak in
bf16 are those of a training's own figures, where an unknown device has no MFU.  On a CPU (--device cpu) it is a small
UNet in float32, to see that all of it runs.
"""

from __future__ import annotations

import copy
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calotype import config
from calotype.compose import compose
from calotype.data import Dataset, Stream
from calotype.data.manifest import Manifest
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.model import conditioner
from calotype.model.cost import Shape
from calotype.model.denoiser import build_denoiser
from calotype.model.diffusion import Diffusion
from calotype.tasks import denoiser
from calotype.tasks.spent import Spent
from calotype.train import loop
from calotype.train.engine import Engine
from torch import Tensor, nn

from tests.bench.train_steps import latents
from tests.caches import text_folder

TOKENS, WIDTH, SAMPLES = 77, 1024, 256
WARM = 5
WORDS = {"none": "eager", "default": "compiled", "reduce-overhead": "CUDA graphs"}
SD2 = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20], "layers_per_block": 2,
       "use_linear_projection": True, "norm_num_groups": 32}  # fmt: skip
SMALL = {"block_out_channels": [16, 32], "attention_head_dim": 2, "layers_per_block": 1, "norm_num_groups": 8,
         "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}  # fmt: skip


def settings_of(folder: str, edge: int, device: str, batch: int, steps: int, compiled: str) -> config.TrainDenoiser:
    words = ["autoencoder.path=x", "autoencoder.f=8", "conditions=text_frozen", f"conditions.text.path={folder}/text",
             f"conditions.text.length={TOKENS}", "track=none", "cluster=local", f"train.batch={batch}",
             f"encoding.resolution={edge}", f"train.images={steps * batch}"]  # fmt: skip
    settings = compose("train_denoiser", words)
    cuda = device.startswith("cuda")
    model = {"_target_": "diffusers.UNet2DConditionModel", **(SD2 if cuda else SMALL)}
    precision = "bf16" if cuda else "fp32"
    engine = config.Engine(kind="torch", precision=precision, channels_last=cuda, compile=compiled)
    train = replace(settings.train, log_every=10**12, validate_every=0, sample_every=0, checkpoint_every=10**12)
    return replace(settings, denoiser=config.Denoiser(model=model), engine=engine, train=train)


def steps_of(settings: config.TrainDenoiser) -> int:
    return settings.train.images // settings.train.batch


def embedding(random: np.random.Generator) -> Any:
    return random.standard_normal((TOKENS, WIDTH)).astype(np.float16)


class Stopwatch:
    """`rate`: images per second from the end of the first WARM steps to the beginning of the last one; `first`: seconds
    of the first step, which compiles.
    """

    def __init__(self, device: str, batch: int, steps: int) -> None:
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self.batch, self.last = batch, steps - 1
        self.steps, self.began, self.first, self.rate = 0, 0.0, 0.0, 0.0

    def step(self) -> None:
        if self.steps in (0, 1, WARM, self.last):
            self.wait()
            now = time.perf_counter()
            self.first = now - self.began if self.steps == 1 else self.first
            self.rate = self.batch * (self.last - WARM) / (now - self.began)
            self.began = now
        self.steps += 1


def ours(settings: config.TrainDenoiser, model: nn.Module, folder: str, manifest: Manifest, device: str) -> Stopwatch:
    worker = Worker(device=device, threads=8)
    engine = Engine(model, settings.optim, settings.engine, worker, 1, settings.ema)
    rows, diffusion = (
        denoiser.Rows(settings, manifest, conditioner.empty(settings.conditions)),
        Diffusion(settings.diffusion),
    )
    watch = Stopwatch(device, settings.train.batch, steps_of(settings))

    def step(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        watch.step()
        return {denoiser.NAME: denoiser.losses(engine, diffusion, part)}

    order: dict[str, Any] = {"seed": 0, "batch": settings.train.batch, "lanes": min(8, settings.train.batch)}
    stream = Stream(Dataset(open_store(folder), manifest.shards), **order, arrays=("latent", "text"))
    task = loop.Task({denoiser.NAME: engine}, stream.seek, lambda s: rows.of(s.arrays, s.positions.tolist()), step)
    loop.run(task, settings, worker)
    return watch


def bare(settings: config.TrainDenoiser, model: nn.Module, shape: Shape, device: str) -> Stopwatch:
    batch, cuda = settings.train.batch, device.startswith("cuda")
    model = model.to(device)
    if settings.engine.compile != "none":
        model.compile(mode=settings.engine.compile)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    mean = [parameter.detach().clone() for parameter in parameters]
    diffusion = Diffusion(settings.diffusion)
    z, noise = torch.randn(2, batch, *shape, device=device)
    t = torch.randint(settings.diffusion.timesteps, (batch,), device=device)
    text = torch.randn(batch, TOKENS, WIDTH, device=device).half()  # as caches store it
    watch = Stopwatch(device, batch, steps_of(settings))
    for _ in range(steps_of(settings)):
        watch.step()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            noisy = diffusion.add_noise(z, noise, t)
            noisy = noisy.contiguous(memory_format=torch.channels_last) if cuda else noisy
            made = model(noisy, t, {"text": text})
        (made - diffusion.target(z, noise, t)).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(mean, [parameter.detach() for parameter in parameters], 1e-3)
    return watch


def main(edges: list[int], device: str, batch: int, steps: int, modes: list[str]) -> None:
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else "CPU, a small UNet"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text_folder(Path(folder, "text"), width=WIDTH)
        unet: nn.Module | None = None
        for edge, mode in itertools.product(edges, modes):
            shape = (4, edge // 8, edge // 8)
            manifest = latents(folder, shape, edge, SAMPLES, 64, embedding)
            settings = settings_of(folder, edge, device, batch, steps, mode)
            if unet is None:  # its weights are the same for every edge, and a GPU makes them faster
                with torch.device(device):
                    unet = build_denoiser(settings, shape).cpu()
            while not (found := _measured(settings, unet, folder, manifest, shape, device)):
                fewer = settings.train.batch // 2
                settings = settings_of(folder, edge, device, fewer, steps, mode)
            spent = Spent(settings, Worker(device=device), shape, None)
            what = f"{edge} px  batch {settings.train.batch:<4}{WORDS[mode]:<12}"
            for who, (watch, peak) in found.items():
                figures = spent.figures({"images_per_second": watch.rate})
                mfu = f"  MFU {figures['mfu_percent']:.1f} %" if "mfu_percent" in figures else ""
                print(
                    f"{what}{who:<5}{watch.rate:8.1f} images/s{mfu}  {peak:.0f} GiB  first step {watch.first:.1f} s",
                    flush=True,
                )
            print(f"{what}ours / bare {found['ours'][0].rate / found['bare'][0].rate:.3f}", flush=True)


def _measured(
    settings: config.TrainDenoiser, unet: nn.Module, folder: str, manifest: Manifest, shape: Shape, device: str
) -> dict[str, tuple[Stopwatch, float]]:
    """The bare loop and ours, each with its peak of GiB; {} if the device has no room for the batch."""
    loops: dict[str, Callable[[nn.Module], Stopwatch]] = {
        "bare": lambda model: bare(settings, model, shape, device),
        "ours": lambda model: ours(settings, model, folder, manifest, device),
    }
    found = {}
    for who, run in loops.items():
        _free(device)
        try:
            watch = run(copy.deepcopy(unet))
        except torch.OutOfMemoryError:
            return {}
        found[who] = watch, torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    return found


def _free(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
