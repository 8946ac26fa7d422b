"""Time from `calotype submit` to the first optimizer step, next to a bare `TorchTrainer.fit`.

    python tests/bench/start.py [ROUNDS]

Both train the demo's UNet and text encoder on two ZeRO workers of the embedded cluster, in turns.  Ours is the whole
way: the command line, composing, checks, upload, job, workers, the cache's first samples, and the point in MLflow.  The
bare script is Ray's own example with random input: it knows its model, reads nothing, tracks nothing.  Seconds since
the start of the process that a user starts; the median of each, and their ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BATCH = 64
SPACE = ["autoencoder=identity", "encoding.resolution=16"]
BARE = """
import sys, time
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work(config):
    import deepspeed, diffusers, mlflow, torch, transformers
    from calotype import compose
    from calotype.model.denoiser import build_denoiser
    settings = compose.compose("train_denoiser", config["overrides"])
    model = build_denoiser(settings, (3, 16, 16))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={"train_micro_batch_size_per_gpu": config["batch"] // 2, "zero_optimization": {"stage": 1}},
    )
    noisy = torch.randn(config["batch"] // 2, 3, 16, 16)
    tokens = torch.zeros(len(noisy), settings.conditions["text"].length, dtype=torch.long)
    loss = engine(noisy, torch.zeros(len(noisy), dtype=torch.long), {"text": tokens}).square().mean()
    engine.backward(loss)
    engine.step()
    open(config["out"], "w").write(repr(time.time()))

ray.init(sys.argv[1], logging_level="WARNING", runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}})
config = {"out": sys.argv[2], "batch": int(sys.argv[3]), "overrides": sys.argv[4:]}
TorchTrainer(work, train_loop_config=config, run_config=RunConfig(storage_path=sys.argv[2] + ".ray"),
             scaling_config=ScalingConfig(num_workers=2)).fit()
"""


def calotype(*words: str) -> str:
    command = [sys.executable, "-m", "calotype", *words]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def ours(root: str, seed: int) -> float:
    """Seconds from the command to the first point of `loss` in MLflow, by the time that the worker stamped on it."""
    from mlflow import MlflowClient

    name, start = f"start{seed}", time.time()
    calotype(
        "submit", "train_denoiser", root, *SPACE, f"name={name}", f"seed={seed}", "denoiser=unet_tiny", "engine=zero1",
        "cluster.workers=2", f"train.batch={BATCH}", f"train.images={2 * BATCH}", f"train.log_every={BATCH}",
        "train.validate_every=0", "train.sample_every=0",
    )  # fmt: skip
    shown = json.loads(calotype("runs", "show", name, "--json", "--root", root.removeprefix("root=")))
    first = MlflowClient().get_metric_history(shown["runs"][0]["mlflow_run_id"], "loss")[0]
    return first.timestamp / 1000 - start


def bare() -> float:
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder, "bare.py"), Path(folder, "out")
        script.write_text(BARE)
        overrides = ["denoiser=unet_tiny", *SPACE]
        command = [sys.executable, str(script), os.environ["CALOTYPE_RAY_GCS"], str(out), str(BATCH), *overrides]
        start = time.time()
        subprocess.run(command, check=True, capture_output=True)
        return float(out.read_text()) - start


def main(rounds: int) -> None:
    from calotype.environment import load_services

    calotype("up")
    load_services()
    root = f"root=s3://calotype/bench-{os.urandom(4).hex()}"
    calotype("submit", "prepare", root)
    calotype("submit", "cache_latents", root, *SPACE)
    bare()  # not counted: DeepSpeed compiles its CPU collectives for it, once for all
    times: dict[str, list[float]] = {"submit": [], "bare": []}
    for turn in range(rounds):
        times["bare"].append(bare())
        times["submit"].append(ours(root, turn))
        print(json.dumps({name: round(values[-1], 2) for name, values in times.items()}), flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({**{f"{name}_s": round(value, 2) for name, value in medians.items()},
                      "ratio": round(medians["submit"] / medians["bare"], 3)}))  # fmt: skip


if __name__ == "__main__":
    main(int((*sys.argv[1:], "3")[0]))
