"""`calotype promote`: a trained denoiser becomes a version of a model in the real MLflow's registry, once."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calotype import compose, registry, track
from calotype.errors import CalotypeError
from calotype.tasks import promote as task
from calotype.tasks.sample import load_denoiser
from calotype.train import checkpoint

from tests.caches import recorded
from tests.tasks.conftest import Line

TRAINED = ["encoding.resolution=16", "denoiser=unet_tiny", "denoiser.model.block_out_channels=[8,16]",
           "denoiser.model.norm_num_groups=4", "denoiser.model.attention_head_dim=2", "train.batch=8", "engine=torch",
           "train.images=16", "train.checkpoint_every=8", "train.validate_every=8", "train.sample_every=8",
           "sampler.steps=1", "prompts=[a seven]", "train.keep=9", "optim.lr=0.3",
           "ema.rampup=0", "ema.halflife=1", "ema.halflives=[9999]"]  # fmt: skip


@pytest.fixture
def name(stack: Any) -> str:
    """Of a registered model that is not there yet."""
    return f"digits-{secrets.token_hex(4)}"


def test_the_best_checkpoint_becomes_a_version_once(
    line: Line, root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"autoencoder.path={root.parent / 'vae'}"
    record = line("train_denoiser", "autoencoder=pretrained", where, *TRAINED, "track.kind=mlflow", "name=promoted")
    losses = dict(_losses(record))
    images, halflife, loss = task.best(record)
    assert loss == min(losses.values())
    assert (images, halflife) == min(losses, key=lambda one: losses[one])
    assert halflife == 9999, "a learning rate that does harm"

    made = task.promote(str(root), "run:promoted", name, "champion")
    assert (made.version, made.images, made.fresh, made.why) == ("1", images, True, "")
    client = track.connect()
    version = client.get_model_version_by_alias(name, "champion")
    assert (version.version, version.run_id, version.source) == ("1", record.mlflow_run_id, made.export)
    assert version.tags["calotype.run"] == record.identity
    assert float(version.tags["calotype.validation_loss"]) == loss
    assert version.tags["calotype.dataset"].startswith("digits ")
    assert len(version.tags["calotype.cache"]) == 64
    assert "images/samples+step+" in version.description
    run = client.get_run(record.mlflow_run_id)
    assert {"cost", "mfu_percent"}.isdisjoint(run.data.metrics), "nobody said a price or a peak"
    assert run.data.metrics["tflops"] > 0

    place = record.artifacts.at(made.export.removeprefix(f"{record.artifacts.uri}/"))
    for entry in place.list():
        (tmp_path / entry.key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry.key).write_bytes(place.read(entry.key))
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(str(tmp_path / "unet")).state_dict()
    best = load_denoiser(
        record, digest=version.tags["calotype.digest"].removesuffix("@9999"), halflife=9999
    ).denoiser.unet.state_dict()
    assert all(bool((unet[key] == best[key]).all()) for key in best)

    monkeypatch.setattr(task, "_export", None)  # the same checkpoint is not exported again
    again = task.promote(str(root), "run:promoted", name, "candidate")
    assert (again.version, again.fresh, again.export) == ("1", False, made.export)
    assert client.get_model_version_by_alias(name, "candidate").version == "1"
    registry.point(name, "champion", registry.register(record, name, "other", version.source, {}))
    assert client.get_model_version_by_alias(name, "champion").version == "2"
    with pytest.raises(CalotypeError, match="MLflow did not register"):
        task.promote(str(root), "run:promoted", name, "v1")


def test_a_model_that_diffusers_has_no_place_for_is_registered_without_an_export(
    line: Line, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TRAINED, "train.images=8", "track.kind=mlflow", "name=pixels"]
    record = line("train_denoiser", "autoencoder=identity", *words)
    made = task.promote(str(root), "run:pixels", name)
    assert (made.export, made.fresh) == ("", True)
    assert "pixel space has none" in made.why
    version = track.connect().get_model_version(name, "1")
    assert version.source == f"{record.artifacts.uri}/checkpoints/000000000008"
    assert version.tags["calotype.export"] == made.why

    line("train_denoiser", "autoencoder=identity", *words, "train.images=24", "train.keep=1")
    assert checkpoint.committed(record.artifacts) == [8, 24], "the version still has its weights"
    opened = checkpoint.opened

    def forgotten(store: Any, images: int, *which: Any) -> Any:
        if images == 8:  # in the moment in which it is read
            checkpoint.discard(store, images)
        return opened(store, images, *which)

    monkeypatch.setattr(checkpoint, "opened", forgotten)
    assert task.best(record)[0] == 24


def test_what_is_not_promoted_is_said(root: Path, typed: Callable[..., tuple[int, str]]) -> None:
    status, out = typed("promote", "run:latent", "--root", str(root))
    assert (status, "train_denoiser latent was trained with track=none" in out) == (1, True)
    begun = compose.compose("train_denoiser", ["autoencoder=identity", f"root={root}", "name=begun", "seed=9"])
    recorded("train_denoiser", begun, finish=False)
    status, out = typed("promote", "run:begun", "--root", str(root))
    assert (status, "begun is cancelled, not finished: nothing is promoted yet" in out) == (1, True)


def _losses(record: Any) -> Any:
    for images in checkpoint.committed(record.artifacts):
        with checkpoint.opened(record.artifacts, images, ()) as saved:
            for halflife, name in ((0, "validation_loss"), (9999, "validation_loss_ema_9999")):
                yield (images, halflife), saved.state["figures"][name]
