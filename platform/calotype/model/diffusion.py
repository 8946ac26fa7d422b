"""The forward process and the objective, in diffusers' words (Ho et al. 2020; Salimans & Ho 2022; Liu et al. 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype import config

FLOW = "flow_prediction"


class Diffusion:
    """x_t = signal(t) z + sigma(t) noise, and what the denoiser shall say of it.

    With betas signal^2 = a_t = `alphas_cumprod[t]` and sigma^2 = 1 - a_t (Ho et al. 2020, eq. 4), t in 0 .. T-1.  Flow
    matching goes a straight line from z to the noise (Liu et al. 2023, eq. 1): sigma = t / T and signal = 1 - t / T,
    t a real number in [0, T], as diffusers' FlowMatchEulerDiscreteScheduler tells it to the model.

    Attributes:
        settings: the `diffusion` group it was made from.
        alphas_cumprod: (T,) float32; of no use to flow matching.
    """

    def __init__(self, settings: config.Diffusion) -> None:
        from diffusers import DDPMScheduler

        self.settings = settings
        self.flow = settings.prediction == FLOW
        scheduler: Any = DDPMScheduler(
            num_train_timesteps=settings.timesteps,
            beta_schedule=settings.schedule,
            beta_start=settings.beta_start,
            beta_end=settings.beta_end,
            rescale_betas_zero_snr=settings.zero_snr,
        )
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, sigma) at t (B,), each (B,) float32, on the device of t."""
        if self.flow:
            sigma = t.float() / self.settings.timesteps
            return 1 - sigma, sigma
        if self.alphas_cumprod.device != t.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # once: a copy in each step would wait for the GPU
        a = self.alphas_cumprod[t]
        return torch.sqrt(a), torch.sqrt(1 - a)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = signal z + sigma noise; z, noise: (B, C, h, w), t: (B,) on their device."""
        signal, sigma = _wide(self.scales(t))
        return signal * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser shall say, like z.

        The noise; the latent z; v = signal noise - sigma z (Salimans & Ho 2022, appendix D); or noise - z, the
        direction of the line (Liu et al. 2023, eq. 1, who go from noise to data).
        """
        kind = self.settings.prediction
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return z
        if self.flow:
            return noise - z
        assert kind == "v_prediction", kind
        signal, sigma = _wide(self.scales(t))
        return signal * noise - sigma * z

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each sample, (B,) float32 (L_simple of Ho et al. 2020, eq. 14)."""
        return (prediction.float() - target.float()).square().flatten(1).mean(1)

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR-gamma weights of these losses, (B,) float32 (Hang et al. 2023, section 3.4).

        With SNR = signal^2 / sigma^2: min(SNR, gamma) for the latent, min(SNR, gamma) / SNR for the noise, and
        min(SNR, gamma) / (SNR + 1) for v, so that the error of the latent which a prediction implies always has the
        weight min(SNR, gamma).  Flow matching, of which the paper does not speak, has it by sigma^2 min(SNR, gamma).
        """
        signal, sigma = self.scales(t)
        a, b = signal.square(), sigma.square()
        clipped = torch.minimum(a, self.settings.min_snr_gamma * b)  # b min(SNR, gamma): no division by 0
        if self.settings.prediction == "epsilon":
            return clipped / a
        return clipped / b if self.settings.prediction == "sample" else clipped


def draw_timestep(settings: config.Diffusion, random: np.random.Generator) -> int | float:
    """A timestep to train on: 0 .. T-1, or for flow matching a real number in [0, T].

    Uniform, or with t / T = sigmoid(N(logit_mean, logit_std^2)) (Esser et al. 2024, eq. 19); flow matching then shifts
    it towards noise (eq. 23, where shift is the square root of the ratio of pixels).
    """
    size, flow = settings.timesteps, settings.prediction == FLOW
    if settings.timestep_sampling == "logit_normal":
        t = 1 / (1 + math.exp(-settings.logit_mean - settings.logit_std * random.standard_normal()))
    elif flow:
        t = random.random()
    else:
        return int(random.integers(size))
    if flow:
        return size * settings.shift * t / (1 + (settings.shift - 1) * t)
    return min(int(size * t), size - 1)


def _wide(scales: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    signal, sigma = (scale.reshape(-1, 1, 1, 1) for scale in scales)
    return signal, sigma
