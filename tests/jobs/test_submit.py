"""The line through `calotype submit`, on the real S3, MLflow and Ray."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calotype import cli
from calotype.data.store import open_store

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
IMAGES = 600
SMALLER = {  # what makes each command of the README a matter of seconds
    "prepare": ["cluster.workers=2"],
    "train_autoencoder": [
        "autoencoder.model.block_out_channels=[8,8,16]",
        "++autoencoder.model.norm_num_groups=4",
        "train.images=256",
        "train.batch=32",
        "train.log_every=32",
        "train.checkpoint_every=128",
    ],
    "cache_latents": ["cluster.workers=2"],
    "train_denoiser": [
        "denoiser.model.block_out_channels=[16,32]",
        "denoiser.model.norm_num_groups=8",
        "train.images=256",
        "train.batch=32",
        "train.log_every=32",
        "train.validate_every=128",
        "train.sample_every=256",
        "train.checkpoint_every=128",
        "prompts=[a seven]",
        "sampler.steps=3",
        "cluster.workers=2",
    ],
    "sample": ["sampler.steps=3"],
}


def calotype(*words: str, fails: bool = False, cwd: Path = ROOT, checkout: Path = ROOT) -> str:
    return python("-m", "calotype", *words, fails=fails, cwd=cwd, checkout=checkout)


def python(*words: str, fails: bool = False, cwd: Path = ROOT, checkout: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(checkout / "platform"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert (done.returncode != 0) == fails, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def written(section: str) -> list[list[str]]:
    """The shell lines of a section of the README, as words."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [
        shlex.split(line, comments=True)
        for block in text.split("```sh\n")[1:]
        for line in block.split("```")[0].splitlines()
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with captions, as users have them: real digits, 64 pixels wide."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("my pictures")
    digits = load_digits()
    for index, (picture, label) in enumerate(zip(digits.images[:IMAGES], digits.target, strict=False)):
        Image.fromarray((picture * 15).astype("uint8")).resize((64, 64)).save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(f"a picture of a {label}")
    return folder


@pytest.fixture(scope="module")
def line(stack: Any, pictures: Path) -> dict[str, list[str]]:
    """Job -> its words: the commands of the README's "Your own images", small, in a root of their own; all were run."""
    settings = [f"root=s3://calotype/test-{os.urandom(4).hex()}", "track.experiment=test"]
    words = {}
    for program, verb, job, *overrides in written("Your own images"):
        assert (program, verb) == ("calotype", "submit")
        overrides = [word.replace("/pictures/mine", str(pictures)) for word in overrides]
        overrides = [word.replace("/pictures/drawn", f"{pictures} drawn") for word in overrides]
        words[job] = [verb, job, *overrides, *settings, *SMALLER[job]]
        calotype(*words[job])
    assert list(words) == list(SMALLER)
    return words


@pytest.fixture(scope="module")
def root(line: dict[str, list[str]]) -> str:
    return line["sample"][-3].removeprefix("root=")


@pytest.fixture(scope="module")
def shown(root: str) -> dict[str, Any]:
    return dict(json.loads(calotype("runs", "show", "mine", "--json", "--root", root)))


def test_the_line_leaves_its_figures(shown: dict[str, Any]) -> None:
    assert {run["job"]: run["status"] for run in shown["runs"]} == dict.fromkeys(
        ("prepare", "train_autoencoder", "cache_latents", "train_denoiser", "sample"), "finished"
    )
    assert shown["psnr_heldout"] > 5
    assert "seconds" not in shown
    assert all(run["result"]["seconds"] > 0 for run in shown["runs"])
    assert shown["validation_loss"] > 0


def test_pictures_come_to_where_they_were_asked_for(line: dict[str, list[str]], pictures: Path) -> None:
    assert Path(f"{pictures} drawn", "grid.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_submitted_again(line: dict[str, list[str]]) -> None:
    out = calotype(*line["train_denoiser"], "engine=zero3", "name=again", "train.images=64")
    assert "finished already" in out
    assert "first called mine; it went on to 256 images" in out
    assert "mine, again" in calotype("runs", f"--root={line['sample'][-3].removeprefix('root=')}")
    assert "submitted" not in out.replace("submitted/", "")


def test_mlflow_shows_curves_lineage_and_checkpoints(root: str, shown: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = {run["job"]: client.get_run(run["mlflow_run_id"]) for run in shown["runs"]}
    run = runs["train_denoiser"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mine"
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in loss] == list(range(32, 257, 32))
    assert {"lr", "gradient_norm", "images_per_second", "data_wait_percent", "goodput"} <= set(run.data.metrics)
    assert run.inputs.dataset_inputs
    assert run.data.params["train.batch"] == "32"
    assert {name for name in run.data.params if name.startswith("data.")} == {"data.name", "data.digest"}
    listed = {entry.path for entry in client.list_artifacts(run.info.run_id, "checkpoints")}
    assert any("256" in path for path in listed), listed
    assert runs["train_autoencoder"].outputs.model_outputs


def test_a_sweep_makes_children_of_one_parent(root: str) -> None:
    from mlflow import MlflowClient

    sweep = ["submit", "prepare", "-m", f"root={root}", "name=swept", "track.experiment=test"]
    out = calotype(*sweep, "data.name=swept-1,swept-2")
    assert out.count("submitted prepare-") == 2
    *_, first, second, page = out.strip().splitlines()
    assert all(words in first for words in ("data.name=swept-1", "finished", "samples 1,797"))
    assert "data.name=swept-2" in second
    client = MlflowClient()
    experiment = client.get_experiment_by_name("test")
    children = [
        run
        for run in client.search_runs([experiment.experiment_id], "tags.`calotype.job` = 'prepare'")
        if run.info.run_name == "swept" and "mlflow.parentRunId" in run.data.tags
    ]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert f"/runs/{parent}?" in page
    assert len(children) == 2


def test_a_job_that_fails_exits_non_zero_with_the_reason_last(root: str, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(b"this is text")
    (tmp_path / "good.txt").write_text("a caption")
    out = calotype(
        "submit",
        "prepare",
        f"root={root}",
        "data=folder",
        "data.name=bad",
        f"data.path={tmp_path}",
        "name=bad",
        fails=True,
    )
    assert "good.png" in "".join(out.strip().splitlines()[-3:])
    assert calotype("runs", "--root", root).count("failed") == 1


def test_an_edited_checkout_submits_its_edits(root: str, tmp_path: Path) -> None:
    checkout = tmp_path / "an edited checkout"
    for folder in ("platform", "jobs", "conf"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = checkout / "platform" / "calotype" / "tasks" / "prepare.py"
    source.write_text(source.read_text() + "\nprint('edited by hand')\n")
    out = calotype(
        "submit", "prepare", f"root={root}", "data.name=edited", "name=edited", checkout=checkout, cwd=tmp_path
    )
    assert "edited by hand" in out.split("submitted ", 1)[1]
    assert "job_manager.py" not in out
    assert "Running entrypoint" not in out


def test_webdataset_alone_reads_what_was_written(root: str, tmp_path: Path) -> None:
    import boto3
    import webdataset as wds

    bucket, prefix = root.removeprefix("s3://").split("/", 1)
    client = boto3.client("s3")
    count = {"datasets": 0, "latents": 0}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page["Contents"]:
            kind = entry["Key"].split("/")[1]
            if entry["Key"].endswith(".tar") and "/edited/" not in entry["Key"] and "/swept-" not in entry["Key"]:
                client.download_file(bucket, entry["Key"], str(tmp_path / "shard.tar"))
                for sample in wds.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False).decode():
                    assert sample["__key__"]
                    assert "png" in sample or sample["latent.npy"].shape == (2, 4, 16, 16)
                    count[kind] += 1
    assert count == {"datasets": IMAGES, "latents": IMAGES}


def test_a_damaged_cache_stops_training_or_is_left_out_within_the_budget(line: dict[str, list[str]], root: str) -> None:
    store = open_store(root)
    tars = [entry for entry in store.list("latents") if entry.key.endswith(".tar")]
    key = max(tars, key=lambda tar: tar.size).key  # not the held-out one: validation has no quarantine
    sound = store.read(key)
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 1
    alone = ["cluster=local", "cluster.workers=1", "track=none", "stream.on_error=quarantine"]
    words = ["jobs/train_denoiser.py", *line["train_denoiser"][2:], *alone]
    store.write(key, bytes(damaged))
    try:
        out = python(*words, "name=strict", "seed=1", "stream.on_error=strict", fails=True)
        assert re.search(rf"{key} is damaged or replaced: chunk \d+", out)
        out = python(*words, "name=over", "seed=2", "stream.error_budget=1", fails=True)
        assert re.search(r"samples (had to be|were) left out, more than (stream\.)?error_budget=1", out)
        python(*words, "name=within", "seed=3", f"stream.error_budget={IMAGES}")
    finally:
        store.write(key, sound)
    shown = json.loads(calotype("runs", "show", "within", "--json", "--root", root))
    run = next(run for run in shown["runs"] if run["job"] == "train_denoiser")
    assert 0 < run["result"]["left_out"] < IMAGES


def test_export_makes_a_pipeline(root: str, tmp_path: Path) -> None:
    calotype("export", "run:mine", str(tmp_path / "out"), "--root", root)
    assert (tmp_path / "out" / "model_index.json").exists()


# ----------------------------------------------------------------------------------------------------- the README


def test_targets_of_make_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in written("Two commands")} <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= targets


def test_a_gpu_is_a_setting() -> None:
    for _, *words in written("A GPU"):
        assert "gpus: 1" in calotype(*words, "--cfg", "job")


@pytest.mark.parametrize(
    "verb", ["up", "status", "down", "submit", "plan", "ps", "logs", "cancel", "runs", "cache", "export", "promote"]
)
def test_verbs_that_the_readme_names_teach(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"`calotype {verb}" in README or f", `{verb}" in README
    monkeypatch.setattr(sys, "argv", ["calotype", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert f"usage: calotype {verb}" in capsys.readouterr().out
