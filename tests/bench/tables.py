"""The figures of the stream benchmark: medians over rounds, and what was to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]  # medians of the runs of one entrant
COLUMNS = ("samples/s", "MB/s", "CPU-s/GB", "peak MB", "base MB", "p99 gap ms",
           "p99/median", "first s", "resume s", "others %")  # fmt: skip


def medians(runs: list[Row]) -> dict[tuple[str, str], dict[tuple[str, int], Row]]:
    """(kind, route) -> (entrant, workers) -> medians; of the limits only the fastest, under the name `limit`."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for run in runs:
        name = (run["kind"], run["route"], run["entrant"], run["workers"], run["connections"])
        groups.setdefault(name, []).append(run)
    found: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for (kind, route, entrant, workers, connections), group in groups.items():
        here = found.setdefault((kind, route), {})
        row = _row(group)
        if str(entrant).startswith("limit"):
            row["label"] = f"{entrant} x{connections}"
            entrant = "limit"
            if ("limit", 0) in here and here["limit", 0].get("speed", 0) >= row.get("speed", 0):
                continue
        here[str(entrant), int(workers)] = row
    return found


def _row(group: list[Row]) -> Row:
    good = [run for run in group if "error" not in run]
    if not good:
        return {"error": group[0]["error"].splitlines()[-1][:90]}

    def mid(value: Callable[[Row], float]) -> float:
        return statistics.median(value(run) for run in good)

    row = {
        "samples": mid(lambda run: run["samples"] / run["seconds"]),
        "speed": mid(lambda run: run["bytes"] / run["seconds"] / 1e6),
        "cpu": mid(lambda run: run["cpu"] / run["bytes"] * 1e9),
        "peak": mid(lambda run: run["peak"] / 1e6),
        "base": mid(lambda run: run["base"] / 1e6),
        "others": mid(lambda run: 100 * run["others"]),
        "first": mid(lambda run: run["first"]),
        "complete": all(run["complete"] for run in good),
        "failed": len(group) - len(good),
    }
    if all("gap" in run for run in good):
        row["gap99"] = mid(lambda run: run["gap99"] * 1e3)
        row["gaps"] = mid(lambda run: run["gap99"] / run["gap"])
    if all("resume" in run for run in good):
        row["resume"] = mid(lambda run: run["resume"])
    return row


def table(runs: list[Row]) -> str:
    """One table per kind and route."""
    lines = []
    for (kind, route), rows in medians(runs).items():
        count = len({run["round"] for run in runs if (run["kind"], run["route"]) == (kind, route)})
        lines += ["", f"{kind}, {route}: medians of {count}", _cells("", *COLUMNS)]
        for (entrant, workers), row in rows.items():
            name = row.get("label", f"{entrant} {workers}w")
            if "error" in row:
                lines.append(f"{name:<20} failed: {row['error']}")
                continue
            tensors = not entrant.startswith("limit")
            lines.append(
                _cells(
                    name,
                    f"{row['samples']:.0f}",
                    f"{row['speed']:.0f}",
                    f"{row['cpu']:.2f}",
                    f"{row['peak']:.0f}",
                    f"{row['base']:.0f}",
                    f"{row['gap99']:.1f}" if tensors else "",
                    f"{row['gaps']:.1f}" if tensors else "",
                    f"{row['first']:.2f}",
                    f"{row['resume']:.2f}" if "resume" in row else "cannot" if tensors else "",
                    f"{row['others']:.0f}",
                )
                + ("" if row["complete"] else "  SAMPLES LOST OR CHANGED")
                + (f"  {row['failed']} runs failed" if row["failed"] else "")
            )
    return "\n".join(lines)


def _cells(name: str, *cells: str) -> str:
    return f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells)


def reach(runs: list[Row], memory: int) -> str:
    """What the issue asks for, wherever it can be told."""
    lines = ["", f"{'reach':<64}{'asked':>8}{'found':>8}"]
    for (kind, route), rows in medians(runs).items():
        for (entrant, workers), ours in rows.items():
            if entrant == "calotype" and "error" not in ours:
                where = f"{kind}, {route}, {workers} workers"
                for what, asked, value, fine in _goals(ours, rows, workers, route, memory):
                    lines.append(f"{where + ': ' + what:<64}{asked:>8}{value:>8.2f}  {'yes' if fine else 'NO'}")
    return "\n".join(lines)


def _goals(
    ours: Row, rows: dict[tuple[str, int], Row], workers: int, route: str, memory: int
) -> Iterable[tuple[str, str, float, bool]]:
    def other(name: str, n: int = workers) -> Row:
        row = rows.get((name, n), {})
        return {} if "error" in row else row

    if pool := other("pool", 2):
        share = ours["samples"] / pool["samples"]
        yield "samples/s of the bare pool's", ">= 0.95", share, share >= 0.95
    for name, times in (("webdataset", 3.0), ("spdl", 1.2)):
        if (row := other(name)) and not pool:
            share = ours["samples"] / row["samples"]
            yield f"samples/s of {name}'s", f">= {times}", share, share >= times
    if (row := other("webdataset")) and not pool:
        share = ours["cpu"] / row["cpu"]
        yield "CPU-s per GB of webdataset's", "<= 0.33", share, share <= 1 / 3
    if (row := other("limit", 0)) and route == "capped":
        share = ours["samples"] / row["samples"]
        yield "of the limit without parsing", ">= 0.85", share, share >= 0.85
    yield "p99 gap of the median's", "<= 3", ours["gaps"], ours["gaps"] <= 3
    if "resume" in ours:
        share = ours["resume"] / ours["first"]
        yield "resume at 50% of time to first batch", "<= 1.2", share, share <= 1.2
    used = (ours["peak"] - ours["base"]) * 1e6 / (memory * (1 + workers))
    yield "memory of the budget", "<= 1", used, used <= 1
