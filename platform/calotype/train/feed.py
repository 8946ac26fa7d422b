"""Batches on their way into a step: prepared ahead in a thread, brought to the device one micro-batch at a time."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calotype.environment import Worker
from calotype.errors import DataError

Tensors = Mapping[str, Tensor]
Ready = tuple[Tensors, Sequence[str], float]
READY = 2  # batches prepared ahead of the step
PRESENT = "present"  # among prepared rows: 0 for those that weigh nothing


def take(rows: Tensors, first: int, count: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Rows [first, first + count) on the device and their weights; past the end one row of weight 0 pads."""
    have = len(next(iter(rows.values())))
    some = slice(first, first + count) if first < have else slice(0, 1)
    part = {name: value[some].to(device, non_blocking=True) for name, value in rows.items()}
    size = len(next(iter(part.values())))
    weight = part.pop(PRESENT, torch.ones(size, device=device))
    return part, weight if first < have else torch.zeros_like(weight)


@contextlib.contextmanager
def ahead(source: Iterable[Any], prepare: Callable[[Any], Tensors], worker: Worker) -> Iterator[Iterator[Ready]]:
    """(prepared rows, keys of the samples, seconds waited for them), prepared in a thread while the step runs."""
    ready: queue.Queue[Any] = queue.Queue(READY)
    over = threading.Event()

    def put(item: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def fill() -> None:
        try:
            for batch in source:
                rows = dict(prepare(batch))
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
