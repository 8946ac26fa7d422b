"""`calotype cache ls | show | verify | diff | gc`, as people type them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calotype.config import Accept, Autoencoder, CacheLatents, Encoding, TrainDenoiser
from calotype.data import cache
from calotype.data.files import PARTIAL
from calotype.data.manifest import CACHE, Manifest, load_dataset
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.tasks import cache as task

from tests.caches import another_version, config_of, dataset, latents_of, recorded, run

README = (Path(__file__).parents[1] / "README.md").read_text()

Say = Callable[..., tuple[int, str]]
PIXELS = Autoencoder(kind="identity", f=1, channels=3)


@pytest.fixture
def say(typed: Say, tmp_path: Path) -> Say:
    """`calotype cache WORDS --root ROOT`."""
    return lambda *words: typed("cache", *words, "--root", str(tmp_path / "root"))


@pytest.fixture
def config(tmp_path: Path) -> CacheLatents:
    dataset(tmp_path / "root")
    return replace(config_of(tmp_path / "root", "", autoencoder=PIXELS), name="mine")


def trainer(config: CacheLatents, name: str) -> TrainDenoiser:
    shared = {field: getattr(config, field) for field in ("root", "data", "autoencoder", "encoding", "conditions")}
    return TrainDenoiser(name=name, **shared)


def test_ls_says_what_is_there_how_far_it_is_and_who_uses_it(config: CacheLatents, say: Say) -> None:
    run(config)
    recorded("cache_latents", config)
    recorded("train_denoiser", trainer(config, "tuesday"))
    small = replace(config, encoding=replace(config.encoding, resolution=8), name="small")
    task.make(small, Worker())(task.plan(small)[0])
    recorded("cache_latents", small, finish=False)
    status, out = say("ls")
    assert status == 0
    first, second = sorted((line for line in out.splitlines() if "toy" in line), key=lambda line: "finished" in line)
    assert "1 of 3 shards" in first
    assert "8 px" in first
    assert "small" in first
    assert "nobody" in first
    for word in ("finished", "16 px, f 1, float16 deterministic, encoder identity", "mine", "tuesday", "22"):
        assert word in second
    status, out = say("ls", "--json")
    found = {one["state"]: one for one in json.loads(out)}
    assert set(found) == {"finished", "1 of 3 shards"}
    assert found["finished"]["users"][0]["names"] == ["tuesday"]
    assert found["finished"]["meta"]["acceptance"]["decoded"] == 6


def test_ls_shows_the_others_beside_one_that_cannot_be_read(config: CacheLatents, say: Say) -> None:
    run(config)
    open_store(config.root).at("caches", "0" * 32).write("manifest.json", b"{")
    status, out = say("ls")
    assert status == 0
    assert "unreadable" in out
    assert "finished" in out


def test_show_by_id_by_its_beginning_and_by_name(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    recorded("cache_latents", config)
    for reference in (identity, identity[:6], "mine", "run:mine"):
        status, out = say("show", reference)
        assert status == 0
        for word in (identity, "float16", "channel std", "6 decoded samples", "held out", "left out"):
            assert word in out
    status, out = say("show", "nobody")
    assert (status, "there is no cache 'nobody'" in out) == (1, True)


def test_the_commands_of_the_readme_run(config: CacheLatents, say: Say) -> None:
    run(config)
    recorded("cache_latents", config)
    section = README.split("\n## Latent caches\n")[1].split("\n## ")[0]
    commands = [shlex.split(line)[2:] for line in section.split("```sh\n")[1].split("```")[0].splitlines()]
    assert [words[0] for words in commands] == ["ls", "show", "verify", "gc"]
    for words in commands:
        assert say(*words)[0] == 0, words


def test_verify_says_nothing_is_wrong_and_then_what_is(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    status, out = say("verify", identity)
    assert status == 0
    assert "3 shards, 22 samples" in out
    assert "all as its manifest says" in out
    key = next(entry.key for entry in latents_of(config).list() if entry.key.endswith(".tar"))
    data = bytearray(latents_of(config).read(key))
    data[5000] ^= 1
    latents_of(config).write(key, bytes(data))
    status, out = say("verify", identity)
    assert status == 1
    assert f"{key} is damaged or replaced" in out


def test_verify_finds_statistics_that_are_not_those_of_the_latents(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    store = open_store(config.root).at("caches", identity)
    manifest = Manifest.from_bytes(store.read("manifest.json"))
    store.write("manifest.json", replace(manifest, meta=manifest.meta | {"channel_std": [1.0, 1.0, 1.0]}).to_bytes())
    status, out = say("verify", identity)
    assert status == 1
    assert "channel_std of the manifest is 1 1 1, of its latents 0." in out


def test_verify_judges_by_what_the_cache_was_accepted_with(config: CacheLatents, say: Say) -> None:
    strict = replace(config, accept=Accept(psnr=99))
    recorded("cache_latents", strict, finish=False)  # the first attempt, which was refused
    with pytest.raises(DataError, match=r"less than accept\.psnr=99"):
        run(strict)
    identity = run(config)["cache"]
    status, out = say("verify", identity)
    assert (status, "(accept.psnr=0, accept.psnr_loss=1)" in out) == (0, True), out


def test_diff_names_what_differs(config: CacheLatents, say: Say) -> None:
    one = run(config)["cache"]
    wide = replace(config, encoding=Encoding(resolution=16, batch=4, dtype="float32"))
    other = run(wide)["cache"]
    status, out = say("diff", one, other)
    assert status == 1
    assert "encoding.dtype" in out
    assert "float16" in out
    assert "encoding.resolution" not in out
    status, out = say("diff", one, one)
    assert (status, "do not differ" in out) == (0, True)


def test_gc_deletes_what_nobody_refers_to_and_asks_first(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    recorded("cache_latents", config)
    newer = another_version(config)
    run(newer)
    forgotten = replace(config, encoding=replace(config.encoding, resolution=8))
    task.make(forgotten, Worker())(task.plan(forgotten)[0])
    status, out = say("gc")  # all of it is younger than a day
    assert (status, "nothing else under" in out) == (0, True)
    assert "are younger than 24 hours and stay: --hours 0 takes them too" in out
    cut_off = [Path(config.root, "latents", f"{PARTIAL}{name}") for name in ("now", "before")]
    for path in cut_off:
        path.write_bytes(b"half a shard")
    os.utime(cut_off[1], (0, 0))
    status, out = say("gc", "--hours", "0")
    assert status == 1
    assert "say --yes" in out
    assert latents_of(forgotten).list("encoding.json")
    assert "unfinished files" in out
    assert all(path.exists() for path in cut_off)
    status, out = say("gc", "--hours", "0", "--yes")
    assert status == 0
    assert list(latents_of(forgotten).list()) == []
    assert [path.exists() for path in cut_off] == [True, False]  # somebody may be writing the first
    for reference in (identity, cache.cache_id(cache.encoding_id(cache.encoding_of(newer)), newer.data.digest)):
        assert say("verify", reference)[0] == 0  # what is referred to stays whole


def test_a_cache_that_is_given_up_goes_with_its_own_shards_alone(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    made = recorded("cache_latents", config)
    newer = another_version(config)
    other = run(newer)["cache"]
    status, out = say("gc", identity[:8], "--yes")
    assert (status, "are younger than 24 hours and stay" in out) == (0, True)
    assert [one["id"] for one in json.loads(say("ls", "--json")[1])] == [other]
    assert made.status() == "given up"
    assert cache.find_cache(open_store(config.root), config) is None
    status, out = say("gc", "--hours", "0", "--yes")  # nobody keeps its shards any more
    assert (status, "stay" in out) == (0, False)
    tars = [entry.key for entry in latents_of(newer).list() if entry.key.endswith(".tar")]
    assert len(tars) == 3  # two that both had, and the new one's; the first shard's are gone
    assert say("verify", other)[0] == 0
    assert not made.store.exists("result.json")
    assert run(config)["samples_encoded"] == 9  # the same command makes it again, of what is lacking


def test_a_cache_that_a_run_trained_on_is_not_given_up(config: CacheLatents, say: Say) -> None:
    identity = run(config)["cache"]
    recorded("train_denoiser", trainer(config, "tuesday"))
    status, out = say("gc", identity, "--hours", "0", "--yes")
    assert status == 1
    assert "is what tuesday trained on: it stays" in out
    assert say("verify", identity)[0] == 0


def test_a_run_under_way_keeps_what_it_will_need(config: CacheLatents, say: Say) -> None:
    task.make(config, Worker())(task.plan(config)[0])
    recorded("cache_latents", config, finish=False)
    status, out = say("gc", "--hours", "0", "--yes")
    assert (status, "nothing under" in out) == (0, True)
    rows = load_dataset(open_store(config.root).at("datasets", "toy")).shards
    assert len(cache.finished(latents_of(config), rows, {})) == 1


def test_nothing_is_deleted_beside_a_cache_that_cannot_be_read(config: CacheLatents, say: Say) -> None:
    task.make(config, Worker())(task.plan(config)[0])
    open_store(config.root).at("caches", "0" * 32).write("manifest.json", b"{")
    status, out = say("gc", "--hours", "0", "--yes")
    assert status == 1
    assert "nobody knows what it needs, so nothing is deleted" in out


@pytest.mark.parametrize("left", [None, b"[1]", b"\xff"])
def test_gc_goes_on_where_one_was_killed(config: CacheLatents, say: Say, left: bytes | None) -> None:
    task.make(config, Worker())(task.plan(config)[0])
    latents_of(config).delete("encoding.json")
    if left is not None:
        latents_of(config).write("encoding.json", left)
    status, out = say("gc", "--hours", "0", "--yes")
    assert (status, "unknown" in out) == (0, True)
    assert list(latents_of(config).list()) == []


@pytest.mark.parametrize(
    "meta", [{"encoding": [1]}, {"encoding": 5}, {"encoding": {"a": 1}}, {"dataset": 3}, {"encoding": None}]
)
def test_a_cache_that_does_not_say_what_it_is_is_unreadable(
    config: CacheLatents, say: Say, meta: dict[str, Any]
) -> None:
    manifest = Manifest(
        CACHE, "toy", ("json",), (), {"encoding": cache.encoding_of(config), "dataset": "0" * 64} | meta
    )
    open_store(config.root).at("caches", "0" * 32).write("manifest.json", manifest.to_bytes())
    status, out = say("ls", "--json")
    assert status == 0
    assert json.loads(out)[0]["state"].startswith("unreadable: meta.")
    status, out = say("gc", "--hours", "0", "--yes")
    assert (status, "so nothing is deleted" in out) == (1, True)
