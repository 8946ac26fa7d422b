"""Forward, backward, step, and named fp32 states in and out: plain PyTorch or DeepSpeed ZeRO 0-3.

Whoever takes the step, the arithmetic is the same: fp32 weights, autocast inside the module, gradients averaged over
ranks in fp32, one global norm clip, AdamW.  So losses agree between stages and world sizes, and a checkpoint of one
loads into any other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calotype import config
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.train import kernels, zero
from calotype.train.ema import averages
from calotype.train.plain import Brake, Cast, Placed, Plain, adamw, clip, dealt, named
from calotype.train.shares import Copies, Share, take_over, whole_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_SCALE, SCALE_GROWTH = 2.0**16, 2000  # fp16 loss scale, and the good steps after which it doubles

# {"weights" | "exp_avg" | "exp_avg_sq" | "ema" | "ema@HALFLIFE": {parameter name: fp32 tensor}}
States = dict[str, dict[str, Tensor]]


class Backend(Protocol):
    """Who owns the weights and takes the step; all of it is collective."""

    partitions: Sequence[Tensor]  # fp32 master weights of this rank, on the CPU if offloaded; keys of optimizer.state
    pieces: list[Placed]
    replicated: bool
    optimizer: Any  # torch.optim.AdamW

    @property
    def norm(self) -> Tensor: ...  # of the step that is being taken, before clipping

    norms: Sequence[Tensor]  # of each parameter with a gradient, where they are known

    def forward(self, last: bool, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor, last: bool, scale: float) -> None: ...
    def step(self, scale: float) -> Tensor: ...  # unclipped gradient norm; non-finite means that no step was taken
    def refresh(self) -> None: ...  # partitions were written: bring the module up to date


class Engine:
    """A module that trains.

    Args:
        module: fp32, the same initial weights on every rank; all parameters require gradients.
        accumulation: micro-batches per step, the same on every rank.
        ema: None or halflife 0 for no average.

    Raises:
        ConfigError: fp16 without a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: config.Optim,
        engine: config.Engine,
        worker: Worker,
        accumulation: int = 1,
        ema: config.EMA | None = None,
    ) -> None:
        if engine.precision == "fp16" and not worker.device.startswith("cuda"):
            raise ConfigError("engine.precision=fp16 needs a GPU: set engine.precision=bf16 or fp32")
        assert all(p.requires_grad for p in module.parameters()), "frozen modules belong outside the engine"
        assert all(p.dtype == torch.float32 for p in module.parameters())
        self.module = module
        self.worker = worker
        self.accumulation = accumulation
        self.loss_scale = FIRST_SCALE if engine.precision == "fp16" else 1.0
        self.dynamic = engine.precision == "fp16"
        self._good, self._micro = 0, 0
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        cast = Cast(module, DTYPES[engine.precision], worker.device)
        kernels.choose(cast, engine, worker)
        join(worker, engine.kind)
        self._backend: Backend
        if engine.kind == "deepspeed":
            self._backend = Zero(cast, optim, engine, worker, accumulation)
        else:
            self._backend = Plain(cast, optim, worker)
        self.brake = Brake(self._backend.optimizer, lambda: self._backend.norm)
        self._averages = averages(self._backend.partitions, ema)
        self._copies = Copies([piece for piece in self._backend.pieces if piece.rank == worker.rank], worker.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, in the engine's precision; the same number of calls on every rank."""
        return self._backend.forward(self._micro == self.accumulation - 1, *args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; the last of a step averages them over ranks."""
        self._backend.backward(loss, self._micro == self.accumulation - 1, self.loss_scale)
        self._micro += 1

    def step(self, lr: float, images: int, batch: int) -> Tensor:
        """Clip, step, average.

        Args:
            images: seen when this step ends.
            batch: global batch, images.

        Returns:
            Norm of the gradient before clipping, a scalar; not finite means that this training is over.  With fp16,
            steps whose scaled gradients overflow are skipped (norm 0) while the scale finds its place.

        Raises:
            CalotypeError: fp16 overflows at any scale.
        """
        assert self._micro == self.accumulation, f"{self._micro} of {self.accumulation} micro-batches"
        self._micro = 0
        for group in self._backend.optimizer.param_groups:
            group["lr"] = lr
        norm = self._backend.step(self.loss_scale)
        taken = not self.dynamic or math.isfinite(float(norm))
        if self.dynamic:
            self._rescale(taken)
            norm = norm if taken else torch.zeros_like(norm)
        taken = self.brake.verdict(norm, again=taken) and taken
        for average in self._averages.values() if taken else ():
            average.update(images, batch)
        return norm

    def layer_norms(self) -> dict[str, float]:
        """Gradient norms by parameter of the step that is being judged; {} where gradients are partitioned."""
        with_gradient = [name for name, p in self.module.named_parameters() if p.grad is not None]
        norms = [float(norm) / self.loss_scale for norm in self._backend.norms]
        return dict(zip(with_gradient, norms, strict=True)) if len(norms) == len(with_gradient) else {}

    def _rescale(self, taken: bool) -> None:
        self._good = self._good + 1 if taken else 0
        if not taken:
            if self.loss_scale <= 1.0:
                raise CalotypeError("gradients overflow fp16 at any loss scale: set engine.precision=bf16 or fp32")
            self.loss_scale /= 2
        elif self._good % SCALE_GROWTH == 0:
            self.loss_scale *= 2

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """Those that are saved, where they are now: a module that goes to a GPU has others than before."""
        persistent = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}

    @property
    def averages(self) -> list[str]:
        """What `averaged` knows: "ema" first, then "ema@HALFLIFE" of the others; empty without."""
        return list(self._averages)

    @contextlib.contextmanager
    def averaged(self, which: str = "ema") -> Iterator[None]:
        """Inside, the module computes with the averaged weights (without an average: with the current ones)."""
        was_training = self.module.training
        self.module.eval()
        self._swap(which)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(which)
            self.module.train(was_training)

    def _swap(self, which: str) -> None:
        if self._averages:
            self._averages[which].swap()
            self._backend.refresh()

    # ---------------------------------------------------------------------------------------- states in and out

    def share(self) -> tuple[Share, dict[str, float]]:
        """This rank's share of all states, as they are now, copied to the host; and scalars.

        The memory is that of the share before, which must have been written by now.
        """
        first = self.worker.rank == 0
        scalars = self._scalars()  # before the copies, for which nobody is to wait here
        buffers = {name: buffer.detach().to("cpu", copy=True) for name, buffer in self._buffers.items() if first}
        kinds, ready = self._copies.take(self._kinds())
        pieces = [(piece.name, piece.begin, piece.count) for piece in self._copies.pieces]
        return Share(self._shapes, pieces, kinds, buffers, ready), scalars

    def states(self) -> tuple[States, dict[str, float]]:
        """Named whole fp32 tensors on rank 0's CPU, empty on the others, and scalars everywhere.  Collective."""
        made = {kind: whole_tensors(tensors, *self._layout()) for kind, tensors in self._kinds().items()}
        if self.worker.rank == 0:
            for kind in made.keys() - set(MOMENTS):
                made[kind].update({name: buffer.detach().cpu() for name, buffer in self._buffers.items()})
        return made, self._scalars()

    def _layout(self) -> tuple[dict[str, tuple[int, ...]], list[Placed], bool, Worker]:
        return self._shapes, self._backend.pieces, self._backend.replicated, self.worker

    def _kinds(self) -> dict[str, Sequence[Tensor]]:
        """What a state is made of, partition by partition."""
        partitions = self._backend.partitions
        kinds: dict[str, Sequence[Tensor]] = {"weights": partitions}
        kinds |= {moment: [self._moments(part)[moment] for part in partitions] for moment in MOMENTS}
        return kinds | {kind: average.shadow for kind, average in self._averages.items()}

    def _scalars(self) -> dict[str, float]:
        taken = float(self._moments(self._backend.partitions[0])["step"])
        return {"adam_step": taken, "loss_scale": self.loss_scale, "good_steps": float(self._good)}

    def needs(self) -> list[tuple[str, int, int]]:
        """(parameter, first element, how many) of all that `load` reads on this rank."""
        every = self._backend.replicated
        mine = [piece for piece in self._backend.pieces if every or piece.rank == self.worker.rank]
        return [(piece.name, piece.begin, piece.count) for piece in mine]

    def load(self, states: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, float]) -> None:
        """Take over what `states` gave at any world size and stage.  Collective.

        An average that is not in `states` starts from the weights.
        """
        backend = self._backend
        for kind, tensors in self._kinds().items():
            named = states.get(kind, states["weights"]) if kind in self._averages else states[kind]
            take_over(named, tensors, *self._layout())
        for part in backend.partitions:
            self._moments(part)["step"].fill_(scalars["adam_step"])
        for name, buffer in self._buffers.items():
            buffer.copy_(states["weights"][name])
        if self.dynamic:
            self.loss_scale, self._good = float(scalars["loss_scale"]), int(scalars["good_steps"])
        backend.refresh()

    def _moments(self, partition: Tensor) -> dict[str, Tensor]:
        """Adam's state of a partition, made as Adam's first step would make it."""
        state = self._backend.optimizer.state[partition]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(partition, memory_format=torch.preserve_format).detach()
        return state


def join(worker: Worker, kind: str) -> None:
    """Make sure there is a process group where one is needed: a single worker talks to itself, without any port."""
    if dist.is_initialized() or (worker.world == 1 and kind == "torch"):
        return
    assert worker.world == 1, "whoever starts several workers joins them"
    backend = "nccl" if worker.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


class Zero:
    """DeepSpeed: stage 0 replicates, 1 and 2 partition optimizer and fp32 weights, 3 the module's weights too."""

    def __init__(
        self, module: nn.Module, optim: config.Optim, engine: config.Engine, worker: Worker, accumulation: int
    ) -> None:
        deepspeed = import_deepspeed(worker)
        self.stage = engine.stage
        self.replicated = self.stage == 0
        self.limit = optim.clip
        self.norms: Sequence[Tensor] = ()
        self.parameters = list(module.parameters())
        elements = sum(p.numel() for p in self.parameters)
        settings = zero.settings(elements, engine, accumulation, optim.clip, worker.device.startswith("cuda"))
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=adamw(self.parameters, optim), config=settings, dist_init_required=False
        )
        self.zero = self.engine.optimizer  # stage 0: the AdamW itself
        self.optimizer = self.zero.optimizer if self.stage else self.engine.optimizer
        self.partitions: Sequence[Tensor] = self.parameters
        if self.stage == 0:
            self.pieces = dealt(module, worker.world)
        elif self.stage < 3:
            self.partitions = self.zero.single_partition_of_fp32_groups
            self.pieces = self._pieces_of_groups(module, worker.world)
        else:
            self.partitions = self.zero.fp32_partitioned_groups_flat
            self.pieces = self._pieces_of_weights(module, worker.world)

    def forward(self, last: bool, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool, scale: float) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.stage == 0:
            loss = loss * scale if scale != 1.0 else loss
        elif scale != 1.0:
            self.zero.override_loss_scale(scale)
        self.engine.backward(loss, scale_wrt_gas=False)

    @property
    def norm(self) -> Tensor:
        if self.stage == 0:
            return self._norm
        return torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32)  # get_global_grad_norm: a step late

    def step(self, scale: float) -> Tensor:
        if self.stage:
            self.engine.step()  # skips by itself, on all ranks alike, when the norm is not finite
            return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)
        norm, self.norms = clip(self.parameters, self.limit, scale)
        self._norm = norm
        if scale == 1.0 or math.isfinite(float(norm)):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero.parameter_offload.partition_all_parameters()  # or the whole copies of small weights stay stale
            for flat, part in zip(self.zero.fp16_partitioned_groups_flat, self.partitions, strict=True):
                flat.data.copy_(part.data)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _pieces_of_groups(self, module: nn.Module, world: int) -> list[Placed]:
        """Stages 1 and 2: parameters are views of one flat buffer per group, cut into `world` equal partitions."""
        pieces = []
        for index, (flat, part) in enumerate(zip(self.zero.bit16_groups_flat, self.partitions, strict=True)):
            first, size = flat.data_ptr(), part.numel()
            for name, parameter in named(module):
                offset = (parameter.data_ptr() - first) // flat.element_size()
                if 0 <= offset < flat.numel() and parameter.untyped_storage().data_ptr() == (
                    flat.untyped_storage().data_ptr()
                ):
                    for rank in range(offset // size, (offset + parameter.numel() - 1) // size + 1):
                        low, high = max(offset, rank * size), min(offset + parameter.numel(), (rank + 1) * size)
                        pieces.append(Placed(name, low - offset, high - low, index, rank, low - rank * size))
        return pieces

    def _pieces_of_weights(self, module: nn.Module, world: int) -> list[Placed]:
        """Stage 3: every parameter is cut into `world` equal pieces, the last ones padded."""
        pieces = []
        for name, parameter in named(module):
            index, start, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            for rank in range(world):
                count = min(size, parameter.ds_numel - rank * size)
                if count > 0:
                    pieces.append(Placed(name, rank * size, count, index, rank, start))
        return pieces


def import_deepspeed(worker: Worker) -> Any:
    """DeepSpeed on this worker's device, on the process group that is there, saying warnings only."""
    if worker.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(worker.local_rank))
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "engine.kind=deepspeed but DeepSpeed is not installed: "
            "pip install 'calotype[deepspeed]' or set engine=torch"
        ) from error
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a decorator in there would load the whole compiler: seconds of each start
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)  # DeepSpeed's calls
    # Its shared-memory collectives are compiled on first use: half a minute, and a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=None
    )
    return deepspeed
