"""Draw pictures with a trained denoiser.

python jobs/sample.py run=run:mine 'prompts=[a seven, "the number three"]' sampler.guidance=2
"""

from __future__ import annotations

from typing import Any

from calotype.cli import job_main
from calotype.cluster import spread
from calotype.config import Sample
from calotype.runs import Record
from calotype.tasks import sample
from calotype.track import Tracker

resolve = sample.resolve


def run(config: Sample, record: Record, tracker: Tracker) -> dict[str, Any]:
    return spread.one(sample.draw, config, record)


if __name__ == "__main__":
    job_main("sample", resolve, run)
