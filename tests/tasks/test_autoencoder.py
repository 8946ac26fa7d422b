"""Training an autoencoder: it learns, it resumes, it leaves a folder that diffusers and the cache read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import runs
from calotype.compose import as_data, build, identity
from calotype.config import Autoencoder, Cluster, Data, Engine, Optim, Track, Train, TrainAutoencoder
from calotype.data import Dataset, Stream, foreign, shards
from calotype.data.manifest import DATASET, Manifest, load_dataset, publish_dataset
from calotype.data.shards import Sample
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.model import digests, metrics
from calotype.tasks import autoencoder as task
from diffusers import AutoencoderKL
from PIL import Image

MODEL = {
    "_target_": "diffusers.AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


def picture(number: int) -> bytes:
    """A smooth picture, different for every number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((16, 16), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the data set `toy`: 40 pictures to train on and 9 held out, and `bare`, which holds out none."""
    root = tmp_path_factory.mktemp("root")
    for name, parts in {"toy": {"train": range(40), "held_out": range(100, 109)}, "bare": {"train": range(40)}}.items():
        store = open_store(str(root)).at("datasets", name)
        rows = []
        for split, numbers in parts.items():
            samples = [Sample(f"{split}{n}", {"png": picture(n)}) for n in numbers]
            rows.append(shards.write_shard(store, f"shards/{split}-00000.tar", samples, 8, split, columns={}))
        publish_dataset(store, Manifest(DATASET, name, ("png",), tuple(rows)))
    return root


def config_of(root: Path, **changes: Any) -> TrainAutoencoder:
    config = TrainAutoencoder(
        name="toy", root=str(root), resolution=16, data=Data(name="toy"),
        autoencoder=Autoencoder(f=2, channels=4, model=MODEL), optim=Optim(lr=4e-3, clip=1.0),
        train=Train(images=512, batch=8, log_every=64, validate_every=256, sample_every=256, checkpoint_every=256),
        engine=Engine(kind="torch"), cluster=Cluster(kind="local"), track=Track(kind="none"),
    )  # fmt: skip
    return task.resolve(replace(config, **changes))


def test_what_is_taken_down_is_not_looked_at_either(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor held-out images, of which pictures go to MLflow."""
    gone = {"train3", "train4", "held_out101", "held_out108"}
    (tmp_path / "gone.txt").write_text("\n".join(gone))
    seen: set[str] = set()
    decode = task.Decoder.__call__

    def watched(self: task.Decoder, sample: Sample) -> Any:
        seen.add(sample.key)
        return decode(self, sample)

    monkeypatch.setattr(task.Decoder, "__call__", watched)
    data, whole = Data(name="toy", takedown=str(tmp_path / "gone.txt")), config_of(root)
    config = config_of(root, data=data, train=Train(images=40, batch=8, validate_every=8, sample_every=8))
    assert identity("train_autoencoder", replace(config, train=whole.train)) != identity("train_autoencoder", whole)
    trained(config)
    assert seen == ({f"train{n}" for n in range(40)} | {f"held_out{n}" for n in range(100, 109)}) - gone


def test_shards_that_somebody_else_wrote_are_trained_on_where_they_lie(root: Path, tmp_path: Path) -> None:
    for split, numbers in (("a", range(32)), ("b", range(32, 40))):
        rows = [Sample(f"{split}{n}", {"png": picture(n)}) for n in numbers]
        shards.write_shard(open_store(str(tmp_path / "theirs")), f"{split}.tar", rows, 8)
    foreign.index(str(tmp_path / "root"), "laion", str(tmp_path / "theirs"), share=0.5)
    config = config_of(tmp_path / "root", data=Data(name="laion"), train=Train(images=16, batch=8, validate_every=8))
    result, _ = trained(config)
    assert result["images"] == 16
    assert result["psnr_heldout"] > 0


def trained(config: TrainAutoencoder, stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, Any], runs.Record]:
    record = runs.begin("train_autoencoder", config, lambda identity: ("", ""), lambda run_id: None)
    with runs.attempt_of(record) as publish:
        result = task.train(config, Worker(stop=stop), record)
        if result:
            publish(result)
    return result, record


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[TrainAutoencoder, dict[str, Any], runs.Record]:
    config = config_of(root)
    return config, *trained(config)


def test_it_learns(finished: tuple[TrainAutoencoder, dict[str, Any], runs.Record], root: Path) -> None:
    _, result, _ = finished
    fresh, _ = trained(config_of(root, seed=1, train=Train(images=8, batch=8)))
    assert result["psnr_heldout"] > fresh["psnr_heldout"] + 1.5
    assert result["absolute_error"] < 0.8 * fresh["absolute_error"]
    assert 0 < result["ssim_heldout"] <= 1
    assert result["images"] == 512
    assert json.loads(json.dumps(result)) == result


def test_the_folder_is_diffusers_own_and_as_good_as_it_says(
    finished: tuple[TrainAutoencoder, dict[str, Any], runs.Record], root: Path
) -> None:
    _, result, record = finished
    folder = task.published(record, result["images"]).uri.removeprefix("file://")
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    assert digests.encoder_digest(folder) == result["encoder_digest"]
    store = open_store(str(root)).at("datasets", "toy")
    held_out = shards.iterate(store, load_dataset(store).split("held_out"))
    pixels = [np.asarray(Image.open(io.BytesIO(sample.members["png"]))) for sample in held_out]
    real = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(real).latent_dist
        made = model.decode(posterior.mean).sample
    assert float(metrics.psnr(made, real).mean()) == pytest.approx(result["psnr_heldout"], abs=0.01)
    assert float(metrics.ssim(made, real).mean()) == pytest.approx(result["ssim_heldout"], abs=1e-3)
    drawn = posterior.mean.double().square() + posterior.std.double().square()
    mean = posterior.mean.double().mean((0, 2, 3))
    for channel in range(4):
        std = float((drawn.mean((0, 2, 3)) - mean**2)[channel].sqrt())
        assert result[f"latent_mean/{channel}"] == pytest.approx(float(mean[channel]), abs=1e-3)
        assert result[f"latent_std/{channel}"] == pytest.approx(std, abs=1e-3)


def test_grids_show_held_out_images_beside_their_reconstructions(
    finished: tuple[TrainAutoencoder, dict[str, Any], runs.Record], root: Path
) -> None:
    _, _, record = finished
    grids = sorted(entry.key for entry in record.artifacts.list("images/") if entry.key.endswith(".png"))
    assert [key.split("+")[2] for key in grids] == ["256", "512"]
    grid = np.asarray(Image.open(io.BytesIO(record.artifacts.read(grids[-1]))))
    store = open_store(str(root)).at("datasets", "toy")
    first = next(shards.iterate(store, load_dataset(store).split("held_out")))
    original = np.asarray(Image.open(io.BytesIO(first.members["png"])))
    assert np.array_equal(grid[:16, :16], original)
    assert 10 < np.abs(grid[:16, 16:32].astype(float) - original).mean() + 10 < 60


def test_stopped_and_started_again_it_ends_as_if_nothing_had_been(
    finished: tuple[TrainAutoencoder, dict[str, Any], runs.Record], tmp_path: Path, root: Path
) -> None:
    shutil.copytree(root / "datasets", tmp_path / "datasets")
    config = config_of(tmp_path)
    asked = iter(range(10_000))
    stopped, record = trained(config, stop=lambda: next(asked) > 3)
    assert stopped == {}
    assert not record.artifacts.exists("autoencoder/config.json")
    result, again = trained(config)
    assert again.attempt == 2
    assert result["encoder_digest"] == finished[1]["encoder_digest"]
    assert result["psnr_heldout"] == finished[1]["psnr_heldout"]


def test_randomness_belongs_to_positions(root: Path) -> None:
    config = config_of(root, train=Train(batch=8, flip=True))
    store = open_store(str(root)).at("datasets", "toy")
    made = []
    for world in (1, 2):
        rows = []
        for rank in range(world):
            data, decode = Dataset(store, load_dataset(store).split("train")), task.Decoder(config.resolution, 10**6)
            batches = Stream(data, seed=0, batch=8, rank=rank, world=world, decode=decode).seek(16)
            rows.append(task.prepared(next(iter(batches)), config))
            batches.close()
        made.append({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    assert torch.equal(made[0]["pixels"], made[1]["pixels"])
    assert torch.equal(made[0]["noise"], made[1]["noise"])
    assert made[0]["noise"].shape == (8, 4, 8, 8)
    assert len({float(noise[0, 0, 0]) for noise in made[0]["noise"]}) == 8


def test_flips_mirror_some_images_and_only_if_asked(root: Path) -> None:
    store = open_store(str(root)).at("datasets", "toy")
    made = []
    for config in (config_of(root), config_of(root, train=Train(flip=True))):
        decode = task.Decoder(config.resolution, 10**6)
        batches = Stream(Dataset(store, load_dataset(store).split("train")), seed=0, batch=40, decode=decode)
        made.append(task.prepared(next(iter(batches)), config)["pixels"])
        batches.close()
    plain, flipped = made
    same = [torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert all(s or torch.equal(a.flip(-1), b) for s, a, b in zip(same, plain, flipped))
    assert 8 < sum(same) < 32


def test_without_held_out_images_nothing_is_claimed_of_them(root: Path) -> None:
    result, _ = trained(config_of(root, data=Data(name="bare"), train=Train(images=16, batch=8)))
    assert result["images"] == 16
    assert "psnr_heldout" not in result


def test_a_loss_that_is_not_a_number_ends_the_run_and_writes_nothing(root: Path) -> None:
    config = config_of(root, seed=9, optim=Optim(lr=1e30, clip=0), train=Train(images=256, batch=8, log_every=8))
    with pytest.raises(CalotypeError, match="not finite"):
        trained(config)
    record = runs.load(str(root), runs.identity("train_autoencoder", config))
    assert record is not None
    assert not record.artifacts.exists("autoencoder/config.json")


def test_resolve_names_the_data_set_by_its_digest(root: Path) -> None:
    store = open_store(str(root)).at("datasets", "toy")
    assert config_of(root).data.digest == load_dataset(store).digest
    empty = open_store(str(root)).at("datasets", "empty")
    publish_dataset(empty, replace(load_dataset(store), shards=load_dataset(store).split("held_out")))
    with pytest.raises(ConfigError, match="dataset empty has no training images"):
        config_of(root, data=Data(name="empty"))


def work(plan: dict[str, Any], rank: int) -> None:
    """One of two workers, in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{plan['store']}", rank=rank, world_size=2)
    result = task.train(build(TrainAutoencoder, plan["config"]), Worker(rank, 2, rank), runs.Record(**plan["record"]))
    if rank == 0:
        Path(plan["out"]).write_text(json.dumps(result))


def test_two_zero3_workers_measure_and_write_what_one_does(root: Path, tmp_path: Path, warm: Any) -> None:
    settings = Train(images=48, batch=8, validate_every=24, sample_every=24, checkpoint_every=48)
    alone, record = trained(config_of(root, seed=5, train=settings))
    engine = Engine(kind="deepspeed", stage=3)
    config = config_of(root, seed=5, train=settings, engine=engine, cluster=Cluster(workers=2))
    plan: dict[str, Any] = {"store": str(tmp_path / "meet"), "config": as_data(config)}
    plan["record"] = asdict(replace(record, attempt=0, artifact_root=str(tmp_path / "artifacts")))
    plan["out"] = str(tmp_path / "result.json")
    ranks = [warm.Process(target=work, args=(plan, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    result = json.loads(Path(plan["out"]).read_text())
    for name in ("loss", "psnr_heldout", "ssim_heldout", "latent_std/0", "latent_mean/3"):
        assert result[name] == pytest.approx(alone[name], rel=1e-4), name
    made, expected = (
        AutoencoderKL.from_pretrained(place.removeprefix("file://"), low_cpu_mem_usage=False).state_dict()
        for place in (
            str(next((tmp_path / "artifacts" / "autoencoder").iterdir())),
            task.published(record, result["images"]).uri,
        )
    )
    # As a whole, not one by one: Adam moves a weight whose gradient is rounding noise by lr, whichever way it points.
    assert made.keys() == expected.keys()
    flat = [torch.cat([state[name].flatten() for name in sorted(expected)]) for state in (made, expected)]
    assert torch.linalg.vector_norm(flat[0] - flat[1]) < 1e-3 * torch.linalg.vector_norm(flat[1])
