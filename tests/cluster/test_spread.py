"""Workers that really die, ranks that really talk, and the same bodies in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from calotype.cluster import failures, nodes, ranks, room, spread, units, watch, workers
from calotype.config import Cluster, Data, Prepare
from calotype.environment import Held, Worker
from calotype.errors import CalotypeError, ConfigError, DataError, Unreachable
from calotype.runs import Record

ROOT = Path(__file__).parents[2]
RECORD = Record("prepare", "0" * 32, "x", "somewhere", "somewhere/else")


def config(name: str = "x", **cluster: Any) -> Prepare:
    return Prepare(name=name, root="nowhere", data=Data(name="d"), cluster=Cluster(**cluster))


@pytest.fixture(scope="module")
def cluster(stack: Any) -> Iterator[None]:
    """This process as a driver; the bodies below travel by value, for workers cannot import a test."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def once(path: str) -> bool:
    """True the first time, on any worker of this machine."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ map


def squares(config: Prepare, worker: Worker) -> Callable[[int], tuple[int, int, int]]:
    def work(unit: int) -> tuple[int, int, int]:
        if unit == 3 and once(f"{config.name}/killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == 100:
            raise DataError("unit 100 is broken")
        if unit == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit * unit, worker.rank, int(os.environ["OMP_NUM_THREADS"])

    return work


def test_a_killed_actor_loses_no_unit(cluster: None, tmp_path: Path) -> None:
    made = dict(spread.map(squares, config(str(tmp_path), workers=2), range(8)))
    assert {unit: square for unit, (square, _, _) in made.items()} == {unit: unit * unit for unit in range(8)}
    assert (tmp_path / "killed").exists()
    assert {rank for _, rank, _ in made.values()} <= {0, 1}
    assert {threads for _, _, threads in made.values()} == {1}


def test_idle_workers_that_died_together_are_blamed_on_one_unit_at_most(cluster: None) -> None:
    import ray

    spread._connect(Cluster())
    actor = ray.remote(workers.Units).options(num_cpus=0)
    made = units.Actors(lambda rank: actor.remote(squares, config(), rank, 3, "group"), 3, Cluster(), 0)
    made.ask(3)
    while len(made.idle) < 3:
        made.wait(1.0)
    for _, handle in made.idle[1:]:
        ray.kill(handle)
        with suppress(ray.exceptions.RayActorError):
            while True:
                ray.get(handle.ready.remote())
    made.hand(0, (5,))
    while (ended := made.wait(1.0)) is None:
        pass
    assert ended[0] == 0
    assert ended[2]
    assert len(made.idle) == 1
    made.hand(0, (5,))
    while (ended := made.wait(1.0)) is None:
        pass
    assert ended[1][0] == 25
    made.kill()


def test_what_a_unit_raises_comes_through_as_itself(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^unit 100 is broken$"):
        list(spread.map(squares, config(str(tmp_path), workers=1), [1, 100, 2]))


def test_a_unit_that_kills_every_worker_is_named(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "RETRIES", 1)
    with pytest.raises(CalotypeError, match="the worker died 2 times on 200"):
        list(spread.map(squares, config(str(tmp_path), workers=1), [1, 200]))


def test_no_units_no_workers(cluster: None) -> None:
    assert list(spread.map(squares, config(workers=2), [])) == []


def paced(config: Prepare, worker: Worker) -> Callable[[int], int]:
    def work(unit: int) -> int:
        time.sleep(0.4)
        return worker.rank

    return work


def test_those_that_have_room_make_all_and_the_others_join_when_there_is_some(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    spread._connect(config().cluster)
    monkeypatch.setattr(units, "PLACED", 0.5)
    total = int(ray.cluster_resources()["CPU"])
    each = total // 2
    full = [ray.remote(threading.Event).options(num_cpus=share).remote() for share in (each, total - each)]
    ray.get([one.is_set.remote() for one in full])
    busy: list[int] = []
    made = spread.map(paced, config(workers=2, cpus=each), range(12), busy.append)

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == units.__name__]

    def make_room() -> None:
        until = time.monotonic() + 60
        while not said() and time.monotonic() < until:
            time.sleep(0.05)
        ray.kill(full[0])

    thread = threading.Thread(target=make_room)
    thread.start()
    first = [next(made) for _ in range(4)]
    thread.join()
    assert [unit for unit, _ in first] == [0, 1, 2, 3], "a unit waited for a worker that had no room"
    assert len({rank for _, rank in first}) == 1
    ray.kill(full[1])
    every = dict([*first, *made])
    assert set(every) == set(range(12))
    assert set(every.values()) == {0, 1}
    assert (busy[0], max(busy), busy[-1]) == (0, 2, 0)
    (warning,) = said()
    assert f"one of cluster.workers=2 with cluster.cpus={each} and cluster.gpus=0" in warning


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_workers_that_die_before_they_have_a_unit_end_the_job(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "RETRIES", 1)
    monkeypatch.setattr(units, "REST", 0.1)
    fatal = config(Fatal())  # type: ignore[arg-type]
    with pytest.raises(CalotypeError, match="no worker starts; 2 died before they had a unit"):
        list(spread.map(paced, fatal, range(3)))


def test_a_worker_that_can_never_have_room_is_refused(cluster: None) -> None:
    with pytest.raises(ConfigError, match=r"one worker with cluster\.cpus=1000 wants 1000 CPUs"):
        list(spread.map(paced, config(cpus=1000), range(3)))
    with pytest.raises(ConfigError, match=r"cluster\.workers=\[2,8\] with cluster\.cpus=600 wants at least 1200 CPUs"):
        spread.train(summed, config(cpus=600, workers=[2, 8]), RECORD)


def shared(config: Prepare, worker: Worker) -> Callable[..., str | Held]:
    """Another job has unit 1, and dies; unit 2 it makes soon."""
    looks: dict[int, int] = {}

    def work(unit: int, sign: bytes = b"") -> str | Held:
        looks[unit] = looks.get(unit, 0) + 1
        if unit == 1 and sign != b"last":
            return Held(b"first" if looks[unit] == 1 else b"last", patience=0.3)
        if unit == 2 and looks[unit] < 3:
            return Held(b"alive %d" % looks[unit], patience=60)
        assert worker.group
        return f"{looks[unit]} {sign.decode()}".strip()

    return work


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_what_another_job_has_comes_last_and_again_until_that_one_is_dead(
    cluster: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(units, "AGAIN", 0.05)
    began = time.monotonic()
    made = list(spread.map(shared, config(kind=kind), range(4)))
    assert [unit for unit, _ in made] == [0, 3, 2, 1]
    assert made[1:3] == [(3, "1"), (2, "3")]
    looks, sign = made[3][1].split()
    assert sign == "last"
    assert int(looks) >= 5, "looks that are far apart show nothing"
    assert time.monotonic() - began > 0.3


# ------------------------------------------------------------------------------------------------ train


def summed(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    import torch
    from torch import distributed as dist

    total = 0.0
    for step in range(4):
        if step == 2 and worker.rank == 1 and once(f"{config.name}/killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        value = torch.tensor([float(worker.rank + 1)])
        dist.all_reduce(value)
        total += float(value)
    groups: list[Any] = [dist.group.WORLD, dist.new_group(ranks=range(worker.world))]  # and as DeepSpeed makes its own
    days = {group._get_backend(torch.device("cpu")).options._timeout.days for group in groups}
    same = os.environ["RANK"] == str(worker.rank) and os.environ["WORLD_SIZE"] == str(worker.world)
    return {
        "total": total,
        "world": worker.world,
        "same": same,
        "threads": torch.get_num_threads(),
        "name": record.name,
        "days": days,
    }


def test_a_killed_rank_is_replaced(cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = spread.train(summed, config(str(tmp_path), workers=2), RECORD)
    assert result == {"total": 12.0, "world": 2, "same": True, "threads": 1, "name": "x", "days": {7}}
    assert (tmp_path / "killed").exists()
    (said,) = [one.getMessage() for one in caplog.records if one.name == "calotype.cluster.ranks"]
    assert "rank 1 died before its first step (a worker died): failure 1 of this job" in said
    assert "goes on from the last checkpoint in 1 s" in said


def refused(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    from torch import distributed as dist

    assert once(f"{config.name}/{worker.rank}"), "a final error was tried again"
    if worker.rank == 1:
        raise ConfigError("optim.lr is too high")
    dist.barrier()  # would wait for half an hour, and Ray Train for its ranks
    return {}


def test_a_refusal_of_one_rank_ends_all_at_once(cluster: None, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"^optim.lr is too high$"):
        spread.train(refused, config(str(tmp_path), workers=2), RECORD)
    assert time.monotonic() - start < 150


def stoppable(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    Path(config.name, "ready").touch()
    until = time.monotonic() + 60
    while not worker.stop() and time.monotonic() < until:
        time.sleep(0.05)
    return {"stopped": worker.stop()}


def busy(real: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but the head answers every other time."""
    count = iter(range(10**6))

    def call(*words: Any, **more: Any) -> Any:
        if next(count) % 2 == 0:
            raise ConnectionError("the head is busy")
        return real(*words, **more)

    return call


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_signal_asks_the_body_to_stop(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name in ("put", "get", "forget"):
        monkeypatch.setattr(ranks, name, busy(getattr(ranks, name)))

    def ask() -> None:
        until = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert spread.train(stoppable, config(str(tmp_path), kind=kind), RECORD) == {"stopped": True}
    thread.join()


def test_a_head_that_is_busy_is_asked_for_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = threading.Event(), iter(("busy", "busy", "busy"))

    def draining() -> Any:
        if next(told, "") != "busy":
            asked.set()
        raise ConnectionError("the head is busy")

    monkeypatch.setattr(room, "POLL", 0.01)
    monkeypatch.setattr(room, "draining", draining)
    assert room.room_for(Cluster(workers=[1, 2]), asked) == 0


def poisoned(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    """Goes on from 64 images, and dies of the third step."""
    for images in range(64, 1024, 32):
        worker.beat("starts" if images == 64 else "steps", images)
        if images == 128:
            time.sleep(2 * watch.BEAT)
            os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_dying_at_the_same_images_again_and_again_is_final(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(failures.KINDS, "a worker died", 0)  # five, and each costs seconds
    record = Record("prepare", "0" * 32, "x", str(tmp_path), str(tmp_path))
    with pytest.raises(CalotypeError, match=r"ended 1 times at 128 images.*rank 0 died.*positions 128.*data\.takedown"):
        spread.train(poisoned, config(), record)
    evidence = json.loads((tmp_path / "evidence" / "000000000128-ranks.json").read_bytes())
    assert [(one["kind"], one["began"], one["low"]) for one in evidence["failures"]] == [("a worker died", 64, 128)]


def unreachable(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    Path(config.name, "ready").touch()
    raise Unreachable("s3://x does not answer")


def test_a_signal_ends_the_wait_for_the_next_attempt(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failures, "FIRST", 600.0)

    def ask() -> None:
        until = time.monotonic() + 60
        while not any("goes on" in one.getMessage() for one in caplog.records) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    began = time.monotonic()
    assert spread.train(unreachable, config(str(tmp_path)), RECORD) == {}
    thread.join()
    assert time.monotonic() - began < 90
    assert any("s3://x does not answer before its first step" in one.getMessage() for one in caplog.records)


def at(low: int, kind: str = "a worker died", began: int | None = 0, pace: int = 0) -> failures.Failure:
    return failures.Failure(kind, "rank 0 died", began, low, low + pace)


def test_backoff_doubles_until_there_is_a_step() -> None:
    streak = failures.Streak()
    away = at(0, "a store does not answer")
    assert [streak.add(away) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert streak.add(at(64)) == 1
    assert [streak.add(away) for _ in range(2)] == [2, 4]
    assert streak.total == 12


def test_the_cause_is_told_from_what_its_neighbours_raise() -> None:
    from ray.core.generated.common_pb2 import ActorDiedErrorContext
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
    from torch import OutOfMemoryError

    def died(message: str) -> WorkerHealthCheckFailedError:
        context = ActorDiedErrorContext(error_message=message, actor_id=b"0" * 16)
        return WorkerHealthCheckFailedError("a health check failed", ActorDiedError(context))

    killed = died(
        "Worker exit type: SYSTEM_ERROR. (1) The process is killed by SIGKILL by OOM killer due to high memory"
    )
    away = died("The actor died because its node has died. Node Id: 12")
    full = died(
        "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on"
    )
    neighbour = RuntimeError("[gloo] Connection closed by peer")
    for error, kind, why in (
        (killed, "a worker died", "the process of rank 1 died"),
        (away, "a node is lost", "the node of rank 1 is gone"),
        (full, "out of memory", "rank 1 ran out of memory: Worker exit type: NODE_OUT_OF_MEMORY"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory", "Tried to allocate 2 GiB"),
        (Unreachable("s3://x does not answer"), "a store does not answer", "s3://x does not answer"),
        (RuntimeError("CUDA error"), "an error", "rank 0 raised RuntimeError: [gloo] Connection"),
    ):
        found = failures.failure_of(WorkerGroupError("said by Ray", {0: neighbour, 1: error}))
        assert found[0] == kind
        assert why in found[1]
    assert failures.failure_of(ControllerError(WorkerGroupStartupTimeoutError(2)))[0] == "no worker starts"
    assert failures.failure_of(ActorDiedError())[0] == "a worker died"  # the controller


def test_nodes_tell_why_a_rank_died(cluster: None) -> None:
    import ray

    spread._connect(Cluster())
    here, kills = ray.get_runtime_context().get_node_id(), nodes.kernel_kills()
    assert ("oom_kill" in Path("/proc/vmstat").read_text()) or not kills

    def told(kind: str = "a worker died", node: str = here, phase: str = "steps", before: int = kills) -> Any:
        signs = [
            watch.Sign(0, node, 1, 1, 1, phase, 0, 64, before),
            watch.Sign(1, here, 2, 1, 1, "steps", 0, 64, kills),
        ]
        return failures.looked_into(kind, "it died", signs)

    assert told() == ("a worker died", "it died")
    assert told(before=kills - 1) == ("out of memory", "the kernel had no memory left where rank 0 ran")
    assert told(before=kills - 1, phase=watch.DONE)[0] == "a worker died"  # it ended by itself: another one was killed
    assert told(before=kills - 1, kind="hung")[0] == "hung"
    assert told(node="0" * 56) == ("a node is lost", "the node of rank 0 is gone")
    assert told(node="0" * 56, kind="a store does not answer")[0] == "a store does not answer"


def test_what_is_final_and_what_is_not() -> None:
    streak = failures.Streak()
    for images in range(0, 100_000, 64):  # gets further each time
        streak.add(at(images))
    for images in (64, 640, 64, 640) * 50:  # further, or not: at other images
        streak.add(at(images, pace=64))
    for _ in range(1000):
        streak.add(at(640, "a node is lost"))
        streak.add(at(0, "hung"))
        streak.add(at(0, began=None))  # killed from outside while it starts, again and again
    streak.add(at(640, "out of memory"))
    streak.add(at(6400, "out of memory"))
    with pytest.raises(CalotypeError, match=r"2 times at 6,400 images.*engine\.micro_batch.*engine\.offload=cpu"):
        streak.add(at(6400, "out of memory"))
    streak = failures.Streak()
    for low in (600, 640, 610, 600, 620):  # signs of life are a second old
        streak.add(at(low, pace=64))
    with pytest.raises(CalotypeError, match="6 times at 630 images"):
        streak.add(at(630, pace=64))
    streak = failures.Streak()
    for _ in range(5):
        streak.add(at(0, "an error", began=None))
    with pytest.raises(CalotypeError, match="6 times before its first step"):
        streak.add(at(0, "an error", began=None))


def watched(said: Callable[[int, int], tuple[int, int, str] | None], seconds: int) -> tuple[int, str]:
    """A watch of two ranks: `said(rank, second)` gives (ticks, images, phase); after how many seconds, and why."""
    now = 0.0

    def read(rank: int) -> bytes | None:
        if (sign := said(rank, int(now))) is None:
            return None
        ticks, images, phase = sign
        return watch.Sign(rank, "node", 100 + rank, ticks, images, phase, 0, images).packed()

    made = watch.Watch(read, 2, 10, clock=lambda: now)
    for second in range(seconds):
        now = float(second)
        if why := made.look():
            return second, why
    return seconds, ""


def test_a_hang_is_seen_by_what_no_rank_does_any_more() -> None:
    assert watched(lambda rank, s: (s, s, "steps"), 300) == (300, "")
    second, why = watched(lambda rank, s: (s, min(s, 20), "steps"), 300)  # both wait in a collective
    assert 30 <= second <= 33
    assert "no rank has got any further" in why
    second, why = watched(lambda rank, s: (min(s, 20) if rank else s, min(s, 21), "steps"), 300)  # one is stopped
    assert 30 <= second <= 33
    assert "rank 1" in why
    second, _ = watched(lambda rank, s: (s, min(s, 20), "saves" if s > 20 else "steps"), 300)  # takes its time
    assert 120 <= second <= 123
    second, _ = watched(lambda rank, s: (s, 0, "starts"), 300)
    assert 100 <= second <= 103
    assert watched(lambda rank, s: (0, 64, watch.DONE), 300) == (300, "")
    assert watched(lambda rank, s: (min(s, 20), s, watch.DONE) if rank else (s, s, "ends"), 300) == (300, "")
    assert watched(lambda rank, s: None, 300) == (300, "")


def test_a_driver_that_was_stopped_itself_sees_no_hang() -> None:
    times = iter((0.0, 1.0, 1000.0, 1001.0))
    sign = watch.Sign(0, "node", 1, 1, 1, "steps", 0, 1).packed()
    made = watch.Watch(lambda rank: sign, 1, 10, clock=lambda: next(times))
    assert [made.look() for _ in range(4)] == [""] * 4


def test_a_process_tells_its_stacks_where_no_tool_may_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    code = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, 2)
def here(): print("ready", flush=True); time.sleep(60)
here()
"""
    with said.open("w") as file, subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=file) as process:
        try:
            process.stdout.readline()
            assert "here" in watch.stacks(process.pid)
            monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # and no py-spy beside it
            assert "its own log has them" in watch.stacks(process.pid)
            assert "in here" in said.read_text()
            assert process.pid in watch.ended([process.pid])
            assert process.wait() == -signal.SIGKILL
        finally:
            process.kill()


def test_more_than_the_machine_has_is_refused(cluster: None) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.workers=1000"):
        spread.train(summed, config(workers=1000), RECORD)


# ------------------------------------------------------------------------------------------------ one, local


def here(config: Prepare, worker: Worker, record: Record) -> dict[str, Any]:
    if record.name == "broken":
        raise DataError("no such run")
    return {"pid": os.getpid(), "world": worker.world, "threads": worker.threads}


def test_one_worker_elsewhere(cluster: None) -> None:
    result = spread.one(here, config(), RECORD)
    assert result["world"] == 1
    assert result["pid"] != os.getpid()
    with pytest.raises(DataError, match=r"^no such run$"):
        spread.one(here, config(), Record("sample", "", "broken", "", ""))


def test_local_is_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local = config(str(tmp_path), kind="local")
    assert spread.one(here, local, RECORD)["pid"] == os.getpid()
    assert spread.train(here, local, RECORD)["pid"] == os.getpid()
    assert [made[0] for _, made in spread.map(squares, local, [1, 2])] == [1, 4]
    with pytest.raises(DataError):
        list(spread.map(squares, local, [100]))


def test_local_never_imports_ray() -> None:
    code = """
import sys
from calotype.cluster import spread
from calotype.config import Cluster, Data, Prepare
from calotype.runs import Record
config = Prepare(name="x", data=Data(name="d"), cluster=Cluster(kind="local"))
record = Record("prepare", "", "x", "", "")
body = lambda config, worker, record: {"a": 1}
assert spread.train(body, config, record) == spread.one(body, config, record) == {"a": 1}
assert list(spread.map(lambda config, worker: abs, config, [-1])) == [(-1, 1)]
assert not {"ray", "torch", "mlflow"} & set(sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
