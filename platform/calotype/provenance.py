"""What ran: the commit, and the config as a person reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

VALUE = 500  # characters of one setting shown in a list; the whole value is in config.yaml
DATASET = ("data.name", "data.digest")


def commit() -> str:
    """The git commit that runs, with "-dirty" if files differ from it; empty without a checkout.

    A submitted job has no checkout: whoever submits puts this into CALOTYPE_COMMIT.
    """
    if "CALOTYPE_COMMIT" in os.environ:
        return os.environ["CALOTYPE_COMMIT"]
    where = Path(__file__).resolve().parents[2]
    if not (where / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(where), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def flat(data: Any, prefix: str = "") -> dict[str, str]:
    """Nested config -> {"train.batch": "64"}; a value too long for a list is cut, and says so."""
    if isinstance(data, dict) and data:
        dot = f"{prefix}." if prefix else ""
        return {name: value for key, item in data.items() for name, value in flat(item, f"{dot}{key}").items()}
    value = str(data)
    if len(value) > VALUE:
        value = f"{value[:VALUE]}... ({len(value)} characters, see config.yaml)"
    return {prefix: value}


def parameters(data: dict[str, Any]) -> dict[str, str]:
    """A job's settings as a run shows them; how its dataset was once made stands in the run of that `prepare`."""
    made = flat(data)
    if made.get("data.digest"):
        made = {name: value for name, value in made.items() if name in DATASET or not name.startswith("data.")}
    return made


def as_yaml(data: Any) -> bytes:
    """A config's plain data as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(data)).encode()
