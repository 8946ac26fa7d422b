"""Submission on the real cluster: code that travels, logs, endings."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from calotype.cluster import jobs
from calotype.errors import CalotypeError

ROOT = Path(__file__).parents[2]
PROBE = """
import os, signal, sys, time
import calotype
from calotype.errors import CalotypeError

what = sys.argv[2]
print("driver", calotype.__file__, flush=True)
if what == "fail":
    print("calotype: the reason", file=sys.stderr)
    sys.exit(1)
if what == "sleep":
    def save(number, frame):
        print("saved", flush=True)
        sys.exit(1)
    signal.signal(signal.SIGTERM, save)
    print("\\x1eprogress " + '{"title": "steps", "unit": "steps", "total": 10, "done": 5}', flush=True)
    time.sleep(100)
if what == "worker":
    import ray
    ray.init(logging_level="ERROR")
    @ray.remote
    def where():
        import calotype
        told = [os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "CALOTYPE_SUBMISSION")]
        return calotype.__file__, calotype.EDITED, *told, "has keys" if os.environ.get("AWS_SECRET_ACCESS_KEY") else ""
    print("worker", *ray.get(where.remote()))
"""


@pytest.fixture(scope="module")
def checkout(stack: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edited copy of this checkout, with one more job."""
    folder = tmp_path_factory.mktemp("an edited checkout")
    for name in ("platform", "jobs", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jobs" / "probe.py").write_text(PROBE)
    with (folder / "platform" / "calotype" / "__init__.py").open("a") as file:
        file.write("\nEDITED = 'edited by hand'\n")
    return folder


def in_checkout(checkout: Path, code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(checkout / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", f"from calotype.cluster import jobs\n{code}"],
        env=env,
        cwd=checkout.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(checkout: Path, what: str) -> str:
    identifier = f"probe-{secrets.token_hex(4)}"
    in_checkout(checkout, f"jobs.submit('probe', {identifier!r}, {what!r}, 'my {what}')")
    return identifier


def test_the_package_holds_three_folders_and_is_deterministic(tmp_path: Path) -> None:
    first = jobs.package()
    assert first == jobs.package()
    names = zipfile.ZipFile(io.BytesIO(first)).namelist()
    assert {name.split("/")[0] for name in names} == {"calotype", "jobs", "conf"}
    assert "calotype/cluster/jobs.py" in names
    assert "jobs/prepare.py" in names
    assert "conf/prepare.yaml" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_an_edited_checkout_runs_its_edits_in_driver_and_workers(stack: Any, checkout: Path) -> None:
    identifier = submit(checkout, "worker")
    out = in_checkout(checkout, f"jobs.follow({identifier!r}); print('message', repr(jobs.wait({identifier!r})))")
    assert "message ''" in out
    driver = next(line for line in out.splitlines() if line.startswith("driver "))
    worker = next(line for line in out.splitlines() if line.startswith("worker "))
    for line in (driver, worker):
        assert "_ray_pkg_" in line
        assert str(ROOT / "platform") not in line
    assert "edited by hand" in worker
    assert stack.env["MLFLOW_TRACKING_URI"] in worker
    assert identifier in worker
    assert "has keys" in worker
    assert [row[1:3] for row in jobs.ps() if row[0] == identifier] == [["my worker", "succeeded"]]


def test_nothing_secret_is_in_what_ray_shows_of_a_job(stack: Any, checkout: Path) -> None:
    identifier = submit(checkout, "fail")
    jobs.wait(identifier)
    text = json.dumps(jobs._info(identifier))
    assert "runtime_env" in text
    assert not any(stack.env[name] in text for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "RAY_AUTH_TOKEN"))


def test_a_failed_job_says_why_and_its_id_is_not_used_twice(stack: Any, checkout: Path) -> None:
    identifier = submit(checkout, "fail")
    assert jobs.wait(identifier) == f"{identifier} failed: the reason"
    assert jobs.logs(identifier)[-1] == "calotype: the reason"
    row = next(row for row in jobs.ps() if row[0] == identifier)
    assert row[2] == "failed"
    assert row[5] == "the reason"
    newer = submit(checkout, "fail")
    jobs.wait(newer)
    assert [jobs.named(word) for word in (identifier, "my fail", "run:my fail")] == [identifier, newer, newer]
    with pytest.raises(CalotypeError, match="already exists"):
        jobs.submit("probe", identifier, "fail", "mine")


def test_cancel_lets_a_job_save(stack: Any, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identifier = submit(checkout, "sleep")
    until = time.monotonic() + 60
    while not any("progress" in line for line in jobs.logs(identifier)) and time.monotonic() < until:
        time.sleep(0.2)
    start = time.monotonic()
    assert jobs.cancel(identifier) == "stopped"
    assert time.monotonic() - start < 30
    assert jobs.wait(identifier) == f"{identifier} was cancelled"
    jobs.follow(identifier)
    out = capsys.readouterr().out
    assert "saved" in out
    assert "steps: 5/10 steps (50%)" in out
    assert "\x1e" not in out


def test_no_such_job_no_such_cluster_wrong_token(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalotypeError, match="'nobody': `calotype ps` lists them"):
        jobs.logs(jobs.named("nobody"))
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(CalotypeError, match="refuses the token"):
            jobs.ps()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(CalotypeError, match=r"does not answer at http://127\.0\.0\.1:9"):
        jobs.ps()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(CalotypeError, match="RAY_ADDRESS"):
        jobs.ps()
