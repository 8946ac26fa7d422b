"""In what two encodings differ, by the names of the settings that decide it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`field (X in the cache, Y here)` for every field in which two encodings differ."""
    return [
        f"{name} ({shortly(old)} in the cache, {shortly(new)} here)" for name, old, new in differing(cached, wanted)
    ]


def shortly(value: Any) -> str:
    """Digests by their beginning, sizes by the first and the last."""
    if isinstance(value, list):
        ends = " to ".join(f"{width}x{height}" for width, height in (value[0], value[-1]))
        return f"{len(value)} sizes, {ends}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, of one, of the other) for every field in which two encodings differ."""
    old, new = flat(one), flat(other)
    return [(name, old.get(name, "nothing"), new.get(name, "nothing"))
            for name in sorted({**old, **new}) if old.get(name) != new.get(name)]  # fmt: skip


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of an encoding, by the names of the settings that decide them."""
    same = ("resolution", "mirrored", "dtype", "posterior", "batch", "precision", "compile")
    names = {name: name for name in same} | {"buckets": "bucket_step, encoding.bucket_aspect"}  # as users call them
    made: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}" if prefix or key not in names else f"encoding.{names[key]}"
        made.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return made
