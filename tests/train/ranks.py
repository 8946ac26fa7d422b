"""One of two ranks, started by the tests: `python ranks.py PART FOLDER RANK`; each run saves under FOLDER/ENGINE.

error   Saves three times; the third time rank 1 cannot write its last file.  Prints what was raised, and then where it
        resumes if rank 1 reads the second one wrong.
stages  With each of ENGINES: trains, saves, goes on, and goes on again from what was saved.  Prints whether bit by bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from calotype import config
from calotype.data.files import FolderStore
from calotype.environment import Worker
from calotype.errors import CalotypeError
from calotype.runs import Record
from calotype.train.engine import Engine
from calotype.train.figures import Clock
from calotype.train.saving import Saving, resume
from torch import nn

WORLD, BATCH = 2, 12
ENGINES = {"torch0": config.Engine(kind="torch"), **{f"deepspeed{n}": config.Engine(stage=n) for n in range(4)}}
ENGINES |= {f"offload{n}": config.Engine(stage=n, offload="cpu") for n in (1, 2, 3)}
HALFLIVES = (100, 5, 30)  # the first is `ema.halflife`
ALSO = {"unsent": [], "left_out": {}, "guard": {}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))


def made(settings: config.Engine, worker: Worker) -> Engine:
    ema = config.EMA(halflife=HALFLIVES[0], halflives=list(HALFLIVES[1:]))
    return Engine(net(), config.Optim(clip=0.5, weight_decay=0.01), settings, worker, 1, ema)


def steps(engine: Engine, first: int, last: int) -> None:
    rank, world = engine.worker.rank, engine.worker.world
    for number in range(first, last):
        x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(number))
        x = x[rank * BATCH // world : (rank + 1) * BATCH // world]
        engine.backward((engine(x).float() - x[:, :5].cumsum(1)).square().mean(1).sum() / BATCH * world)
        engine.step(1e-2, BATCH * (number + 1), BATCH)


def saving(engine: Engine, settings: config.Engine, record: Record) -> Saving:
    job = config.TrainDenoiser(name="toy", train=config.Train(keep=9), engine=settings)
    return Saving({"net": engine}, job, engine.worker, record)


def stages(folder: str, worker: Worker) -> None:
    for name, settings in ENGINES.items():
        record = Record("train_denoiser", "f" * 32, "toy", folder, f"{folder}/{name}")
        engine = made(settings, worker)
        steps(engine, 0, 20)
        saves = saving(engine, settings, record)
        saves.begin(20 * BATCH, Clock(), {}, ALSO)
        steps(engine, 20, 23)  # while it is written
        saves.check(wait=True)
        there = {what: {name: t.clone() for name, t in named.items()} for what, named in engine.states()[0].items()}
        again = made(settings, worker)
        assert resume({"net": again}, str, worker, record)["images"] == 20 * BATCH
        steps(again, 20, 23)
        found = again.states()[0]
        same = all(torch.equal(found[what][key], t) for what, named in there.items() for key, t in named.items())
        print(f"{name} {'bit by bit' if same else 'differs'}", flush=True)


def error(folder: str, worker: Worker) -> None:
    settings = config.Engine(kind="torch")
    saves = saving(
        made(settings, worker), settings, Record("train_denoiser", "f" * 32, "toy", folder, f"{folder}/torch0")
    )
    for images in (16, 24):
        saves.begin(images, Clock(), {}, ALSO)
        assert "checkpoint_seconds" in saves.check(wait=True)
    real, sound = FolderStore.publish, FolderStore.read

    def publish(self: FolderStore, key: str, data: Any) -> bool:
        if worker.rank == 1 and key.startswith("net.weights"):
            raise CalotypeError("the bucket is gone")
        return real(self, key, data)

    FolderStore.publish = publish  # type: ignore[method-assign]
    saves.begin(32, Clock(), {}, ALSO)
    try:
        saves.check(wait=True)
    except CalotypeError as raised:
        print(f"CalotypeError: {raised}", flush=True)

    def read(self: FolderStore, key: str, start: int = 0, length: int | None = None) -> bytes:
        wrong = worker.rank == 1 and self.path.name == f"{24:012d}" and key.startswith("net.ema")
        return b"" if wrong else sound(self, key, start, length)

    FolderStore.read = read  # type: ignore[method-assign]
    print(resume(saves.engines, str, worker, saves.record)["images"], flush=True)


def main(part: str, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    {"error": error, "stages": stages}[part](folder, Worker(rank, WORLD))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
