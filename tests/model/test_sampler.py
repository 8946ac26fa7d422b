from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model.diffusion import Diffusion
from calotype.model.sampler import initial_noise, sample, scheduler
from torch import Tensor

SHAPE = (4, 2, 2)
KINDS = ["ddim", "dpm++", "euler"]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
NOTHING: dict[str, Tensor] = {}


class Oracle:
    """The exact denoiser of data that is one point: every right sampler arrives there from anywhere."""

    def __init__(self, diffusion: Diffusion, point: Tensor) -> None:
        self.diffusion, self.point = diffusion, point
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.rows.append(len(x))
        a = self.diffusion.alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
        point = cond["where"].reshape(-1, 1, 1, 1) * self.point if "where" in cond else self.point
        noise = (x - a.sqrt() * point) / (1 - a).sqrt()
        if self.diffusion.settings.prediction == "epsilon":
            return noise
        return a.sqrt() * noise - (1 - a).sqrt() * point


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


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_starts_at_the_last_timestep(kind: str) -> None:
    steps = scheduler(config.Diffusion(), kind)
    steps.set_timesteps(7)
    assert int(steps.timesteps[0]) == 999
    assert len(steps.timesteps) == 7


def test_none_and_too_many() -> None:
    diffusion = Diffusion(config.Diffusion(timesteps=100))
    assert drawn(diffusion, None, NOTHING, NOTHING, []).shape == (0, *SHAPE)
    with pytest.raises(ConfigError, match=r"sampler\.steps=101"):
        drawn(diffusion, None, NOTHING, NOTHING, [1], steps=101)
