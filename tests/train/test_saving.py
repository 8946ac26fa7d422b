"""Saving on two ranks: every ZeRO stage, offloaded or not, several averages, errors of one of them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calotype import config
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.train import checkpoint

pytestmark = pytest.mark.timeout(600)
RANKS = Path(__file__).with_name("ranks.py")


def spawn(started: Callable[..., Any], part: str, folder: Path) -> list[list[str]]:
    """What each rank said."""
    said = [folder / f"said{rank}" for rank in range(2)]
    workers = [started(RANKS, part, str(folder), str(rank), said=file) for rank, file in enumerate(said)]
    for worker in workers:
        worker.join(300)
        worker.kill()
    return [file.read_text().splitlines() for file in said]


def test_two_ranks_resume_bit_by_bit_and_average_as_one_process_does(
    tmp_path: Path, started: Callable[..., Any]
) -> None:
    """At every stage; each of three averages lies partitioned like the weights, and comes back whole."""
    pytest.importorskip("deepspeed")
    there = runpy.run_path(str(RANKS))
    names = list(there["ENGINES"])
    said, _ = spawn(started, "stages", tmp_path)
    told = [line for line in said if line.split(" ")[0] in names]
    assert told == [f"{name} bit by bit" for name in names], "\n".join(said)
    alone = there["made"](config.Engine(kind="torch"), Worker())
    there["steps"](alone, 0, 20)
    states, _ = alone.states()
    for name in names:
        store = open_store(str(tmp_path / name))
        ranks = {entry.key.split("-")[-3] for entry in store.list() if ".ema@5-" in entry.key}
        assert ranks == {"00000", "00001"}
        for kind, halflife in (("ema", 0), ("ema@5", 5), ("ema@30", 30)):
            found = checkpoint.weights(store, 240, "net", halflife=halflife)
            assert found.keys() == states[kind].keys()
            for parameter, mean in found.items():
                torch.testing.assert_close(mean, states[kind][parameter], rtol=1e-5, atol=1e-6)


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, started: Callable[..., Any]) -> None:
    """And what lists of workers that died lie there does not count; what only rank 1 reads wrong is not deleted."""
    store = open_store(str(tmp_path / "torch0"))
    place = store.at("checkpoints", "000000000016")
    place.publish("parts-dead-00001.json", b'{"files": {}, "pieces": {}}')
    said = spawn(started, "error", tmp_path)
    told = [("CalotypeError: the bucket is gone" in lines, lines[-1]) for lines in said]
    assert told == [(True, "16")] * 2, said
    assert checkpoint.committed(store) == [16, 24]
    assert checkpoint.weights(store, 16, "net", ema=False)["0.weight"].shape == (33, 7)
    assert not [entry.key for entry in place.list() if entry.key.startswith("parts")]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_killed_at_any_file_of_a_save_a_training_goes_on_bit_by_bit(
    tmp_path: Path, started: Callable[..., Any], world: int
) -> None:
    """SIGKILL of a rank before each file of a checkpoint gets its name, and before each deletion of the one before."""
    said = tmp_path / "said"
    process = started(RANKS, "killed", str(tmp_path), str(world), said=said)
    process.join(300)
    process.kill()
    assert process.exitcode == 0, said.read_text()
    trials = [line for line in said.read_text().splitlines() if line.startswith("rank ")]
    assert all(line.endswith("bit by bit") for line in trials), "\n".join(trials)
    for rank in range(world):
        since = [line.split()[5] for line in trials if line.startswith(f"rank {rank} ")]
        files = (7 if rank == 0 else 4) + (world > 1)  # four kinds, index, state, commit; the list of a rank
        assert since[:files] == ["36"] * files
        assert rank or set(since[files:]) == {"72"}
