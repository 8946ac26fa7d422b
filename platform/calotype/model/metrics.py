"""How good images are: PSNR; SSIM, FID and KID (torchmetrics); and whether a drawn digit is the one asked for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calotype.errors import ConfigError, DataError

SUBSET = 1000  # images in each of KID's subsets (Binkowski et al. 2018); fewer where there are fewer images


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB; (B, 3, H, W) in [-1, 1], clipped as a PNG would be -> (B,).

    Not torchmetrics', which takes a second to import: workers of a cache need nothing else of it.
    """
    return -10 * (_unit(images) - _unit(reference)).square().mean(dim=(1, 2, 3)).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004); (B, 3, H, W) in [-1, 1] -> (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(_unit(images), _unit(reference), data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(len(images))


@dataclass(frozen=True)
class Distances:
    """Distances between two sets of images, and how they were measured."""

    fid: float
    kid: float
    kid_std: float
    real: int
    drawn: int
    features: str


def distances(
    real: Iterable[Tensor], drawn: Iterable[Tensor], features: str = "digits", device: str = "cpu", seed: int = 0
) -> Distances:
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) between batches of (B, 3, H, W) images in [-1, 1].

    Args:
        features: `digits`, or the path of a TorchScript Inception that takes uint8 images.
        seed: of KID's random subsets.

    Raises:
        DataError: fewer than two images on a side.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    extract = extractor(features).to(device)
    sides = {True: _features(extract, real, device), False: _features(extract, drawn, device)}
    if min(len(side) for side in sides.values()) < 2:
        raise DataError(
            f"FID needs at least two images on each side: {len(sides[True])} real, {len(sides[False])} drawn"
        )
    size = min(SUBSET, max(2, min(map(len, sides.values())) // 2))  # halves: a subset of all would have no spread
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that KID keeps all features; so do we
        fid = FrechetInceptionDistance(feature=_Given(sides[True].shape[1]))
        kid = KernelInceptionDistance(feature=_Given(sides[True].shape[1]), subsets=100, subset_size=size)
    for metric in (fid, kid):
        for is_real, side in sides.items():
            metric.update(side, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = kid.compute()
    return Distances(float(fid.compute()), float(mean), float(std), len(sides[True]), len(sides[False]), features)


def extractor(features: str) -> nn.Module:
    """A module from uint8 images (B, 3, H, W) to features (B, D), on the CPU."""
    if features == "digits":
        return digit_network()
    if not Path(features).is_file():
        raise ConfigError(f"features={features!r} is neither digits nor the path of a TorchScript Inception")
    loaded = torch.jit.load(features, map_location="cpu").eval()
    arguments = [argument.name for argument in loaded.forward.schema.arguments]
    return _Features(loaded) if "return_features" in arguments else loaded


class _Features(nn.Module):
    """NVIDIA's TorchScript Inception gives class probabilities unless it is asked for features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.network(images, return_features=True)
        return made


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: its inputs are the features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def _features(extract: nn.Module, batches: Iterable[Tensor], device: str) -> Tensor:
    found: list[Tensor] = []
    for batch in batches:
        made = extract(to_bytes(batch).to(device))
        made = made[0] if isinstance(made, tuple | list) else made
        found.append(made.flatten(1).double().cpu())
    return torch.cat(found) if found else torch.zeros(0, 1)


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded and clipped."""
    return (_unit(images) * 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int = 0) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] -> one picture, row by row; `columns` = 0 makes it about square."""
    count, _, height, width = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), max(count, 1))
    rows = -(-count // columns)
    sheet = np.zeros((max(rows, 1) * height, columns * width, 3), np.uint8)
    for index, picture in enumerate(to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


# ------------------------------------------------------------------------------------------------- the digits


def eight(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> ink 0..16 on 8x8, (B, 64): the form of scikit-learn's digits."""
    grey = _unit(images).mean(1, keepdim=True)
    return nn.functional.interpolate(grey, size=(8, 8), mode="bilinear", antialias=True).flatten(1) * 16


@functools.lru_cache(maxsize=1)
def _real() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data, found.target  # (1797, 64) in 0..16, (1797,)


@dataclass(frozen=True)
class Recogniser:
    """An SVM trained on four fifths of the real digits; `accuracy` is its share right on the rest."""

    svm: Any
    accuracy: float

    def __call__(self, images: Tensor) -> np.ndarray[Any, Any]:
        """(B, 3, H, W) in [-1, 1] -> the digit each one shows, (B,)."""
        return np.asarray(self.svm.predict(eight(images.float().cpu()).numpy()))


def held_out_digits() -> np.ndarray[Any, Any]:
    """Which of scikit-learn's digits the SVM has not seen, (1797,) bool: a random fifth, since they lie in order."""
    return np.asarray(np.random.default_rng(0).random(len(_real()[1])) < 0.2)


@functools.lru_cache(maxsize=1)
def recogniser() -> Recogniser:
    from sklearn.svm import SVC

    data, label = _real()
    held_out = held_out_digits()
    svm = SVC(gamma=0.001, C=10.0).fit(data[~held_out], label[~held_out])
    return Recogniser(svm, float(svm.score(data[held_out], label[held_out])))


class DigitNetwork(nn.Module):
    """A small classifier of digits; its features are what its last layer reads."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> features (B, 64), of mean square 1 over the real digits."""
        made: Tensor = self.body(eight(images.float() / 127.5 - 1).reshape(-1, 1, 8, 8) / 16)
        return made / self.scale


@functools.lru_cache(maxsize=1)
def digit_network() -> DigitNetwork:
    """The classifier behind `features=digits`, trained here on all real digits: a few seconds, always the same."""
    data, label = _real()
    x, y = torch.from_numpy(data).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(label).long()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = DigitNetwork()
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network.head(network.body(x[rows])), y[rows]).backward()
                optimizer.step()
        network.scale.fill_(network.body(x).square().mean().sqrt().item())  # KID's kernel is cubic: keep it near 1
    return network.eval().requires_grad_(False)


def _unit(images: Tensor) -> Tensor:
    return (images.float().clamp(-1, 1) + 1) / 2
