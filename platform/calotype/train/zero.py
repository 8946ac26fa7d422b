"""What DeepSpeed is told of ZeRO, as plain data; the bytes that follow from it are in train/memory.py."""

from __future__ import annotations

from typing import Any

from calotype import config

BUCKET = 50_000_000  # gradients that are reduced together, weights that are gathered together: elements, at most


def settings(parameters: int, engine: config.Engine, accumulation: int, clip: float, gpu: bool) -> dict[str, Any]:
    """
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
