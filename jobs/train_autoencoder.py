"""Train the autoencoder that latents are made with.

python jobs/train_autoencoder.py data=digits autoencoder=kl_f4_tiny
"""

from __future__ import annotations

from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import TrainAutoencoder
from calotype.runs import Record
from calotype.tasks import autoencoder
from calotype.track import Dataset, Tracker

resolve = autoencoder.resolve


def run(config: TrainAutoencoder, record: Record, tracker: Tracker) -> dict[str, Any]:
    data = Dataset(config.data.name, config.data.digest, f"{config.root}/datasets/{config.data.name}")
    tracker.inputs([data])
    figures = spread.train(autoencoder.train, config, record)
    if figures:
        images = int(figures["images"])
        tracker.model("autoencoder", autoencoder.published(record, images).uri, "autoencoder", images)
    return figures


if __name__ == "__main__":
    job_main("train_autoencoder", resolve, run)
