"""The reader as a library: the README's lines run as they stand, without Ray, DeepSpeed or MLflow."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from calotype.config import Condition
from calotype.data import Sample
from calotype.data.cache import encoding_id
from calotype.data.manifest import CACHE, Manifest
from calotype.data.npy import to_npy
from calotype.data.shards import write_shard
from calotype.data.store import open_store
from PIL import Image

from tests.caches import autoencoder_folder, config_of, dataset, latents_of, run, text_folder

ROOT = Path(__file__).parents[1]
LOOP, MIXTURE, ELSEWHERE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_loop_runs(tmp_path: Path) -> None:
    root, dice = open_store(str(tmp_path)), np.random.default_rng(0)
    form = {"autoencoder": {"encoder": "0", "f": 8, "channels": 4}, "conditions": {"text": {"source": "text"}}}
    encoding = form | {"resolution": 64, "batch": 1, "dtype": "float16", "posterior": "gaussian"}
    store = root.at("latents", encoding_id(encoding))
    samples = [
        Sample(f"k{n}", {"latent.npy": to_npy(dice.normal(size=(2, 4, 8, 8)).astype(np.float16) + 3),
                         "text.npy": to_npy(np.arange(8))})
        for n in range(512)
    ]  # fmt: skip
    row = write_shard(store, "x.tar", samples, 64)
    meta = {"encoding": encoding, "dataset": "0" * 64, "channel_mean": [3.0] * 4, "channel_std": [3.3] * 4}
    manifest = Manifest(CACHE, "toy", ("latent.npy", "text.npy"), (row,), meta)
    root.at("caches", "abc").publish("manifest.json", manifest.to_bytes())
    program = LOOP.replace("s3://calotype", str(tmp_path)).replace('"CACHE"', '"abc"')
    program += """    if batch.step == 3:
        break
assert stream.state_dict() == batch.cursor
assert batch.cursor["position"] == 1024
import sys
assert not {"ray", "deepspeed", "mlflow"} & set(sys.modules)
"""
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(ROOT / "platform"), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    (std,) = re.findall(r"^cursor 512: epoch 2, sample 0 of 512 tensor\((.*?)\)", lines[1])
    assert 0.95 < float(std) < 1.05  # of posterior draws without a seed
    assert len(lines) == 4


def test_somebody_elses_trainer_reads_a_cache_without_calotype(tmp_path: Path) -> None:
    text = Condition(mode="masked", path=text_folder(tmp_path / "clip"), tokenizer="small", length=9)
    dataset(tmp_path, {"train": (40, 40), "held_out": (5,)})
    config = config_of(tmp_path, autoencoder_folder(tmp_path / "vae"), conditions={"text": text})
    identity, place = run(config)["cache"], latents_of(config).uri.removeprefix("file://")
    program = ELSEWHERE.replace("ROOT/latents/E", place).replace("ROOT", str(tmp_path)).replace("CACHE", identity)
    drawn = "drawn.append(z)\n    assert text.shape == (9, 16) and mask.sum() == len(own) and not text[~mask].any()"
    program = program.replace("print(", f"{drawn}\n    print(").replace("for sample", "drawn = []\nfor sample", 1)
    program += """
z = torch.stack(drawn)
assert abs(z.mean((0, 2, 3))).max() < 0.1 and abs(z.std((0, 2, 3)) - 1).max() < 0.1
import sys
assert not any(name.startswith("calotype") for name in sys.modules)
"""
    command = [sys.executable, "-c", program]
    environment = {"PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 80
    assert lines[12].startswith("s012 a 12 tensor(")
    assert lines[12].endswith("torch.Size([9, 16]) tensor(5)")


def test_the_readmes_mixture_of_shards_in_folders_runs(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    for name in ("own", "more"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for number in range(128):
                image = io.BytesIO()
                Image.fromarray(dice.integers(0, 255, (8, 8, 3), np.uint8)).save(image, "JPEG")
                about = json.dumps({"width": 512 * (number % 4)}).encode()
                for suffix, data in (("jpg", image.getvalue()), ("json", about)):
                    info = tarfile.TarInfo(f"cat-{number:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (tmp_path / "yours.py").write_text(
        "import io, numpy\n"
        "from PIL import Image\n"
        "def decode(sample):\n"
        "    return {'image': numpy.asarray(Image.open(io.BytesIO(sample.members['jpg'])))}\n"
    )
    environment = {"PYTHONPATH": f"{ROOT / 'platform'}:{tmp_path}", "PATH": "", "HOME": str(tmp_path)}
    for name in ("own", "more"):
        command = ["data", "index", str(tmp_path / name), "--name", name, "--root", str(tmp_path / "root")]
        subprocess.run([sys.executable, "-m", "calotype", *command], env=environment, check=True, timeout=120)
    program = MIXTURE.replace('"ROOT"', repr(str(tmp_path / "root"))).replace("/tmp/chunks", str(tmp_path / "chunks"))
    program += """    if batch["cursor"]["position"] == 64 * 5:
        break
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[:2] == [
        "torch.Size([64, 8, 8, 3]) tensor(True) 64", "torch.Size([64, 8, 8, 3]) tensor(True) 128"
    ]  # fmt: skip
    assert any((tmp_path / "chunks").rglob("*.chunk"))
