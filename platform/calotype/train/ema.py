"""Averaged weights, partitioned exactly like the fp32 master weights they average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from calotype.config import EMA


def decay(ema: EMA, images: int, batch: int) -> float:
    """What of the old average is kept by a step of `batch` images that ends with `images` seen.

    beta = 0.5 ** (batch / halflife), the halflife ramped up to keep early, bad weights short-lived
    (Karras et al. 2024, section 3; the ramp as in Karras et al. 2022, appendix F).
    """
    halflife = min(ema.halflife, images * ema.rampup) if ema.rampup else ema.halflife
    return float(0.5 ** (batch / halflife)) if halflife > 0 else 0.0


class Average:
    """The averages of a list of fp32 tensors: flat partitions under ZeRO, parameters otherwise."""

    def __init__(self, weights: Sequence[torch.Tensor], ema: EMA) -> None:
        self.ema = ema
        self.weights = list(weights)
        self.shadow = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """One fused pass over everything this rank owns."""
        weight = 1.0 - decay(self.ema, images, batch)
        torch._foreach_lerp_(self.shadow, [weight_.detach() for weight_ in self.weights], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages in place, one tensor of extra memory at a time; twice is the identity."""
        for weight, mean in zip(self.weights, self.shadow, strict=True):
            held = weight.detach().clone()
            weight.data.copy_(mean)
            mean.copy_(held)


def averages(weights: Sequence[torch.Tensor], ema: EMA | None) -> dict[str, Average]:
    """ "ema" for `ema.halflife`, "ema@HALFLIFE" for each of `ema.halflives`; each starts from the weights."""
    if ema is None or not ema.halflife:
        return {}
    made = {"ema": Average(weights, ema)}
    return made | {f"ema@{halflife}": Average(weights, replace(ema, halflife=halflife)) for halflife in ema.halflives}
