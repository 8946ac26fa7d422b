"""One of two ranks, started by the tests: `python ranks.py PART FOLDER RANK`; each run saves under FOLDER/ENGINE.

error   Saves three times; the third time rank 1 cannot write its last file.  Prints what was raised, and then where it
        resumes if rank 1 reads the second one wrong.
stages  With each of ENGINES: trains, saves, goes on, and goes on again from what was saved.  Prints whether bit by bit.

    python ranks.py killed FOLDER WORLD

forks the ranks itself, and kills one of them in the middle of a save: right before a file gets its name (its bytes lie
there already), or before one of the checkpoint before is deleted; then others go on.  Once for each rank and each such
moment.  Prints from which checkpoint they went on, and whether to the same losses and weights, bit by bit.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from calotype import config
from calotype.data.draws import philox
from calotype.data.files import PARTIAL, FolderStore
from calotype.environment import Worker
from calotype.errors import CalotypeError
from calotype.runs import Record
from calotype.track import Tracker
from calotype.train import checkpoint, loop
from calotype.train.engine import Engine
from calotype.train.figures import Clock
from calotype.train.saving import Saving, resume
from torch import nn

WORLD, BATCH = 2, 12
ENGINES = {"torch0": config.Engine(kind="torch"), **{f"deepspeed{n}": config.Engine(stage=n) for n in range(4)}}
ENGINES |= {f"offload{n}": config.Engine(stage=n, offload="cpu") for n in (1, 2, 3)}
EVERY = 3 * BATCH  # images between two checkpoints of `killed`: three of them, of which the second is cut short
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


# ------------------------------------------------------------------------------------------------ killed


class Notes(Tracker):
    """Keeps the losses, and writes them down at the end."""

    losses: dict[int, float]

    def log(self, metrics: Any, images: int) -> None:
        self.losses[images] = metrics.get("loss", self.losses.get(images))

    def finish(self, status: str = "") -> None:
        Path(self.record.root, "losses.json").write_text(json.dumps(self.losses))


def train(folder: str, worker: Worker, kill_after: int) -> None:
    """The loop, to the third checkpoint; `kill_after`: see `deadly`, -1 for never."""
    settings = config.TrainDenoiser(
        name="toy",
        train=config.Train(images=3 * EVERY, batch=BATCH, log_every=1, validate_every=0, sample_every=0,
                           checkpoint_every=EVERY, keep=1),
        optim=config.Optim(lr=1e-2),
        engine=config.Engine(kind="torch"),
    )  # fmt: skip
    record = Record("train_denoiser", "f" * 32, "toy", folder, f"{folder}/artifacts")
    notes = Notes(record)
    notes.losses = {}
    loop.track.attach = lambda *_: notes  # type: ignore[assignment]
    engine = Engine(net(), settings.optim, settings.engine, worker, 1, config.EMA(halflife=HALFLIVES[0]))

    def batches(position: int) -> Iterator[Any]:
        while True:
            low, high = (position + rank * BATCH // worker.world for rank in (worker.rank, worker.rank + 1))
            yield SimpleNamespace(positions=range(low, high))
            position += BATCH

    def prepare(batch: Any) -> dict[str, torch.Tensor]:
        drawn = [philox(1, position, 1).standard_normal(7, np.float32) for position in batch.positions]
        return {"x": torch.from_numpy(np.stack(drawn))}

    def step(rows: Any) -> dict[str, torch.Tensor]:
        return {"net": (engine(rows["x"]) - rows["x"][:, :5].cumsum(1)).square().mean(1)}

    os.fsync = lambda _: None  # type: ignore[assignment]  # a kill loses no write, and they take most of the time
    if kill_after >= 0:
        deadly(kill_after)
    loop.run(loop.Task({"net": engine}, batches, prepare, step), settings, worker, record)


def deadly(after: int) -> None:
    """Die instead of the next change that saving the second checkpoint makes to the store, after so many of them."""
    left, begun, saved = iter(range(after)), False, f"{2 * EVERY:012d}"
    link, delete = os.link, FolderStore.delete

    def count() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_link(partial: Path, final: Path) -> None:
        nonlocal begun
        begun = final.parent.name == saved
        if begun:
            count()
        link(partial, final)

    def deadly_delete(store: FolderStore, key: str) -> None:
        if begun:
            count()
        delete(store, key)

    os.link = deadly_link  # type: ignore[assignment]
    FolderStore.delete = deadly_delete  # type: ignore[method-assign]


def forked(folder: str, world: int, victim: int = -1, kill_after: int = -1) -> bool:
    """Train in a process per rank; whether the victim was killed, and the others with it, as a cluster would do."""
    meet = f"{folder}/meet{len(list(Path(folder).glob('meet*')))}"
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try:
                if world > 1:
                    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
                train(folder, Worker(rank, world, local_rank=rank), kill_after if rank == victim else -1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    ends = {}
    for rank in sorted(range(world), key=lambda rank: rank != victim):
        ends[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
        if rank == victim and ends[rank] == -signal.SIGKILL:
            for other in range(world):
                if other != victim:
                    os.kill(pids[other], signal.SIGKILL)
                    os.waitpid(pids[other], 0)
            return True
    assert set(ends.values()) == {0}, ends
    return False


def killed(folder: str, world: int) -> None:
    import torch._dynamo  # noqa: F401  (the optimizer does; once is enough)

    Path(folder, "golden").mkdir()
    forked(f"{folder}/golden", world)
    losses = json.loads(Path(folder, "golden", "losses.json").read_text())
    there = FolderStore(Path(folder, "golden", "artifacts"))
    for victim in range(world):
        for kill_after in itertools.count():
            place = f"{folder}/{victim}-{kill_after}"
            Path(place).mkdir()
            if not forked(place, world, victim, kill_after):
                break
            store = FolderStore(Path(place, "artifacts"))
            newest = max(checkpoint.committed(store))
            forked(place, world)
            found = json.loads(Path(place, "losses.json").read_text())
            same = found == {images: loss for images, loss in losses.items() if int(images) > newest}
            same &= tensors(store) == tensors(there) and checkpoint.committed(store) == [3 * EVERY]
            same &= not [*store.path.rglob(f"{PARTIAL}*")]
            print(f"rank {victim} after {kill_after}: from {newest} {'bit by bit' if same else 'differs'}", flush=True)


def tensors(store: FolderStore) -> set[str]:
    """Names of the tensor files of the last checkpoint: they hold their hashes."""
    return {e.key for e in store.list(f"checkpoints/{3 * EVERY:012d}/") if e.key.endswith(".safetensors")}


def main(part: str, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    if part == "killed":
        killed(folder, rank)
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    {"error": error, "stages": stages}[part](folder, Worker(rank, WORLD))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
