"""sample: prompts that fit, pictures that follow from their seeds, files where they are said to be."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import compose, config, runs
from calotype.data.store import open_store
from calotype.errors import CalotypeError, ConfigError
from calotype.tasks import sample
from calotype.train import checkpoint
from PIL import Image

FAST = config.Sampler(steps=2, batch=3)
TEXT = {"text": config.Condition(kind="cross", source="text")}
LABEL = {"label": config.Condition(kind="class", source="label", classes=10)}


def settings(root: Path, *overrides: str) -> Any:
    return compose.compose("sample", ["cluster=local", "track=none", f"root={root}", "run=run:latent", *overrides])


def test_every_image_is_written_with_its_prompt_and_seed(line: Any, tmp_path: Path) -> None:
    asked = ["prompts=[a seven, an eight]", "per_prompt=2", "seed=5", "sampler.steps=2"]
    record = line("sample", "run=run:latent", *asked)
    folder = record.artifacts.at("samples")
    told = json.loads(folder.read("samples.json"))
    assert [(entry["prompt"], entry["seed"]) for entry in told] == [
        ("a seven", 5), ("a seven", 6), ("an eight", 7), ("an eight", 8),
    ]  # fmt: skip
    images = [np.asarray(Image.open(io.BytesIO(folder.read(entry["file"])))) for entry in told]
    assert {image.shape for image in images} == {(16, 16, 3)}
    assert len({image.tobytes() for image in images}) == 4
    out = tmp_path / "pictures of mine"
    runs.fetch(record, "samples", str(out))
    assert {path.name for path in out.iterdir()} == {*(entry["file"] for entry in told), "grid.png", "samples.json"}
    assert Image.open(io.BytesIO(folder.read("grid.png"))).width > 2 * 96
    result = record.result()
    assert (result["images"], result["images_seen"]) == (4, 16)
    assert result["seconds_per_image"] > 0


def test_an_image_follows_from_its_seed_and_prompt_alone(root: Path) -> None:
    record = runs.find(str(root), "train_denoiser", "run:latent")
    model = sample.load_denoiser(record)
    prompts = ["a seven", "a one", "an eight", "a two", "a three"]
    together = model.draw(prompts, FAST, [1, 2, 3, 4, 5])
    alone = model.draw(prompts[3:4], FAST, [4])
    torch.testing.assert_close(alone[0], together[3], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.draw(prompts[3:4], FAST, [5])[0], together[3], atol=1e-3)


def test_averaged_weights_are_drawn_from_unless_told_otherwise(root: Path) -> None:
    record = runs.find(str(root), "train_denoiser", "run:latent")
    for ema, kind in ((True, "denoiser.ema"), (False, "denoiser.weights")):
        model = sample.load_denoiser(record, ema=ema)
        with checkpoint.opened(record.artifacts, 16, (kind,)) as stored:
            for name, weight in model.denoiser.state_dict().items():
                torch.testing.assert_close(weight, stored.tensors[kind][name].clone(), atol=0, rtol=0)


def test_the_checkpoint_that_was_submitted_is_the_one_that_is_drawn_from(root: Path) -> None:
    resolved = sample.resolve(settings(root, "prompts=[a seven]"))
    record = runs.find(str(root), "train_denoiser", "run:latent")
    assert resolved.run == record.identity
    assert resolved.run_digest == checkpoint.digest(record.artifacts, 16)
    assert sample.resolve(resolved) == resolved
    with pytest.raises(CalotypeError, match=r"train\.keep"):
        sample.newest(record, "0" * 64)


def test_a_checkpoint_that_is_named_is_taken_or_refused_by_name(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    record = runs.find(str(tmp_path / "root"), "train_denoiser", "run:latent")
    record = dataclasses.replace(record, artifact_root=record.artifact_root.replace(str(root), str(tmp_path / "root")))
    store = open_store(str(tmp_path / "root")).at("runs", record.identity)
    told = {**json.loads(store.read("run.json")), "artifact_root": record.artifact_root}
    store.write("run.json", json.dumps(told).encode())
    ask = ["prompts=[a seven]", f"root={tmp_path / 'root'}"]
    resolved = sample.resolve(settings(root, *ask, "run=run:latent@16"))
    assert (resolved.run, resolved.run_digest) == (record.identity, checkpoint.digest(record.artifacts, 16))
    with pytest.raises(CalotypeError, match=r"000000000099 is no checkpoint.*committed are 16"):
        sample.resolve(settings(root, *ask, "run=run:latent@99"))
    with pytest.raises(CalotypeError, match=r"'run:latent@best' names no checkpoint: write run:NAME@IMAGES"):
        sample.resolve(settings(root, *ask, "run=run:latent@best"))
    key = next(entry.key for entry in record.artifacts.list("checkpoints/") if "exp_avg_sq" in entry.key)
    record.artifacts.delete(key)
    with pytest.raises(CalotypeError, match=f"{key} is gone: choose another checkpoint"):
        sample.resolve(settings(root, *ask, "run=run:latent@16"))
    with pytest.raises(ConfigError, match="keeps no average of halflife 7: choose one of 500000"):
        sample.resolve(settings(root, *ask, "ema_halflife=7"))
    assert sample.average_of(sample.trained(record), 500_000) == 0


def test_prompts_come_from_a_file_of_the_machine_that_submits(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a seven\n\n  the digit 3 \n", encoding="utf-8")
    resolved = sample.resolve(settings(root, f"prompts_file={file}"))
    assert (resolved.prompts, resolved.prompts_file) == (["a seven", "the digit 3"], "")
    with pytest.raises(ConfigError, match="choose one"):
        sample.resolve(settings(root, f"prompts_file={file}", "prompts=[x]"))
    with pytest.raises(ConfigError, match=r"none\.txt"):
        sample.resolve(settings(root, f"prompts_file={tmp_path / 'none.txt'}"))


def test_what_cannot_be_drawn_is_refused_on_submit(root: Path) -> None:
    with pytest.raises(ConfigError, match="prompts is empty"):
        sample.resolve(settings(root))
    with pytest.raises(CalotypeError, match="nobody"):
        sample.resolve(settings(root, "run=run:nobody", "prompts=[x]"))


@pytest.mark.parametrize(
    ("prompts", "conditions", "problem"),
    [
        ([10], LABEL, "0 to 9"),
        (["seven"], LABEL, "0 to 9"),
        ([-1], LABEL, "0 to 9"),
        (["a"], {}, "unconditional"),
        ([3, 4], {}, "unconditional"),
        (["a"], TEXT | LABEL, "several conditions"),
        ([{"text": "a"}], TEXT | LABEL, "several conditions"),
    ],
)
def test_prompts_that_do_not_fit_the_model(prompts: list[Any], conditions: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        sample.checked(prompts, conditions)


def test_prompts_that_fit() -> None:
    assert sample.checked([3, "4"], LABEL) == [3, "4"]
    assert sample.checked([4], {}) == [""] * 4
    assert sample.checked([], {}) == [""]
    both = [{"text": "a seven", "label": 7}]
    assert sample.checked(both, TEXT | LABEL) == both


def test_a_prompt_longer_than_the_text_input_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = sample.load_denoiser(runs.find(str(root), "train_denoiser", "run:latent"))
    model.draw(["a seven " * 100, "a one"], FAST, [1, 2])
    assert "1 of 2 prompts" in caplog.text
