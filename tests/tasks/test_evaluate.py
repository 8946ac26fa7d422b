"""evaluate: figures that are right where the truth is known, and a report of a real model."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import compose, config, runs
from calotype.data import Dataset, open_dataset
from calotype.data.sources import PHRASINGS, UNSEEN_PHRASINGS, WORDS, caption_of
from calotype.errors import ConfigError
from calotype.tasks import compare, evaluate, sample
from PIL import Image
from sklearn.datasets import load_digits


class Oracle(sample.Model):
    """Draws a real digit of the number that the prompt names; with `blind`, one of any number."""

    blind = False

    def draw(self, prompts: Sequence[Any], sampler: Any, seeds: Sequence[int], done: Any = None) -> torch.Tensor:
        real, found = load_digits(), []
        for prompt, seed in zip(prompts, seeds, strict=True):
            words = str(prompt).replace(",", "").split()
            number = next(n for n in range(10) if WORDS[n] in words or str(n) in words)
            pick = np.random.default_rng(seed)
            choice = pick.choice(np.flatnonzero((real.target == number) | self.blind))
            picture = Image.fromarray((real.images[choice] * 255 / 16).astype(np.uint8)).resize((16, 16))
            found.append(torch.from_numpy(np.asarray(picture).astype(np.float32)).expand(3, -1, -1) / 127.5 - 1)
        return torch.stack(found)


@pytest.fixture(scope="module")
def trained(root: Path) -> sample.Model:
    return sample.load_denoiser(runs.find(str(root), "train_denoiser", "run:latent"))


def as_oracle(model: sample.Model) -> Oracle:
    return Oracle(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


def settings(root: Path, *overrides: str) -> Any:
    return compose.compose("evaluate", ["cluster=local", "track=none", f"root={root}", "run=run:latent", *overrides])


def test_accuracy_is_high_for_true_digits_and_chance_for_others(root: Path, trained: sample.Model) -> None:
    oracle = as_oracle(trained)
    drawn, found = evaluate.recognised(settings(root, "images=200"), oracle)
    assert found["accuracy"] > 0.9
    assert found["accuracy_unseen_phrasing"] > 0.9
    assert 0.05 < found["accuracy_shuffled"] < 0.15
    assert set(drawn.prompts) == {caption_of(d, p) for d in range(10) for p in PHRASINGS}
    assert drawn.wrong.count(True) == round(200 * (1 - found["accuracy"]))
    oracle.__class__.blind = True
    try:
        assert evaluate.recognised(settings(root, "images=200"), oracle)[1]["accuracy"] < 0.25
    finally:
        oracle.__class__.blind = False


def test_no_unseen_phrasing_was_trained_on() -> None:
    def captions(phrasings: Sequence[str]) -> set[str]:
        return {caption_of(digit, phrasing) for digit in range(10) for phrasing in phrasings}

    assert not captions(PHRASINGS) & captions(UNSEEN_PHRASINGS)


def source_of(root: Path) -> Callable[[str], Dataset]:
    return partial(open_dataset, str(root), "digits", "")


def test_psnr_and_ssim_are_those_of_the_held_out_images(root: Path, trained: sample.Model) -> None:
    digits = source_of(root)
    found = evaluate.reconstructed(trained, digits)
    assert found["reconstructed"] == len(digits("held_out"))
    assert found["psnr_heldout"] < 15  # the autoencoder was never trained
    assert found["ssim_heldout"] < 0.5

    class Perfect:
        def encode(self, images: torch.Tensor) -> Any:
            return images, None

        def decode(self, raw: torch.Tensor) -> torch.Tensor:
            return raw + 0.02  # in [-1, 1]: an error of 0.01 in [0, 1] where nothing is clipped

    found = evaluate.reconstructed(dataclasses.replace(trained, autoencoder=Perfect()), digits)
    assert 40 <= found["psnr_heldout"] < 42
    assert 0.95 < found["ssim_heldout"] < 1


def test_fid_tells_real_digits_from_a_model_that_never_learnt(root: Path, trained: sample.Model) -> None:
    digits = source_of(root)
    asked = settings(root, "fid_images=150", "sampler.steps=2")
    good = evaluate.distances(asked, as_oracle(trained), digits)
    bad = evaluate.distances(asked, trained, digits)
    assert good["fid"] < 0.2 * bad["fid"]
    assert good["kid"] < 0.2 * bad["kid"]
    assert (good["fid_real"], good["fid_drawn"]) == (len(digits("train")), 150)


def test_a_dataset_without_digits_is_drawn_from_held_out_captions(root: Path, trained: sample.Model) -> None:
    drawn = evaluate.described(settings(root, "images=5", "sampler.steps=1"), trained, source_of(root))
    assert len(drawn.images) == len(drawn.prompts) == 5
    assert all(any(word in prompt for word in (*WORDS, *"0123456789")) for prompt in drawn.prompts)
    assert drawn.wrong == []


def test_the_report_of_a_real_model(line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, measure = [], compare.training_speed
    monkeypatch.setattr(compare, "SECONDS", 0.3)
    monkeypatch.setattr(compare, "training_speed", lambda model: timed.append(model.shape) or measure(model))
    record = line("evaluate", "run=run:latent", "pixel_run=run:pixel", "images=20", "fid_images=40", "sampler.steps=2")
    result = record.result()
    for name in ("accuracy", "accuracy_unseen_phrasing", "accuracy_shuffled", "ssim_heldout", "kid"):
        assert -1 <= result[name] <= 1
    assert timed == [(4, 8, 8), (3, 16, 16)]
    assert result["training_speedup"] == pytest.approx(
        result["latent_images_per_second"] / result["pixel_images_per_second"]
    )
    assert result["latent_seconds_per_sample"] > 0
    report = json.loads(record.artifacts.read("report/report.json"))
    assert len(report["drawn"]) == 20
    assert report["figures"]["accuracy"] == result["accuracy"]
    wrong = sum(entry["wanted"] != entry["seen"] for entry in report["drawn"])
    assert result["accuracy"] == pytest.approx(1 - wrong / 20)
    assert f"| accuracy | {result['accuracy']:.4g} |" in record.artifacts.read("report/report.md").decode()
    reds = np.asarray(Image.open(io.BytesIO(record.artifacts.read("report/grid.png")))) == (214, 40, 40)
    assert reds.all(-1).any() == (wrong > 0)


def test_runs_that_cannot_be_compared_are_refused_on_submit(root: Path) -> None:
    resolved = evaluate.resolve(settings(root, "pixel_run=run:pixel"))
    assert evaluate.resolve(resolved) == resolved
    with pytest.raises(ConfigError, match="autoencoder=identity"):
        evaluate.resolve(settings(root, "pixel_run=run:latent"))
    with pytest.raises(ConfigError, match="fid_images"):
        evaluate.resolve(settings(root, "fid_images=1"))
    pixel = sample.trained(runs.find(str(root), "train_denoiser", "run:pixel"))
    other = dataclasses.replace(pixel, denoiser=config.Denoiser({"_target_": "diffusers.UNet2DConditionModel"}))
    with pytest.raises(ConfigError, match=r"denoiser\.model"):
        compare.check(sample.trained(runs.find(str(root), "train_denoiser", "run:latent")), other)
