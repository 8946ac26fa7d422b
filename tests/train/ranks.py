"""One of two ranks, started by test_loop: `python ranks.py FOLDER ARTIFACTS RANK`.

Saves twice; the second time rank 1 cannot write its last file.  Prints what was raised.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from calotype import config
from calotype.data.files import FolderStore
from calotype.environment import Worker
from calotype.errors import Unreachable
from calotype.runs import Record
from calotype.train.engine import Engine
from calotype.train.figures import Clock
from calotype.train.saving import Saving
from torch import nn


def main(folder: str, artifacts: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    worker = Worker(rank, 2)
    torch.manual_seed(0)
    optim, engine = config.Optim(), config.Engine(kind="torch")
    engines = {"net": Engine(nn.Sequential(nn.Linear(3, 5)), optim, engine, worker)}
    made = config.TrainDenoiser(name="toy", train=config.Train(keep=2), engine=engine)
    saving = Saving(engines, made, worker, Record("train_denoiser", "f" * 32, "toy", folder, artifacts))
    saving.begin(16, Clock(), {}, {"unsent": [], "left_out": {}})
    assert "checkpoint_seconds" in saving.check(wait=True)
    real = FolderStore.publish

    def publish(self: FolderStore, key: str, data: Any) -> bool:
        if rank == 1 and key.startswith("net.weights"):
            raise Unreachable("the bucket is gone")
        return real(self, key, data)

    FolderStore.publish = publish  # type: ignore[method-assign]
    saving.begin(32, Clock(), {}, {"unsent": [], "left_out": {}})
    try:
        saving.check(wait=True)
    except Unreachable as error:
        print(f"Unreachable: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
