"""How the global batch is cut: a share for each rank, micro-batches of a share.  Without torch: also read on submit."""

from __future__ import annotations

import math
from typing import Any


def largest_share(batch: int, world: int) -> int:
    """Samples of the global batch that the rank with the most has; another rank may have one less."""
    return math.ceil(batch / world)


def micro_batch(config: Any, world: int) -> int:
    """Samples per forward on one worker, the same on every one.

    Args:
        config: has `train` and `engine`.
        world: at most `train.batch` workers (checks.py): each has a share.
    """
    most = largest_share(config.train.batch, world)
    return min(config.engine.micro_batch or most, most)


def accumulation(micro: int, batch: int, world: int) -> int:
    """Micro-batches per step: as many as the rank with the largest share needs."""
    return math.ceil(largest_share(batch, world) / micro)
