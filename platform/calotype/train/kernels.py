"""How a module computes on its device, and saying so: layout, TF32, compiling.

With which kernel attention is computed is PyTorch's choice, call by call: here is said what it may choose.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.environment import Worker

log = logging.getLogger(__name__)

ATTENTION = {  # kernel -> whether it is allowed
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}


def choose(module: nn.Module, engine: config.Engine, worker: Worker) -> None:
    """Make the module compute as the settings say, in place; to be called once autocast is inside of it.

    Latents become channels_last, weights stay as they are: the flat buffers of ZeRO 1 and 2 would undo their strides,
    and cuDNN brings its weights into the layout of its input (PyTorch, "Channels Last Memory Format").  Uncompiled it
    changes nothing on a GPU, where GroupNorm answers in channels first (H200, UNet of SD 2 at 512 px: 105 and 106
    images/s); cudnn.benchmark changed nothing either (104, 106).
    """
    cuda = worker.device.startswith("cuda")
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = engine.tf32
    if engine.channels_last:
        module.register_forward_pre_hook(_channels_last, with_kwargs=True)
    if engine.compile != "none":
        module.compile(mode=engine.compile)
    if worker.rank == 0:
        log.info("computes with %s", said(engine, cuda))


def said(engine: config.Engine, cuda: bool) -> str:
    """What was chosen, and what PyTorch may choose, in a line."""
    words = [f"{engine.precision} on fp32 weights" if engine.precision != "fp32" else "fp32"]
    if cuda:
        words.append(f"TF32 {'on' if engine.tf32 else 'off'}")
        allowed = " | ".join(name for name, on in ATTENTION.items() if on())
        words.append(f"attention of PyTorch, which may choose {allowed or 'math'}")
    else:
        words.append("attention of PyTorch")
    words.append("channels_last" if engine.channels_last else "channels first")
    words.append(f"torch.compile {engine.compile}" if engine.compile != "none" else "not compiled")
    return ", ".join([*words, "fused AdamW" + (" in host memory" if engine.offload == "cpu" else "")])


def _channels_last(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def turned(value: Any) -> Any:
        image = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if image else value

    return tuple(turned(value) for value in args), {name: turned(value) for name, value in kwargs.items()}
