"""Submission: a checked config becomes a job on the cluster, by the REST interface of Ray's Jobs API.

Spoken directly, because it asks for no import of ray (seconds) on the machine that submits.  RAY_ADDRESS is the
http(s) address of the dashboard; RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names, opens it.

A job carries `platform/calotype`, `jobs/` and `conf/` of the checkout or wheel that submits it, and nothing else.
They lie at the root of its working directory (calotype/, jobs/, conf/), which Ray puts first on the path of the driver
and of every worker: an edited checkout runs its edits even where another Calotype is installed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import signal
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calotype import compose, console, provenance
from calotype.cluster import local
from calotype.errors import CalotypeError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
GRACE = 120  # seconds a cancelled job has for its last checkpoint, before Ray kills it
OUTAGE = 60.0  # seconds of silence of the cluster that following a job survives
POLL = 0.3
NAME = "calotype.name"  # among what Ray keeps with a submission
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as Ray and as a shell say it


class Unanswered(CalotypeError):
    """The cluster does not answer."""


def submit(job: str, identifier: str, resolved: str, name: str) -> str:
    """Run `jobs/JOB.py --resolved URI` on the cluster.

    Args:
        identifier: becomes the submission's id; Ray refuses one that exists, so a repeated call starts nothing twice.
        resolved: URI of the resolved config, as JSON.
        name: the run's, by which `named` finds the submission.

    Returns:
        The submission's id.
    """
    request = {
        "submission_id": identifier,
        "entrypoint": f"python {shlex.join([f'jobs/{job}.py', '--resolved', resolved])}",
        "runtime_env": {"working_dir": upload(), "env_vars": environment(identifier)},
        "metadata": {"calotype.job": job, NAME: name},
    }
    return str(_json("POST", "/api/jobs/", request)["submission_id"])


def environment(identifier: str) -> dict[str, str]:
    """What a job's processes are told; no secrets: Ray shows this to everybody who may see the job.

    Credentials are in the environment of the cluster's nodes.
    """
    return {
        "CALOTYPE_SUBMISSION": identifier,
        "CALOTYPE_COMMIT": provenance.commit(),
        console.LINES: "lines",
        "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE),
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }


def ps() -> list[list[str]]:
    """Submissions, newest last: id, name of its run, status, when started, seconds, message."""
    rows = []
    for info in _all():
        start, end = (info["start_time"] or 0) / 1000, (info["end_time"] or time.time() * 1000) / 1000
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(start))
        message = textwrap.shorten(_reason(info), 100) if info["status"] == "FAILED" else ""
        status = info["status"].lower()
        rows.append([info["submission_id"], _name(info), status, began, f"{end - start:.0f}", message])
    return rows


def named(word: str) -> str:
    """The newest submission of a run of that name, one that has not ended before others; else the word, an id."""
    known = _all()
    found = [info for info in known if _name(info) and _name(info) == word.removeprefix("run:")]
    found.sort(key=lambda info: info["status"] not in ENDED)
    if not found or word in [info["submission_id"] for info in known]:
        return word
    return str(found[-1]["submission_id"])


def logs(identifier: str) -> list[str]:
    """The log so far, as lines without their ends."""
    return _log(identifier).removesuffix("\n").split("\n")


def follow(identifier: str) -> None:
    """Print the log until the job ends; Ctrl-C stops the printing, not the job."""
    try:
        console.follow(_tail(identifier))
    except KeyboardInterrupt:
        raise CalotypeError(
            f"{identifier} goes on without you: `calotype logs -f {identifier}` follows it again, "
            f"`calotype cancel {identifier}` stops it"
        ) from None


def wait(identifier: str) -> str:
    """Until the job has ended: "" if it succeeded, else one sentence that says what happened."""
    while (info := _info(identifier))["status"] not in ENDED:
        time.sleep(POLL)
    if info["status"] == "SUCCEEDED":
        return ""
    return f"{identifier} was cancelled" if info["status"] == "STOPPED" else f"{identifier} failed: {_reason(info)}"


def cancel(identifier: str) -> str:
    """Ask the job to save and stop, and wait until it has; after GRACE seconds Ray kills it.

    Returns:
        How it ended: stopped, or (too late) succeeded or failed.
    """
    if _info(identifier)["status"] not in ENDED:
        _json("POST", f"/api/jobs/{urllib.parse.quote(identifier)}/stop")
        wait(identifier)
    return str(_info(identifier)["status"]).lower()


def _tail(identifier: str) -> Iterator[str]:
    """Lines as they come.

    The interface gives whole logs only (or a websocket that lags by seconds), so a long log is asked for less often.
    """
    shown = 0
    while True:
        ended = _info(identifier)["status"] in ENDED  # asked first: what comes after is all there is
        start = time.monotonic()
        lines = _surviving(lambda: _log(identifier)).split("\n")
        whole = lines if ended and lines[-1] else lines[:-1]  # the last may be half written
        yield from whole[shown:]
        shown = len(whole)
        if ended:
            return
        time.sleep(max(POLL, min(30.0, 20 * (time.monotonic() - start))))


def _all() -> list[Any]:
    """What Ray tells of every submission, newest last."""
    found = [info for info in _json("GET", "/api/jobs/") if info["submission_id"]]
    return sorted(found, key=lambda info: info["start_time"] or 0)


def _name(info: Any) -> str:
    return str((info.get("metadata") or {}).get(NAME, ""))


def _log(identifier: str) -> str:
    return str(_json("GET", f"/api/jobs/{urllib.parse.quote(identifier)}/logs")["logs"])


def _info(identifier: str) -> Any:
    return _surviving(lambda: _json("GET", f"/api/jobs/{urllib.parse.quote(identifier)}"))


def _surviving(ask: Any) -> Any:
    """Ask again for a while: a head that restarts or is busy does not end the following of a job."""
    deadline = time.monotonic() + OUTAGE
    while True:
        try:
            return ask()
        except Unanswered:
            if local.stopped():
                raise CalotypeError(
                    "the stack was stopped, and its jobs with it: `calotype up`, then the same command goes on"
                ) from None
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _reason(info: Any) -> str:
    """The last thing a failed job said; of one that was killed, that it was."""
    code = re.match(r"Job entrypoint command failed with exit code (-?\d+)", info.get("message") or "")
    if code and int(code[1]) in KILLED:
        return "its driver was killed, by somebody or for want of memory: the same command goes on"
    lines = [console.RAY_PREFIX.sub("", line).strip() for line in (info.get("message") or "").splitlines()]
    lines = [line for line in lines if line]
    said = [line.removeprefix("calotype: ") for line in lines if line.startswith("calotype: ")]
    return (said or lines or ["it left no message"])[-1]


# ---------------------------------------------------------------------------------------------------- shipping code


def upload() -> str:
    """Put this Calotype's code where the cluster's nodes fetch it; its URI.

    Named by content, so it is sent once; asked every time, because a head that was restarted has forgotten it.
    """
    data = package()
    name = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"
    try:
        _call("GET", f"/api/packages/gcs/{name}")  # also keeps it alive until the job refers to it
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise CalotypeError(_said(error)) from None
        _call("PUT", f"/api/packages/gcs/{name}", data)
    return f"gcs://{name}"


def package() -> bytes:
    """calotype/, jobs/ and conf/ as a zip; the same bytes for the same files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(_files()):
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _files() -> Iterator[tuple[str, Path]]:
    places = {"calotype": compose.HERE, "jobs": compose.shipped("jobs"), "conf": compose.shipped("conf")}
    for top, folder in places.items():
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            inside = top == "calotype" and parts[0] in ("jobs", "conf")  # where a wheel keeps them
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not inside and not hidden:
                yield "/".join([top, *parts]), path


# ----------------------------------------------------------------------------------------------------------- requests


def _json(method: str, path: str, data: Any = None) -> Any:
    try:
        return json.loads(_call(method, path, None if data is None else json.dumps(data).encode()) or b"null")
    except urllib.error.HTTPError as error:
        if error.code == 404 and path.startswith("/api/jobs/"):
            name = urllib.parse.unquote(path.split("/")[3])
            raise CalotypeError(f"no submission is called {name!r}: `calotype ps` lists them") from None
        raise CalotypeError(_said(error)) from None


def _call(method: str, path: str, data: bytes | None = None) -> bytes:
    """One request; raises HTTPError for an answer that is a refusal, Unanswered when there is none."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.startswith("http"):
        known = (
            f"RAY_ADDRESS={address} is not the http address of a Ray dashboard" if address else "no Ray is known here"
        )
        raise CalotypeError(f"{known}: run `calotype up`, or set RAY_ADDRESS to that of yours")
    headers = {"Content-Type": "application/octet-stream" if method == "PUT" else "application/json"}
    if token := _token():
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address.rstrip("/") + path, data, headers, method=method)
    local = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    try:
        with opener.open(request, timeout=60) as response:
            return bytes(response.read())
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        why = getattr(error, "reason", error)
        raise Unanswered(
            f"Ray does not answer at {address} ({why}): `calotype status` shows the embedded one"
        ) from None


def _token() -> str:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text().strip() if path.is_file() else ""


def _said(error: urllib.error.HTTPError) -> str:
    """A refusal in one sentence; Ray answers with tracebacks."""
    if error.code in (401, 403):
        return f"Ray at {os.environ.get('RAY_ADDRESS')} refuses the token ({error.code}): set RAY_AUTH_TOKEN to its own"
    lines = [line.strip() for line in error.read().decode(errors="replace").splitlines() if line.strip(" .")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return f"Ray refused ({error.code}): {(raised or lines or [error.reason])[-1]}"
