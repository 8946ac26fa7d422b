"""What DeepSpeed is told of ZeRO, as plain data; the bytes that follow from it are in train/memory.py."""

from __future__ import annotations

from typing import Any

from calotype import config

BUCKET = 50_000_000  # gradients that are reduced together, weights that are gathered together: elements, at most
LIVE = 8  # stage 3 keeps a gathered weight for its next use if less than 1/LIVE of the model is used before it
AHEAD = 16  # it gathers up to 1/AHEAD of the model ahead of its use
SMALL = 1000  # and has weights of at most 1/SMALL of the model whole always


def settings(parameters: int, engine: config.Engine, accumulation: int, clip: float, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config, a dict; sizes in elements.

    Args:
        parameters: elements of the whole model.
        accumulation: micro-batches per step.
        clip: of the gradient's norm; 0 does not.
    """
    bucket = min(parameters + parameters % 2, BUCKET)  # it allocates whole ones, of an even size: none beyond the model
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": gpu,
    }
    if engine.stage == 3:
        # DeepSpeed's own are numbers of elements: a model below a billion would lie whole on each worker from its first
        # step on, for no weight is given back that is used again within so many, as all are in the backward pass.
        zero["stage3_max_reuse_distance"] = zero["stage3_max_live_parameters"] = live(parameters)
        zero["stage3_prefetch_bucket_size"] = ahead(parameters)
        zero["stage3_param_persistence_threshold"] = min(parameters // SMALL, 100_000)
    if engine.offload == "cpu":  # pinned, or the GPU would wait for every copy
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        if engine.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # nothing of ours depends on it
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip if engine.stage else 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on CPUs too, and can leave a step out
    }


def live(parameters: int) -> int:
    """Elements that stage 3 keeps gathered for their next use."""
    return min(parameters // LIVE, 1_000_000_000)


def ahead(parameters: int) -> int:
    """Elements that stage 3 gathers before they are used."""
    return min(parameters // AHEAD, BUCKET)
