"""What Hydra and OmegaConf refuse, said in one sentence that names the setting and what to change."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection
from pathlib import Path

# How OmegaConf's messages name what a value should have been -> how we say it.
KINDS = (
    ("Integer", "a whole number"),
    ("Float", "a number"),
    ("bool", "true or false"),
    ("ListConfig", "a list, such as [a, b]"),
    ("to string", "a text"),
)


def one_sentence(error: BaseException, conf: Path) -> str:
    """One sentence for a `HydraException` or `OmegaConfBaseException`.

    Args:
        conf: the folder of the groups, to name the options of one.
    """
    if hasattr(error, "missing_cfg_file"):
        return no_option(str(error.missing_cfg_file), conf)
    if type(error).__name__ == "OverrideParseException":
        said = str(getattr(error, "override", ""))
        return f"{said!r} cannot be read: write NAME=VALUE, with a value that has spaces or brackets in quotes"
    if strange := re.match(r"In '(\S+?)/(\S+)': .*full_key: (\S+)", str(error), re.DOTALL):
        return "{}={} sets {}, which this job does not have: leave it out".format(*strange.groups())
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    message = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(error).__name__)
    if "is not in struct" in message:
        group, _, name = key.rpartition(".")
        if group == "conditions":
            return new_condition(name)
        return f"{key} is not given yet: {group} takes any argument of its class, added with +{key}=..."
    if " not in " in message and hasattr(cause, "object_type"):
        kind = cause.object_type
        known = [item.name for item in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        return unknown(key, known)
    if "not a subclass of Condition" in message:
        return new_condition(key)
    return wrong_type(key, message, getattr(cause, "value", None))


def unknown(key: str, known: Collection[str]) -> str:
    """A key that no schema has."""
    prefix, _, name = key.rpartition(".")
    dotted = f"{prefix}." if prefix else ""
    near = difflib.get_close_matches(name, [*known, *(() if prefix else ("experiment", "debug"))], n=1)
    advice = f"did you mean {dotted}{near[0]}? " if near else ""
    return f"{key} is not a setting: {advice}known are {', '.join(dotted + item for item in known)}"


def no_option(missing: str, conf: Path) -> str:
    """GROUP=OPTION where conf/GROUP/OPTION.yaml is not there, or a job that is not there."""
    group, _, option = missing.partition("/")
    folder = conf / group if option else conf
    options = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    if not option:
        return f"{missing!r} is not a job: choose one of {', '.join(name for name in options if '/' not in name)}"
    return f"{group}={option} is not there: choose one of {', '.join(options)}"


def new_condition(name: str) -> str:
    """Hydra cannot set one field of a condition that is not there yet."""
    example = f"+conditions.{name}={{kind: class, source: label, classes: 10}}"
    return f"conditions.{name} is new: give it whole, such as '{example}'"


def wrong_type(key: str, message: str, value: object) -> str:
    """A value that the schema's type does not take; OmegaConf's own words where we know no better."""
    if "is not Optional" in message:
        return f"{key}=null cannot be: give a value, or leave it out for its default"
    if "not a subclass of" in message:
        return f"{key}={value} cannot be: {key} is a group of settings, such as {key}.NAME=VALUE"
    for mark, kind in KINDS:
        if mark in message and ("convert" in message or "valid" in message.lower()):
            whole = isinstance(value, float) and kind == "a whole number" and value.is_integer()
            return f"{key}={value} must be {kind}" + (f": {value:.0f}" if whole else "")
    message = message.removeprefix("KeyError raised while resolving interpolation: ")
    return f"{key}: {message}" if key and key not in message else message
