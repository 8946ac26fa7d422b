"""The loop: status, validate, draw, checkpoint, done?, accumulate, step.  Everything is counted in images.

A task gives it engines, batches, and a step from a micro-batch to losses; nothing here knows what is trained.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calotype import runs, track
from calotype.compose import digest_of
from calotype.config import Optim
from calotype.console import Progress
from calotype.environment import START, STEP, Worker
from calotype.train.batching import accumulation, micro_batch
from calotype.train.engine import Engine
from calotype.train.feed import Tensors, ahead, take
from calotype.train.figures import Asked, Clock, LeftOut, Meter
from calotype.train.guard import Guard
from calotype.train.saving import resume, saves

log = logging.getLogger(__name__)


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
        spent: rank 0's account of time, kept in checkpoints.
        resumed: is told the state of the checkpoint that the training goes on from, or {}.
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
    spent: Callable[[], Mapping[str, float]] = dict
    resumed: Callable[[Mapping[str, Any]], None] = lambda state: None
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
    task.resumed(state)
    images = int(state.get("images", 0))
    clock = Clock(state.get("trained", 0.0), state.get("waited", 0.0), state.get("timed", images))
    began = runs.first_attempt_started(record) if record else time.time()
    meter = Meter(worker, batch, task.engines, task.retries)
    left_out = LeftOut(worker, config, record, task.left_out, state.get("left_out", {}))
    guard = Guard(settings, worker, task.engines, record, state.get("guard", {}))
    figures: dict[str, Any] = dict(state.get("figures", {}))
    start, validated = images, 0  # images at the last validation of this attempt; `figures` may hold an older one's

    def due(every: int) -> bool:
        return images > start and every > 0 and images // every > (images - batch) // every

    asked, shapes = Asked(worker), set[Any]()  # of batches: each new one compiles anew

    with (
        tracking(task, config, worker, record, state) as tracker,
        ahead(task.batches(images), task.prepare, worker) as batches,
        bar(config, worker, record) as show,
        saves(task.engines, config, worker, record, lambda at: task.saved(tracker, at) if tracker else None) as saving,
    ):
        while True:
            done = images >= settings.images
            ending = asked.to_stop() or done
            fresh: dict[str, float] = {}
            if images > start and (ending or due(settings.log_every) or due(settings.checkpoint_every)):
                fresh = meter.read(clock) | left_out.read() | guard.figures()
                # At most 1: `began` is by the driver's clock, which may be ahead of this machine's.
                fresh["goodput"] = clock.trained / max(time.time() - began, clock.trained, 1e-9)
                if saving:  # what fails now must not lose the checkpoint before
                    if bad := not all(map(math.isfinite, fresh.values())):
                        worker.beat("saves", images)
                    fresh |= saving.check(wait=bad)
                fresh.update(task.also(fresh))
                guard.check(fresh, images, meter.first_bad)
            if images > start and (due(settings.validate_every) or (done and settings.validate_every)):
                worker.beat("validates", images)
                fresh.update(task.validate())
                validated = images
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
            initial = task.keep_start and not state and images == start
            if saving and (initial or (images > start and (ending or due(settings.checkpoint_every)))):
                worker.beat("saves", images)
                unsent = [list(point) for point in tracker.pending()] if tracker else []
                also: dict[str, Any] = {"unsent": unsent, "left_out": dict(left_out.known), "guard": guard.state()}
                also |= {"validated": validated, "spent": dict(task.spent())}
                saving.begin(images, clock, figures, also)
            show(images, figures)
            if ending:
                worker.beat("ends", images)
                if saving and (last := saving.check(wait=True)):
                    figures.update(last)
                    if tracker:
                        tracker.log(last, images)
                break

            worker.beat(STEP if images > start else START, images)
            meter.resume()  # the clock of training runs from here
            rows, keys, wait = next(batches)
            if config.engine.compile != "none":
                shape = tuple(sorted((name, tuple(value.shape)) for name, value in rows.items()))
                if shape not in shapes:
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
    overall = {"images_per_second": clock.images / seconds, "data_wait_percent": 100 * clock.waited / seconds}
    return {**figures, **overall, "images": images, "stopped": images < settings.images}


@contextlib.contextmanager
def tracking(
    task: Task, config: Any, worker: Worker, record: runs.Record | None, state: Mapping[str, Any]
) -> Iterator[track.Tracker | None]:
    """Rank 0's tracker, with the points that were unsent at the checkpoint; delivers at the end, whatever it is.

    The first rank of every other node has one too, for the figures of its machine and nothing else.
    """
    if record is None or worker.local_rank:
        yield None
        return
    if worker.rank:
        tracker = track.attach(config, record, role=f"node-{socket.gethostname()}")
    else:
        tracker = track.attach(config, record, state.get("unsent", ()))
    try:
        if worker.rank == 0:
            task.begin(tracker)
        yield None if worker.rank else tracker
    finally:
        tracker.finish()


@contextlib.contextmanager
def bar(config: Any, worker: Worker, record: runs.Record | None) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Rank 0's progress bar, with the last figures that say how it goes."""
    if record is None or worker.rank:
        yield lambda images, figures: None
        return
    batch = config.train.batch
    with Progress(math.ceil(config.train.images / batch) * batch, "images", "train") as progress:

        def show(images: int, figures: Mapping[str, Any]) -> None:
            progress.update(images, **{name: figures[name] for name in ("loss", "validation_loss") if name in figures})

        yield show


def lr(optim: Optim, images: int, total: int) -> float:
    """Learning rate of the step that ends with `images` seen: a pure function, the same after any restart."""
    warm = min(1.0, images / optim.warmup) if optim.warmup else 1.0
    t = min(1.0, images / total)
    fall = {"constant": 1.0, "linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(math.pi * t))}[optim.schedule]
    return optim.lr * warm * fall


def digest_seed(seed: int, images: int, rank: int) -> int:
    return int(digest_of([seed, images, rank])[:15], 16)
