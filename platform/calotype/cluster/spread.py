"""Spread a task's body over workers: units over actors (`map`), ranks of one training (`train`), one worker (`one`).

With cluster.kind=local the same functions run the body here, in this process, and ray is never imported.

What ends how:
  - CalotypeError (a setting, the data, a loss that is not a number) is final and is raised here as it was raised there.
  - So is what can only be a bug (TypeError and its like), and any exception of a unit.
  - A worker that dies (killed, out of memory, its machine gone) is replaced: its unit is handed out again, RETRIES
    times; or the ranks start again and the body goes on from its own checkpoint, as often as it takes (ranks.py).
  - `map` goes on with the workers that there are: those for which there is no room join when there is.
  - SIGTERM (`calotype cancel`, a preempted machine) and the first Ctrl-C ask a training to save and return, by
    `Worker.stop`; `map` and `one` end at once, for every unit is committed whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from calotype.cluster import jobs, ranks
from calotype.cluster.failures import first_line
from calotype.cluster.units import Actors, Waiting
from calotype.cluster.workers import POLL, Body, Units, run_one, worker_here
from calotype.config import Cluster, Job
from calotype.environment import Held, Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.runs import Record

Unit = TypeVar("Unit")
Made = TypeVar("Made")

# Of glibc, for workers that make units: memory that was freed is used again, and not given back to the system, which
# hands it out anew page by page.  On a CPU that is a tenth of an encoder's time (bench-cache).
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
RETRIES = 5  # deaths of a worker that one unit survives


def map(
    make: Callable[[Any, Worker], Callable[..., Made | Held]],
    config: Job,
    units: Sequence[Unit],
    told: Callable[[int], None] = lambda busy: None,
    group: str = "",
) -> Iterator[tuple[Unit, Made]]:
    """Apply `make(config, worker)` to every unit, on up to cluster.workers actors; results as they come.

    Units are handed out one at a time, so a slow one holds up nobody, and to actors that have started, so nobody waits
    for one that has no room yet.  One that another job has in hand (`Held`) is handed out after all others.

    Args:
        told: is told how many units are in workers' hands.
        group: of the workers (`Worker.group`), the same for each attempt of a job; random if empty.

    Raises:
        CalotypeError: as a unit raised it; or a unit whose worker died RETRIES times, named.
    """
    waiting, group = Waiting(units), group or secrets.token_hex(8)
    if config.cluster.kind == "local":
        yield from _map_here(make(config, replace(worker_here(config.cluster), group=group)), units, waiting, told)
        return
    import ray

    _connect(config.cluster)
    _check_room(config.cluster, 1)
    count = min(config.cluster.most, len(units))
    actor = ray.remote(Units).options(**_resources(config.cluster), runtime_env={"env_vars": KEPT_MEMORY})
    actors = Actors(lambda rank: actor.remote(make, config, rank, count, group), count, config.cluster, RETRIES)

    def hand_out() -> None:
        actors.ask(min(count, waiting.undone))
        while actors.idle and (unit := waiting.next()) is not None:
            actors.hand(*unit)
        told(len(actors.busy))

    with _ended_by_signal():
        try:
            while waiting.undone:
                hand_out()
                if (ended := actors.wait(min(POLL, waiting.due()) if actors.idle else POLL)) is None:
                    continue
                index, made, why = ended
                if why:
                    if (deaths := waiting.died(index)) > RETRIES:
                        named = str(getattr(units[index], "key", units[index]))[:300]
                        raise CalotypeError(f"the worker died {deaths} times on {named}: {why}")
                elif isinstance(made, Held):
                    waiting.held(index, made)
                else:
                    waiting.done(index)
                    hand_out()
                    yield units[index], made
        except ray.exceptions.RayTaskError as error:
            raise _raised(error) from None
        finally:
            actors.kill()


def _map_here(
    work: Callable[..., Made | Held], units: Sequence[Unit], waiting: Waiting[Unit], told: Callable[[int], None]
) -> Iterator[tuple[Unit, Made]]:
    while waiting.undone:
        if (following := waiting.next()) is None:
            time.sleep(waiting.due())
            continue
        index, unit = following
        told(1)
        made = work(*unit)
        told(0)
        if isinstance(made, Held):
            waiting.held(index, made)
        else:
            waiting.done(index)
            yield units[index], made


def one(body: Body, config: Job, record: Record) -> dict[str, Any]:
    """Run `body(config, worker, record)` on one worker; its result."""
    if config.cluster.kind == "local":
        return body(config, worker_here(config.cluster), record)
    import ray

    _connect(config.cluster)
    _check_room(config.cluster, 1)
    with _ended_by_signal():
        run = ray.remote(run_one).options(**_resources(config.cluster), max_retries=RETRIES, retry_exceptions=False)
        future = run.remote(body, config, record)
        try:
            result: dict[str, Any] = ray.get(future)
            return result
        except ray.exceptions.RayTaskError as error:
            raise _raised(error) from None
        except ray.exceptions.RayError as error:
            raise CalotypeError(f"the worker died {RETRIES + 1} times: {first_line(error)}") from None


def train(body: Body, config: Job, record: Record) -> dict[str, Any]:
    """Run `body(config, worker, record)` on cluster.workers ranks that form one torch process group; rank 0's result.

    With cluster.workers=[LEAST,MOST] it starts with the ranks that there is room for: fewer when a node was lost, more
    when there is room again (room.py).  The order of samples does not depend on how many they are.
    `worker.stop()` may turn true at different steps on different ranks: the body agrees on one before it acts.
    """
    if config.cluster.kind == "local":
        with _stopped_by_signal() as asked:
            return body(config, worker_here(config.cluster, asked.is_set), record)

    _connect(config.cluster)
    _check_room(config.cluster, config.cluster.least)
    with _stopped_by_signal() as asked:
        return ranks.run(body, config, record, asked)


# ------------------------------------------------------------------------------------------------ on the driver


def _connect(cluster: Cluster) -> None:
    """Join the cluster as a driver: the one whose job this is, else the one that the environment names."""
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    runtime_env: dict[str, Any] | None = None
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # not a submitted job: the workers need this code
        runtime_env = {"working_dir": jobs.upload()}
    if address.startswith("http"):
        address = os.environ.get("CALOTYPE_RAY_GCS", "")
        if not address:
            raise ConfigError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is another machine's dashboard: use `calotype submit`, or "
                f"cluster=local to run here"
            )
    try:
        ray.init(address, runtime_env=runtime_env, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise CalotypeError(f"no Ray cluster at {address!r} ({first_line(error)}): run `calotype up`") from None


def _check_room(cluster: Cluster, workers: int) -> None:
    """The embedded cluster does not grow: refuse what would wait for ever."""
    import ray

    if "CALOTYPE_RAY_GCS" not in os.environ:
        return
    total = ray.cluster_resources()
    typed = str(cluster.workers).replace(" ", "")  # of which [LEAST,MOST] needs the first
    many = f"cluster.workers={typed} with " if workers > 1 else "one worker with "
    least = "" if isinstance(cluster.workers, int) else "at least "
    for name, each, setting in (("CPU", cluster.cpus, "cpus"), ("GPU", cluster.gpus, "gpus")):
        if workers * each > total.get(name, 0):
            raise ConfigError(
                f"{many}cluster.{setting}={each} wants {least}{workers * each:g} {name}s, and this machine has "
                f"{total.get(name, 0):g}: lower {'one of them' if workers > 1 else 'it'}"
            )


def _resources(cluster: Cluster) -> dict[str, float]:
    return {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}


def _raised(error: Any) -> Exception:
    """What the body raised, as it was: CalotypeErrors speak for themselves, others bring their traceback along."""
    cause = error.cause
    return cause if isinstance(cause, CalotypeError) else error


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C interrupts as usual."""
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    with _handlers(on_signal, signal.SIGTERM, signal.SIGINT):
        yield asked


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends this process in order; Ray's own handler would not let `finally` run."""

    def on_signal(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    with _handlers(on_signal, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handlers(on_signal: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
