"""The gate of a latent cache: what it refuses, what it leaves out, and that neither is silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import runs
from calotype.config import Accept, Autoencoder, CacheLatents, Data
from calotype.data import Sample, cache, filters, shards
from calotype.data.manifest import DATASET, Manifest, load_dataset, publish_dataset
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.tasks import accept
from calotype.tasks import cache as task
from calotype.tasks.encode import Lost
from calotype.tasks.made import Made, recognised
from diffusers import AutoencoderKL

from tests.caches import autoencoder_folder, config_of, dataset, latents_of, run, sample

PIXELS = Autoencoder(kind="identity", f=1, channels=3)


def manifest_of(config: CacheLatents) -> Manifest:
    return cache.load_cache(open_store(config.root), config)


def test_the_report_is_in_the_manifest_and_the_figures(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    figures = run(config)
    report = manifest_of(config).meta["acceptance"]
    assert report["decoded"] == 6  # two of each shard
    assert report["collapsed"] == []
    assert report["psnr"] == figures["psnr"] == accept.BEST  # float16 holds them to the last bit
    assert report["worst"][0][1] == min(psnr for _, psnr in report["worst"])
    assert {key for key, _ in report["worst"]} <= {f"s{number:03d}" for number in (0, 1, 9, 10, 17, 18)}


def test_a_white_out_is_refused_and_encodes_nothing_again_when_it_is_wanted(tmp_path: Path) -> None:
    dataset(tmp_path)
    folder = autoencoder_folder(tmp_path / "white")
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    torch.nn.init.constant_(model.decoder.conv_out.bias, 9.0)
    model.save_pretrained(folder)
    config = config_of(tmp_path, folder, accept=Accept())
    assert config.accept.psnr == accept.BROUGHT
    with pytest.raises(DataError, match=r"6 of them decode to [\d.]+ dB .* less than accept\.psnr=12 \(worst: s0\d\d "):
        run(config)
    assert cache.find_cache(open_store(config.root), config) is None
    figures = run(replace(config, accept=Accept(psnr=0)))
    assert (figures["samples"], figures["samples_encoded"]) == (22, 0)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_latents_that_were_scaled_twice_are_refused(tmp_path: Path, factor: float) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    encode_shard, store = task.make(config, Worker()), latents_of(config)
    for unit in task.plan(config):
        right = encode_shard(unit)
        theirs = []
        for one in shards.iterate(store, [right.shard]):
            scaled = cache.decode_sample(one, ())["latent"] * np.float16(factor)
            theirs.append(Sample(one.key, {**one.members, cache.LATENT: cache.to_npy(scaled)}))
        for entry in list(store.list()):
            if entry.key.startswith(unit.sha256):
                store.delete(entry.key)
        shards.write_shard(store, cache.latent_key(unit), theirs, 256, unit.split, source_sha256=unit.sha256)
    made = [encode_shard(unit) for unit in load_dataset(open_store(config.root).at("datasets", "toy")).shards]
    assert all(found.images == 0 for found in made)
    with pytest.raises(DataError, match=r"storing them costs [\d.]+ dB, more than accept\.psnr_loss=1 \(worst: s0"):
        task.commit(config, made)
    assert open_store(config.root).folders("caches") == []


@pytest.mark.parametrize("dead", [2, 3])
def test_a_collapsed_posterior_is_counted_and_refused(tmp_path: Path, dead: int) -> None:
    dataset(tmp_path)
    folder = autoencoder_folder(tmp_path / "collapsed")
    model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():  # of these channels every image has the posterior N(0, 1)
        for channel in range(dead):
            for half in (channel, channel + 4):
                model.quant_conv.weight[half] = 0
                model.quant_conv.bias[half] = 0
    model.save_pretrained(folder)
    config = config_of(tmp_path, folder)
    if dead == 2:
        run(config)
        assert manifest_of(config).meta["acceptance"]["collapsed"] == [0, 1]
        return
    with pytest.raises(DataError, match=r"channels \[0, 1, 2\] of 4 says nothing .* more than accept\.collapsed=0\.5"):
        run(config)
    assert run(replace(config, accept=Accept(psnr=0, collapsed=0.75)))["samples"] == 22


# ----------------------------------------------------------------------------------------------- left out


def broken(number: int, how: str) -> Sample:
    whole = sample(number, "a {}").members
    png = bytes(whole["png"])
    members: dict[str, dict[str, bytes]] = {
        "cut": {"png": png[: len(png) // 2]},
        "no image": {"png": b"not an image"},
        "empty": {"png": b""},
        "json": {"json": b"{"},
        "list": {"json": b"[]"},
        "text": {"txt": b"\xff\xfe"},
        "label": {"json": b'{"label": "cat"}'},
        "negative": {"json": b'{"label": -1}'},
    }
    return Sample(f"s{number:03d}", {**whole, **members[how]})


HOW = ("cut", "no image", "empty", "json", "list", "text", "label", "negative")


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., CacheLatents]:
    """Two shards of 12: every second sample of the first 16 is broken, each in its own way."""
    store, rows = open_store(str(tmp_path)).at("datasets", "toy"), []
    for part in range(2):
        samples = []
        for number in range(part * 12, part * 12 + 12):
            bad = number % 2 and number < 16
            samples.append(broken(number, HOW[number // 2]) if bad else sample(number, "a {}"))
        columns = {"width": [24] * 12}
        rows.append(shards.write_shard(store, f"shards/{part}.tar", samples, 4, columns=columns))
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), tuple(rows)))

    def config(budget: int) -> CacheLatents:
        data = Data(name="toy", error_budget=budget)
        return config_of(tmp_path, autoencoder_folder(tmp_path / "weights"), data=data)

    return config


BAD = [f"s{number:03d}" for number in range(1, 16, 2)]


def test_broken_samples_are_left_out_by_name_within_the_budget(damaged: Callable[..., CacheLatents]) -> None:
    config = damaged(8)
    figures = run(config)
    assert (figures["samples"], figures["quarantined"]) == (16, 8)
    manifest = manifest_of(config)
    lost = manifest.meta["quarantined"]
    assert [one["key"] for one in lost] == BAD
    assert [(one["shard"], one["row"]) for one in lost] == [(f"shards/{n // 12}.tar", n % 12) for n in range(1, 16, 2)]
    assert lost[0]["reason"].startswith("not a readable image")
    assert lost[6]["reason"] == "has label 'cat', which is no class number"
    keys = [one.key for one in shards.iterate(latents_of(config), manifest.shards)]
    assert keys == [f"s{number:03d}" for number in range(24) if f"s{number:03d}" not in BAD]
    record = runs.Record("cache_latents", "", "c", config.root, f"{config.root}/run")
    task.commit(config, [], record)
    listed = [json.loads(line) for line in record.artifacts.read("quarantined.jsonl").splitlines()]
    assert listed == [{"name": f"{one['shard']}/{one['key']}", "reason": one["reason"]} for one in lost]


def test_past_the_budget_nothing_is_committed_and_every_name_is_said(damaged: Callable[..., CacheLatents]) -> None:
    config = damaged(7)
    with pytest.raises(
        DataError, match=r"8 samples of dataset toy .* more than data\.error_budget=7: shards/0\.tar/s001"
    ):
        run(config)
    with pytest.raises(DataError, match=r"more than data.error_budget=0: shards/0\.tar/s001: not a readable"):
        run(damaged(0))
    assert run(damaged(8))["samples_encoded"] == 0  # what was encoded stayed

    record = runs.Record("cache_latents", "", "c", config.root, f"{config.root}/run")
    shard = load_dataset(open_store(config.root).at("datasets", "toy")).shards[0]
    one = Made(shard, shard, {}, "", [Lost(row, f"s{row:03d}", "broken") for row in range(9)])
    with pytest.raises(DataError, match=r"9 samples of .*; all of them: .*/run/quarantined\.jsonl;"):
        task.leave_out(one, [(shard, lost) for lost in one.lost], config, record)
    assert len(record.artifacts.read("quarantined.jsonl").splitlines()) == 9  # and not only those that fit a sentence


def test_what_was_left_out_is_found_again_when_its_maker_died(damaged: Callable[..., CacheLatents]) -> None:
    config = damaged(8)
    encode_shard = task.make(config, Worker())
    units = task.plan(config)
    first = encode_shard(units[0])
    store = latents_of(config)
    store.delete(cache.latent_key(units[0]).replace(".tar", ".made.json"))
    again = encode_shard(units[0])
    assert again.images == 0
    assert [(one.row, one.key) for one in again.lost] == [(one.row, one.key) for one in first.lost]
    assert {one.reason for one in again.lost} == {"not recorded"}


def test_a_selection_fits_a_cache_that_lacks_some(damaged: Callable[..., CacheLatents]) -> None:
    config = damaged(8)
    run(config)
    store, manifest = open_store(config.root).at("datasets", "toy"), manifest_of(config)
    source = load_dataset(store)
    gone = frozenset({"s000", "s001", "s014", "s023"})
    keep = filters.load(store, filters.publish(store, source, [], gone), source)
    mine = filters.of_cache(keep, source, manifest)
    left = []
    for shard in manifest.shards:
        samples = shards.iterate(latents_of(config), [shard])
        left += [one.key for one, kept in zip(samples, mine[shard.key], strict=True) if kept]
    assert left == [key for n in range(24) if (key := f"s{n:03d}") not in gone and key not in BAD]


def test_a_shard_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path)).at("datasets", "toy")
    row = shards.write_shard(store, "shards/0.tar", [broken(number, "empty") for number in range(3)], 4)
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), (row,)))
    config = config_of(tmp_path, "", autoencoder=PIXELS, data=Data(name="toy", error_budget=9))
    with pytest.raises(DataError, match=r"shards/0\.tar: no sample can be encoded \(not a readable image"):
        run(config)


def test_what_a_shard_remembers_of_the_first_format_still_counts(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    unit = task.plan(config)[0]
    made = task.make(config, Worker())(unit)
    key = cache.latent_key(unit).replace(".tar", ".made.json")
    store = latents_of(config)
    found: dict[str, Any] = json.loads(store.read(key))
    assert found.pop("decoded")
    assert found.pop("lost") == []
    store.write(key, json.dumps(found | {"format": "calotype.made/1", "device": "an old one"}).encode())
    again = recognised(open_store(config.root).at("datasets", "toy"), store, unit, made.shard)
    assert (again.device, again.statistics, again.decoded) == ("an old one", made.statistics, [])


def _with(name: str, value: Any, found: dict[str, Any]) -> dict[str, Any]:
    return found | {"statistics": found["statistics"] | {name: value}}


HINTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda found: [],
    lambda found: None,
    lambda found: found | {"statistics": {}},
    lambda found: found | {"device": 3},
    lambda found: found | {"lost": [[0]]},
    lambda found: found | {"decoded": [["s000", "high", 1.0]]},
    *(partial(_with, name, value) for name, value in (
        ("count", 0), ("count", 1.5), ("count", 9 * 16 * 16 + 1), ("sum", [float("nan")] * 3), ("sum", [1e9] * 3),
        ("sum", [0.0] * 2), ("squares", [1e300] * 3), ("variance", [-1.0] * 3), ("largest", "1"), ("largest", 1e300),
        ("labels", -1), ("cut", None),
    )),
]  # fmt: skip


def test_what_no_maker_can_have_left_counts_as_not_there(tmp_path: Path) -> None:
    dataset(tmp_path)
    config = config_of(tmp_path, "", autoencoder=PIXELS)
    unit, source = task.plan(config)[0], open_store(config.root).at("datasets", "toy")
    made = task.make(config, Worker())(unit)
    store, key = latents_of(config), cache.made_key(made.shard.key)
    sound = json.loads(store.read(key))
    assert recognised(source, store, unit, made.shard).device == made.device
    for hint in [b"", b"\xff", *(json.dumps(change(sound)).encode() for change in HINTS)]:
        store.write(key, hint)
        found = recognised(source, store, unit, made.shard)
        assert (found.device, found.statistics) == ("not recorded", made.statistics), hint[:300]
