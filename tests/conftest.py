"""One real stack (S3, MLflow, Ray) for the whole session, started when the first test asks for it.

CALOTYPE_TEST_HOME=FOLDER keeps it up between sessions, in that folder (`CALOTYPE_HOME=FOLDER calotype down` ends it).
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from calotype.cluster import local
from calotype.environment import FOREIGN, SERVICES

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Stack:
    """`home`: its CALOTYPE_HOME.  `env`: the variables that speak to it, already in os.environ."""

    home: Path
    env: dict[str, str]


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    kept = os.environ.get("CALOTYPE_TEST_HOME")
    home = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="calotype test ")) / ".calotype"  # a space, on purpose
    before = dict(os.environ)
    for service, names in SERVICES.items():
        for name in (*names, *FOREIGN.get(service, ())):
            os.environ.pop(name, None)
    os.environ["CALOTYPE_HOME"] = str(home)
    try:
        local.up(home)
        names = ["CALOTYPE_HOME", *(name for names in SERVICES.values() for name in names)]
        yield Stack(home, {name: os.environ[name] for name in names})
    finally:
        os.environ.clear()
        os.environ.update(before)
        if not kept:
            local.down(home)
            shutil.rmtree(home.parent, ignore_errors=True)


@pytest.fixture
def bucket(stack: Stack) -> str:
    """A fresh, empty root in the stack's S3."""
    from calotype.data.store import open_store

    uri = f"s3://test-{secrets.token_hex(6)}"
    open_store(uri).ensure()
    return uri
