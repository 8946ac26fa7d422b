"""One batch of a source shard -> one batch of a latent shard: decode, encode, narrow, conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calotype.config import CacheLatents, Condition
from calotype.data import cache, images
from calotype.data.shards import Sample
from calotype.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def decoded(batch: Sequence[Sample], config: CacheLatents) -> list[images.Picture]:
    size, limit = config.encoding.resolution, config.data.max_pixels
    return [images.decode(images.image_bytes(sample), size, f"sample {sample.key}", limit) for sample in batch]


def encoded(
    model: Any, pictures: Sequence[images.Picture], config: CacheLatents, device: str
) -> tuple[Tensor, Tensor | None]:
    """One encoder call of exactly `encoding.batch` images: no autotuning, no TF32, no dependence on neighbours."""
    import torch

    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        mean, std = model.encode(images.signed(pixels), batch=config.encoding.batch)
    return mean.cpu(), None if std is None else std.cpu()


def stored(
    batch: Sequence[Sample],
    pictures: Sequence[images.Picture],
    raw: tuple[Tensor, Tensor | None],
    config: CacheLatents,
    device: str,
) -> tuple[list[Sample], int]:
    """Source samples and their raw latents -> samples of the latent shard, and how many captions were cut."""
    mean, std = raw
    gaussian = std is not None and config.encoding.posterior == "gaussian"
    both = np.stack([mean.numpy(), std.numpy()] if gaussian and std is not None else [mean.numpy()], axis=1)
    abouts = [_about(sample, picture) for sample, picture in zip(batch, pictures, strict=True)]
    values, cut = _conditions(batch, abouts, config.conditions, device)
    made = []
    for index, (sample, about) in enumerate(zip(batch, abouts, strict=True)):
        latent = narrowed(both[index], config.encoding.dtype, sample.key)
        arrays = {name: array[index] for name, array in values.items()}
        made.append(cache.encode_sample(sample, latent, arrays, about))
    return made, cut


def narrowed(latent: np.ndarray[Any, Any], dtype: str, key: str) -> np.ndarray[Any, Any]:
    """float32 -> `dtype`; what is not finite, or would not be, is refused by name."""
    if not np.isfinite(latent).all():
        raise DataError(f"the latent of sample {key} is not finite: the autoencoder's weights are broken")
    with np.errstate(over="ignore"):
        made = latent.astype(dtype)
    if not np.isfinite(made).all():
        raise DataError(f"the latent of sample {key} reaches {np.abs(latent).max():.4g}, more than {dtype} holds: "
                        "set encoding.dtype=float32")  # fmt: skip
    return made


def _about(sample: Sample, picture: images.Picture) -> dict[str, Any]:
    """What goes into `json`: caption, label, and the size of the original."""
    found = json.loads(bytes(sample.members["json"])) if "json" in sample.members else {}
    about = {"width": found.get("width", picture.width), "height": found.get("height", picture.height)}
    if "txt" in sample.members:
        about["text"] = bytes(sample.members["txt"]).decode()
    if "label" in found:
        about["label"] = found["label"]
    return about


def _conditions(
    batch: Sequence[Sample], abouts: Sequence[Mapping[str, Any]], conditions: Mapping[str, Condition], device: str
) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    from calotype.model import conditioner

    made, cut = {}, 0
    for name, condition in conditions.items():
        for sample, about in zip(batch, abouts, strict=True):
            if condition.source not in about:
                raise DataError(f"sample {sample.key} has no {condition.source}, which conditions.{name} is made from")
        values = [about[condition.source] for about in abouts]
        made[name] = conditioner.inputs(condition, values, device).cpu().numpy()
        if condition.source == "text":
            cut += conditioner.cut(condition.tokenizer, values, condition.length)
    return made, cut


def machine(device: str) -> str:
    """Device model and library versions: latents are bit-exact for each of these."""
    import platform

    import diffusers
    import torch

    model = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(platform.machine())
    return f"{model}; torch {torch.__version__}; diffusers {diffusers.__version__}"


def _processor(architecture: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return architecture
