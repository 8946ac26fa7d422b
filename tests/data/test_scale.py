"""10^9 samples in 10^5 shards, 4,096 ranks, by the real code: what a rank pays grows with chunks, and is little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "scale.py"


def scaled(samples: float, shards: float) -> dict[str, float]:
    command = [sys.executable, str(BENCH), "--json", f"--samples={samples}", f"--shards={shards}"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "platform"), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400, env=environment)
    return dict(json.loads(done.stdout))


def test_a_rank_of_4096_finds_its_place_among_a_billion_samples() -> None:
    made = scaled(1e9, 1e5)
    assert made["memory_of_a_rank_mb"] < 400  # manifest, chunk counts, two epochs' permutations, and making them
    assert made["manifest_mb"] < 40
    assert made["bytes_over_ideal"] < 1.01, "a rank downloads its share"
    assert 2_000 < made["ranges_of_a_rank"] < 4_000, "1 / 4,096 of the chunks, each once"
    assert made["open_manifest_s"] + made["build_order_s"] + made["seek_s"] < 60, "seconds, on a busy machine too"
    small = scaled(1e8, 1e4)
    assert made["plan_step_ms"] < 5 * small["plan_step_ms"], "a step costs the same whatever the dataset"
