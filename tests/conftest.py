"""One real stack (S3, MLflow, Ray) for the whole session, started when the first test asks for it.

CALOTYPE_TEST_HOME=FOLDER keeps it up between sessions, in that folder (`CALOTYPE_HOME=FOLDER calotype down` ends it).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from calotype.cluster import local
from calotype.environment import FOREIGN, SERVICES

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
HEAVY = [
    "deepspeed",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.auto",
    "calotype.cli",
    "calotype.model.conditioner",
    "calotype.tasks.evaluate",
    "calotype.train.loop",
    "sklearn.datasets",
]


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
    """A fresh, empty root in the stack's S3; all are in one bucket, for each bucket takes volumes of SeaweedFS."""
    from calotype.data.store import open_store

    open_store("s3://test").ensure()
    return f"s3://test/{secrets.token_hex(6)}"


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """`typed(WORDS...)`: `calotype WORDS` in this process, beside no stack: (exit status, what it said)."""
    from calotype import cli

    monkeypatch.setenv("CALOTYPE_HOME", str(tmp_path / ".calotype"))

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["calotype", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


@pytest.fixture(scope="session")
def warm() -> Any:
    """A multiprocessing context whose processes have their imports behind them: a quarter of a minute each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def started(warm: Any) -> Callable[..., Any]:
    """`started(SCRIPT, WORDS..., said=FILE)`: the process `python SCRIPT WORDS > FILE 2>&1`, warm."""

    def start(script: Path, *words: str, said: Path, **env: str) -> Any:
        process = warm.Process(target=_as_main, args=(str(script), words, said, {**os.environ, **env}))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def ran(started: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`ran(SCRIPT, WORDS..., fails=...)`: what it said, once it has ended as expected."""
    said = tmp_path_factory.mktemp("said") / "output"

    def run(script: Path, *words: str, fails: bool = False, **env: str) -> str:
        env = {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1", **env}
        process = started(script, *words, said=said, **env)
        process.join(240)
        hung = process.is_alive()
        process.kill()
        output = said.read_text()
        assert not hung, output[-6000:]
        assert (process.exitcode != 0) == fails, output[-6000:]
        return output

    return run


def _as_main(script: str, words: tuple[str, ...], said: Path, env: dict[str, str]) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
