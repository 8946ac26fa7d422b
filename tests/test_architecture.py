"""The laws of the house that a machine can read: DESIGN L1 (one way, libraries in their rooms), L2, L9."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ROOT / "platform"

# A room may import rooms of its own floor and of the floors below.
FLOORS = (
    ("errors", "config", "checks", "compose", "environment", "console", "sentences", "outbox", "provenance"),
    ("data", "model", "train", "track", "runs", "pictures", "unsent", "machine", "listing", "caches", "registry"),
    ("tasks", "cluster", "cli", "sweep", "data_verbs", "cache_verbs", "plan_verb", "model_verbs", "demo", "__main__"),
    ("jobs", "hydra_plugins"),
)
# Narrower than floors: rooms of one floor that must not see each other.
NEVER = {
    "data": ("model", "train", "track", "runs"),
    "model": ("train", "track", "runs"),
    "track": ("model", "train"),
    "runs": ("model", "train"),
    "tasks": ("cluster", "cli", "demo"),  # L2: a body needs no Ray
    "cluster": ("tasks", "cli", "demo", "model", "train"),
    "jobs": ("data", "model", "train"),
}
# Library -> the only modules (or packages of modules) that may import it.
LIBRARIES = {
    "boto3": ("calotype.data.s3",),
    "botocore": ("calotype.data.s3",),
    "webdataset": ("calotype.data.shards",),
    "tarfile": ("calotype.data.tar",),
    "deepspeed": ("calotype.train.engine",),
    "ray": ("calotype.cluster",),
    "mlflow": ("calotype.track", "calotype.machine"),
    "hydra": ("calotype.compose", "hydra_plugins"),
}
LONG_FUNCTIONS = {"calotype.train.loop": ("run",)}  # the loop itself
MAX_ROOM, MAX_FUNCTION, MAX_JOB = 400, 60, 50

Sources = Mapping[str, str]  # module name -> source; a package is named NAME.__init__


# ------------------------------------------------------------------------------------------------ reading


def sources() -> dict[str, str]:
    found = {module_name(path, PLATFORM): path.read_text() for path in sorted(PLATFORM.rglob("*.py"))}
    return found | {f"jobs.{path.stem}": path.read_text() for path in sorted((ROOT / "jobs").glob("*.py"))}


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports(module: str, source: str) -> Iterator[str]:
    """Every module that `module` names in an import: at the top, in functions, relative, or by importlib."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _named_by_call(node, package)


def _named_by_call(node: ast.Call, package: list[str]) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
        dots = len(first.value) - len(first.value.lstrip("."))
        base = package[: len(package) - dots + 1] if dots else []
        yield ".".join([*base, first.value.lstrip(".")])


def edges(every: Sources) -> dict[str, set[str]]:
    """module -> modules of the repository that it imports."""
    known = {name.removesuffix(".__init__"): name for name in every}
    return {
        name: {known[target] for target in imports(name, source) if target in known} - {name}
        for name, source in every.items()
    }


def room(module: str) -> str:
    """calotype.data.store -> data; jobs.prepare -> jobs; calotype itself -> calotype."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if parts[0] == "calotype" and len(parts) > 1 else parts[0]


# ------------------------------------------------------------------------------------------------ the laws


def wrong_ways(every: Sources) -> list[str]:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    found = []
    for name, targets in edges(every).items():
        here = room(name)
        if here == "calotype":  # the package's own __init__: below everything
            found += [f"{name} -> {target}: the package itself imports no room" for target in targets]
            continue
        if here not in floor:
            found.append(f"{name}: room {here!r} is on no floor")
            continue
        for target in sorted(targets):
            there = room(target)
            if there == "calotype":
                continue
            if floor.get(there, 0) > floor[here] or there in NEVER.get(here, ()):
                found.append(f"{name} -> {target}: {here} may not import {there}")
    return found


def strangers(every: Sources) -> list[str]:
    found = []
    for name, source in every.items():
        plain = name.removesuffix(".__init__")
        for target in sorted(set(imports(name, source))):
            allowed = LIBRARIES.get(target.split(".")[0])
            if allowed and not any(plain == place or plain.startswith(f"{place}.") for place in allowed):
                found.append(f"{name} imports {target}: only {', '.join(allowed)} may")
    return found


def cycles(every: Sources) -> list[str]:
    graph = edges(every)
    done: set[str] = set()
    found: list[str] = []

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())
    return found


def too_long(every: Sources) -> list[str]:
    found = []
    for name, source in every.items():
        lines = len(source.splitlines())
        limit = MAX_JOB if room(name) == "jobs" else MAX_ROOM
        if lines > limit:
            found.append(f"{name} has {lines} lines, over {limit}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION and node.name not in LONG_FUNCTIONS.get(name, ()):
                    found.append(f"{name}.{node.name} has {length} lines, over {MAX_FUNCTION}")
    return found


def job_names(names: list[str]) -> list[str]:
    """`python jobs/x.py` puts jobs/ first on the path: a job named like a library would hide it."""
    from importlib.metadata import packages_distributions

    libraries = {*sys.stdlib_module_names, *packages_distributions()} - {"jobs"}
    return [name for name in names if name in libraries]


def misplaced(paths: list[str]) -> list[str]:
    """Paths of the repository that must not exist."""
    return [
        path
        for path in paths
        if path == "platform/__init__.py" or (path.startswith("tests/") and path.endswith("/__init__.py"))
    ]


# ------------------------------------------------------------------------------------------------ this repository


def test_imports_go_one_way() -> None:
    assert wrong_ways(sources()) == []


def test_libraries_stay_in_their_rooms() -> None:
    assert strangers(sources()) == []


def test_no_import_cycle() -> None:
    assert cycles(sources()) == []


def test_rooms_and_functions_stay_small() -> None:
    assert too_long(sources()) == []


def test_no_package_where_it_would_shadow() -> None:
    paths = [str(path.relative_to(ROOT)) for top in ("platform", "tests") for path in (ROOT / top).rglob("__init__.py")]
    assert misplaced(paths) == []


def test_no_job_hides_a_library() -> None:
    names = [path.stem for path in (ROOT / "jobs").glob("*.py")]
    assert names, "jobs/ is empty"
    assert job_names(names) == []


def test_one_config_and_one_job_file_per_job() -> None:
    from calotype.config import JOBS

    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(JOBS)
    assert {path.stem for path in (ROOT / "conf").glob("*.yaml")} == set(JOBS)


# ------------------------------------------------------------------------------------------------ each law can fail


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("calotype.data.stream", "from calotype.train import loop"),
        ("calotype.data.stream", "from ..train import loop"),
        ("calotype.data.stream", "def f():\n    import calotype.train.loop"),
        ("calotype.data.stream", "import importlib\nimportlib.import_module('calotype.train.loop')"),
        ("calotype.data.stream", "from importlib import import_module\nimport_module('..train.loop', __package__)"),
        ("calotype.data.stream", "__import__('calotype.train.loop')"),
        ("calotype.model.sampler", "import calotype.train.loop"),
        ("calotype.config", "from calotype.train.loop import x"),
        ("calotype.tasks.__init__", "from ..jobs import prepare\nfrom jobs import prepare"),
        ("jobs.sample", "from calotype.train.loop import x"),
        ("calotype.__init__", "from .train import loop"),
        ("calotype.attic", "import calotype.train.loop"),
    ],
)
def test_a_wrong_way_is_seen(module: str, source: str) -> None:
    every = {"calotype.train.loop": "", "calotype.train.__init__": "", "jobs.prepare": "", module: source}
    assert wrong_ways(every)


def test_the_right_way_is_not_refused() -> None:
    every = {"calotype.config": "", "calotype.data.store": "from calotype import config", "calotype.__init__": ""}
    assert wrong_ways(every | {"calotype.train.loop": "from ..data.store import x"}) == []


@pytest.mark.parametrize("library", sorted(LIBRARIES))
@pytest.mark.parametrize(
    "source", ["import {0}", "from {0}.x import y", "def f():\n    import {0}.z as q", "__import__('{0}')"]
)
def test_a_library_outside_its_room_is_seen(library: str, source: str) -> None:
    assert strangers({"calotype.tasks.sample": source.format(library)})
    home = LIBRARIES[library][0]
    assert strangers({home: source.format(library)}) == []


def test_a_cycle_is_seen_also_inside_functions() -> None:
    every = {"calotype.a": "import calotype.b", "calotype.b": "def f():\n    from . import c", "calotype.c": ""}
    assert cycles(every) == []
    assert cycles(every | {"calotype.c": "def g():\n    from calotype.a import x"})


def test_length_is_seen() -> None:
    body = "    x = 1\n" * MAX_FUNCTION
    assert too_long({"calotype.a": f"def f():\n{body}"})
    assert too_long({"calotype.train.loop": f"def helper():\n{body}"})
    assert too_long({"calotype.a": "x = 1\n" * (MAX_ROOM + 1)})
    assert too_long({"jobs.a": "x = 1\n" * (MAX_JOB + 1)})
    assert too_long({"calotype.a": "x = 1\n" * MAX_ROOM}) == []


def test_bad_names_and_places_are_seen() -> None:
    assert job_names(["ray", "json", "prepare"]) == ["ray", "json"]
    assert misplaced(["platform/__init__.py", "tests/data/__init__.py", "platform/calotype/__init__.py"]) == [
        "platform/__init__.py",
        "tests/data/__init__.py",
    ]


# ------------------------------------------------------------------------------------------------ L2: imports

BLOCKER = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
loaded = [name for name in {unwanted!r} if name in sys.modules]
assert not loaded, loaded
"""


def import_in_fresh_python(modules: list[str], blocked: list[str], unwanted: list[str]) -> str:
    """'' or what went wrong."""
    code = BLOCKER.format(blocked=set(blocked), modules=modules, unwanted=unwanted)
    done = subprocess.run([sys.executable, "-c", code], cwd=PLATFORM, capture_output=True, text=True, timeout=120)
    return done.stderr.strip()[-2000:] if done.returncode else ""


def modules_of(*rooms: str) -> list[str]:
    names = [name.removesuffix(".__init__") for name in sources() if not name.endswith("__main__")]
    return [name for name in names if name.startswith("calotype") and (not rooms or room(name) in rooms)]


def test_the_core_imports_without_ray_deepspeed_and_mlflow() -> None:
    assert import_in_fresh_python(modules_of(), ["ray", "deepspeed", "mlflow"], []) == ""


def test_submitting_imports_no_torch() -> None:
    light = modules_of("errors", "config", "checks", "compose", "environment", "console", "runs", "tasks", "cli")
    assert "calotype.compose" in light
    assert import_in_fresh_python(light, [], ["torch", "diffusers", "transformers", "deepspeed", "ray", "mlflow"]) == ""


def test_a_blocked_import_is_seen() -> None:
    assert "json is blocked" in import_in_fresh_python(["calotype.compose"], ["json"], [])
    assert "AssertionError" in import_in_fresh_python(["calotype.compose"], [], ["json"])
