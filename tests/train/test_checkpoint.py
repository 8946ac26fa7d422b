"""Checkpoints: whole or invisible, verified, kept as asked; a golden one of format v1 stays readable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from calotype.data.store import Store, open_store
from calotype.errors import CalotypeError, DataError
from calotype.train import checkpoint

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "artifacts"))


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"net.{kind}": {name: torch.randn(3, 5, generator=generator) for name in ("a.weight", "b-1.weight")}
        for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
    }


def test_what_was_saved_comes_back(store: Store) -> None:
    made = tensors()
    assert checkpoint.save(store, 640, made, {"position": 640})
    with checkpoint.opened(store, 640) as found:
        assert found.state == {"position": 640}
        assert {kind: set(named) for kind, named in found.tensors.items()} == {k: set(v) for k, v in made.items()}
        for kind, named in made.items():
            assert all(torch.equal(found.tensors[kind][name], tensor) for name, tensor in named.items())
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], made["net.ema"]["a.weight"])
    assert torch.equal(checkpoint.weights(store, 640, "net", ema=False)["a.weight"], made["net.weights"]["a.weight"])


def test_big_states_are_split_over_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART", 100)
    checkpoint.save(store, 640, tensors(), {})
    assert sum("net.ema" in entry.key for entry in store.list()) == 2
    assert set(checkpoint.weights(store, 640, "net")) == {"a.weight", "b-1.weight"}


@pytest.mark.parametrize("name", ["../../victim", "/{victim}", ".hidden"])
def test_a_commit_that_names_other_files_touches_none(store: Store, tmp_path: Path, name: str) -> None:
    checkpoint.save(store, 640, tensors(), {})
    victim = tmp_path / "victim"
    victim.write_text("precious")
    commit = json.loads(store.read("checkpoints/000000000640/COMMIT.json"))
    commit["files"][name.format(victim=victim)] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    store.write("checkpoints/000000000640/COMMIT.json", json.dumps(commit).encode())
    with pytest.raises(DataError, match="outside its folder"), checkpoint.opened(store, 640):
        pass
    assert victim.read_text() == "precious"


def test_one_without_commit_is_never_selected(store: Store) -> None:
    checkpoint.save(store, 640, tensors(), {})
    checkpoint.save(store, 1280, tensors(1), {})
    store.delete("checkpoints/000000001280/COMMIT.json")
    assert checkpoint.latest(store) == 640
    with pytest.raises(DataError, match="never committed"), checkpoint.opened(store, 1280):
        pass


def test_an_attempt_that_died_while_saving_is_in_nobodys_way(store: Store) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(store, 640, tensors(1), {}, allowed=die)
    assert checkpoint.latest(store) is None
    checkpoint.save(store, 640, tensors(2), {})  # other bytes, as another world size would give
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], tensors(2)["net.ema"]["a.weight"])


def test_a_leftover_attempt_commits_nothing(store: Store) -> None:
    def superseded() -> None:
        raise CalotypeError("a newer attempt has begun")

    with pytest.raises(CalotypeError, match="newer"):
        checkpoint.save(store, 640, tensors(), {}, allowed=superseded)
    assert checkpoint.committed(store) == []


def test_the_first_commit_stands(store: Store) -> None:
    assert checkpoint.save(store, 640, tensors(1), {})
    digest = checkpoint.digest(store, 640)
    assert not checkpoint.save(store, 640, tensors(2), {})
    assert checkpoint.digest(store, 640) == digest
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], tensors(1)["net.ema"]["a.weight"])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "state", "commit"])
def test_damage_is_refused_by_name(store: Store, damage: str) -> None:
    checkpoint.save(store, 640, tensors(), {})
    part = {"state": "state-", "commit": "COMMIT"}.get(damage, "net.ema")
    key = next(entry.key for entry in store.list() if part in entry.key)
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    if damage == "gone":
        store.delete(key)
    else:
        store.write(key, bytes(data[:-1] if damage in ("cut", "commit") else data))
    with pytest.raises(DataError, match=key.rsplit("/", 1)[1]), checkpoint.opened(store, 640):
        pass


def test_only_the_newest_are_kept(store: Store) -> None:
    for images in (100, 200, 300, 400):
        checkpoint.save(store, images, tensors(images), {}, keep=2)
    assert checkpoint.committed(store) == [300, 400]
    assert {entry.key.split("/")[1] for entry in store.list()} == {"000000000300", "000000000400"}


def test_golden_v1_is_readable() -> None:
    """Written by format v1; never regenerate."""
    store = open_store(str(GOLDEN))
    assert checkpoint.committed(store) == [128]
    with checkpoint.opened(store, 128) as found:
        assert found.state["position"] == 128
        assert found.tensors["net.weights"]["a.weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
        assert found.tensors["net.exp_avg_sq"]["a.weight"].tolist() == [[0.0, 0.25], [0.5, 0.75]]
    assert checkpoint.weights(store, 128, "net")["a.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_unknown_format_is_refused(store: Store) -> None:
    checkpoint.save(store, 640, tensors(), {})
    key = "checkpoints/000000000640/COMMIT.json"
    store.write(key, json.dumps({**json.loads(store.read(key)), "format": "calotype.checkpoint/9"}).encode())
    with pytest.raises(CalotypeError, match="checkpoint/9"), checkpoint.opened(store, 640):
        pass
