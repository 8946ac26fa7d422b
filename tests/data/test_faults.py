"""A real S3 behind a network that fails: the golden sequence, or an error that names the shard; never a silent loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from calotype.data import Dataset, Reading, Sample, Stream, get
from calotype.data.manifest import CACHE, Manifest, sidecar_key
from calotype.data.npy import to_npy
from calotype.data.shards import iterate, write_shard
from calotype.data.store import open_store
from calotype.errors import CalotypeError, DataError, Unreachable

from tests.proxy import Faults, Proxy

SHARDS, SAMPLES, BATCH = 3, 40, 24
EPOCH = SHARDS * SAMPLES // BATCH  # steps


@pytest.fixture(scope="module")
def proxy(stack: object) -> Iterator[Proxy]:
    with Proxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        yield proxy


@pytest.fixture
def served(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Dataset, list[str]]]:
    """A dataset behind the proxy, and the ids of two epochs as they come from the same bytes in a folder."""
    store = open_store(f"{bucket}/data")
    rows = [write_shard(store, f"{n}.tar", [sample(n, i) for i in range(SAMPLES)], 8) for n in range(SHARDS)]
    golden = read(Dataset(store, rows))
    assert len(set(golden)) == SHARDS * SAMPLES
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    monkeypatch.setattr(get, "PAUSES", (0.01, 0.2))
    proxy.faults(Faults())
    yield Dataset(store, rows), golden
    proxy.faults(Faults())


def sample(shard: int, index: int) -> Sample:
    return Sample(f"{shard}-{index}", {"x.npy": to_npy(np.full(500, 1000 * shard + index, np.int32)), "txt": b"a"})


def read(dataset: Dataset, steps: int = 2 * EPOCH, position: int = 0, **how: object) -> list[str]:
    """Ids of so many batches, each array what its id says."""
    found: list[str] = []
    reading = Reading(readers=4, **how)  # type: ignore[arg-type]
    with closing(Stream(dataset, seed=1, batch=BATCH, arrays=["x"], reading=reading).seek(position)) as stream:
        for batch in islice(stream, steps):
            for key, array, present in zip(batch.keys, batch.arrays["x"], batch.present):
                shard, _, index = key.partition("-")
                assert (array == (1000 * int(shard) + int(index) if present else 0)).all()
            found += batch.keys
    return found


@pytest.mark.parametrize(
    "faults",
    [
        Faults(seed=1, slow_down=0.3),
        Faults(seed=2, internal=0.3),
        Faults(seed=3, reset=0.3),
        Faults(seed=4, broken=0.3),
        Faults(seed=5, short=0.3),
        Faults(seed=6, slow_down=0.1, internal=0.1, reset=0.1, broken=0.1, short=0.1),
        Faults(seed=7, only=r"\.tar$", stall=0.2, stall_seconds=5.0),
        Faults(seed=8, only=r"\.tar$", flip=0.05),
    ],
    ids=["503", "500", "reset", "broken", "short", "all", "stall", "flip"],
)
def test_what_passes_is_ridden_out(
    served: tuple[Dataset, list[str]], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    dataset, golden = served
    monkeypatch.setattr(get, "STALL", 0.5)
    before = sum(proxy.counts().faults.values())
    proxy.faults(faults)
    for position in (0, BATCH, 4 * BATCH):  # each stream reads everything anew
        steps = 2 * EPOCH - position // BATCH
        assert read(dataset, steps, position) == golden[position:]
    assert read(dataset, workers=2) == golden
    assert sum(proxy.counts().faults.values()) > before


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_reads_are_counted(served: tuple[Dataset, list[str]], proxy: Proxy, workers: int) -> None:
    proxy.faults(Faults(seed=1, only=r"\.tar$", slow_down=0.5))
    reading = Reading(readers=2, workers=workers)
    with closing(Stream(served[0], seed=1, batch=BATCH, arrays=["x"], reading=reading)) as stream:
        assert stream.retries == 0
        for _ in islice(stream, 3 * EPOCH):
            pass
        assert 0 < stream.retries <= proxy.counts().faults["slow_down"]


@pytest.mark.parametrize("kind", ["slow_down", "short"])
def test_repeated_reads_of_whole_objects_are_counted(
    served: tuple[Dataset, list[str]], proxy: Proxy, kind: str
) -> None:
    dataset, _ = served
    before, faults = get.counts.retries, proxy.counts().faults[kind]
    proxy.faults(Faults(seed=2, only=r"\.tar$", **{kind: 0.2}))  # type: ignore[arg-type]
    assert len(list(iterate(dataset.store, dataset.shards))) == SHARDS * SAMPLES
    assert get.counts.retries - before == proxy.counts().faults[kind] - faults > 0


@pytest.mark.parametrize("kind", ["refuse", "hang"])
@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.chaos)])
def test_a_black_out_is_ridden_out(
    served: tuple[Dataset, list[str]], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, kind: str, seconds: int
) -> None:
    dataset, golden = served
    monkeypatch.setattr(get, "STALL", 1.0)
    monkeypatch.setattr(get, "CONNECT", 1.0)
    with closing(Stream(dataset, seed=1, batch=BATCH, arrays=["x"], reading=Reading(readers=2))) as stream:
        found = list(next(iter(stream)).keys)
        proxy.faults(Faults(only=r"\.tar$", blackout=kind))
        began, ended = time.monotonic(), False
        stream.load_state_dict({"position": BATCH})  # reads everything anew
        batches = iter(stream)
        threading.Timer(seconds, lambda: proxy.faults(Faults())).start()
        for batch in islice(batches, 2 * EPOCH - 1):
            ended = ended or time.monotonic() - began > seconds
            found += batch.keys
    assert found == golden
    assert ended, "it waited"


GOING = """
import signal
import sys
import calotype.data.get as get
from calotype.data import Dataset, Stream
from calotype.data.manifest import Manifest
from calotype.data.store import open_store

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs in the background ignore it
store = open_store(sys.argv[1])
get.PAUSES = (60.0, 60.0)
stream = Stream(Dataset(store, Manifest.from_bytes(store.read("manifest.json")).shards), seed=1, batch=4)
print("reading", flush=True)
next(iter(stream))
"""


def test_nobody_waits_for_a_server_that_is_gone(served: tuple[Dataset, list[str]], proxy: Proxy) -> None:
    """Neither `close` nor Ctrl-C."""
    dataset, _ = served
    dataset.store.write("manifest.json", Manifest(CACHE, "x", ("txt",), tuple(dataset.shards), {}).to_bytes())
    proxy.faults(Faults(only=r"\.tar$", slow_down=1.0))
    stream = Stream(dataset, seed=1, batch=BATCH)
    thread = threading.Thread(target=lambda: list(stream), daemon=True)
    thread.start()
    time.sleep(0.3)
    stream.close()
    thread.join(5)
    assert not thread.is_alive()
    command = [sys.executable, "-c", GOING, dataset.store.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reading\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)  # it would be a minute


def test_patience_ends(served: tuple[Dataset, list[str]], proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get, "PATIENCE", 1.0)
    proxy.faults(Faults(only=r"\.tar$", slow_down=1.0))
    with pytest.raises(Unreachable, match=r"[012]\.tar cannot be read: for 1 s 503 SlowDown"):
        read(served[0])
    proxy.faults(Faults(slow_down=1.0))
    with pytest.raises(Unreachable, match=r"cannot be reached .*check the server"):  # and so what boto3 asks
        served[0].store.ensure()


@pytest.mark.parametrize("step", [16 * 512, pytest.param(512, marks=pytest.mark.chaos)])
def test_a_shard_cut_at_any_block_is_seen(served: tuple[Dataset, list[str]], proxy: Proxy, step: int) -> None:
    """webdataset alone loses samples here without a word, and half samples come out."""
    dataset, golden = served
    row = dataset.shards[1]
    for length in range(0, row.bytes + 1, step):
        proxy.faults(Faults(cut={r"data/1\.tar$": length}))
        if length >= row.bytes - 1024:  # only the end of the archive is gone
            assert read(dataset) == golden
        else:
            with pytest.raises(DataError, match=r"data/1\.tar is cut: chunk \d"):
                read(dataset)


@pytest.mark.parametrize("place", [0, 700, 9_000, 50_000])
def test_a_bit_that_is_wrong_where_it_lies_is_seen(served: tuple[Dataset, list[str]], proxy: Proxy, place: int) -> None:
    dataset, golden = served
    proxy.faults(Faults(damaged={r"data/1\.tar$": place}))
    with pytest.raises(DataError, match=r"data/1\.tar is damaged or replaced: chunk \d"):
        read(dataset)
    lost = read(dataset, on_error="quarantine", error_budget=8)
    assert lost != golden
    assert [ours for ours, key in zip(lost, golden) if ours != key] == [
        ours for ours in lost if ours.startswith("#")
    ], "the others are where they were"


def replaced(dataset: Dataset, kind: str) -> None:
    store, row = dataset.store, dataset.shards[2]
    samples = [sample(2, i) for i in range(SAMPLES)]
    if kind == "missing member":
        del samples[11].members["txt"]
    elif kind == "reversed":
        samples.reverse()
    other = write_shard(store, "other.tar", samples, 8)
    if kind == "missing":
        store.delete(row.key)
    elif kind == "missing sidecar":
        store.delete(sidecar_key(row.key))
    else:
        store.write(row.key, store.read(other.key))
    if kind == "with its sidecar":
        store.write(sidecar_key(row.key), store.read(sidecar_key(other.key)).replace(b"{", b"{ ", 1))


@pytest.mark.parametrize("kind", ["missing member", "reversed", "missing", "missing sidecar", "with its sidecar"])
def test_a_replaced_shard_is_named_at_once(served: tuple[Dataset, list[str]], kind: str) -> None:
    replaced(served[0], kind)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"data/2\."):
        read(served[0])
    assert time.monotonic() - began < get.PATIENCE / 4, "no patience with what does not pass"


def test_refused_is_said_at_once(served: tuple[Dataset, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(CalotypeError, match=r"refused.*AWS_ACCESS_KEY_ID"):
        read(served[0])


def test_every_byte_is_read_once(served: tuple[Dataset, list[str]], proxy: Proxy) -> None:
    def seen() -> dict[str, int]:
        mine = str(served[0].store.uri).removeprefix("s3://")
        return {key.removeprefix(f"{mine}/"): n for (_, key), n in proxy.counts().bytes.items() if key.startswith(mine)}

    read(served[0])
    found = seen()
    for row in served[0].shards:
        assert found[row.key] == row.bytes - 1024  # but the archive's end
