"""The record of a run: one identity, one MLflow run, many attempts, one result.

    <root>/runs/<identity>/run.json            who it is; written once, by conditional put
                           attempts/0001.json  one per start; the highest number is the one that may write
                           attempts/0001.alive a counter that its driver keeps counting
                           attempts/0001.end   how it ended
                           result.json         what it made
    <root>/names/<job>/<name>/<time>-<identity>   `run:NAME` finds the newest

No correctness depends on clocks: an attempt number is claimed by conditional put, and whoever does not hold the
highest may not commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from calotype.compose import as_data, identity
from calotype.data.store import Missing, Store, open_store
from calotype.errors import CalotypeError

LEFT_OUT = "quarantined.jsonl"
BEAT = 3.0  # seconds between two counts of a living attempt


class Superseded(CalotypeError):
    """A newer attempt of the same run has begun; this one must not write any more."""


@dataclass(frozen=True)
class Record:
    """One run as every process sees it; plain data, so it travels to workers as it is."""

    job: str
    identity: str
    name: str
    root: str
    artifact_root: str  # checkpoints, pictures and models lie here; MLflow shows the same place
    mlflow_run_id: str = ""
    created: float = 0.0
    attempt: int = 0
    config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def store(self) -> Store:
        """`<root>/runs/<identity>`."""
        return open_store(self.root).at("runs", self.identity)

    @property
    def artifacts(self) -> Store:
        return open_store(self.artifact_root)

    def result(self) -> dict[str, Any]:
        """What the run made; empty while it is not done."""
        return _read_json(self.store, "result.json") or {}

    def status(self) -> str:
        """finished | failed | cancelled | started (running, or killed) | given up (what it made was deleted)."""
        if self.store.exists("result.json"):
            return "finished"
        last = last_attempt(self.store)
        ended = _read_json(self.store, f"attempts/{last:04d}.end") if last else None
        status = str(ended["status"]) if ended else "started"
        return "given up" if status == "finished" else status

    def list_left_out(self, lost: Iterable[tuple[str, str]]) -> str:
        """Name samples and why they are left out, among the artifacts, where MLflow shows them; gives the URI."""
        lines = (json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in lost)
        self.artifacts.write(LEFT_OUT, "".join(lines).encode())
        return f"{self.artifacts.uri}/{LEFT_OUT}"

    def check_current(self) -> None:
        """Before every commit: refuse when a newer attempt of this run has begun.

        Raises:
            Superseded: this process is a leftover.
        """
        if self.attempt and last_attempt(self.store) != self.attempt:
            raise Superseded(
                f"attempt {self.attempt} of {self.job} {self.identity[:8]} was superseded by attempt "
                f"{last_attempt(self.store)}: this one stops without writing"
            )


def done(job: str, config: Any) -> Record | None:
    """The finished run of exactly this config, if there is one; then there is nothing to do."""
    record = load(config.root, identity(job, config))
    if record is None:
        return None
    result = record.result()
    wanted = config.train.images if hasattr(config, "train") else 0
    return record if result and result.get("images", 0) >= wanted else None


def load(root: str, run: str) -> Record | None:
    data = _read_json(open_store(root).at("runs", run), "run.json")
    return Record(**{**data, "root": root}) if data else None


def find(root: str, job: str, reference: str) -> Record:
    """The run that `run:NAME`, a bare NAME or an identity means: the newest finished one, else the newest.

    Raises:
        CalotypeError: there is none, or none of that name is known.
    """
    name = reference.removeprefix("run:")
    if re.fullmatch(r"[0-9a-f]{32}", name) and (record := load(root, name)):
        return record
    newest: Record | None = None
    for entry in reversed(_named(root, job, name)):
        record = load(root, entry)
        if record is not None and record.store.exists("result.json"):
            return record
        newest = newest or record
    if newest is None:
        known = ", ".join(sorted(open_store(root).at("names", job).folders())) or "none"
        raise CalotypeError(
            f"no {job} run named {name!r} under {root} (known: {known}): "
            f"run it first with `calotype submit {job} name={name}`"
        )
    return newest


def parted(reference: str) -> tuple[str, int | None]:
    """`run:NAME@IMAGES`, one checkpoint of a run => (run:NAME, images); None where the newest is meant."""
    name, asked, images = reference.partition("@")
    if asked and not images.isdigit():
        raise CalotypeError(f"{reference!r} names no checkpoint: write run:NAME@IMAGES, such as run:NAME@100000")
    return name, int(images) if asked else None


def call(record: Record, name: str) -> None:
    """Let `run:NAME` find this run; one run may have several names."""
    if record.identity not in _named(record.root, record.job, name):
        entry = f"{int(record.created * 1000):014d}-{record.identity}"
        open_store(record.root).at("names", record.job, name).publish(entry, b"")


def names(root: str) -> dict[str, list[str]]:
    """Identity -> every name that the run was given, in alphabetical order."""
    found: dict[str, list[str]] = {}
    for entry in open_store(root).at("names").list():  # JOB/NAME/CREATED-IDENTITY
        _, name, run = entry.key.split("/")
        found.setdefault(run.rsplit("-", 1)[1], []).append(name)
    return found


def fetch(record: Record, prefix: str, folder: str) -> None:
    """Copy the artifacts under `prefix` into a folder of this machine."""
    there, here = record.artifacts.at(prefix), open_store(folder)
    for entry in there.list():
        here.write(entry.key, there.read(entry.key))


def _named(root: str, job: str, name: str) -> list[str]:
    """Identities of the runs of that name, oldest first."""
    entries = open_store(root).at("names", job, name).list()
    return [entry.key.rsplit("-", 1)[1] for entry in entries if "/" not in entry.key]


def every(root: str) -> Iterator[Record]:
    """All runs under a root."""
    for run in open_store(root).folders("runs"):
        if record := load(root, run):
            yield record


def makers(root: str, job: str, uri: str) -> list[Record]:
    """The runs of `job` in whose artifacts `uri` lies: at most one, for lineage."""
    return [record for record in every(root) if record.job == job and uri.startswith(f"{record.artifacts.uri}/")]


def begin(job: str, config: Any, create: Callable[[str], tuple[str, str]], discard: Callable[[str], None]) -> Record:
    """Open or create the run of this config and claim its next attempt.

    Args:
        create: makes the MLflow run of an identity: (run id, artifact root); ("", "") without MLflow.
        discard: deletes an MLflow run that lost the race for run.json.

    Raises:
        CalotypeError: another attempt of the same run is alive.
    """
    run = identity(job, config)
    store = open_store(config.root).at("runs", run)
    record = load(config.root, run)
    if record is None:
        run_id, artifacts = create(run)
        record = Record(
            job,
            run,
            config.name,
            config.root,
            artifacts or f"{store.uri}/artifacts",
            run_id,
            created=time.time(),
            config=as_data(config),
        )
        data = {key: value for key, value in asdict(record).items() if key not in ("root", "attempt")}
        if not store.publish("run.json", json.dumps(data, indent=1).encode()):
            discard(run_id)
            record = load(config.root, run)
            assert record is not None
    call(record, config.name)
    attempt = last_attempt(store)
    if attempt and (who := alive(record, attempt)):
        raise CalotypeError(
            f"{job} {config.name} ({run[:8]}) is already running as attempt {attempt} on {who}: "
            f"wait for it, or `calotype cancel` it"
        )
    claim = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot(),
        "started": time.time(),
        "submission": os.environ.get("CALOTYPE_SUBMISSION", ""),
    }
    if not store.publish(f"attempts/{attempt + 1:04d}.json", json.dumps(claim).encode()):
        raise CalotypeError(f"{job} {config.name} ({run[:8]}) was started by somebody else in this very moment")
    return Record(**{**asdict(record), "attempt": attempt + 1})


def alive(record: Record, attempt: int) -> str:
    """The host of a living attempt, or "".  A process of this machine is asked; a remote one must be seen counting."""
    store = record.store
    if store.exists(f"attempts/{attempt:04d}.end"):
        return ""
    claim = _read_json(store, f"attempts/{attempt:04d}.json") or {}
    if claim.get("boot") == _boot():
        import psutil

        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(claim["pid"]))
            if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= claim["started"] + 1:
                return str(claim["host"])
        return ""
    seen = _read_json(store, f"attempts/{attempt:04d}.alive")
    until = time.monotonic() + 4 * BEAT
    while time.monotonic() < until:
        time.sleep(BEAT / 3)
        if _read_json(store, f"attempts/{attempt:04d}.alive") != seen:
            return str(claim.get("host", "another machine"))
    return ""


@contextlib.contextmanager
def attempt_of(record: Record) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Count while the attempt lives and write how it ended; yields the function that publishes the result."""
    store, stop = record.store, threading.Event()

    def count() -> None:
        beats = 0
        while not stop.wait(BEAT):
            beats += 1
            with contextlib.suppress(Exception):  # a hint: an outage of the store must not end a run
                store.write(f"attempts/{record.attempt:04d}.alive", json.dumps(beats).encode())

    published: list[float] = []

    def publish(result: dict[str, Any]) -> None:
        record.check_current()
        store.write("result.json", json.dumps(result, indent=1, sort_keys=True).encode())
        published.append(time.time())

    thread = threading.Thread(target=count, name="alive", daemon=True)
    thread.start()
    status, reason = "cancelled", ""
    try:
        yield publish
        status = "finished" if published else status
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        status = "cancelled" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        raise
    finally:
        stop.set()
        ending = {"status": status, "reason": reason, "ended": time.time()}
        with contextlib.suppress(Exception):
            store.publish(f"attempts/{record.attempt:04d}.end", json.dumps(ending).encode())


def first_attempt_started(record: Record) -> float:
    """When the run was first started, seconds since the epoch: the zero of its goodput."""
    claim = _read_json(record.store, "attempts/0001.json") or {}
    return float(claim.get("started", time.time()))


def lived(record: Record) -> float:
    """Seconds that the attempts took, this one until now; of one that was killed, as far as it counted."""
    total = 0.0
    for number in range(1, record.attempt + 1):
        claim, end, beats = (
            _read_json(record.store, f"attempts/{number:04d}.{kind}") for kind in ("json", "end", "alive")
        )
        if number == record.attempt:
            end = {"ended": time.time()}
        total += end["ended"] - claim["started"] if end and claim else BEAT * (beats or 0)
    return float(total)


def driver_host(record: Record) -> str:
    """The machine that this attempt's driver runs on."""
    return str((_read_json(record.store, f"attempts/{record.attempt:04d}.json") or {}).get("host", ""))


def last_attempt(store: Store) -> int:
    """Number of the newest attempt of the run in `store`; 0 before the first."""
    keys = [entry.key for entry in store.list("attempts/") if entry.key.endswith(".json")]
    return max((int(key.removeprefix("attempts/").removesuffix(".json")) for key in keys), default=0)


def _read_json(store: Store, key: str) -> Any:
    try:
        return json.loads(store.read(key))
    except Missing:
        return None


def _boot() -> str:
    """Names this boot of this machine, so that a process id means something."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()}/{file.read().strip()}"
    except OSError:
        return f"{socket.gethostname()}/{os.getppid()}"
