"""What the training of a denoiser begins from: fresh weights, those of a run or of a folder, or its own checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from calotype import runs
from calotype.config import TrainDenoiser
from calotype.errors import CalotypeError, ConfigError
from calotype.model import folders
from calotype.train import checkpoint

NAME = "denoiser"  # of the engine, so of its files in a checkpoint


def resolve(config: TrainDenoiser) -> TrainDenoiser:
    """`denoiser.init_from` by content: of a run a checkpoint, the newest or that of @IMAGES, of a folder the UNet."""
    begin = config.denoiser.init_from
    if not begin:
        return config
    if begin.startswith("run:"):
        name, images = runs.parted(begin)
        record = runs.find(config.root, "train_denoiser", name)
        images = checkpoint.latest(record.artifacts) if images is None else images
        if images is None:
            raise ConfigError(f"denoiser.init_from={begin} has no checkpoint yet: train it first")
        checkpoint.check(record.artifacts, images)
        denoiser = replace(config.denoiser, init_from=f"run:{record.identity}")
        return replace(config, denoiser=replace(denoiser, init_digest=checkpoint.digest(record.artifacts, images)))
    digest = hashlib.sha256()
    with folders.opened(begin, "unet", "denoiser.init_from") as folder:
        for path in folders.weight_files(folder):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return replace(config, denoiser=replace(config.denoiser, init_digest=digest.hexdigest()))


def build(config: TrainDenoiser, shape: tuple[int, int, int], record: runs.Record | None) -> Any:
    """The denoiser with the same weights on every worker; those of a checkpoint come later, into the engine."""
    import torch

    from calotype.model.build import checkpoint_activations
    from calotype.model.denoiser import build_denoiser

    resumes = record is not None and checkpoint.latest(record.artifacts) is not None
    bare = replace(config, denoiser=replace(config.denoiser, init_from=""))  # what it began from may be gone by now
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_denoiser(bare if resumes else config, shape)
    if not resumes:
        load_run(config, model)
    if config.engine.checkpoint_activations:
        checkpoint_activations(model)
    return model


def load_run(config: TrainDenoiser, model: Any) -> None:
    """Load the weights that `denoiser.init_from=run:...` was resolved to: the averaged ones, if there are."""
    from calotype.model.denoiser import load_weights

    start = config.denoiser.init_from
    if not start.startswith("run:"):
        return
    record = runs.find(config.root, "train_denoiser", start)
    for images in reversed(checkpoint.committed(record.artifacts)):
        if checkpoint.digest(record.artifacts, images) == config.denoiser.init_digest:
            load_weights(model, checkpoint.weights(record.artifacts, images, NAME), f"denoiser.init_from={start}")
            return
    raise CalotypeError(f"denoiser.init_from={start}: the checkpoint it was resolved to is gone; submit again")
