"""The embedded stack: a real S3 (SeaweedFS), an MLflow server and a Ray head, on this machine, for this user.

    up(home)      start what is missing or broken, leave what works; write HOME/credentials
    status(home)  one row per service, probed
    down(home)    stop everything, children too

A service that the environment already names (`AWS_ENDPOINT_URL_S3`, `MLFLOW_TRACKING_URI`, `RAY_ADDRESS`) is outside:
it is used and shown, never started.  Everything listens on 127.0.0.1.  S3 wants the generated keys, Ray the generated
token, and SeaweedFS's inner ports are closed to others too (`services.py`).  MLflow's server has no login: other users
of this machine can read and change its figures, not the artifacts in S3.

Every process we start carries `CALOTYPE_STACK=HOME:SERVICE` in its environment and hands it to its children: that mark,
not a process number that may have been reused, says what is ours to stop.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from calotype.cluster.services import PORTS, command, ensure_bucket, interpreter, probe, values
from calotype.environment import FOREIGN, SERVICES, load_services, outside, read_credentials
from calotype.environment import home as default_home
from calotype.errors import CalotypeError

MARK = "CALOTYPE_STACK"
# Above Ray's worker range (10002-19999), below what Linux gives to outgoing connections (32768-60999).
PORT_RANGE = (20_000, 32_000)
START_SECONDS = 180
TERM_SECONDS = 4  # from SIGTERM to SIGKILL
PATIENCE = 30.0  # seconds a living service may take to answer on a busy machine before `up` calls it broken


class Row(NamedTuple):
    """One line of `calotype status`.

    `health`: up | outside (up, and named by the environment) | down | what is wrong.  `pid`: empty if not ours.
    """

    service: str
    url: str
    health: str
    pid: str
    detail: str


class Again(Exception):
    """A service died of what may be gone at the next try: another program was faster to its port, the machine slow."""


# --------------------------------------------------------------------------------------------------- the three verbs


def up(home: Path | None = None) -> list[Row]:
    """Start what is missing or broken; idempotent, safe to call twice at once; leaves os.environ pointing at it all.

    Raises:
        CalotypeError: a program is missing or a service does not come up; says why and where its log is.
    """
    home = (home or default_home()).absolute()
    with _locked(home):
        for attempt in range(3):
            try:
                _start(home)
                break
            except Again as failure:
                if attempt == 2:
                    raise CalotypeError(str(failure)) from None
        known = read_credentials(home / "credentials")
        if not (outside("s3", known) and outside("mlflow", known)):
            ensure_bucket()  # MLflow's artifacts go there
        return status(home)


def down(home: Path | None = None) -> list[str]:
    """Stop every process of the stack, jobs included; returns the names of the services that ran."""
    home = (home or default_home()).absolute()
    if not home.exists():
        return []
    with _locked(home):
        state = _load(home)
        ran = _stop(home, *SERVICES)
        shutil.rmtree(state.pop("scratch", "") or home / "nothing", ignore_errors=True)
        _save(home, state)
        return ran


def stopped() -> bool:
    """Whether the embedded stack that the environment names was stopped by `down`."""
    state = _load(home := default_home())
    ours = read_credentials(home / "credentials").get("RAY_ADDRESS", "") == os.environ.get("RAY_ADDRESS")
    return ours and "scratch" not in state


def status(home: Path | None = None) -> list[Row]:
    """What there is, really asked: a signed S3 request, MLflow's health page, Ray's API with its token."""
    home = (home or default_home()).absolute()
    load_services(home / "credentials")
    state, known = _load(home), read_credentials(home / "credentials")
    rows = []
    for service, (named, *_) in SERVICES.items():
        log = home / "logs" / f"{service}.log"
        if elsewhere := outside(service, known):
            health, why = probe(service, elsewhere, os.environ)
            rows.append(Row(service, elsewhere, "outside" if health == "ok" else health, "", why))
        elif not _alive(home, service, pid := state["services"][service]["pid"]):
            hint = f"; its last log: {log}" if log.exists() else ""
            rows.append(Row(service, known.get(named, ""), "down", "", f"start it with: calotype up{hint}"))
        else:
            health, why = probe(service, known.get(named, ""), known)
            rows.append(
                Row(service, known.get(named, ""), "up" if health == "ok" else health, str(pid), why or str(log))
            )
    return rows


def check_up(home: Path, root: str) -> None:
    """Say at once, and not after a minute of asking again, that the embedded S3 is down.

    Raises:
        CalotypeError: it is, and `root` lies there.
    """
    known = read_credentials(home / "credentials")
    address = known.get(SERVICES["s3"][0])
    if root.startswith("s3://") and address and not outside("s3", known) and _free(int(address.rpartition(":")[2])):
        raise CalotypeError(f"the embedded S3, where {root} lies, is down: run `calotype up`")


# ------------------------------------------------------------------------------------------------------- start, stop


def _start(home: Path) -> None:
    state, known = _load(home), read_credentials(home / "credentials")
    ours = [service for service in SERVICES if not outside(service, known)]
    running = {service: _alive(home, service, state["services"][service]["pid"]) for service in ours}
    _plan(home, state, ours, running)
    speaks = {name: text for service in ours for name, text in values(service, state).items()}
    for service in ours:
        for name in FOREIGN.get(service, ()):
            os.environ.pop(name, None)
    os.environ.update(speaks)
    _write_private(home / "credentials", "".join(f"{name}={text}\n" for name, text in speaks.items()))
    _save(home, state)

    started = []
    for service in ours:
        words, folder, extra = command(service, home, state)
        made_of = _made_of(service, words, extra)
        entry = state["services"][service]
        if running[service] and entry["made_of"] == made_of and _works(home, service, entry):
            continue
        _stop(home, service)
        # Jobs are started as `python ...`: the one that has Calotype's libraries.
        path = f"{Path(interpreter(state)).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, **extra, "PATH": path, MARK: f"{home}:{service}"}
        entry.update(pid=_spawn(home, service, words, folder, environment), made_of=made_of)
        _save(home, state)
        started.append(service)
    if started:
        print(f"starting {', '.join(started)}", flush=True)
    for service in started:
        _wait(home, service, state)


def _plan(home: Path, state: dict[str, Any], ours: list[str], running: dict[str, bool]) -> None:
    """Secrets, a short folder for sockets, and free ports: the remembered ones while nobody else has taken them."""
    scratch = Path(state.get("scratch") or home / "nothing")
    if not (scratch.is_dir() and scratch.stat().st_uid == os.getuid()):
        # Paths of sockets must be under 108 bytes, which HOME may not leave room for.
        state["scratch"] = tempfile.mkdtemp(prefix="calotype-", dir="/tmp")
    for name in ("access", "key", "token", "jwt"):
        state["secrets"].setdefault(name, secrets.token_hex(10 if name == "access" else 32))
    for service in ours:
        if not running[service]:
            _stop(home, service)  # what its leader left behind still holds its ports
        ports = state["services"][service]["ports"]
        if set(ports) != set(PORTS[service]) or not (running[service] or all(map(_free, ports.values()))):
            used = {port for entry in state["services"].values() for port in entry["ports"].values()}
            state["services"][service]["ports"] = _find_ports(PORTS[service], used)


def _works(home: Path, service: str, entry: dict[str, Any]) -> bool:
    """Alive, listening on every port and answering; a busy one is given time, for stopping Ray stops its jobs."""
    deadline = time.monotonic() + PATIENCE
    while _alive(home, service, entry["pid"]) and not any(map(_free, entry["ports"].values())):
        if probe(service, os.environ[SERVICES[service][0]], os.environ)[0] == "ok":
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return False


def _wait(home: Path, service: str, state: dict[str, Any]) -> None:
    """Until it answers; a service that dies says so with the end of its log."""
    entry, log = state["services"][service], home / "logs" / f"{service}.log"
    deadline = time.monotonic() + START_SECONDS
    why = ""
    while time.monotonic() < deadline:
        alive = _alive(home, service, entry["pid"])
        if not alive:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            what = f"{service} died on start; the end of its log {log}:\n{tail}"
            _stop(home, service)
            taken = [port for port in entry["ports"].values() if not _free(port)]
            if taken:
                entry["ports"] = {}
                _save(home, state)
                raise Again(f"port {taken[0]} is taken by another program; {what}")
            raise Again(what) if "timed out during startup" in tail else CalotypeError(what)
        health, why = probe(service, os.environ[SERVICES[service][0]], os.environ, starting=True)
        if health == "ok" and not any(map(_free, entry["ports"].values())):
            return
        time.sleep(0.2)
    raise CalotypeError(f"{service} did not answer within {START_SECONDS} s ({why}): see its log {log}")


def _spawn(home: Path, service: str, command: list[str], folder: Path, environment: dict[str, str]) -> int:
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = logs / f"{service}.log"
    if log.exists():
        log.replace(log.with_suffix(".log.old"))
    with log.open("wb") as out:
        process = subprocess.Popen(  # a session of its own: it outlives the terminal
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    with contextlib.suppress(psutil.Error):  # its environment comes late: unmarked, it would pass for dead
        while process.poll() is None and not psutil.Process(process.pid).environ():
            time.sleep(0.01)
    process.returncode = 0  # never waited for: keeps Popen from warning about a child that is meant to stay
    return process.pid


def _stop(home: Path, *services: str) -> list[str]:
    """TERM, then KILL, every process that carries our mark for these services; those that had any.

    SeaweedFS would wait 15 s for a connection to itself to end; what it acknowledged is written either way.
    """
    found = {service: _members(home, service) for service in services}
    every = [process for processes in found.values() for process in processes]
    for process in every:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(every, timeout=TERM_SECONDS)
    for process in {*alive, *(process for service in services for process in _members(home, service))}:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return [service for service, processes in found.items() if processes]


def _members(home: Path, service: str) -> list[psutil.Process]:
    keep = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in keep or not _marked(process, f"{home}:{service}"):
            continue
        found[process.pid] = process
        with contextlib.suppress(psutil.Error):
            found.update((child.pid, child) for child in process.children(recursive=True) if child.pid not in keep)
    return list(found.values())


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _alive(home: Path, service: str, pid: int) -> bool:
    try:
        return bool(pid) and _marked(psutil.Process(pid), f"{home}:{service}")
    except psutil.Error:
        return False


# ------------------------------------------------------------------------------------------------------------- state


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)  # also one that Hydra made: what S3 and MLflow keep there is nobody else's
    with (home / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _load(home: Path) -> dict[str, Any]:
    """scratch folder, secrets, and per service: pid of its leader, ports, digest of what it was started with."""
    path = home / "state.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    state.setdefault("secrets", {})
    services = state.setdefault("services", {})
    for service in SERVICES:
        services.setdefault(service, {"pid": 0, "ports": {}, "made_of": ""})
    return state


def _save(home: Path, state: dict[str, Any]) -> None:
    _write_private(home / "state.json", json.dumps(state, indent=1))


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(text)
    temporary.replace(path)


def _made_of(service: str, command: list[str], extra: dict[str, str]) -> str:
    """What a service was started with; if that changes (S3 moved to another port), it is started anew.

    Not the interpreter: `python` and `python3` are the same one.
    """
    speaks_to = list(SERVICES)[: list(SERVICES).index(service) + 1]  # MLflow to S3, Ray to both
    environment = {name: os.environ.get(name) for other in speaks_to for name in SERVICES[other]}
    return hashlib.sha256(json.dumps([command[1:], environment, extra], sort_keys=True).encode()).hexdigest()


def _find_ports(names: tuple[str, ...], used: set[int]) -> dict[str, int]:
    candidates = random.SystemRandom().sample(range(*PORT_RANGE), 2000)
    free = [port for port in candidates if port not in used and _free(port)]
    if len(free) < len(names):
        raise CalotypeError(f"no free ports between {PORT_RANGE[0]} and {PORT_RANGE[1]} on 127.0.0.1")
    return dict(zip(names, free, strict=False))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
