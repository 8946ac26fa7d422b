"""The step in plain PyTorch, and what it has in common with DeepSpeed's: autocast, AdamW, clip, where weights lie."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.environment import Worker


@dataclass(frozen=True)
class Placed:
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


class Brake:
    """Holds back steps of AdamW: one that is not taken leaves weights, moments and its count of steps as they are.

    Works for whoever calls `optimizer.step`, at any ZeRO stage, once the gradient's norm is known and before a weight
    changes.  (PyTorch's fused AdamW leaves everything alone where `found_inf` is one.)

    Args:
        norm: the unclipped norm of the step that is being taken.
    """

    def __init__(self, optimizer: Any, norm: Callable[[], Tensor]) -> None:
        self.norm = norm
        self.judge: Callable[[Tensor], bool] | None = None  # norm -> whether to take the step; collective
        self.taken: bool | None = None  # the step now; None: nobody has judged it
        self.one = torch.ones(())
        optimizer.register_step_pre_hook(self._before)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.judge is None:
            return
        assert type(optimizer) is torch.optim.AdamW, "no other knows found_inf"
        assert optimizer.defaults["fused"]
        if self.taken is None:  # ZeRO 3 steps part by part
            self.taken = self.judge(self.norm())
        optimizer.found_inf = None if self.taken else self.one  # type: ignore[attr-defined]

    def verdict(self, norm: Tensor, again: bool) -> bool:
        """Whether the step was taken, after it; `again`: one that the engine itself left out is judged now."""
        if self.judge is not None and self.taken is None and again:
            self.taken = self.judge(norm)
        taken, self.taken = self.taken is not False, None
        return taken


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], limit: float, scale: float) -> tuple[Tensor, Sequence[Tensor]]:
    """Unscale gradients and clip their global norm in place.

    Returns:
        The unclipped norm, a scalar, without waiting; and what it is made of, scaled norms by parameter.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(grads)
    norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else torch.ones_like(norm)
    if limit or scale != 1.0:
        torch._foreach_mul_(grads, factor / scale)
    return norm, norms


class Plain:
    """PyTorch alone; data parallel where there are several workers."""

    replicated = True

    def __init__(self, module: nn.Module, optim: config.Optim, worker: Worker) -> None:
        self.module = module.to(worker.device)
        self.parameters = list(module.parameters())
        self.limit = optim.clip
        self.norm = torch.zeros(())
        self.norms: Sequence[Tensor] = ()
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
        norm, self.norms = clip(self.parameters, self.limit, scale)
        self.norm = norm
        if scale == 1.0 or math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def refresh(self) -> None:
        """The module's parameters are the partitions."""


def named(cast: nn.Module) -> list[tuple[str, Any]]:
    """Parameters by their names in the user's module."""
    return [(name.removeprefix("module."), parameter) for name, parameter in cast.named_parameters()]


def dealt(cast: nn.Module, world: int) -> list[Placed]:
    """Every parameter is a partition of its own, on every rank; each rank saves an equal share of their elements."""
    parameters = named(cast)
    total, offset = sum(p.numel() for _, p in parameters), 0
    bounds = [total * rank // world for rank in range(world + 1)]
    pieces = []
    for index, (name, parameter) in enumerate(parameters):
        for rank in range(world):
            low, high = max(offset, bounds[rank]), min(offset + parameter.numel(), bounds[rank + 1])
            if low < high:
                pieces.append(Placed(name, low - offset, high - low, index, rank, low - offset))
        offset += parameter.numel()
    return pieces
