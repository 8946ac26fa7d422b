"""Where services are, by the environment that their clients read, and which worker this process is.

Rooms that speak to a service (cluster/jobs.py, cluster/spread.py, track.py, data/s3.py) read its variables where they
connect; here those of the embedded stack are put into the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


def home() -> Path:
    """`.calotype/`: the embedded stack's state and what Calotype writes locally (CALOTYPE_HOME, else ./.calotype)."""
    return Path(os.environ.get("CALOTYPE_HOME", ".calotype")).absolute()


# Phases of a training that `Worker.beat` tells and the watch over its ranks knows (cluster/watch.py).
START = "starts"  # before the first step: imports, loading, compilation
STEP = "steps"


@dataclass(frozen=True)
class Worker:
    """One process of a spread task.

    `stop()` turns true when the job is cancelled or its machine is about to go: save and return.  `group` is
    the same for the workers between which units are dealt, each to one living worker at a time: those of one job.
    `beat(phase, images)` is a sign of life of a training, at every step, which costs nothing: without any its ranks
    count as hung.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: str = "cpu"
    threads: int = 1
    stop: Callable[[], bool] = lambda: False
    group: str = ""
    beat: Callable[[str, int], None] = lambda phase, images: None


@dataclass(frozen=True)
class Held:
    """What a worker gives back in place of a unit that another job has in hand: the unit is dealt again, later.

    Attributes:
        sign: of the one who has it: it changes as long as that one lives.
        patience: seconds without a change after which that one is dead: the unit is then dealt with the sign, as
            `work(unit, sign)`.
    """

    sign: bytes
    patience: float


# Service -> every variable that its clients read; the first names where it is.
SERVICES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "mlflow": ("MLFLOW_TRACKING_URI",),
    # Ray's own clients replace 127.0.0.1 by the machine's outside address unless the last one is 0, on Linux too.
    "ray": ("RAY_ADDRESS", "CALOTYPE_RAY_GCS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"),
}
# Set for some other S3 or Ray, they would be mixed with the variables of ours.
FOREIGN = {"s3": ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE"), "ray": ("RAY_API_SERVER_ADDRESS",)}


def outside(service: str, known: Mapping[str, str]) -> str:
    """Where the environment says a service is, when it is another than the embedded one (`known`); else ""."""
    names = (SERVICES[service][0], "AWS_ENDPOINT_URL") if service == "s3" else SERVICES[service][:1]
    address = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return "" if address == known.get(SERVICES[service][0]) else address


def load_services(defaults: Path | None = None) -> None:
    """Put the embedded stack's addresses and credentials where the environment names none.

    An outside S3, MLflow or Ray is named by the variable its own clients read (`AWS_ENDPOINT_URL_S3`,
    `MLFLOW_TRACKING_URI`, `RAY_ADDRESS`), and then none of the embedded one's variables are used: AWS keys without an
    endpoint do not name a place (for AWS itself: AWS_ENDPOINT_URL_S3=https://s3.REGION.amazonaws.com).
    """
    known = read_credentials(defaults or home() / "credentials")
    for service, names in SERVICES.items():
        if names[0] in known and not outside(service, known):
            for name in FOREIGN.get(service, ()):
                os.environ.pop(name, None)
            os.environ.update({name: known[name] for name in names})


def read_credentials(path: Path) -> dict[str, str]:
    """NAME=VALUE lines; empty if there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: text for name, _, text in (line.partition("=") for line in lines)}
