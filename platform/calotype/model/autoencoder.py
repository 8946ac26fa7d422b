"""Image <-> latent: a KL autoencoder (Rombach et al. 2022, section 3.1), or the identity of pixel space.

Latents here are raw: the posterior as the autoencoder gives it, neither scaled nor drawn from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calotype import config
from calotype.data import buckets
from calotype.errors import ConfigError, DataError
from calotype.model.build import instantiate
from calotype.model.digests import autoencoder_shape, encoder_digest
from calotype.model.folders import opened, weight_files


class Autoencoder(nn.Module):
    """A diffusers AutoencoderKL, or nothing at all (pixel space), behind one face.

    Attributes:
        kind: `kl` or `identity`.
        f: downsampling factor H/h.
        channels: C of a latent.
        model: the AutoencoderKL; None in pixel space.
    """

    def __init__(self, model: Any, f: int = 1, channels: int = 3) -> None:
        super().__init__()
        self.kind = "identity" if model is None else "kl"
        self.f = f
        self.channels = channels
        self.model: Any = model
        self._compute = torch.float32

    def for_encoding(self, encoding: config.Encoding, device: str) -> Autoencoder:
        """Itself, there, with an encoder that computes as the encoding says; the decoder stays in float32."""
        self.to(device).eval()
        if self.model is None:
            return self
        if device.startswith("cuda"):
            self.model.to(memory_format=torch.channels_last)
        if encoding.precision == "bf16":
            self._compute = torch.bfloat16
            for part in (self.model.encoder, self.model.quant_conv):
                if part is not None:
                    part.to(torch.bfloat16)
        if encoding.compile:
            # Past the limit a shape would run as it is, in other bits: which one, depended on the order of shards.
            shapes = len(buckets.sizes(encoding.resolution, encoding.bucket_step, encoding.bucket_aspect))
            limit = max(torch._dynamo.config.recompile_limit, 2 * shapes)  # the gate encodes single images too
            torch._dynamo.config.recompile_limit = limit
            self.model.encoder = torch.compile(self.model.encoder, dynamic=False, fullgraph=True)
        return self

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw, decode: what training needs, in one call that DDP and ZeRO can hook.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, C, H/f, W/f) standard normal.

        Returns:
            reconstruction (B, 3, H, W), and mean and log variance of the posterior (B, C, H/f, W/f), in float32.
        """
        assert self.model is not None, "pixel space has nothing to train"
        mean, logvar = self._posterior(images)
        drawn = mean + torch.exp(0.5 * logvar) * noise
        reconstruction: Tensor = self.model.decode(drawn.to(images.dtype), return_dict=False)[0]
        return reconstruction.float(), mean, logvar

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Images -> raw latents.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            batch: images per call of the network, the last call padded: then a latent's bits depend on its place in the
                call, and neither on B nor on the images beside it.  0 = one call of B.

        Returns:
            mean and standard deviation of the posterior, both (B, C, H/f, W/f) float32; std is None in pixel space.
        """
        if self.model is None:
            return images.float(), None
        means, stds = [], []
        for part, real in _calls(images, batch):
            mean, logvar = self._posterior(part.to(self._compute))
            means.append(mean[:real])
            stds.append(torch.exp(0.5 * logvar[:real]))
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def decode(self, raw: Tensor, batch: int = 0) -> Tensor:
        """Raw latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1], float32; `batch` as in `encode`."""
        if self.model is None:
            return raw.float()
        made = [self.model.decode(part, return_dict=False)[0][:real] for part, real in _calls(raw, batch)]
        return torch.cat(made).float()

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert self.model is not None
        posterior: Any = self.model.encode(images, return_dict=False)[0]
        return posterior.mean.float(), posterior.logvar.float()


def loss(images: Tensor, made: tuple[Tensor, Tensor, Tensor], l2_weight: float, kl_weight: float) -> Tensor:
    """Objective of the autoencoder, one number per image (B,).

    Mean absolute error + l2_weight * mean squared error + kl_weight * KL / pixels: CompVis's objective (Rombach et al.
    2022, appendix G: error and KL both summed over an image) divided by the number of pixel values, so that its size
    and the meaning of kl_weight = 1e-6 do not depend on resolution.  Perceptual and adversarial terms are not in it.

    Args:
        images: (B, 3, H, W).
        made: what `Autoencoder.forward` gave for them.
    """
    reconstruction, mean, logvar = made
    error = (reconstruction - images.float()).flatten(1)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return error.abs().mean(1) + l2_weight * error.square().mean(1) + kl_weight * kl / error.shape[1]


def load_autoencoder(autoencoder: config.Autoencoder) -> Autoencoder:
    """What the `autoencoder` group of a config describes, on the CPU.

    Args:
        autoencoder: `kl` is made fresh; `pretrained` is read from a diffusers folder, a hub id or an s3:// URI
            (`run:NAME` has become one by now); `identity` is pixel space.

    Raises:
        ConfigError: no such weights, pickled weights, or sizes that contradict the config.
    """
    if autoencoder.kind == "identity":
        return Autoencoder(None)
    if autoencoder.kind == "kl":
        return Autoencoder(_kl(instantiate(autoencoder.model), autoencoder), autoencoder.f, autoencoder.channels)
    with opened(autoencoder.path, "vae", "autoencoder.path") as folder:
        f, channels = autoencoder_shape(folder)
        weight_files(folder)  # refuses a folder that has only pickles, in our words
        from diffusers import AutoencoderKL

        model = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    if autoencoder.digest and (found := encoder_digest(model.state_dict(), model.config)) != autoencoder.digest:
        raise DataError(f"autoencoder.path={autoencoder.path} changed after this job was submitted (encoder "
                        f"{found[:12]}, not {autoencoder.digest[:12]}): submit it again")  # fmt: skip
    return Autoencoder(_kl(model, autoencoder).eval(), f, channels)


def _kl(model: Any, autoencoder: config.Autoencoder) -> Any:
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL
    if not isinstance(model, kind):
        raise ConfigError(
            f"autoencoder.model is a {type(model).__name__}: only diffusers.AutoencoderKL is trained and read"
        )
    f, channels = 2 ** (len(model.config.block_out_channels) - 1), model.config.latent_channels
    if (f, channels) != (autoencoder.f, autoencoder.channels):
        raise ConfigError(f"autoencoder.f={autoencoder.f} autoencoder.channels={autoencoder.channels} but its weights "
                          f"have f={f} and {channels} channels: set autoencoder.f={f} autoencoder.channels={channels}"
                          )  # fmt: skip
    return model


def _calls(items: Tensor, batch: int) -> list[tuple[Tensor, int]]:
    """Split into calls of exactly `batch`, the last one padded; with each, how many of its items are real."""
    if not batch:
        return [(items, len(items))]
    calls = []
    for part in items.split(batch):
        padding = part[-1:].expand(batch - len(part), *part.shape[1:])
        calls.append((torch.cat([part, padding]), len(part)))
    return calls
