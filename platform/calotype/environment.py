"""The one place that reads the environment: where services are, and which worker this process is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def home() -> Path:
    """`.calotype/`: the embedded stack's state and what Calotype writes locally (CALOTYPE_HOME, else ./.calotype)."""
    return Path(os.environ.get("CALOTYPE_HOME", ".calotype")).absolute()


@dataclass(frozen=True)
class Worker:
    """One process of a spread task.

    `stop()` turns true when the job is cancelled or its machine is about to go: save and return.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: str = "cpu"
    threads: int = 1
    stop: Callable[[], bool] = lambda: False


def load_services(defaults: Path | None = None) -> None:
    """Put the embedded stack's addresses and credentials where the environment names none.

    An outside S3, MLflow or Ray is configured by the variables their own clients read (`AWS_*`,
    `MLFLOW_TRACKING_URI`, `RAY_ADDRESS`): what is set wins.
    """
    path = defaults or home() / "credentials"
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        name, _, value = line.partition("=")
        if name and name not in os.environ:
            os.environ[name] = value
