"""Leases spare double work, and nothing rests on them: a real S3 and a folder, living, dead and hostile owners."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from calotype.data import garbage, lease
from calotype.data.files import FolderStore
from calotype.data.lease import lease_key, taken
from calotype.data.store import Store, open_store
from calotype.environment import Worker

KEY = "0123.tar"
MINE, THEIRS = Worker(rank=3, group="mine"), Worker(group="theirs")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "root"))
    return open_store(request.getfixturevalue("bucket"))


def keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list()]


def test_a_lease_shows_life_keeps_others_off_and_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    seen = set()
    with suppress(ZeroDivisionError), taken(store, KEY, MINE) as others:
        assert others is None
        assert keys(store) == ["0123.lease"]
        until = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < until:
            with taken(store, KEY, THEIRS) as mine:
                assert mine is not None
                assert json.loads(mine)["owner"] == "mine/3"
                seen.add(mine)
            time.sleep(0.02)
        raise ZeroDivisionError
    assert len(seen) == 3
    assert keys(store) == []  # whatever became of the work
    time.sleep(0.3)
    assert keys(store) == []  # nor does it come back
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_only_what_did_not_change_is_taken_over(store: Store) -> None:
    store.write("0123.lease", b'{"beat": 1, "owner": "theirs/0"}')
    with taken(store, KEY, MINE, dead=b'{"beat": 0, "owner": "theirs/0"}') as others:
        assert others == store.read("0123.lease")
    with taken(store, KEY, MINE, dead=others) as none:
        assert none is None
        assert json.loads(store.read("0123.lease"))["owner"] == "mine/3"
    assert keys(store) == []


def test_a_dead_worker_of_the_same_group_delays_nobody(store: Store) -> None:
    store.write("0123.lease", b'{"beat": 7, "owner": "mine/0"}')
    with taken(store, KEY, MINE) as others:
        assert others is None


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b'{"owner": {"mine/": 1}}', b"[" * 9000, b"1" * 5000])
def test_what_is_no_lease_is_somebodys_until_it_is_stale(tmp_path: Path, data: bytes) -> None:
    store = open_store(str(tmp_path))
    store.write("0123.lease", data)
    with taken(store, KEY, MINE) as others:
        assert others == data[:4096]
    with taken(store, KEY, MINE, dead=others) as none:
        assert none is None


def test_an_encoder_that_hangs_gives_its_shard_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LONGEST", 0.1)
    store = open_store(str(tmp_path))
    with taken(store, KEY, MINE):
        until = time.monotonic() + 30
        while any(thread.name == "lease" for thread in threading.enumerate()) and time.monotonic() < until:
            time.sleep(0.02)
        last = store.read("0123.lease")
        time.sleep(0.1)
        assert store.read("0123.lease") == last != b""


def test_a_store_without_leases_stops_nobody_and_is_said_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    done = 0
    for key in ("1.tar", "2.tar"):
        with taken(open_store(bucket), key, MINE) as others:
            assert others is None
            done += 1
    assert done == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.name == lease.__name__]
    assert "is refused (InvalidAccessKeyId)" in warning
    assert "leases are only hints" in warning


def test_leases_that_are_left_are_garbage_and_young_ones_are_not(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for name in ("encoding.json", "0123.tar", "0123.sidecar.json", "0123.lease", "4567.lease"):
        store.write(f"latents/E/{name}", b"x")
    os.utime(tmp_path / "latents/E/0123.lease", (time.time() - 4000,) * 2)
    found = garbage.find(store, {"E": {"0123", "4567"}}, spared=3600)
    assert {encoding: [entry.key for entry in entries] for encoding, entries in found.items()} == {"E": ["0123.lease"]}
    assert lease_key("0123.tar") == "0123.lease"


def test_a_shard_is_deleted_whole_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    unpatched = FolderStore.delete

    def told(store: FolderStore, key: str) -> None:
        deleted.append(key)
        unpatched(store, key)

    monkeypatch.setattr(FolderStore, "delete", told)
    monkeypatch.setattr(garbage, "DELETERS", 1)
    store = FolderStore(tmp_path)
    stems = ("0123", "0123-ab", "4567")
    names = [f"{stem}.{kind}" for stem in stems for kind in ("made.json", "sidecar.json", "tar")]
    for name in ["encoding.json", *names]:
        store.write(f"latents/E/{name}", b"x")
    garbage.delete(store, garbage.find(store, {}, spared=-60))
    assert deleted.pop() == "encoding.json"
    assert sorted(deleted) == sorted(names)
    for first in (0, 3, 6):
        assert len({key.partition(".")[0] for key in deleted[first : first + 3]}) == 1
        assert deleted[first].endswith(".sidecar.json")
