"""Captions as embeddings of their own tokens alone: from the cache job to a denoiser that draws; what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import config as C
from calotype.compose import as_data
from calotype.data import Stream, cache, open_cache, shards
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.model import conditioner
from calotype.tasks import denoiser

from tests.bench.cache_bytes import NAIVE, stored_bytes
from tests.caches import autoencoder_folder, config_of, dataset, latents_of, run, text_folder

UNET = {"_target_": "diffusers.UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2, "norm_num_groups": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[C.CacheLatents, str]:
    """A finished cache and its id: captions of 2 to 6 tokens between start and end, in both splits."""
    root = tmp_path_factory.mktemp("root")
    text = C.Condition(mode="masked", path=text_folder(root / "clip"), tokenizer="small", length=9, drop=0.5)
    dataset(root, {"held_out": (4,), "train": (9, 8)}, caption="a {:b}")
    encoding = C.Encoding(resolution=16, batch=4, mirrored=True)
    config = config_of(root, autoencoder_folder(root / "vae"), conditions={"text": text}, encoding=encoding)
    return config, run(config)["cache"]


def test_a_cache_holds_the_rows_of_a_captions_own_tokens(made: tuple[C.CacheLatents, str]) -> None:
    config, _ = made
    manifest = cache.load_cache(open_store(config.root), config)
    lengths = set()
    for sample in shards.iterate(latents_of(config), manifest.shards):
        stored = cache.decode_sample(sample, ["text"])["text"]
        caption = json.loads(bytes(sample.members["json"]))["text"]
        assert np.array_equal(stored, conditioner.inputs(config.conditions["text"], [caption])[0])
        lengths.add(stored.shape)
    assert lengths == {(size, 16) for size in range(4, 9)}


def test_a_stream_pads_them_as_the_validation_and_a_prompt_are_padded(made: tuple[C.CacheLatents, str]) -> None:
    config, identity = made
    latents = open_cache(config.root, identity)
    samples = {sample.key: sample for sample in latents.samples()}
    with closing(Stream(latents, seed=0, batch=8, arrays=["latent", "text"])) as stream:
        batch = next(iter(stream))
    expected = cache.stacked([samples[key] for key in batch.keys], ["text"], latents.lengths)
    captions = [json.loads(bytes(samples[key].members["json"]))["text"] for key in batch.keys]
    prompted = conditioner.prompted(config.conditions, captions)
    assert batch.arrays.keys() == expected.keys() == {"latent", "text", "text.mask"}
    for name, array in batch.arrays.items():
        assert np.array_equal(array, expected[name])
        assert name == "latent" or np.array_equal(array, prompted[name].numpy())


def trained(config: C.CacheLatents, engine: C.Engine) -> C.TrainDenoiser:
    shared = {name: getattr(config, name) for name in ("root", "data", "autoencoder", "encoding", "conditions")}
    settings = C.TrainDenoiser(
        name="d", **shared, denoiser=C.Denoiser(model=UNET),
        cluster=C.Cluster(kind="local"), track=C.Track(kind="none"),
        train=C.Train(images=16, batch=8, flip=True, validate_every=8, sample_every=8), engine=engine,
        sampler=C.Sampler(steps=2), prompts=["a 3", "a photo of a 12"],
    )  # fmt: skip
    return denoiser.resolve(settings)


def test_a_denoiser_trains_on_them_validates_and_draws(made: tuple[C.CacheLatents, str]) -> None:
    config, _ = made
    settings = trained(config, C.Engine(kind="torch"))
    figures = denoiser.train(settings, Worker())
    assert figures["images"] == 16
    assert math.isfinite(figures["loss"] + figures["validation_loss"])
    other = replace(settings, conditions={"text": replace(settings.conditions["text"], mode="full")})
    with pytest.raises(DataError, match=r"conditions\.text\.mode \(masked in the cache, full here\)"):
        denoiser.resolve(other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_train_on_them_as_one_does(
    made: tuple[C.CacheLatents, str], tmp_path: Path, started: Callable[..., Any], stage: int
) -> None:
    engines, found = {1: C.Engine(kind="torch"), 2: C.Engine(kind="deepspeed", stage=stage)}, {}
    for world, engine in engines.items():
        record = {"job": "train_denoiser", "identity": "i", "name": "d", "root": str(made[0].root)}
        job = {"config": as_data(trained(made[0], engine)), "out": str(tmp_path / f"{world}.json")}
        job["record"] = record | {"artifact_root": str(tmp_path / f"run{world}")}
        plan, said = tmp_path / f"plan{world}.json", [tmp_path / f"said{world}-{rank}" for rank in range(world)]
        plan.write_text(json.dumps({"world": world, "store": str(tmp_path / "store"), "jobs": [job]}))
        spawned = Path(__file__).with_name("spawned.py")
        workers = [started(spawned, str(plan), str(rank), said=file) for rank, file in enumerate(said)]
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0] * world, said[0].read_text()
        points = json.loads((tmp_path / f"{world}.json").read_text())["points"]
        found[world] = [point[name] for _, point in points for name in ("loss", "validation_loss") if name in point]
    assert len(found[1]) >= 3
    assert found[2] == pytest.approx(found[1], rel=1e-4)


def test_a_dropped_caption_is_the_empty_one_with_its_mask(made: tuple[C.CacheLatents, str]) -> None:
    config, identity = made
    latents = open_cache(config.root, identity)
    shared = {name: getattr(config, name) for name in ("root", "data", "autoencoder", "encoding", "conditions")}
    empty = conditioner.empty(config.conditions)
    rows = denoiser.Rows(C.TrainDenoiser(name="d", **shared), cache.load_cache(open_store(config.root), config), empty)
    stored = cache.stacked(list(latents.samples())[:1] * 200, ["text"], latents.lengths)
    made_rows = rows.of(stored, list(range(200)))
    dropped = (made_rows["cond.text.mask"] == empty["text.mask"]).all(1)
    assert 70 < int(dropped.sum()) < 130
    assert torch.equal((made_rows["cond.text"] == empty["text"]).all((1, 2)), dropped)


@pytest.mark.parametrize(("mode", "most"), [("tokens", 0.13), ("masked", 1 / 3)])
def test_a_sample_takes_a_third_of_the_naive_layout(tmp_path: Path, mode: str, most: float) -> None:
    size, members = stored_bytes(tmp_path, mode, images=16)
    assert size / NAIVE <= most, (size, members)
    assert members["latent.npy"] == 128 + 2 * 2 * 4 * 32 * 32
    assert members["text.npy"] == 128 + (17 * 1024 * 2 if mode == "masked" else 77 * 4)
