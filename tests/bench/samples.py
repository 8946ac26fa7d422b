"""The samples of the stream benchmark: the same from every interpreter, whatever format they are written in."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

EDGE = 256  # pixels of a decoded picture
SHARD = 250_000_000  # bytes of tensors in a shard, about
PICTURES = 4096  # in all, at most


@dataclass(frozen=True)
class Kind:
    """`arrays`: name -> dtype and shape of what is stored in `.npy`; none of them: JPEG and text."""

    about: str
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    part: float = 1.0  # of the gigabytes asked for: where samples are small, a gigabyte takes long

    @property
    def bytes(self) -> int:
        """Of the tensors of one sample, as they are handed out."""
        if not self.arrays:
            return 3 * EDGE * EDGE
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in self.arrays.values())

    def shards(self, gigabytes: float) -> tuple[int, int]:
        """(shards, samples of each): an even number of shards of whole batches, so that no reader ends on half a
        batch of one worker."""
        if not self.arrays:
            return 4, min(PICTURES, max(512, int(gigabytes * 4 * PICTURES) // 512 * 512)) // 4
        size = gigabytes * 1e9 * self.part
        shards = max(4, round(size / SHARD / 2) * 2)
        return shards, max(1, round(size / self.bytes / shards / 64)) * 64


KINDS = {
    "embeddings": Kind(
        "16 KB latents (2,4,32,32) float16, 30 KB embeddings (20,768) float16, json",
        {"latent": ("float16", (2, 4, 32, 32)), "text": ("float16", (20, 768))},
    ),
    "tokens": Kind(
        "8 KB latents (1,4,32,32) float16, 77 int64 tokens, json",
        {"latent": ("float16", (1, 4, 32, 32)), "text": ("int64", (77,))},
        0.25,
    ),
    "jpeg": Kind(f"photographs of 256-512 px, JPEG quality 85, and text, decoded to uint8 (3,{EDGE},{EDGE})", {}),
}


def samples(kind: str, shard: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, members) of one shard: arrays as such; the members `jpg`, `txt` and `json` as bytes."""
    random = np.random.default_rng([sum(kind.encode()), shard])
    photographs = _photographs() if not KINDS[kind].arrays else []
    for index in range(count):
        key = f"{shard:05d}{index:07d}"
        members: dict[str, Any] = {}
        for name, (dtype, shape) in KINDS[kind].arrays.items():
            if dtype == "float16":  # any bits but those of infinity and NaN
                members[name] = random.integers(0, 0x7C00, shape, np.uint16).view(np.float16)
            else:
                members[name] = random.integers(0, 49_408, shape, np.int64)
        if photographs:
            members = {"jpg": _crop(random, photographs[int(random.integers(len(photographs)))]),
                       "txt": f"a photograph, part {index} of {shard}".encode()}  # fmt: skip
        yield key, members | {"json": b'{"height": 512, "key": "%s", "width": 512}' % key.encode()}


def mark(members: dict[str, Any]) -> int:
    """A number that tells a sample from others: 16 bits of its latent, or the size of its JPEG."""
    return int(members["latent"].reshape(-1)[:1].view(np.uint16)[0]) if "latent" in members else len(members["jpg"])


def stored(members: dict[str, Any]) -> dict[str, bytes]:
    """The members as a shard has them."""
    found = {}
    for name, value in members.items():
        if isinstance(value, np.ndarray):
            file = io.BytesIO()
            np.lib.format.write_array(file, value, allow_pickle=False)
            found[f"{name}.npy"] = file.getvalue()
        else:
            found[name] = value
    return found


def decode(data: bytes | memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What every entrant and the bare pool do to a JPEG: uint8 (3, EDGE, EDGE), the whole picture squeezed."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def decoded(sample: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The same, as `calotype.data.Stream` takes it."""
    return {"image": decode(sample.members["jpg"])}


def _photographs() -> list[Any]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = load_sample_images().images
    return [Image.fromarray(image) for image in found]


def _crop(random: np.random.Generator, photograph: Any) -> bytes:
    width = int(random.integers(256, 513))
    height = int(random.integers(256, photograph.height + 1))
    left, top = (int(random.integers(0, most + 1)) for most in (photograph.width - width, photograph.height - height))
    file = io.BytesIO()
    photograph.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=85)
    return file.getvalue()
