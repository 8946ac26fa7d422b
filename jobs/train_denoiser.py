"""Train the diffusion model on a cache of latents.

python jobs/train_denoiser.py data=digits autoencoder.path=run:mine denoiser=unet_tiny cluster.workers=2
"""

from __future__ import annotations

from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import TrainDenoiser
from calotype.runs import Record
from calotype.tasks import denoiser
from calotype.track import Tracker

resolve = denoiser.resolve


def run(config: TrainDenoiser, record: Record, tracker: Tracker) -> dict[str, Any]:
    return spread.train(denoiser.train, config, record)


if __name__ == "__main__":
    job_main("train_denoiser", resolve, run)
