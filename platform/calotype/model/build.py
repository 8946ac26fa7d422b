"""`_target_` -> object, through an allowlist: the only place where a config names code.

What a name resolves to is checked, not only how it is spelled: `diffusers.utils.os.system` begins well and ends badly.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from calotype.checks import TARGETS, check_targets
from calotype.errors import ConfigError


def instantiate(spec: Mapping[str, Any], **extra: Any) -> Any:
    """Build what `spec` describes.

    Args:
        spec: `_target_` and keyword arguments; arguments may be specs themselves, also inside lists and mappings.
        extra: more keyword arguments, used as they are; they win over those of `spec`.

    Raises:
        ConfigError: a target outside the allowlist, a key of Hydra's with a meaning (`_partial_`, `_args_` ...), or
            arguments that the class refuses.
    """
    check_targets(spec, "spec")
    if "_target_" not in spec:
        raise ConfigError("a spec without _target_ builds nothing: name a class, such as diffusers.AutoencoderKL")
    arguments = {key: _built(value) for key, value in spec.items() if key != "_target_"}
    return _call(spec["_target_"], {**arguments, **extra})


def checkpoint_activations(module: Any) -> None:
    """Keep the inputs of blocks for the backward pass, which computes the rest again (Chen et al. 2016)."""
    for part in module.modules():
        if hasattr(part, "enable_gradient_checkpointing"):  # diffusers' word for it
            part.enable_gradient_checkpointing()


def target(name: str) -> type:
    """The class that `name` means, if a config may name it.

    Raises:
        ConfigError: not found, or not a class of diffusers, transformers or torch.optim that a config may build.
    """
    check_targets({"_target_": name}, "spec")
    found = _resolve(name)
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(TARGETS):
        raise ConfigError(
            f"_target_={name!r} is not a class of {', '.join(TARGETS)}: name a model, config or optimizer"
        )
    if not issubclass(found, _kinds()):
        raise ConfigError(f"_target_={name!r} is not a model, config, scheduler or optimizer: it may not be built")
    return found


def _kinds() -> tuple[type, ...]:
    from diffusers import SchedulerMixin
    from torch import nn, optim
    from transformers import PretrainedConfig

    return nn.Module, PretrainedConfig, SchedulerMixin, optim.Optimizer


def _resolve(name: str) -> Any:
    """Walk `name` from its allowed package down, never through a private name or into another package."""
    prefix = next(prefix for prefix in TARGETS if name.startswith(prefix)).rstrip(".")
    found: Any = importlib.import_module(prefix)
    for part in name[len(prefix) + 1 :].split("."):
        if not part.isidentifier() or part.startswith("_"):
            raise ConfigError(f"_target_={name!r} is not allowed: {part!r} is not a public name")
        if not isinstance(found, ModuleType):
            raise ConfigError(
                f"_target_={name!r} is not allowed: {part!r} is inside a class, and only classes are built"
            )
        found = _member(found, part, name)
        if isinstance(found, ModuleType) and not f"{found.__name__}.".startswith(TARGETS):
            raise ConfigError(f"_target_={name!r} is not allowed: it leads to the module {found.__name__}")
    return found


def _member(module: ModuleType, part: str, name: str) -> Any:
    try:
        return getattr(module, part)
    except (AttributeError, ImportError, RuntimeError):
        pass  # lazy packages list few of their submodules: import this one
    try:
        return importlib.import_module(f"{module.__name__}.{part}")
    except Exception as error:
        raise ConfigError(f"_target_={name!r} is not found: {module.__name__} has no {part!r} ({error})") from None


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return instantiate(value)
        return {key: _built(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_built(item) for item in value]
    return value


def _call(name: str, arguments: Mapping[str, Any]) -> Any:
    for key in arguments:
        if key.startswith("_"):
            raise ConfigError(f"{key} beside _target_={name!r} is not allowed: give plain arguments only")
    cls = target(name)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} refuses its settings: {error}") from None
