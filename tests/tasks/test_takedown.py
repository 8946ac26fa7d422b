"""A takedown: samples leave the bytes of every cache, whoever is killed meanwhile, and do not come back."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calotype import caches as known
from calotype import runs
from calotype.config import Autoencoder, CacheLatents, Data, Encoding
from calotype.data import Stream, cache, dataset, filters, garbage, shards, takedowns, verify
from calotype.data.files import FolderStore
from calotype.data.manifest import DATASET, Manifest, cache_versions, load_dataset, publish_dataset
from calotype.data.s3 import S3Store
from calotype.data.store import Store, open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError, DataError
from calotype.tasks import batches, takedown
from calotype.tasks import cache as task
from calotype.tasks import verify as gate
from PIL import Image

from tests import caches
from tests.caches import another_version, config_of, latents_of, recorded, run

Say = Callable[..., tuple[int, str]]
PIXELS = Autoencoder(kind="identity", f=1, channels=3)
GONE = ("s003", "s010")  # of the first and the second shard
TRAIN = [f"s{number:03d}" for number in range(17)]


def cached(root: Path | str) -> CacheLatents:
    caches.dataset(root)
    return config_of(root, "", autoencoder=PIXELS)


def smaller(config: CacheLatents) -> CacheLatents:
    return replace(config, encoding=replace(config.encoding, resolution=8))


def found(config: CacheLatents) -> Manifest:
    return cache.load_cache(open_store(config.root), config)


def keys_of(config: CacheLatents) -> list[str]:
    return [one.key for one in shards.iterate(latents_of(config), found(config).shards)]


def everything(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list()}


def take_down(root: str, *keys: str) -> takedown.Survey:
    survey = takedown.survey(root, frozenset(keys))
    takedown.take_down(root, survey)
    return survey


def left(keys: list[str], *gone: str) -> list[str]:
    return [key for key in keys if key not in (gone or GONE)]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "gone.txt"
    path.write_text("# asked for in May\ns003\ns010\nnobody\n")
    return path


def test_they_leave_every_encoding_and_cache_and_the_old_manifests_stay(bucket: str, typed: Say, listed: Path) -> None:
    config = cached(bucket)
    run(config)
    recorded("cache_latents", config)
    small, newer = smaller(config), another_version(config)
    run(small)
    run(newer)
    before, first = {one.data.digest: keys_of(one) for one in (config, newer)}, found(config)
    root = open_store(bucket)
    assert any(b"s003" in data for data in everything(root.at("latents")).values())
    gc = ("cache", "gc", "--takedown", str(listed), "--root", bucket)
    status, out = typed(*gc)
    assert (status, "say --yes" in out) == (1, True)
    assert "the list names 2 samples in 2 shards of dataset toy\n" in out
    assert keys_of(config) == before[config.data.digest]
    status, out = typed(*gc, "--yes")
    assert status == 0, out
    assert f"no latents under {bucket}: 1 of 3" in out
    assert f"the images of 2 samples still lie in 2 shards of {bucket}/datasets/toy" in out
    for key, data in everything(root.at("latents")).items():
        assert not [gone for gone in GONE if gone.encode() in data], key
    for one in (config, small, newer):
        manifest = found(one)
        assert keys_of(one) == left(before[one.data.digest])
        assert verify.verify(latents_of(one), manifest) == []
        assert task.plan(one) == []
        assert run(one)["samples_encoded"] == 0
        lost = [(taken["key"], taken["row"], taken["reason"]) for taken in manifest.meta["quarantined"]]
        assert lost == [("s003", 3, "taken down"), ("s010", 1, "taken down")][one is newer :]
    identity = cache.cache_id(cache.encoding_id(cache.encoding_of(config)), config.data.digest)
    stream = Stream(dataset.open_cache(bucket, identity), seed=0, batch=5)
    assert {key for _, batch in zip(range(3), stream) for key in batch.keys} == set(left(TRAIN))
    stream.close()
    status, out = typed("cache", "verify", identity, "--root", bucket)
    assert (status, "all as its manifest says" in out) == (0, True), out
    status, out = typed("cache", "show", identity, "--root", bucket)
    assert f"{first.digest}: samples of 2 of its 3 shards were taken down" in out
    status, out = typed("cache", "show", identity, "--digest", first.digest[:10], "--root", bucket)
    assert (status, "samples of 2 of its 3 shards were taken down" in out) == (0, True)
    assert "s010 (taken down)" not in out
    status, out = typed(*gc)  # a second time there is nothing to ask
    assert (status, "they were taken down before, or never encoded" in out) == (0, True)


def test_no_job_encodes_them_again_and_its_bytes_are_those_of_the_takedown(tmp_path: Path) -> None:
    config = cached(tmp_path)
    run(config)
    take_down(config.root, *GONE)
    made = everything(latents_of(config))
    newer = another_version(config)
    assert [unit.key for unit in task.plan(newer) if unit.key.startswith("shards/train")] == [
        "shards/train-new-00000.tar"
    ]
    assert run(newer)["samples_encoded"] == 3
    assert keys_of(newer) == left([*TRAIN[9:], *(f"s{number:03d}" for number in (*range(17, 22), *range(90, 93)))])
    for key in made:
        if key != "encoding.json":
            latents_of(config).delete(key)
    encode_shard = task.make(config, Worker())
    for unit in load_dataset(open_store(config.root).at("datasets", "toy"), config.data.digest).shards:
        encode_shard(unit)
    again = everything(latents_of(config))
    tars = [key for key in made if key.endswith((".tar", ".sidecar.json"))]
    assert {key: again[key] for key in tars} == {key: made[key] for key in tars}
    assert not [gone for data in again.values() for gone in GONE if gone.encode() in data]
    small = smaller(config)  # another encoding, which nobody had made by then
    assert run(small)["samples"] == 20
    assert [one["key"] for one in found(small).meta["quarantined"]] == list(GONE)


def test_a_selection_of_the_source_fits_afterwards(tmp_path: Path) -> None:
    config = cached(tmp_path)
    store = open_store(config.root).at("datasets", "toy")
    source, rows = load_dataset(store), []
    for row in source.shards:
        keys = [one.key for one in shards.iterate(store, [row])]
        rows.append(replace(row, columns_sha256=shards.publish_columns(store, row.key, {"key": keys})))
    publish_dataset(store, replace(source, shards=tuple(rows)))
    config = task.resolve(replace(config, data=Data(name="toy")))
    run(config)
    more = frozenset({"s000", "s003", "s012"})
    selection = filters.publish(store, load_dataset(store), [], more)
    take_down(config.root, *GONE)
    keep = filters.of_cache(filters.load(store, selection, load_dataset(store)), load_dataset(store), found(config))
    mine = dataset.Dataset(latents_of(config), found(config).split("train"), keep=keep)
    assert [one.key for one in mine.samples()] == left(TRAIN, *GONE, *more)


def test_what_could_not_be_encoded_stays_named_and_may_be_taken_down_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path)).at("datasets", "toy")
    samples = [caches.sample(number, "a {}") for number in range(9)]
    for number in (2, 4):
        samples[number].members["png"] = b"no image"
    row = shards.write_shard(store, "shards/0.tar", samples, 4)
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), (row,)))
    config = config_of(tmp_path, "", autoencoder=PIXELS, data=Data(name="toy", error_budget=2))
    run(config)
    for gone in (("s004", "s006"), ("s000",)):  # one after the other: the second finds the first one's shard
        take_down(config.root, *gone)
    lost = [(one["key"], one["row"], one["reason"]) for one in found(config).meta["quarantined"]]
    assert [one for one in lost if one[2] == "taken down"] == [(f"s00{n}", n, "taken down") for n in (4, 6, 0)]
    assert [one[:2] for one in lost if one[2] != "taken down"] == [("s002", 2)]
    assert keys_of(config) == ["s001", "s003", "s005", "s007", "s008"]
    assert not [key for key, data in everything(latents_of(config)).items() if b"s004" in data or b"s006" in data]
    assert gate.counts(config.root, found(config)).wrong == []
    newer = replace(row, split="held_out")
    publish_dataset(store, replace(load_dataset(store), shards=(newer,)))
    again = task.resolve(replace(config, data=Data(name="toy", error_budget=1)))
    assert run(again)["samples_encoded"] == 0  # those taken down are not among those over the budget
    assert gate.counts(config.root, found(again)).wrong == []


def test_of_a_shard_or_a_cache_nothing_may_be_left(tmp_path: Path) -> None:
    config = cached(tmp_path)
    run(config)
    take_down(config.root, *TRAIN[:9])
    assert keys_of(config) == [*TRAIN[9:], *(f"s{number:03d}" for number in range(17, 22))]
    assert gate.counts(config.root, found(config)).wrong == []
    newer = another_version(config)
    old = load_dataset(open_store(config.root).at("datasets", "toy"), config.data.digest)
    publish_dataset(open_store(config.root).at("datasets", "toy"), replace(old, meta={"again": 1}))
    again = task.resolve(replace(newer, data=Data(name="toy")))
    assert run(again)["samples"] == 13
    take_down(config.root, *TRAIN, *(f"s{number:03d}" for number in range(17, 22)))
    assert found(config).shards == ()
    assert [entry.key for entry in latents_of(config).list()] == ["encoding.json"]
    with pytest.raises(DataError, match="every sample of dataset toy was taken down"):
        run(smaller(config))


def test_latents_whose_dataset_is_gone_lose_them_too(tmp_path: Path) -> None:
    config = cached(tmp_path)
    run(config)
    rows = load_dataset(open_store(config.root).at("datasets", "toy")).shards
    for entry in list(open_store(config.root).at("datasets", "toy").list("shards/")):
        open_store(config.root).at("datasets", "toy").delete(entry.key)
    take_down(config.root, "s010")
    assert keys_of(config) == left([*TRAIN, *(f"s{number:03d}" for number in range(17, 22))], "s010")
    assert [(one["shard"], one["row"]) for one in found(config).meta["quarantined"]] == [(rows[1].key, 1)]
    for entry in list(open_store(config.root).at("datasets").list()):
        open_store(config.root).at("datasets").delete(entry.key)
    take_down(config.root, "s011")
    assert "s011" not in keys_of(config)
    assert found(config).meta["quarantined"][-1]["row"] == -1


def test_of_several_shapes_the_rest_stays_in_its_buckets(tmp_path: Path) -> None:
    store, samples = open_store(str(tmp_path)).at("datasets", "toy"), []
    for number in range(10):
        samples.append(caches.sample(number, "a {}"))
        picture = Image.open(io.BytesIO(samples[-1].members["png"])).resize((40, 20))
        file = io.BytesIO()
        (picture.rotate(90, expand=True) if number % 2 else picture).save(file, "PNG")
        samples[-1].members["png"] = file.getvalue()
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), (
        shards.write_shard(store, "shards/0.tar", samples, 4, columns={}),
    )))  # fmt: skip
    encoding = Encoding(resolution=16, bucket_step=4, batch=4)
    config = config_of(tmp_path, "", autoencoder=PIXELS, encoding=encoding)
    run(config)
    assert [count for _, count in found(config).shards[0].buckets] == [5, 5]
    take_down(config.root, "s003", "s004", "s008")
    (row,) = found(config).shards
    assert sorted(count for _, count in row.buckets) == [3, 4]
    keys = keys_of(config)
    assert sorted(keys) == left([f"s{number:03d}" for number in range(10)], "s003", "s004", "s008")
    assert [f"s{number:03d}" for number in cache.source_rows(latents_of(config), row, ())] == keys
    assert gate.counts(config.root, found(config)).wrong == []
    data = batches.resolve(
        replace(config.data, filter=[["key", "!=", "s005"]]), config.root, (latents_of(config), found(config))
    )
    mine = batches.source_of(data, config.root, latents_of(config), found(config))("train")
    assert [one.key for one in mine.samples()] == left(keys, "s005")
    made = everything(latents_of(config))
    for key in made:
        if key != "encoding.json":
            latents_of(config).delete(key)
    task.make(config, Worker())(load_dataset(store).shards[0])
    again = everything(latents_of(config))
    assert {key: data for key, data in again.items() if not key.endswith(".made.json")} == {
        key: data for key, data in made.items() if not key.endswith(".made.json")
    }


# ------------------------------------------------------------------------------------------------ killed


class Killed(BaseException):
    """As kill -9: nobody catches it."""


def changes(kinds: tuple[type[Store], ...], patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """`act` before every change of a store."""
    for kind in kinds:
        for name in ("publish", "write", "delete"):
            real = getattr(kind, name)

            def changed(*args: Any, real: Any = real) -> Any:
                act()
                return real(*args)

            patch.setattr(kind, name, changed)


def whole(config: CacheLatents) -> list[str]:
    return verify.verify(latents_of(config), found(config), jobs=1)


def test_killed_before_any_change_it_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In between every cache is whole, and afterwards all bytes are those of a calm run."""
    template, calm = tmp_path / "template", tmp_path / "calm"
    config = cached(template)
    run(config)
    newer = another_version(config)
    run(newer)
    shutil.copytree(template, calm)
    take_down(str(calm), *GONE)
    wanted = everything(open_store(str(calm)))
    before, after = (
        [keys_of(one) for one in (config, newer)],
        [keys_of(replace(one, root=str(calm))) for one in (config, newer)],
    )
    deaths = 0
    while True:
        place = tmp_path / f"killed-{deaths}"
        shutil.copytree(template, place)
        left_to_live = [deaths]

        def die(left_to_live: list[int] = left_to_live) -> None:
            left_to_live[0] -= 1
            if left_to_live[0] < 0:
                raise Killed

        with monkeypatch.context() as patch:
            changes((FolderStore,), patch, die)
            try:
                take_down(str(place), *GONE)
                break
            except Killed:
                deaths += 1
        here = [replace(one, root=str(place)) for one in (config, newer)]
        assert [whole(one) for one in here] == [[], []]
        assert all(keys in (old, new) for keys, old, new in zip(map(keys_of, here), before, after, strict=True))
        take_down(str(place), *GONE)
        assert everything(open_store(str(place))) == wanted
    assert deaths > 15


def kill_at(number: int, root: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    count = [number]

    def die() -> None:
        count[0] -= 1
        if count[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        changes((S3Store,), patch, die)
        take_down(root, *GONE)


def test_kill_9_on_s3_and_then_the_same_command(bucket: str, warm: Any, typed: Say, listed: Path) -> None:
    config = cached(bucket)
    run(config)
    before = keys_of(config)
    for number in (3, 6, 4):  # in the middle of writing, of publishing and of deleting
        process = warm.Process(target=kill_at, args=(number, bucket, dict(os.environ)))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert whole(config) == []
        assert keys_of(config) in (before, left(before))
    status, out = typed("cache", "gc", "--takedown", str(listed), "--root", bucket, "--yes")
    assert status == 0, out
    assert keys_of(config) == left(before)
    assert not [key for key, data in everything(latents_of(config)).items() if b"s003" in data or b"s010" in data]
    assert len([entry for entry in latents_of(config).list() if entry.key.endswith(".tar")]) == 3


# ------------------------------------------------------------------------------------------------ refused


def test_what_is_no_list_of_keys_is_refused(tmp_path: Path, typed: Say) -> None:
    config = cached(tmp_path)
    run(config)
    path = tmp_path / "list.txt"

    def gc(*words: str) -> tuple[int, str]:
        return typed("cache", "gc", "--takedown", str(path), "--root", config.root, "--yes", *words)

    status, out = gc()
    assert (status, f"--takedown '{path}' cannot be read as a text file of keys" in out) == (1, True)
    path.write_text("# nobody\n\n")
    status, out = gc()
    assert (status, "names no key: write one per line" in out) == (1, True)
    path.write_text("nobody\n")
    status, out = gc()
    assert (status, f"no latents under {config.root}: 1 of 1" in out) == (0, True)
    status, out = gc("all")
    assert (status, "give one up in a command of its own" in out) == (1, True)
    assert open_store(config.root).folders("takedowns") == []


def test_a_job_that_encodes_them_just_now_is_named(tmp_path: Path) -> None:
    config = cached(tmp_path)
    with runs.attempt_of(runs.begin("cache_latents", config, lambda _: ("", ""), lambda _: None)):
        with pytest.raises(CalotypeError, match=r"cache_latents c encodes dataset toy on .* just now: let it end"):
            takedown.survey(config.root, frozenset(GONE))
        takedown.survey(config.root, frozenset({"of another dataset"}))


def test_a_job_that_begins_while_the_question_is_read_is_named(tmp_path: Path) -> None:
    config = cached(tmp_path)
    survey = takedown.survey(config.root, frozenset(GONE))
    record = runs.begin("cache_latents", config, lambda _: ("", ""), lambda _: None)
    told = r"cache_latents c encodes .* just now: .* give the same command again"
    with runs.attempt_of(record), pytest.raises(CalotypeError, match=told):
        takedown.take_down(config.root, survey)
    assert run(config)["samples"] == 20  # they are marked: a job does not encode them any more


def test_a_damaged_shard_is_named_and_all_others_are_rewritten(tmp_path: Path, typed: Say, listed: Path) -> None:
    config = cached(tmp_path)
    run(config)
    small = smaller(config)
    run(small)
    store, rows = latents_of(config), found(config).shards
    data = bytearray(store.read(rows[0].key))
    data[5000] ^= 1
    store.write(rows[0].key, bytes(data))
    gc = ("cache", "gc", "--takedown", str(listed), "--root", config.root, "--yes")
    for _ in range(2):  # the second time nothing else is left to be done
        status, out = typed(*gc)
        assert (status, "1 latent shard could not be rewritten" in out) == (1, True), out
        assert f"{rows[0].key} of cache" in out
        assert "is damaged or replaced" in out
        assert keys_of(small) == left(TRAIN + [f"s{number:03d}" for number in range(17, 22)])
        assert [row.key for row in found(config).shards if row in rows] == [rows[0].key, rows[2].key]
        held = everything(open_store(config.root).at("latents"))
        assert not [key for key, data in held.items() if b"s010" in data]
        assert {key.partition("/")[2] for key, data in held.items() if b"s003" in data} == {rows[0].key}
    place = cache.cache_store(open_store(config.root), config)
    for key in cache_versions(place):  # given up
        place.delete(key)
    status, out = typed(*gc)
    assert status == 0, out
    assert not store.exists(rows[0].key)
    run(config)
    assert keys_of(config) == keys_of(small)


def test_what_nobody_can_search_is_named_and_stops_nothing_else(tmp_path: Path, typed: Say, listed: Path) -> None:
    """A latent shard is damaged whose dataset is gone, and there is no other of that source shard."""
    config = cached(tmp_path)
    run(config)
    newer = another_version(config)
    run(newer)
    root, gone = open_store(config.root), open_store(config.root).at("datasets", "toy")
    for key in [entry.key for entry in gone.list("manifests/")][:1]:
        gone.delete(key)  # of the first version, whose first shard the other does not have
    place = cache.cache_store(root, config)
    store, (first, *_) = latents_of(config), found(config).shards
    for key in cache_versions(place):
        place.delete(key)
    data = bytearray(store.read(first.key))
    data[5000] ^= 1
    store.write(first.key, bytes(data))
    gc = ("cache", "gc", "--takedown", str(listed), "--root", config.root, "--yes")
    for _ in range(2):
        status, out = typed(*gc)
        assert (status, f"cannot be searched: {store.uri}/{first.key}" in out) == (1, True), out
        held = everything(root.at("latents"))
        assert not [key for key, data in held.items() if b"s010" in data]
    assert "s010" not in keys_of(newer)
    store.delete(first.key)
    status, out = typed(*gc)
    assert (status, "cannot be searched" in out) == (0, False), out


def test_another_takedown_may_begin_before_the_last_step_of_one(tmp_path: Path) -> None:
    """What the one wrote is what a manifest names, until the other has rewritten it."""
    config = cached(tmp_path)
    run(config)
    one, other = (takedown.survey(config.root, frozenset({key})) for key in ("s003", "s005"))
    takedown.mark(config.root, one)
    takedown.rewrite(config.root)
    takedown.succeed(config.root)
    takedown.mark(config.root, other)
    takedown.delete(config.root)
    assert whole(config) == []
    takedown.rewrite(config.root)
    takedown.delete(config.root)  # before it was succeeded
    assert whole(config) == []
    take_down(config.root, "s005")
    assert whole(config) == []
    assert keys_of(config) == left([*TRAIN, *(f"s{number:03d}" for number in range(17, 22))], "s003", "s005")
    assert not [key for key, data in everything(latents_of(config)).items() if b"s003" in data or b"s005" in data]


def test_marks_of_others_meanwhile_are_rewritten_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the one that is done first would leave to the other what it was asked for, and say that it is done."""
    config = cached(tmp_path)
    run(config)
    one, other = (takedown.survey(config.root, frozenset({key})) for key in ("s003", "s005"))
    real = takedown.rewrite

    def rewrite(uri: str) -> Any:
        made = real(uri)
        takedown.mark(uri, other)
        return made

    monkeypatch.setattr(takedown, "rewrite", rewrite)
    takedown.take_down(config.root, one)
    assert not [key for key, data in everything(latents_of(config)).items() if b"s003" in data or b"s005" in data]
    assert whole(config) == []


def broken(root: Path, number: int = 3) -> CacheLatents:
    """A shard of four samples of which one cannot be read, and a sound one; in the cache too."""
    store = open_store(str(root)).at("datasets", "toy")
    samples = [caches.sample(n, "a {}") for n in range(8)]
    samples[number].members["png"] = b"no image"
    rows = [shards.write_shard(store, f"shards/{n}.tar", samples[n : n + 4], 4) for n in (0, 4)]
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), tuple(rows)))
    config = config_of(root, "", autoencoder=PIXELS, data=Data(name="toy", error_budget=1), conditions={})
    run(config)
    return config


def next_version(config: CacheLatents) -> CacheLatents:
    store = open_store(config.root).at("datasets", "toy")
    publish_dataset(store, replace(load_dataset(store), meta={"again": 1}))
    return task.resolve(replace(config, data=replace(config.data, digest="")))


def test_where_nothing_is_left_but_what_cannot_be_encoded_no_job_tries(tmp_path: Path) -> None:
    config = broken(tmp_path)
    take_down(config.root, "s000", "s001", "s002")
    assert keys_of(config) == ["s004", "s005", "s006", "s007"]
    assert {one["key"]: one["reason"] for one in found(config).meta["quarantined"]}["s003"] == takedowns.REASON
    assert gate.counts(config.root, found(config)).wrong == []
    again = next_version(config)
    assert run(again)["samples"] == 4


def test_what_another_encoding_holds_is_not_taken_with_it(tmp_path: Path) -> None:
    """Unreadable for one encoding, for it lacks a label, and sound for another."""
    store = open_store(str(tmp_path)).at("datasets", "toy")
    samples = [caches.sample(n, "a {}") for n in range(4)]
    samples[3].members["json"] = b"{}"
    publish_dataset(store, Manifest(DATASET, "toy", ("json", "png", "txt"), (
        shards.write_shard(store, "shards/0.tar", samples, 4),
    )))  # fmt: skip
    config = config_of(tmp_path, "", autoencoder=PIXELS, data=Data(name="toy", error_budget=1), conditions={})
    labels = {name: one for name, one in caches.CONDITIONS.items() if one.source == "label"}
    run(config)
    run(task.resolve(replace(config, conditions=labels)))
    take_down(config.root, "s000", "s001", "s002")
    assert keys_of(config) == ["s003"]


def test_killed_before_it_said_what_it_lacks_a_shard_is_known_by_its_source(tmp_path: Path) -> None:
    config = broken(tmp_path)
    latents_of(config).delete(cache.made_key(found(config).shards[0].key))
    take_down(config.root, "s000")
    again = next_version(config)
    assert run(again)["samples"] == 6
    assert [one["key"] for one in found(again).meta["quarantined"]] == ["s003", "s000"]


def test_strange_files_beside_the_marks_are_no_samples(tmp_path: Path) -> None:
    config = cached(tmp_path)
    root = open_store(config.root)
    source = load_dataset(root.at("datasets", "toy")).shards[2].sha256
    for number in range(5):  # as many as it has samples
        root.at("takedowns", source).publish(f".fuse_hidden{number}", b"")
    root.at("takedowns").publish(".DS_Store", b"")
    assert run(config)["samples"] == 22
    assert takedown.survey(config.root, frozenset({"nobody"})).stale == {}


def test_a_shard_that_a_job_wrote_meanwhile_is_not_committed(tmp_path: Path) -> None:
    """It looked before the takedown, and wrote afterwards."""
    config = cached(tmp_path)
    units = task.plan(config)
    encode_shard = task.make(config, Worker())
    made = [encode_shard(unit) for unit in units]
    root = open_store(config.root)
    takedowns.add(root, units[0].sha256, [takedowns.mark("s003")])
    with pytest.raises(DataError, match=r"are missing under .*: run the job again"):
        task.commit(config, made)
    assert run(config)["samples"] == 21
    (lost,) = garbage.find(root, known.kept(config.root, ()), 0).values()
    assert {garbage.stem(entry) for entry in lost} == {units[0].sha256}  # and it goes with `gc`
