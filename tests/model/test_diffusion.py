from __future__ import annotations

import math

import pytest
import torch
from calotype import config
from calotype.model.diffusion import Diffusion
from diffusers import DDPMScheduler

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    return z, noise, torch.tensor([0, 1, 500, 998, 999])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_is_what_diffusers_does(schedule: str) -> None:
    ours = Diffusion(config.Diffusion(schedule=schedule, prediction="v_prediction"))
    theirs = DDPMScheduler(1000, 0.00085, 0.012, schedule)
    z, noise, t = parts()
    torch.testing.assert_close(ours.add_noise(z, noise, t), theirs.add_noise(z, noise, t), rtol=0, atol=0)
    torch.testing.assert_close(ours.target(z, noise, t), theirs.get_velocity(z, noise, t), rtol=0, atol=0)


@pytest.mark.parametrize(("schedule", "beta"), [
    ("linear", lambda t: 0.00085 + (0.012 - 0.00085) * t / 999),
    ("scaled_linear", lambda t: (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2),
])  # fmt: skip
def test_is_what_the_formulas_say(schedule: str, beta: object) -> None:
    product, expected = 1.0, []
    for t in range(1000):
        product *= 1 - beta(t)  # type: ignore[operator]
        expected.append(product)
    made = Diffusion(config.Diffusion(schedule=schedule)).alphas_cumprod
    torch.testing.assert_close(made, torch.tensor(expected), rtol=2e-4, atol=1e-7)


def test_variance_is_kept_and_both_targets_give_back_the_latent() -> None:
    z, noise, t = parts()
    ours = Diffusion(config.Diffusion(prediction="v_prediction"))
    for index, step in enumerate(t.tolist()):
        a = ours.alphas_cumprod[step].item()
        x = ours.add_noise(z, noise, t)[index]
        v = ours.target(z, noise, t)[index]
        back = math.sqrt(a) * x - math.sqrt(1 - a) * v  # Salimans & Ho 2022, appendix D
        torch.testing.assert_close(back, z[index], rtol=1e-4, atol=1e-5)
    assert torch.equal(Diffusion(config.Diffusion(prediction="epsilon")).target(z, noise, t), noise)


def test_loss_is_one_number_per_sample() -> None:
    ours = Diffusion(config.Diffusion())
    prediction = torch.zeros(2, 1, 2, 2)
    target = torch.stack([torch.ones(1, 2, 2), torch.tensor([[[2.0, 0], [0, 0]]])])
    assert ours.loss(prediction, target).tolist() == [1.0, 1.0]
    assert ours.loss(prediction.bfloat16(), target).dtype == torch.float32
