"""What the machinery around the model costs: our training next to bare loops, as ratios within one run.

    python tests/bench/train.py [PART...] [--steps 60] [--batch 64] [--rounds 3]
    python tests/bench/train.py --gpu [--edges 256 512] [--device cuda:0] [--batch 64] [--compile none default]

    steps    our loop beside plain PyTorch (one process: torch, zero0) and beside DeepSpeed (two: zero1, zero2, zero3)
    mlflow   the same with a point per step in MLflow: up, down, and answering after 5 s (needs `calotype up`)
    online   steps on cached latents beside steps that encode their images anew, as diffusers' own script does
    saves    what a checkpoint costs the steps, in the background and not (train_saves.py; needs `calotype up`)
    kill     from kill -9 of a worker to the next step, beside a fresh start (train_kill.py; needs `calotype up`)
    start    from `calotype submit` to the first step, beside a bare TorchTrainer.fit (start.py)

--gpu: the UNet of Stable Diffusion 2 on cached latents, eager and compiled (train_gpu.py); torch, diffusers, deepspeed,
webdataset, hydra and boto3 are all that it needs; a batch that does not fit is halved.  Medians of the rounds, one
compute thread per process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "platform")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.bench.train_steps import Case, measured  # noqa: E402

PARTS = ("steps", "mlflow", "online", "saves", "kill", "start")
SLOW = 5.0  # seconds until an MLflow that is slow answers


def ranks(case: Case, told: Any, rank: int, store: str) -> None:
    try:
        told.put(measured(case, rank, store))
    except BaseException as error:
        told.put(repr(error))
        raise


def run(case: Case) -> dict[str, float]:
    """The figures of a case, each of its ranks in a fresh process; of the slowest rank."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        each = [context.Process(target=ranks, args=(case, told, rank, f"{folder}/s")) for rank in range(case.world)]
        for process in each:
            process.start()
        found = [told.get() for _ in each]
        for process in each:
            process.join()
    if wrong := [one for one in found if isinstance(one, str)]:
        raise RuntimeError(wrong[0])
    return max(found, key=lambda one: one["ratio"])


def shown(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Print and give the median ratio of each case; cases take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            found[name].append(run(case))
    medians = {}
    for name, each in found.items():
        ours, beside, ratio = (statistics.median(one[what] for one in each) for what in ("ours", "beside", "ratio"))
        print(f"{name:<34}ours {ours:8.1f} ms  beside {beside:8.1f} ms  ratio {ratio:.3f}", flush=True)
        medians[name] = ratio
    return medians


def steps(base: Case, rounds: int) -> None:
    cases = {"torch / PyTorch": base, "zero0 / PyTorch": replace(base, kind="deepspeed")}
    for stage in (1, 2, 3):
        case = replace(base, beside="deepspeed", kind="deepspeed", stage=stage, world=2)
        cases[f"zero{stage} / DeepSpeed, 2 processes"] = case
    shown(cases, rounds)


def mlflow(base: Case, rounds: int) -> None:
    """Every case has the same bare steps beside it: so the ratios of ratios are those of our step times."""
    from calotype.environment import load_services

    from tests.proxy import Proxy

    load_services()
    address = os.environ["MLFLOW_TRACKING_URI"]
    with Proxy(address, delay=SLOW) as slow:
        places = {"none": "", "up": address, "down": "http://127.0.0.1:9", f"answers after {SLOW:g} s": slow.url}
        medians = shown({f"MLflow {name}": replace(base, mlflow=place) for name, place in places.items()}, rounds)
    for name in list(medians)[1:]:
        print(f"{name}: step time {medians[name] / medians['MLflow none']:.3f} of that without MLflow")


def online(base: Case, rounds: int) -> None:
    (ratio,) = shown({"cached / encoded in every step": replace(base, beside="online")}, rounds).values()
    print(f"caching makes a step {1 / ratio:.2f} times as fast (its images lie decoded in memory already)")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    gpu = parser.add_argument_group("on one GPU")
    gpu.add_argument("--gpu", action="store_true")
    gpu.add_argument("--edges", type=int, nargs="+", default=[256, 512], help="in pixels")
    gpu.add_argument("--device", default="cuda:0")
    modes = ["none", "default", "reduce-overhead"]
    gpu.add_argument("--compile", nargs="+", choices=modes, default=modes[:2], help="as engine.compile")
    options = parser.parse_args(words)
    if options.gpu:
        from tests.bench import train_gpu

        train_gpu.main(options.edges, options.device, options.batch, options.steps, options.compile)
        return
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    base = Case(steps=options.steps, batch=options.batch)
    for part in options.parts or PARTS:
        print(f"\n{part}", flush=True)
        if part == "start":
            subprocess.run([sys.executable, str(ROOT / "tests/bench/start.py"), str(options.rounds)], check=True)
        elif part in ("saves", "kill"):
            from tests.bench import train_kill, train_saves

            {"saves": train_saves, "kill": train_kill}[part].measured(options.rounds)
        else:
            {"steps": steps, "mlflow": mlflow, "online": online}[part](base, options.rounds)


if __name__ == "__main__":
    main()
