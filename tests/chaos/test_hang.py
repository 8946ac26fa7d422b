"""Ranks that really hang: stopped, or asleep in their step.  Their stacks are in the log, and the training goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calotype.cluster import spread
from calotype.config import Cluster, Data, Prepare
from calotype.environment import Worker
from calotype.runs import Record

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
RECORD = Record("prepare", "0" * 32, "x", "nowhere", "nowhere")


@pytest.fixture(scope="module")
def cluster(stack: Any) -> Iterator[None]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def hangs(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    """Rank 1 never comes to its fifth step, once."""
    import torch
    from torch import distributed as dist

    kind, folder = config.name.split(":")
    for step in range(10):
        worker.beat("steps" if step else "starts", 32 * step)
        if step == 5 and worker.rank == 1 and not Path(folder, "hung").exists():
            Path(folder, "hung").touch()
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            sleeping_for_ever()
        dist.all_reduce(torch.ones(1))
    return {"pid": os.getpid()}


def sleeping_for_ever() -> None:
    time.sleep(10**6)


@pytest.mark.parametrize("kind", ["stopped", "asleep"])
def test_a_hung_rank_is_found_and_replaced(
    cluster: None, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Prepare(
        name=f"{kind}:{tmp_path}", data=Data(name="d"), cluster=Cluster(workers=2, hang_seconds=8.0), root="nowhere"
    )
    assert "pid" in spread.train(hangs, settings, RECORD)
    hung, *stacks, goes_on = [one.getMessage() for one in caplog.records if one.name.startswith("calotype.cluster")]
    assert {"stopped": "rank 1 has said nothing", "asleep": "no rank has got any further"}[kind] in hung
    assert all(f"rank {rank} (pid " in hung for rank in (0, 1))
    assert len(stacks) == 2, "stacks of every rank"
    assert all("all_reduce" in one for one in stacks if "rank 0" in one)
    if kind == "asleep":
        assert any("sleeping_for_ever" in one for one in stacks if "rank 1" in one)
    assert "at 160 images (hung): failure 1 of this job; goes on from the last checkpoint in 1 s" in goes_on
