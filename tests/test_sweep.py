"""What `-m` says at its end, whatever its children do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calotype.compose import compose
from calotype.errors import CalotypeError
from calotype.sweep import Child, Sweep


def swept(folder: Path, *steps: Any) -> None:
    """A sweep over seeds whose children do that."""

    def make() -> Any:
        return compose("prepare", ["name=p", "track=none", f"root={folder}"])

    with Sweep("prepare") as sweep:
        for seed, step in enumerate(steps):
            sweep.run(make, ["track=none", f"seed={seed}"], step)


def fine(child: Child, config: Any) -> None:
    child.config, child.state = config, "finished"


def buggy(child: Child, config: Any) -> None:
    raise RuntimeError("a bug")


def interrupted(child: Child, config: Any) -> None:
    raise KeyboardInterrupt


def test_a_child_with_a_bug_is_one_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CalotypeError, match=r"^track=none seed=1: RuntimeError: a bug$"):
        swept(tmp_path, fine, buggy, fine)
    said = capsys.readouterr()
    assert "in buggy" in said.err
    rows = [[cell.strip() for cell in line.split("│")] for line in said.out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["seed=0", "seed=1", "seed=2"]  # not what all have in common
    assert [row[2] for row in rows] == ["finished", "failed", "finished"]


def test_an_interrupted_sweep_says_how_far_it_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, fine, interrupted, fine)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["seed=0", "seed=1"]
