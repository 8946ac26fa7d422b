"""What a training spends while it runs: arithmetic per second, the share of the device's peak that is, and money."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

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
        engine = config.engine
        self.peak = config.cluster.peak_tflops or cost.peak_tflops(worker.device, engine.precision, engine.tf32)
        self.began, self.before = time.monotonic(), runs.lived(record) if record and self.first else 0.0
        self.earlier = self.before * self.world  # worker-seconds until now

    def resumed(self, state: Mapping[str, Any]) -> None:
        """Time until the checkpoint, and since for an attempt that ended after it, is of the workers that there were.

        Args:
            state: of the checkpoint; older versions kept no `spent`: all attempts count as if they had as many as now.
        """
        if known := state.get("spent"):
            lost = max(self.before - known["seconds"], 0.0)
            self.earlier = known["worker_seconds"] + lost * state["world"]

    def state(self) -> dict[str, float]:
        """For a checkpoint, of rank 0: seconds of all attempts, and the same times the workers that each had."""
        here = time.monotonic() - self.began
        return {"seconds": self.before + here, "worker_seconds": self.earlier + here * self.world}

    def figures(self, seen: Mapping[str, float]) -> dict[str, float]:
        """`tflops` of one worker, `mfu_percent` where its peak is known, and `cost` so far where its price is.

        Forward and backward count once, however often activations are computed (Chowdhery et al. 2022, appendix B).

        Args:
            seen: `images_per_second` of all workers; not known of the first step alone.
        """
        if not self.first:
            return {}
        made: dict[str, float] = {}
        if rate := seen.get("images_per_second"):
            made["tflops"] = self.flops * rate / self.world / 1e12
            if self.peak:
                made["mfu_percent"] = 100 * made["tflops"] / self.peak
        if self.price:
            made["cost"] = self.state()["worker_seconds"] / 3600 * self.price
        return made
