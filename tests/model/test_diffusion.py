from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calotype import config
from calotype.data.draws import Purpose, philox
from calotype.model.diffusion import Diffusion, draw_timestep
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


PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow_prediction"]


def at(diffusion: Diffusion, t: float) -> tuple[float, float]:
    """(signal, sigma), by the definitions of Ho et al. 2020, eq. 4, and of Liu et al. 2023, eq. 1."""
    if diffusion.settings.prediction == "flow_prediction":
        return 1 - t / 1000, t / 1000
    a = diffusion.alphas_cumprod[int(t)].item()
    return math.sqrt(a), math.sqrt(1 - a)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [*((one, False) for one in PREDICTIONS), ("v_prediction", True), ("sample", True)]
)
def test_each_target_gives_back_the_latent_and_the_noise(prediction: str, zero_snr: bool) -> None:
    ours = Diffusion(config.Diffusion(prediction=prediction, zero_snr=zero_snr))
    z, noise, t = parts()
    t = t.clamp(min=1) + 0.25 if ours.flow else t
    x, target = ours.add_noise(z, noise, t), ours.target(z, noise, t)
    assert torch.isfinite(x).all()
    for i, step in enumerate(t.tolist()):
        a, b = at(ours, step)
        torch.testing.assert_close(x[i], a * z[i] + b * noise[i], rtol=1e-5, atol=1e-6)
        latent, eps = {
            "epsilon": lambda x, y, a, b: ((x - b * y) / a, y),
            "v_prediction": lambda x, y, a, b: (a * x - b * y, b * x + a * y),
            "sample": lambda x, y, a, b: (y, (x - a * y) / b),
            "flow_prediction": lambda x, y, a, b: (x - b * y, x + a * y),
        }[prediction](x[i].double(), target[i].double(), a, b)
        torch.testing.assert_close(latent.float(), z[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(eps.float(), noise[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_is_algorithm_1(schedule: str) -> None:
    """Lin et al. 2024: sqrt(a_t) is shifted so that the last is 0, then scaled so that the first is what it was."""
    plain = Diffusion(config.Diffusion(schedule=schedule)).alphas_cumprod.double()
    made = Diffusion(config.Diffusion(schedule=schedule, prediction="v_prediction", zero_snr=True)).alphas_cumprod
    root = plain.sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    assert made[-1].item() == 0
    assert (made[:-1] > 0).all()
    assert made[0].item() == pytest.approx(plain[0].item(), abs=1e-6)  # betas are float32
    torch.testing.assert_close(made.double(), expected, rtol=2e-3, atol=1e-6)


def test_at_the_end_of_zero_snr_there_is_noise_alone() -> None:
    z, noise, _ = parts()
    last = torch.full((5,), 999)
    for prediction, target in (("v_prediction", -z), ("sample", z)):
        ours = Diffusion(config.Diffusion(prediction=prediction, zero_snr=True))
        assert torch.equal(ours.add_noise(z, noise, last), noise)
        assert torch.equal(ours.target(z, noise, last), target)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_objectives_are_float32_whatever_surrounds_them(prediction: str) -> None:
    ours = Diffusion(config.Diffusion(prediction=prediction, min_snr_gamma=5))
    z, noise, t = parts()
    exact = ours.add_noise(z, noise, t), ours.target(z, noise, t), ours.loss(z, noise), ours.weight(t)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours.add_noise(z, noise, t), ours.target(z, noise, t), ours.loss(z, noise), ours.weight(t)
    for one, other in zip(exact, inside, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)
    assert ours.add_noise(z.bfloat16(), noise, t).dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_those_of_the_paper(prediction: str, gamma: float) -> None:
    """Hang et al. 2023, section 3.4; and what they say all of them are: min(SNR, gamma) for the latent's error."""
    ours = Diffusion(config.Diffusion(prediction=prediction, min_snr_gamma=gamma))
    times = [1.0, 250.5, 750.25, 999.9] if ours.flow else [0, 200, 400, 999]
    made = ours.weight(torch.tensor(times)).tolist()
    sides = set()
    for t, weight in zip(times, made, strict=True):
        a, b = at(ours, t)
        snr = a**2 / b**2
        sides.add(snr > gamma)
        paper = {"epsilon": min(snr, gamma) / snr, "v_prediction": min(snr, gamma) / (snr + 1),
                 "sample": min(snr, gamma)}  # fmt: skip
        if prediction in paper:
            assert weight == pytest.approx(paper[prediction], rel=1e-3)
        # an error of 1 in the latent moves noise by a / b, v and the flow by 1 / b, at the same x
        moved = {"epsilon": a / b, "sample": 1.0}.get(prediction, 1 / b)
        assert weight * moved**2 == pytest.approx(min(snr, gamma), rel=1e-3)
    assert sides == {True, False}, "the clip is never met"


# ------------------------------------------------------------------------------------------------ timesteps


def drawn(count: int = 20_000, seed: int = 3, **changes: object) -> np.ndarray:
    settings = config.Diffusion(**changes)  # type: ignore[arg-type]
    return np.array([draw_timestep(settings, philox(seed, i, Purpose.TIMESTEP)) for i in range(count)])


OLD = [750, 147, 183, 729, 455, 820, 351, 229]  # of seed 3, as runs have drawn them before there was a choice


def test_the_default_timesteps_are_those_of_older_runs() -> None:
    assert drawn(8).tolist() == OLD
    assert drawn(8, prediction="sample", zero_snr=True, min_snr_gamma=0.0).tolist() == OLD


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_has_the_density_of_the_paper(prediction: str, mean: float, std: float) -> None:
    """Esser et al. 2024, eq. 19, integrated over twenty bins."""
    made = drawn(prediction=prediction, timestep_sampling="logit_normal", logit_mean=mean, logit_std=std)
    fine = (np.arange(20_000) + 0.5) / 20_000
    logit = np.log(fine / (1 - fine))
    density = np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * fine * (1 - fine))
    expected = density.reshape(20, -1).mean(1) / 20
    share = np.histogram(made / 1000, 20, (0, 1))[0] / len(made)
    assert expected.sum() == pytest.approx(1, abs=1e-3)
    assert (abs(share - expected) < 5 * np.sqrt(expected / len(made)) + 1e-3).all()
    assert made.dtype == (np.float64 if prediction == "flow_prediction" else np.int64)
    assert 0 <= made.min() < made.max() <= (1000 if prediction == "flow_prediction" else 999)


def test_shift_of_two_doubles_noise_over_signal() -> None:
    """Esser et al. 2024, eq. 23 solved for t / (1 - t): what n pixels lose at t, four times as many lose there."""
    plain, shifted = (drawn(2_000, prediction="flow_prediction", shift=shift) / 1000 for shift in (1.0, 2.0))
    np.testing.assert_allclose(shifted / (1 - shifted), 2 * plain / (1 - plain), rtol=1e-9)
    assert abs(plain.mean() - 0.5) < 0.03
    assert (np.histogram(plain, 10, (0, 1))[0] > 140).all()
