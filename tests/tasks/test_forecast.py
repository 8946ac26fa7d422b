"""`calotype plan cache_latents`: a prediction that the run is held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from calotype.config import Autoencoder, Data
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.tasks import cache as task
from calotype.tasks import forecast

from tests.caches import config_of, dataset, run

PIXELS = Autoencoder(kind="identity", f=1, channels=3)


def test_bytes_and_images_are_those_that_the_run_makes(tmp_path: Path) -> None:
    dataset(tmp_path, {"train": (40, 40)})
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    found = forecast.forecast(config, Worker(threads=2))
    assert (found.samples, found.images, found.timed) == (80, 80, True)
    assert found.rate > 0
    assert found.hours == pytest.approx(80 / found.rate / 3600, rel=0.01)
    assert found.epochs is not None
    assert found.epochs >= 1
    figures = run(config)
    assert found.bytes == pytest.approx(figures["bytes"], rel=0.15)
    assert forecast.forecast(config, Worker()).images == 0  # all of it is there


def test_a_given_rate_and_price(tmp_path: Path) -> None:
    dataset(tmp_path, {"train": (40, 40)})
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    task.make(config, Worker())(task.plan(config)[1])
    found = forecast.forecast(config, Worker(), rate=2.0, price=36.0)
    assert (found.images, found.timed, found.epochs) == (40, False, None)
    assert found.hours * 3600 == pytest.approx(20)
    assert found.cost == pytest.approx(0.2)


def test_the_run_says_what_was_predicted(tmp_path: Path) -> None:
    dataset(tmp_path, {"train": (8,)})
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    figures = run(config)
    assert forecast.compared(config, figures, 7.2) == {}  # nobody asked
    forecast.keep(config, forecast.forecast(replace(config, data=config.data), Worker(), rate=1.0, price=2.0))
    assert forecast.compared(config, run(config), 7.2) == {}  # nothing was encoded
    found = forecast.compared(config, {"samples_encoded": 8}, 7.2)
    assert (found["actual_hours"], found["actual_cost"]) == (0.002, 0.004)


def test_a_dataset_of_which_nothing_can_be_encoded_is_said(tmp_path: Path) -> None:
    dataset(tmp_path, {"train": (8,)})
    config = config_of(tmp_path, "", autoencoder=PIXELS, data=Data(name="toy", error_budget=99, max_pixels=10))
    with pytest.raises(DataError, match=r"no sample of dataset toy can be encoded: .*than data\.max_pixels"):
        forecast.forecast(config, Worker())


def test_as_people_type_it(tmp_path: Path, typed: Callable[..., tuple[int, str]]) -> None:
    dataset(tmp_path / "root")

    def said(*words: str) -> tuple[int, str]:
        return typed("plan", *words)

    settings = [f"root={tmp_path / 'root'}", "data.name=toy", "autoencoder=identity", "encoding.resolution=16"]
    settings += ["conditions=label", "encoding.batch=4"]
    status, out = said("cache_latents", *settings, "--price", "3")
    assert status == 0, out
    for word in ("22 of 22", "timed here", "cost", "per sample", "epochs"):
        assert word in out
    status, out = said("cache_latents", *settings, "--rate", "11", "--json")
    assert json.loads(out)["hours"] == pytest.approx(2 / 3600)
    assert said("cache_latents", "--rate", "none")[0] == 2
    status, out = said("prepare")
    assert (status, "no plan for the job 'prepare', only for cache_latents and train_denoiser" in out) == (1, True)
    assert said("--help")[0] == 0
