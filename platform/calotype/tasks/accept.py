"""The gate of a latent cache: what does not give its images back is not committed.

of every shard    a few samples, read back from the store and decoded, beside their images (`decoded`)
of the cache      how good they are, what storing them cost, channels that say nothing, samples left out (`report`)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from calotype.config import Accept, CacheLatents
from calotype.console import many
from calotype.data import cache, images, shards
from calotype.data.manifest import Shard
from calotype.data.store import Store
from calotype.errors import DataError
from calotype.tasks import encode
from calotype.tasks.encode import Lost

if TYPE_CHECKING:
    from torch import Tensor

BEST = 60.0  # dB, and no more: above that an image is the same to the last of its 8 bits
SIGNAL = 0.01  # share of a channel's variance below which its posterior has collapsed
BROUGHT = 12.0  # dB that an autoencoder must reach of which nothing is known: white pictures stay below
SLACK = 3.0  # dB that a cache may stay behind its autoencoder's own held-out images
NAMED = 5  # samples that a refusal names


class Stranger(DataError):
    """A latent of a sample that its source shard does not have."""


@dataclass(frozen=True)
class Decoded:
    """A stored sample, decoded.  dB against its image; `fresh` of the same image encoded anew by the same encoder."""

    key: str
    psnr: float
    fresh: float


def decoded(
    model: Any,
    original: tuple[Store, Shard],
    cached: tuple[Store, Shard],
    lost: Collection[int],
    count: int,
    config: CacheLatents,
    device: str,
) -> tuple[list[Decoded], Tensor]:
    """Samples of a latent shard, the first ones of each bucket, as the store gives them; with their mirrored latents,
    where it has some.

    Args:
        original, cached: source shard and latent shard, each in its store.
        lost: rows of the source shard that have no latent.
        count: of samples in the picture; `accept.samples` of them are judged, for which each is encoded once more.

    Returns:
        how good those are, and (2n, 3, S, S) in [-1, 1] on the CPU: images and reconstructions in turn, smaller ones
        framed in white.

    Raises:
        DataError: bytes are missing or damaged; Stranger: the source shard has other samples.
    """
    import torch

    def rebuilt(latent: Tensor) -> Tensor:
        return cast("Tensor", model.decode(latent.to(device)).clamp(-1, 1).cpu())

    chosen, f = _chosen(cached[1], count), config.autoencoder.f
    judged = set(_chosen(cached[1], config.accept.samples))
    rows = cache.source_rows(*cached, lost)
    if max(rows) >= original[1].samples:
        raise Stranger(f"{cached[1].key} holds more samples than {original[0].where(original[1].key)} has")
    mirrored = [cache.MIRRORED] if config.encoding.mirrored else []
    sources = shards.read_rows(*original, [rows[at] for at in chosen])
    found, pictures = [], []
    for at, source, stored in zip(chosen, sources, shards.read_rows(*cached, chosen), strict=True):
        if source.key != stored.key:
            where = original[0].where(original[1].key)
            raise Stranger(f"a latent of sample {stored.key} lies in the place of {source.key} of {where}")
        arrays = cache.decode_sample(stored, mirrored)
        latents = {name: torch.from_numpy(arrays[name][:1].astype(np.float32)) for name in ("latent", *mirrored)}
        size = latents["latent"].shape[-1] * f, latents["latent"].shape[-2] * f
        real = images.signed(torch.from_numpy(encode.decoded(source, config, size).pixels[None]))
        made = rebuilt(latents["latent"])
        pictures += [real[0], made[0]]
        if at in judged:
            found.append(_compared(source.key, real, made, rebuilt(model.encode(real.to(device))[0])))
        if at in judged and mirrored:
            real, made = real.flip(-1), rebuilt(latents[cache.MIRRORED])
            found.append(_compared(source.key, real, made, rebuilt(model.encode(real.to(device))[0])))
    return found, torch.stack(_framed(pictures))


def _compared(key: str, real: Tensor, made: Tensor, anew: Tensor) -> Decoded:
    from calotype.model import metrics

    psnr, fresh = (float(metrics.psnr(each, real).clamp(max=BEST)) for each in (made, anew))
    return Decoded(key, round(psnr, 2), round(fresh, 2))


def _chosen(shard: Shard, count: int) -> list[int]:
    """Which samples of a latent shard are looked at: the first of every bucket, then the second of every, ..."""
    firsts = np.cumsum([0, *(size for _, size in shard.buckets)]).tolist()
    parts = [(first, size) for first, (_, size) in zip(firsts, shard.buckets)] or [(0, shard.samples)]
    turns = sorted((turn, first + turn) for first, size in parts for turn in range(min(size, count)))
    return sorted(place for _, place in turns[:count])


def _framed(pictures: Sequence[Tensor]) -> list[Tensor]:
    """(3, H, W) each, in the middle of a white square that is large enough for all."""
    from torch.nn.functional import pad

    edge = max(side for picture in pictures for side in picture.shape[1:])
    made = []
    for picture in pictures:
        below, right = edge - picture.shape[1], edge - picture.shape[2]
        made.append(pad(picture, (right // 2, right - right // 2, below // 2, below - below // 2), value=1.0))
    return made


def report(found: Iterable[Decoded], statistics: Mapping[str, Any], lost: Collection[Any]) -> dict[str, Any]:
    """What the cache's manifest says of its quality: a function of its bytes and images.

    Args:
        statistics: merged, of all shards.
    """
    worst = sorted(found, key=lambda one: (one.psnr, one.key))
    made: dict[str, Any] = {
        "decoded": len(worst),
        "collapsed": [number for number, share in enumerate(statistics["channel_signal"]) if share < SIGNAL],
        "lost": len(lost),
    }
    if worst:
        made["psnr"] = round(float(np.mean([one.psnr for one in worst])), 2)
        made["psnr_fresh"] = round(float(np.mean([one.fresh for one in worst])), 2)
        made["worst"] = [[one.key, one.psnr] for one in worst[:NAMED]]
    return made


def check(found: Mapping[str, Any], channels: int, accept: Accept, where: str) -> None:
    """Refuse a cache that lies outside the limits.

    Raises:
        DataError: the cache that `found` is the report of is outside the limits; all that is wrong with it.
    """
    if sentences := list(wrong(found, channels, accept)):
        raise DataError(f"the latents of {where} are not accepted, and no cache is committed: {'; '.join(sentences)}")


def wrong(found: Mapping[str, Any], channels: int, accept: Accept) -> Iterator[str]:
    """What is outside the limits, a clause each."""
    if len(found["collapsed"]) > accept.collapsed * channels:
        yield (
            f"the posterior of channels {found['collapsed']} of {channels} says nothing of the image, which is more "
            f"than accept.collapsed={accept.collapsed:g}: lower the autoencoder's kl_weight"
        )
    if "psnr" not in found:
        return
    worst = ", ".join(f"{key} {psnr:g} dB" for key, psnr in found["worst"])
    if found["psnr"] < accept.psnr:
        yield (
            f"{found['decoded']} of them decode to {found['psnr']:g} dB on average, less than accept.psnr="
            f"{accept.psnr:g} (worst: {worst}): these are not the weights or the pixels that it was trained with"
        )
    if (loss := found["psnr_fresh"] - found["psnr"]) > accept.psnr_loss:
        yield (
            f"storing them costs {loss:.2f} dB, more than accept.psnr_loss={accept.psnr_loss:g} (worst: {worst}): "
            "they are not what this autoencoder makes of these images, or encoding.dtype is too narrow"
        )


def within_budget(lost: Sequence[tuple[Shard, Lost]], config: CacheLatents, listed: str = "") -> None:
    """Refuse a cache that lacks too many samples.

    Args:
        listed: URI of the list of all of them, where there is one.

    Raises:
        DataError: more samples have no latent than may be left out.
    """
    if len(lost) <= config.data.error_budget:
        return
    some = "; ".join(f"{shard.key}/{one.key}: {one.reason}" for shard, one in lost[:NAMED])
    more = "; ..." if len(lost) > NAMED else ""
    raise DataError(
        f"{many(len(lost), 'sample')} of dataset {config.data.name} could not be encoded, more than data.error_budget="
        f"{config.data.error_budget}: {some}{more}{f'; all of them: {listed}' if listed else ''}; remove them, or "
        "raise the budget and run again: what is encoded stays"
    )


def expected(reached: float | None) -> float:
    """dB that a cache must reach, of an autoencoder that reached so much on its own held-out images; None: unknown."""
    return BROUGHT if reached is None else max(0.0, round(reached - SLACK, 2))
