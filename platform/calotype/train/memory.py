"""Bytes that one rank holds of a model in training, without its activations (Rajbhandari et al. 2020, section 3).

The paper's 16 bytes per parameter are others here: weights are float32 always, for autocast works inside the module.
Of P parameters on W ranks, in bytes, at the highest point of a step:

                torch          zero0          zero1          zero2          zero3
    weights     4 P            4 P            4 P + 4 P/W    4 P + 4 P/W    4 P/W + 4 min(P, LIVE)
    gradients   4 P            4 P            4 P + 4 P/W    8 P/W          8 P/W
    moments     8 P            8 P            8 P/W          8 P/W          8 P/W
    EMA         4 P            4 P            4 P/W          4 P/W          4 P/W
    buffers     0              4 min(P, JOIN) 4 B            4 B            4 B

The second P/W of a gradient is the copy that its optimizer steps on.  LIVE is how many gathered weights DeepSpeed may
keep at stage 3, which for models below it are all of them.  A bucket of B elements is reduced while it fills: on a GPU
there are two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET = 50_000_000  # elements, at most: as train/engine.py tells DeepSpeed
JOIN = 500_000_000  # gradients that its stage 0 joins for one reduction, elements
LIVE = 1_000_000_000  # its stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    moments: int
    ema: int
    buffers: int

    @property
    def whole(self) -> int:
        return self.weights + self.gradients + self.moments + self.ema + self.buffers


def per_rank(parameters: int, world: int, kind: str, stage: int, ema: bool, gpu: bool) -> Memory:
    """
    Args:
        kind, stage: of the engine; `torch` has no stages.
        ema: an average is kept.
    """
    whole, part = 4 * parameters, 4 * -(-parameters // world)
    if kind == "torch" or stage == 0:
        joined = 4 * min(parameters, JOIN) if kind == "deepspeed" and world > 1 else 0
        return Memory(whole, whole, 2 * whole, whole * ema, joined)
    bucket = 4 * min(parameters, BUCKET) * (2 if gpu else 1)
    weights = whole + part if stage < 3 else part + 4 * min(parameters, LIVE)
    gradients = whole + part if stage == 1 else 2 * part
    return Memory(weights, gradients, 2 * part, part * ema, bucket)
