"""Names of runs: `run:NAME` finds what it says, and nothing else."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from calotype import runs
from calotype.compose import compose
from calotype.errors import CalotypeError


def begun(root: Path, name: str, **changes: Any) -> runs.Record:
    config = compose("prepare", ["cluster=local", "track=none", f"root={root}", f"name={name}"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    return runs.begin("prepare", config, lambda _: ("", ""), lambda _: None)


def test_one_run_may_have_several_names(tmp_path: Path) -> None:
    record = begun(tmp_path, "first")
    with pytest.raises(CalotypeError, match="second"):
        runs.find(str(tmp_path), "prepare", "run:second")
    runs.call(record, "second")
    runs.call(record, "second")
    found = [runs.find(str(tmp_path), "prepare", f"run:{name}").identity for name in ("first", "second")]
    assert found == [record.identity] * 2
    assert "second" in runs.names(str(tmp_path))[record.identity]


def test_what_lies_below_a_name_does_not_have_it(tmp_path: Path) -> None:
    mine = begun(tmp_path, "cats")
    other = begun(tmp_path, "dogs", held_out=0.3)
    (tmp_path / "names" / "prepare" / "cats" / "v2").mkdir()
    (tmp_path / "names" / "prepare" / "cats" / "v2" / f"99999999999999-{other.identity}").touch()
    assert runs.find(str(tmp_path), "prepare", "run:cats").identity == mine.identity


def test_a_relative_root_is_the_same_place_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    config = compose("cache_latents", ["root=out", "autoencoder=pretrained", "autoencoder.path=vae"])
    assert config.root == str(tmp_path / "out")
    assert config.autoencoder.path == str(tmp_path / "vae")
    assert compose("prepare", ["root=s3://bucket/prefix"]).root == "s3://bucket/prefix"


def test_the_ten_thousandth_attempt_may_write(tmp_path: Path) -> None:
    first = begun(tmp_path, "mine")
    first.store.write("attempts/9999.json", b"{}")
    first.store.write("attempts/9999.end", b'{"status": "failed"}')
    last = begun(tmp_path, "mine")
    assert last.attempt == runs.last_attempt(last.store) == 10_000
    last.check_current()
    with pytest.raises(runs.Superseded):
        dataclasses.replace(last, attempt=9999).check_current()
    with runs.attempt_of(last):
        pass
    assert begun(tmp_path, "mine").attempt == 10_001


def test_the_time_of_all_attempts_counts(tmp_path: Path) -> None:
    with runs.attempt_of(begun(tmp_path, "mine")):
        time.sleep(0.2)
    ended = begun(tmp_path, "mine")
    assert 0.2 <= runs.lived(ended) < 3
    ended.store.write("attempts/0002.alive", b"1000")
    with runs.attempt_of(ended):
        pass
    ended.store.delete("attempts/0002.end")  # it was killed
    ended.store.write("attempts/0002.json", b'{"started": 0}')
    assert 3000 <= runs.lived(begun(tmp_path, "mine")) < 3010
