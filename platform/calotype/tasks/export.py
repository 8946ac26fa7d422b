"""export: a trained run becomes a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from calotype.errors import ConfigError
from calotype.tasks.sample import average_of, chosen, load_denoiser, trained


def export_run(root: str, reference: str, folder: Path, halflife: int = 0) -> None:
    """Write the averaged weights of a train_denoiser run as what `StableDiffusionPipeline.from_pretrained` loads.

    Args:
        reference: run:NAME, or run:NAME@IMAGES for one of its checkpoints.
        halflife: of the average; 0 for the first.

    Raises:
        ConfigError: the folder holds something else, or the model has no place in that pipeline; says what.
    """
    from transformers.utils import logging

    from calotype.model.export import check_exportable, export

    logging.set_verbosity_error()  # of image processors that the pipeline imports and ours has no use for
    logging.disable_progress_bar()
    record, found = chosen(root, reference)
    settings = trained(record)
    average_of(settings, halflife)
    check_exportable(settings)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise ConfigError(f"{folder} is not empty and not a pipeline: name a new folder")
    model = load_denoiser(record, digest=found.digest, halflife=halflife)
    export(folder, model.denoiser, model.autoencoder, settings, model.mean, model.std)
