"""Make `.venv` and install the pinned dependencies and this checkout into it: `make` calls it before every target.

Runs under the machine's own Python, with the standard library alone.  A stamp of everything that matters makes a
repeat instant; a mark that lies there while it works makes the next run start afresh after an interruption.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "calotype.log"
STAMP, UNFINISHED = VENV / "calotype.stamp", VENV / "calotype.unfinished"
CONSTRAINTS = ROOT / "constraints.txt"
# Where PyTorch publishes builds without CUDA; asked only if the machine's own pip knows no such build.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Install if needed.

    Returns: exit status; 1 after one sentence on stderr.
    """
    try:
        with CONSTRAINTS.open() as lock:
            alone(lock)
            if not (works() and STAMP.exists() and STAMP.read_text() == wanted()):
                install()
    except KeyboardInterrupt:
        print("\nInterrupted: run make again and it starts afresh.", file=sys.stderr)
        return 130
    except (subprocess.CalledProcessError, OSError) as error:
        said = f"Installation stopped ({error}); .venv/calotype.log has it all. Then run make again."
        print(tail(), said, sep="\n", file=sys.stderr)
        return 1
    return 0


def alone(lock: IO[str]) -> None:
    """Of two makes at once, the second waits here, and then finds it done."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another make is installing into .venv: waiting for it.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def install() -> None:
    """Build `.venv`, again from nothing if a run before this one was interrupted."""
    broken = VENV.exists() and (UNFINISHED.exists() or not works())
    print(
        f"{'Repairing' if broken else 'Preparing'} .venv with Python {platform.python_version()}; "
        "the first time takes a few minutes.",
        flush=True,
    )
    if broken:
        shutil.rmtree(VENV)
    if not VENV.exists():
        VENV.mkdir()
        UNFINISHED.touch()
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    torch()
    pip("--editable", ".[all,dev]")
    STAMP.write_text(wanted())
    UNFINISHED.unlink()
    print("Installed: `.venv/bin/calotype --help`, or `make demo`.", flush=True)


def torch() -> None:
    """PyTorch, first and pinned: without a GPU the CPU build, which the plain requirement is not on Linux.

    The CPU build is called `VERSION+cpu` and satisfies the pin.  Looked for where the machine's pip looks (a mirror, a
    folder of wheels), then at PyTorch's own index; only then is the plain build taken, some GB of CUDA included.
    """
    pin = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    for arguments in torch_choices(pin, system=platform.system(), gpu=has_gpu()):
        if pip(*arguments, check=False):
            return
    raise subprocess.CalledProcessError(1, f"pip install {pin}")


def torch_choices(pin: str, *, system: str, gpu: bool) -> Iterator[list[str]]:
    """Arguments of `pip install`, best first."""
    if system == "Linux" and not gpu:
        yield [f"{pin}+cpu"]
        yield [f"{pin}+cpu", "--extra-index-url", CPU_INDEX]
        print(f"No CPU build of {pin} was found: taking the plain one.", flush=True)
    yield [pin]


def has_gpu() -> bool:
    """Is there an NVIDIA driver here?"""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def pip(*arguments: str, check: bool = True) -> bool:
    """`pip install` under the pins, build requirements too; its long output goes to LOG, one moving line to a terminal.

    Returns: whether it succeeded, if not `check`.
    """
    pins = CONSTRAINTS.as_uri()  # as a URI: pip splits a path with a space
    # The newer pip has a name of its own for the pins of build requirements.
    held = {**os.environ, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=held,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            log.write(line)
            if sys.stdout.isatty() and line.startswith(("Collecting", "  Downloading", "Installing", "Building")):
                print(f"\r\033[K  {line.strip()[:70]}", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    if running.returncode and check:
        raise subprocess.CalledProcessError(running.returncode, command)
    return running.returncode == 0


def tail() -> str:
    """The end of what pip said."""
    return "\n".join(LOG.read_text().splitlines()[-15:]) if LOG.exists() else ""


def works() -> bool:
    """Does `.venv` hold a Python that starts and has pip?"""
    try:
        return subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def wanted() -> str:
    """Digest of what `.venv` should be: the pins, the requirements, this script, where the checkout lies."""
    parts = [(ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml", "infra/install.py")]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode(), str(has_gpu()).encode()])).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
