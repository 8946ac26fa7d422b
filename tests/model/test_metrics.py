from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from calotype.errors import ConfigError, DataError
from calotype.model import metrics
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor


def digits(size: int = 32) -> tuple[Tensor, np.ndarray]:  # type: ignore[type-arg]
    """The real digits as `prepare` makes images of them, in [-1, 1]."""
    found = load_digits()
    made = [Image.fromarray((x * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
            for x in found.images]  # fmt: skip
    grey = torch.from_numpy(np.stack([np.asarray(x) for x in made])).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1), found.target


def test_psnr_by_hand_and_per_image() -> None:
    images = torch.zeros(2, 3, 16, 16)
    other = images.clone()
    other[0] += 0.2  # 0.1 of the range of 1
    other[1, :, :8] += 0.4
    expected = [10 * math.log10(1 / 0.01), 10 * math.log10(1 / 0.02)]
    torch.testing.assert_close(metrics.psnr(other, images), torch.tensor(expected), atol=1e-3, rtol=0)
    assert metrics.psnr(torch.full((1, 3, 16, 16), 5.0), torch.ones(1, 3, 16, 16)).item() > 90, "clipped as a PNG is"


def test_ssim_is_one_for_the_same_and_falls() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(metrics.ssim(images, images), torch.ones(3))
    noisy = images + torch.tensor([0.0, 0.2, 0.8]).reshape(3, 1, 1, 1) * torch.randn(3, 3, 32, 32)
    same, near, far = metrics.ssim(noisy, images).tolist()
    assert same > near > far


def test_an_svm_reads_real_digits_and_notices_wrong_prompts() -> None:
    assert metrics.recogniser().accuracy > 0.97
    images, label = digits()
    held_out = metrics.held_out_digits()
    assert set(label[held_out]) == set(range(10))
    seen = np.asarray(metrics.recogniser()(images[held_out]))
    assert np.mean(seen == label[held_out]) > 0.97
    assert np.mean(seen == np.roll(label[held_out], 1)) < 0.2
    blank = metrics.recogniser()(torch.full((4, 3, 32, 32), -1.0))
    assert len(set(blank)) == 1


def test_distances_grow_with_distance_and_are_repeatable() -> None:
    images, _ = digits()
    a, b = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))][:800].split(400)
    near = metrics.distances([a[:150], a[150:]], [b])
    assert (near.real, near.drawn, near.features) == (400, 400, "digits")
    assert metrics.distances([a], [b]).kid == near.kid
    blurred = metrics.distances([a], [torch.nn.functional.avg_pool2d(b, 9, 1, 4)])
    noise = metrics.distances([a], [torch.randn(400, 3, 32, 32)])
    assert near.fid < blurred.fid < noise.fid
    assert abs(near.kid) < blurred.kid < noise.kid
    assert abs(near.kid) < 0.1


def test_fid_of_known_gaussians(tmp_path: Path) -> None:
    """With features that are the first two pixels, FID is that of two known normal distributions."""

    class Two(torch.nn.Module):
        def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
            return images[:, 0, 0, :2].float() if return_features else images[:, 0, 0, :1].float()

    torch.jit.script(Two()).save(str(tmp_path / "two.pt"))
    rng = np.random.default_rng(0)
    bytes_ = [np.clip(rng.normal(mean, std, (1_200, 2)), 0, 255) for mean, std in ((100, 10), (120, 20))]
    sides = []
    for side in bytes_:
        images = torch.zeros(len(side), 3, 2, 2)
        images[:, 0, 0] = torch.from_numpy(side).float() / 127.5 - 1
        sides.append([images])
    found = metrics.distances(*sides, features=str(tmp_path / "two.pt"))
    assert found.fid == pytest.approx(2 * (20**2 + 10**2), rel=0.15)


def test_what_cannot_be_measured_is_said() -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(DataError, match="two images"):
        metrics.distances([images], [images[:1]])
    with pytest.raises(ConfigError, match="neither digits"):
        metrics.distances([images], [images], features="inception")


def test_the_digit_network_is_always_the_same() -> None:
    images, label = digits()
    first = metrics.digit_network()
    features = first(metrics.to_bytes(images))
    assert 0.5 < features.square().mean().item() < 2, "KID's kernel is cubic: large features would drown it"
    assert (first.head(features * first.scale).argmax(1).numpy() == label).mean() > 0.95
    metrics.digit_network.cache_clear()
    assert torch.equal(metrics.digit_network()(metrics.to_bytes(images[:50])), features[:50])


def test_grid_is_read_row_by_row() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = np.asarray(metrics.grid(images, 3))
    assert sheet.shape == (8, 12, 3)
    assert sheet[[0, 0, 0, 4, 4, 4], [0, 4, 8, 0, 4, 8], 0].tolist() == [0, 64, 128, 191, 255, 0]
    assert metrics.grid(images).size == (12, 8)
