"""export: a trained run becomes a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from calotype import runs
from calotype.errors import ConfigError
from calotype.tasks.sample import load_denoiser, trained


def export_run(root: str, reference: str, folder: Path) -> None:
    """Write the averaged weights of a train_denoiser run as what `StableDiffusionPipeline.from_pretrained` loads.

    Raises:
        ConfigError: the folder holds something else, or the model has no place in that pipeline; says what.
    """
    from transformers.utils import logging

    from calotype.model.export import check_exportable, export

    logging.set_verbosity_error()  # of image processors that the pipeline imports and ours has no use for
    logging.disable_progress_bar()
    record = runs.find(root, "train_denoiser", reference)
    settings = trained(record)
    check_exportable(settings)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and not a pipeline: name a new folder")
    model = load_denoiser(record)
    export(folder, model.denoiser, model.autoencoder, settings, model.mean, model.std)
