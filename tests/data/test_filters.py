"""Filters and takedown lists: what is left is streamed, in any world, from datasets and from caches of them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calotype.data import Dataset, Sample, Stream, filters
from calotype.data.manifest import CACHE, DATASET, Manifest, columns_key
from calotype.data.shards import write_shard
from calotype.data.store import Store, open_store
from calotype.errors import ConfigError, DataError

SIZES = (20, 7, 33)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, Manifest]:
    """60 samples: width 64 times the number within the shard, label 0..2, every tenth without a score."""
    store = open_store(str(tmp_path))
    rows = []
    for n, size in enumerate(SIZES):
        columns: dict[str, list[Any]] = {
            "width": [64 * i for i in range(size)],
            "label": [i % 3 for i in range(size)],
            "score": [None if i % 10 == 0 else i / size for i in range(size)],
        }
        samples = [Sample(f"{n}-{i}", {"txt": b"x"}) for i in range(size)]
        rows.append(write_shard(store, f"shards/{n}.tar", samples, 8, columns=columns))
    return store, Manifest(DATASET, "toy", ("txt",), tuple(rows))


def left(made: tuple[Store, Manifest], conditions: list[Any], lost: tuple[str, ...] = ()) -> set[str]:
    store, manifest = made
    name = filters.publish(store, manifest, conditions, lost)
    keep = filters.load(store, name, manifest)
    return {f"{n}-{i}" for n, row in enumerate(manifest.shards) for i in np.flatnonzero(keep[row.key])}


def every(test: Any) -> set[str]:
    return {f"{n}-{i}" for n, size in enumerate(SIZES) for i in range(size) if test(n, i)}


def test_conditions_are_pyarrows(made: tuple[Store, Manifest]) -> None:
    assert left(made, [["width", ">=", 512]]) == every(lambda n, i: i >= 8)
    assert left(made, [["width", ">=", 512], ["label", "in", [0, 2]]]) == every(lambda n, i: i >= 8 and i % 3 != 1)
    assert left(made, [[["width", "<", 64]], [["width", "==", 640]]]) == every(lambda n, i: i in (0, 10))
    assert left(made, [["score", ">", -1]]) == every(lambda n, i: i % 10), "nothing is known of those without a score"
    assert left(made, [], ("0-3", "2-30", "elsewhere")) == every(lambda n, i: (n, i) not in ((0, 3), (2, 30)))
    assert left(made, [["width", "<", 128]], ("0-0",)) == every(lambda n, i: i < 2 and (n, i) != (0, 0))


def test_a_selection_is_made_once_and_named_by_what_it_is(made: tuple[Store, Manifest]) -> None:
    store, manifest = made
    names = {
        filters.publish(store, manifest, [["width", ">=", 512]], ()),
        filters.publish(store, manifest, [["width", ">=", 512]], ("0-9",)),
        filters.publish(store, manifest, [["width", ">=", 513]], ()),
        filters.publish(store, replace(manifest, name="other"), [["width", ">=", 512]], ()),
    }
    assert len(names) == 4
    for row in manifest.shards:
        store.delete(columns_key(row.key))
    assert filters.publish(store, manifest, [["width", ">=", 512]], ()) in names, "no column is read again"
    with pytest.raises(DataError, match="submit again"):
        filters.load(store, min(names), replace(manifest, shards=manifest.shards[:1]))


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ([["height", ">", 1]], r"column 'height', the samples have key, width, label, score"),
        ([["width", "~", 1]], r"'width', '~', 1.*one of =="),
        ([["width", ">"]], r"\[column, operator, value\]"),
        (["width"], r"\[column, operator, value\]"),
        ([["width", ["="], 1]], r"\[column, operator, value\]"),
        ([["width", "=", {"a": 1}]], "a number or text"),
        ([["width", "=", None]], "a number or text"),
        ([["width", "=", [1]]], "take a list"),
        ([["width", "in", 3]], "take a list"),
        ([["width", "in", [[3]]]], "a number or text"),
        ([3], r"\[column, operator, value\]"),
        ([[["width", ">", 1], 3]], r"\[column, operator, value\]"),
        ([["row", ">", 1]], "column 'row'"),
        ([["width", ">", "wide"]], "compare like with like"),
        ([["width", ">", 10**6]], "leaves none"),
    ],
)
def test_what_cannot_be_applied_is_one_sentence(made: tuple[Store, Manifest], conditions: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        filters.publish(*made, conditions, ())


def test_a_damaged_selection_is_refused(made: tuple[Store, Manifest]) -> None:
    store, manifest = made
    name = filters.publish(store, manifest, [["width", ">=", 512]], ())
    key = f"selections/{name}.bits"
    data = store.read(key)
    for bad in (data[:-1] + bytes([data[-1] ^ 128]), data[:-1], b"", data.partition(b"\n")[2]):
        store.write(key, bad)
        for use in (filters.load, lambda *_: filters.publish(store, manifest, [["width", ">=", 512]], ())):
            with pytest.raises(DataError, match=key):
                use(store, name, manifest)


def test_what_is_left_and_found_is_said(made: tuple[Store, Manifest], caplog: pytest.LogCaptureFixture) -> None:
    store, manifest = made
    for _ in range(2):  # the second time it is there already
        with caplog.at_level("INFO", "calotype"):
            filters.publish(store, manifest, [["width", ">=", 512]], ("0-3", "0-9", "elsewhere"))
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("INFO", "toy: 36 of 60 samples are left by data.filter and data.takedown"),
            ("WARNING", "data.takedown: 2 of its 3 keys are in toy"),
        ]
        caplog.clear()


def test_changed_columns_are_refused(made: tuple[Store, Manifest]) -> None:
    store, manifest = made
    store.write(columns_key(manifest.shards[1].key), store.read(columns_key(manifest.shards[0].key)))
    with pytest.raises(DataError, match=r"1\.columns\.parquet is not what the manifest names"):
        filters.publish(store, manifest, [["width", ">=", 512]], ())


def test_takedown_lists(made: tuple[Store, Manifest], tmp_path: Path) -> None:
    path = tmp_path / "gone.txt"
    path.write_text("# asked for in May\n0-3\n\n  2-30 \n")
    assert filters.takedown_keys(str(path)) == {"0-3", "2-30"}
    with pytest.raises(ConfigError, match=r"data\.takedown='nowhere'"):
        filters.takedown_keys("nowhere")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"data\.takedown"):
        filters.takedown_keys(str(path))


def test_a_cache_is_filtered_by_its_source(made: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = made
    latents = open_store(str(tmp_path / "latents"))
    rows = [
        write_shard(latents, f"{row.sha256}.tar", [Sample(f"{n}-{i}", {"txt": b"z"}) for i in range(row.samples)], 5,
                    source_sha256=row.sha256)
        for n, row in enumerate(manifest.shards)
    ]  # fmt: skip
    cached = Manifest(CACHE, "toy", ("txt",), tuple(reversed(rows)))
    name = filters.publish(store, manifest, [["width", ">=", 512]], ("2-30",))
    keep = filters.of_cache(filters.load(store, name, manifest), manifest, cached)
    wanted = every(lambda n, i: i >= 8 and (n, i) != (2, 30))
    with closing(Stream(Dataset(latents, cached.shards, keep=keep), seed=0, batch=6)) as stream:
        assert stream.epoch_samples == len(wanted) == 36
        assert {key for batch in islice(stream, 6) for key in batch.keys} == wanted
