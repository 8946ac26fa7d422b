"""The step in plain PyTorch, and what it has in common with DeepSpeed's: autocast, AdamW, clip, where weights lie."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.environment import Worker


@dataclass(frozen=True)
class Piece:
    """`count` elements of parameter `name` from its flat index `begin` on: where they lie."""

    name: str
    begin: int
    count: int
    partition: int  # index of the partition
    rank: int  # whose partition; if the engine replicates, every rank has them, and this one saves them
    start: int  # first element there


class Cast(nn.Module):
    """Autocast inside the module, so that every engine computes alike (DeepSpeed undoes one put around it)."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.kind = torch.device(device).type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(*args, **kwargs)


def adamw(parameters: list[nn.Parameter], optim: config.Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], limit: float, scale: float) -> Tensor:
    """Unscale gradients and clip their global norm in place; gives the unclipped norm, a scalar, without waiting."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / scale
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else torch.ones_like(norm)
    if limit or scale != 1.0:
        torch._foreach_mul_(grads, factor / scale)
    return norm


class Plain:
    """PyTorch alone; data parallel where there are several workers."""

    replicated = True

    def __init__(self, module: nn.Module, optim: config.Optim, worker: Worker) -> None:
        self.module = module.to(worker.device)
        self.parameters = list(module.parameters())
        self.limit = optim.clip
        self.optimizer = adamw(self.parameters, optim)
        self.partitions: Sequence[Tensor] = self.parameters
        self.pieces = dealt(module, worker.world)
        self.parallel: nn.parallel.DistributedDataParallel | None = None
        if worker.world > 1:
            devices = [torch.device(worker.device)] if worker.device.startswith("cuda") else None
            with warnings.catch_warnings():  # the new name of broadcast_buffers is younger than the torch we allow
                warnings.simplefilter("ignore", FutureWarning)
                self.parallel = nn.parallel.DistributedDataParallel(
                    module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def forward(self, last: bool, *args: Any, **kwargs: Any) -> Any:
        if self.parallel is None or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        self.parallel.require_backward_grad_sync = last  # what `no_sync` sets
        return self.parallel(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool, scale: float) -> None:
        (loss * scale if scale != 1.0 else loss).backward()

    def step(self, scale: float) -> Tensor:
        norm = clip(self.parameters, self.limit, scale)
        if scale == 1.0 or math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def refresh(self) -> None:
        """The module's parameters are the partitions."""


def named(cast: nn.Module) -> list[tuple[str, Any]]:
    """Parameters by their names in the user's module."""
    return [(name.removeprefix("module."), parameter) for name, parameter in cast.named_parameters()]


def dealt(cast: nn.Module, world: int) -> list[Piece]:
    """Every parameter is a partition of its own, on every rank; each rank saves an equal share of their elements."""
    parameters = named(cast)
    total, offset = sum(p.numel() for _, p in parameters), 0
    bounds = [total * rank // world for rank in range(world + 1)]
    pieces = []
    for index, (name, parameter) in enumerate(parameters):
        for rank in range(world):
            low, high = max(offset, bounds[rank]), min(offset + parameter.numel(), bounds[rank + 1])
            if low < high:
                pieces.append(Piece(name, low - offset, high - low, index, rank, low - offset))
        offset += parameter.numel()
    return pieces
