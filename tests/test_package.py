"""The wheel, installed elsewhere, and the checkout, edited and not installed: each finds its own conf and jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with what is installed here: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds the wheel; its dependencies are lent by this one.

    The lent folder comes last on the path and without its .pth files, so an editable Calotype there stays unseen.
    """
    folder = tmp_path_factory.mktemp("elsewhere with a space") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
        timeout=200,
    )
    (purelib / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CALOTYPE_HOME")}
    return subprocess.run([str(python), *words], cwd=cwd, env=kept, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_what_the_checkout_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        requires = archive.read(metadata).decode()
    for folder in ("conf", "jobs"):
        every = {f"calotype/{folder}/{path.relative_to(ROOT / folder)}" for path in kept(ROOT / folder)}
        assert every == {name for name in names if name.startswith(f"calotype/{folder}/")}
    source = {str(path.relative_to(ROOT / "platform")) for path in kept(ROOT / "platform" / "calotype")}
    assert source <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "infra", "platform", "jobs", "conf")]
    core = [line for line in requires.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in core if line.split()[1].startswith(("ray", "mlflow", "deepspeed"))], "those are extras"


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_an_installed_wheel_composes_from_any_directory(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "-c", "import calotype; print(calotype.__file__)", cwd=tmp_path)
    assert str(installed.parent.parent) in where.stdout, "the wheel is what is imported, not the checkout"
    module = run(installed, "-m", "calotype", "submit", "train_denoiser", "--cfg", "job", cwd=tmp_path)
    assert module.returncode == 0, module.stderr
    assert "block_out_channels" in module.stdout
    assert "_target_: diffusers.UNet2DConditionModel" in module.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is written where the user stands"


def test_an_installed_wheel_finds_its_jobs(installed: Path, tmp_path: Path) -> None:
    say = "from calotype.compose import shipped; print(shipped('conf')); print(shipped('jobs'))"
    conf, jobs = map(Path, run(installed, "-c", say, cwd=tmp_path).stdout.split("\n")[:2])
    assert conf.is_relative_to(installed.parent.parent)
    assert (jobs / "train_denoiser.py").is_file()
    direct = run(installed, str(jobs / "prepare.py"), "--cfg", "job", "data=digits", cwd=tmp_path)
    assert direct.returncode == 0, direct.stderr
    assert "name: digits" in direct.stdout


def test_the_console_script_is_installed(installed: Path, tmp_path: Path) -> None:
    script = installed.parent / "calotype"
    said = run(installed, str(script), "--version", cwd=tmp_path)
    assert said.stdout.startswith("calotype 0."), said.stderr


def test_a_checkout_finds_its_own_conf() -> None:
    from calotype.compose import shipped

    assert shipped("conf") == ROOT / "conf"
    assert shipped("jobs") == ROOT / "jobs"


def test_an_editable_install_is_the_checkout(tmp_path: Path) -> None:
    """`pip install -e .` puts platform/ on the path: an edit is seen, and Python's own `platform` is not hidden."""
    folder = tmp_path / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    lent = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)})) / "lent.pth"
    lent.write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*command, "--no-build-isolation", "--editable", str(ROOT)], check=True, timeout=200)
    say = "import calotype, platform; print(calotype.__file__); print(platform.python_version())"
    done = run(python, "-c", say, cwd=tmp_path)
    assert done.stdout.split("\n")[0] == str(ROOT / "platform" / "calotype" / "__init__.py"), done.stderr
