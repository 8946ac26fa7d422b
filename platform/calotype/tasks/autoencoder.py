"""Train the autoencoder: images => KL-regularised latents => images (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calotype.config import TrainAutoencoder
from calotype.data import Dataset, images
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import load_dataset
from calotype.data.shards import Sample
from calotype.data.store import Store
from calotype.environment import Worker
from calotype.errors import ConfigError, DataError
from calotype.runs import Record
from calotype.tasks import batches
from calotype.train import batching

if TYPE_CHECKING:
    from torch import Tensor

    from calotype.data.stream import Batch
    from calotype.model.autoencoder import Autoencoder
    from calotype.train.engine import Engine

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

NAME = "autoencoder"  # of the engine, and of the folder among the run's artifacts that has one folder per length
KEPT = 2**30  # bytes of decoded images that a worker keeps
HELD_OUT = 1024  # held-out images that are measured
SHOWN = 32  # images in a grid


def resolve(config: TrainAutoencoder) -> TrainAutoencoder:
    """The dataset's name becomes its digest.

    Raises:
        CalotypeError: there is no such dataset, or it has nothing to train on.
    """
    dataset = load_dataset(_dataset_store(config), config.data.digest)
    if not dataset.split("train"):
        raise ConfigError(f"dataset {config.data.name} has no training images: prepare it with a smaller data.held_out")
    data = replace(config.data, digest=dataset.digest)
    resolved = replace(config, data=batches.resolve(data, config.root))
    batches.check(resolved, batches.source_of(resolved.data, config.root, _dataset_store(config), dataset)("train"))
    return resolved


def train(config: TrainAutoencoder, worker: Worker, record: Record) -> dict[str, Any]:
    """One worker's part of training; the same command goes on from the newest checkpoint.

    Returns:
        `psnr_heldout`, `ssim_heldout`, `images`, `images_per_second`, `encoder_digest` and the last figures; empty when
        the worker was asked to stop before the end.
    """
    import torch

    from calotype.model.autoencoder import load_autoencoder
    from calotype.model.build import checkpoint_activations
    from calotype.train import loop
    from calotype.train.engine import Engine

    store = _dataset_store(config)
    dataset = load_dataset(store, config.data.digest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # every worker starts from the same weights
        model = load_autoencoder(config.autoencoder)
    if config.engine.checkpoint_activations:
        checkpoint_activations(model)
    micro = batching.micro_batch(config, worker.world)
    engine = Engine(
        model, config.optim, config.engine, worker, batching.accumulation(micro, config.train.batch, worker.world)
    )
    decode = Decoder(config.resolution, config.data.max_pixels)
    source_of = batches.source_of(config.data, config.root, store, dataset)
    held_out = HeldOut(config, worker, source_of("held_out"), decode)

    stream = batches.stream(config, source_of("train"), worker, decode=decode)
    task = loop.Task(
        engines={NAME: engine},
        batches=stream.seek,
        left_out=lambda: stream.skipped,
        retries=lambda: stream.retries,
        where=stream.where,
        prepare=lambda share: prepared(share, config),
        step=lambda rows: step(engine, rows, config),
        validate=lambda: held_out.validate(engine),
        draw=lambda: held_out.draw(engine),
    )
    figures = loop.run(task, config, worker, record)
    if figures.pop("stopped"):
        return {}
    if "psnr_heldout" not in figures:
        figures.update(held_out.validate(engine))
    states, _ = engine.states()
    if worker.rank == 0:
        figures["encoder_digest"] = _publish(states["weights"], config, record, figures["images"])
    return figures


def prepared(share: Batch, config: TrainAutoencoder) -> dict[str, Tensor]:
    """A worker's share of a batch: `pixels` uint8 (n, 3, R, R), `noise` (n, C, h, w) of the posterior draw."""
    import torch

    from calotype.checks import latent_shape
    from calotype.data.draws import Purpose, philox

    shape = latent_shape(config.autoencoder, config.resolution)
    pixels, noise = share.arrays["pixels"], []
    for picture, position in zip(pixels, share.positions.tolist(), strict=True):
        if config.train.flip and philox(config.seed, position, Purpose.FLIP).random() < 0.5:
            picture[...] = picture[:, :, ::-1].copy()
        draw = philox(config.seed, position, Purpose.POSTERIOR)
        noise.append(draw.standard_normal(shape, dtype=np.float32))
    return {"pixels": torch.from_numpy(pixels), "noise": torch.from_numpy(np.stack(noise))}


def step(engine: Engine, rows: Mapping[str, Tensor], config: TrainAutoencoder) -> dict[str, Tensor]:
    """Losses of a micro-batch, one per image, and what they are made of."""
    from calotype.model.autoencoder import loss

    real = images.signed(rows["pixels"])
    made, mean, logvar = engine(real, rows["noise"])
    total = loss(real, (made, mean, logvar), config.l2_weight, config.kl_weight)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return {
        NAME: total,
        "absolute_error": (made - real).abs().flatten(1).mean(1),
        "kl_per_latent": kl.flatten(1).mean(1),
    }


class HeldOut:
    """The held-out images, dealt to the workers, and how well they are reconstructed; decoded when first needed."""

    def __init__(self, config: TrainAutoencoder, worker: Worker, dataset: Dataset, decode: Decoder) -> None:
        self.config, self.worker, self.dataset, self.decode = config, worker, dataset, decode
        self.count = min(HELD_OUT, len(dataset))
        self._pixels: list[Pixels] = []

    def validate(self, engine: Engine) -> dict[str, float]:
        """PSNR and SSIM of reconstructions from the posterior's mean, and latent statistics.  Collective.

        Without a held-out split there is nothing to measure: {}.
        """
        import torch
        import torch.distributed as dist

        from calotype.model import metrics

        if not self.count:
            return {}
        share = self._read()[self.worker.rank : self.count : self.worker.world]
        size = min(self.config.train.batch, 64)
        rounds = math.ceil(math.ceil(self.count / self.worker.world) / size)  # as many on every worker: collective
        channels = self.config.autoencoder.channels
        sums = torch.zeros(3 + 2 * channels, dtype=torch.float64)
        for index in range(rounds):
            part = share[index * size : (index + 1) * size]
            real, made, mean, std = self._reconstructed(engine, part or self._read()[:1])
            if part:
                quality = torch.stack([metrics.psnr(made, real), metrics.ssim(made, real)]).double().sum(1)
                power = (mean**2 + std**2).double()
                latents = [mean.double().mean((2, 3)).sum(0), power.mean((2, 3)).sum(0)]
                sums += torch.cat([quality.new_tensor([len(part)]), quality, *latents]).cpu()
        if self.worker.world > 1:
            shared = sums.to(self.worker.device)
            dist.all_reduce(shared)
            sums = shared.cpu()
        means = (sums[1:] / sums[0]).tolist()
        figures = {"psnr_heldout": means[0], "ssim_heldout": means[1]}
        for channel in range(channels):
            mean, power = means[2 + channel], means[2 + channels + channel]
            figures[f"latent_mean/{channel}"] = mean
            figures[f"latent_std/{channel}"] = max(power - mean**2, 0.0) ** 0.5
        return figures

    def draw(self, engine: Engine) -> Any:
        """Originals, each beside its reconstruction; a PIL image on rank 0.  Collective."""
        import torch

        from calotype.model import metrics

        if not self.count:
            return None
        real, made, _, _ = self._reconstructed(engine, self._read()[: SHOWN // 2])
        return metrics.grid(torch.stack([real, made], 1).flatten(0, 1), 8) if self.worker.rank == 0 else None

    def _read(self) -> list[Pixels]:
        if not self._pixels:
            self._pixels = [self.decode(sample)["pixels"] for sample in islice(self.dataset.samples(), self.count)]
        return self._pixels

    def _reconstructed(self, engine: Engine, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(real, reconstruction, mean, std) of a few images, through the posterior's mean."""
        import torch

        from calotype.checks import latent_shape

        real = images.signed(torch.from_numpy(np.stack(pixels)).to(self.worker.device))
        shape = latent_shape(self.config.autoencoder, self.config.resolution)
        with engine.averaged():
            made, mean, logvar = engine(real, torch.zeros(len(real), *shape, device=real.device))
        return real, made, mean, torch.exp(0.5 * logvar)


@dataclass
class Decoder:
    """Sample -> {"pixels": uint8 (3, R, R)}; small data sets are decoded once and kept.  Goes to loader processes."""

    resolution: int
    max_pixels: int
    kept: dict[str, Pixels] = field(default_factory=dict)

    def __call__(self, sample: Sample) -> dict[str, Pixels]:
        found = self.kept.get(sample.key)
        if found is None:
            data, name = images.image_bytes(sample), f"sample {sample.key}"
            found = images.decode(data, self.resolution, name, self.max_pixels).pixels
            if len(self.kept) < KEPT // (3 * self.resolution**2):
                self.kept[sample.key] = found
        return {"pixels": found}


def published(record: Record, images: int) -> Store:
    """The diffusers folder of a run of that length; whole once the run's result says so many images."""
    return record.artifacts.at(NAME, f"{images:012d}")


def _publish(weights: Mapping[str, Tensor], config: TrainAutoencoder, record: Record, images: int) -> str:
    """Write the diffusers folder among the run's artifacts; the digest of its encoder half."""
    from calotype.model.autoencoder import load_autoencoder
    from calotype.model.digests import encoder_digest

    model: Autoencoder = load_autoencoder(config.autoencoder)
    model.load_state_dict(dict(weights))
    if any(not bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise DataError("the trained autoencoder holds NaN or Inf: nothing was written; lower optim.lr")
    record.check_current()
    with tempfile.TemporaryDirectory(prefix="calotype-") as folder:
        assert model.model is not None
        model.model.save_pretrained(folder, safe_serialization=True)
        # A longer run has a folder of its own: what was made with this one keeps its decoder.
        published(record, images).upload(Path(folder))
        return encoder_digest(folder)


def _dataset_store(config: TrainAutoencoder) -> Store:
    return dataset_store(config.root, config.data.name)
