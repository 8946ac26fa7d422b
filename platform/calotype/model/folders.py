"""Model folders, wherever they lie: a local folder, a hub id, or s3://.  No torch: submit looks into them too."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calotype.errors import ConfigError

PARTS = ("vae", "unet", "text_encoder", "tokenizer")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
                   "special_tokens_map.json", "added_tokens.json")  # fmt: skip


@contextmanager
def opened(path: str, part: str, setting: str) -> Iterator[Path]:
    """The local folder that holds `part` of the model at `path`, for as long as the context lasts.

    Args:
        path: a folder, a hub id (`org/name`), or s3://BUCKET/PREFIX; a component's own or a whole pipeline's.
        part: one of `PARTS`; its subfolder is used where there is one, as in a diffusers pipeline.
        setting: what the user set, for the error.

    Raises:
        ConfigError: no such folder, or the hub cannot be reached and has left nothing in its cache.
    """
    assert part in PARTS, part
    if "://" in path:
        from calotype.data.store import open_store

        with tempfile.TemporaryDirectory(prefix="calotype-model-") as scratch:
            store = open_store(path)
            if part in store.folders():  # a whole pipeline: its other components may be large
                store = store.at(part)
            store.download("", Path(scratch))
            yield _part(Path(scratch), part, path, setting)
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        yield _part(folder, part, path, setting)
    elif HUB_ID.fullmatch(path) and not path.startswith("."):
        yield _part(_from_hub(path, part, setting), part, path, setting)
    else:
        raise ConfigError(f"{setting}={path!r} is neither a folder here, nor a hub id (org/name), nor an s3:// URI")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; {} for a tokenizer's."""
    file = folder / "config.json"
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return dict(found)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, without precision variants; pickled weights are never read.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if not re.search(r"\.(fp16|bf16|non_ema)[.-]", file.name)]
    if not plain:
        raise ConfigError(f"{folder} has no .safetensors weights: convert them (pickled weights can run code, and are "
                          "never loaded)")  # fmt: skip
    return plain


def _part(folder: Path, part: str, path: str, setting: str) -> Path:
    inside = folder / part
    if inside.is_dir():
        return inside
    known = ("config.json",) if part != "tokenizer" else TOKENIZER_FILES
    if not any((folder / name).exists() for name in known):
        raise ConfigError(f"{setting}={path!r} holds no {part}: expected {known[0]} in it or in its subfolder {part}/")
    return folder


def _from_hub(name: str, part: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = TOKENIZER_FILES if part == "tokenizer" else ("config.json", "*.safetensors", "*.safetensors.index.json")
    patterns = [f"{folder}{file}" for folder in ("", f"{part}/") for file in wanted]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"{setting}={name!r} is not a folder here and cannot be fetched from the hub "
                          f"({type(error).__name__}): download it where there is a network and give its folder"
                          ) from None  # fmt: skip
