"""The paper's headline, measured: the same UNet in latent space and in pixel space (Rombach et al. 2022, section 4.1).

Both are timed one after the other in one process, on the same device and threads, by the same code.
"""

from __future__ import annotations

import dataclasses
import time

from calotype import config, runs
from calotype.config import TrainDenoiser
from calotype.errors import ConfigError
from calotype.tasks import sample

BATCH = 8  # images per timed training step
DRAWN = 4  # images drawn for the time of a sample
SECONDS = 4.0  # of timed training steps; at least one is taken


def is_pixel(settings: TrainDenoiser) -> bool:
    return settings.autoencoder.kind == "identity"


def check(latent: TrainDenoiser, pixel: TrainDenoiser) -> None:
    """Refuse a comparison from which nothing would follow.

    Raises:
        ConfigError: `pixel` is not the same UNet, conditioned alike, in pixel space at the same resolution.
    """
    if not is_pixel(pixel):
        raise ConfigError(f"pixel_run={pixel.name} was trained on latents: give a run with autoencoder=identity")
    for name, ours, theirs in (
        ("denoiser.model", latent.denoiser.model, pixel.denoiser.model),
        ("encoding.resolution", latent.encoding.resolution, pixel.encoding.resolution),
        ("conditions", sorted(latent.conditions), sorted(pixel.conditions)),
    ):
        if ours != theirs:
            raise ConfigError(f"pixel_run={pixel.name} has another {name} ({theirs}) than the run ({ours}): "
                              "nothing would follow from comparing them")  # fmt: skip


def in_pixels(settings: TrainDenoiser) -> TrainDenoiser:
    """The same model, at home in pixel space."""
    identity = config.Autoencoder(kind="identity", f=1, channels=3)
    return dataclasses.replace(settings, autoencoder=identity)


def speeds(settings: config.Evaluate, model: sample.Model, pixel: runs.Record | None, device: str) -> dict[str, float]:
    """Images per second in training, seconds per drawn sample (decoding included), and how much latent space saves.

    Args:
        pixel: the pixel-space run; without one, the same UNet with fresh weights, which takes the same time.
    """
    other = sample.load_denoiser(pixel, settings.ema, "", device) if pixel else _fresh(model)
    found: dict[str, float] = {}
    for name, each in (("latent", model), ("pixel", other)):
        found[f"{name}_images_per_second"] = training_speed(each)
        found[f"{name}_seconds_per_sample"] = sampling_time(each, settings.sampler)
    found["training_speedup"] = found["latent_images_per_second"] / found["pixel_images_per_second"]
    found["sampling_speedup"] = found["pixel_seconds_per_sample"] / found["latent_seconds_per_sample"]
    return found


def _fresh(model: sample.Model) -> sample.Model:
    from calotype.model.autoencoder import load_autoencoder
    from calotype.model.denoiser import build_denoiser

    settings, edge = in_pixels(model.settings), model.settings.encoding.resolution
    bare = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, init_from=""))
    denoiser = build_denoiser(bare, (3, edge, edge)).eval().requires_grad_(False).to(model.device)
    unit = ((0.0,) * 3, (1.0,) * 3)
    return sample.Model(
        settings, denoiser, load_autoencoder(settings.autoencoder), (3, edge, edge), *unit, 0, model.device
    )


def training_speed(model: sample.Model) -> float:
    """Images per second of whole optimizer steps on fresh weights: noise, forward, backward, AdamW."""
    import torch

    from calotype.model.conditioner import empty
    from calotype.model.denoiser import build_denoiser
    from calotype.model.diffusion import Diffusion

    bare = dataclasses.replace(model.settings.denoiser, init_from="")
    network = build_denoiser(dataclasses.replace(model.settings, denoiser=bare), model.shape).to(model.device).train()
    diffusion, nothing = Diffusion(model.settings.diffusion), empty(model.settings.conditions, model.device)
    cond = {name: value.expand(BATCH, *value.shape[1:]) for name, value in nothing.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    z = torch.randn(BATCH, *model.shape, device=model.device)

    def step() -> float:
        start = time.perf_counter()
        t = torch.randint(diffusion.settings.timesteps, (BATCH,), device=model.device)
        noise = torch.randn_like(z)
        made = network(diffusion.add_noise(z, noise, t), t, cond)
        diffusion.loss(made, diffusion.target(z, noise, t)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(model.device)
        return time.perf_counter() - start

    with torch.random.fork_rng(), torch.enable_grad():
        step()  # warms up allocators and kernels
        took = [step()]
        while sum(took) < SECONDS:
            took.append(step())
    return BATCH / sorted(took)[len(took) // 2]


def sampling_time(model: sample.Model, sampler: config.Sampler) -> float:
    """Seconds per image, of DRAWN images in one batch, from noise to pixels."""
    prompts = [sample.prompt(model.settings.conditions, "a picture")] * DRAWN
    model.draw(prompts, dataclasses.replace(sampler, steps=1), range(DRAWN))
    start = time.perf_counter()
    model.draw(prompts, sampler, range(DRAWN))
    return (time.perf_counter() - start) / DRAWN


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
