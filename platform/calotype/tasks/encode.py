"""One batch of a source shard -> one batch of a latent shard: decode, encode, narrow, conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from calotype.config import CacheLatents, Condition
from calotype.data import cache, images
from calotype.data.shards import Sample
from calotype.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def exactly(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which a batch's bits depend on nothing but the batch.

    Each computes alone: convolutions and matrix products on several threads add in another order.  So do autotuning and
    TF32, which are off inside.
    """
    import torch

    before = torch.get_num_threads()
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    matmul, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with flags, ThreadPoolExecutor(threads, "encode", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.set_num_threads(before)


def batch(model: Any, samples: Sequence[Sample], config: CacheLatents, device: str) -> list[Sample]:
    """At most `encoding.batch` source samples -> their latent samples."""
    pictures = decoded(samples, config)
    return stored(samples, pictures, encoded(model, pictures, config, device), config, device)


def decoded(samples: Sequence[Sample], config: CacheLatents) -> list[images.Picture]:
    size, limit = config.encoding.resolution, config.data.max_pixels
    return [images.decode(images.image_bytes(sample), size, f"sample {sample.key}", limit) for sample in samples]


def encoded(
    model: Any, pictures: Sequence[images.Picture], config: CacheLatents, device: str
) -> tuple[Tensor, Tensor | None]:
    """One encoder call of exactly `encoding.batch` images; raw mean and standard deviation, on the CPU."""
    import torch

    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(device)
    mean, std = model.encode(images.signed(pixels), batch=config.encoding.batch)
    return mean.cpu(), None if std is None else std.cpu()


def stored(
    samples: Sequence[Sample],
    pictures: Sequence[images.Picture],
    raw: tuple[Tensor, Tensor | None],
    config: CacheLatents,
    device: str,
) -> list[Sample]:
    """Source samples and their raw latents -> samples of the latent shard."""
    mean, std = raw
    gaussian = std is not None and config.encoding.posterior == "gaussian"
    both = np.stack([mean.numpy(), std.numpy()] if gaussian and std is not None else [mean.numpy()], axis=1)
    abouts = [_about(sample, picture) for sample, picture in zip(samples, pictures, strict=True)]
    values = _conditions(samples, abouts, config.conditions, device)
    made = []
    for index, (sample, about) in enumerate(zip(samples, abouts, strict=True)):
        latent = narrowed(both[index], config.encoding.dtype, sample.key)
        arrays = {name: array[index] for name, array in values.items()}
        made.append(cache.encode_sample(sample, latent, arrays, about))
    return made


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
    samples: Sequence[Sample],
    abouts: Sequence[MutableMapping[str, Any]],
    conditions: Mapping[str, Condition],
    device: str,
) -> dict[str, np.ndarray[Any, Any]]:
    """Name -> (B, ...) stored forms; captions with more tokens than that holds are noted in `abouts`."""
    from calotype.model import conditioner

    made = {}
    for name, condition in conditions.items():
        for sample, about in zip(samples, abouts, strict=True):
            if condition.source not in about:
                raise DataError(f"sample {sample.key} has no {condition.source}, which conditions.{name} is made from")
        values = [about[condition.source] for about in abouts]
        made[name] = conditioner.inputs(condition, values, device).cpu().numpy()
        for about in abouts if condition.source == "text" else ():
            if conditioner.cut(condition.tokenizer, [about["text"]], condition.length):
                about.setdefault("cut", []).append(name)
    return made


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
