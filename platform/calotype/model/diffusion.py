"""The forward process and the objective (Ho et al. 2020; Salimans & Ho 2022), in diffusers' numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calotype import config


class Diffusion:
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I), with a_t = `alphas_cumprod[t]` (Ho et al. 2020, eq. 4).

    Attributes:
        settings: the `diffusion` group it was made from.
        alphas_cumprod: (T,) float32.
    """

    def __init__(self, settings: config.Diffusion) -> None:
        from diffusers import DDPMScheduler

        self.settings = settings
        scheduler: Any = DDPMScheduler(
            num_train_timesteps=settings.timesteps,
            beta_schedule=settings.schedule,
            beta_start=settings.beta_start,
            beta_end=settings.beta_end,
        )
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) z + sqrt(1 - a_t) noise; z, noise: (B, C, h, w), t: (B,) in 0 .. T-1."""
        signal, sigma = self._scales(z, t)
        return signal * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser shall say: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) z (Salimans & Ho 2022)."""
        if self.settings.prediction == "epsilon":
            return noise
        signal, sigma = self._scales(z, t)
        return signal * noise - sigma * z

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,) float32 (L_simple of Ho et al. 2020, eq. 14)."""
        return (prediction.float() - target.float()).square().flatten(1).mean(1)

    def _scales(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, 1, 1, 1)
        return torch.sqrt(a), torch.sqrt(1 - a)
