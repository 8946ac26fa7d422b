"""train_denoiser on a real (tiny) cache: the same losses on any engine, from any checkpoint, after any death."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import config as C
from calotype.compose import as_data
from calotype.data import cache, shards
from calotype.data.manifest import DATASET, Manifest, publish_dataset
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError
from calotype.tasks import cache as cache_task
from calotype.tasks import denoiser, start
from calotype.train import checkpoint
from PIL import Image

pytestmark = pytest.mark.timeout(2400)

SPAWNED = Path(__file__).with_name("spawned.py")
BATCH, EDGE = 8, 8
STEPS = int(os.environ.get("CALOTYPE_TEST_STEPS", "40"))  # `make slow` takes 200
THREE = min(60, STEPS)  # of three ZeRO 3 workers, seconds each where there are two cores


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 90 small pictures and its cache in pixel space."""
    root = tmp_path_factory.mktemp("root")
    store = open_store(str(root)).at("datasets", "dots")
    rows = []
    for split, count in (("train", 70), ("held_out", 20)):
        samples = []
        for index in range(count):
            random = np.random.default_rng([index, count])
            picture = np.full((EDGE, EDGE, 3), random.integers(0, 100), np.uint8)
            picture[random.integers(8), random.integers(8)] = 255
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "png")
            label = index % 3
            samples.append(
                shards.Sample(
                    f"{split}{index:03d}",
                    {
                        "png": png.getvalue(),
                        "txt": f"a dot {label}".encode(),
                        "json": json.dumps({"label": label}).encode(),
                    },
                )
            )
        rows.append(shards.write_shard(store, f"shards/{split}-0-00000.tar", samples, 16, split))
    publish_dataset(store, Manifest(DATASET, "dots", ("png", "txt", "json"), tuple(rows), {}))
    made = cache_task.resolve(C.CacheLatents(**common(str(root)), accept=C.Accept(psnr=0)))
    encode = cache_task.make(made, Worker())
    cache_task.commit(made, [encode(unit) for unit in cache_task.plan(made)])
    return str(root)


def common(root: str) -> dict[str, Any]:
    encoder = {"_target_": "transformers.CLIPTextModel",
               "config": {"_target_": "transformers.CLIPTextConfig", "hidden_size": 16, "intermediate_size": 32,
                          "num_hidden_layers": 1, "num_attention_heads": 2}}  # fmt: skip
    return {
        "name": "test", "root": root, "seed": 3, "data": C.Data(name="dots"),
        "autoencoder": C.Autoencoder(kind="identity", f=1, channels=3),
        "encoding": C.Encoding(resolution=EDGE, dtype="float32", posterior="deterministic", batch=8),
        "conditions": {"text": C.Condition(length=6, drop=0.2, encoder=encoder)},
        "cluster": C.Cluster(kind="local"), "track": C.Track(kind="none"),
    }  # fmt: skip


def settings(root: str, **changes: Any) -> C.TrainDenoiser:
    """Changes: settings of `engine`, or of `train`."""
    engine = {"kind": "torch", "stage": 0, "precision": "fp32", "micro_batch": 0, "checkpoint_activations": False,
              "offload": "none"}  # fmt: skip
    engine |= {key: changes.pop(key) for key in list(changes) if key in engine}
    train = {"images": BATCH * STEPS, "batch": BATCH, "window": 8, "log_every": 1, "validate_every": 0,
             "sample_every": 0, "checkpoint_every": 10**9, "keep": 100}  # fmt: skip
    model = {"_target_": "diffusers.UNet2DConditionModel", "block_out_channels": [8, 16], "layers_per_block": 1,
             "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "mid_block_type": None,
             "up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4}  # fmt: skip
    return cache_task.resolve_inputs(
        C.TrainDenoiser(
            **common(root),
            denoiser=C.Denoiser(model=model),
            diffusion=C.Diffusion(prediction="v_prediction"),
            optim=C.Optim(lr=1e-3, warmup=20 * BATCH),
            ema=C.EMA(halflife=400, halflives=[5]),
            train=C.Train(**{**train, **changes}),
            engine=C.Engine(**engine),
            sampler=C.Sampler(steps=2, batch=4),
            prompts=["a dot 0", "a dot 1", "a dot 2"],
        )
    )


class Runs:
    """Runs of several workers, in processes of their own."""

    def __init__(self, folder: Path, root: str, started: Callable[..., Any]) -> None:
        self.folder, self.root, self.started = folder, root, started

    def artifacts(self, name: str) -> Path:
        return self.folder / name

    def spawn(self, world: int, jobs: list[dict[str, Any]]) -> None:
        """Jobs: name, optional start (checkpoint folder) and kill_at, and the changes of `settings`."""
        number = len(list(self.folder.glob("plan*")))
        plan: dict[str, Any] = {"world": world, "store": str(self.folder / f"store{number}"), "jobs": []}
        for job in jobs:
            job = dict(job)
            name, start, kill_at = job.pop("name"), job.pop("start", None), job.pop("kill_at", 0)
            # One run, wherever its checkpoint is copied: workers, engine and length are no part of what it is.
            record = {"job": "train_denoiser", "identity": "f" * 32, "name": name, "root": self.root,
                      "artifact_root": str(self.artifacts(name))}  # fmt: skip
            plan["jobs"].append(
                {
                    "config": as_data(settings(self.root, **job)),
                    "record": record,
                    "kill_at": kill_at,
                    "out": str(self.folder / f"{name}.json"),
                    "start": str(start) if start else None,
                }
            )
        path = self.folder / f"plan{number}.json"
        path.write_text(json.dumps(plan))
        said = [self.folder / f"said{number}-{rank}.txt" for rank in range(world)]
        workers = [self.started(SPAWNED, str(path), str(rank), said=file) for rank, file in enumerate(said)]
        killing = any(job.get("kill_at") for job in jobs)
        try:
            for worker in workers:
                if killing and worker is not workers[0]:
                    worker.kill()  # rank 0 is dead: a cluster would end the others
                worker.join(1500)
        finally:
            for worker in workers:
                worker.kill()
        codes = [worker.exitcode for worker in workers]
        if killing:
            assert codes[0] == -signal.SIGKILL, said[0].read_text()
        else:
            assert codes == [0] * world, "\n".join(file.read_text() for file in said)

    def figures(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())["figures"]

    def losses(self, name: str, metric: str = "loss") -> dict[int, float]:
        """Images seen -> loss."""
        points = json.loads((self.folder / f"{name}.json").read_text())["points"]
        return {images: figures[metric] for images, figures in points if metric in figures}


@pytest.fixture(scope="module")
def done(root: str, tmp_path_factory: pytest.TempPathFactory, started: Callable[..., Any]) -> Runs:
    """All runs of this page, one after the other; ZeRO 3 starts slowly beside what other engines left."""
    found = Runs(tmp_path_factory.mktemp("runs"), root, started)
    half = BATCH * STEPS // 2
    deepspeed = [{"kind": "deepspeed", "stage": stage} for stage in range(4)]
    short = {"images": half + 10 * BATCH}
    start = found.artifacts("zero2") / f"checkpoints/{half:012d}"
    more = {"validate_every": half, "sample_every": half}
    bf16 = {"images": 20 * BATCH, "precision": "bf16"}
    found.spawn(1, [{"name": "torch", **more}, {"name": "guarded", "spike": 1.1}])
    found.spawn(
        2,
        [
            *({"name": f"zero{job['stage']}", "checkpoint_every": half, **job, **more} for job in deepspeed[:3]),
            *({"name": f"bf16-{job['stage']}", **bf16, **job} for job in deepspeed[:3]),
            {"name": "guarded2", "spike": 1.1, **deepspeed[2]},
            {"name": "guarded2-offloaded", "spike": 1.1, **deepspeed[2], "offload": "cpu"},
        ],
    )
    found.spawn(2, [{"name": "zero3", "checkpoint_every": half, **deepspeed[3], **more}])
    found.spawn(2, [{"name": "to3", "start": start, **short, **deepspeed[3]}])
    found.spawn(2, [{"name": "bf16-3", **bf16, **deepspeed[3]}])
    found.spawn(
        3,
        [
            {"name": "three", "micro_batch": 2, "images": THREE * BATCH, **deepspeed[3]},
            {"name": "to0", "start": start, **short, **deepspeed[0]},
        ],
    )
    found.spawn(
        1,
        [
            {"name": "totorch", "start": start, **short},
            {"name": "to1", "start": start, **short, **deepspeed[1]},
            {"name": "to1-offloaded", "start": start, **short, **deepspeed[1], "offload": "cpu"},
        ],
    )
    return found


def close(mine: dict[int, float], theirs: dict[int, float], steps: range) -> float:
    """Largest relative difference; every one of the steps must be there."""
    wanted = [step * BATCH for step in steps]
    assert [images for images in mine if images in set(wanted)] == wanted
    return max(abs(mine[images] - theirs[images]) / abs(theirs[images]) for images in wanted)


@pytest.mark.parametrize("stage", range(4))
def test_losses_agree_with_those_of_one_process(done: Runs, stage: int) -> None:
    assert close(done.losses(f"zero{stage}"), done.losses("torch"), range(1, STEPS + 1)) < 1e-5


def test_losses_agree_when_workers_do_not_divide_the_batch(done: Runs) -> None:
    assert close(done.losses("three"), done.losses("torch"), range(1, THREE + 1)) < 1e-5


@pytest.mark.parametrize("name", ["guarded2", "guarded2-offloaded"])
def test_all_ranks_skip_the_same_steps(done: Runs, name: str) -> None:
    one, two = done.losses("guarded"), done.losses(name)
    assert one.keys() == two.keys(), "a step that was skipped has no loss"
    assert 0 < done.figures(name)["skipped_steps"] == STEPS - len(two)
    assert one == pytest.approx(two, rel=1e-5)
    first = min(set(range(BATCH, BATCH * STEPS, BATCH)) - two.keys())
    kept = json.loads((done.artifacts(name) / f"evidence/{first:012d}.json").read_text())
    assert [len(keys) for keys in kept["keys"].values()] == [BATCH // 2] * 2


@pytest.mark.skipif(STEPS < 200, reason="too few steps: make slow takes enough")
def test_training_learns(done: Runs) -> None:
    losses = list(done.losses("torch").values())
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


@pytest.mark.parametrize("name", ["to3", "to0", "to1", "to1-offloaded", "totorch"])
def test_resume_at_another_stage_and_world_leaves_no_scar(done: Runs, name: str) -> None:
    """From (2 workers, ZeRO 2): the very next loss, and those after."""
    half = STEPS // 2
    assert min(done.losses(name)) == (half + 1) * BATCH
    assert close(done.losses(name), done.losses("torch"), range(half + 1, half + 11)) < 1e-5


@pytest.mark.parametrize("stage", range(4))
def test_average_equals_that_of_one_process(done: Runs, stage: int) -> None:
    mine, theirs = (
        checkpoint.weights(open_store(str(done.artifacts(name))), BATCH * STEPS, "denoiser")
        for name in (f"zero{stage}", "torch")
    )
    assert mine.keys() == theirs.keys()
    raw = checkpoint.weights(open_store(str(done.artifacts("torch"))), BATCH * STEPS, "denoiser", ema=False)
    assert max(float((theirs[name] - raw[name]).abs().max()) for name in raw) > 1e-3  # it is an average
    # As a whole, not one by one: Adam moves a weight whose gradient is rounding noise by lr, whichever way it points.
    flat = [torch.cat([state[name].flatten() for name in sorted(theirs)]) for state in (mine, theirs, raw)]
    off, drift = (float(torch.linalg.vector_norm(one - flat[1])) for one in (flat[0], flat[2]))
    assert off < 1e-3 * float(torch.linalg.vector_norm(flat[1]))
    assert off < 0.1 * drift  # far nearer to its twin than to the weights that it averages


def test_averages_are_drawn_from_by_their_halflife(done: Runs, root: str) -> None:
    from calotype.runs import Record
    from calotype.tasks import sample

    artifacts = str(done.artifacts("torch"))
    record = Record("train_denoiser", "f" * 32, "torch", root, artifacts, config=as_data(settings(root)))
    first, same, further = (sample.load_denoiser(record, halflife=h).denoiser.state_dict() for h in (0, 400, 5))
    stored = checkpoint.weights(record.artifacts, BATCH * STEPS, "denoiser", halflife=5)
    assert all(torch.equal(first[name], same[name]) for name in stored)
    assert all(torch.equal(further[name], stored[name]) for name in stored)
    assert any((first[name] != further[name]).any() for name in stored)


@pytest.mark.parametrize("stage", range(4))
def test_validation_and_pictures_agree(done: Runs, stage: int) -> None:
    first, further = (done.losses(f"zero{stage}", f"validation_loss{which}") for which in ("", "_ema_5"))
    assert first == pytest.approx(done.losses("torch", "validation_loss"), rel=1e-5)
    assert further == pytest.approx(done.losses("torch", "validation_loss_ema_5"), rel=1e-5)
    assert len(first) == 2
    assert first != further
    assert len(list(done.artifacts(f"zero{stage}").rglob("*.png"))) >= 2


@pytest.mark.parametrize("stage", range(4))
def test_bf16_trains_on_fp32_weights(done: Runs, stage: int) -> None:
    mine, exact = done.losses(f"bf16-{stage}"), done.losses("torch")
    assert len(mine) == 20
    assert 1e-5 < max(abs(mine[images] / exact[images] - 1) for images in mine) < 0.05
    weights = checkpoint.weights(open_store(str(done.artifacts(f"bf16-{stage}"))), 20 * BATCH, "denoiser", ema=False)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())


def test_kill_in_the_middle_then_another_world_and_stage(done: Runs) -> None:
    at = {"checkpoint_every": 5 * BATCH, "images": 20 * BATCH}
    done.spawn(2, [{"name": "killed", "kind": "deepspeed", "stage": 1, "kill_at": 13 * BATCH, **at}])
    store = open_store(str(done.artifacts("killed")))
    assert checkpoint.latest(store) == 10 * BATCH
    done.spawn(1, [{"name": "killed", **at}])
    assert min(done.losses("killed")) == 11 * BATCH
    assert close(done.losses("killed"), done.losses("torch"), range(11, 21)) < 1e-5
    assert done.figures("killed")["images"] == 20 * BATCH


def test_a_finished_run_does_nothing(done: Runs, root: str) -> None:
    at = {"images": 20 * BATCH, "checkpoint_every": 5 * BATCH}
    from calotype.runs import Record

    record = Record("train_denoiser", "f" * 32, "killed", root, str(done.artifacts("killed")))
    before = checkpoint.digest(record.artifacts, 20 * BATCH)
    assert denoiser.train(settings(root, **at), Worker(), record)["images"] == 20 * BATCH
    assert checkpoint.digest(record.artifacts, 20 * BATCH) == before


# ------------------------------------------------------------------------------------------------ in this process


def test_rows_depend_on_position_alone(root: str) -> None:
    config = settings(root)
    store = open_store(root)
    manifest = cache.load_cache(store, config)
    latents = store.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    samples = list(shards.iterate(latents, manifest.split("train")))[:6]
    from calotype.model import conditioner

    rows = denoiser.Rows(config, manifest, conditioner.empty(config.conditions))
    together = rows.of(cache.stacked(samples, ["text"]), [5, 6, 7, 8, 9, 10])
    alone = rows.of(cache.stacked(samples[2:3], ["text"]), [7])
    assert all(torch.equal(together[name][2:3], alone[name]) for name in together)
    other = rows.of(cache.stacked(samples[2:3], ["text"]), [8])
    assert not torch.equal(alone["noise"], other["noise"])
    assert abs(float(together["noise"].std()) - 1) < 0.1


def test_conditions_are_dropped_as_often_as_asked(root: str) -> None:
    from calotype.model import conditioner

    config = settings(root)
    store = open_store(root)
    manifest = cache.load_cache(store, config)
    latents = store.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    sample = next(shards.iterate(latents, manifest.split("train")))
    empty = conditioner.empty(config.conditions)
    rows = denoiser.Rows(config, manifest, empty).of(cache.stacked([sample] * 2000, ["text"]), list(range(2000)))
    share = (rows["cond.text"] == empty["text"]).all(1).float().mean()
    assert abs(float(share) - 0.2) < 0.03
    kept = denoiser.Rows(config, manifest, empty).of(
        cache.stacked([sample] * 50, ["text"]), list(range(50)), drop=False
    )
    assert not (kept["cond.text"] == empty["text"]).all(1).any()


LABEL = C.Condition(kind="class", source="label", classes=3, drop=0.5)


@pytest.fixture(scope="module")
def both(root: str) -> Callable[..., C.TrainDenoiser]:
    """Settings of a model of a text and a class, on a cache that holds both."""
    shared = common(root)
    conditions = {**shared["conditions"], "label": LABEL}
    made = cache_task.resolve(C.CacheLatents(**{**shared, "conditions": conditions}, accept=C.Accept(psnr=0)))
    encode = cache_task.make(made, Worker())
    cache_task.commit(made, [encode(unit) for unit in cache_task.plan(made)])

    def settings_of(**changes: Any) -> C.TrainDenoiser:
        return dataclasses.replace(settings(root), conditions=made.conditions, **changes)

    return settings_of


def rows_of(config: C.TrainDenoiser, count: int) -> dict[str, torch.Tensor]:
    """One sample at the positions 0 .. count-1."""
    from calotype.model import conditioner

    store = open_store(config.root)
    manifest = cache.load_cache(store, config)
    latents = store.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    sample = next(shards.iterate(latents, manifest.split("train")))
    rows = denoiser.Rows(config, manifest, conditioner.empty(config.conditions))
    return rows.of(cache.stacked([sample] * count, list(config.conditions)), list(range(count)))


def test_each_condition_is_dropped_by_a_chance_of_its_own(both: Callable[..., C.TrainDenoiser]) -> None:
    from calotype.model import conditioner

    config = both()
    rows, empty = rows_of(config, 2000), conditioner.empty(config.conditions)
    text, label = (rows["cond.text"] == empty["text"]).all(1), rows["cond.label"] == empty["label"]
    for share, expected in ((text, 0.2), (label, 0.5), (text & label, 0.1), (~text & ~label, 0.4)):
        assert abs(float(share.float().mean()) - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    turned = dataclasses.replace(config, conditions=dict(reversed(config.conditions.items())))
    assert all(torch.equal(rows[name], value) for name, value in rows_of(turned, 2000).items())


@pytest.mark.parametrize(
    "objective",
    [
        {"prediction": "epsilon", "min_snr_gamma": 5.0},
        {"prediction": "sample", "zero_snr": True},
        {"prediction": "v_prediction", "zero_snr": True, "timestep_sampling": "logit_normal"},
        {"prediction": "flow_prediction", "timestep_sampling": "logit_normal", "shift": 2.0, "min_snr_gamma": 5.0},
    ],
    ids=str,
)
def test_every_objective_trains_validates_and_draws_by_text_and_class(
    both: Callable[..., C.TrainDenoiser], objective: dict[str, Any]
) -> None:
    train = C.Train(images=4 * BATCH, batch=BATCH, window=8, log_every=BATCH, validate_every=4 * BATCH,
                    sample_every=4 * BATCH)  # fmt: skip
    prompts = [{"text": "a dot 1", "label": 1}, {"text": "a dot 2", "label": 2}]
    config = both(diffusion=C.Diffusion(**objective), train=train, prompts=prompts)
    figures = denoiser.train(config, Worker())
    assert figures["images"] == 4 * BATCH
    assert np.isfinite([figures["loss"], figures["validation_loss"]]).all()


def test_losses_are_weighted_where_asked(both: Callable[..., C.TrainDenoiser]) -> None:
    """Of a denoiser that says 0 the loss is the mean square of the target, min(SNR, gamma) / SNR times of the noise."""
    from calotype.model.diffusion import Diffusion

    rows = rows_of(both(), 50)
    plain, weighted = (
        denoiser.losses(lambda x, t, cond: 0 * x, Diffusion(C.Diffusion(min_snr_gamma=gamma)), rows)  # type: ignore[arg-type]
        for gamma in (0.0, 5.0)
    )
    torch.testing.assert_close(plain, rows["noise"].square().mean((1, 2, 3)))
    a = Diffusion(C.Diffusion()).alphas_cumprod[rows["timestep"]].double()
    snr = a / (1 - a)
    torch.testing.assert_close(weighted, (plain * snr.clamp(max=5) / snr).float(), rtol=1e-3, atol=0)
    assert 0 < int((snr > 5).sum()) < 50


def test_neither_accumulation_nor_checkpointed_activations_change_losses(done: Runs, root: str) -> None:
    again = {"checkpoint_activations": True, "images": 10 * BATCH}
    three = {"name": "again", "kind": "deepspeed", "stage": 3, **again}  # whose weights come and go beside the blocks
    done.spawn(1, [{"name": "micro", "micro_batch": 3, **again}, three])
    for name in ("micro", "again"):
        assert close(done.losses(name), done.losses("torch"), range(1, 11)) < 1e-5


def test_start_from_a_run_and_from_its_folder(root: str, tmp_path: Path) -> None:
    config = settings(root, images=2 * BATCH)
    from calotype import runs

    record = runs.begin("train_denoiser", config, lambda _: ("", ""), lambda _: None)
    denoiser.train(config, Worker(), record)
    again = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, init_from="run:test"))
    resolved = start.resolve(again)
    named = dataclasses.replace(config.denoiser, init_from=f"run:test@{2 * BATCH}")
    assert start.resolve(dataclasses.replace(config, denoiser=named)) == resolved
    for wrong in ("run:test@9", "run:test@last"):
        named = dataclasses.replace(config.denoiser, init_from=wrong)
        with pytest.raises(CalotypeError, match=r"000000000009 is no checkpoint.*are 16|'run:test@last' names no"):
            start.resolve(dataclasses.replace(config, denoiser=named))
    assert resolved.denoiser.init_digest == checkpoint.digest(record.artifacts, 2 * BATCH)
    from calotype.model.denoiser import build_denoiser

    model = build_denoiser(resolved, (3, EDGE, EDGE))
    start.load_run(resolved, model)
    weights = checkpoint.weights(record.artifacts, 2 * BATCH, "denoiser")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    gone = dataclasses.replace(resolved, denoiser=dataclasses.replace(resolved.denoiser, init_digest="0" * 64))
    with pytest.raises(CalotypeError, match="gone"):
        start.load_run(gone, model)


def test_resolve_refuses_early(root: str) -> None:
    config = settings(root)
    missing = dataclasses.replace(config, encoding=dataclasses.replace(config.encoding, resolution=16))
    with pytest.raises(CalotypeError, match=r"encoding\.resolution"):
        denoiser.resolve(missing)
    nothing = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, init_from="run:none"))
    with pytest.raises(CalotypeError, match="none"):
        denoiser.resolve(nothing)
    small = dataclasses.replace(config.cluster, gpus=1, memory_gb=1e-4)
    with pytest.raises(CalotypeError, match=r"takes .* GB of each worker's cluster\.memory_gb=0\.0001"):
        denoiser.resolve(dataclasses.replace(config, cluster=small))


def test_a_run_does_not_go_on_in_a_cache_that_lost_samples(root: str, tmp_path: Path, monkeypatch: Any) -> None:
    """It holds its manifest: what it has drawn with stays, but its order is gone."""
    from calotype import runs
    from calotype.tasks import sample, takedown
    from calotype.train import loop

    shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("runs"))  # that other tests began there
    config = denoiser.resolve(settings(str(tmp_path / "root"), images=2 * BATCH))
    other = denoiser.resolve(dataclasses.replace(config, seed=4, name="other"))
    record = runs.begin("train_denoiser", config, lambda _: ("", ""), lambda _: None)
    with runs.attempt_of(record) as publish:
        publish(denoiser.train(config, Worker(), record))
    before = cache.load_cache(open_store(config.root), config)
    beside = runs.begin("train_denoiser", other, lambda _: ("", ""), lambda _: None)
    real = loop.run

    def while_it_reads(*args: Any) -> Any:
        takedown.take_down(config.root, takedown.survey(config.root, frozenset({"train003", "train040"})))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run", while_it_reads)
        with pytest.raises(CalotypeError, match=r"train_denoiser other began .* taken down since.* with another seed"):
            denoiser.train(other, Worker(), beside)
    now = cache.load_cache(open_store(config.root), config)
    assert (now.totals()["train"]["samples"], before.totals()["train"]["samples"]) == (68, 70)
    model = sample.load_denoiser(record)
    assert list(model.std) == before.meta["channel_std"] != now.meta["channel_std"]

    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, images=4 * BATCH))
    assert denoiser.resolve(config).cache == now.digest  # what is finished stays finished
    assert runs.done("train_denoiser", config)
    for go_on in (lambda: denoiser.resolve(longer), lambda: denoiser.train(longer, Worker(), record)):
        with pytest.raises(CalotypeError, match=r"new run from its weights, with denoiser\.init_from=run:test and"):
            go_on()
    start = dataclasses.replace(longer.denoiser, init_from="run:test")
    new = denoiser.resolve(dataclasses.replace(longer, denoiser=start, name="new"))
    again = runs.begin("train_denoiser", new, lambda _: ("", ""), lambda _: None)
    assert denoiser.train(new, Worker(stop=lambda: True), again) == {}
    store = runs.find(config.root, "train_denoiser", "test").artifacts
    for images in checkpoint.committed(store):
        checkpoint.discard(store, images)  # as `keep` does: the new run has its start itself
    assert denoiser.train(new, Worker(), again)["images"] == 4 * BATCH
    assert list(sample.load_denoiser(again).std) == now.meta["channel_std"]
