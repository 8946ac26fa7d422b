"""`calotype demo`: every room once, on this machine; each step is a job that anybody could submit."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calotype import compose, console, listing, runs, track
from calotype.cluster import jobs, local
from calotype.data.store import open_store
from calotype.environment import home, load_services
from calotype.errors import CalotypeError

# One after the other; those of one line at the same time, for they need nothing of each other.
STEPS = (("prepare",), ("train_autoencoder",), ("cache_latents",), ("train_denoiser",), ("sample", "evaluate"))


Submit = Callable[[str, Any], str | None]  # (job, checked config) -> submission, or None when it is finished already


def run_demo(root: str, submit: Submit) -> int:
    """Up, prepare, train both models, sample, evaluate, export; what is finished is recognised.

    Args:
        root: where datasets and runs go, s3://BUCKET[/PREFIX].
        submit: what `calotype submit` does with a config.

    Returns:
        The exit code, 0.

    Raises:
        CalotypeError: a step failed; its reason was the last lines of its log.
    """
    rows: list[list[str]] = []
    began = time.monotonic()
    local.up(home())
    load_services()
    rows.append(["up", f"{home()}", _took(began), "S3, MLflow and Ray on this machine"])
    for steps in STEPS:
        start = time.monotonic()
        submitted = {step: _submit(step, root, submit) for step in steps}
        rows += [[step, *_result(step, root, submitted[step], start)] for step in steps]
    folder = home() / "demo"
    start = time.monotonic()
    rows.append(["export", *_export(root, folder, start)])
    rows.append(["all", "", _took(began), ""])
    console.table("demo", ["step", "what it made", "seconds", "figures"], rows)
    record = runs.find(root, "train_denoiser", "run:demo")
    calotype = _program()
    print(
        f"look at     {shlex.quote(str(folder / 'samples.png'))}\n"
        f"curves      {track.page(record.mlflow_run_id)}\n"
        f"figures     {calotype} runs show demo\n"
        f'draw more   {calotype} submit sample run=run:demo \'prompts=["a seven", "the digit 3"]\' out=drawn\n'
        f"the stack stays up: `{calotype} status` shows it, `{calotype} down` stops it"
    )
    return 0


def _program() -> str:
    """How `calotype` is called from here."""
    script = Path(sys.executable).with_name("calotype")
    found = shutil.which("calotype")
    return "calotype" if found and Path(found) == script else shlex.quote(os.path.relpath(script))


def _submit(step: str, root: str, submit: Submit) -> str | None:
    print(f"\n== {step}", flush=True)
    return submit(step, compose.compose(step, [f"experiment=demo/{step}", f"root={root}"]))


def _result(step: str, root: str, submitted: str | None, start: float) -> tuple[str, str, str]:
    if submitted:
        jobs.follow(submitted)
        if message := jobs.wait(submitted):
            raise CalotypeError(message)
    record = runs.find(root, step, "run:demo")
    return record.artifact_root, _took(start), listing.headline(record.result())


def _export(root: str, folder: Path, start: float) -> tuple[str, str, str]:
    from calotype.tasks.export import export_run

    out = folder / f"export-{runs.find(root, 'train_denoiser', 'run:demo').identity[:8]}"
    sampled: Any = runs.find(root, "sample", "run:demo")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.png").write_bytes(open_store(sampled.artifact_root).read("samples/grid.png"))
    if not (out / "model_index.json").exists():
        export_run(root, "run:demo", out)
    return str(out), _took(start), "diffusers.StableDiffusionPipeline.from_pretrained(...)"


def _took(start: float) -> str:
    return f"{time.monotonic() - start:.1f}"
