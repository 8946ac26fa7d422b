"""The children of one `-m`: one parent run in MLflow, a table at the end; one that fails does not stop its siblings."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from calotype import compose, console, listing, runs, track
from calotype.errors import CalotypeError

log = logging.getLogger(__name__)


@dataclass
class Child:
    """One combination, and how far it is.

    Attributes:
        config: resolved; None while it is not.
        state: refused | failed | submitted | finished.
        error: why it failed, in one sentence.
    """

    overrides: list[str] = field(default_factory=list)
    config: Any = None
    state: str = ""
    error: str = ""


class Sweep:
    """The children of one command line; without -m there is one, which nobody makes a table of.  A context manager:

    Raises:
        CalotypeError: at its end; names the children that failed.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.parent = ""
        self.children: list[Child] = []

    def __enter__(self) -> Sweep:
        return self

    def run(self, make: Callable[[], Any], overrides: list[str] | None, body: Callable[[Child, Any], None]) -> None:
        """`body(child, config)` on what `make` composes: as it is, or (under -m) as a child of the parent run."""
        self.children.append(child := Child(overrides or []))
        if overrides is None:
            body(child, make())
            return
        print(f"--- {self.job} {' '.join(overrides)}", flush=True)
        try:
            child.state = "refused"
            config = make()
            child.state = "failed"
            self.parent = self.parent or track.open_parent(config, self.job)
            body(child, replace(config, track=replace(config.track, parent=self.parent)))
        except CalotypeError as error:
            print(f"calotype: {error}", file=sys.stderr, flush=True)
            child.error = str(error)
        except Exception as error:  # a bug, which need not be its siblings'
            traceback.print_exc()
            child.error = f"{type(error).__name__}: {error}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = [child for child in self.children if child.error]
        try:
            track.close_parent(self.parent, "KILLED" if error else "FAILED" if failed else "FINISHED")
        except Exception as away:  # it holds nothing but its children
            log.warning("the sweep's own run in MLflow stays open: %s", away)
        if any(child.overrides for child in self.children):
            self._show()
        if failed and error is None:
            labels = [f"{' '.join(child.overrides)}: " if child.overrides else "" for child in failed]
            raise CalotypeError("; ".join(label + one.error for label, one in zip(labels, failed, strict=True)))

    def _show(self) -> None:
        several = len(self.children) > 1
        everywhere = set.intersection(*(set(child.overrides) for child in self.children)) if several else set[str]()
        rows = []
        for child in self.children:
            differs = " ".join(word for word in child.overrides if word not in everywhere)
            identity = compose.identity(self.job, child.config) if child.config is not None else ""
            record = runs.load(child.config.root, identity) if child.state == "finished" else None
            figures = listing.headline(record.result()) if record else ""
            rows.append([differs, identity[:8], child.state, figures])
        console.table(f"{self.job} -m", ["settings", "run", "status", "figures"], rows)
        if page := track.page(self.parent):
            print(f"their parent in MLflow: {page}")
