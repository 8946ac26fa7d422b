"""The guard: a step that is not finite, or far above what is usual, is not taken; the evidence lies in the run.

With train.spike or train.bad_steps every step is judged before it is taken, by its loss and its gradient norm over all
ranks, so that all of them decide alike.  That waits for the device once a step.  Without both nothing is judged: the
figures of the log are looked at, and the first step that was not finite is known all the same.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calotype import runs
from calotype.config import Train
from calotype.environment import Worker
from calotype.errors import CalotypeError
from calotype.train import checkpoint
from calotype.train.engine import Engine
from calotype.train.figures import gathered

log = logging.getLogger(__name__)

WINDOW = 128  # steps that the medians look back on, skipped ones too: a level that stays becomes the usual one
LEAST = 32  # steps before anything counts as unusual
SHOWN = 64  # last steps in the evidence
KEPT = 512  # batches whose keys are remembered
ADVICE = (
    "lower optim.lr, set optim.clip, use engine.precision=bf16 or fp32, or leave its samples out with data.takedown"
)


class Guard:
    """Judges the steps of all engines.

    Args:
        state: what `state` gave at a checkpoint; {} at the start.
    """

    def __init__(
        self,
        settings: Train,
        worker: Worker,
        engines: Mapping[str, Engine],
        record: runs.Record | None,
        state: Mapping[str, Any],
    ) -> None:
        self.settings, self.worker, self.record, self.engines = settings, worker, record, engines
        self.on = bool(settings.spike or settings.bad_steps)
        self.skipped = int(state.get("skipped", 0))
        self.bad: dict[str, int] = dict.fromkeys(engines, 0) | state.get("bad", {})  # not finite, in a row
        before = state.get("last", {})  # engine -> [[loss, norm], ...] of the last steps that were finite
        self.last = {name: deque(map(tuple, before.get(name, ())), WINDOW) for name in engines}
        self.told: deque[dict[str, Any]] = deque(maxlen=SHOWN)  # what the evidence shows of the steps before
        self.batches: deque[tuple[int, Sequence[str]]] = deque(maxlen=KEPT)
        self.losses: Mapping[str, Tensor] = {}
        self.images, self.taken = 0, True
        for name, engine in engines.items() if self.on else ():
            engine.brake.judge = partial(self._judge, name)

    def state(self) -> dict[str, Any]:
        """Plain data, so that a resumed run judges as this one would."""
        if not self.on:
            return {}
        return {
            "skipped": self.skipped,
            "bad": dict(self.bad),
            "last": {name: list(of) for name, of in self.last.items()},
        }

    def begin(self, images: int, keys: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """A step is about to be taken.

        Args:
            images: seen when it ends.
            keys: this rank's share of the batch.
            losses: this rank's part of each engine's mean loss, scalars.
        """
        self.images, self.losses, self.taken = images, losses, True
        self.batches.append((images, keys))

    def figures(self) -> dict[str, float]:
        return {"skipped_steps": float(self.skipped)} if self.on else {}

    def check(self, figures: Mapping[str, float], images: int, first: int) -> None:
        """Stop with the evidence; weights after this are worth nothing and are not saved.  Collective.

        Args:
            first: images when the first step whose gradient was not finite ended; 0 if none is known.
        """
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            why = f"{' and '.join(bad)} not finite at {images:,} images"
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            since = f", since the step that ended at {first:,}" if first else ""
            raise self._final(f"{why} ({shown}){since}", first or images, dict(figures))
        if not self.on:
            self.told.append({"images": images, **figures})

    def _judge(self, name: str, norm: Tensor) -> bool:
        """Whether an engine may take its step; the same on all ranks.  Collective."""
        both = torch.stack([self.losses[name].double(), norm.to(self.losses[name].device).double() / self.worker.world])
        if self.worker.world > 1:
            dist.all_reduce(both)
        loss, size = both.tolist()
        values = {"loss": loss, "gradient_norm": size}
        finite = all(map(math.isfinite, values.values()))
        self.bad[name] = 0 if finite else self.bad[name] + 1
        why = self._unusual(name, values) if finite else "not finite"
        if finite:
            self.last[name].append((loss, size))
        self.told.append({"images": self.images, "engine": name, **values, "skipped": bool(why)})
        if not why:
            return True
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        layers = self.engines[name].layer_norms()
        if self.bad[name] > self.settings.bad_steps:
            many = f"{self.bad[name]} steps in a row are" if self.bad[name] > 1 else "the step is"
            why = f"{many} not finite at {self.images:,} images ({shown}), train.bad_steps={self.settings.bad_steps}"
            raise self._final(why, self.images, values, layers)
        self.skipped += self.taken
        self.taken = False
        kept = self._keep(self.images, "skipped", why, values, layers)
        if self.worker.rank == 0:
            log.warning("skips the step that ends at %s images: %s (%s)%s", f"{self.images:,}", why, shown, kept)
        return False

    def _unusual(self, name: str, values: Mapping[str, float]) -> str:
        if not self.settings.spike or len(self.last[name]) < LEAST:
            return ""
        for index, (key, value) in enumerate(values.items()):
            usual = statistics.median(step[index] for step in self.last[name])
            if value > self.settings.spike * usual > 0:
                return f"{key} is {value / usual:.3g} times its median over the last {len(self.last[name])} steps"
        return ""

    def _final(
        self, why: str, images: int, values: Mapping[str, float], layers: Mapping[str, float] | None = None
    ) -> CalotypeError:
        kept = self._keep(images, "final", why, values, layers or {})
        last = checkpoint.latest(self.record.artifacts) if self.record else None
        since = f"{last:,} images" if last else "the start"
        return CalotypeError(f"{why}: nothing was saved since {since}{kept}; {ADVICE}")

    def _keep(
        self, images: int, ending: str, why: str, values: Mapping[str, float], layers: Mapping[str, float]
    ) -> str:
        """Write evidence/IMAGES.json among the run's artifacts; says where.  Collective."""
        keys = next((list(keys) for at, keys in self.batches if at == images), [])
        ranks = gathered(self.worker, keys)
        if self.record is None:
            return ""
        place = f"evidence/{images:012d}.json"
        data = {
            "images": images,
            "ending": ending,
            "why": why,
            "positions": [max(images - self.settings.batch, 0), images],  # of the batch in the global order
            "keys": dict(enumerate(ranks)),  # rank -> the samples of its share
            "values": _plain(values),
            "layer_gradient_norms": _plain(layers),
            "last": [_plain(step) for step in self.told],
        }
        try:
            if self.worker.rank == 0:
                self.record.artifacts.write(place, json.dumps(data, indent=1).encode())
        except Exception as error:  # an outage of the store must not make a skipped step an end
            log.warning("%s could not be written: %s", place, error)
        return f"; {place} of the run's artifacts has its batch, losses and norms"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not finite."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
