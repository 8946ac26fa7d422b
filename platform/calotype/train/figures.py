"""What the loop knows of itself: figures over all ranks, time that counts, who wants to stop, numbers that are none."""

from __future__ import annotations

import json
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
from calotype.errors import CalotypeError, DataError
from calotype.train import checkpoint


@dataclass
class Clock:
    """Seconds over all attempts of a run, without those whose steps were lost."""

    trained: float = 0.0  # in steps, without waiting for data
    waited: float = 0.0


class Meter:
    """Sums on the device, read with one collective."""

    def __init__(self, worker: Worker, batch: int, engines: Collection[str], retries: Callable[[], int] = int) -> None:
        self.worker, self.batch, self.retries = worker, batch, retries
        self.shown = dict.fromkeys(engines, "loss") if len(engines) == 1 else {}
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms: Tensor | None = None
        self.steps, self.rate, self.waited = 0, 0.0, 0.0
        self.seconds, self.running = 0.0, 0.0

    def resume(self) -> None:
        """Training goes on: time counts until the step has been given to the device."""
        self.running = time.monotonic()

    def add(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        for name, value in values.items():
            part = (value.detach().double() * weight).sum() / self.batch
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def step(self, norms: list[Tensor], rate: float, wait: float) -> None:
        norm = torch.stack([norm.detach() for norm in norms]).max()
        self.norms = norm if self.norms is None else self.norms + norm
        self.steps, self.rate, self.waited = self.steps + 1, rate, self.waited + wait
        self.seconds += time.monotonic() - self.running

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
        assert self.norms is not None
        seconds = self.seconds + time.monotonic() - began
        images = self.steps * self.batch
        clock.trained += max(seconds - waited, 0.0)
        clock.waited += waited
        figures = {self.shown.get(name, name): value / self.steps for name, value in zip(names, values, strict=True)}
        figures["gradient_norm"] = float(self.norms) / self.steps
        figures["lr"] = self.rate
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
        parts: list[Any] = [mine]
        if self.worker.world > 1:
            parts = [None] * self.worker.world
            dist.all_gather_object(parts, mine)
        for part in parts:
            self.known |= part
        if self.record is not None and self.worker.rank == 0:
            lines = [json.dumps({"name": name, "reason": why}) + "\n" for name, why in sorted(self.known.items())]
            self.record.artifacts.write("quarantined.jsonl", "".join(lines).encode())
        if len(self.known) > self.settings.error_budget:
            raise DataError(f"{len(self.known)} samples were left out, more than "
                            f"stream.error_budget={self.settings.error_budget}: "
                            f"{', '.join(sorted(self.known)[:5])} ... ({next(iter(self.known.values()))})")  # fmt: skip
        return {"left_out": len(self.known)}


def refuse_nonfinite(figures: Mapping[str, float], images: int, record: runs.Record | None) -> None:
    """Stop with the evidence; weights after this are worth nothing and are not saved."""
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        last = checkpoint.latest(record.artifacts) if record else None
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        since = f"{last:,} images" if last else "the start"
        raise CalotypeError(
            f"{' and '.join(bad)} not finite at {images:,} images ({shown}): nothing was saved since {since}; "
            "lower optim.lr, set optim.clip, or use engine.precision=bf16 or fp32"
        )


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
