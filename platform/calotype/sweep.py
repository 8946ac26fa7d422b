"""The children of one `-m`: one parent run in MLflow, a table at the end; one that fails does not stop its siblings."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from calotype import compose, console, listing, runs, track
from calotype.errors import CalotypeError


class Sweep:
    """Without -m it is nothing but what runs the one child."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.parent = ""
        self.failures: list[str] = []
        self._children: list[tuple[list[str], Any]] = []  # overrides, resolved config (None: it was refused)

    def run(self, make: Callable[[], Any], overrides: list[str] | None, body: Callable[[Any], None]) -> None:
        """`body(config)` on what `make` composes: as it is, or (under -m) as a child of the parent run."""
        if overrides is None:
            body(make())
            return
        label = " ".join(overrides)
        print(f"--- {self.job} {label}", flush=True)
        self._children.append((overrides, None))
        try:
            config = make()
            self.parent = self.parent or track.open_parent(config, self.job)
            body(dataclasses.replace(config, track=dataclasses.replace(config.track, parent=self.parent)))
        except CalotypeError as error:
            print(f"calotype: {error}", file=sys.stderr, flush=True)
            self.failures.append(f"{label}: {error}")

    def take(self, resolved: Any) -> Any:
        """The same, which the table looks up: what the current child came to be."""
        if self._children:
            self._children[-1] = (self._children[-1][0], resolved)
        return resolved

    def close(self) -> None:
        """End the parent run and print what its children came to; a CalotypeError names those that failed."""
        if self.parent:
            track.close_parent(self.parent, "FAILED" if self.failures else "FINISHED")
        if self._children:
            several = len(self._children) > 1
            everywhere = set.intersection(*(set(words) for words, _ in self._children)) if several else set[str]()
            differing = [" ".join(one for one in words if one not in everywhere) for words, _ in self._children]
            rows = [[words, *self._came_to(made)] for words, (_, made) in zip(differing, self._children, strict=True)]
            console.table(f"{self.job} -m", ["settings", "run", "status", "figures"], rows)
            if page := track.page(self.parent):
                print(f"their parent in MLflow: {page}")
        if self.failures:
            raise CalotypeError("; ".join(self.failures))

    def _came_to(self, resolved: Any) -> list[str]:
        identity = compose.identity(self.job, resolved) if resolved is not None else ""
        record = runs.load(resolved.root, identity) if identity else None
        if record is None:
            return [identity[:8], "not started", ""]
        return [identity[:8], record.status(), listing.headline(record.result())]
