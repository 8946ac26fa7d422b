"""Latents exactly once: same bytes for any workers, order, restart or race; every refusal by name."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from calotype.cluster import spread, units
from calotype.config import Autoencoder, CacheLatents, Cluster, Data, Encoding, TrainDenoiser
from calotype.data import cache, differences, lease, shards, statistics
from calotype.data.manifest import DATASET, Manifest, Shard, load_dataset, publish_dataset, sidecar_key
from calotype.data.shards import Sample
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError, DataError
from calotype.model import conditioner, digests
from calotype.model.autoencoder import load_autoencoder
from calotype.tasks import cache as task
from calotype.tasks import denoiser, encode
from diffusers import AutoencoderKL

from tests.caches import CONDITIONS, autoencoder_folder, config_of, dataset, latents_of, run, sample


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return autoencoder_folder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture
def config(tmp_path: Path, weights: str) -> CacheLatents:
    dataset(tmp_path)
    return config_of(tmp_path, weights)


def made_bytes(config: CacheLatents) -> dict[str, bytes]:
    """Everything that a cache is, by key."""
    store, root = latents_of(config), open_store(config.root)
    found = {entry.key: store.read(entry.key) for entry in store.list()}
    return found | {entry.key: root.at("caches").read(entry.key) for entry in root.at("caches").list()}


def test_large_shards_are_dealt_first(tmp_path: Path) -> None:
    dataset(tmp_path, {"train": (4, 9, 5, 9), "held_out": (7,)})
    units = task.plan(config_of(tmp_path, "", autoencoder=Autoencoder(kind="identity", f=1, channels=3)))
    assert [unit.samples for unit in task.largest_first(units)] == [9, 9, 7, 5, 4]


def test_a_cache_holds_what_the_autoencoder_says_of_every_sample(config: CacheLatents) -> None:
    figures = run(config)
    assert (figures["shards"], figures["samples"], figures["samples_encoded"]) == (3, 22, 22)
    assert figures["captions_cut"] == 0
    root = open_store(config.root)
    manifest = cache.load_cache(root, config)
    assert manifest.members == ("latent.npy", "label.npy", "text.npy", "json")
    assert manifest.meta["shape"] == [4, 8, 8]
    assert {row.split for row in manifest.shards} == {"train", "held_out"}
    model = load_autoencoder(config.autoencoder).eval()
    source = load_dataset(root.at("datasets", "toy"))
    stored = list(shards.iterate(latents_of(config), manifest.shards))
    drawn = []
    for made, original in zip(stored, shards.iterate(root.at("datasets", "toy"), source.shards), strict=True):
        arrays = cache.decode_sample(made, CONDITIONS)
        picture = encode.decoded(original, config, (16, 16)).pixels
        mean, std = model.encode(torch.from_numpy(picture)[None].float() / 127.5 - 1)
        assert std is not None
        assert made.key == original.key
        assert arrays["latent"].dtype == np.float16
        assert np.allclose(arrays["latent"], torch.stack([mean[0], std[0]]), atol=2e-3)
        about = json.loads(bytes(made.members["json"]))
        assert about == {"text": f"a {int(made.key[1:])}", "label": int(made.key[1:]) % 10, "width": 24, "height": 20}
        assert arrays["label"] == about["label"]
        assert arrays["text"].shape == (8,)
        drawn.append(arrays["latent"].astype(np.float64))
    means, stds = np.stack(drawn).swapaxes(0, 1)
    assert np.allclose(manifest.meta["channel_mean"], means.mean((0, 2, 3)))
    expected = np.sqrt((means**2 + stds**2).mean((0, 2, 3)) - means.mean((0, 2, 3)) ** 2)
    assert np.allclose(manifest.meta["channel_std"], expected)


def test_webdataset_alone_reads_it(config: CacheLatents) -> None:
    run(config)
    tars = sorted(str(path) for path in Path(latents_of(config).uri.removeprefix("file://")).glob("*.tar"))
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(read) == 22
    assert read[0]["latent.npy"].shape == (2, 4, 8, 8)
    assert set(read[0]) >= {"text.npy", "label.npy", "json"}


def test_a_finished_cache_is_nothing_to_do(config: CacheLatents) -> None:
    first = run(config)
    assert task.plan(config) == []
    again = task.commit(config, [])
    assert again["cache"] == first["cache"]
    assert again["samples"] == 22
    assert again["samples_encoded"] == 0


def encode_in_process(config: CacheLatents, units: list[Shard]) -> list[task.Made]:
    torch.set_num_threads(1)
    encode_shard = task.make(config, Worker(device="cpu"))
    return [encode_shard(unit) for unit in units]


def test_one_worker_or_three_and_any_order_make_the_same_bytes(tmp_path: Path, weights: str, warm: Any) -> None:
    configs = []
    for name in ("one", "three"):
        dataset(tmp_path / name)
        configs.append(config_of(tmp_path / name, weights))
    run(configs[0], order=lambda units: units[::-1])
    units = task.plan(configs[1])
    with ProcessPoolExecutor(3, mp_context=warm) as pool:
        parts = pool.map(encode_in_process, [configs[1]] * 3, [units[index::3] for index in range(3)])
        task.commit(configs[1], [made for part in parts for made in part])
    assert made_bytes(configs[0]) == made_bytes(configs[1])


def test_threads_do_not_change_a_bit(tmp_path: Path, weights: str) -> None:
    made, before = [], torch.get_num_threads()
    for threads in (1, 3):
        dataset(tmp_path / str(threads), {"train": (30,)})
        config = config_of(tmp_path / str(threads), weights, encoding=Encoding(resolution=16, batch=16))
        torch.set_num_threads(threads)
        task.commit(config, map(task.make(config, Worker(threads=threads)), task.plan(config)))
        assert torch.get_num_threads() == threads
        made.append(made_bytes(config))
    torch.set_num_threads(before)
    assert made[0] == made[1]


def test_a_restart_encodes_only_what_is_missing(config: CacheLatents, tmp_path: Path, weights: str) -> None:
    calm = tmp_path / "calm"
    dataset(calm)
    run(config_of(calm, weights))
    first, second, third = task.plan(config)
    encode_shard = task.make(config, Worker())
    encode_shard(first)
    encode_shard(second)
    latents_of(config).delete(cache.latent_key(second).replace(".tar", ".made.json"))  # killed before it was written
    assert task.plan(config) == [second, third]  # the second one is read and judged, not encoded
    assert encode_shard(first).images == 0
    figures = task.commit(config, [encode_shard(second), encode_shard(third)])
    assert figures["shards_encoded"] == 1
    manifest, expected = (cache.load_cache(open_store(c.root), c) for c in (config, config_of(calm, weights)))
    assert manifest.shards == expected.shards
    assert manifest.meta["channel_std"] == expected.meta["channel_std"]
    assert manifest.meta["acceptance"] == expected.meta["acceptance"]
    here, unknown = sorted(manifest.meta["devices"], key=len, reverse=True)
    assert unknown == "not recorded"
    assert all(f"{library} " in here for library in ("torch", "diffusers", "transformers", "pillow")), here
    assert len(cache.finished(latents_of(config), task_shards(config), {}, judged=True)) == 3


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=["bf16", "compiled"],
)
def test_how_the_encoder_computes_is_part_of_the_encoding(
    config: CacheLatents, weights: str, changes: dict[str, Any]
) -> None:
    run(config)
    other = replace(config, encoding=replace(config.encoding, **changes))
    assert cache.find_cache(open_store(config.root), other) is None
    run(other)
    plain, made = (
        np.stack([cache.decode_sample(one, ())["latent"] for one in shards.iterate(
            latents_of(each), cache.load_cache(open_store(config.root), each).shards)])
        for each in (config, other)
    )  # fmt: skip
    assert made.dtype == np.float16
    assert not np.array_equal(made, plain)
    assert np.allclose(made, plain, atol=0.05)
    names = {name for name, _, _ in differences.differing(cache.encoding_of(config), cache.encoding_of(other))}
    assert names == {f"encoding.{name}" for name in changes}


def test_two_racing_writers_leave_one_shard(config: CacheLatents) -> None:
    unit = task.plan(config)[0]
    both = threading.Barrier(2)
    made: list[task.Made] = []

    def write() -> None:
        encode_shard = task.make(config, Worker())
        both.wait()
        made.append(encode_shard(unit))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0].shard == made[1].shard
    assert made[0].statistics == made[1].statistics
    assert [entry.key for entry in latents_of(config).list() if entry.key.endswith(".tar")] == [made[0].shard.key]


def mapped(config: CacheLatents) -> list[task.Made]:
    """As the job does, here."""
    config = replace(config, cluster=Cluster(kind="local"))
    return [made for _, made in spread.map(task.make_leased, config, task.plan(config))]


def test_two_jobs_on_one_cache_share_its_shards(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "AGAIN", 0.1)
    dataset(tmp_path, {"train": (9,) * 8})
    config, both = replace(config_of(tmp_path, weights), cluster=Cluster(kind="local")), threading.Barrier(2)
    made: list[list[task.Made]] = []

    def make(config: CacheLatents, worker: Worker) -> Any:
        work = task.make_leased(config, worker)
        both.wait()
        return work

    def job() -> None:
        made.append([found for _, found in spread.map(make, config, task.plan(config))])

    threads = [threading.Thread(target=job) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encoded = [sum(found.spent is not None for found in each) for each in made]
    assert sum(encoded) == 8
    assert min(encoded) >= 1
    assert [{found.shard for found in each} for each in made] == [{found.shard for found in made[0]}] * 2
    assert [entry.key for entry in latents_of(config).list("") if entry.key.endswith(".lease")] == []


def test_the_shard_of_a_job_that_died_is_made_last(config: CacheLatents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "AGAIN", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.6)
    store, (first, second, third) = latents_of(config), task.plan(config)
    for unit, data in ((first, b'{"beat": 1, "owner": "another/0"}'), (second, b"no lease")):
        store.write(lease.lease_key(cache.latent_key(unit)), data)
    began = time.monotonic()
    made = mapped(config)
    assert time.monotonic() - began > 0.6
    assert made[0].source == third
    assert {found.source for found in made[1:]} == {first, second}
    assert all(found.spent is not None for found in made)
    assert [entry.key for entry in store.list() if entry.key.endswith(".lease")] == []


def test_a_shard_that_is_there_waits_for_no_lease(config: CacheLatents) -> None:
    unit = task.plan(config)[0]
    task.make(config, Worker())(unit)
    latents_of(config).write(lease.lease_key(cache.latent_key(unit)), b"left by one who died after its commit")
    found = task.make_leased(config, Worker(group="another"))(unit)
    assert isinstance(found, task.Made)
    assert found.spent is None


def test_a_writer_whose_machine_differs_in_a_bit_takes_over_the_first_tar(config: CacheLatents) -> None:
    unit = task.plan(config)[0]
    store, key = latents_of(config), cache.latent_key(unit)
    mine = task.make(config, Worker())(unit)
    theirs = [
        Sample(
            s.key, {**s.members, cache.LATENT: cache.to_npy(cache.decode_sample(s, ())["latent"] + np.float16(0.25))}
        )
        for s in shards.iterate(store, [mine.shard])
    ]
    for entry in list(store.list()):
        store.delete(entry.key)
    shards.write_shard(store, key, theirs, unit.chunk_samples, unit.split, source_sha256=unit.sha256)
    store.delete(sidecar_key(key))  # the other machine died between tar and sidecar
    assert shards.existing_shard(store, key) is None
    made = task.make(config, Worker())(unit)
    assert made.shard.sha256 != mine.shard.sha256
    assert made.statistics == statistics.of_samples(theirs)
    assert next(shards.iterate(store, [made.shard])).key == theirs[0].key


def test_a_new_dataset_version_costs_only_its_new_shards(config: CacheLatents) -> None:
    run(config)
    store = open_store(config.root).at("datasets", "toy")
    old = load_dataset(store)
    extra = shards.write_shard(store, "shards/train-new-00000.tar", [sample(n, "a {}") for n in range(90, 93)], 4)
    moved = replace(old.shards[2], split="train")
    publish_dataset(store, replace(old, shards=(*old.shards[:2], moved, extra)))
    newer = task.resolve(replace(config, data=Data(name="toy")))
    assert newer.data.digest != config.data.digest
    assert task.plan(newer) == [task_shards(newer)[0], extra]  # the one that is shown, and the new one
    figures = run(newer)
    assert (figures["samples"], figures["samples_encoded"]) == (25, 3)
    assert cache.load_cache(open_store(config.root), newer).shards[2].split == "train"
    assert cache.load_cache(open_store(config.root), config).totals()["held_out"]["samples"] == 5  # the old one stays


def test_pixel_space_stores_the_pixels(tmp_path: Path, weights: str) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, weights, autoencoder=Autoencoder(kind="identity", f=1, channels=3))
    figures = run(config)
    made = next(shards.iterate(latents_of(config), cache.load_cache(open_store(config.root), config).shards))
    latent = cache.decode_sample(made, ())["latent"]
    original = next(shards.iterate(open_store(config.root).at("datasets", "toy"), task_shards(config)))
    assert latent.shape == (1, 3, 16, 16)
    assert np.array_equal(
        np.round((latent[0].astype(np.float32) + 1) * 127.5), encode.decoded(original, config, (16, 16)).pixels
    )
    assert figures["psnr"] == 60


def task_shards(config: CacheLatents) -> tuple[Shard, ...]:
    return load_dataset(open_store(config.root).at("datasets", "toy")).shards


def test_the_picture_shows_originals_beside_reconstructions(config: CacheLatents) -> None:
    units = task.plan(config)
    encode_shard = task.make(config, Worker(), seen=task.shown(units))
    made = [encode_shard(unit) for unit in units]
    (grid,) = [found.grid for found in made if found.grid is not None]
    assert grid.size == (8 * 16, 2 * 16)  # five held-out images and their reconstructions
    held_out = [s for s in task_shards(config) if s.split == "held_out"]
    original = next(shards.iterate(open_store(config.root).at("datasets", "toy"), held_out))
    assert np.array_equal(
        np.asarray(grid)[:16, :16], encode.decoded(original, config, (16, 16)).pixels.transpose(1, 2, 0)
    )
    assert 0 < task.commit(config, made)["psnr"] < 60
    assert encode_shard(held_out[0]).grid == grid  # also of a shard that was there


# ------------------------------------------------------------------------------------------------ refusals


def test_overflow_is_refused_not_clipped(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, autoencoder_folder(tmp_path / "hot", scale=1e7))
    with pytest.raises(
        DataError, match=r"sample s0\d\d reaches .* more than float16 holds: set encoding\.dtype=float32"
    ):
        run(config)
    assert latents_of(config).folders() == []
    assert [e.key for e in latents_of(config).list()] == ["encoding.json"]
    wide = replace(config, encoding=replace(config.encoding, dtype="float32"))
    assert run(wide)["samples"] == 22


def test_latents_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, autoencoder_folder(tmp_path / "broken", scale=float("nan")))
    with pytest.raises(DataError, match=r"sample s0\d\d is not finite"):
        run(config)


def test_weights_replaced_after_submission_are_refused(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, autoencoder_folder(tmp_path / "weights"))
    autoencoder_folder(tmp_path / "weights", seed=1)
    with pytest.raises(DataError, match="changed after this job was submitted"):
        task.make(config, Worker())


def test_a_sample_without_its_condition_is_named(config: CacheLatents) -> None:
    source = open_store(config.root).at("datasets", "toy")
    bare = Sample("bare", {name: data for name, data in sample(1, "x").members.items() if name != "txt"})
    row = shards.write_shard(source, "shards/bare-00000.tar", [bare], 4)
    with pytest.raises(DataError, match=r"tar/bare: has no text, which conditions\.text is made from"):
        task.make(config, Worker())(row)


def test_a_long_caption_is_cut_and_counted(tmp_path: Path, weights: str) -> None:
    dataset(tmp_path, {"train": (3,)}, caption="one two three four five six seven eight nine {}")
    config = config_of(tmp_path, weights)
    assert run(config)["captions_cut"] == 3
    made = next(shards.iterate(latents_of(config), cache.load_cache(open_store(config.root), config).shards))
    assert json.loads(bytes(made.members["json"]))["cut"] == ["text"]


def test_resolve_refuses_what_is_not_there(tmp_path: Path, weights: str, config: CacheLatents) -> None:
    with pytest.raises(CalotypeError, match="no train_autoencoder run named 'nobody'"):
        config_of(tmp_path, "run:nobody")
    with pytest.raises(DataError, match="no dataset at"):
        config_of(tmp_path, weights, data=Data(name="unknown"))
    with pytest.raises(ConfigError, match=r"encoding\.resolution=17 is not a multiple of 2"):
        config_of(tmp_path, weights, encoding=Encoding(resolution=17))
    store = open_store(config.root).at("datasets", "mute")
    publish_dataset(store, Manifest(DATASET, "mute", ("png",), task_shards(config)))
    with pytest.raises(
        ConfigError, match=r"conditions\.text\.source=text but the samples of dataset mute have no \.txt"
    ):
        config_of(tmp_path, weights, data=Data(name="mute"))


@pytest.fixture
def trainer(config: CacheLatents) -> Iterator[TrainDenoiser]:
    """A denoiser's config that fits the finished cache."""
    run(config)
    shared = {name: getattr(config, name) for name in ("root", "data", "autoencoder", "encoding", "conditions")}
    return TrainDenoiser(name="d", **shared)  # type: ignore[return-value]


def test_the_trainer_finds_the_cache(trainer: TrainDenoiser) -> None:
    assert cache.load_cache(open_store(trainer.root), trainer).totals()["train"]["samples"] == 17


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: replace(c, encoding=replace(c.encoding, dtype="float32")), r"encoding\.dtype"),
        (lambda c: replace(c, encoding=replace(c.encoding, resolution=32)), r"encoding\.resolution"),
        (lambda c: replace(c, conditions={}), r"conditions\.label\.source"),
        (lambda c: replace(c, autoencoder=replace(c.autoencoder, digest="0" * 64)), r"autoencoder\.encoder"),
    ],
)
def test_the_trainer_is_told_the_field_that_differs(trainer: TrainDenoiser, change: Any, field: str) -> None:
    with pytest.raises(DataError, match=f"the nearest one differs in .*{field} .*in the cache, .* here"):
        cache.load_cache(open_store(trainer.root), change(trainer))


@pytest.mark.parametrize("data", [b"[1]", b"\xff", b'{"resolution": 8}'])
def test_the_nearest_one_is_not_what_nobody_can_read(trainer: TrainDenoiser, data: bytes) -> None:
    root = open_store(trainer.root)
    for folder in root.folders("latents"):
        root.at("latents", folder).write("encoding.json", data)
    other = replace(trainer, encoding=replace(trainer.encoding, resolution=32))
    with pytest.raises(DataError, match="dataset toy has no latent cache under"):
        cache.load_cache(root, other)


def test_one_changed_weight_makes_another_cache(trainer: TrainDenoiser, tmp_path: Path, weights: str) -> None:
    model = AutoencoderKL.from_pretrained(weights, low_cpu_mem_usage=False)
    with torch.no_grad():
        model.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    model.save_pretrained(tmp_path / "nudged")
    assert digests.encoder_digest(tmp_path / "nudged") != digests.encoder_digest(weights)
    nudged = task.resolve_inputs(
        replace(trainer, autoencoder=Autoencoder(kind="pretrained", path=str(tmp_path / "nudged")))
    )
    with pytest.raises(DataError, match=r"nearest one differs in autoencoder\.encoder"):
        cache.load_cache(open_store(trainer.root), nudged)
    with torch.no_grad():
        model.load_state_dict(AutoencoderKL.from_pretrained(weights, low_cpu_mem_usage=False).state_dict())
        model.decoder.conv_out.weight.mul_(2)
    model.save_pretrained(tmp_path / "decoder")
    tuned = task.resolve_inputs(
        replace(trainer, autoencoder=Autoencoder(kind="pretrained", path=str(tmp_path / "decoder")))
    )
    assert cache.load_cache(open_store(trainer.root), tuned)  # a fine-tuned decoder keeps its caches


def test_an_unfinished_cache_is_not_found(config: CacheLatents) -> None:
    with pytest.raises(DataError, match=r"has no latent cache under .*run the job `cache_latents`"):
        cache.load_cache(open_store(config.root), config)
    task.make(config, Worker())(task.plan(config)[0])
    with pytest.raises(DataError, match=r"is not finished \(1 of 3 shards encoded\)"):
        cache.load_cache(open_store(config.root), config)
    with pytest.raises(DataError, match="are missing under"):
        task.commit(config, [])


@pytest.mark.parametrize("ends", [(".tar",), (".tar", ".sidecar.json")], ids=["tar", "tar and sidecar"])
def test_a_manifest_names_no_shard_that_was_deleted_meanwhile(config: CacheLatents, ends: tuple[str, ...]) -> None:
    made = [task.make(config, Worker())(unit) for unit in task.plan(config)]
    key = made[1].shard.key
    for end in ends:
        latents_of(config).delete(key.replace(".tar", end))
    with pytest.raises(DataError, match=f"the latents of {made[1].source.key} are missing under .*: run the job again"):
        task.commit(config, made)
    assert made[1].source in task.plan(config)
    assert run(config)["samples"] == 22
    assert cache.load_cache(open_store(config.root), config).shards[1].key == key


def test_labels_that_do_not_fit_are_refused(trainer: TrainDenoiser) -> None:
    label = replace(trainer.conditions["label"], classes=5)
    with pytest.raises(DataError, match=r"classes=5 but the cache has labels up to 9: set .*classes=10"):
        cache.load_cache(open_store(trainer.root), replace(trainer, conditions={**trainer.conditions, "label": label}))


def test_a_tampered_manifest_or_encoding_is_refused(trainer: TrainDenoiser, config: CacheLatents) -> None:
    root = open_store(config.root)
    store = root.at("caches", root.folders("caches")[0])
    data = store.read("manifest.json")
    store.write("manifest.json", data.replace(b'"float16"', b'"float32"'))
    with pytest.raises(DataError, match="it was changed"):
        cache.load_cache(root, trainer)
    latents_of(config).write("encoding.json", b"{}")
    with pytest.raises(DataError, match="it was changed"):
        cache.latents_of(root, cache.encoding_of(config))


# ------------------------------------------------------------------------------------------------ mirrored


def test_latents_of_mirrored_images_lie_beside_and_half_of_them_are_drawn(tmp_path: Path, weights: str) -> None:
    dataset(tmp_path, {"train": (22,)})
    config = config_of(tmp_path, weights, encoding=Encoding(resolution=16, batch=4, mirrored=True))
    run(config)
    root = open_store(config.root)
    manifest = cache.load_cache(root, config)
    assert manifest.members == ("latent.npy", "mirrored.npy", "label.npy", "text.npy", "json")
    stored = list(shards.iterate(latents_of(config), manifest.shards))
    model = load_autoencoder(config.autoencoder).eval()
    original = next(shards.iterate(root.at("datasets", "toy"), task_shards(config)))
    pixels = torch.from_numpy(encode.decoded(original, config, (16, 16)).pixels)[None].float() / 127.5 - 1
    arrays = cache.decode_sample(stored[0], [cache.MIRRORED])
    for name, image in (("latent", pixels), (cache.MIRRORED, pixels.flip(-1))):
        assert np.allclose(arrays[name][0], model.encode(image)[0][0], atol=2e-3)
    assert not np.allclose(arrays["latent"], arrays[cache.MIRRORED], atol=2e-2)

    shared = {name: getattr(config, name) for name in ("root", "data", "autoencoder", "encoding", "conditions")}
    rows = denoiser.Rows(TrainDenoiser(name="d", **shared), manifest, conditioner.empty(config.conditions))
    both = cache.stacked(stored[:1] * 200, [cache.MIRRORED, "text", "label"])
    other = both | {"latent": both[cache.MIRRORED], cache.MIRRORED: both["latent"]}
    plain = {name: array for name, array in both.items() if name != cache.MIRRORED}
    first, second, never = (rows.of(one, list(range(200)), drop=False)["latent"] for one in (both, other, plain))
    kept = (first == never).flatten(1).all(1)
    assert 70 < int(kept.sum()) < 130
    assert torch.equal((second == never).flatten(1).all(1), ~kept)
    assert torch.equal(
        rows.of({name: array[7:8] for name, array in both.items()}, [7], drop=False)["latent"][0], first[7]
    )
