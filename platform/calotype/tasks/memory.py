"""Whether training a denoiser fits into the memory of its workers, at which ZeRO stage, with how many images at once.

No weight is made for it: model/cost.py runs the network without numbers, train/memory.py holds the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from calotype import checks
from calotype.config import TrainDenoiser
from calotype.errors import ConfigError
from calotype.train.batching import largest_share, micro_batch
from calotype.train.memory import Memory, averages, per_rank

ROOM = 0.9  # of a worker's memory; the rest is the device's own, kernels' workspaces, and what is lost between blocks
STAGES = (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))


@dataclass(frozen=True)
class Need:
    """Of a network: its parameters, and bytes of activations, per micro-batch (`once`) and per image (`each`)."""

    checkpoint_activations: bool
    parameters: int
    once: int
    each: int


@dataclass(frozen=True)
class Option:
    """One way to train: what a worker holds, and the largest micro-batch that fits (0: none), up to its share.

    Attributes:
        engine: as it is typed: torch, zero0 ... zero3.
        offload: none | cpu.
        memory: without activations.
        once, each: bytes of activations, per micro-batch and per image.
        bytes: of the micro-batch that the settings ask for.
    """

    engine: str
    offload: str
    checkpoint_activations: bool
    memory: Memory
    once: int
    each: int
    micro_batch: int
    bytes: int


def refuse_too_big(config: TrainDenoiser) -> None:
    """On submit, where the memory of a worker's device is known: an engine that will not fit there.

    Raises:
        ConfigError: names the settings that would.
    """
    if not (config.cluster.gpus and config.cluster.memory_gb):
        return
    memory, again = round(config.cluster.memory_gb * 1e9), config.engine.checkpoint_activations
    needs = measured(config, again)
    mine = chosen(config, options(config, needs, memory))
    if mine.bytes > ROOM * memory:
        way = " ".join(advice(config, options(config, needs + measured(config, not again), memory)))
        how = f"engine={mine.engine}{' engine.offload=cpu' if mine.offload == 'cpu' else ''}"
        raise ConfigError(
            f"{how} with {wanted(config)} images per forward takes {mine.bytes / 1e9:.3g} GB of each "
            f"worker's cluster.memory_gb={config.cluster.memory_gb:g}, of which a tenth is left free: "
            + (f"set {way}" if way else "no ZeRO stage fits even one image, use more workers or a smaller denoiser")
        )


def measured(config: TrainDenoiser, *checkpointed: bool) -> list[Need]:
    """What the network needs without and with activations checkpointed, as is asked: seconds for each."""
    from calotype.model import cost

    shape, gpu = checks.latent_shape(config.autoencoder, config.encoding.resolution), bool(config.cluster.gpus)
    parameters, found = cost.parameters(config, shape), []
    for again in checkpointed:
        how = replace(config, engine=replace(config.engine, checkpoint_activations=again))
        kept = cost.activations(how, shape, gpu)
        found.append(Need(again, parameters, kept.once, kept.each))
    return found


def options(config: TrainDenoiser, needs: Sequence[Need], memory: int) -> list[Option]:
    """Every engine for each of the needs: what is the slowest last, so by offload, by activations, by stage."""
    gpu, means, made = bool(config.cluster.gpus), averages(config.ema), []
    share = largest_share(config.train.batch, config.cluster.least)
    places = ("none", "cpu") if gpu or config.engine.offload == "cpu" else ("none",)  # else it is the same memory
    for offload, need in product(places, sorted(needs, key=lambda need: need.checkpoint_activations)):
        for kind, stage in STAGES if offload == "none" else STAGES[-3:]:
            held = per_rank(need.parameters, config.cluster.least, kind, stage, means, gpu, offload)
            states = held.whole + need.once + (0 if gpu else held.host)
            made.append(
                Option(
                    engine=kind if kind == "torch" else f"zero{stage}",
                    offload=offload,
                    checkpoint_activations=need.checkpoint_activations,
                    memory=held,
                    once=need.once,
                    each=need.each,
                    micro_batch=min(max(int((ROOM * memory - states) // max(need.each, 1)), 0), share),
                    bytes=states + need.each * wanted(config),
                )
            )
    return made


def advice(config: TrainDenoiser, found: Sequence[Option]) -> list[str]:
    """Settings of the smallest stage at which the micro-batch fits that they ask for; else the one that holds most.
    Offloaded only if not even one image fits without."""
    mine = chosen(config, found)
    staged = [one for one in found if one.micro_batch and (one.engine != "torch" or mine.engine == "torch")]
    staged = [one for one in staged if one.offload == staged[0].offload]
    fits = [one for one in staged if one.micro_batch >= wanted(config)]
    if not staged:
        return []
    best = fits[0] if fits else max(staged, key=lambda one: one.micro_batch)
    words = [f"engine={best.engine}"]
    if best.micro_batch < wanted(config) or config.engine.micro_batch:
        words.append(f"engine.micro_batch={min(best.micro_batch, wanted(config))}")
    if best.checkpoint_activations:
        words.append("engine.checkpoint_activations=true")
    if "cpu" in (best.offload, config.engine.offload):
        words.append(f"engine.offload={best.offload}")
    return words


def chosen(config: TrainDenoiser, found: Sequence[Option]) -> Option:
    """The option that the settings choose."""
    engine = config.engine
    name = engine.kind if engine.kind == "torch" else f"zero{engine.stage}"
    mine = (name, engine.offload, engine.checkpoint_activations)
    return next(one for one in found if (one.engine, one.offload, one.checkpoint_activations) == mine)


def wanted(config: TrainDenoiser) -> int:
    """Images per forward that the settings ask for, on the fewest workers, which have the most each."""
    return micro_batch(config, config.cluster.least)
