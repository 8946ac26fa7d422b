"""Names for weights: digests of what an encoder half, a text encoder or a tokenizer computes.  No torch.

Tensors are digested by name, shape and float32 value, so that the file they come from, its order and its tool do not
matter; weights kept in half precision have the digest of the same values in single precision.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calotype.compose import digest_of
from calotype.config import Condition
from calotype.errors import ConfigError
from calotype.model.folders import TOKENIZER_FILES, opened, read_config, weight_files

SMALL = Path(__file__).parent / "tokenizer"
FORMAT = "calotype.weights/1"

# What of an AutoencoderKL's config its encoder half depends on, with diffusers' defaults (old folders leave some out).
ENCODER_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "mid_block_add_attention": True,
}
ENCODER_HALF = ("encoder.", "quant_conv.")
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def encoder_digest(source: str | Path | Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """Digest of the encoder half of an AutoencoderKL: a fine-tuned decoder keeps its caches valid.

    Args:
        source: path of a diffusers folder (anything that `folders.opened` opens), or a state: name -> array or tensor.
        config: the autoencoder's config; read from the folder if left out.
    """
    if isinstance(source, Mapping):
        assert config is not None, "a state needs its config"
        return _autoencoder_digest(((name, _array(value)) for name, value in source.items()), config)
    with opened(str(source), "vae", "autoencoder.path") as folder:
        return _autoencoder_digest(tensors(weight_files(folder), ENCODER_HALF), config or read_config(folder))


def autoencoder_shape(path: str | Path) -> tuple[int, int]:
    """(f, channels) of the autoencoder in a diffusers folder.

    Raises:
        ConfigError: not an AutoencoderKL.
    """
    with opened(str(path), "vae", "autoencoder.path") as folder:
        config = read_config(folder)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise ConfigError(f"autoencoder.path={str(path)!r} holds a {config.get('_class_name')}: only AutoencoderKL is "
                          "read")  # fmt: skip
    return 2 ** (len(config["block_out_channels"]) - 1), int(config["latent_channels"])


def condition_digest(condition: Condition) -> str:
    """Digest of what turns a caption into cached numbers: the tokenizer, and the frozen encoder if there is one.

    A jointly trained encoder is not part of it, nor is anything for labels: "".
    """
    if condition.source != "text":
        return ""
    found = {"format": FORMAT, "tokenizer": tokenizer_digest(condition.tokenizer)}
    if condition.mode != "tokens":
        found["encoder"] = text_encoder_digest(condition.path)
    return digest_of(found)


def tokenizer_digest(tokenizer: str) -> str:
    """Digest of the files of a tokenizer: `small`, or any folder that `folders.opened` opens."""
    if tokenizer == "small":
        return _files_digest(SMALL)
    with opened(tokenizer, "tokenizer", "conditions.*.tokenizer") as folder:
        return _files_digest(folder)


def text_encoder_digest(path: str) -> str:
    """Digest of a frozen text encoder: its text half and config."""
    with opened(path, "text_encoder", "conditions.*.path") as folder:
        config = read_config(folder)
        kept = {
            key: value for key, value in config.items() if not key.startswith(("_", "transformers_", "torch_", "dtype"))
        }
        half = (
            item for item in tensors(weight_files(folder)) if not item[0].startswith(("vision_", "visual_", "decoder."))
        )
        return _digest(half, kept)


def text_width(path: str) -> int:
    """Width D of the embeddings of a frozen text encoder."""
    with opened(path, "text_encoder", "conditions.*.path") as folder:
        config = read_config(folder)
    width = config.get("hidden_size") or config.get("d_model") or config.get("text_config", {}).get("hidden_size")
    if not width:
        raise ConfigError(f"conditions.*.path={path!r} does not say its hidden_size: it is not a text encoder")
    return int(width)


def tensors(files: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, float32 values) of the tensors in safetensors files, read here because numpy has no bfloat16."""
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            base = stream.tell()
            for name, entry in header.items():
                if name == "__metadata__" or not name.startswith(prefixes):
                    continue
                begin, end = entry["data_offsets"]
                stream.seek(base + begin)
                if entry["dtype"] not in DTYPES:
                    raise ConfigError(f"{file}: {name} is {entry['dtype']}, which is not read: store float weights")
                flat = np.frombuffer(stream.read(end - begin), DTYPES[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    flat = (flat.astype(np.uint32) << 16).view(np.float32)
                yield name, flat.astype(np.float32).reshape(entry["shape"])


def _array(value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float32)


def _autoencoder_digest(pairs: Iterable[tuple[str, np.ndarray[Any, Any]]], config: Mapping[str, Any]) -> str:
    kept = {key: config.get(key, default) for key, default in ENCODER_CONFIG.items()}
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
    half = [(name, value) for name, value in pairs if name.startswith(ENCODER_HALF)]
    if not half:
        raise ConfigError("these weights have no encoder: they are not those of an AutoencoderKL")
    return _digest(half, kept)


def _digest(pairs: Iterable[tuple[str, np.ndarray[Any, Any]]], config: Mapping[str, Any]) -> str:
    found: dict[str, str] = {}
    for name, value in pairs:
        name = re.sub("|".join(map(re.escape, OLD_NAMES)), lambda match: OLD_NAMES[match[0]], name)
        shape = [size for size in value.shape if size != 1]  # 1x1 convolutions became linear layers in newer versions
        data = np.ascontiguousarray(value, "<f4")
        found[name] = hashlib.sha256(json.dumps(shape).encode() + data.tobytes()).hexdigest()
    return digest_of({"format": FORMAT, "config": dict(config), "tensors": found})


def _files_digest(folder: Path) -> str:
    """tokenizer.json, where there is one, says everything; else the files it is made from."""
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    vocabulary = [name for name in names if not name.endswith(("_config.json", "_map.json"))]
    chosen = ["tokenizer.json"] if "tokenizer.json" in vocabulary else vocabulary
    if not chosen:
        raise ConfigError(
            f"{folder} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)}): set conditions.NAME.tokenizer to a "
            "folder that does, or to small"
        )
    return digest_of({name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in chosen})
