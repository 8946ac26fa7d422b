"""Bytes that one rank holds of a model in training, without its activations (Rajbhandari et al. 2020, section 3).

The paper's 16 bytes per parameter are others here: weights are float32 always, for autocast works inside the module.
Of P parameters on W ranks, in units of 4 bytes, at the highest point of a step:

                torch   zero0         zero1          zero2               zero3
    weights     P       P             P + P/W        P + P/W             P/W + 2 min(P, LIVE)
    gradients   P       P             max(P, 2 P/W)  max(P/W + B, 2 P/W) 2 P/W
    moments     2 P     2 P           2 P/W          2 P/W               2 P/W
    each EMA    P       P             P/W            P/W                 P/W
    buffers     0       min(P, JOIN)  B, 2 B on GPU  B, 2 B on GPU       2 B

A bucket of B elements is reduced when it is full; where communication overlaps there are two of them.  The optimizer
steps on a flat copy of its gradients.  Weights that stage 3 gathered are seen to stay until others were gathered: small
ones that it keeps are views of buffers with large ones in them.  So below LIVE weights it saves no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.config import EMA

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


def averages(ema: EMA) -> int:
    """How many averages of its weights a training keeps."""
    return 1 + len(ema.halflives) if ema.halflife else 0


def per_rank(parameters: int, world: int, kind: str, stage: int, averages: int, gpu: bool) -> Memory:
    """
    Args:
        kind, stage: of the engine; `torch` has no stages.
        averages: of the weights, that are kept.
    """
    whole, part = 4 * parameters, 4 * -(-parameters // world)
    if kind == "torch" or stage == 0:
        joined = 4 * min(parameters, JOIN) if kind == "deepspeed" else 0
        return Memory(whole, whole, 2 * whole, whole * averages, joined)
    bucket = 4 * min(parameters, BUCKET)
    if stage == 3:
        return Memory(part + 8 * min(parameters, LIVE), 2 * part, 2 * part, part * averages, 2 * bucket)
    unreduced = whole if stage == 1 else part + bucket
    return Memory(whole + part, max(unreduced, 2 * part), 2 * part, part * averages, bucket * (2 if gpu else 1))
