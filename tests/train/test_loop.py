"""The loop on a task of ten lines: cadence, resume, stop, evidence."""

from __future__ import annotations

import errno
import json
import math
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calotype import config
from calotype.data.draws import philox
from calotype.data.files import FolderStore, Missing
from calotype.environment import Worker
from calotype.errors import CalotypeError, DataError, Unreachable
from calotype.runs import Record
from calotype.tasks import promote
from calotype.track import Tracker
from calotype.train import batching, checkpoint, feed, loop, saving
from calotype.train.engine import Engine
from calotype.train.saving import check_ours
from torch import nn

BATCH = 8


class Notes(Tracker):
    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.points: list[tuple[int, dict[str, float]]] = []
        self.saved: list[int] = []
        self.finished = 0

    def log(self, metrics: Any, images: int) -> None:
        self.points.append((images, dict(metrics)))

    def model(self, name: str, uri: str, kind: str, images: int) -> None:
        self.saved.append(images)

    def pending(self) -> list[Any]:
        return [("loss", 1.0, 8, 0)]

    def finish(self, status: str = "") -> None:
        self.finished += 1


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("train_denoiser", "f" * 32, "toy", str(tmp_path), str(tmp_path / "artifacts"))


@pytest.fixture
def notes(record: Record, monkeypatch: pytest.MonkeyPatch) -> Notes:
    made = Notes(record)
    made.unsent = None
    monkeypatch.setattr(loop.track, "attach", lambda *args: setattr(made, "unsent", args[2]) or made)
    return made


def settings(images: int = 10 * BATCH, lr: float = 1e-2, micro: int = 0, **train: Any) -> config.TrainDenoiser:
    every = {"log_every": 1, "validate_every": 0, "sample_every": 0, "checkpoint_every": 10**9, "keep": 9} | train
    return config.TrainDenoiser(
        name="toy",
        data=config.Data(name="toy"),
        train=config.Train(images=images, batch=BATCH, **every),
        optim=config.Optim(lr=lr, clip=0.0),
        engine=config.Engine(kind="torch", micro_batch=micro),
        track=config.Track(kind="none"),
        seed=1,
    )


def task(
    made: Any, poison: Any = (), seen: list[int] | None = None, width: int = 16, by: float = math.nan, **more: Any
) -> loop.Task:
    """y = 3 x, with dropout; `poison`: the positions whose input is multiplied `by` that."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, 4))
    micro = batching.micro_batch(made, 1)
    engine = Engine(
        module, made.optim, made.engine, Worker(), batching.accumulation(micro, BATCH, 1), config.EMA(halflife=50)
    )

    def batches(position: int) -> Iterator[Any]:
        while True:
            positions = np.arange(position, position + BATCH)
            yield SimpleNamespace(positions=positions, keys=[f"k{p}" for p in positions.tolist()])
            position += BATCH

    def prepare(batch: Any) -> dict[str, torch.Tensor]:
        if seen is not None:
            seen.extend(batch.positions.tolist())
        x = np.stack([philox(1, p, 1).standard_normal(4, np.float32) for p in batch.positions.tolist()])
        x[np.isin(batch.positions, poison)] *= by
        return {"x": torch.from_numpy(x)}

    def step(rows: Any) -> dict[str, torch.Tensor]:
        error = (engine(rows["x"]) - 3 * rows["x"]).square().mean(1)
        return {"net": error, "size": rows["x"].abs().mean(1)}

    return loop.Task({"net": engine}, batches, prepare, step, **more)


def losses(notes: Notes) -> dict[int, float]:
    return {images: figures["loss"] for images, figures in notes.points if "loss" in figures}


def test_it_learns_and_reports(record: Record, notes: Notes) -> None:
    made = settings(images=100 * BATCH, log_every=10 * BATCH)
    figures = loop.run(task(made), made, Worker(), record)
    assert list(losses(notes)) == [10 * BATCH * n for n in range(1, 11)]
    assert figures["loss"] < 0.5 * next(iter(losses(notes).values()))
    assert figures["images"] == 100 * BATCH
    assert not figures["stopped"]
    assert {"gradient_norm", "lr", "images_per_second", "data_wait_percent", "goodput", "size"} <= set(figures)
    assert 0 < figures["goodput"] <= 1
    assert 0 <= figures["data_wait_percent"] <= 100
    assert notes.finished == 1


def test_the_first_step_of_an_attempt_is_no_measure(record: Record, notes: Notes) -> None:
    for images in (5 * BATCH, 10 * BATCH):
        made = settings(images=images)
        quick = task(made)
        times = iter([1.0] + [0.0] * 9)  # it compiles

        def step(rows: Any, quick: loop.Task = quick, times: Iterator[float] = times) -> Any:
            time.sleep(next(times))
            return quick.step(rows)

        figures = loop.run(replace(quick, step=step), made, Worker(), record)
    with checkpoint.opened(record.artifacts, 10 * BATCH, ()) as saved:
        seconds = saved.state["trained"] + saved.state["waited"]
        assert saved.state["timed"] == 8 * BATCH
    assert seconds < 1
    assert figures["images_per_second"] == pytest.approx(8 * BATCH / seconds)
    assert [images for images, at in notes.points if "loss" in at and "images_per_second" not in at] == [8, 48]


def test_goodput_is_no_more_than_all_time(record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the driver's clock is an hour ahead of the worker's."""
    ahead = time.time() + 3600
    monkeypatch.setattr(loop.runs, "first_attempt_started", lambda record: ahead)
    made = settings(images=4 * BATCH, log_every=BATCH)
    loop.run(task(made), made, Worker(), record)
    assert all(0 <= figures["goodput"] <= 1 for _, figures in notes.points if "goodput" in figures)


def test_logged_losses_are_means_over_the_interval(record: Record, notes: Notes) -> None:
    made = settings()
    loop.run(task(made), made, Worker(), record)
    every = losses(notes)
    notes.points.clear()
    coarse = settings(log_every=5 * BATCH)
    other = Record(record.job, record.identity, "x", record.root, record.artifact_root + "2")
    loop.run(task(coarse), coarse, Worker(), other)
    assert losses(notes)[5 * BATCH] == pytest.approx(np.mean([every[n * BATCH] for n in range(1, 6)]), rel=1e-6)


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_do_not_change_anything(record: Record, notes: Notes, micro: int) -> None:
    made = settings()
    first = task(made)
    first.engines["net"].module[1].p = 0.0
    loop.run(first, made, Worker(), record)
    whole = losses(notes)
    notes.points.clear()
    made = settings(micro=micro)
    again = task(made)
    again.engines["net"].module[1].p = 0.0
    loop.run(again, made, Worker(), Record(record.job, record.identity, "x", record.root, record.artifact_root + "2"))
    assert losses(notes) == pytest.approx(whole, rel=1e-5)


def test_resume_goes_on_exactly(record: Record, notes: Notes) -> None:
    made = settings(images=20 * BATCH)
    loop.run(task(made), made, Worker(), Record(record.job, "0" * 32, "x", record.root, record.artifact_root + "2"))
    whole = losses(notes)
    notes.points.clear()
    half = settings(images=10 * BATCH)
    loop.run(task(half, spent=lambda: {"seconds": 7.0}), half, Worker(), record)
    seen: list[int] = []
    states: list[Any] = []
    loop.run(task(made, seen=seen, resumed=states.append), made, Worker(), record)
    assert [(state["spent"], state["world"]) for state in states] == [({"seconds": 7.0}, 1)]
    assert losses(notes) == whole  # bit by bit, dropout included
    assert seen[0] == 10 * BATCH  # the next batch, exactly
    assert [tuple(point) for point in notes.unsent] == [("loss", 1.0, 8, 0)]


def test_a_start_that_is_kept_is_one_to_resume_from(record: Record, notes: Notes) -> None:
    made = settings(images=5 * BATCH)
    loop.run(task(made), made, Worker(), replace(record, artifact_root=f"{record.artifact_root}2"))
    whole = losses(notes)
    notes.points.clear()
    kept = replace(task(made), keep_start=True)
    assert loop.run(kept, made, Worker(stop=lambda: True), record)["stopped"]
    assert checkpoint.committed(record.artifacts) == [0]
    other = replace(task(made), keep_start=True)
    with torch.no_grad():
        other.engines["net"].module[0].weight.zero_()  # what it began from is gone
    loop.run(other, made, Worker(), record)
    assert losses(notes) == whole
    assert checkpoint.committed(record.artifacts) == [0, 5 * BATCH]


def test_cadence_is_counted_in_images(record: Record, notes: Notes) -> None:
    seen: dict[str, list[int]] = {"validate": [], "draw": []}
    made = settings(images=50, log_every=20, validate_every=24, sample_every=1000, checkpoint_every=16)
    counted = task(
        made,
        validate=lambda: seen["validate"].append(0) or {"validation_loss": 1.0},
        draw=lambda: seen["draw"].append(0),
        saved=lambda tracker, images: tracker.model("net", "", "", images),
    )
    figures = loop.run(counted, made, Worker(), record)
    assert figures["images"] == 56  # the first multiple of the batch
    assert checkpoint.committed(record.artifacts) == [16, 32, 48, 56] == notes.saved
    assert [images for images, at in notes.points if "validation_loss" in at] == [24, 48, 56]
    assert len(seen["draw"]) == 1


def test_only_weights_that_were_validated_have_a_loss_to_promote(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(images=40, validate_every=16, checkpoint_every=8)
    monkeypatch.setattr(promote, "trained", lambda record: made)
    scores, calls = iter([0.5, math.nan, 0.9]), iter(range(10**6))

    def validate() -> dict[str, float]:
        return {"validation_loss": next(scores)}

    loop.run(task(made, validate=validate), made, Worker(stop=lambda: next(calls) > 2), record)  # saves at 24 and ends
    loop.run(task(made, validate=validate), made, Worker(), record)
    assert checkpoint.committed(record.artifacts) == [8, 16, 24, 32, 40]
    assert promote.best(record) == (16, 0, 0.5)  # not 24 with the loss of 16, nor 32 whose loss is no number
    checkpoint.discard(record.artifacts, 16)
    assert promote.best(record) == (40, 0, 0.9)
    checkpoint.discard(record.artifacts, 40)
    assert promote.best(record) == (32, 0, None)


def test_stop_saves_and_returns(record: Record, notes: Notes) -> None:
    made = settings(images=10**6)
    calls = iter(range(10**6))
    figures = loop.run(task(made), made, Worker(stop=lambda: next(calls) > 5), record)
    assert figures["stopped"]
    assert checkpoint.latest(record.artifacts) == figures["images"] < 20 * BATCH


@pytest.mark.parametrize("log_every", [1, 10**9])
def test_nan_stops_with_evidence_and_saves_nothing(record: Record, notes: Notes, log_every: int) -> None:
    made = settings(images=20 * BATCH, checkpoint_every=5 * BATCH, log_every=log_every)
    told: list[tuple[str, int]] = []
    worker = Worker(beat=lambda phase, images: told.append((phase, images)))
    with pytest.raises(CalotypeError, match=r"loss.*not finite.*nothing was saved since 40 images.*optim\.lr"):
        loop.run(task(made, poison=6 * BATCH + 3), made, worker, record)
    assert told[-1] == ("saves", 7 * BATCH if log_every == 1 else 10 * BATCH)  # the save on its way is waited for
    assert checkpoint.committed(record.artifacts) == [5 * BATCH]
    assert notes.finished == 1
    kept = json.loads(record.artifacts.read("evidence/000000000056.json"))  # of the step, however rare the log is
    assert kept["positions"] == [6 * BATCH, 7 * BATCH]
    assert kept["keys"] == {"0": [f"k{p}" for p in range(6 * BATCH, 7 * BATCH)]}
    assert kept["ending"] == "final"
    assert kept["values"]["gradient_norm"] == "nan"


def test_a_spike_is_skipped_with_evidence_and_a_resume_judges_alike(record: Record, notes: Notes) -> None:
    made = settings(images=60 * BATCH, spike=5.0)
    poison = [20 * BATCH, 40 * BATCH + 3, 50 * BATCH]  # the first before there are enough steps to tell
    other = Record(record.job, "0" * 32, "x", record.root, record.artifact_root + "2")
    figures = loop.run(task(made, poison, by=30.0), made, Worker(), other)
    whole = losses(notes)
    assert figures["skipped_steps"] == 2
    assert whole.keys() == {step * BATCH for step in range(1, 61)} - {41 * BATCH, 51 * BATCH}
    kept = json.loads(other.artifacts.read("evidence/000000000328.json"))
    assert kept["ending"] == "skipped"
    assert "times its median over the last 40 steps" in kept["why"]
    assert kept["keys"]["0"][3] == "k323"
    assert kept["layer_gradient_norms"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [step["skipped"] for step in kept["last"]] == [False] * 40 + [True]
    assert not other.artifacts.exists("evidence/000000000168.json")
    notes.points.clear()
    half = settings(images=45 * BATCH, spike=5.0)
    loop.run(task(half, poison, by=30.0), half, Worker(), record)
    assert loop.run(task(made, poison, by=30.0), made, Worker(), record)["skipped_steps"] == 2
    assert losses(notes) == whole  # bit by bit


def test_a_level_that_stays_becomes_the_usual_one() -> None:
    made = settings(images=110 * BATCH, spike=5.0, log_every=10 * BATCH)
    figures = loop.run(task(made, range(40 * BATCH, 110 * BATCH), by=30.0), made, Worker())
    assert 30 < figures["skipped_steps"] < 60
    assert figures["loss"] > 100, "the last steps were taken"


def test_steps_that_are_not_finite_are_skipped_to_a_limit(record: Record, notes: Notes) -> None:
    made = settings(images=20 * BATCH, bad_steps=2, log_every=4 * BATCH)
    poison = [6 * BATCH, 7 * BATCH, 9 * BATCH]
    other = Record(record.job, "0" * 32, "x", record.root, record.artifact_root + "2")
    figures = loop.run(task(made, poison), made, Worker(), other)
    assert figures["skipped_steps"] == 3
    assert all(math.isfinite(loss) for loss in losses(notes).values())
    assert json.loads(other.artifacts.read("evidence/000000000056.json"))["values"]["loss"] == "nan"
    with pytest.raises(CalotypeError, match=r"3 steps in a row.*at 72 images.*bad_steps=2.*evidence/0{10}72\.json"):
        loop.run(task(made, [*poison, 8 * BATCH]), made, Worker(), record)
    assert checkpoint.committed(record.artifacts) == []


def test_signs_of_life_at_every_step_and_what_takes_longer(record: Record, notes: Notes) -> None:
    made = settings(images=4 * BATCH, validate_every=2 * BATCH, sample_every=4 * BATCH, checkpoint_every=2 * BATCH)
    told: list[tuple[str, int]] = []
    loop.run(task(made), made, Worker(beat=lambda phase, images: told.append((phase, images))), record)
    assert told == [
        ("starts", 0), ("steps", 8), ("validates", 16), ("saves", 16), ("steps", 16), ("steps", 24),
        ("validates", 32), ("draws", 32), ("saves", 32), ("ends", 32),
    ]  # fmt: skip


def test_a_new_shape_of_batch_may_compile_longer_than_a_step_takes(record: Record, notes: Notes) -> None:
    """As encoding.bucket_step makes some; the step of this task is not compiled really."""
    made = settings(images=5 * BATCH)
    plain = task(made)
    told: list[tuple[str, int]] = []

    def prepare(batch: Any) -> dict[str, torch.Tensor]:
        wide = batch.positions[0] >= 2 * BATCH
        return {**plain.prepare(batch), "size": torch.zeros(BATCH, 2 if wide else 1)}

    worker = Worker(beat=lambda phase, images: told.append((phase, images)))
    for kind, wanted in (("none", []), ("default", [("compiles", 0), ("compiles", 16)])):
        told.clear()
        compiled = replace(made, engine=config.Engine(kind="torch", compile=kind))
        loop.run(replace(plain, prepare=prepare), compiled, worker)
        assert [one for one in told if one[0] == "compiles"] == wanted
    assert told[:2] == [("starts", 0), ("compiles", 0)]
    assert told[3:6] == [("steps", 16), ("compiles", 16), ("steps", 24)]


def test_a_damaged_newest_checkpoint_costs_one_interval(
    record: Record, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    made = settings(checkpoint_every=5 * BATCH)
    loop.run(task(made), made, Worker(), record)
    key = next(e.key for e in record.artifacts.list("checkpoints/000000000080/") if "exp_avg_sq" in e.key)
    record.artifacts.write(key, b"no")
    seen: list[int] = []
    loop.run(task(made, seen=seen), made, Worker(), record)
    assert seen[0] == 5 * BATCH
    assert key.rsplit("/", 1)[1] in caplog.text
    assert checkpoint.committed(record.artifacts) == [5 * BATCH, 10 * BATCH]
    with checkpoint.opened(record.artifacts, 10 * BATCH):
        pass  # it was made anew
    for entry in list(record.artifacts.list("checkpoints/")):
        record.artifacts.write(entry.key, b"no")
    with pytest.raises(DataError):
        loop.run(task(made), made, Worker(), record)


def test_a_checkpoint_of_another_run_is_refused_and_stays(record: Record, notes: Notes) -> None:
    made = settings(images=2 * BATCH)
    loop.run(task(made), made, Worker(), record)
    more = settings(images=3 * BATCH)
    with pytest.raises(CalotypeError, match=r"000016 is a checkpoint of run f{8}, not of toy \(0{8}\)") as said:
        loop.run(task(more), more, Worker(), replace(record, identity="0" * 32))
    assert not isinstance(said.value, DataError)  # which would go back to the one before, and delete this one
    assert checkpoint.committed(record.artifacts) == [2 * BATCH]
    for golden in ("golden", "golden-v2"):  # which name no run
        with checkpoint.opened(FolderStore(Path(__file__).parent / golden), 128) as old:
            check_ours(old, record)


@pytest.mark.parametrize("fault", ["flip", "404", "ESTALE", "listing"])
def test_a_read_that_fails_once_costs_no_checkpoint(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """What breaks on its way is read again; a disk that fails is no damage, and another attempt may find it back."""
    made = settings(images=4 * BATCH, checkpoint_every=2 * BATCH)
    loop.run(task(made), made, Worker(), record)
    real, left = FolderStore.read, [1]

    def read(self: FolderStore, key: str, start: int = 0, length: int | None = None) -> bytes:
        data = real(self, key, start, length)
        if ".exp_avg_sq" in key and left and fault != "listing":
            left.pop()
            if fault == "ESTALE":
                raise DataError(f"{key} cannot be read") from OSError(errno.ESTALE, "stale file handle")
            if fault == "404":
                raise Missing(key)
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    def fail(self: FolderStore, prefix: str = "") -> Any:
        raise DataError("it cannot be listed") from OSError(errno.EIO, "input/output error")

    again = settings(images=5 * BATCH, checkpoint_every=2 * BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "read", read)
        if fault == "listing":
            patch.setattr(FolderStore, "list", fail)
        if fault in ("ESTALE", "listing"):
            with pytest.raises(Unreachable):
                loop.run(task(again), again, Worker(), record)
        else:
            seen: list[int] = []
            loop.run(task(again, seen=seen), again, Worker(), record)
            assert seen[0] == 4 * BATCH
            assert not left
    assert {2 * BATCH, 4 * BATCH} <= set(checkpoint.committed(record.artifacts))


def test_errors_of_the_thread_that_prepares_are_raised(record: Record, notes: Notes) -> None:
    made = settings()
    broken = task(made)
    broken = loop.Task(broken.engines, broken.batches, lambda _: 1 / 0, broken.step)
    with pytest.raises(ZeroDivisionError):
        loop.run(broken, made, Worker(), record)


def test_nothing_is_kept_without_a_record() -> None:
    made = settings(images=4 * BATCH)
    assert loop.run(task(made), made, Worker())["images"] == 4 * BATCH


def test_learning_rate_is_a_function_of_images() -> None:
    assert loop.lr(config.Optim(lr=1.0), 5, 100) == 1.0
    assert loop.lr(config.Optim(lr=1.0, warmup=10), 5, 100) == 0.5
    assert loop.lr(config.Optim(lr=1.0, schedule="linear"), 25, 100) == 0.75
    assert loop.lr(config.Optim(lr=1.0, schedule="cosine"), 50, 100) == pytest.approx(0.5)
    assert loop.lr(config.Optim(lr=1.0, schedule="cosine"), 200, 100) == pytest.approx(0.0)


@pytest.mark.parametrize(("batch", "world", "asked"), [(8, 3, 0), (8, 3, 2), (7, 2, 3), (5, 5, 4), (64, 7, 4)])
def test_every_rank_takes_the_same_micro_batches(batch: int, world: int, asked: int) -> None:
    made = SimpleNamespace(train=config.Train(batch=batch), engine=config.Engine(micro_batch=asked))
    micro = batching.micro_batch(made, world)
    count = batching.accumulation(micro, batch, world)
    total = 0.0
    for rank in range(world):
        share = (rank + 1) * batch // world - rank * batch // world
        rows = {"x": torch.arange(share)}
        parts = [feed.take(rows, micro * number, micro, "cpu") for number in range(count)]
        assert all(1 <= len(part["x"]) <= micro for part, _ in parts)
        weights = torch.cat([weight for _, weight in parts])
        assert weights.sum() == share
        total += float(weights.sum())
    assert total == batch


def test_what_is_left_out_weighs_nothing_and_is_named(record: Record, notes: Notes) -> None:
    """Rows that quarantine blanked change no weight; the run counts and names them, also after a restart."""
    made = replace(settings(images=4 * BATCH), stream=config.Stream(on_error="quarantine", error_budget=2))
    given = task(made)
    lost: dict[str, str] = {}

    def batches(position: int) -> Iterator[Any]:
        for batch in given.batches(position):
            batch.present = ~np.isin(batch.positions, [9, 10])
            lost.update({f"sample {p}": "damaged" for p in batch.positions[~batch.present].tolist()})
            yield batch

    def prepare(batch: Any) -> dict[str, torch.Tensor]:
        rows = given.prepare(batch)
        rows["x"][torch.from_numpy(~batch.present)] = 1e6  # must not be seen
        return dict(rows)

    figures = loop.run(replace(given, batches=batches, prepare=prepare, left_out=lambda: lost), made, Worker(), record)
    assert figures["left_out"] == 2
    assert all(loss < 100 for loss in losses(notes).values())
    lines = record.artifacts.read("quarantined.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "sample 10", "reason": "damaged"}, {"name": "sample 9", "reason": "damaged"}
    ]  # fmt: skip
    more = replace(made, train=replace(made.train, images=5 * BATCH))
    third = replace(task(more), left_out=lambda: {"sample 33": "cut"})
    with pytest.raises(DataError, match=r"3 samples were left out, more than stream\.error_budget=2.*sample 10"):
        loop.run(third, more, Worker(), record)
    strict = settings(images=2 * BATCH)
    assert not {"left_out", "read_retries"} & loop.run(task(strict), strict, Worker()).keys()
    assert loop.run(replace(task(strict), retries=lambda: 7), strict, Worker())["read_retries"] == 7


# ------------------------------------------------------------------------------------------------ saving meanwhile


def published(monkeypatch: pytest.MonkeyPatch, before: Callable[[FolderStore, str], None]) -> None:
    """`before` is called before each file of a checkpoint gets its name, in the thread that writes it."""
    real = FolderStore.publish

    def publish(self: FolderStore, key: str, data: Any) -> bool:
        if "checkpoints" in str(self.path):
            before(self, key)
        return real(self, key, data)

    monkeypatch.setattr(FolderStore, "publish", publish)


def files(record: Record, images: int) -> dict[str, str]:
    """Hash of every tensor file of a checkpoint."""
    commit = json.loads(record.artifacts.read(f"checkpoints/{images:012d}/COMMIT.json"))
    return {key: row["sha256"] for key, row in commit["files"].items() if key.endswith(".safetensors")}


def arrived(record: Record, images: int) -> None:
    """Wait until a checkpoint is committed."""
    until = time.monotonic() + 30
    while checkpoint.latest(record.artifacts) != images:
        assert time.monotonic() < until
        time.sleep(0.01)


def counting(made: Any, at: dict[int, Callable[[], None]], **more: Any) -> loop.Task:
    """`task`, with something to do right after the nth step's forward."""
    plain = task(made, **more)
    done = iter(range(1, 10**6))

    def step(rows: Any) -> Any:
        at.get(next(done), lambda: None)()
        return plain.step(rows)

    return replace(plain, step=step)


def test_steps_go_on_while_a_checkpoint_is_sent_and_change_no_byte(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(checkpoint_every=5 * BATCH)
    whole = Record(record.job, "0" * 32, "x", record.root, record.artifact_root + "2")
    loop.run(task(made), made, Worker(), whole)
    stepped, committed = threading.Event(), []
    published(monkeypatch, lambda store, key: None if stepped.wait(60) else pytest.fail("no step was taken meanwhile"))

    def after_three_more() -> None:
        committed.extend(checkpoint.committed(record.artifacts))
        stepped.set()

    loop.run(counting(made, {8: after_three_more}), made, Worker(), record)
    assert committed == []
    for images in (5 * BATCH, 10 * BATCH):
        assert files(record, images) == files(whole, images)
    points = {name: at for at, figures in notes.points for name in figures if name.startswith("checkpoint")}
    assert set(points) == {f"checkpoint_{what}seconds" for what in ("", "stall_", "wait_")}
    assert set(points.values()) == {10 * BATCH}


def test_one_save_waits_for_the_one_before(record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(images=4 * BATCH, checkpoint_every=BATCH, log_every=10**9)
    sending: list[str] = []

    def slow(store: FolderStore, key: str) -> None:
        sending.append(store.path.name)
        threading.Event().wait(0.02)

    published(monkeypatch, slow)
    figures = loop.run(task(made), made, Worker(), record)
    assert sending == sorted(sending)
    assert checkpoint.committed(record.artifacts) == [BATCH * n for n in range(1, 5)]
    assert figures["checkpoint_wait_seconds"] > 0.05
    assert figures["checkpoint_stall_seconds"] < figures["checkpoint_seconds"]


@pytest.mark.parametrize("error", [CalotypeError("the bucket is gone"), ZeroDivisionError("a bug")])
def test_what_goes_wrong_in_the_thread_is_raised_and_commits_nothing(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    made = settings(images=10**6, checkpoint_every=5 * BATCH)

    def fail(store: FolderStore, key: str) -> None:
        if store.path.name == f"{10 * BATCH:012d}" and key.startswith("net.exp_avg_sq"):
            raise error

    with monkeypatch.context() as patch:
        published(patch, fail)
        with pytest.raises(type(error), match=str(error)):
            loop.run(task(made), made, Worker(), record)
    assert checkpoint.committed(record.artifacts) == [5 * BATCH]
    assert list(record.artifacts.list(f"checkpoints/{10 * BATCH:012d}/"))  # of no use to anybody
    assert notes.finished == 1
    seen: list[int] = []
    more = settings(images=15 * BATCH, checkpoint_every=5 * BATCH, keep=1)
    loop.run(task(more, seen=seen), more, Worker(), record)
    assert seen[0] == 5 * BATCH
    assert {entry.key.split("/")[1] for entry in record.artifacts.list("checkpoints/")} == {f"{15 * BATCH:012d}"}


@pytest.mark.parametrize(
    "error", [Unreachable("no answer"), OSError(errno.ESTALE, "stale file handle"), TimeoutError("no answer")]
)
def test_steps_go_on_while_a_store_does_not_answer(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A save that cannot be written is written again, whole, once the store is back."""
    made = settings(checkpoint_every=5 * BATCH)
    back, silent = threading.Event(), list[str]()

    def away(store: FolderStore, key: str) -> None:
        if len(silent) < 2 and key.startswith("net.weights"):
            silent.append(key)
            raise error
        if silent and not back.wait(0.05):
            raise error

    monkeypatch.setattr(saving, "AGAIN", (0.05, 0.1))
    published(monkeypatch, away)
    loop.run(counting(made, {9: back.set}), made, Worker(), record)
    assert silent
    assert checkpoint.committed(record.artifacts) == [5 * BATCH, 10 * BATCH]
    with checkpoint.opened(record.artifacts, 5 * BATCH) as found:
        assert found.state["images"] == 5 * BATCH


def test_who_cancels_waits_for_no_store(record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(images=10**6, checkpoint_every=5 * BATCH)
    stop = threading.Event()

    def away(store: FolderStore, key: str) -> None:
        raise Unreachable("no answer")

    published(monkeypatch, away)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer"):
        loop.run(counting(made, {7: stop.set}), made, Worker(stop=stop.is_set), record)
    assert time.monotonic() - began < 20
    assert checkpoint.committed(record.artifacts) == []


def test_a_leftover_attempt_stops_without_a_commit(record: Record, notes: Notes) -> None:
    from calotype.runs import Superseded

    old = replace(record, attempt=1)
    old.store.publish("attempts/0001.json", b"{}")
    made = settings(images=10**6, checkpoint_every=5 * BATCH)

    def begin_anew() -> None:
        arrived(record, 5 * BATCH)
        old.store.publish("attempts/0002.json", b"{}")

    with pytest.raises(Superseded, match="superseded by attempt 2"):
        loop.run(counting(made, {7: begin_anew}), made, Worker(), old)
    assert checkpoint.committed(record.artifacts) == [5 * BATCH]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, so small that it can be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_said_in_one_sentence_and_loses_nothing(record: Record, notes: Notes, disk: Path) -> None:
    """Room for all but the last page of a checkpoint (its commit), of two pages, of three; for half; for nothing."""
    made = settings(images=15 * BATCH, checkpoint_every=5 * BATCH)
    whole = Record(record.job, "0" * 32, "x", record.root, record.artifact_root + "2")
    loop.run(task(made, width=4096), made, Worker(), whole)
    golden = losses(notes)
    page = resource.getpagesize()
    sizes = [entry.size for entry in whole.artifacts.list(f"checkpoints/{10 * BATCH:012d}/")]
    needed = sum(math.ceil(size / page) * page for size in sizes)
    for missing in (page, 2 * page, 3 * page, needed // 2, needed):
        there = Record(record.job, "1" * 32, "x", record.root, str(disk / str(missing)))

        def fill(there: Record = there, room: int = needed - missing) -> None:
            arrived(there, 5 * BATCH)
            with (disk / "filler").open("wb") as filler:
                filler.write(bytes(shutil.disk_usage(disk).free - room))

        with pytest.raises(CalotypeError, match=r"0080 cannot be written \(No space left on device\).*make room"):
            loop.run(counting(made, {7: fill}, width=4096), made, Worker(), there)
        assert checkpoint.committed(there.artifacts) == [5 * BATCH]
        with checkpoint.opened(there.artifacts, 5 * BATCH):
            pass
        assert not list(disk.rglob(".partial-*"))
        (disk / "filler").unlink()
        notes.points.clear()
        loop.run(task(made, width=4096), made, Worker(), there)  # the same command
        assert losses(notes) == {images: loss for images, loss in golden.items() if images > 5 * BATCH}
        assert files(there, 15 * BATCH) == files(whole, 15 * BATCH)
        shutil.rmtree(there.artifact_root)


def test_a_file_that_may_not_grow_is_said_in_one_sentence_and_loses_nothing(record: Record, notes: Notes) -> None:
    """Where no file system can be mounted, as near to a full disk as one gets."""
    made = settings(images=10**6, checkpoint_every=5 * BATCH, log_every=5 * BATCH)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        arrived(record, 5 * BATCH)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, before[1]))

    started = counting(made, {7: fill}, width=4096)
    try:
        with pytest.raises(CalotypeError, match=r"000000000080 cannot be written \(File too large\).*make room"):
            loop.run(started, made, Worker(), record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.committed(record.artifacts) == [5 * BATCH]
    with checkpoint.opened(record.artifacts, 5 * BATCH):
        pass
    assert not list(Path(record.artifact_root).rglob(".partial-*"))


def test_an_error_of_the_training_leaves_a_save_the_time_it_needs(
    record: Record, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(images=10**6, checkpoint_every=5 * BATCH)
    published(monkeypatch, lambda store, key: threading.Event().wait(0.02))
    with pytest.raises(ZeroDivisionError):
        loop.run(counting(made, {6: lambda: 1 / 0}), made, Worker(), record)
    assert checkpoint.committed(record.artifacts) == [5 * BATCH]
