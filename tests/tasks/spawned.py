"""One worker of a training run, started by the tests: `python spawned.py PLAN.json RANK`.

Runs every job of the plan in turn in one process group, each body in a thread as Ray Train does, and writes what rank 0
logged.  A job may start from a copied checkpoint, and may kill the process at a given number of images, once one has
arrived that was begun in the second half of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calotype import runs
from calotype.compose import build
from calotype.config import TrainDenoiser
from calotype.environment import Worker
from calotype.tasks import denoiser
from calotype.track import Tracker
from calotype.train import checkpoint, loop


class Notes(Tracker):
    """Keeps every point."""

    def __init__(self, record: runs.Record, kill_at: int) -> None:
        super().__init__(record)
        self.points: list[tuple[int, dict[str, float]]] = []
        self.kill_at = kill_at

    def log(self, metrics: Any, images: int) -> None:
        self.points.append((images, dict(metrics)))
        if self.kill_at and images >= self.kill_at:
            while (checkpoint.latest(self.record.artifacts) or 0) <= self.kill_at // 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def main(plan: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    world = plan["world"]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{plan['store']}", rank=rank, world_size=world)
    for job in plan["jobs"]:
        config = build(TrainDenoiser, job["config"])
        record = runs.Record(**job["record"])
        if job.get("start") and rank == 0:
            shutil.copytree(job["start"], Path(record.artifact_root, "checkpoints", Path(job["start"]).name))
        if world > 1:
            dist.barrier()
        notes = Notes(record, job.get("kill_at", 0))
        loop.track.attach = lambda *_, notes=notes: notes
        worker = Worker(rank=rank, world=world, local_rank=rank)
        figures = in_thread(denoiser.train, config, worker, record)
        if rank == 0:
            Path(job["out"]).write_text(json.dumps({"points": notes.points, "figures": figures}))


def in_thread(body: Callable[..., Any], *arguments: Any) -> Any:
    """As Ray Train does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body, *arguments).result()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
