"""What MLflow could not be told in time: unsent/ROLE.json beside a run's artifacts, the points of one role."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from calotype.data.store import Missing
from calotype.outbox import Point, as_point
from calotype.runs import Record

log = logging.getLogger(__name__)


def place(role: str) -> str:
    """Its key among the artifacts."""
    return f"unsent/{role}.json"


def roles(record: Record) -> list[str]:
    """Of which something may wait."""
    return [Path(entry.key).stem for entry in record.artifacts.list("unsent/")]


def read(record: Record, role: str) -> list[Point]:
    """The points of a role that wait, in order."""
    with contextlib.suppress(Missing):
        return [as_point(point) for point in json.loads(record.artifacts.read(place(role)))]
    return []


def keep(record: Record, role: str, left: Sequence[Point], whole: bool, untold: bool) -> None:
    """Let what is left of a role wait there.

    Args:
        whole: what waited there before was read, so that it was delivered or is left; otherwise it stays, first.
        untold: something else was not told either: `settle` is to find that there is something.
    """
    points: dict[tuple[str, int], Point] = {}
    for point in [*([] if whole else read(record, role)), *left]:
        points.setdefault((point[0], point[2]), point)
    if points or untold:
        log.warning("MLflow did not take %d points in time: they are in %s", len(points), place(role))
        record.artifacts.write(place(role), json.dumps(list(points.values())).encode())
    else:
        record.artifacts.delete(place(role))
