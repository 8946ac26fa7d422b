"""Statistics of a latent cache: sums over each shard, merged into what the trainer whitens by and the gate looks at."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from calotype.data.cache import LATENT
from calotype.data.npy import from_npy
from calotype.data.shards import Sample
from calotype.errors import DataError

Statistics = dict[str, Any]


def of_samples(samples: Iterable[Sample]) -> Statistics:
    """Sums over the stored latents of one shard, in float64, in stored order: a function of the shard's bytes alone.

    Returns:
        `count` of positions per channel, `sum` and `squares` of the mean and `variance` of the posterior per channel,
        `largest` absolute mean, `labels`, the number of classes that the largest label needs, and `cut` captions.
    """
    count, largest, labels, cut = 0, 0.0, 0, 0
    sums: np.ndarray[Any, Any] = np.zeros((3, 0))
    for sample in samples:
        latent = from_npy(sample.members[LATENT]).astype(np.float64)
        mean, std = latent[0], latent[1] if len(latent) == 2 else np.zeros_like(latent[0])
        if not sums.size:
            sums = np.zeros((3, len(mean)))
        sums += np.stack([mean, mean**2, std**2]).sum(axis=(2, 3))
        count += mean[0].size
        largest = max(largest, float(np.abs(mean).max()))
        about = json.loads(bytes(sample.members["json"]))
        label = about.get("label")  # a number, or what nothing was conditioned on
        labels, cut = max(labels, label + 1 if isinstance(label, int) else 0), cut + ("cut" in about)
    total, squares, variance = sums.tolist()
    return {
        "count": count,
        "sum": total,
        "squares": squares,
        "variance": variance,
        "largest": largest,
        "labels": labels,
        "cut": cut,
    }


def merge(parts: Iterable[Statistics]) -> dict[str, Any]:
    """Statistics of shards, in the manifest's order -> `channel_mean`, `channel_std` of drawn latents;
    `channel_signal`, the share of their variance that is the image's; `largest`, `labels`, `captions_cut`.

    Var z = E[mean^2 + std^2] - E[mean]^2 for z = mean + std * noise, of which Var mean is signal.  A channel whose
    posterior collapsed has none: it is noise whatever the image (Burda et al. 2016, section 5.2, count active units by
    Var mean alone, where the prior fixes the scale).

    Raises:
        DataError: a channel is constant, so that nothing could be scaled by it.
    """
    parts = list(parts)
    count, sums = 0, np.zeros((3, 1))
    for part in parts:
        count += part["count"]
        sums = sums + np.array([part["sum"], part["squares"], part["variance"]])
    mean = sums[0] / count
    variance = (sums[1] + sums[2]) / count - mean**2
    constant = np.flatnonzero(variance <= 1e-12 * (1 + mean**2))
    if len(constant):
        raise DataError(f"latent channel {constant[0]} is the same everywhere: the autoencoder has collapsed, or all "
                        "images are alike")  # fmt: skip
    return {
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(variance).tolist(),
        "channel_signal": np.clip(1 - sums[2] / count / variance, 0, 1).round(6).tolist(),
        "largest": max(part["largest"] for part in parts),
        "labels": max(part["labels"] for part in parts),
        "captions_cut": sum(part["cut"] for part in parts),
    }
