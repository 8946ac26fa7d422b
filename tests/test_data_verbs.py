"""`calotype data ls | show | verify | index`, as people type them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from calotype import console
from calotype.data import Sample, open_dataset
from calotype.data.manifest import DATASET, Manifest, publish_dataset
from calotype.data.shards import write_shard
from calotype.data.store import open_store
from calotype.environment import SERVICES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(typed: Say, tmp_path: Path) -> Say:
    """`calotype data WORDS --root ROOT`."""

    def run(*words: str, root: object = tmp_path / "root") -> tuple[int, str]:
        return typed("data", *words, *(["--root", str(root)] if root else []))

    return run


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A dataset `digits` of two versions, as `prepare` would write it; its folder."""
    store = open_store(str(tmp_path / "root")).at("datasets", "digits")

    def shard(name: str, split: str, count: int) -> object:
        samples = [Sample(f"{name}{n}", {"png": b"\x89" * 2000, "txt": b"a %d" % n}) for n in range(count)]
        columns = {"caption": [f"a {n}" for n in range(count)], "width": [8] * count}
        return write_shard(store, f"shards/{split}-{name}.tar", samples, 8, split, columns)

    rows = [shard("a", "train", 30), shard("b", "train", 20), shard("c", "held_out", 5)]
    source = {"kind": "folder", "held_out": 0.1}
    lost = [{"name": f"{n}.png", "reason": "not an image"} for n in range(7)]
    for some, quarantined in ((rows[:1] + rows[2:], []), (rows, lost)):
        meta = {"source": source, "quarantined": quarantined}
        publish_dataset(store, Manifest(DATASET, "digits", ("png", "txt"), tuple(some), meta))  # type: ignore[arg-type]
    return tmp_path / "root" / "datasets" / "digits"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    for shard in range(4):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        with webdataset.TarWriter(str(tmp_path / "theirs" / f"{shard:05d}.tar")) as writer:
            for number in range(20):
                about = json.dumps({"width": number}).encode()
                writer.write({"__key__": f"{shard}-{number}", "jpg": bytes(3000 + number), "json": about})
    return tmp_path / "theirs"


def figures(said: str) -> dict[str, str]:
    """The rows of a table of two columns."""
    rows = [line.partition("│") for line in said.splitlines()]
    return {what.strip(): value.strip() for what, bar, value in rows if bar}


def test_ls_lists_versions_samples_and_bytes(say: Say, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "root/datasets/half/shards").mkdir(parents=True)
    (tmp_path / "root/datasets/half/shards/a.tar").write_bytes(b"x")
    (tmp_path / "root/datasets/newer/manifests").mkdir(parents=True)
    (tmp_path / "root/datasets/newer/manifests/000001.json").write_text('{"format": "calotype.dataset/9"}')
    status, said = say("ls")
    assert status == 0
    rows = {line.split()[0]: [one.strip() for one in line.split("│")] for line in said.splitlines() if "│" in line}
    assert rows["digits"][2:8] == ["50", "5", "3", "200 kB", "png txt", "2"]
    assert re.fullmatch(r"\d+ s", rows["digits"][8])
    assert "no version yet" in said
    assert "calotype.dataset/9" in said
    status, said = say("ls", "--json")
    listed = {one["name"]: one for one in json.loads(said)}
    assert listed["digits"]["splits"]["train"]["samples"] == 50
    assert len(listed["digits"]["digest"]) == 64
    assert rows["digits"][1] == listed["digits"]["digest"][:8]
    assert say("ls", root=tmp_path / "nothing")[0] == 0


def test_show_says_what_a_manifest_holds(say: Say, prepared: Path) -> None:
    status, said = say("show", "digits")
    assert status == 0
    shown = figures(said)
    assert shown["train"] == "50 samples in 2 shards, 181 kB"
    assert shown["held out"] == "5 samples in 1 shard, 18.9 kB"
    assert shown["members"] == "png txt"
    assert shown["chunks"].startswith("8 of 5 to 8 samples") or shown["chunks"].startswith("8 of 8 samples")
    assert shown["columns"] == "key string, caption string, width int64"
    assert shown["source"] == "held_out 0.1, kind folder"
    assert shown["quarantined"].startswith("7: 0.png (not an image), 1.png")
    assert shown["keys"] == "a0, a1, a2, a3, a4, ..."
    status, said = say("show", "digits", "--json")
    found = json.loads(said)
    assert (len(found["quarantined"]), found["chunks"]["count"], found["columns"]["width"]) == (7, 8, "int64")
    first = open_dataset(str(prepared.parents[1]), "digits").shards[0]
    assert found["chunks"]["largest"] == first.chunk_bytes
    old = prepared / "manifests" / "000001.json"
    beginning = __import__("hashlib").sha256(old.read_bytes()).hexdigest()[:10]
    assert json.loads(say("show", "digits", "--json", "--digest", beginning)[1])["splits"]["train"]["samples"] == 30


def test_what_is_not_there_is_one_sentence(say: Say, prepared: Path) -> None:
    for words, expected in (
        (["show", "no"], "there is no dataset 'no' at .*: `calotype data ls` lists"),
        (["verify", "digits", "--digest", "0123"], "there is no version 0123 of dataset 'digits'"),
        (["show", "../x"], "'datasets/../x' is not a key"),
        (["index", "/nowhere/at/all", "--name", "x"], r"there is no \.tar below /nowhere/at/all"),
        (["index", "http://x/y", "--name", "x"], "other schemes are not opened"),
    ):
        status, said = say(*words)
        assert status == 1, said
        assert re.search(expected, said), said
        assert len(said.strip().splitlines()) == 1
    for words in ("index /x", "index /x --name a --jobs 0", "verify", "fetch", "index /x --name a --held-out 1"):
        assert say(*words.split())[0] == 2


def test_verify_exits_with_what_it_found(say: Say, prepared: Path) -> None:
    status, said = say("verify", "digits", "--jobs", "2")
    assert status == 0
    assert re.search(r"digits [0-9a-f]{8}: 3 shards, 55 samples, 200 kB in .* s \(.* .B/s\): all as its manifest", said)
    for name in ("train-a", "train-b"):
        data = bytearray((prepared / "shards" / f"{name}.tar").read_bytes())
        data[3000] ^= 1
        (prepared / "shards" / f"{name}.tar").write_bytes(data)
    status, said = say("verify", "digits")
    assert status == 1
    assert "shards/train-a.tar is damaged or replaced: chunk 0" in said
    assert "shards/train-b.tar is damaged or replaced: chunk 0" in said
    assert "2 things are wrong" in said


def test_index_then_everything_else(say: Say, theirs: Path, tmp_path: Path) -> None:
    (theirs / "notes.txt").write_text("x")
    status, said = say("index", str(theirs), "--name", "laion", "--jobs", "2")
    assert status == 0, said
    made = figures(said)
    assert (made["train samples"], made["shards"], made["members"]) == ("80", "4", "jpg json")
    assert made["read now"].startswith("4 shards, 573 kB")
    assert made["other files there"] == ".txt 1"
    assert figures(say("index", str(theirs), "--name", "laion")[1])["read now"] == "0 shards"
    shown = figures(say("show", "laion")[1])
    assert shown["shards at"] == str(theirs)
    assert shown["columns"] == "key string, bytes.jpg int64, bytes.json int64, width int64"
    assert say("verify", "laion")[0] == 0
    (theirs / "00004.tar").write_bytes(b"<html>" + bytes(1000))
    (theirs / "00005.tar").write_bytes(b"")
    status, said = say("index", str(theirs), "--name", "laion")
    assert status == 1
    assert "00004.tar, byte 0: not a tar header" in said
    assert "2 shards of" in said
    assert "nothing is published" in said
    assert figures(say("show", "laion")[1])["train"].startswith("80 samples in 4 shards")


def test_a_stack_that_is_down_is_said_at_once(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".calotype").mkdir()
    known = "".join(f"{name}=x\n" for name in SERVICES["s3"][1:]) + "AWS_ENDPOINT_URL_S3=http://127.0.0.1:9\n"
    (tmp_path / ".calotype" / "credentials").write_text(known)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for words in (["ls"], ["show", "x"], ["index", str(tmp_path), "--name", "x"]):
        status, said = say(*words, root="s3://calotype")
        assert (status, "is down: run `calotype up`" in said) == (1, True), said


def test_help_teaches(say: Say) -> None:
    for verb, word in (
        ("ls", "newest version"),
        ("show", "chunks"),
        ("verify", "exit status 1"),
        ("index", "example:"),
    ):
        status, said = say(verb, "--help", root=None)
        assert status == 0
        assert f"usage: calotype data {verb}" in said
        assert word in said
    assert "`calotype data ls`" in README


def test_the_commands_of_the_readme(theirs: Path, bucket: str, tmp_path: Path) -> None:
    section = README.split("\n## Shards that somebody else wrote\n")[1].split("\n## ")[0]
    lines = re.findall(r"^calotype (data .*)$", section, re.MULTILINE)
    assert len(lines) == 2
    place, root = f"{bucket}/laion", f"{bucket}-root"
    open_store(root).ensure()
    for number, path in enumerate(sorted(theirs.iterdir()) * 30):  # enough for a hundredth of them
        open_store(place).write(f"{number:05d}.tar", path)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    for line in lines:
        words = [place if word.startswith("s3://") else word for word in shlex.split(line)]
        command = [sys.executable, "-m", "calotype", *words, "--root", root]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(open_dataset(root, "laion").shards) + len(open_dataset(root, "laion", split="held_out").shards) == 120


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (5 * 10**12, "5 TB"), (10**19, "10,000 PB")],
)
def test_sizes_and_ages_as_people_read_them(count: int, said: str) -> None:
    assert console.size(count) == said
    assert [console.age(s) for s in (-1, 59, 60, 7199, 86400 * 3)] == ["0 s", "59 s", "1 min", "1 h", "3 d"]


def test_npy_is_what_show_needs_no_more(tmp_path: Path, say: Say) -> None:
    """A dataset without columns, and of one chunk."""
    store, file = open_store(str(tmp_path / "root")).at("datasets", "x"), io.BytesIO()
    np.save(file, np.zeros(3))
    row = write_shard(store, "shards/a.tar", [Sample("a", {"x.npy": file.getvalue()})], 8)
    publish_dataset(store, Manifest(DATASET, "x", ("x.npy",), (row,)))
    shown = figures(say("show", "x")[1])
    assert (shown["columns"], shown["keys"], shown["source"]) == ("none", "in the shards", "")
    assert say("verify", "x")[0] == 0
