"""Checkpoints: whole or invisible, verified, kept as asked; golden ones of formats 1 and 2 stay readable."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from calotype.data.files import FolderStore
from calotype.data.store import Store, open_store
from calotype.errors import CalotypeError, DataError
from calotype.train import checkpoint, shares

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_2 = Path(__file__).parent / "golden-v2"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "artifacts"))


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"net.{kind}": {name: torch.randn(3, 5, generator=generator) for name in ("a.weight", "b-1.weight")}
        for kind in ("weights", "exp_avg", "exp_avg_sq", "ema")
    }


def share(states: dict[str, dict[str, torch.Tensor]], rank: int, world: int) -> dict[str, shares.Share]:
    """What `rank` of `world` would hold: an equal part of the elements, cut anywhere."""
    kinds = {kind.partition(".")[2]: named for kind, named in states.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in kinds["weights"].items()}
    total, offset, pieces = sum(map(prod, shapes.values())), 0, []
    low, high = total * rank // world, total * (rank + 1) // world
    for name, shape in shapes.items():
        first, last = max(low, offset), min(high, offset + prod(shape))
        if first < last:
            pieces.append((name, first - offset, last - first))
        offset += prod(shape)
    flat = {kind: torch.cat([t.flatten() for t in named.values()])[low:high] for kind, named in kinds.items()}
    return {"net": shares.Share(shapes, pieces, flat)}


def save(
    store: Store,
    images: int,
    states: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int = 0,
    allowed: Callable[[], None] = lambda: None,
    world: int = 2,
    keep_every: int = 0,
) -> bool:
    """As the ranks of a world would, one after the other."""
    held = [share(states, rank, world) for rank in range(world)]
    parts = [shares.write(store, images, rank, mine) for rank, mine in enumerate(held)]
    fresh = shares.commit(store, images, {"net": held[0]["net"].shapes}, parts, state, allowed)
    checkpoint.forget(store, images, keep, keep_every)
    return fresh


@pytest.mark.parametrize("world", [1, 2, 5, 40])
def test_what_was_saved_comes_back(store: Store, world: int) -> None:
    made = tensors()
    assert save(store, 640, made, {"position": 640}, world=world)
    with checkpoint.opened(store, 640) as found:
        assert found.state == {"position": 640}
        assert {kind: set(named) for kind, named in found.tensors.items()} == {k: set(v) for k, v in made.items()}
        for kind, named in made.items():
            assert all(torch.equal(found.tensors[kind][name], tensor) for name, tensor in named.items())
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], made["net.ema"]["a.weight"])
    assert torch.equal(checkpoint.weights(store, 640, "net", ema=False)["a.weight"], made["net.weights"]["a.weight"])


def test_only_what_is_needed_is_read(store: Store) -> None:
    """By a rank that holds some elements; one that holds none reads nothing, and can still go on."""
    made = tensors()
    save(store, 640, made, {}, world=3)
    for entry in list(store.list("checkpoints/000000000640/net")):
        if "-00001-00000-" not in entry.key:
            store.delete(entry.key)
    middle = {"net": [("b-1.weight", 0, 3)]}
    with checkpoint.opened(store, 640, needed=middle) as found:
        for kind, named in made.items():
            read = found.tensors[kind]["b-1.weight"].flatten()
            assert torch.equal(read[:3], named["b-1.weight"].flatten()[:3])
            assert read[5:].isnan().all()  # of elements 10 to 19 of the thirty, these are not
    with checkpoint.opened(store, 640, needed={"net": []}) as found:
        assert found.tensors.keys() == made.keys()
    with (
        pytest.raises(DataError, match="is damaged"),
        checkpoint.opened(store, 640, needed={"net": [("a.weight", 0, 1)]}),
    ):
        pass


def test_a_reader_that_is_killed_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, of a real process, while it downloads and while it holds what it has opened."""
    save(store, 640, tensors(), {})
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    real, early = FolderStore.read, True

    def read(self: FolderStore, key: str, start: int = 0, length: int | None = None) -> bytes:
        if ".exp_avg" in key and early:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key, start, length)

    for when in (True, False):
        early = when
        if (child := os.fork()) == 0:
            monkeypatch.setattr(FolderStore, "read", read)
            with checkpoint.opened(store, 640) as found:
                assert found.tensors["net.ema"]["a.weight"].isfinite().all()
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not list((tmp_path / "scratch").iterdir())


def test_big_states_are_split_over_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "PART", 100)
    save(store, 640, tensors(), {}, world=1)
    assert sum("net.ema" in entry.key for entry in store.list()) == 2
    assert set(checkpoint.weights(store, 640, "net")) == {"a.weight", "b-1.weight"}


@pytest.mark.parametrize("name", ["../../victim", "/{victim}", ".hidden"])
def test_a_commit_that_names_other_files_touches_none(store: Store, tmp_path: Path, name: str) -> None:
    save(store, 640, tensors(), {})
    victim = tmp_path / "victim"
    victim.write_text("precious")
    commit = json.loads(store.read("checkpoints/000000000640/COMMIT.json"))
    commit["files"][name.format(victim=victim)] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    store.write("checkpoints/000000000640/COMMIT.json", json.dumps(commit).encode())
    with pytest.raises(DataError, match="outside its folder"), checkpoint.opened(store, 640):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        b"[]", b"null", b"{}", b"[" * 100_000, {"format": "other"}, {"files": None}, {"files": {}}, {"files": {"a": 1}},
        {"": {"bytes": 10**18, "sha256": ""}}, {"a\0.json": {"bytes": 1, "sha256": ""}},
        {"net": {"bytes": 1, "sha256": ""}}, {"net.ema-00000-0001-1.safetensors": {"bytes": -1, "sha256": ""}},
        {"net.ema-00000-00009-1.safetensors": {"bytes": 1, "sha256": ""}},
    ],
)  # fmt: skip
def test_a_commit_that_is_json_but_none_is_damage(store: Store, change: Any) -> None:
    save(store, 640, tensors(), {})
    key = "checkpoints/000000000640/COMMIT.json"
    commit = json.loads(store.read(key))
    if isinstance(change, bytes):
        store.write(key, change)
    else:
        changed = change if change.keys() <= commit.keys() else {"files": commit["files"] | change}
        store.write(key, json.dumps(commit | changed).encode())
    with pytest.raises(DataError), checkpoint.opened(store, 640):
        pass


@pytest.mark.parametrize("change", [None, [], {"shapes": {}}, {"pieces": {"net": {}}}, {"pieces": {"net": 7}}, 10**6])
def test_an_index_that_does_not_fit_is_damage(store: Store, change: Any) -> None:
    save(store, 640, tensors(), {})
    key, place = "checkpoints/000000000640/COMMIT.json", store.at("checkpoints", f"{640:012d}")
    commit = json.loads(store.read(key))
    name = next(name for name in commit["files"] if name.startswith("index"))
    index = json.loads(place.read(name))
    if change == 10**6:
        index["pieces"]["net"]["00000-00000"][0][2] = change
    data = json.dumps(index | change if isinstance(change, dict) else index if change else change).encode()
    place.write(name, data)
    commit["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.write(key, json.dumps(commit).encode())
    with pytest.raises(DataError, match="does not describe it"), checkpoint.opened(store, 640):
        pass


def test_a_size_that_no_file_has_is_not_waited_for(store: Store) -> None:
    save(store, 640, tensors(), {})
    key = "checkpoints/000000000640/COMMIT.json"
    commit = json.loads(store.read(key))
    name = next(name for name in commit["files"] if name.startswith("net.ema"))
    commit["files"][name]["bytes"] = 10**18
    store.write(key, json.dumps(commit).encode())
    with pytest.raises(DataError, match=f"{name} is damaged"), checkpoint.opened(store, 640):
        pass


def test_one_without_commit_is_never_selected(store: Store) -> None:
    save(store, 640, tensors(), {})
    save(store, 1280, tensors(1), {})
    store.delete("checkpoints/000000001280/COMMIT.json")
    assert checkpoint.latest(store) == 640
    with pytest.raises(DataError, match="never committed"), checkpoint.opened(store, 1280):
        pass


def test_an_attempt_that_died_while_saving_is_in_nobodys_way(store: Store) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(store, 640, tensors(1), {}, allowed=die)
    assert checkpoint.latest(store) is None
    save(store, 640, tensors(2), {})  # other bytes, as another world size would give
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], tensors(2)["net.ema"]["a.weight"])


def test_a_leftover_attempt_commits_nothing(store: Store) -> None:
    def superseded() -> None:
        raise CalotypeError("a newer attempt has begun")

    with pytest.raises(CalotypeError, match="newer"):
        save(store, 640, tensors(), {}, allowed=superseded)
    assert checkpoint.committed(store) == []


def test_the_first_commit_stands(store: Store) -> None:
    assert save(store, 640, tensors(1), {})
    digest = checkpoint.digest(store, 640)
    assert not save(store, 640, tensors(2), {})
    assert checkpoint.digest(store, 640) == digest
    assert torch.equal(checkpoint.weights(store, 640, "net")["a.weight"], tensors(1)["net.ema"]["a.weight"])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "state", "commit"])
def test_damage_is_refused_by_name(store: Store, damage: str) -> None:
    save(store, 640, tensors(), {})
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
        save(store, images, tensors(images), {}, keep=2)
    assert checkpoint.committed(store) == [300, 400]
    assert {entry.key.split("/")[1] for entry in store.list()} == {"000000000300", "000000000400"}


def test_what_is_held_is_kept_for_ever(store: Store) -> None:
    for images in (64, 128):
        save(store, images, tensors(images), {}, keep=2)
    checkpoint.hold(store, 64)
    checkpoint.hold(store, 128)
    checkpoint.forget(store, 128, keep=2)  # what died attempts left beside it goes, this does not
    for images in (192, 256):
        save(store, images, tensors(images), {}, keep=1)
    assert checkpoint.committed(store) == [64, 128, 256]
    with pytest.raises(DataError, match="never committed"):
        checkpoint.hold(store, 192)
    assert list(store.list("checkpoints/000000000192")) == []


def test_the_first_at_or_after_each_multiple_is_kept_for_ever(store: Store) -> None:
    for images in (30, 60, 90, 120, 150, 180, 210, 240):
        save(store, images, tensors(images), {}, keep=1, keep_every=100)
    assert checkpoint.committed(store) == [120, 210, 240]


def test_killed_between_any_two_files_the_committed_one_is_selected(store: Store, monkeypatch: Any) -> None:
    """SIGKILL, of a real process, before each of the files of a save; then the same images are saved anew."""
    save(store, 640, tensors(), {})
    real, calls = FolderStore.publish, 0

    def counted(self: FolderStore, key: str, data: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > allowed:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key, data)

    files = len(list(store.list("checkpoints/000000000640/")))
    assert files == 2 * 4 + 3
    for allowed in range(files):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(FolderStore, "publish", counted)
            save(store, 1280, tensors(100 + allowed), {"attempt": allowed}, keep=1)
            os._exit(0)  # not reached
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert checkpoint.latest(store) == 640
    assert len(list(store.list("checkpoints/000000001280/"))) > files  # what they left behind
    save(store, 1280, tensors(1), {}, keep=1)
    assert checkpoint.committed(store) == [1280]
    assert len(list(store.list())) == files
    assert torch.equal(checkpoint.weights(store, 1280, "net")["a.weight"], tensors(1)["net.ema"]["a.weight"])


def test_what_is_gone_is_refused_before_it_is_read(store: Store) -> None:
    save(store, 640, tensors(), {})
    checkpoint.check(store, 640)
    with pytest.raises(DataError, match="is no checkpoint: it was never committed"):
        checkpoint.check(store, 1280)
    key = next(entry.key for entry in store.list() if "exp_avg_sq" in entry.key)
    store.write(key, b"cut")
    with pytest.raises(DataError, match=f"{key} has 3 bytes instead of .*: choose another"):
        checkpoint.check(store, 640)
    store.delete(key)
    with pytest.raises(DataError, match=f"{key} is gone"):
        checkpoint.check(store, 640)


def test_a_share_that_is_missing_or_doubled_is_never_committed(store: Store) -> None:
    held = [share(tensors(), rank, 2) for rank in range(2)]
    parts = [shares.write(store, 640, rank, mine) for rank, mine in enumerate(held)]
    shapes = {"net": held[0]["net"].shapes}
    for wrong in ([parts[0]], [*parts, shares.write(store, 640, 2, held[1])]):
        with pytest.raises(AssertionError, match="saved"):
            shares.commit(store, 640, shapes, wrong, {})
    assert checkpoint.committed(store) == []


def test_further_averages_are_chosen_by_halflife(store: Store) -> None:
    made = tensors()
    save(store, 640, made | {"net.ema@50": tensors(7)["net.ema"]}, {})
    for halflife, wanted in ((0, made["net.ema"]), (50, tensors(7)["net.ema"])):
        found = checkpoint.weights(store, 640, "net", halflife=halflife)
        assert torch.equal(found["b-1.weight"], wanted["b-1.weight"])
    with pytest.raises(DataError, match=r"holds no net.ema@9 \(further averages: 50\)"):
        checkpoint.weights(store, 640, "net", halflife=9)


def test_golden_v2_is_readable() -> None:
    """Written by format 2, on two ranks of which each held some elements of `a.weight`; never regenerate."""
    store = open_store(str(GOLDEN_2))
    assert checkpoint.committed(store) == [128]
    checkpoint.check(store, 128)
    with checkpoint.opened(store, 128) as found:
        assert found.state["position"] == 128
        assert found.tensors["net.weights"]["a.weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
        assert found.tensors["net.weights"]["b"].item() == 7.0
        assert found.tensors["net.exp_avg_sq"]["a.weight"].tolist() == [[0.0, 0.25], [0.5, 0.75]]
        assert set(found.tensors["net.exp_avg"]) == {"a.weight", "b"}
    weights = checkpoint.weights(store, 128, "net", halflife=50)
    assert weights["a.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert weights["steps"].tolist() == [3]  # a buffer, in its own type


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
    save(store, 640, tensors(), {})
    key = "checkpoints/000000000640/COMMIT.json"
    store.write(key, json.dumps({**json.loads(store.read(key)), "format": "calotype.checkpoint/9"}).encode())
    with pytest.raises(CalotypeError, match="checkpoint/9"), checkpoint.opened(store, 640):
        pass
