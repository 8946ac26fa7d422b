"""A line that every job ran on once, in this process: small real digits, an untrained autoencoder, two steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from calotype import cli, compose, runs

Line = Callable[..., runs.Record]


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """`line(JOB, overrides...)` runs a job as `python jobs/JOB.py` would and gives its record."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("line")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae", safe_serialization=True)

    def run(job: str, *overrides: str) -> runs.Record:
        config = compose.compose(job, ["cluster=local", "track=none", f"root={folder / 'root'}", *overrides])
        module = cli.job_module(job)
        config = module.resolve(config)
        if runs.done(job, config) is None:
            cli.execute(job, config, module.run)
        found = runs.load(config.root, compose.identity(job, config))
        assert found is not None
        return found

    unet = ["denoiser=unet_tiny", "denoiser.model.block_out_channels=[8,16]", "denoiser.model.norm_num_groups=4",
            "denoiser.model.attention_head_dim=2"]  # fmt: skip
    train = ["train.images=16", "train.batch=8", "train.sample_every=0", "train.validate_every=0", "engine=torch"]
    run("prepare", "data.image_size=16")
    for place, space in (
        ("latent", ["autoencoder=pretrained", f"autoencoder.path={folder / 'vae'}"]),
        ("pixel", ["autoencoder=identity"]),
    ):
        run("cache_latents", *space, "encoding.resolution=16", f"name={place}", "accept.psnr=0")  # it is untrained
        run("train_denoiser", *space, "encoding.resolution=16", *unet, *train, f"name={place}")
    return run


@pytest.fixture(scope="session")
def root(line: Line) -> Path:
    """Where it lies."""
    return Path(line("prepare", "data.image_size=16").root)
