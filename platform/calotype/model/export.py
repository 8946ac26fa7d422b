"""A trained latent diffusion model as a diffusers folder that needs no Calotype.

StableDiffusionPipeline knows one scale for all channels of a latent; ours are whitened per channel.  The 1x1
convolutions on both sides of the latent take that in, so the exported autoencoder speaks whitened latents itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.errors import ConfigError
from calotype.model.autoencoder import Autoencoder
from calotype.model.conditioner import is_clip, load_text_encoder, load_tokenizer
from calotype.model.denoiser import Denoiser
from calotype.model.diffusion import FLOW
from calotype.model.digests import SMALL
from calotype.model.sampler import scheduler


def export(
    folder: Path,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    settings: config.TrainDenoiser,
    channel_mean: Sequence[float],
    channel_std: Sequence[float],
    sampler: str = "",
) -> None:
    """Write what `diffusers.StableDiffusionPipeline.from_pretrained(folder)` loads.

    The same initial latents, prompt, steps and guidance give the same images as `sampler.sample`.

    Args:
        folder: made if missing.
        denoiser: with the weights to export.
        settings: the job that trained it.
        channel_mean, channel_std: of the cache: model latent = (raw - mean) / std.
        sampler: the scheduler that the folder starts with: ddim, or dpm++ for flow matching, if empty.

    Raises:
        ConfigError: what that pipeline cannot do, by name.
    """
    from diffusers import StableDiffusionPipeline

    sampler = sampler or ("dpm++" if settings.diffusion.prediction == FLOW else "ddim")
    check_exportable(settings, sampler)
    (name, condition) = next(iter(settings.conditions.items()))
    if condition.mode != "tokens":
        encoder = load_text_encoder(condition.path)
        if not is_clip(encoder):
            raise ConfigError(
                f"conditions.{name}.path={condition.path!r} is a {type(encoder).__name__}: it cannot be exported, "
                "StableDiffusionPipeline reads text with CLIP only"
            )
    else:
        encoder = denoiser.conditioner.encoders[name]
    tokenizer = _tokenizer(name, condition)
    pipeline: Any = StableDiffusionPipeline(
        vae=folded(autoencoder.model, channel_mean, channel_std),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=scheduler(settings.diffusion, sampler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    if condition.tokenizer == "small":  # older transformers read these two and not tokenizer.json
        for file in ("vocab.json", "merges.txt"):
            (folder / "tokenizer" / file).write_bytes((SMALL / file).read_bytes())


def check_exportable(settings: config.TrainDenoiser, sampler: str = "") -> None:
    """Refuse, by name, what StableDiffusionPipeline has no place for.

    Raises:
        ConfigError: pixel space, class labels, masked text, no condition, several conditions, flow matching with a
            scheduler that it cannot use.
    """
    if settings.diffusion.prediction == FLOW and sampler not in ("", "dpm++"):
        raise ConfigError(
            f"diffusion.prediction={FLOW} cannot be exported with the sampler {sampler}: StableDiffusionPipeline "
            "samples flow matching with dpm++ only"
        )
    if settings.autoencoder.kind == "identity":
        raise ConfigError(
            "autoencoder.kind=identity cannot be exported: StableDiffusionPipeline needs an autoencoder, "
            "and pixel space has none"
        )
    if not settings.conditions:
        raise ConfigError("an unconditional model cannot be exported: StableDiffusionPipeline needs a text condition")
    for name, condition in settings.conditions.items():
        if condition.kind != "cross" or condition.source != "text":
            raise ConfigError(
                f"conditions.{name} (kind={condition.kind}) cannot be exported: StableDiffusionPipeline is "
                "steered by text only"
            )
        if condition.mode == "masked":
            raise ConfigError(
                f"conditions.{name}.mode=masked cannot be exported: StableDiffusionPipeline gives the UNet no mask of "
                f"the text; train with conditions.{name}.mode=full"
            )
    if len(settings.conditions) > 1:
        raise ConfigError(
            f"conditions {', '.join(settings.conditions)} cannot be exported together: "
            "StableDiffusionPipeline reads one text"
        )


@torch.no_grad()
def folded(model: nn.Module, channel_mean: Sequence[float], channel_std: Sequence[float]) -> Any:
    """A copy of an AutoencoderKL whose latents are (z - mean) / std per channel; its scaling_factor is 1."""
    source: Any = model
    settings = {key: value for key, value in source.config.items() if not key.startswith("_")}
    settings |= {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0}
    settings |= {"shift_factor": None, "latents_mean": None, "latents_std": None}
    made: Any = type(source)(**settings)
    made.load_state_dict(source.state_dict(), strict=False)
    mean = torch.tensor(list(channel_mean), dtype=torch.float64)
    std = torch.tensor(list(channel_std), dtype=torch.float64)
    channels = len(mean)
    # encoder side: mean' = (mean - m) / s, logvar' = logvar - 2 log s
    weight, bias = _conv(source.quant_conv, 2 * channels)
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    _set(made.quant_conv, weight * scale[:, None], bias * scale + shift)
    # decoder side: raw = s * z + m goes into what was there
    weight, bias = _conv(source.post_quant_conv, channels)
    _set(made.post_quant_conv, weight * std, bias + weight @ mean)
    return made.eval()


def _conv(conv: Any, channels: int) -> tuple[Tensor, Tensor]:
    """(weight (out, in), bias (out,)) of a 1x1 convolution in float64; the identity where there is none."""
    if conv is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return conv.weight[:, :, 0, 0].double(), conv.bias.double()


def _set(conv: Any, weight: Tensor, bias: Tensor) -> None:
    conv.weight.copy_(weight[:, :, None, None])
    conv.bias.copy_(bias)


def _tokenizer(name: str, condition: config.Condition) -> Any:
    from transformers import CLIPTokenizer

    tokenizer = copy.deepcopy(load_tokenizer(condition.tokenizer))
    if not isinstance(tokenizer, CLIPTokenizer):
        raise ConfigError(
            f"conditions.{name}.tokenizer={condition.tokenizer!r} is a {type(tokenizer).__name__}: it cannot "
            "be exported, StableDiffusionPipeline reads text with CLIP's tokenizer only"
        )
    tokenizer.model_max_length = condition.length  # the pipeline pads to it, as the cache did
    return tokenizer
