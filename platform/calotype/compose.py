"""Hydra composes, once, where the user types; jobs, CLI and tests share this one way in.

A composed config is checked, becomes frozen dataclasses, travels as JSON, and has an identity: the digest of what
changes the computation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from calotype.checks import check
from calotype.config import JOBS, MISSING, Autoencoder, Data
from calotype.errors import CalotypeError, ConfigError
from calotype.sentences import one_sentence, unknown

T = TypeVar("T")

IDENTITY_VERSION = 1
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}  # of types, to a user
HERE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """`conf` or `jobs`: inside the package in a wheel, beside platform/ in a checkout."""
    return HERE / folder if (HERE / folder).exists() else HERE.parents[1] / folder


def compose(job: str, overrides: Sequence[str] = ()) -> Any:
    """Compose and check the config of `job`, as `python jobs/JOB.py OVERRIDES` would.

    Raises:
        ConfigError: unknown key or option, wrong type, missing value or impossible combination, in one sentence.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    store_schemas()
    try:
        return validated(job, _composed(job, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_sentence(error, shipped("conf"))) from None


def _composed(job: str, overrides: Sequence[str] = ()) -> Any:
    """What Hydra makes of it: a DictConfig, unchecked, in which some settings may be missing."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        return hydra_compose(job, list(overrides))


def hydra_main(job: str, body: Callable[[Callable[[], Any], list[str] | None], Any], argv: Sequence[str]) -> None:
    """Run `body(make, overrides)` under Hydra's own command line: `--cfg job`, `-m`, `--help`, shell completion.

    `make()` gives the checked config.  With -m the body is called once per combination, with that combination's
    overrides; otherwise with None.

    Raises:
        ConfigError: as `compose`; or a word is neither a setting nor a flag of Hydra.
        CalotypeError: the first one that the body raised.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    store_schemas()

    refused: list[CalotypeError] = []

    def run(node: Any) -> None:
        runtime = HydraConfig.get()
        overrides = list(runtime.overrides.task) if runtime.mode == RunMode.MULTIRUN else None
        try:
            body(lambda: validated(job, node), overrides)
        except CalotypeError as error:  # kept from Hydra, which has more to say
            refused.append(error)

    if {"-h", "--help"} & set(argv):
        print(explained(job))
        return
    argv0, sys.argv = sys.argv, [sys.argv[0], *_flags_last(argv)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, to be said in one sentence
    try:
        hydra.main(config_path=str(shipped("conf")), config_name=job, version_base="1.3")(run)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_sentence(error, shipped("conf"))) from None
    finally:
        sys.argv = argv0
    if refused:
        raise refused[0]


def _flags_last(argv: Sequence[str]) -> list[str]:
    """Flags may stand between overrides, which Hydra's parser wants in one block.

    Raises:
        ConfigError: one is not a flag.
    """
    from hydra._internal.utils import get_args_parser

    known = get_args_parser()._option_string_actions
    flags: list[str] = []
    words: list[str] = []
    valued = False
    for word in argv:
        name, _, value = word.partition("=")
        if name.startswith("--") and name not in (*known, "--"):
            setting = name.lstrip("-")
            meant = f": settings have no dashes, as in {setting}={value or '...'}" if "-" not in setting else ""
            raise ConfigError(f"{name} is not a flag{meant or ': --help lists them'}")
        (flags if word.startswith("-") or (valued and "=" not in word) else words).append(word)
        valued = word in known and known[word].nargs != 0
    return [*words, *flags]


def validated(job: str, node: Any) -> Any:
    """Composed DictConfig -> frozen, checked dataclass."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(f"{missing[0]} is missing: give {missing[0]}=...")
        config = build(JOBS[job], OmegaConf.to_container(node, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(one_sentence(error, shipped("conf"))) from None
    check(config)
    return anchored(config)


def anchored(config: Any) -> Any:
    """Folders that were named from where the user stands, as paths that mean the same in every process."""
    changes: dict[str, Any] = {"root": _absolute(config.root)}
    if hasattr(config, "autoencoder") and (path := config.autoencoder.path) and Path(path).is_dir():
        changes["autoencoder"] = dataclasses.replace(config.autoencoder, path=_absolute(path))
    return dataclasses.replace(config, **changes)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())


def explained(job: str) -> str:
    """Help for one job: its groups with their options, and every setting with its default and meaning."""
    cls = JOBS[job]
    lines = [f"{job}: {(cls.__doc__ or '').strip()}", "", "groups (choose with GROUP=OPTION):"]
    for folder in sorted(path for path in shipped("conf").iterdir() if path.is_dir() and path.name != "hydra"):
        options = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        chosen = [o.split("/")[-1] if o.endswith(f"/{job}") else o for o in options]
        if folder.name in (*(item.name for item in dataclasses.fields(cls)), "experiment", "debug"):
            lines.append(f"  {folder.name}: {', '.join(o for o, c in zip(options, chosen) if '/' not in o or c != o)}")
    lines += ["", "settings (override with NAME=VALUE; * is not part of the run's identity):"]
    lines += _settings(cls, "", _composed(job))
    flags = "--cfg job (print the config)  -m (one run per combination)  -sc install=bash (shell completion)"
    return "\n".join([*lines, "", f"flags: {flags}"])


def _settings(cls: Any, prefix: str, chosen: Any) -> list[str]:
    from omegaconf import OmegaConf

    lines = []
    for item, hint in _fields(cls):
        if dataclasses.is_dataclass(hint):
            lines += _settings(hint, f"{prefix}{item.name}.", chosen)
            continue
        default = item.default_factory() if callable(item.default_factory) else item.default
        if not isinstance(default, dict):
            default = OmegaConf.select(chosen, f"{prefix}{item.name}", default=default)
        mark = " " if item.metadata.get("identity", True) else "*"
        name = f"{prefix}{item.name}={'' if default in ('', MISSING) else default}"
        lines.append(f" {mark}{name:<44} {item.metadata['meaning']}")
        args = typing.get_args(hint)
        if args and dataclasses.is_dataclass(args[-1]):
            lines += _settings(args[-1], f"{prefix}{item.name}.NAME.", chosen)
    return lines


# ------------------------------------------------------------------------------ schemas for OmegaConf, data for us


@functools.cache
def store_schemas() -> None:
    """Register `schema/JOB` for every job, so that Hydra refuses unknown keys and wrong types as it composes."""
    from hydra.core.config_store import ConfigStore

    for job, cls in JOBS.items():
        ConfigStore.instance().store(group="schema", name=job, package="_global_", node=_mutable(cls))


def _mutable(cls: Any, seen: dict[Any, Any] = {}) -> Any:  # noqa: B006 (a cache)
    """The same dataclass without `frozen`: OmegaConf makes frozen ones read-only, even to overrides."""
    if not dataclasses.is_dataclass(cls):
        origin, args = typing.get_origin(cls), typing.get_args(cls)
        if origin is types.UnionType:
            return Any  # OmegaConf knows no union with a list: `_build` checks it
        return origin[tuple(_mutable(a) for a in args)] if origin is dict else cls
    if cls not in seen:
        fields: list[Any] = []
        for item, hint in _fields(cls):
            default = item.default_factory() if callable(item.default_factory) else item.default
            made = _mutable(hint)
            if dataclasses.is_dataclass(hint):
                fields.append((item.name, made, dataclasses.field(default_factory=made)))
            else:
                fields.append((item.name, made, dataclasses.field(default_factory=lambda d=default: d)))  # type: ignore[misc]
        seen[cls] = dataclasses.make_dataclass(typing.cast(type, cls).__name__, fields)
    return seen[cls]


def _fields(cls: Any) -> list[tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in dataclasses.fields(cls)]


def build(cls: type[T], data: Any) -> T:
    """Plain data (as from JSON) -> frozen dataclass; unknown keys and wrong types are refused by name."""
    return typing.cast(T, _build(cls, data, ""))


def _build(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where or 'config'} must be a group of settings, not {value!r}")
        fields = {item.name: kind for item, kind in _fields(hint)}
        for key in value:
            if key not in fields:
                raise ConfigError(unknown(f"{where}.{key}".lstrip("."), fields))
        made = {key: _build(fields[key], item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
        return hint(**made)  # type: ignore[operator]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {str(key): _build(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        if len(value) != len(args):
            raise ConfigError(f"{where}={value!r} must have {len(args)} values")
        return tuple(_build(a, v, where) for a, v in zip(args, value, strict=True))
    if origin is list:
        return [_build(args[0], item, where) for item in value]
    if origin is types.UnionType:
        return _build(next((a for a in args if isinstance(value, typing.get_origin(a) or a)), args[0]), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and not (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        raise ConfigError(f"{where}={value!r} must be {NAMES.get(hint, hint.__name__)}")
    return value


def as_data(config: Any) -> dict[str, Any]:
    """Frozen dataclass -> plain data that JSON holds and `build` reads back."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


# ------------------------------------------------------------------------------------------------ identity


def identity_fields(config: Any) -> dict[str, Any]:
    """The settings that change what a run computes and differ from their defaults.

    Left out defaults mean that a field added later never orphans an old run.
    """
    if isinstance(config, Data | Autoencoder) and config.digest:
        resolved = {"digest": config.digest}  # the content stands for how it came to be
        if isinstance(config, Data) and config.selection:
            resolved["selection"] = config.selection  # which of it counts: another filter is another run
        return resolved
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not item.metadata.get("identity", True):
            continue
        default = item.default_factory() if callable(item.default_factory) else item.default
        if dataclasses.is_dataclass(value):
            inner = identity_fields(value)
            if inner:
                found[item.name] = inner
        elif isinstance(value, dict) and any(dataclasses.is_dataclass(entry) for entry in value.values()):
            found[item.name] = {key: identity_fields(entry) for key, entry in value.items()}
        elif value != default or default == MISSING:
            found[item.name] = list(value) if isinstance(value, tuple) else value
    return found


def identity(job: str, config: Any) -> str:
    """32 hex digits naming what is computed: same identity, same run (it resumes, or is done)."""
    settings = identity_fields(config)
    if "train" in settings and config.optim.schedule == "constant":
        settings["train"].pop("images", None)  # a longer run continues the shorter one
        if not settings["train"]:
            del settings["train"]  # as if no length had been given
    return digest_of({"version": IDENTITY_VERSION, "job": job, "settings": settings})[:32]


def digest_of(data: Any) -> str:
    """sha256 of canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
