"""One batch of a source shard -> one batch of a latent shard: decode, encode, narrow, conditions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calotype.config import CacheLatents, Condition
from calotype.data import buckets, cache, images
from calotype.data.buckets import Size
from calotype.data.shards import Sample
from calotype.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lost:
    """A source sample without a latent: `row` in its shard, and why."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """At most `encoding.batch` source samples, each with its row in the shard, that are resized to one size."""

    bucket: int
    size: Size
    samples: Sequence[tuple[int, Sample]]


@dataclass(frozen=True)
class Latent:
    """A sample of a latent shard: `row` of its source sample, and its bucket."""

    bucket: int
    row: int
    sample: Sample


@dataclass(frozen=True)
class Encoded:
    """A batch: its latent samples, source samples that have none, and seconds that its thread decoded and encoded."""

    samples: Sequence[Latent] = ()
    lost: Sequence[Lost] = ()
    decode: float = 0.0
    encode: float = 0.0


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


def batches(samples: Iterable[Sample], config: CacheLatents) -> Iterator[Batch]:
    """The samples of a source shard, in its order within each bucket: a function of them and the encoding alone."""
    sizes, waiting = cache.sizes_of(config.encoding), dict[int, list[tuple[int, Sample]]]()
    for row, sample in enumerate(samples):
        bucket = _bucket(sample, sizes, config.data.max_pixels)
        waiting.setdefault(bucket, []).append((row, sample))
        if len(waiting[bucket]) == config.encoding.batch:
            yield Batch(bucket, sizes[bucket], waiting.pop(bucket))
    for bucket in sorted(waiting):
        yield Batch(bucket, sizes[bucket], waiting[bucket])


def _bucket(sample: Sample, sizes: Sequence[Size], max_pixels: int) -> int:
    """By its header; a sample without a readable one goes anywhere: nothing will be made of it."""
    if len(sizes) == 1:
        return 0
    try:
        return buckets.nearest(*images.measured(images.image_bytes(sample), max_pixels=max_pixels), sizes)
    except DataError:
        return 0


def batch(model: Any, unit: Batch, config: CacheLatents, device: str) -> Encoded:
    """The latent samples of a batch, and its source samples that have none.

    Raises:
        DataError: the autoencoder's weights are broken, or `encoding.dtype` is too narrow for what they give.
    """
    began = time.monotonic()
    sound: list[tuple[int, Sample, images.Picture, dict[str, Any]]] = []
    lost: list[Lost] = []
    for row, sample in unit.samples:
        try:
            sound.append((row, sample, decoded(sample, config, unit.size), _about(sample, config.conditions)))
        except DataError as error:
            lost.append(Lost(row, sample.key, str(error).removeprefix(f"sample {sample.key}").lstrip(": ")))
    decoded_at = time.monotonic()
    if not sound:
        return Encoded((), lost, decoded_at - began)
    rows, good, pictures, abouts = zip(*sound, strict=True)
    for picture, about in zip(pictures, abouts, strict=True):
        about.setdefault("width", picture.width)
        about.setdefault("height", picture.height)
        if config.encoding.bucket_step:
            about["crop"] = [round(edge) for edge in images.cropped(picture.width, picture.height, unit.size)]
    raw = {"latent": encoded(model, pictures, config, device)}
    if config.encoding.mirrored:
        others = [replace(picture, pixels=picture.pixels[:, :, ::-1]) for picture in pictures]
        raw[cache.MIRRORED] = encoded(model, others, config, device)
    made = stored(good, abouts, raw, config, device)
    latents = [Latent(unit.bucket, row, sample) for row, sample in zip(rows, made, strict=True)]
    return Encoded(latents, lost, decoded_at - began, time.monotonic() - decoded_at)


def decoded(sample: Sample, config: CacheLatents, size: Size) -> images.Picture:
    return images.decode(images.image_bytes(sample), size, f"sample {sample.key}", config.data.max_pixels)


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
    abouts: Sequence[dict[str, Any]],
    raw: Mapping[str, tuple[Tensor, Tensor | None]],
    config: CacheLatents,
    device: str,
) -> list[Sample]:
    """Source samples, what goes into their `json`, and their raw latents by member -> samples of the latent shard."""
    both = {}
    for name, (mean, std) in raw.items():
        gaussian = std is not None and config.encoding.posterior == "gaussian"
        parts = [mean.numpy(), std.numpy()] if gaussian and std is not None else [mean.numpy()]
        both[name] = np.stack(parts, axis=1)
    values = _conditions(abouts, config.conditions, device)
    made = []
    for index, (sample, about) in enumerate(zip(samples, abouts, strict=True)):
        latents = {name: narrowed(each[index], config.encoding.dtype, sample.key) for name, each in both.items()}
        arrays = {name: forms[index] for name, forms in values.items()}
        made.append(cache.encode_sample(sample, latents.pop("latent"), latents | arrays, about))
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


def _about(sample: Sample, conditions: Mapping[str, Condition]) -> dict[str, Any]:
    """What goes into `json` of what the source says: caption, label, size of the original.

    Raises:
        DataError: it is not readable, or lacks what a condition is made from.
    """
    try:
        found = json.loads(bytes(sample.members["json"])) if "json" in sample.members else {}
        about = {name: found[name] for name in ("width", "height", "label") if name in found}
        if "txt" in sample.members:
            about["text"] = bytes(sample.members["txt"]).decode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"sample {sample.key} has a .json or .txt that is none ({error})") from error
    for name, condition in conditions.items():
        if condition.source not in about:
            raise DataError(f"sample {sample.key} has no {condition.source}, which conditions.{name} is made from")
        if condition.source == "label" and (type(about["label"]) is not int or about["label"] < 0):
            raise DataError(f"sample {sample.key} has label {about['label']!r}, which is no class number")
    return about


def _conditions(
    abouts: Sequence[MutableMapping[str, Any]], conditions: Mapping[str, Condition], device: str
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Name -> B stored forms; captions with more tokens than that holds are noted in `abouts`."""
    from calotype.model import conditioner

    made = {}
    for name, condition in conditions.items():
        values = [about[condition.source] for about in abouts]
        made[name] = conditioner.inputs(condition, values, device)
        for about in abouts if condition.source == "text" else ():
            if conditioner.cut(condition.tokenizer, [about["text"]], condition.length):
                about.setdefault("cut", []).append(name)
    return made


def machine(device: str) -> str:
    """Device model and library versions: latents are bit-exact for each of these."""
    import platform

    import diffusers
    import PIL
    import torch
    import transformers

    cuda = device.startswith("cuda")
    model = torch.cuda.get_device_name(device) if cuda else _processor(platform.machine())
    libraries = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version() if cuda else None}
    libraries |= {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    versions = [f"{name} {version}" for name, version in {**libraries, "pillow": PIL.__version__}.items() if version]
    return "; ".join([model, *versions])


def _processor(architecture: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return architecture
