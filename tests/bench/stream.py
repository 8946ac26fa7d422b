"""The stream beside other readers of training data in S3: speed, CPU, memory, gaps, start and resume.

    python tests/bench/stream.py [--peers-python PYTHON] [--rounds 3] [--gigabytes 2] [--entrants NAME ...] [--quick]

The same samples lie in S3 in each reader's own format.  A run is one epoch in a fresh process with cold caches, in
batches of 64 stacked tensors; the entrants take turns within a round, so that the machine's drift falls on all alike;
the tables show medians.  S3 is read through a proxy (../proxy.py) that answers from its memory, because a server on
this machine would take the CPU that is measured: `capped` at 90 MB/s per connection with 30 ms to the first byte, and
`direct`, as fast as it goes.

Uses the S3 of AWS_ENDPOINT_URL_S3, or starts the embedded one.  Writes, and deletes, a bucket of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "platform")]

import entrants  # noqa: E402
import samples  # noqa: E402
from entrants import ENTRANTS, Spec  # noqa: E402
from proxy import Proxy  # noqa: E402
from tables import reach, table  # noqa: E402

MEASURED = Path(__file__).with_name("measured.py")
ROUTES: dict[str, dict[str, float]] = {"capped": {"rate": 90e6, "delay": 0.030}, "direct": {}}
LIMITS = ("limit-obstore", "limit-http")
OURS = ("calotype", "webdataset", "limit-http", "pool")  # the others' libraries live in an environment of their own
READERS = ("calotype", "webdataset", "mosaicml", "litdata", "spdl", "limit")
PEERS = ROOT / ".venv-peers" / "bin" / "python"  # `make peers` makes it
TIMEOUT = 600.0  # seconds of one run
PATIENCE = 5.0  # seconds to wait for a quiet machine before a run
SAMPLED = 0.2  # seconds between two looks at memory


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ------------------------------------------------------------------------------------------------ data


def make(spec: Spec, peers: str, formats: list[str]) -> list[int]:
    """Write the samples in every format; returns what tells them from each other, sorted."""
    from calotype.data.manifest import CACHE, Manifest
    from calotype.data.shards import Sample, write_shard
    from calotype.data.store import open_store

    store, marks, rows = open_store(f"s3://{spec.bucket}/tar"), [], []
    store.ensure()
    each = spec.samples // len(spec.tars)
    for number, key in enumerate(spec.tars):
        made = list(samples.samples(spec.kind, number, each))
        marks += [samples.mark(members) for _, members in made]
        rows.append(write_shard(store, key, [Sample(name, samples.stored(members)) for name, members in made], 256))
        spec.sizes[key] = rows[-1].bytes
    names = tuple(sorted(samples.stored(made[0][1])))
    store.write("manifest.json", Manifest(CACHE, spec.kind, names, tuple(rows), {}).to_bytes())
    for format in formats:
        with tempfile.TemporaryDirectory() as folder:
            words = ["write", format, json.dumps(asdict(replace(spec, folder=folder)))]
            subprocess.run([peers, str(MEASURED), *words], check=True, stdout=subprocess.DEVNULL, env=quiet())
            for path in Path(folder).iterdir():
                entrants.s3().upload_file(str(path), spec.bucket, f"{format}/{path.name}")
    return sorted(marks)


def remove(bucket: str) -> None:
    """Delete a bucket and all that is in it."""
    client = entrants.s3()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)


def quiet(**more: str) -> dict[str, str]:
    """The environment of other processes."""
    path = os.pathsep.join([str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", **more}


# ------------------------------------------------------------------------------------------------ runs


def run(spec: Spec, python: str, proxy: Proxy) -> dict[str, Any]:
    """One run in a process of its own, when the machine is quiet.

    Adds `base` and `peak`, bytes of memory before it began and at most, and `others`, the share of the machine's CPU
    that neither it nor the proxy took meanwhile.

    Raises:
        RuntimeError: with the end of what it said.
    """
    # mosaicml has a name of its own for it
    env = quiet(AWS_ENDPOINT_URL_S3=proxy.url, S3_ENDPOINT_URL=proxy.url, AWS_DEFAULT_REGION="us-east-1")
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile() as errors, os.fdopen(ours) as said:
        process = subprocess.Popen(
            [python, str(MEASURED), json.dumps(asdict(spec)), str(theirs)],
            stdin=subprocess.PIPE, stdout=errors, stderr=errors, pass_fds=[theirs], env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        try:
            assert process.stdin is not None
            if _line(said):
                _await_quiet()
                with _sampled(process.pid) as memory:
                    (busy, whole), passed_on = _busy(), proxy.counts().cpu
                    process.stdin.write(b"\n")
                    process.stdin.flush()
                    line = _line(said)
                if line:
                    found = {**json.loads(line), "base": memory[0], "peak": max(memory)}
                    used = found.get("cpu", 0.0) + proxy.counts().cpu - passed_on
                    found["others"] = max(0.0, _busy()[0] - busy - used) / (_busy()[1] - whole)
                    return found
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace").strip()[-1500:] or "it said nothing in time")
        finally:
            _end(process)


def _busy() -> tuple[float, float]:
    """CPU-seconds that the machine has worked, and that it had, since it began."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), sum(ticks) / os.sysconf("SC_CLK_TCK")


def _await_quiet() -> None:
    """Wait until others use less than a tenth of the machine, but not for ever."""
    for _ in range(int(PATIENCE / 0.5)):
        before = _busy()
        time.sleep(0.5)
        after = _busy()
        if after[0] - before[0] < (after[1] - before[1]) / 10:
            return


def _line(said: Any) -> str:
    ready, _, _ = select.select([said], [], [], TIMEOUT)
    return said.readline() if ready else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and what it left behind: the session is its own."""
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _sampled(pid: int) -> Iterator[list[int]]:
    """Bytes of memory of a process and all below it, every so often; the first one at once."""
    found, over = [_pss(pid)], threading.Event()

    def look() -> None:
        while not over.wait(SAMPLED):
            found.append(_pss(pid))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _pss(pid: int) -> int:
    """Of a process and all below it; what they share counts once.  Cheap, as it is done beside what is measured."""
    total = 0
    with suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(_pss(int(child)) for child in (task / "children").read_text().split())
    return total


def turns(kind: str, options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(entrant, workers, connections) of one round."""
    names, most = options.entrants, options.connections
    if kind == "jpeg":
        found = [(name, 2, most) for name in ("calotype", "webdataset", "pool") if name in (*names, "pool")]
        return [("calotype", 0, most)] * ("calotype" in names) + found  # ours decodes in threads too, as the pool does
    limits = [(name, 0, most // part) for name in LIMITS for part in (4, 2, 1)] if "limit" in names else []
    return limits + [(name, n, most) for n in options.workers for name in names if name != "limit"]


def compare(kind: str, options: argparse.Namespace, missing: dict[str, str]) -> Generator[dict[str, Any], None, None]:
    """All runs of one kind of samples, as they end."""
    shards, each = samples.KINDS[kind].shards(options.gigabytes)
    bucket = f"bench-{secrets.token_hex(5)}"
    plan = [turn for turn in turns(kind, options) if turn[0] not in missing]
    with tempfile.TemporaryDirectory(prefix="calotype-bench-") as folder:
        tars = [f"{number:05d}.tar" for number in range(shards)]
        spec = Spec("", kind, 0, bucket, tars, shards * each, folder)
        log(f"{kind}: {samples.KINDS[kind].about}; {shards} shards of {each}")
        own = [form for form, name in (("mds", "mosaicml"), ("litdata", "litdata")) if name in {t[0] for t in plan}]
        try:
            marks = make(spec, options.peers_python, own)
            for route in options.routes:
                with Proxy(os.environ["AWS_ENDPOINT_URL_S3"], keep=True, **ROUTES[route]) as proxy:
                    warm(bucket, proxy.url)
                    for number in range(options.rounds):
                        for name, workers, connections in plan:
                            one = replace(spec, entrant=name, workers=workers, connections=connections)
                            yield both(one, route, number, options, proxy, marks)
        finally:
            remove(bucket)


def warm(bucket: str, url: str) -> None:
    """Let the proxy read every object once."""
    import boto3

    client = boto3.client("s3", endpoint_url=url)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", ()):
            client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()


def both(
    spec: Spec, route: str, number: int, options: argparse.Namespace, proxy: Proxy, marks: list[int]
) -> dict[str, Any]:
    """A whole run, and a resumed one where the entrant knows how."""
    python = sys.executable if spec.entrant in OURS else options.peers_python
    head = {"kind": spec.kind, "route": route, "entrant": spec.entrant, "workers": spec.workers,
            "connections": spec.connections, "round": number}  # fmt: skip
    state = Path(spec.folder, "state")
    state.unlink(missing_ok=True)
    can = spec.entrant in ("calotype", "mosaicml", "litdata")
    try:
        result = run(replace(spec, resume=str(state) if can else ""), python, proxy)
        if state.exists():
            result["resume"] = run(replace(spec, resume=str(state), resumed=True), python, proxy)["first"]
    except RuntimeError as error:
        log(f"  {route} {spec.entrant} workers={spec.workers}: failed: {error}")
        return {**head, "error": str(error)}
    got = result.pop("marks")
    result["bytes"] = spec.samples * samples.KINDS[spec.kind].bytes
    result["fetched"] = sum(spec.sizes.values())
    if spec.entrant.startswith("limit"):
        result["samples"] = spec.samples
    result["complete"] = result["samples"] == spec.samples and (not got or sorted(got) == marks)
    gaps = result.pop("gaps")
    result |= {"gap": statistics.median(gaps), "gap99": float(np.percentile(gaps, 99))} if gaps else {}
    speed = result["bytes"] / result["seconds"] / 1e6
    log(f"  {route} {spec.entrant} workers={spec.workers} connections={spec.connections}: {speed:.0f} MB/s, "
        f"{result['cpu'] / result['bytes'] * 1e9:.2f} CPU-s/GB, first {result['first']:.2f} s, "
        f"others took {result['others']:.0%} of the machine"
        f"{'' if result['complete'] else ', NOT COMPLETE'}")  # fmt: skip
    return head | result


def absent(names: list[str], peers: str) -> dict[str, str]:
    """Entrants that cannot be imported -> why."""
    found = {}
    for name in names:
        python = sys.executable if name in OURS else peers
        words = [python, "-c", f"import measured; measured.load({ENTRANTS[name][1]})"]
        done = subprocess.run(words, env=quiet(), cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            found[name] = done.stderr.strip().splitlines()[-1]
    return found


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entrants", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--kinds", nargs="+", choices=list(samples.KINDS), default=list(samples.KINDS))
    parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="loader processes")
    parser.add_argument("--connections", type=int, default=16, help="at once, of each reader (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of tensors, of the first kind")
    parser.add_argument("--quick", action="store_true", help="one round of 0.1 GB")
    peers = str(PEERS if PEERS.exists() else sys.executable)
    parser.add_argument("--peers-python", default=peers, help="an interpreter that has what peers.txt names")
    parser.add_argument("--json", type=Path, help="a file for every run's figures")
    options = parser.parse_args()
    if options.connections < 4:
        parser.error("--connections must be at least 4: the limits are measured with a quarter, half and all of them")
    if options.quick:
        options.rounds, options.gigabytes = 1, 0.1
    return options


def main() -> None:
    options = options_of()
    if "AWS_ENDPOINT_URL_S3" not in os.environ:
        from calotype.environment import load_services

        subprocess.run([sys.executable, "-m", "calotype", "up"], check=True, env=quiet())
        load_services()
    names = {turn[0] for kind in options.kinds for turn in turns(kind, options)}
    missing = absent(sorted(names), options.peers_python)
    for name, why in missing.items():
        log(f"without {name}: {why}")
    if missing:
        log("to have them: make peers")
    runs: list[dict[str, Any]] = []
    try:
        for kind in options.kinds:
            with closing(compare(kind, options, missing)) as found:
                for one in found:
                    runs.append(one)
    except KeyboardInterrupt:
        log("interrupted: what follows is of the runs that were made")
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1))
    print(table(runs))
    print(reach(runs, entrants.MEMORY))


if __name__ == "__main__":
    main()
