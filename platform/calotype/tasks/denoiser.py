"""Train the denoiser: cached latents -> the network that predicts their noise (Rombach et al. 2022, sections 3.2, 3.3).

resolve -> train (on every worker): stream -> rows (draw, whiten, drop) -> step; validate, draw, checkpoint
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from calotype import compose, runs, track
from calotype.config import TrainDenoiser
from calotype.data import Dataset, cache
from calotype.data.draws import Purpose, philox
from calotype.data.npy import mask_of
from calotype.data.shards import Sample
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import ConfigError, DataError
from calotype.tasks import batches, memory, start
from calotype.tasks.cache import resolve_inputs
from calotype.tasks.start import NAME
from calotype.train import batching, checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from calotype.data.manifest import Manifest
    from calotype.train.engine import Engine

Array = np.ndarray[Any, Any]
HELD_OUT = 4096  # held-out latents that the validation loss looks at
VALIDATION = 2**62  # their noise is drawn at positions that training never reaches
SHOWN = 16  # images in the grid of an unconditional model


# ------------------------------------------------------------------------------------------------ on submit


def resolve(config: TrainDenoiser) -> TrainDenoiser:
    """Names become digests, and what cannot be trained is refused.

    Raises:
        CalotypeError: no cache for this model, nothing to start from, or a setting that cannot be.
    """
    config = resolve_inputs(config)
    root = open_store(config.root)
    found = cache.load_cache(root, config)
    latents = root.at("latents", cache.encoding_id(found.meta["encoding"]))
    if not found.split("train"):
        raise ConfigError(f"dataset {config.data.name} has no training images: prepare it with a smaller data.held_out")
    config = replace(config, data=batches.resolve(config.data, config.root, (latents, found)))
    batches.check(config, batches.source_of(config.data, config.root, latents, found)("train"))
    memory.refuse_too_big(config)
    config = start.resolve(replace(config, cache=found.digest))
    record = runs.load(config.root, compose.identity("train_denoiser", config))
    if record is not None and not runs.done("train_denoiser", config):
        held = cache.held_digest(root, compose.build(TrainDenoiser, record.config))
        _refuse_superseded(record, held, found.digest)
    return config


def _refuse_superseded(record: runs.Record | None, held: str, newest: str) -> None:
    """Positions in the order of one manifest mean nothing in that of another; and its shards may be gone.

    Raises:
        DataError: samples were taken down from the cache since the manifest that a run holds.
    """
    if record is None or newest == held:
        return
    way = "with another seed"
    if checkpoint.latest(record.artifacts) is not None:
        way = f"from its weights, with denoiser.init_from=run:{record.name} and another name"
    raise DataError(
        f"train_denoiser {record.name} began with manifest {held[:8]} of its cache, of which samples were taken down "
        f"since: it cannot go on in an order that is gone; start a new run {way}"
    )


# ----------------------------------------------------------------------------------------------- on workers


def train(config: TrainDenoiser, worker: Worker, record: runs.Record | None = None) -> dict[str, Any]:
    """One worker's part of training; the same command goes on from the newest checkpoint.

    The newest checkpoint of the run is all that drawing, evaluation and export need.

    Returns:
        `loss`, `validation_loss`, `images`, `images_per_second`, `data_wait_percent`, `goodput` and the other last
        figures; empty when the worker was asked to stop before the end.
    """
    from calotype.model import conditioner
    from calotype.model.diffusion import Diffusion
    from calotype.tasks.spent import Spent
    from calotype.train import loop
    from calotype.train.engine import Engine

    root = open_store(config.root)
    manifest = cache.load_cache(root, config)
    _refuse_superseded(record, config.cache or manifest.digest, manifest.digest)
    latents = root.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    diffusion = Diffusion(config.diffusion)
    micro = batching.micro_batch(config, worker.world)
    model = start.build(config, cache.shape_of(manifest.meta["encoding"]), record)
    steps = batching.accumulation(micro, config.train.batch, worker.world)
    engine = Engine(model, config.optim, config.engine, worker, steps, config.ema)
    rows = Rows(config, manifest, conditioner.empty(config.conditions))
    source_of = batches.source_of(config.data, config.root, latents, manifest)
    held_out = HeldOut(config, worker, source_of("held_out"), rows, micro)
    grid = Grid(config, worker, manifest)
    spent = Spent(config, worker, cache.shape_of(manifest.meta["encoding"]), record)

    def step(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAME: losses(engine, diffusion, part)}

    stream = batches.stream(config, source_of("train"), worker, _arrays(config))
    task = loop.Task(
        engines={NAME: engine},
        batches=stream.seek,
        left_out=lambda: stream.skipped,
        retries=lambda: stream.retries,
        also=spent.figures,
        spent=spent.state,
        resumed=spent.resumed,
        where=stream.where,
        keep_start=config.denoiser.init_from.startswith("run:"),  # whose `keep` deletes what this one began from
        prepare=lambda share: rows.of(share.arrays, share.positions.tolist()),
        step=step,
        validate=lambda: held_out.validate(engine, diffusion),
        draw=lambda: grid.draw(engine, diffusion),
        begin=lambda tracker: tell_inputs(tracker, config, manifest),
        saved=lambda tracker, images: tell_model(tracker, record, images),
    )
    try:
        figures = loop.run(task, config, worker, record)
    except DataError:
        _refuse_superseded(record, manifest.digest, cache.load_cache(root, config).digest)
        raise
    if figures.pop("stopped"):
        return {}
    return {**figures, **spent.figures(figures), "flops_per_image": spent.flops}


def _arrays(config: TrainDenoiser) -> tuple[str, ...]:
    """What is read of each stored sample."""
    return ("latent", *([cache.MIRRORED] if config.train.flip else []), *config.conditions)


def losses(engine: Engine, diffusion: Any, part: Mapping[str, Tensor]) -> Tensor:
    """Per-sample losses (n,) of the denoiser on prepared rows (Rombach et al. 2022, eq. 3)."""
    noisy = diffusion.add_noise(part["latent"], part["noise"], part["timestep"])
    target = diffusion.target(part["latent"], part["noise"], part["timestep"])
    cond = {name.removeprefix("cond."): value for name, value in part.items() if name.startswith("cond.")}
    loss: Tensor = diffusion.loss(engine(noisy, part["timestep"], cond), target)
    return loss * diffusion.weight(part["timestep"]) if diffusion.settings.min_snr_gamma else loss


class Rows:
    """Stored samples -> what a step sees: `latent`, `noise` (n, C, h, w), `timestep` (n,), `cond.<name>[.mask]`.

    All that is random about a sample is drawn by its position in the stream, so it is the same on any worker.
    """

    def __init__(self, config: TrainDenoiser, manifest: Manifest, empty: Mapping[str, Tensor]) -> None:
        self.config, self.empty = config, dict(empty)
        self.mean, self.std = manifest.meta["channel_mean"], manifest.meta["channel_std"]
        self.shapes = [tuple(shape) for shape in manifest.meta.get("buckets", [manifest.meta["shape"]])]
        # sorted: the order in which conditions are written down is not part of what a run is
        self.drops = {name: config.conditions[name].drop for name in sorted(config.conditions)}

    def of(
        self, stored: Mapping[str, np.ndarray[Any, Any]], positions: list[int], drop: bool = True
    ) -> dict[str, Tensor]:
        """Rows of stored samples (`cache.stacked`) at these positions; `drop` False keeps all conditions.

        Where there are latents of mirrored images too, half of them are taken.
        """
        import torch

        from calotype.model.conditioner import dropped
        from calotype.model.diffusion import draw_timestep

        seed, latent = self.config.seed, torch.from_numpy(stored["latent"])
        if cache.MIRRORED in stored:
            flips = torch.tensor([philox(seed, position, Purpose.FLIP).random() < 0.5 for position in positions])
            latent = torch.where(flips.view(-1, 1, 1, 1, 1), torch.from_numpy(stored[cache.MIRRORED]), latent)
        shape, std = latent[:, 0].shape, latent[:, 1] if latent.shape[1] == 2 else None
        posterior = None if std is None else self._normal(Purpose.POSTERIOR, positions, shape)
        # raw latents => drawn, whitened model latents
        made = cache.to_model(latent[:, 0], std, posterior, self.mean, self.std)
        times = [draw_timestep(self.config.diffusion, philox(seed, at, Purpose.TIMESTEP)) for at in positions]
        rows = {
            "latent": made,
            "noise": self._normal(Purpose.NOISE, positions, shape),
            "timestep": torch.tensor(times),
        }
        names = [key for name in self.drops for key in (name, mask_of(name)) if key in stored]
        cond = {name: torch.from_numpy(stored[name]) for name in names}
        if drop and self.drops:
            chances = torch.tensor(
                np.stack([philox(seed, at, Purpose.DROP).random(len(self.drops)) for at in positions])
            )
            masks = {name: chances[:, place] < chance for place, (name, chance) in enumerate(self.drops.items())}
            cond = dropped(cond, self.empty, masks)
        return rows | {f"cond.{name}": value for name, value in cond.items()}

    def _normal(self, purpose: Purpose, positions: list[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers of `shape` (n, C, h, w)."""
        import torch

        drawn = np.empty(shape, np.float32)
        for row, position in zip(drawn, positions, strict=True):
            philox(self.config.seed, position, purpose).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(drawn)


class HeldOut:
    """The held-out latents, dealt to the workers; the same noise every time, so that losses can be compared."""

    def __init__(self, config: TrainDenoiser, worker: Worker, dataset: Dataset, rows: Rows, micro: int) -> None:
        self.config, self.worker, self.dataset, self.rows, self.micro = config, worker, dataset, rows, micro
        self.count = min(HELD_OUT, len(dataset))
        self._prepared: list[tuple[dict[str, Tensor], int]] = []

    def validate(self, engine: Engine, diffusion: Any) -> dict[str, float]:
        """Exact means over the held-out split; {} without one.  Collective.

        `validation_loss` is that of the averaged weights; `validation_loss_ema_HALFLIFE` of those of further averages.
        """
        if not self.count:
            return {}
        world = min(self.worker.world, self.count)
        self._prepared = self._prepared or self._prepare(world)
        first, *others = engine.averages or ["ema"]
        figures = {"validation_loss": self._loss(engine, diffusion, first, self.worker.rank < world)}
        for which in others:
            name = f"validation_loss_ema_{which.removeprefix('ema@')}"
            figures[name] = self._loss(engine, diffusion, which, self.worker.rank < world)
        return figures

    def _loss(self, engine: Engine, diffusion: Any, which: str, own: bool) -> float:
        import torch

        from calotype.train.feed import take

        total = torch.zeros((), dtype=torch.float64, device=self.worker.device)
        with engine.averaged(which):
            for rows, calls in self._prepared:
                for first in range(0, calls * self.micro, self.micro):
                    part, weight = take(rows, first, self.micro, self.worker.device)
                    total += (losses(engine, diffusion, part).double() * weight).sum() * own
        if self.worker.world > 1:
            torch.distributed.all_reduce(total)
        return float(total) / self.count

    def _prepare(self, world: int) -> list[tuple[dict[str, Tensor], int]]:
        """This worker's rows of every shape, and in how many calls all workers go through them.  Collective."""
        import torch

        from calotype.train.feed import PRESENT

        rank = self.worker.rank % world  # with fewer latents than workers some repeat another's, weightless
        first, last = rank * self.count // world, (rank + 1) * self.count // world
        groups: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
        for index, sample in enumerate(islice(self.dataset.samples(), first, last), first):
            shape = cache.decode_sample(sample, ())["latent"].shape
            groups.setdefault(shape[1:], []).append((index, sample))
        sizes = torch.tensor([len(groups.get(shape, ())) for shape in self.rows.shapes], device=self.worker.device)
        if self.worker.world > 1:
            torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
        like = next(iter(groups.values()))[:1]
        prepared = []
        for shape, size in zip(self.rows.shapes, sizes.tolist(), strict=True):
            members = groups.get(shape) or like
            stored = cache.stacked([sample for _, sample in members], self.config.conditions, self.dataset.lengths)
            rows = self.rows.of(stored, [VALIDATION + index for index, _ in members], drop=False)
            if shape not in groups:  # another worker has some: this one steps along, weightless
                zeros = torch.zeros(1, *shape)
                rows |= {"latent": zeros, "noise": zeros, PRESENT: torch.zeros(1)}
            prepared.append((rows, math.ceil(size / self.micro)))
        return prepared


class Grid:
    """Pictures of `prompts` while it trains, drawn with the averaged weights by all workers together."""

    def __init__(self, config: TrainDenoiser, worker: Worker, manifest: Manifest) -> None:
        self.config, self.worker = config, worker
        self.meta = manifest.meta
        self.prompts = list(config.prompts) if config.conditions else [""] * SHOWN
        self._autoencoder: Any = None

    def draw(self, engine: Engine, diffusion: Any) -> Any:
        """A PIL image on rank 0, None elsewhere and without prompts.  Collective."""
        import torch

        from calotype.model import conditioner
        from calotype.model.metrics import grid
        from calotype.model.sampler import sample

        if not self.prompts:
            return None
        device, world = self.worker.device, self.worker.world
        each = math.ceil(len(self.prompts) / world)  # the same number of calls everywhere: ZeRO-3 gathers in each
        mine = [(self.worker.rank * each + i) % len(self.prompts) for i in range(each)]
        cond = conditioner.prompted(self.config.conditions, [self.prompts[i] for i in mine], device)
        empty = conditioner.empty(self.config.conditions, device)
        shape = cache.shape_of(self.meta["encoding"])
        seeds = [self.config.seed + index for index in mine]
        with engine.averaged():
            drawn = sample(engine, diffusion, self.config.sampler, cond, empty, shape, seeds, device)
        if world > 1:
            parts = [torch.empty_like(drawn) for _ in range(world)]
            torch.distributed.all_gather(parts, drawn.contiguous())
            drawn = torch.cat(parts)
        if self.worker.rank:
            return None
        raw = cache.from_model(drawn[: len(self.prompts)], self.meta["channel_mean"], self.meta["channel_std"])
        return grid(self._decode(raw.cpu()))

    def _decode(self, raw: Tensor) -> Tensor:
        from calotype.model.autoencoder import load_autoencoder

        if self._autoencoder is None:
            self._autoencoder = load_autoencoder(self.config.autoencoder).eval().requires_grad_(False)
        made: Tensor = self._autoencoder.decode(raw)
        return made


# -------------------------------------------------------------------------------------------------- lineage


def tell_inputs(tracker: track.Tracker, config: TrainDenoiser, manifest: Manifest) -> None:
    """The cache, and the run that trained the autoencoder, where one of ours did."""
    root = open_store(config.root)
    name = cache.cache_id(cache.encoding_id(manifest.meta["encoding"]), config.data.digest)
    used = runs.makers(config.root, "train_autoencoder", config.autoencoder.path)
    tracker.inputs([track.Dataset(f"{config.data.name} latents", manifest.digest, root.at("caches", name).uri)], used)


def tell_model(tracker: track.Tracker, record: runs.Record | None, images: int) -> None:
    assert record is not None
    tracker.model(NAME, checkpoint.place(record.artifacts, images).uri, "diffusion", images)
