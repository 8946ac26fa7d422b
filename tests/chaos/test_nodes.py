"""A training on two real Ray nodes of this machine: one is lost, one comes, one is taken away after a notice."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from calotype.cluster import room, spread
from calotype.cluster.services import interpreter
from calotype.config import EMA, Cluster, Data, Engine, Optim, Track, Train, TrainDenoiser
from calotype.environment import Worker
from calotype.runs import Record

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(420)]
MANIFEST = Path(__file__).parents[2] / "infra" / "kuberay" / "raycluster.yaml"
BATCH, EVERY = 8, 160
NEVER = {"validate_every": 0, "sample_every": 0, "keep": 99}
# `ray`, which would look for the head at this machine's outside address.
ON_LOOPBACK = """
from ray._private import services
from ray.scripts import scripts
services.get_node_ip_address = lambda address=None: "127.0.0.1"
scripts.main()
"""


class Node:
    """One more node of the cluster, on this machine."""

    def __init__(self, folder: Path, cpus: int) -> None:
        import ray

        before = {node["NodeID"] for node in ray.nodes()}
        python = interpreter(json.loads(Path(os.environ["CALOTYPE_HOME"], "state.json").read_text()))
        command = [python, "-c", ON_LOOPBACK, "start", f"--address={os.environ['CALOTYPE_RAY_GCS']}"]
        command += ["--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        # As another machine has: a node unpacks a job's code anew where another one's ranks may stand in it, and a
        # process without a working directory cannot load MKL.
        self.scratch = tempfile.mkdtemp(prefix="calotype-node-")
        command += [f"--temp-dir={self.scratch}"]
        env = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        with (folder / f"node-{len(before)}.log").open("wb") as said:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=said)
        try:
            self.id = until(lambda: next(iter({one["NodeID"] for one in ray.nodes() if one["Alive"]} - before), ""), 60)
        except AssertionError:
            self.kill()
            raise

    def drain(self) -> None:
        """As a pod does that must go, but for the number of its node: here all nodes have one address."""
        group = yaml.safe_load(MANIFEST.read_text())["spec"]["workerGroupSpecs"][0]
        script = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        _, *words = script.partition(";")[0].split()
        words += [f"--address={os.environ['CALOTYPE_RAY_GCS']}", f"--node-id={self.id}"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], check=True, timeout=60)

    def kill(self) -> None:
        """At once and with all that runs there, as a machine goes."""
        there = [*psutil.Process(self.process.pid).children(recursive=True)] if self.alive() else []
        for process in [self.process, *there]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def alive(self) -> bool:
        return self.process.poll() is None

    def leave(self) -> None:
        """In order: Ray would try a node that was killed for another quarter of a minute."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()


def until(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def cpus(stack: Any) -> Iterator[int]:
    """Of the first node, as many as each other one and each rank have: a rank is a node."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    spread._connect(Cluster())
    yield int(ray.cluster_resources()["CPU"])
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    ray.shutdown()


def trains(config: TrainDenoiser, worker: Worker, record: Record) -> dict[str, Any]:
    """The real loop on a model of five weights; every step is written down before it is taken."""
    import numpy as np
    import torch
    from calotype.train import engine, loop

    made = engine.Engine(torch.nn.Linear(4, 1), config.optim, config.engine, worker, 1, EMA(halflife=100))
    first, last = (BATCH * (worker.rank + more) // worker.world for more in (0, 1))

    def batches(position: int) -> Iterator[Any]:
        for start in itertools.count(position, BATCH):
            yield SimpleNamespace(positions=np.arange(start, start + BATCH)[first:last])

    def prepare(batch: Any) -> dict[str, torch.Tensor]:
        return {"at": torch.from_numpy(batch.positions), "x": torch.randn(last - first, 4)}

    def step(rows: Any) -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        if worker.rank == 0:
            with Path(config.root, "steps").open("a") as file:
                file.write(f"{os.getpid()} {worker.world} {int(rows['at'][0])}\n")
        return {"net": (made(rows["x"]) - 1).square().mean(1)}

    figures = loop.run(loop.Task({"net": made}, batches, prepare, step), config, worker, record)
    return {} if figures["stopped"] else figures


def steps(folder: Path) -> list[tuple[int, int, int]]:
    """(process of rank 0, ranks, position of the first image) of every step that was taken."""
    said = folder / "steps"
    lines = said.read_text().splitlines() if said.exists() else []
    return [(int(process), int(world), int(at)) for process, world, at in map(str.split, lines)]


def worlds(folder: Path) -> list[int]:
    return [world for _, world, _ in steps(folder)]


def committed(folder: Path) -> list[int]:
    return sorted(int(found.parent.name) for found in folder.glob("artifacts/checkpoints/*/COMMIT.json"))


def train(folder: Path, cluster: Cluster, nodes: list[Node], disturb: Callable[[], None]) -> list[list[int]]:
    """Train, while `disturb` runs beside it, and stop; positions of the steps that each attempt has taken, checked."""
    settings = TrainDenoiser(
        name="nodes",
        root=str(folder),
        data=Data(name="d"),
        cluster=cluster,
        train=Train(images=10**9, batch=BATCH, **dict.fromkeys(("log_every", "checkpoint_every"), EVERY), **NEVER),
        optim=Optim(),
        engine=Engine(kind="torch"),
        track=Track(kind="none"),
    )

    def disturb_and_stop() -> None:
        try:
            disturb()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb_and_stop)
    thread.start()
    try:
        record = Record("train_denoiser", "f" * 32, "nodes", str(folder), str(folder / "artifacts"))
        assert spread.train(trains, settings, record) == {}
    finally:
        thread.join()
        for node in nodes:
            node.leave()
    found = [[at for *_, at in group] for _, group in itertools.groupby(steps(folder), lambda one: one[:2])]
    for attempt in found:
        assert attempt == list(range(attempt[0], attempt[-1] + 1, BATCH))
    return found


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("calotype.cluster")]


def test_a_node_is_lost_one_comes_and_one_is_taken_away(
    cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "SETTLE", 2.0)
    monkeypatch.setattr(room, "GROWN", 2.0)
    nodes = [Node(tmp_path, cpus)]
    notice: list[int] = []

    def disturb() -> None:
        until(lambda: committed(tmp_path) and len(steps(tmp_path)) % 20 > 4)
        nodes[0].kill()
        until(lambda: worlds(tmp_path)[-4:] == [1] * 4)
        nodes.append(Node(tmp_path, cpus))
        until(lambda: worlds(tmp_path)[-25:] == [2] * 25)
        notice.append(steps(tmp_path)[-1][-1])
        nodes[1].drain()
        until(lambda: worlds(tmp_path)[-4:] == [1] * 4)

    attempts = train(tmp_path, Cluster(workers=[1, 2], cpus=cpus), nodes, disturb)
    whole, alone, grown, left = attempts  # two ranks; one when a node was lost; two; one when that is taken away
    saved = committed(tmp_path)
    assert alone[0] == max(at for at in saved if at <= whole[-1] + BATCH), "not from the last commit"
    assert grown[0] == alone[-1] + BATCH, "a step was lost, or taken twice, to grow"
    assert left[0] == grown[-1] + BATCH, "a step was lost, or taken twice, when a node was taken away"
    assert {grown[0], left[0], left[-1] + BATCH} <= set(saved)
    assert notice[0] < left[0] <= notice[0] + 100 * BATCH
    fails, fewer, room_again, goes_on, taken_away, goes_on_again, fewer_again, asked = messages(caplog)
    assert "the node of rank" in fails
    assert "(a node is lost): failure 1 of this job" in fails
    assert fewer == fewer_again == "starts with 1 of cluster.workers=[1, 2]: there is no room for more"
    assert room_again.startswith("there has been room for 1 more rank")
    assert f"node {nodes[1].id[:12]}, with rank" in taken_away
    assert "is taken away in " in taken_away
    assert goes_on == goes_on_again
    assert asked.startswith("asked to stop")


def test_a_training_of_a_fixed_size_waits_for_a_node_in_place_of_one_that_is_taken_away(
    cpus: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [Node(tmp_path, cpus)]

    def disturb() -> None:
        until(lambda: len(steps(tmp_path)) > 4)
        nodes[0].drain()
        until(lambda: len(messages(caplog)) == 2)
        nodes.append(Node(tmp_path, cpus))
        until(lambda: len({attempt for attempt, *_ in steps(tmp_path)}) == 2)

    first, second = train(tmp_path, Cluster(workers=2, cpus=cpus), nodes, disturb)
    assert second[0] == first[-1] + BATCH
    assert set(worlds(tmp_path)) == {2}
    assert "failure" not in " ".join(messages(caplog))


def test_there_is_no_room_on_nodes_that_leave_or_are_gone(cpus: int, tmp_path: Path) -> None:
    node, ranks = Node(tmp_path, cpus), Cluster(workers=[1, 2], cpus=cpus)
    until(lambda: room.rooms(ranks, ()) == 2)
    assert room.rooms(ranks, {node.id}) == 1
    node.kill()
    import ray

    assert {one["NodeID"]: one["Alive"] for one in ray.nodes()}[node.id], "Ray knows it already: this shows nothing"
    assert room.rooms(ranks, ()) == 1
