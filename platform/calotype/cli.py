"""The verbs of `calotype`, and how a file in jobs/ runs; thin: every verb calls one function of a room."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calotype import (
    __version__,
    cache_verbs,
    compose,
    console,
    data_verbs,
    listing,
    model_verbs,
    plan_verb,
    runs,
    track,
)
from calotype.config import JOBS
from calotype.data.store import open_store
from calotype.environment import home, load_services
from calotype.errors import CalotypeError
from calotype.sweep import Child, Sweep

Run = Callable[[Any, runs.Record, track.Tracker], dict[str, Any]]
Resolve = Callable[[Any], Any]


# ------------------------------------------------------------------------------------------------ one job


def job_main(job: str, resolve: Resolve, run: Run) -> None:
    """What `python jobs/JOB.py` does: compose, check, resolve, run here; `--resolved URI` runs what was submitted."""
    argv = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("calotype").setLevel(logging.INFO)
    with said_in_one_sentence():
        load_services()
        if argv[:1] == ["--resolved"]:
            folder, _, key = argv[1].rpartition("/")
            data = json.loads(open_store(folder).read(key))
            execute(job, compose.build(JOBS[job], data), run)
            return

        def body(child: Child, config: Any) -> None:
            child.config = resolved = resolve(config)
            if not _already_done(job, resolved):
                execute(job, resolved, run)
                _bring(job, resolved)
            child.state = "finished"

        with Sweep(job) as sweep:
            compose.hydra_main(job, lambda make, overrides: sweep.run(make, overrides, body), argv)


def execute(job: str, config: Any, run: Run) -> dict[str, Any]:
    """Open the run's record, run the body, publish its result.

    Returns:
        The figures.

    Raises:
        CalotypeError: it failed, or it was asked to stop before its end; then nothing is published.
    """
    start = time.monotonic()
    record = runs.begin(job, config, lambda identity: track.create_run(config, job, identity), track.discard_run)
    with runs.attempt_of(record) as publish, track.open_run(config, record) as tracker:
        result = run(config, record, tracker)
        if finished := bool(result):
            result["seconds"] = round(time.monotonic() - start, 1)
            publish(result)
            tracker.figures(result)
    if not finished:
        raise CalotypeError(f"{job} {record.name} was stopped at a checkpoint: the same command goes on from there")
    listing.show_result(record, result)
    return result


def _already_done(job: str, config: Any) -> bool:
    record = runs.done(job, config)
    if record is not None:
        runs.call(record, config.name)
        track.settle(record)
        result = record.result()
        also = f", first called {record.name}" if record.name != config.name else ""
        if hasattr(config, "train") and result["images"] >= config.train.images + config.train.batch:
            also += f"; it went on to {result['images']:,} images"
        print(f"{job} {config.name}: finished already, nothing to do (run {record.identity[:8]}{also})")
        listing.show_result(record, result)
        _bring(job, config)
    return record is not None


def _bring(job: str, config: Any) -> None:
    """`out=FOLDER` of a resolved sample: its pictures, where the user stands."""
    if out := getattr(config, "out", ""):
        record = runs.load(config.root, compose.identity(job, config))
        assert record is not None
        try:
            runs.fetch(record, "samples", out)
        except OSError as error:
            raise CalotypeError(f"out={out} cannot be written ({error.strerror}): name another folder") from None
        print(f"look at {shlex.quote(str(Path(out) / 'grid.png'))}")
    elif job == "sample":
        print("the same command with out=FOLDER copies the pictures here")


@contextlib.contextmanager
def said_in_one_sentence() -> Iterator[None]:
    """A CalotypeError becomes one line on stderr and exit code 1."""
    try:
        yield
    except CalotypeError as error:
        print(f"calotype: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:  # `calotype logs ID | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("calotype: interrupted", file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------- submission


def job_module(job: str) -> Any:
    """The file jobs/JOB.py as a module: its `resolve` and `run`."""
    path = compose.shipped("jobs") / f"{job}.py"
    spec = importlib.util.spec_from_file_location(f"calotype_job_{job}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def submit_config(job: str, config: Any) -> str | None:
    """Resolve and submit one checked config; the submission's id, or None when it is finished already."""
    return submit_resolved(job, resolve(job, config))


def resolve(job: str, config: Any) -> Any:
    """A checked config, with names become digests by what is there now.

    Raises:
        CalotypeError: an input is missing, or it is not for a cluster.
    """
    from calotype.cluster import local

    if config.cluster.kind == "local":
        raise CalotypeError(f"cluster=local is not submitted: run `python jobs/{job}.py` with the same settings")
    local.check_up(home(), config.root)
    return job_module(job).resolve(config)


def submit_resolved(job: str, resolved: Any) -> str | None:
    """As `submit_config`.

    Raises:
        CalotypeError: the same run is alive.
    """
    from calotype.cluster import jobs

    if _already_done(job, resolved):
        return None
    identity = compose.identity(job, resolved)
    record = runs.load(resolved.root, identity)
    attempt = 1
    if record is not None:
        attempt = runs.last_attempt(record.store) + 1
        if attempt > 1 and (who := runs.alive(record, attempt - 1)):
            raise CalotypeError(
                f"{job} {resolved.name} is running already on {who} (attempt {attempt - 1}): "
                "`calotype ps` shows its id, `calotype logs -f ID` follows it"
            )
        if record.name != resolved.name:
            print(
                f"{job} {resolved.name}: the settings are those of {record.name}, which goes on and gets this name too"
            )
    store = open_store(resolved.root).at("runs", identity)
    key = f"submitted/{attempt:04d}-{os.urandom(3).hex()}.json"
    store.write(key, json.dumps(compose.as_data(resolved), indent=1).encode())
    return jobs.submit(job, f"{job}-{identity[:8]}-{key[10:21]}", f"{store.uri}/{key}", resolved.name)


def submit(argv: Sequence[str]) -> int:
    """`calotype submit JOB [overrides...]`: Hydra's flags work here too."""
    from calotype.cluster import jobs

    wait = "--no-wait" not in argv
    argv = [word for word in argv if word != "--no-wait"]
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in JOBS:
        print(SUBMIT_HELP, file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
        if argv and argv[0] not in ("-h", "--help", *JOBS):
            raise CalotypeError(f"{argv[0]!r} is not a job: choose one of {', '.join(JOBS)}")
        return 0 if argv else 2
    job = argv[0]
    submitted: dict[str, Child] = {}

    def body(child: Child, config: Any) -> None:
        child.config = resolved = resolve(job, config)
        if identifier := submit_resolved(job, resolved):
            submitted[identifier] = child
            print(f"submitted {identifier}", flush=True)
        child.state = "submitted" if identifier else "finished"

    with Sweep(job) as sweep:
        compose.hydra_main(job, lambda make, overrides: sweep.run(make, overrides, body), argv[1:])
        if wait and len(submitted) == 1:
            jobs.follow(*submitted)
        for identifier, child in submitted.items() if wait else ():
            try:
                child.error = jobs.wait(identifier)
                child.state = "failed" if child.error else "finished"
                if not child.error:
                    _bring(job, child.config)
            except CalotypeError as error:  # the others go on
                child.error = str(error)
    return 0


SUBMIT_HELP = f"""usage: calotype submit JOB [--no-wait] [OVERRIDES...] [HYDRA FLAGS]

Compose the job's config here, check it, and run it on the cluster; its log follows until it ends (Ctrl-C leaves it
running).  The same command again continues the run, or does nothing when it is done.

jobs:   {", ".join(JOBS)}
flags:  --cfg job      print the composed config and stop       -m a=1,2 b=3,4   one job per combination
        --no-wait      return as soon as it is submitted        --help           (after JOB) its groups and settings

example: calotype submit train_denoiser autoencoder.path=run:mine denoiser=unet_tiny train.images=200000"""


# -------------------------------------------------------------------------------------------------- verbs


def show_runs(args: argparse.Namespace) -> int:
    """`calotype runs [show NAME] [--json]`."""
    from calotype.cluster import local

    local.check_up(home(), args.root)
    listing.show_runs(args.root, args.name.removeprefix("run:"), args.json)
    return 0


def show_status(args: argparse.Namespace) -> int:
    from calotype.cluster import local

    rows = local.status(home())
    console.table("stack", ["service", "URL", "health", "pid", "detail"], rows)
    return 0 if all(row[2] in ("up", "outside") for row in rows) else 1


def start_stack(args: argparse.Namespace) -> int:
    from calotype.cluster import local

    local.up(home())
    load_services()
    return show_status(args)


def stop_stack(args: argparse.Namespace) -> int:
    from calotype.cluster import local

    stopped = local.down(home())
    print(f"stopped {', '.join(stopped)}; what they hold stays" if stopped else "nothing of it is running")
    return 0


def show_submissions(args: argparse.Namespace) -> int:
    from calotype.cluster import jobs

    console.table("submissions", ["id", "run", "status", "started", "seconds", "message"], jobs.ps())
    return 0


def show_logs(args: argparse.Namespace) -> int:
    from calotype.cluster import jobs

    identifier = jobs.named(args.id)
    if args.follow:
        jobs.follow(identifier)
        if message := jobs.wait(identifier):
            raise CalotypeError(message)
        return 0
    console.follow(jobs.logs(identifier))
    return 0


def cancel(args: argparse.Namespace) -> int:
    from calotype.cluster import jobs

    if (ended := jobs.cancel(args.id)) == "stopped":
        print(f"{args.id} is stopped; what it had is kept, and the same command goes on")
    else:
        print(f"{args.id} had {ended} already: nothing to stop")
    return 0


def demo(args: argparse.Namespace) -> int:
    from calotype.demo import run_demo

    return run_demo(args.root, submit_config)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="calotype",
        description="Train latent diffusion models, from a laptop to a cluster.",
        epilog="Begin with `calotype demo`.  Services of your own instead of the embedded ones: set AWS_*, "
        "MLFLOW_TRACKING_URI, RAY_ADDRESS.",
    )
    top.add_argument("--version", action="version", version=f"calotype {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, what: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=what, description=what)
        made.set_defaults(call=run)
        return made

    def root(made: argparse.ArgumentParser) -> None:
        made.add_argument("--root", default="s3://calotype", help="where runs live (default %(default)s)")

    verb("up", "start the embedded S3, MLflow and Ray on this machine, or repair them", start_stack)
    verb("status", "show the services, their URLs and health", show_status)
    verb("down", "stop the embedded services; what they hold stays", stop_stack)
    verbs.add_parser("submit", help="run a job on the cluster: calotype submit JOB [overrides...]", add_help=False)
    verbs.add_parser("plan", help="what a job will take: calotype plan JOB [overrides...]", add_help=False)
    verb("ps", "list submissions", show_submissions)
    logs = verb("logs", "print the log of a submission", show_logs)
    logs.add_argument("id", metavar="ID", help="of the submission, or the name of a run: its newest")
    logs.add_argument("-f", "--follow", action="store_true", help="until it ends; exits as the job did")
    verb("cancel", "stop a submission after a last checkpoint", cancel).add_argument("id", metavar="ID")
    listed = verb("runs", "list runs: calotype runs; one of them: calotype runs show NAME", show_runs)
    listed.add_argument("show", nargs="?", choices=["show"], help="show one run instead of the list")
    listed.add_argument("name", nargs="?", default="", help="name or identity")
    listed.add_argument("--json", action="store_true", help="for programs")
    root(listed)
    data_verbs.add_to(verbs)
    cache_verbs.add_to(verbs)
    model_verbs.add_to(verbs)
    root(verb("demo", "everything once, on this machine: digits, drawn from text", demo))
    return top


def main() -> None:
    """Entry point of the `calotype` command."""
    with said_in_one_sentence():
        load_services()
        if sys.argv[1:2] in (["submit"], ["plan"]):
            sys.exit((submit if sys.argv[1] == "submit" else plan_verb.plan)(sys.argv[2:]))
        args = parser().parse_args(sys.argv[1:] or ["--help"])
        sys.exit(args.call(args))


if __name__ == "__main__":
    main()
