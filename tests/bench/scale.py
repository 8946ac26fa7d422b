"""The order at internet scale, with the real code: 10^9 samples in 10^5 shards, 4,096 ranks; nothing is downloaded.

    python tests/bench/scale.py [--samples 1e9] [--shards 1e5] [--ranks 4096]

Prints what a rank pays (seconds, memory) to open the manifest, find its place for any cursor and plan a step, and what
an epoch costs the store (GETs, bytes, dollars).  Every figure is measured here but bytes and dollars, which are sums.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from calotype.data.dataset import Dataset
from calotype.data.files import FolderStore
from calotype.data.manifest import CACHE, Manifest, Shard
from calotype.data.order import slots
from calotype.data.schedule import Schedule

SAMPLE = 46_000  # bytes: 16 KB of latents, 30 KB of text embeddings
GET = 0.4e-6  # dollars per GET, AWS S3 Standard, us-east-1; bytes to machines of the region cost nothing
SIDECAR = 150  # bytes per chunk of a sidecar, about


def manifest(samples: int, shards: int) -> Manifest:
    """Shards of sizes that differ a little, as real ones do."""
    each = np.full(shards, samples // shards) + np.random.default_rng(0).integers(-500, 500, shards)
    each[-1] += samples - each.sum()
    rows = tuple(
        Shard(f"{index:064x}.tar", int(n) * SAMPLE, int(n), 91, f"{index:064x}", f"{index + shards:064x}", "",
              "train", f"{index:064x}", 91 * SAMPLE)
        for index, n in enumerate(each)
    )  # fmt: skip
    return Manifest(CACHE, "simulated", ("latent.npy", "text.npy", "json"), rows)


def peak() -> float:
    """MiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(samples: int, shards: int, ranks: int, per_rank: int) -> dict[str, Any]:
    made: dict[str, Any] = {"samples": samples, "shards": shards, "ranks": ranks, "batch": ranks * per_rank}
    data = manifest(samples, shards).to_bytes()
    made["manifest_mb"] = len(data) / 1e6
    base = peak()
    began = time.perf_counter()
    read = Manifest.from_bytes(data)
    made["open_manifest_s"] = time.perf_counter() - began
    del data
    batch = ranks * per_rank
    began = time.perf_counter()
    layout = Dataset(FolderStore.__new__(FolderStore), read.split("train")).layout()
    schedule = Schedule([layout], [1.0], 0, batch, 0, 128)
    made["chunks"] = len(layout.counts)
    made["build_order_s"] = time.perf_counter() - began
    dice = np.random.default_rng(1)
    seeks, steps = [], []
    for turn in range(5):  # any cursor, any epoch: each needs two new epochs' permutations at most
        step = int(dice.integers(turn * samples // batch, (turn + 1) * samples // batch))
        mine = slots(int(dice.integers(ranks)), ranks, batch)
        positions = step * batch + np.asarray(mine)
        began = time.perf_counter()
        schedule.locate(positions)
        seeks.append(time.perf_counter() - began)
        began = time.perf_counter()
        for following in range(1, 51):
            schedule.locate(positions + following * batch)
        steps.append((time.perf_counter() - began) / 50)
    made["seek_s"] = statistics.median(seeks)
    made["plan_step_ms"] = 1000 * statistics.median(steps)
    made["memory_of_a_rank_mb"] = peak() - base
    return made | cost(schedule, layout.counts, ranks, per_rank, samples)


def cost(schedule: Schedule, counts: Any, ranks: int, per_rank: int, samples: int) -> dict[str, Any]:
    """What an epoch costs, from the chunks that a few ranks really touch in one."""
    batch = ranks * per_rank
    touched = []
    for rank in (0, ranks // 3, ranks - 1):
        positions = (np.arange(samples // batch)[:, None] * batch + np.asarray(slots(rank, ranks, batch))).reshape(-1)
        touched.append(len(np.unique(schedule.locate(positions).chunk)))
    ranges = statistics.mean(touched)
    gets = 2 * ranges * ranks  # a chunk, and at worst the sidecar of its shard
    size = ranges * ranks * float(counts.mean()) * SAMPLE + gets / 2 * SIDECAR * float(len(counts)) / 1e5
    return {
        "ranges_of_a_rank": ranges,
        "bytes_over_ideal": ranges * ranks * float(counts.mean()) / samples,
        "gets_per_epoch": gets,
        "terabytes_per_epoch": size / 1e12,
        "dollars_per_epoch": gets * GET,
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--shards", type=float, default=1e5)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--per-rank", type=int, default=8, help="samples of a rank in a global batch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    made = measure(int(args.samples), int(args.shards), args.ranks, args.per_rank)
    if args.json:
        print(json.dumps(made))
        return
    for name, value in made.items():
        print(f"{name.replace('_', ' '):24} {value:,.3f}".rstrip("0").rstrip("."))


if __name__ == "__main__":
    main(sys.argv[1:])
