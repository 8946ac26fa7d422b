"""A cache on the real stack: workers killed, S3 gone, a second job on the same cache: the bytes of a calm run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from calotype import runs
from calotype.data.manifest import Manifest
from calotype.data.store import Store, open_store

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
BLACKOUT = 20.0  # seconds
DATA = ["data=digits", "data.shard_samples=45"]  # 40 shards


def start(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], env=env, cwd=ROOT, **pipes)


def ended(process: subprocess.Popen[str], fails: bool = False) -> str:
    out, _ = process.communicate(timeout=600)
    assert (process.returncode != 0) == fails, out[-4000:]
    return out


def running(pattern: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if re.search(pattern, " ".join(process.info["cmdline"] or [])):
            found.append(process)
    return found


def latents(root: str) -> dict[str, bytes]:
    """Shards and sidecars, by key."""
    store = open_store(root).at("latents")
    keys = [entry.key for entry in store.list() if entry.key.endswith((".tar", ".sidecar.json", "encoding.json"))]
    return {key: store.read(key) for key in keys}


def manifest(root: str) -> Manifest:
    store: Store = open_store(root).at("caches")
    (name,) = store.folders()
    return Manifest.from_bytes(store.at(name).read("manifest.json"))


def test_killed_workers_a_lost_store_and_a_second_job_leave_the_bytes_of_a_calm_run(stack: Any, tmp_path: Path) -> None:
    from tests.caches import autoencoder_folder

    weights = autoencoder_folder(tmp_path / "weights", channels=(32, 64))
    calm, stormy = (f"s3://calotype/{name}-{os.urandom(4).hex()}" for name in ("calm", "stormy"))
    settings = [f"autoencoder.path={weights}", "encoding.resolution=64", "encoding.batch=15", "accept.psnr=0",
                "track=none", *DATA]  # fmt: skip
    local = ["cluster=local", "cluster.workers=1"]
    for root in (calm, stormy):
        ended(start("jobs/prepare.py", f"root={root}", "cluster=local", "track=none", *DATA))
    ended(start("jobs/cache_latents.py", f"root={calm}", *settings, *local))

    chance, kills, second, dark = random.Random(7), 0, None, 0.0
    (store,) = [process for process in running(r"weed(\s|$).*server") if process.ppid() != 0 and _ours(process, stack)]
    words = ["-m", "calotype", "submit", "cache_latents", f"root={stormy}", *settings, "cluster.workers=2"]
    first, began = start(*words), time.monotonic()
    while first.poll() is None:
        time.sleep(chance.uniform(4, 12))
        actors = [process for process in running(r"^ray::(Units|IDLE.*Units)") if _ours(process, stack)]
        if actors and kills < 12:
            chance.choice(actors).send_signal(signal.SIGKILL)
            kills += 1
        if kills >= 2 and second is None:
            assert "is running already" in ended(start(*words, "name=again"), fails=True)
            second = start("jobs/cache_latents.py", f"root={stormy}", *settings, *local, "seed=1", "name=second")
        if kills >= 3 and not dark:
            store.send_signal(signal.SIGSTOP)
            time.sleep(BLACKOUT)
            store.send_signal(signal.SIGCONT)
            dark = time.monotonic() - began
    out = ended(first)
    assert kills >= 3, out[-2000:]
    assert dark
    assert second is not None
    ended(second)

    assert latents(stormy) == latents(calm)
    both = [found.result() for found in runs.every(stormy) if found.job == "cache_latents"]
    assert len(both) == 2
    assert all(found["shards_encoded"] > 0 for found in both), "one job waited for the other"
    assert sum(found["shards_encoded"] for found in both) <= both[0]["shards"] + kills, "they did not share the work"
    assert not [entry.key for entry in open_store(stormy).at("latents").list() if entry.key.endswith(".lease")]
    one, other = manifest(calm), manifest(stormy)
    assert one.shards == other.shards
    assert {**one.meta, "devices": 0, "acceptance": 0} == {**other.meta, "devices": 0, "acceptance": 0}
    shown = json.loads(ended(start("-m", "calotype", "cache", "ls", "--json", "--root", stormy)))
    assert [(found["state"], found["samples"]) for found in shown] == [("finished", 1797)]
    ended(start("-m", "calotype", "cache", "verify", shown[0]["id"], "--root", stormy))


def _ours(process: psutil.Process, stack: Any) -> bool:
    """Whether the stack started it, or what started it: others may run on this machine."""
    with contextlib.suppress(psutil.Error):
        return any(str(stack.home) in one.cwd() for one in (process, *process.parents()))
    return False
