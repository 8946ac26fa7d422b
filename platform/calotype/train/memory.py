"""Bytes that one rank holds of a model in training, without its activations (Rajbhandari et al. 2020, section 3).

The paper's 16 bytes per parameter are others here: weights are float32 always, for autocast works inside the module.
Of P parameters on W ranks, in units of 4 bytes, at the highest point of a step:

                torch   zero0         zero1          zero2               zero3
    weights     P       P             P + P/W        P + P/W             2 P/W + 2 (LIVE + AHEAD)
    gradients   P       P             P + P/W        max(P/W + B, 2 P/W) 2 P/W
    moments     2 P     2 P           2 P/W          2 P/W               2 P/W
    each EMA    P       P             P/W            P/W                 P/W
    buffers     0       min(P, JOIN)  B, 2 B on GPU  B, 2 B on GPU       2 B

A bucket of B elements is reduced when it is full; where communication overlaps there are two of them.  The optimizer
steps on a flat copy of its gradients.  Stage 3 has its own part of the weights twice, though both are float32, for
DeepSpeed compares a device with its name; what it gathers lies in one buffer first, then in the weights.

With engine.offload=cpu the optimizer and all that it reads and writes lie in host memory (Ren et al. 2021, section 3),
and with stage 3 the weights' own parts too (Rajbhandari et al. 2021, section 5.1):

                zero1          zero2          zero3
    weights     P              P              2 (LIVE + AHEAD)
    gradients   P              B              B
    buffers     B, 2 B on GPU  B, 2 B on GPU  2 B
    in host memory: master weights, gradients and what is copied to or from the device, P/W each (stage 3: one more),
    moments, 2 P/W, and each EMA, P/W.  Gradients of several micro-batches are one more P/W with stage 2.

Beside them the device holds one parameter, the largest, on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.config import EMA
from calotype.train import zero

JOIN = 500_000_000  # gradients that DeepSpeed's stage 0 joins for one reduction, elements


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; `host`: beside the memory of its device, if something is offloaded."""

    weights: int
    gradients: int
    moments: int
    ema: int
    buffers: int
    host: int = 0

    @property
    def whole(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.moments + self.ema + self.buffers


def averages(ema: EMA) -> int:
    """How many averages of its weights a training keeps."""
    return 1 + len(ema.halflives) if ema.halflife else 0


def per_rank(
    parameters: int, world: int, kind: str, stage: int, averages: int, gpu: bool, offload: str = "none"
) -> Memory:
    """Bytes of one of `world` ranks.

    Args:
        kind, stage: of the engine; `torch` has no stages.
        averages: of the weights, that are kept.
        offload: none | cpu.
    """
    whole, part = 4 * parameters, 4 * -(-parameters // world)
    if kind == "torch" or stage == 0:
        joined = 4 * min(parameters, JOIN) if kind == "deepspeed" else 0
        return Memory(whole, whole, 2 * whole, whole * averages, joined)
    bucket = 4 * min(parameters, zero.BUCKET)
    buffers = bucket * (2 if gpu or stage == 3 else 1)
    gathered = 8 * (zero.live(parameters) + zero.ahead(parameters))
    if offload == "cpu":
        host = part * ((6 if stage == 3 else 5) + averages)
        return Memory(gathered if stage == 3 else whole, whole if stage == 1 else bucket, 0, 0, buffers, host)
    if stage == 3:
        return Memory(2 * part + gathered, 2 * part, 2 * part, part * averages, buffers)
    gradients = whole + part if stage == 1 else max(part + bucket, 2 * part)
    return Memory(whole + part, gradients, 2 * part, part * averages, buffers)
