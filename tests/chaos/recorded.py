"""jobs/train_denoiser.py whose ranks write down the samples of every step, and are hit: started by test_exact.py.

    python recorded.py FOLDER OVERRIDES...

FOLDER/blows.json lists [images, rank, kind]: what happens to a rank, once, in the step that ends at so many images.
kill    SIGKILL, of its process.
stop    SIGSTOP, of its process: it hangs.
cancel  SIGTERM, of the driver: the training is to save and to end.  The steps are slow from then on.
orphan  SIGKILL, of the driver.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import TrainDenoiser
from calotype.environment import Worker
from calotype.runs import Record
from calotype.tasks import denoiser
from calotype.track import Tracker

SLOW = 0.1  # seconds


def recorded(folder: str, config: TrainDenoiser, worker: Worker, record: Record) -> dict[str, Any]:
    """The body of the job, on one rank.  It travels by value: workers cannot import this file."""
    from calotype.train.guard import Guard

    real, hits = Guard.begin, json.loads(Path(folder, "blows.json").read_text())
    slow = False

    def begin(self: Guard, images: int, keys: Any, losses: Any) -> None:
        nonlocal slow
        (loss,) = losses.values()
        lines.write(json.dumps({"images": images, "keys": list(keys), "loss": float(loss)}) + "\n")
        for at, rank, kind in hits:
            done = Path(folder, f"{kind}-at-{at}")
            if at == images and rank == worker.rank and not done.exists():
                done.touch()
                whom, number = os.getpid(), {"stop": signal.SIGSTOP, "cancel": signal.SIGTERM}.get(kind, signal.SIGKILL)
                if kind in ("cancel", "orphan"):
                    whom, slow = json.loads(record.store.read(f"attempts/{record.attempt:04d}.json"))["pid"], True
                os.kill(whom, number)
        time.sleep(SLOW if slow else 0.0)
        real(self, images, keys, losses)

    with Path(folder, f"steps-{time.time_ns()}-{worker.world}-{worker.rank}").open("w", buffering=1) as lines:
        Guard.begin = begin  # type: ignore[method-assign]  # of this process, which trains once
        return denoiser.train(config, worker, record)


def run(config: TrainDenoiser, record: Record, tracker: Tracker) -> dict[str, Any]:
    return spread.train(functools.partial(recorded, FOLDER), config, record)


if __name__ == "__main__":
    FOLDER = sys.argv.pop(1)
    job_main("train_denoiser", denoiser.resolve, run)
