"""What the loop knows of itself: figures over all ranks, time that counts, who wants to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calotype import runs
from calotype.environment import Worker
from calotype.errors import DataError


@dataclass
class Clock:
    """Seconds over all attempts of a run, without steps that were lost and the first of each attempt: it compiles."""

    trained: float = 0.0  # in steps, without waiting for data
    waited: float = 0.0
    images: int = 0  # seen in that time


class Meter:
    """Sums on the device, read with one collective."""

    def __init__(self, worker: Worker, batch: int, engines: Collection[str], retries: Callable[[], int] = int) -> None:
        self.worker, self.batch, self.retries = worker, batch, retries
        self.shown = dict.fromkeys(engines, "loss") if len(engines) == 1 else {}
        self.warm = False  # one step was taken
        self.first_bad = 0  # images at the end of the first step of the last reading that was not finite; 0: all were
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.step_sums: dict[str, Tensor] = {}  # of the step that is being taken
        self.norms: Tensor | None = None
        self.bad: Tensor | None = None  # images at the end of the first step that is not finite, or infinity
        self.steps, self.skipped, self.rate = 0, 0, 0.0
        self.timed, self.waited, self.seconds, self.running = 0, 0.0, 0.0, 0.0  # of the steps whose time counts

    def resume(self) -> None:
        """Training goes on: time counts until the step has been given to the device."""
        self.running = time.monotonic()

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        for name, value in values.items():
            part = (value.detach().double() * weight).sum() / self.batch
            self.step_sums[name] = self.step_sums[name] + part if name in self.step_sums else part

    def step(self, norms: list[Tensor], rate: float, wait: float, images: int, taken: bool = True) -> None:
        """The step that ends with `images` seen; one that was not taken is left out of the means."""
        self.rate = rate
        if taken:
            norm = torch.stack([norm.detach() for norm in norms]).max()
            self.norms = norm if self.norms is None else self.norms + norm
            bad = torch.full_like(norm, images, dtype=torch.float64).masked_fill(norm.isfinite(), math.inf)
            self.bad = bad if self.bad is None else torch.minimum(self.bad, bad)
            for name, part in self.step_sums.items():
                self.sums[name] = self.sums[name] + part if name in self.sums else part
        self.steps, self.skipped = self.steps + 1, self.skipped + (not taken)
        self.step_sums = {}
        if self.warm:  # the first one compiles, and loads its kernels: that is no training
            self.timed, self.waited = self.timed + 1, self.waited + wait
            self.seconds += time.monotonic() - self.running
        self.warm = True

    def read(self, clock: Clock) -> dict[str, float]:
        """Means per step since the last reading, over all ranks.  Collective."""
        began = time.monotonic()
        names = list(self.sums)
        waiting = torch.tensor(self.waited / self.worker.world).double().to(self.worker.device)
        retries = torch.tensor(self.retries()).double().to(self.worker.device)
        vector = torch.stack([*(self.sums[name] for name in names), waiting, retries])
        if self.worker.world > 1:
            dist.all_reduce(vector)
        *values, waited, retried = vector.tolist()  # waits for the device: so the time counts as training
        first = math.inf if self.bad is None else float(self.bad)
        self.first_bad = int(first) if math.isfinite(first) else 0
        seconds = self.seconds + time.monotonic() - began if self.timed else 0.0
        images = self.timed * self.batch
        clock.images += images
        clock.trained += max(seconds - waited, 0.0)
        clock.waited += waited
        taken = self.steps - self.skipped
        figures = {self.shown.get(name, name): value / taken for name, value in zip(names, values, strict=True)}
        if self.norms is not None:
            figures["gradient_norm"] = float(self.norms) / taken
        figures["lr"] = self.rate
        if images:
            figures["images_per_second"] = images / max(seconds, 1e-9)
            figures["data_wait_percent"] = 100 * waited / max(seconds, 1e-9)
        if retried:  # of this attempt: where it rises, the store throttles, or the network fails
            figures["read_retries"] = retried
        self.reset()
        return figures


class LeftOut:
    """Samples that quarantine left out, of all ranks and attempts: counted, named in the run, and held to a budget."""

    def __init__(
        self,
        worker: Worker,
        config: Any,
        record: runs.Record | None,
        mine: Callable[[], Mapping[str, str]],
        known: Mapping[str, str],
    ) -> None:
        self.worker, self.record, self.mine = worker, record, mine
        self.known = dict(known)  # id -> reason
        self.settings = getattr(config, "stream", None)  # a job of its own kind may stream nothing

    def read(self) -> dict[str, float]:
        """{"left_out": how many}, or {} if there are none; new ones go to quarantined.jsonl of the run.  Collective.

        Raises:
            DataError: on all ranks, if there are more than the budget.
        """
        if self.settings is None or self.settings.on_error == "strict":
            return {}
        mine = dict(self.mine())
        if not agree(self.worker, bool(mine.keys() - self.known.keys())):
            return {"left_out": len(self.known)} if self.known else {}
        for part in gathered(self.worker, mine):
            self.known |= part
        if self.record is not None and self.worker.rank == 0:
            self.record.list_left_out(sorted(self.known.items()))
        if len(self.known) > self.settings.error_budget:
            raise DataError(f"{len(self.known)} samples were left out, more than "
                            f"stream.error_budget={self.settings.error_budget}: "
                            f"{', '.join(sorted(self.known)[:5])} ... ({next(iter(self.known.values()))})")  # fmt: skip
        return {"left_out": len(self.known)}


class Asked:
    """Whether any rank was asked to stop.  The vote of one step is read at the next, so that nobody waits for it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.group: Any = dist.new_group(backend="gloo") if worker.world > 1 else None
        self.vote = torch.zeros(())
        self.voting: Any = None

    def to_stop(self) -> bool:
        """The same answer on every rank.  Collective."""
        if self.group is None:
            return self.worker.stop()
        agreed = False
        if self.voting is not None:
            self.voting.wait()
            agreed = bool(self.vote.item() > 0)
        self.vote = torch.tensor(float(self.worker.stop()))
        self.voting = dist.all_reduce(self.vote, group=self.group, async_op=True)
        return agreed


def agree(worker: Worker, flag: bool, group: Any = None) -> bool:
    """Whether any rank says so.  Collective, over a `group` of CPUs where one is given."""
    if worker.world == 1:
        return flag
    vote = torch.tensor(float(flag), device="cpu" if group is not None else worker.device)
    dist.all_reduce(vote, group=group)
    return bool(vote.item() > 0)


def gathered(worker: Worker, mine: Any) -> list[Any]:
    """What every rank has, by rank.  Collective."""
    if worker.world == 1:
        return [mine]
    parts: list[Any] = [None] * worker.world
    dist.all_gather_object(parts, mine)
    return parts
