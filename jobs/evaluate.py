"""Measure a trained denoiser.

python jobs/evaluate.py run=run:mine
"""

from __future__ import annotations

from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import Evaluate
from calotype.runs import Record
from calotype.tasks import evaluate
from calotype.track import Tracker

resolve = evaluate.resolve


def run(config: Evaluate, record: Record, tracker: Tracker) -> dict[str, Any]:
    return spread.one(evaluate.evaluate, config, record)


if __name__ == "__main__":
    job_main("evaluate", resolve, run)
