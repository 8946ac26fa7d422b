"""What a training spends while it runs: arithmetic per second, the share of the device's peak that is, and money."""

from __future__ import annotations

import time
from collections.abc import Mapping

from calotype import runs
from calotype.config import TrainDenoiser
from calotype.environment import Worker


class Spent:
    """Figures of rank 0, made from those of the loop.

    Args:
        shape: (C, h, w) of a latent; of several shapes that of the largest, so that the figures are at most that.
    """

    def __init__(
        self, config: TrainDenoiser, worker: Worker, shape: tuple[int, int, int], record: runs.Record | None
    ) -> None:
        from calotype.model import cost

        self.first, self.world, self.price = worker.rank == 0, worker.world, config.cluster.price
        self.flops = cost.flops_per_image(config, shape) if self.first else 0.0
        self.peak = config.cluster.peak_tflops or cost.peak_tflops(worker.device, config.engine.precision)
        self.began, self.before = time.monotonic(), runs.lived(record) if record and self.first else 0.0

    def figures(self, seen: Mapping[str, float]) -> dict[str, float]:
        """`tflops` of one worker, `mfu_percent` where its peak is known, and `cost` so far where its price is.

        Forward and backward count once, however often activations are computed (Chowdhery et al. 2022, appendix B).

        Args:
            seen: `images_per_second` of all workers.
        """
        if not self.first:
            return {}
        made = {"tflops": self.flops * seen["images_per_second"] / self.world / 1e12}
        if self.peak:
            made["mfu_percent"] = 100 * made["tflops"] / self.peak
        if self.price:
            made["cost"] = (self.before + time.monotonic() - self.began) / 3600 * self.world * self.price
        return made
