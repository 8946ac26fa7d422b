"""What one image of training costs a denoiser: arithmetic and memory, without a weight or a number being made.

The network runs once, forward and backward, on tensors that have shapes and no data.  Arithmetic is that of matrix
products, convolutions and attention, a multiplication and an addition being two; what is computed again, by fused
attention or for checkpointed activations, counts once.  Memory is that of all tensors alive, at its highest.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calotype import config
from calotype.data.npy import mask_of
from calotype.model.build import checkpoint_activations
from calotype.model.denoiser import Denoiser, build_denoiser

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[int, int, int]  # (C, h, w) of a latent
FEW = 4  # images of the smaller measurement

# Dense, TFLOP/s: (bf16 and fp16, TF32, fp32 without tensor cores), by NVIDIA's data sheets of each; where they count
# zeros that are left out ("with sparsity"), half of it.  A10G, which is not A10: "NVIDIA A10G Tensor Core GPU" for AWS,
# d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf.  RTX 4090: "NVIDIA Ada
# GPU Architecture", with sums in fp32.
PEAKS = {
    "H200": (989.4, 494.7, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A10G": (70.0, 35.0, 35.0),
    "A10": (125.0, 62.5, 31.2),
    "L4": (121.0, 60.0, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
}


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and its backward take beside weights and their gradients: `each` image, and `once`."""

    each: int
    once: int  # per micro-batch of any size: weights in the lower precision, mostly


def parameters(settings: config.TrainDenoiser, shape: Shape) -> int:
    """All of them are trained: of the UNet, and of the text encoders trained with it."""
    return sum(parameter.numel() for parameter in _bare(settings, shape).parameters())


def flops_per_image(settings: config.TrainDenoiser, shape: Shape) -> float:
    """Of a forward and a backward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _bare(settings, shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"):
        model(*_inputs(settings, model, shape, 1)).mean().backward()
    return float(counter.get_total_flops())


def activations(settings: config.TrainDenoiser, shape: Shape, gpu: bool) -> Activations:
    """At the highest point between two steps; the workspaces of kernels come on top.

    Args:
        gpu: normalisation layers compute in float32 there under autocast too (PyTorch's "Autocast Op Reference").
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Tensors without data of a CPU, not of "meta": so that attention is the fused one, which keeps no matrix of n x n.
    with FakeTensorMode():
        model = build_denoiser(_fresh(settings), shape)
        if settings.engine.checkpoint_activations:
            checkpoint_activations(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_forget)
        for module in model.modules() if gpu else ():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.register_forward_pre_hook(_in_float32)
        few, many = (_highest(settings, model, shape, count) for count in (FEW, 2 * FEW))
    each = (many - few) // FEW
    return Activations(each, max(few - FEW * each, 0))


def peak_tflops(device: str, precision: str, tf32: bool) -> float:
    """Dense peak of the device that this worker has; 0 where the data sheet is not known.

    Args:
        tf32: `engine.tf32`: float32 is rounded to TF32, and runs on tensor cores.
    """
    if not device.startswith("cuda"):
        return 0.0
    words = f" {torch.cuda.get_device_name(device)} ".replace("-", " ")
    half, rounded, full = next((peak for name, peak in PEAKS.items() if f" {name} " in words), (0.0, 0.0, 0.0))
    if precision in LOWER:
        return half
    return rounded if tf32 else full


# ---------------------------------------------------------------------------------------------- without data


def _fresh(settings: config.TrainDenoiser) -> config.TrainDenoiser:
    return replace(settings, denoiser=replace(settings.denoiser, init_from=""))


def _bare(settings: config.TrainDenoiser, shape: Shape) -> Denoiser:
    with torch.device("meta"):
        return build_denoiser(_fresh(settings), shape)


def _inputs(settings: config.TrainDenoiser, model: Denoiser, shape: Shape, count: int) -> tuple[Any, ...]:
    """Latents, timesteps and stored conditions of `count` images."""
    cond: dict[str, Tensor] = {}
    for name, condition in settings.conditions.items():
        if condition.kind == "class":
            cond[name] = torch.zeros(count, dtype=torch.long)
        elif condition.mode == "tokens":
            cond[name] = torch.zeros(count, condition.length, dtype=torch.long)
        else:
            assert model.conditioner.cross_dim is not None
            cond[name] = torch.zeros(count, condition.length, model.conditioner.cross_dim, dtype=torch.float16)
            if condition.mode == "masked":
                cond[mask_of(name)] = torch.ones(count, condition.length, dtype=torch.bool)
    return torch.zeros(count, *shape), torch.zeros(count, dtype=torch.long), cond


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _in_float32(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].float(), *inputs[1:]


def _highest(settings: config.TrainDenoiser, model: Denoiser, shape: Shape, count: int) -> int:
    """Bytes alive at once, at most, between a micro-batch and its last gradient; without the weights."""
    precision = settings.engine.precision
    lower = torch.autocast("cpu", LOWER.get(precision, torch.bfloat16), enabled=precision in LOWER)
    inputs = _inputs(settings, model, shape, count)
    with _Alive() as alive:
        with lower:
            made = model(*inputs)
        made.square().mean().backward()
    return alive.highest


class _Alive(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still there; `highest`: at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.highest = 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            if (number := tensor.untyped_storage()._cdata) not in given and number not in self.known:
                self._add(number, tensor.untyped_storage())
        return made

    def _add(self, number: int, storage: Any) -> None:
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            self.known.pop(number, None)

        self.known[number] = weakref.ref(storage, gone)
        self.now += size
        self.highest = max(self.highest, self.now)
