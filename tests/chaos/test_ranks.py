"""Ranks that really hang: stopped, or asleep in their step; and fewer of them than were asked for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calotype.cluster import room, spread, watch
from calotype.config import Cluster, Data, Prepare
from calotype.environment import Worker
from calotype.errors import CalotypeError
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
    """Rank 1 never comes to the end of its sixth step: at first it is stopped, then it sleeps."""
    import torch
    from torch import distributed as dist

    for step in range(8):
        worker.beat("steps" if step else "starts", 32 * step)
        time.sleep(0.3)
        if step == 5 and worker.rank == 1:
            if not Path(config.name, "stopped").exists():
                Path(config.name, "stopped").touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            elif not Path(config.name, "asleep").exists():
                Path(config.name, "asleep").touch()
                sleeping_for_ever()
        dist.all_reduce(torch.ones(1))
    return {"pid": os.getpid()}


def sleeping_for_ever() -> None:
    time.sleep(10**6)


def test_hung_ranks_are_found_and_replaced(cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Prepare(
        name=str(tmp_path), data=Data(name="d"), root="nowhere", cluster=Cluster(workers=2, hang_seconds=6.0)
    )
    assert "pid" in spread.train(hangs, settings, RECORD)
    said = [one.getMessage() for one in caplog.records if one.name.startswith("calotype.cluster")]
    assert len(said) == 8, said
    for (hung, *stacks, goes_on), why in (
        (said[:4], "rank 1 has said nothing for"),
        (said[4:], "no rank has got any further for"),
    ):
        assert why in hung
        assert all(f"rank {rank} (pid " in hung for rank in (0, 1))
        assert sorted(one[:16] for one in stacks) == ["stacks of rank 0", "stacks of rank 1"]
        assert all("all_reduce" in one for one in stacks if "rank 0" in one)
        assert "at 160 images (hung): failure" in goes_on
        assert "of this job; goes on from the last checkpoint in 1 s" in goes_on
    assert any("sleeping_for_ever" in one for one in said[5:7])


def grows(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    """Alone it dies, once there is room for two."""
    if worker.world == 1:
        Path(config.name, "alone").touch()
        while not Path(config.name, "room").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"world": worker.world}


def test_it_starts_with_what_there_is_and_grows_back(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    spread._connect(Cluster())
    monkeypatch.setattr(room, "SETTLE", 2.0)
    total = int(ray.cluster_resources()["CPU"])
    full = ray.remote(threading.Event).options(num_cpus=total - total // 2).remote()
    ray.get(full.is_set.remote())

    def make_room() -> None:
        while not (tmp_path / "alone").exists():
            time.sleep(0.05)
        ray.kill(full)
        while ray.available_resources().get("CPU", 0) < total // 2:
            time.sleep(0.05)
        (tmp_path / "room").touch()

    thread = threading.Thread(target=make_room, daemon=True)
    thread.start()
    settings = Prepare(
        name=str(tmp_path), data=Data(name="d"), root="nowhere",
        cluster=Cluster(workers=[1, 2], cpus=total // 2),
    )  # fmt: skip
    assert spread.train(grows, settings, RECORD) == {"world": 2}
    thread.join()
    assert any("starts with 1 of cluster.workers=[1, 2]" in one.getMessage() for one in caplog.records)


@pytest.fixture
def small() -> Iterator[Path]:
    """A cgroup below this process's own, whose members have 64 MB."""
    own = {
        kind: path for _, kind, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split())
    }
    top, limit = ("memory", "memory.limit_in_bytes") if "memory" in own else ("", "memory.max")
    made = Path(f"/sys/fs/cgroup/{top}/{own.get(top, '')}/calotype-{os.getpid()}")
    try:
        made.mkdir()
        (made / limit).write_text(str(2**26))
    except OSError as error:
        if made.exists():
            made.rmdir()
        pytest.skip(f"no cgroup with a limit can be made here: {error}")
    yield made
    while True:
        try:
            made.rmdir()
            return
        except OSError:  # the one that was killed is still being taken apart
            time.sleep(0.1)


def hungry(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    """Goes on from 64 images; the third step takes more memory than there is."""
    for images in range(64, 1024, 32):
        worker.beat("starts" if images == 64 else "steps", images)
        if images == 128:
            time.sleep(2 * watch.BEAT)
            Path(config.name, "cgroup.procs").write_text(str(os.getpid()))
            assert b"x" * 2**29
    return {}


def test_a_rank_that_the_kernel_ends_for_want_of_memory_is_told_from_one_that_dies(
    cluster: None, small: Path, tmp_path: Path
) -> None:
    settings = Prepare(name=str(small), data=Data(name="d"), root="nowhere", cluster=Cluster())
    record = Record("prepare", "0" * 32, "x", str(tmp_path), str(tmp_path))
    with pytest.raises(CalotypeError, match=r"2 times at 128 images.*no memory left where rank 0 ran: lower engine\.m"):
        spread.train(hungry, settings, record)
