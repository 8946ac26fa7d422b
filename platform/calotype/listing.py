"""Runs and their figures, as people and programs read them."""

from __future__ import annotations

import json
import time
from typing import Any

from calotype import console, runs, track
from calotype.errors import CalotypeError

HEADLINE = ("accuracy", "psnr_heldout", "validation_loss", "loss", "samples", "images", "images_per_second")


def show_result(record: runs.Record, result: dict[str, Any]) -> None:
    rows = [[key, console.figure(value)] for key, value in sorted(result.items()) if not isinstance(value, dict | list)]
    rows += [["run", record.identity], ["artifacts", record.artifact_root]]
    if record.mlflow_run_id:
        rows.append(["MLflow", track.page(record.mlflow_run_id)])
    console.table(f"{record.job}: {record.name}", ["figure", "value"], rows)


def headline(result: dict[str, Any]) -> str:
    """The figures of a result that a table has room for."""
    return "  ".join(f"{key} {console.figure(result[key])}" for key in HEADLINE if key in result)


def show_runs(root: str, name: str, as_json: bool) -> None:
    """All runs under a root, or those that `name` (a name or an identity) means.

    Raises:
        CalotypeError: there is none of that name.
    """
    names = runs.names(root)
    found = [r for r in runs.every(root) if name in ("", r.identity, r.identity[:8], *names.get(r.identity, ()))]
    found.sort(key=lambda record: record.created)
    if name and not found:
        raise CalotypeError(f"no run named {name!r} under {root}: `calotype runs` lists them")
    results = {record.identity: record.result() for record in found}
    if as_json:
        merged: dict[str, Any] = {}
        for record in found:  # the newest figure of a name wins
            merged.update(results[record.identity])
        for each in ("seconds", "images"):  # of every job: they stand with each of them, below
            merged.pop(each, None)
        listed = [
            {
                "job": r.job,
                "name": r.name,
                "identity": r.identity,
                "status": r.status(),
                "artifacts": r.artifact_root,
                "mlflow_run_id": r.mlflow_run_id,
                "result": results[r.identity],
            }
            for r in found
        ]
        print(json.dumps({**merged, "runs": listed} if name else listed, indent=1))
        return
    if name:
        for record in found:
            show_result(record, results[record.identity] or {"status": record.status()})
        return
    rows = [
        [
            ", ".join([r.name, *(other for other in names.get(r.identity, ()) if other != r.name)]),
            r.job,
            r.identity[:8],
            r.status(),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(r.created)),
            console.figure(results[r.identity].get("seconds", "")),
            headline(results[r.identity]),
        ]
        for r in found
    ]
    console.table(f"runs under {root}", ["name", "job", "run", "status", "started", "seconds", "figures"], rows)
