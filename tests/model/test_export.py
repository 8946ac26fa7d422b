from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model.autoencoder import Autoencoder
from calotype.model.conditioner import empty, load_tokenizer, prompted
from calotype.model.denoiser import build_denoiser
from calotype.model.diffusion import Diffusion
from calotype.model.export import check_exportable, export, folded
from calotype.model.sampler import initial_noise, sample
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

MEAN, STD = [0.5, -1.0, 2.0, 0.1], [2.0, 0.3, 1.5, 0.7]
PROMPTS = ["a photo of seven", "the digit 3"]
TEXT = config.Condition(
    length=12,
    encoder={
        "_target_": "transformers.CLIPTextModel",
        "config": {
            "_target_": "transformers.CLIPTextConfig",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
)
UNET = {
    "_target_": "diffusers.UNet2DConditionModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def job(diffusion: str | dict[str, object] = "epsilon", **changes: object) -> config.TrainDenoiser:
    """`diffusion`: its settings, or the prediction alone."""
    objective: Any = diffusion if isinstance(diffusion, dict) else {"prediction": diffusion}
    made = config.TrainDenoiser(
        name="x",
        data=config.Data(name="d"),
        conditions={"text": TEXT},
        denoiser=config.Denoiser(model=UNET),
        diffusion=config.Diffusion(**objective),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def autoencoder(quant: bool = True) -> Autoencoder:
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return Autoencoder(model.eval(), 4, 4)


@pytest.mark.parametrize("quant", [True, False])
def test_folding_moves_the_whitening_into_the_autoencoder(quant: bool) -> None:
    torch.manual_seed(0)
    raw = autoencoder(quant)
    white = Autoencoder(folded(raw.model, MEAN, STD), 4, 4)
    images = torch.randn(2, 3, 16, 16)
    mean, std = (torch.tensor(x).reshape(1, 4, 1, 1) for x in (MEAN, STD))
    z, sigma = raw.encode(images)
    w, white_sigma = white.encode(images)
    assert sigma is not None
    assert white_sigma is not None
    torch.testing.assert_close(w, (z - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(white_sigma, sigma / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(white.decode(w), raw.decode(z), atol=1e-5, rtol=1e-4)
    assert white.model.config.scaling_factor == 1


@pytest.mark.parametrize(("kind", "diffusion"), [
    ("ddim", "epsilon"), ("dpm++", "v_prediction"), ("euler", "epsilon"), ("ddim", "v_prediction"),
    ("euler", {"prediction": "v_prediction", "zero_snr": True}),
    ("ddim", {"prediction": "sample", "zero_snr": True}),
    ("dpm++", {"prediction": "flow_prediction", "shift": 2.0}),
])  # fmt: skip
def test_plain_pipeline_draws_the_same_images(tmp_path: Path, kind: str, diffusion: Any) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(1)
    settings, ours = job(diffusion), autoencoder()
    denoiser = build_denoiser(settings, (4, 8, 8)).eval()
    export(tmp_path, denoiser, ours, settings, MEAN, STD, kind)
    drawn = sample(denoiser, Diffusion(settings.diffusion), config.Sampler(kind=kind, steps=4, guidance=3.0),
                   prompted(settings.conditions, PROMPTS), empty(settings.conditions), (4, 8, 8), [7, 8])  # fmt: skip
    raw = drawn * torch.tensor(STD).reshape(1, 4, 1, 1) + torch.tensor(MEAN).reshape(1, 4, 1, 1)
    expected = ours.decode(raw).clamp(-1, 1) / 2 + 0.5

    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    got = pipeline(PROMPTS, latents=initial_noise((4, 8, 8), [7, 8]), num_inference_steps=4, guidance_scale=3.0,
                   height=32, width=32, output_type="np").images  # fmt: skip
    assert np.ptp(got) > 0.05, "flat images would agree whatever the sampler does"
    assert np.abs(got - expected.permute(0, 2, 3, 1).numpy()).max() < 2e-4


def test_the_scheduler_of_the_folder_knows_the_objective(tmp_path: Path) -> None:
    settings = job({"prediction": "v_prediction", "zero_snr": True})
    denoiser = build_denoiser(settings, (4, 8, 8))
    export(tmp_path / "v", denoiser, autoencoder(), settings, MEAN, STD)
    told = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert wanted.items() <= told.items()
    flow = job({"prediction": "flow_prediction", "shift": 3.0})
    export(tmp_path / "flow", denoiser, autoencoder(), flow, MEAN, STD)
    told = json.loads((tmp_path / "flow" / "scheduler" / "scheduler_config.json").read_text())
    assert {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}.items() <= told.items()
    with pytest.raises(ConfigError, match=r"diffusion\.prediction=flow_prediction .* sampler euler"):
        export(tmp_path / "other", denoiser, autoencoder(), flow, MEAN, STD, "euler")
    assert not (tmp_path / "other").exists()


def test_the_folder_needs_no_calotype(tmp_path: Path) -> None:
    settings = job()
    export(tmp_path, build_denoiser(settings, (4, 8, 8)), autoencoder(), settings, MEAN, STD)
    script = (
        "import sys; from diffusers import StableDiffusionPipeline\n"
        f"p = StableDiffusionPipeline.from_pretrained({str(tmp_path)!r}); p.set_progress_bar_config(disable=True)\n"
        "image = p('a seven', num_inference_steps=2).images[0]\n"
        "assert image.size == (32, 32), image.size\n"
        "assert not any(name.startswith('calotype') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=280)
    assert not list(tmp_path.rglob("*.bin")), "pickled weights"
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 1
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (tmp_path / "tokenizer").iterdir()}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (job(autoencoder=config.Autoencoder(kind="identity", f=1, channels=3)), "pixel space"),
        (job(conditions={}), "unconditional"),
        (job(conditions={"label": config.Condition(kind="class", source="label", classes=10)}), "conditions.label"),
        (job(conditions={"text": dataclasses.replace(TEXT, mode="masked")}), "conditions.text.mode=masked"),
        (job(conditions={"a": TEXT, "b": TEXT}), "a, b"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_by_name(settings: config.TrainDenoiser, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_exportable(settings)


def frozen(folder: Path, model: object) -> config.Condition:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    load_tokenizer("small").save_pretrained(folder)
    return config.Condition(mode="full", path=str(folder), tokenizer=str(folder), length=12)


def test_a_frozen_clip_goes_with_it(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(load_tokenizer("small")), max_position_embeddings=12, **sizes))
    settings, ours = job(conditions={"text": frozen(tmp_path / "clip", clip)}), autoencoder()
    denoiser = build_denoiser(settings, (4, 8, 8)).eval()
    export(tmp_path / "made", denoiser, ours, settings, MEAN, STD)
    cond, nothing = prompted(settings.conditions, PROMPTS), empty(settings.conditions)
    drawn = sample(denoiser, Diffusion(settings.diffusion), config.Sampler(steps=3), cond, nothing, (4, 8, 8), [7, 8])
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "made"))
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise((4, 8, 8), [7, 8])
    got = pipeline(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(got, drawn, atol=5e-3, rtol=5e-3)  # cached embeddings are float16


def test_text_encoders_that_are_not_clip_are_refused(tmp_path: Path) -> None:
    t5 = T5EncoderModel(T5Config(vocab_size=len(load_tokenizer("small")), d_model=16, d_kv=4, d_ff=16, num_layers=1))
    settings = job(conditions={"text": frozen(tmp_path / "t5", t5)})
    with pytest.raises(ConfigError, match=r"conditions\.text\.path=.*T5EncoderModel"):
        export(tmp_path / "made", build_denoiser(settings, (4, 8, 8)), autoencoder(), settings, MEAN, STD)
    assert not (tmp_path / "made").exists()
