"""The loop: status, validate, draw, checkpoint, done?, accumulate, step.  Everything is counted in images.

A task gives it engines, batches, and a step from a micro-batch to losses; nothing here knows what is trained.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype import runs, track
from calotype.compose import digest_of
from calotype.config import Optim
from calotype.console import Progress
from calotype.environment import Worker
from calotype.errors import DataError
from calotype.train.engine import Engine
from calotype.train.figures import Asked, Clock, LeftOut, Meter
from calotype.train.guard import Guard
from calotype.train.saving import resume, saves

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Ready = tuple[Tensors, Sequence[str], float]
READY = 2  # batches prepared ahead of the step
PRESENT = "present"  # among prepared rows: 0 for those that weigh nothing


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        engines: by name; every one takes a step per global batch.
        batches: position in the stream -> this rank's batches from there on, to train.images at least.
        prepare: batch -> CPU tensors, one row per sample of this rank, all randomness included; runs in a thread.
            A batch's `present`, if it has one, says which rows weigh nothing.
        step: micro-batch on the device -> per-sample values (n,): under the name of an engine its losses, under any
            other name something to log.
        validate: collective -> figures to log.
        draw: collective -> a PIL image on rank 0.
        left_out: ids and reasons of samples that this rank's batches lack.
        retries: reads that this rank had to repeat so far.
        also: figures of rank 0 -> more of them.
        where: a position, in words.
        keep_start: save a checkpoint before the first step, too: what the weights come from may be gone at a restart.
        begin, saved: rank 0 tells the tracker where the data comes from, and where a checkpoint lies.
    """

    engines: Mapping[str, Engine]
    batches: Callable[[int], Iterable[Any]]
    prepare: Callable[[Any], Tensors]
    step: Callable[[Tensors], Tensors]
    validate: Callable[[], Mapping[str, float]] = dict
    draw: Callable[[], Any] = lambda: None
    left_out: Callable[[], Mapping[str, str]] = dict
    retries: Callable[[], int] = int
    also: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda figures: {}
    where: Callable[[int], str] = "cursor {:,}".format
    keep_start: bool = False
    begin: Callable[[track.Tracker], None] = lambda tracker: None
    saved: Callable[[track.Tracker, int], None] = lambda tracker, images: None


def run(task: Task, config: Any, worker: Worker, record: runs.Record | None = None) -> dict[str, Any]:
    """Train until `config.train.images` were seen, from the newest checkpoint of the run if it has one.

    Args:
        config: has `train`, `optim`, `engine`, `seed` and `track`.
        record: None keeps nothing.

    Returns:
        The last figures; `stopped` is true when the worker was asked to stop before the end.

    Raises:
        CalotypeError: a loss or gradient is not finite.  Final: the same run would meet it again.
    """
    settings, batch = config.train, config.train.batch
    micro = micro_batch(config, worker.world)
    state = resume(task.engines, task.where, worker, record)
    images, clock = int(state["images"] if state else 0), Clock(state.get("trained", 0.0), state.get("waited", 0.0))
    began = runs.first_attempt_started(record) if record else time.time()
    meter = Meter(worker, batch, task.engines, task.retries)
    left_out = LeftOut(worker, config, record, task.left_out, state.get("left_out", {}))
    guard = Guard(settings, worker, task.engines, record, state.get("guard", {}))
    figures: dict[str, Any] = dict(state.get("figures", {}))
    start = images

    def due(every: int) -> bool:
        return images > start and every > 0 and images // every > (images - batch) // every

    asked, shapes = Asked(worker), set[Any]()  # of batches: each new one compiles anew

    with (
        tracking(task, config, worker, record, state) as tracker,
        ahead(task, images, worker) as batches,
        bar(config, worker, record) as show,
        saves(task.engines, config, worker, record, lambda at: task.saved(tracker, at) if tracker else None) as saving,
    ):
        while True:
            done = images >= settings.images
            ending = asked.to_stop() or done
            fresh: dict[str, float] = {}
            if images > start and (ending or due(settings.log_every) or due(settings.checkpoint_every)):
                fresh = meter.read(clock) | left_out.read() | guard.figures()
                fresh["goodput"] = clock.trained / max(time.time() - began, 1e-9)
                if saving:  # what fails now must not lose the checkpoint before
                    if bad := not all(map(math.isfinite, fresh.values())):
                        worker.beat("saves", images)
                    fresh |= saving.check(wait=bad)
                fresh.update(task.also(fresh))
                guard.check(fresh, images, meter.first_bad)
            if images > start and (due(settings.validate_every) or (done and settings.validate_every)):
                worker.beat("validates", images)
                fresh.update(task.validate())
            if images > start and (due(settings.sample_every) or (done and settings.sample_every)):
                worker.beat("draws", images)
                picture = task.draw()
                if tracker and picture is not None:
                    tracker.picture("samples", picture, images)
            if fresh:
                figures.update(fresh)
                if worker.rank == 0:
                    said = "  ".join(f"{k} {v:.4g}" for k, v in fresh.items())
                    log.info("%s images  %s  (%s)", f"{images:,}", said, task.where(images))
                if tracker:
                    tracker.log(fresh, images)
            fresh_run = task.keep_start and not state and images == start
            if saving and (fresh_run or (images > start and (ending or due(settings.checkpoint_every)))):
                worker.beat("saves", images)
                unsent = [list(point) for point in tracker.pending()] if tracker else []
                also = {"unsent": unsent, "left_out": dict(left_out.known), "guard": guard.state()}
                saving.begin(images, clock, figures, also)
            show(images, figures)
            if ending:
                worker.beat("ends", images)
                if saving and (last := saving.check(wait=True)):
                    figures.update(last)
                    if tracker:
                        tracker.log(last, images)
                break

            worker.beat("steps" if images > start else "starts", images)
            meter.resume()  # the clock of training runs from here
            rows, keys, wait = next(batches)
            shape = tuple(sorted((name, tuple(value.shape)) for name, value in rows.items()))
            if config.engine.compile != "none" and shape not in shapes:
                worker.beat("compiles", images)  # which may take minutes, and is no hang
                shapes.add(shape)
            torch.manual_seed(digest_seed(config.seed, images, worker.rank))  # dropout: no state to keep
            images += batch
            for first in range(0, micro * accumulation(micro, batch, worker.world), micro):
                part, weight = take(rows, first, micro, worker.device)
                values = task.step(part)
                for name, engine in task.engines.items():
                    engine.backward((values[name] * weight).sum() * (worker.world / batch))
                meter.add(values, weight)
            rate = lr(config.optim, images, settings.images)
            guard.begin(images, keys, meter.step_sums)
            norms = [engine.step(rate, images, batch) for engine in task.engines.values()]
            meter.step(norms, rate, wait, images, guard.taken)

    seconds = max(clock.trained + clock.waited, 1e-9)
    overall = {"images_per_second": images / seconds, "data_wait_percent": 100 * clock.waited / seconds}
    return {**figures, **overall, "images": images, "stopped": images < settings.images}


@contextlib.contextmanager
def tracking(
    task: Task, config: Any, worker: Worker, record: runs.Record | None, state: Mapping[str, Any]
) -> Iterator[track.Tracker | None]:
    """Rank 0's tracker, with the points that were unsent at the checkpoint; delivers at the end, whatever it is."""
    if record is None or worker.rank:
        yield None
        return
    tracker = track.attach(config, record, state.get("unsent", ()))
    try:
        task.begin(tracker)
        yield tracker
    finally:
        tracker.finish()


@contextlib.contextmanager
def bar(config: Any, worker: Worker, record: runs.Record | None) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Rank 0's progress bar, with the last figures that say how it goes."""
    if record is None or worker.rank:
        yield lambda images, figures: None
        return
    with Progress(config.train.images, "images", "train") as progress:

        def show(images: int, figures: Mapping[str, Any]) -> None:
            progress.update(images, **{name: figures[name] for name in ("loss", "validation_loss") if name in figures})

        yield show


def lr(optim: Optim, images: int, total: int) -> float:
    """Learning rate of the step that ends with `images` seen: a pure function, the same after any restart."""
    warm = min(1.0, images / optim.warmup) if optim.warmup else 1.0
    t = min(1.0, images / total)
    fall = {"constant": 1.0, "linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(math.pi * t))}[optim.schedule]
    return optim.lr * warm * fall


# ---------------------------------------------------------------------------------------------- micro-batches


def micro_batch(config: Any, world: int) -> int:
    """Samples per forward on one worker, the same on every one.

    Args:
        world: at most `train.batch` workers (checks.py): each has a share.
    """
    most = math.ceil(config.train.batch / world)
    return min(config.engine.micro_batch or most, most)


def accumulation(micro: int, batch: int, world: int) -> int:
    """Micro-batches per step: as many as the rank with the largest share needs."""
    return math.ceil(math.ceil(batch / world) / micro)


def take(rows: Tensors, first: int, count: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Rows [first, first + count) on the device and their weights; past the end one row of weight 0 pads."""
    have = len(next(iter(rows.values())))
    some = slice(first, first + count) if first < have else slice(0, 1)
    part = {name: value[some].to(device, non_blocking=True) for name, value in rows.items()}
    size = len(next(iter(part.values())))
    weight = part.pop(PRESENT, torch.ones(size, device=device))
    return part, weight if first < have else torch.zeros_like(weight)


@contextlib.contextmanager
def ahead(task: Task, position: int, worker: Worker) -> Iterator[Iterator[Ready]]:
    """(prepared rows, keys of the samples, seconds waited for them), prepared in a thread while the step runs."""
    ready: queue.Queue[Any] = queue.Queue(READY)
    over = threading.Event()
    source = task.batches(position)

    def put(item: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def fill() -> None:
        try:
            for batch in source:
                rows = dict(task.prepare(batch))
                if not getattr(batch, "present", np.ones(1)).all():
                    rows[PRESENT] = torch.from_numpy(batch.present).float()
                rows = {k: v.pin_memory() for k, v in rows.items()} if worker.device.startswith("cuda") else rows
                put((rows, getattr(batch, "keys", ())))
                if over.is_set():
                    return
            put(DataError("the batches ended before train.images was reached"))
        except BaseException as error:  # raised again where the batch is awaited
            put(error)

    def drain() -> Iterator[Ready]:
        while True:
            began = time.monotonic()
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield *item, time.monotonic() - began

    thread = threading.Thread(target=fill, name="batches", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        over.set()  # the thread drops its iterator, which ends the reading behind it
        thread.join(10)


def digest_seed(seed: int, images: int, rank: int) -> int:
    return int(digest_of([seed, images, rank])[:15], 16)
