"""The reverse process: diffusers' schedulers, classifier-free guidance, and noise that belongs to its image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype import config
from calotype.errors import ConfigError
from calotype.model.diffusion import FLOW, Diffusion

Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # (x, t, cond) -> prediction, as Denoiser.forward


def scheduler(diffusion: config.Diffusion, kind: str) -> Any:
    """The diffusers scheduler `kind` (ddim | dpm++ | euler) for a forward process.

    Timesteps are spaced `trailing`: sampling starts where the noise is purest (Lin et al. 2024, table 2).  Along the
    straight lines of flow matching DDIM's step is Euler's.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    if diffusion.prediction == FLOW:
        return _flow_scheduler(diffusion, kind)
    common: dict[str, Any] = {
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": diffusion.schedule,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": diffusion.prediction,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": diffusion.zero_snr,
        "steps_offset": 1,  # trailing does not use it, but StableDiffusionPipeline rewrites configs that lack it
    }
    if kind == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    if kind == "dpm++":
        # cosine schedules end with so little signal that the solver's logarithms fail (diffusers' advice); but a model
        # of zero_snr must begin at its end, and its predictions are not divided by the signal
        cosine = diffusion.schedule == "squaredcos_cap_v2" and not diffusion.zero_snr
        clipped = {"lambda_min_clipped": -5.1} if cosine else {}
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2, **clipped)
    assert kind == "euler", kind
    return EulerDiscreteScheduler(**common)


def _flow_scheduler(diffusion: config.Diffusion, kind: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if kind != "dpm++":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=diffusion.timesteps, shift=diffusion.shift)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=diffusion.timesteps,
        prediction_type=diffusion.prediction,
        use_flow_sigmas=True,
        flow_shift=diffusion.shift,
        algorithm_type="dpmsolver++",
        solver_order=2,
        steps_offset=1,
    )


def set_timesteps(steps: Any, count: int, device: torch.device | str = "cpu") -> None:
    """Choose the `count` timesteps that a scheduler goes through."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(steps, FlowMatchEulerDiscreteScheduler):
        # of itself it would spend its last evaluation on what lies below t = 1 / T
        steps.set_timesteps(sigmas=np.linspace(1, 1 / count, count), device=device)
    else:
        steps.set_timesteps(count, device=device)


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """One standard normal (C, h, w) per seed, (B, C, h, w) float32: an image is the same in any batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: Predict,
    diffusion: Diffusion,
    settings: config.Sampler,
    cond: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    device: str = "cpu",
    done: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw one latent per seed.

    Args:
        model: the denoiser, or an engine around it.
        settings: kind, steps, guidance, and images per call (`batch`; with guidance a call sees twice as many rows).
        cond: stored conditions, one row per seed.
        empty: the empty condition, one row.
        shape: (C, h, w).
        done: called with the number of images finished, after each batch.

    Returns:
        (B, C, h, w) float32 model latents (whitened: `data.cache.from_model` makes them raw).
    """
    if settings.steps > diffusion.settings.timesteps:
        raise ConfigError(
            f"sampler.steps={settings.steps} is more than diffusion.timesteps={diffusion.settings.timesteps}"
        )
    parts = []
    for rows in _batches(len(seeds), settings.batch):
        here = {name: value[rows].to(device) for name, value in cond.items()}
        noise = initial_noise(shape, seeds[rows]).to(device)
        parts.append(_reverse(model, scheduler(diffusion.settings, settings.kind), settings, here, empty, noise))
        if done is not None:
            done(len(noise))
    return torch.cat(parts) if parts else torch.zeros(0, *shape)


def _reverse(
    model: Predict,
    steps: Any,
    settings: config.Sampler,
    cond: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    noise: Tensor,
) -> Tensor:
    guided = settings.guidance != 1 and bool(cond)
    if guided:  # one call for both halves: fewer, larger kernels
        cond = {name: torch.cat([empty[name].to(value).expand_as(value), value]) for name, value in cond.items()}
    set_timesteps(steps, settings.steps, noise.device)
    scaled = hasattr(steps, "scale_model_input")  # flow matching's own scheduler scales nothing
    x = noise * steps.init_noise_sigma if scaled else noise
    for t in steps.timesteps:
        seen = torch.cat([x, x]) if guided else x
        if scaled:
            seen = steps.scale_model_input(seen, t)
        prediction = model(seen, t.expand(len(seen)), cond)
        if guided:  # Ho & Salimans 2022, eq. 6, as diffusers writes it
            without, wanted = prediction.chunk(2)
            prediction = without + settings.guidance * (wanted - without)
        x = steps.step(prediction, t, x, return_dict=False)[0]
    return x


def _batches(count: int, batch: int) -> Iterator[slice]:
    for start in range(0, count, batch):
        yield slice(start, start + batch)
