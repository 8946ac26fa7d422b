"""The denoiser: a diffusers UNet and the conditioner trained with it, as one module with one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.errors import ConfigError
from calotype.model.build import instantiate, target
from calotype.model.conditioner import Conditioner
from calotype.model.folders import opened, weight_files


class Denoiser(nn.Module):
    """Predicts what `diffusion.prediction` says, of a noisy latent (Rombach et al. 2022, section 3.3).

    One forward from plain tensors to a plain tensor: DDP, ZeRO-3 and torch.compile see all that is trained.
    """

    def __init__(self, unet: nn.Module, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(B, C, h, w) noisy latents, (B,) timesteps, stored conditions of B rows -> prediction, like x, float32."""
        dtype = next(self.unet.parameters()).dtype
        hidden, mask, labels = self.conditioner(cond)
        hidden = hidden if hidden is None else hidden.to(dtype)
        made: Tensor = self.unet(
            x.to(dtype), t, hidden, class_labels=labels, encoder_attention_mask=mask, return_dict=False
        )[0]
        return made.float()


def build_denoiser(settings: config.TrainDenoiser, latent_shape: tuple[int, int, int]) -> Denoiser:
    """The denoiser of a config, on the CPU, in float32; weights come from `denoiser.init_from` where that is a folder.

    Sizes that are left out of `denoiser.model` follow from the latents and the conditions.  Without a condition of
    kind=cross the same layout is built, and both attentions of a transformer block read the latent itself.

    Args:
        settings: the job's config (only `denoiser` and `conditions` are read).
        latent_shape: (C, h, w).

    Raises:
        ConfigError: sizes that contradict each other, or a class that is not a UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    spec = dict(settings.denoiser.model)
    if not issubclass(target(str(spec.get("_target_", ""))), UNet2DConditionModel):
        raise ConfigError(f"denoiser.model._target_={spec['_target_']}: only diffusers.UNet2DConditionModel is trained")
    conditioner = Conditioner(settings.conditions)
    for key, value in _sizes(spec, latent_shape, conditioner).items():
        if spec.get(key) is not None and spec[key] != value:
            raise ConfigError(
                f"denoiser.model.{key}={spec[key]} but latents and conditions make it {value}: leave it out"
            )
        spec[key] = value
    denoiser = Denoiser(instantiate(spec), conditioner)
    init_from = settings.denoiser.init_from
    if init_from and not init_from.startswith("run:"):
        load_folder(denoiser, init_from)
    return denoiser


def load_folder(denoiser: Denoiser, path: str) -> None:
    """Start from a diffusers folder: `unet/`, and `text_encoder/` where a text encoder is trained jointly.

    Raises:
        ConfigError: weights of another shape than the config describes.
    """
    with opened(path, "unet", "denoiser.init_from") as folder:
        _load(denoiser.unet, folder, path)
    for encoder in denoiser.conditioner.encoders.values():
        with opened(path, "text_encoder", "denoiser.init_from") as folder:
            _load(encoder, folder, path)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy named weights into a module; each must be there and fit.

    Args:
        where: where they come from, for the error.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    for names, why in ((missing, "lacks"), (unknown, "has, unlike this model,"), (other, "has in another shape")):
        if names:
            raise ConfigError(
                f"{where} {why} {len(names)} weights, such as {names[0]}: give the model the same settings"
            )
    module.load_state_dict(dict(state))


def _sizes(spec: Mapping[str, Any], latent_shape: tuple[int, int, int], conditioner: Conditioner) -> dict[str, Any]:
    channels, height, width = latent_shape
    blocks = list(spec.get("block_out_channels", (320, 640, 1280, 1280)))
    found: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": height if height == width else [height, width],
        # Without a sequence to read, diffusers' second attention reads the latent too, at the width of its level.
        "cross_attention_dim": blocks if conditioner.cross_dim is None else conditioner.cross_dim,
    }
    if conditioner.classes is not None:
        found["num_class_embeds"] = conditioner.classes + 1
    return found


def _load(module: nn.Module, folder: Any, path: str) -> None:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        state.update(load_file(file))
    if not any(name in state for name in module.state_dict()):  # transformers' older prefix
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    state = {name: value.to(torch.float32) for name, value in state.items() if not name.endswith("position_ids")}
    load_weights(module, state, f"denoiser.init_from={path!r}")
