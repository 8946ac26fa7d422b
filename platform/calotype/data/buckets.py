"""Aspect buckets: the few sizes that images of all shapes are resized to, so that batches can be made of them.

A size has both sides a multiple of `step` and no more pixels than a square of `resolution`; of the heights that a width
allows it has the largest.  Each image goes to the size whose aspect ratio is nearest to its own, by the logarithm, so
that 2:1 is as far from a square as 1:2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]  # (width, height) in pixels


def sizes(resolution: int, step: int, aspect: float) -> list[Size]:
    """From the widest to the tallest; just the square for step 0.

    Args:
        aspect: the longer side of a size over its shorter side, at most.
    """
    if not step:
        return [(resolution, resolution)]
    found = {(resolution, resolution)}
    for width in range(step, resolution, step):
        height = resolution**2 // width // step * step
        if height <= aspect * width:
            found |= {(width, height), (height, width)}
    return sorted(found, key=lambda size: (size[1] / size[0], size))


def nearest(width: int, height: int, sizes: Sequence[Size]) -> int:
    """Which of the sizes an image goes to; of two that are as near, the first."""
    return min(range(len(sizes)), key=lambda at: abs(math.log(width * sizes[at][1] / (height * sizes[at][0]))))
