"""The reader as a library: the README's lines run as they stand, without Ray, DeepSpeed or MLflow."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from calotype.data import Sample
from calotype.data.cache import encoding_id
from calotype.data.manifest import CACHE, Manifest
from calotype.data.npy import to_npy
from calotype.data.shards import write_shard
from calotype.data.store import open_store

ROOT = Path(__file__).parents[1]
LINES = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_loop_runs(tmp_path: Path) -> None:
    root, dice = open_store(str(tmp_path)), np.random.default_rng(0)
    encoding = {"format": "calotype.encoding/1"}
    store = root.at("latents", encoding_id(encoding))
    samples = [
        Sample(f"k{n}", {"latent.npy": to_npy(dice.normal(size=(2, 4, 8, 8)).astype(np.float16) + 3),
                         "text.npy": to_npy(np.arange(8))})
        for n in range(512)
    ]  # fmt: skip
    row = write_shard(store, "x.tar", samples, 64)
    meta = {"encoding": encoding, "channel_mean": [3.0] * 4, "channel_std": [3.3] * 4}
    manifest = Manifest(CACHE, "toy", ("latent.npy", "text.npy"), (row,), meta)
    root.at("caches", "abc").publish("manifest.json", manifest.to_bytes())
    assert LINES is not None
    program = LINES[1].replace("s3://calotype", str(tmp_path)).replace('"CACHE"', '"abc"')
    program += """    if batch.step == 3:
        break
assert stream.state_dict() == batch.cursor == {"position": 1024}
import sys
assert not {"ray", "deepspeed", "mlflow"} & set(sys.modules)
"""
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(ROOT / "platform"), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert lines[1].startswith("cursor 512: epoch 2, sample 0 of 512 tensor(1.")
    assert len(lines) == 4
