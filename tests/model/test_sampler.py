from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model.diffusion import Diffusion
from calotype.model.sampler import initial_noise, sample, scheduler, set_timesteps
from torch import Tensor

SHAPE = (4, 2, 2)
KINDS = ["ddim", "dpm++", "euler"]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
NOTHING: dict[str, Tensor] = {}
MEAN, STD = 1.5, 0.5
OBJECTIVES: list[dict[str, Any]] = [
    *({"prediction": prediction} for prediction in ("epsilon", "v_prediction", "sample")),
    *({"prediction": prediction, "zero_snr": True} for prediction in ("v_prediction", "sample")),
    {"prediction": "sample", "zero_snr": True, "schedule": "squaredcos_cap_v2"},
    {"prediction": "flow_prediction"},
    {"prediction": "flow_prediction", "shift": 3.0},
]


class Oracle:
    """The exact denoiser of data that is one point: every right sampler arrives there from anywhere."""

    def __init__(self, diffusion: Diffusion, point: Tensor) -> None:
        self.diffusion, self.point = diffusion, point
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.rows.append(len(x))
        point = cond["where"].reshape(-1, 1, 1, 1) * self.point if "where" in cond else self.point
        signal, sigma = scales(self.diffusion, t)
        return told(self.diffusion, x, point, signal, sigma)


class Gaussian:
    """The exact denoiser of latents that are N(MEAN, STD^2): it says what is to be expected of z, given x."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        signal, sigma = scales(self.diffusion, t)
        gain = signal * STD**2 / (signal**2 * STD**2 + sigma**2)
        return told(self.diffusion, x, MEAN + gain * (x - signal * MEAN), signal, sigma)


def scales(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    if diffusion.settings.prediction == "flow_prediction":
        sigma = (t.double() / 1000).reshape(-1, 1, 1, 1)
        return 1 - sigma, sigma
    a = diffusion.alphas_cumprod[t.long()].double().reshape(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def told(diffusion: Diffusion, x: Tensor, z: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """What a denoiser says that thinks that x came from z."""
    noise = (x - signal * z) / sigma
    said = {"epsilon": noise, "sample": z.expand_as(x), "flow_prediction": noise - z,
            "v_prediction": signal * noise - sigma * z}  # fmt: skip
    return said[diffusion.settings.prediction].float()


def drawn(
    diffusion: Diffusion,
    model: Any,
    cond: dict[str, Tensor],
    empty: dict[str, Tensor],
    seeds: list[int],
    **changes: Any,
) -> Tensor:
    settings = config.Sampler(**{"steps": 10, "guidance": 1.0, **changes})
    return sample(model, diffusion, settings, cond, empty, SHAPE, seeds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_denoiser_leads_to_the_data(kind: str, prediction: str, schedule: str) -> None:
    diffusion = Diffusion(config.Diffusion(prediction=prediction, schedule=schedule))
    point = torch.linspace(-1, 1, 16).reshape(1, *SHAPE)
    made = drawn(diffusion, Oracle(diffusion, point), NOTHING, NOTHING, [1, 2, 3], kind=kind)
    torch.testing.assert_close(made, point.expand(3, *SHAPE), atol=2e-2, rtol=0)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES[2:], ids=str)
def test_every_objective_leads_there_in_one_step_and_in_ten(objective: dict[str, Any], kind: str, steps: int) -> None:
    diffusion = Diffusion(config.Diffusion(**objective))
    point = torch.linspace(-1, 1, 16).reshape(1, *SHAPE)
    made = drawn(diffusion, Oracle(diffusion, point), NOTHING, NOTHING, [1, 2, 3], kind=kind, steps=steps)
    torch.testing.assert_close(made, point.expand(3, *SHAPE), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_samples_have_the_mean_and_spread_of_the_data(objective: dict[str, Any], kind: str) -> None:
    """Of Gaussian data the reverse process is known: z = MEAN + STD (x - signal MEAN) / sqrt(signal^2 STD^2 + sigma^2).

    It begins in N(0, 1), where x is distributed so only without signal: otherwise the mean is missed by what Lin et al.
    2024 found, and by no more.
    """
    diffusion, shape, seeds = Diffusion(config.Diffusion(**objective)), (4, 16, 16), list(range(8))
    settings = config.Sampler(kind=kind, steps=250, guidance=1.0)
    made = sample(Gaussian(diffusion), diffusion, settings, NOTHING, NOTHING, shape, seeds).double()
    flow = diffusion.settings.prediction == "flow_prediction"
    signal, sigma = (float(x) for x in scales(diffusion, torch.tensor([1000.0 if flow else 999.0])))
    noise = initial_noise(shape, seeds).double()
    exact = MEAN + STD * (noise - signal * MEAN) / math.sqrt(signal**2 * STD**2 + sigma**2)
    assert float((made - exact).abs().max()) < 0.05
    assert abs(float(made.std()) / STD - 1) < 0.03
    off = MEAN - float(made.mean())
    assert abs(off - signal * MEAN * STD) < 0.012
    assert (abs(off) < 0.012) == (flow or diffusion.settings.zero_snr)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_same_in_any_batch(kind: str) -> None:
    diffusion = Diffusion(config.Diffusion())

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.tanh(x) * cond["where"].reshape(-1, 1, 1, 1)

    cond, empty = {"where": torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])}, {"where": torch.tensor([0.0])}
    settings: dict[str, Any] = {"kind": kind, "guidance": 2.0}
    whole = drawn(diffusion, model, cond, empty, [5, 6, 7, 8, 9], **settings)
    assert torch.equal(drawn(diffusion, model, cond, empty, [5, 6, 7, 8, 9], batch=2, **settings), whole)
    assert torch.equal(drawn(diffusion, model, {"where": torch.tensor([0.4])}, empty, [8], **settings)[0], whole[3])
    assert not torch.allclose(whole[0], drawn(diffusion, model, cond, empty, [6] * 5, **settings)[0])


def test_guidance_extrapolates_from_the_empty_condition_in_one_call() -> None:
    diffusion = Diffusion(config.Diffusion())
    point = torch.ones(1, *SHAPE)
    oracle = Oracle(diffusion, point)
    cond, empty = {"where": torch.tensor([1.0, 2.0])}, {"where": torch.tensor([0.5])}
    made = drawn(diffusion, oracle, cond, empty, [1, 2], guidance=3.0)
    # predictions are linear in the point, so guiding predictions guides the point: e + 3 (c - e)
    torch.testing.assert_close(made[:, 0, 0, 0], torch.tensor([2.0, 5.0]), atol=2e-2, rtol=0)
    assert oracle.rows == [4] * 10
    plain = Oracle(diffusion, point)
    drawn(diffusion, plain, cond, empty, [1, 2], guidance=1.0)
    assert plain.rows == [2] * 10
    zero = drawn(diffusion, Oracle(diffusion, point), cond, empty, [1, 2], guidance=0.0)
    torch.testing.assert_close(zero[:, 0, 0, 0], torch.tensor([0.5, 0.5]), atol=2e-2, rtol=0)


def test_noise_is_standard_normal_and_belongs_to_its_seed() -> None:
    noise = initial_noise((4, 64, 64), [3, 4])
    assert torch.equal(initial_noise((4, 64, 64), [4])[0], noise[1])
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_starts_at_the_last_timestep(kind: str, objective: dict[str, Any]) -> None:
    steps = scheduler(config.Diffusion(**objective), kind)
    set_timesteps(steps, 7)
    first = {"flow_prediction": 1000 if kind != "dpm++" else 999}.get(objective["prediction"], 999)
    assert int(steps.timesteps[0]) == first
    assert len(steps.timesteps) == 7
    assert (steps.timesteps.diff() < 0).all()


def test_flow_matching_is_told_its_shifted_time() -> None:
    for kind, tolerance in (("euler", 1e-4), ("dpm++", 1.0)):  # diffusers gives whole numbers with dpm++
        steps = scheduler(config.Diffusion(prediction="flow_prediction", shift=2.0), kind)
        set_timesteps(steps, 4)
        even = torch.tensor([1.0, 0.75, 0.5, 0.25])
        wanted = 1000 * 2 * even / (1 + even)  # Esser et al. 2024, eq. 23
        torch.testing.assert_close(steps.timesteps.float(), wanted, atol=tolerance, rtol=1e-3)


def test_none_and_too_many() -> None:
    diffusion = Diffusion(config.Diffusion(timesteps=100))
    assert drawn(diffusion, None, NOTHING, NOTHING, []).shape == (0, *SHAPE)
    with pytest.raises(ConfigError, match=r"sampler\.steps=101"):
        drawn(diffusion, None, NOTHING, NOTHING, [1], steps=101)
