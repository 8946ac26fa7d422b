"""prepare, whole: the same bytes always, nothing lost, nothing done twice, and one changed file costs one shard."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calotype import runs
from calotype.compose import as_data, compose, identity
from calotype.config import Cluster, Data, Prepare, Track
from calotype.data import shards
from calotype.data.items import split
from calotype.data.manifest import Manifest, columns_key, held_out, load_dataset
from calotype.data.sources import open_source
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import ConfigError, DataError
from calotype.tasks import prepare
from PIL import Image, ImageFile

LOCAL, QUIET = Cluster(kind="local"), Track(kind="none")


def job(root: Path, **data: Any) -> Prepare:
    settings = {"name": "digits", "shard_samples": 256, "chunk_samples": 32, **data}
    return Prepare(name="t", root=str(root), cluster=LOCAL, track=QUIET, data=Data(**settings))


def pictures(root: Path, count: int) -> Path:
    """`count` small images in two classes, each with a caption beside it."""
    folder = root / "pictures"
    for index in range(count):
        path = folder / ("cats" if index % 2 else "dogs") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture number {index}")
    return folder


def run(config: Prepare) -> dict[str, Any]:
    resolved = prepare.resolve(config)
    work = prepare.make(resolved, Worker())
    return prepare.commit(resolved, [work(unit) for unit in prepare.plan(resolved).units])


def files(config: Prepare) -> dict[str, tuple[bytes, int]]:
    """Every published file of the dataset: its bytes and when it was written."""
    root = Path(config.root) / "datasets" / config.data.name
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    found = {name: path for name, path in found.items() if name.startswith(("shards/", "manifests/"))}
    return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in found.items()}


def manifest(config: Prepare) -> Manifest:
    return load_dataset(prepare.dataset_store(config))


# ------------------------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepare, dict[str, Any]]:
    config = job(tmp_path_factory.mktemp("digits"))
    return config, run(config)


def test_digits_figures_and_manifest(digits: tuple[Prepare, dict[str, Any]]) -> None:
    config, figures = digits
    found = manifest(config)
    assert found.digest == figures["digest"]
    assert figures["samples"] == 1_797 == sum(total["samples"] for total in found.totals().values())
    assert 140 < figures["held_out"] == found.totals()["held_out"]["samples"] < 220
    assert figures["bytes"] == sum(
        Path(config.root, "datasets/digits", shard.key).stat().st_size for shard in found.shards
    )
    assert (figures["quarantined"], figures["shards"]) == (0, len(found.shards))
    assert found.members == ("json", "png", "txt")
    assert found.meta["classes"] == 10
    assert found.meta["class_names"][7] == "seven"
    assert found.meta["source"]["kind"] == "digits"
    assert found.meta["quarantined"] == []
    assert all(0 < shard.samples <= 256 for shard in found.shards)
    assert config.root not in json.dumps(found.meta)


def test_plain_webdataset_reads_every_digit_once(digits: tuple[Prepare, dict[str, Any]]) -> None:
    import webdataset as wds

    config, _ = digits
    seen: dict[str, str] = {}
    for shard in manifest(config).shards:
        for sample in wds.WebDataset(str(Path(config.root, "datasets/digits", shard.key)), shardshuffle=False):
            assert sample["__key__"] not in seen
            seen[sample["__key__"]] = shard.split
            assert Image.open(io.BytesIO(sample["png"])).size == (32, 32)
            assert 0 <= json.loads(sample["json"])["label"] <= 9
            assert sample["txt"].decode()
    assert set(seen) == {f"digit-{index:04d}" for index in range(1_797)}
    assert all((part == "held_out") == held_out(key, 0.1) for key, part in seen.items())


def test_columns_hold_caption_label_and_size(digits: tuple[Prepare, dict[str, Any]]) -> None:
    import pyarrow.parquet as pq

    config, _ = digits
    shard = manifest(config).shards[0]
    table = pq.read_table(Path(config.root, "datasets/digits", columns_key(shard.key))).to_pylist()
    assert len(table) == shard.samples
    for row, sample in zip(table, shards.iterate(prepare.dataset_store(config), [shard]), strict=True):
        assert row["key"] == sample.key
        assert row["caption"] == bytes(sample.members["txt"]).decode()
        assert row["label"] == json.loads(bytes(sample.members["json"]))["label"]
        assert (row["width"], row["height"], row["member"]) == (32, 32, "png")


def test_a_second_run_writes_nothing_and_decodes_nothing(
    digits: tuple[Prepare, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, figures = digits
    before = files(config)
    assert run(config) == figures
    assert files(config) == before

    other = job(tmp_path, name="p", kind="folder", path=str(pictures(tmp_path, 20)))
    first = run(other)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("an image was decoded"))
    assert run(other) == first


def test_the_contact_sheet_shows_samples(digits: tuple[Prepare, dict[str, Any]]) -> None:
    sheet = np.asarray(prepare.picture(digits[0]))
    assert sheet.shape == (8 * 110, 8 * 96, 3)
    cells = sheet.reshape(8, 110, 8, 96, 3)[:, 2:94, :, 2:94].transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert len({cell.tobytes() for cell in cells}) == 64
    words = sheet.reshape(8, 110, 8, 96, 3)[:, 96:, :, :]
    assert (words.min((1, 3, 4)) < 128).all()  # there is ink below every picture


# ------------------------------------------------------------------------------------------------ the same bytes


def test_same_files_elsewhere_give_the_same_bytes_and_digest(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 60)
    first = job(tmp_path / "one", name="p", kind="folder", path=str(folder), shard_samples=16, chunk_samples=4)
    copied = tmp_path / "copy of it"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    os.utime(next(copied.rglob("*.png")), (1, 1))
    second = job(tmp_path / "two", name="p", kind="folder", path=str(copied), shard_samples=16, chunk_samples=4)
    figures = run(first)
    resolved = prepare.resolve(second)
    units = prepare.plan(resolved).units
    assert units == prepare.plan(first).units
    assert len(units) > 3
    workers = [prepare.make(resolved, Worker(rank=rank, world=3)) for rank in range(3)]
    made = [workers[index % 3](unit) for index, unit in enumerate(reversed(units))]
    assert prepare.commit(resolved, made) == figures
    assert {name: data for name, (data, _) in files(first).items()} == {
        n: data for n, (data, _) in files(second).items()
    }


def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 20)
    here, there = (job(tmp_path / name, name="p", kind="folder", path=str(folder)) for name in ("here", "there"))
    figures = run(here)
    code = (
        "import json, sys; from calotype.compose import build; from calotype.config import Prepare\n"
        "from calotype.environment import Worker; from calotype.tasks import prepare\n"
        "c = prepare.resolve(build(Prepare, json.load(sys.stdin))); w = prepare.make(c, Worker())\n"
        "print(prepare.commit(c, [w(u) for u in prepare.plan(c).units])['digest']); "
        "assert 'torch' not in sys.modules"
    )
    package = str(Path(prepare.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(as_data(there)), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": package, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == figures["digest"]
    assert {n: data for n, (data, _) in files(there).items()} == {n: data for n, (data, _) in files(here).items()}


def test_work_that_was_cut_off_is_taken_up(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 60)
    whole, broken = (
        job(tmp_path / name, name="p", kind="folder", path=str(folder), shard_samples=16, chunk_samples=4)
        for name in ("whole", "broken")
    )
    figures = run(whole)
    units = prepare.plan(broken).units
    work = prepare.make(broken, Worker())
    for unit in units[::2]:
        work(unit)
    torn = next(Path(broken.root).rglob("*.sidecar.json"))
    torn.unlink()  # killed between tar and sidecar
    with pytest.raises(DataError, match="there is no dataset"):
        manifest(broken)
    kept = {name: when for name, (_, when) in files(broken).items()}
    assert run(broken) == figures
    after = files(broken)
    assert {name: after[name][1] for name in kept} == kept
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in files(whole).items()}


def change(folder: Path, how: str) -> None:
    if how == "add":
        shutil.copy(folder / "cats" / "001.png", folder / "cats" / "new.png")
        (folder / "cats" / "new.txt").write_text("new")
    elif how == "remove":
        (folder / "cats" / "001.png").unlink()
        (folder / "cats" / "001.txt").unlink()
    elif how == "caption":
        (folder / "cats" / "001.txt").write_text("another one")
    else:
        shutil.copyfile(folder / "cats" / "003.png", folder / "cats" / "001.png")


@pytest.mark.parametrize("how", ["add", "remove", "caption", "pixels"])
def test_a_change_costs_one_shard(tmp_path: Path, how: str) -> None:
    config = job(tmp_path, name="p", kind="folder", path=str(pictures(tmp_path, 80)), shard_samples=16, chunk_samples=4)
    first = run(config)
    before, old = files(config), manifest(config)
    change(Path(config.data.path), how)
    second = run(config)
    assert second["digest"] != first["digest"]
    assert second["samples"] == 80 + {"add": 1, "remove": -1}.get(how, 0)
    after = files(config)
    assert {name: after[name] for name in before} == before  # old versions stay readable
    new = set(manifest(config).shards) - set(old.shards)
    assert len(new) <= 2  # one; two if it was full and splits
    assert sum(shard.samples for shard in new) <= 17


# ------------------------------------------------------------------------------------------------ nothing is lost


def hostile(tmp_path: Path) -> Path:
    folder = pictures(tmp_path, 30)
    (folder / "cats" / "001.png").write_text("no image")
    whole = (folder / "cats" / "003.png").read_bytes()
    (folder / "cats" / "003.png").write_bytes(whole[:60])
    (folder / "dogs" / "002.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "dogs" / "004.txt").write_text("x" * 10_000)
    (folder / "dogs" / "006.txt").unlink()
    shutil.copy(folder / "dogs" / "008.png", folder / "dogs" / "008.jpg")
    return folder


def test_a_budget_is_kept_by_name_and_nothing_is_published(tmp_path: Path) -> None:
    config = job(tmp_path, name="p", kind="folder", path=str(hostile(tmp_path)), error_budget=6)
    with pytest.raises(DataError) as caught:
        run(config)
    words = str(caught.value)
    assert words.startswith("7 of 31 items are quarantined, more than data.error_budget=6: ")
    assert "'dogs/008.jpg' and 1 more (2 files have this stem: rename all but one)" in words
    assert "'dogs/002.png' (caption is not UTF-8)" in words
    assert words.endswith("set data.error_budget=7")
    assert "\n" not in words
    listed = [json.loads(line) for line in prepare.dataset_store(config).read("quarantined.jsonl").splitlines()]
    assert {row["name"] for row in listed} == {
        *("cats/001.png", "cats/003.png", "dogs/002.png", "dogs/004.png", "dogs/006.png", "dogs/008.png"),
        "dogs/008.jpg",
    }
    with pytest.raises(DataError, match="there is no dataset"):
        manifest(config)

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, error_budget=7))
    figures = run(config)
    assert (figures["samples"], figures["quarantined"]) == (24, 7)
    found = manifest(config)
    assert found.meta["quarantined"] == listed
    assert not prepare.dataset_store(config).exists("quarantined.jsonl")
    items = open_source(config.data).listing().items
    kept = {sample.key for sample in shards.iterate(prepare.dataset_store(config), found.shards)}
    bad = {row["name"] for row in listed}
    assert kept == {item.key for item in items if item.name not in bad}
    assert run(config) == figures  # again, with quarantined items in the shards
    record = runs.Record("prepare", "", "p", config.root, f"{tmp_path}/run")
    write = prepare.make(config, Worker())
    prepare.commit(config, [write(unit) for unit in prepare.plan(config).units], record)
    listed = [json.loads(line) for line in record.artifacts.read("quarantined.jsonl").splitlines()]
    assert listed == manifest(config).meta["quarantined"]


def test_mended_files_come_back(tmp_path: Path) -> None:
    config = job(tmp_path, name="p", kind="folder", path=str(hostile(tmp_path)), error_budget=7)
    run(config)
    folder = pictures(tmp_path, 30)
    (folder / "dogs" / "008.jpg").unlink()
    figures = run(config)
    assert (figures["samples"], figures["quarantined"]) == (30, 0)


def test_a_folder_of_rubbish_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    config = job(tmp_path, name="p", kind="folder", path=str(tmp_path / "pictures"), error_budget=100, captions="none")
    (tmp_path / "pictures" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no images \(other files there: 1 \.md\)"):
        prepare.plan(config)
    for index in range(5):
        (tmp_path / "pictures" / f"{index}.png").write_text("x")
    with pytest.raises(DataError, match="no sample to train on: 5 items, 5 quarantined"):
        run(config)


def test_a_source_that_changes_under_the_work_is_noticed(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 20)
    config = job(tmp_path, name="p", kind="folder", path=str(folder))
    units = prepare.plan(config).units
    work = prepare.make(config, Worker())
    made = [work(unit) for unit in units]
    shutil.copy(folder / "cats" / "001.png", folder / "cats" / "new.png")
    late = prepare.make(config, Worker())
    changed = next(unit for unit in units if unit not in prepare.plan(config).units)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        late(changed)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare.commit(config, made)
    (folder / "cats" / "new.png").unlink()
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare.commit(config, made[1:])  # a result that never came is not a dataset either
    assert prepare.commit(config, made)["samples"] == 20


# ------------------------------------------------------------------------------------------------ plan and identity


def test_units_are_cut_by_the_bytes_of_files_too(tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    for number in range(12):
        with open(folder / f"{number}.png", "wb") as file:
            file.truncate(400_000)
    config = job(tmp_path, name="p", kind="folder", path=str(folder), held_out=0.0, captions="none")
    assert len(prepare.plan(config).units) == 1
    few = job(tmp_path, name="p", kind="folder", path=str(folder), held_out=0.0, captions="none", shard_mb=1)
    assert all(unit.stop - unit.start <= 2 for unit in prepare.plan(few).units)
    assert prepare.plan(config).digest != prepare.plan(few).digest


def test_units_are_small_and_travel(tmp_path: Path) -> None:
    config = job(tmp_path, shard_samples=10_000)
    plan = prepare.plan(config)
    assert [unit.split for unit in plan.units] == ["train", "held_out"]
    assert sum(unit.stop - unit.start for unit in plan.units) == plan.items == 1_797
    assert all(len(pickle.dumps(unit)) < 500 for unit in plan.units)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.digest != prepare.plan(job(tmp_path, shard_samples=100)).digest
    everything = prepare.plan(job(tmp_path, held_out=0.0))
    assert {unit.split for unit in everything.units} == {"train"}


def test_a_finished_run_is_recognised_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path, 10)
    monkeypatch.chdir(tmp_path)
    config = job(tmp_path, name="p", kind="folder", path="pictures")

    def known() -> str:
        return identity("prepare", prepare.resolve(config))

    first = known()
    resolved = prepare.resolve(config)
    assert resolved.data.path == str(folder)
    assert prepare.resolve(resolved) == resolved
    run(config)
    assert known() == first
    assert identity("prepare", prepare.resolve(dataclasses.replace(config, cluster=Cluster(workers=8)))) == first
    digest = manifest(config).digest
    (folder / "cats" / "001.txt").write_text("picture number X")  # as long as before
    assert known() != first
    run(config)
    assert manifest(config).digest != digest
    second = known()
    (folder / "cats" / "001.txt").write_text("picture number 1")
    assert known() not in (first, second)  # back to the start: the newest version is another one, so it runs again
    run(config)
    assert manifest(config).digest == digest


def test_going_back_to_an_earlier_setting_is_not_taken_for_done(tmp_path: Path) -> None:
    small, large = job(tmp_path, image_size=16), job(tmp_path, image_size=24)
    first = identity("prepare", prepare.resolve(small))
    digest = run(small)["digest"]
    assert identity("prepare", prepare.resolve(small)) == first
    assert identity("prepare", prepare.resolve(large)) != first
    assert run(large)["digest"] != digest
    assert identity("prepare", prepare.resolve(small)) != first
    assert run(small)["digest"] == digest == manifest(small).digest


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "ü"])
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.name"):
        prepare.resolve(job(tmp_path, name=name))


def test_composed_configs_resolve(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    overrides = ["cluster=local", "track=none", f"root={tmp_path}"]
    config = compose("prepare", ["data=folder", "data.name=p", f"data.path={tmp_path / 'pictures'}", *overrides])
    assert run(config)["samples"] == 4
    with pytest.raises(ConfigError, match=r"data\.path"):
        prepare.resolve(compose("prepare", ["data=folder", "data.name=p", "data.path=/nowhere", *overrides]))
    assert open_store(str(tmp_path)).folders("datasets") == ["p"]


def test_class_folders_are_mixed_in_every_shard_and_listed(tmp_path: Path) -> None:
    folder = str(pictures(tmp_path, 80))
    config = job(
        tmp_path, name="p", kind="folder", path=folder, captions="folder_name", shard_samples=20, chunk_samples=8
    )
    figures = run(config)
    assert (figures["passed_by"], figures["passed_by_suffix"]) == (80, {".txt": 80})
    found = manifest(config)
    assert (found.meta["classes"], found.meta["class_names"]) == (2, ["cats", "dogs"])
    for shard in found.split("train"):
        labels = [
            json.loads(bytes(sample.members["json"]))["label"]
            for sample in shards.iterate(prepare.dataset_store(config), [shard])
        ]
        assert set(labels) == {0, 1}
    parts = split(open_source(config.data).listing().items, 0.1)
    assert [len(parts[name]) for name in ("train", "held_out")] == [
        found.totals()[name]["samples"] for name in ("train", "held_out")
    ]


def test_the_contact_sheet_of_few_odd_captions(tmp_path: Path) -> None:
    folder = pictures(tmp_path, 3)
    for path in folder.rglob("*.txt"):
        path.write_text("日本語" * 200)
    config = job(tmp_path, name="p", kind="folder", path=str(folder), held_out=0.0)
    run(config)
    assert prepare.picture(config).size == (3 * 96, 110)
    bare = job(tmp_path, name="bare", kind="folder", path=str(folder), held_out=0.0, captions="none")
    run(bare)
    assert prepare.picture(bare).size == (3 * 96, 110)
