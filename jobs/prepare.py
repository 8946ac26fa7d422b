"""Make a dataset: images and captions become WebDataset shards, sidecars and a manifest.

python jobs/prepare.py data=digits
python jobs/prepare.py data=folder data.name=cats data.path=/pictures/cats data.captions=sidecar
"""

from __future__ import annotations

from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import Prepare
from calotype.console import Progress
from calotype.runs import Record
from calotype.tasks import prepare
from calotype.track import Dataset, Tracker

resolve = prepare.resolve


def run(config: Prepare, record: Record, tracker: Tracker) -> dict[str, Any]:
    plan = prepare.plan(config)
    made = []
    with Progress(len(plan.units), "shards", "prepare") as progress:
        for _, result in spread.map(prepare.make, config, plan.units):
            made.append(result)
            progress.update(len(made))
    figures = prepare.commit(config, made, record)
    data = Dataset(config.data.name, figures["digest"], f"{config.root}/datasets/{config.data.name}", "prepared")
    tracker.inputs([data])
    tracker.picture("samples", prepare.picture(config), 0)
    return figures


if __name__ == "__main__":
    job_main("prepare", resolve, run)
