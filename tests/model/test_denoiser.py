from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model.conditioner import empty, load_tokenizer, prompted
from calotype.model.denoiser import Denoiser, build_denoiser, load_weights
from transformers import CLIPTextConfig, CLIPTextModel

ENCODER = {
    "_target_": "transformers.CLIPTextModel",
    "config": {"_target_": "transformers.CLIPTextConfig", "hidden_size": 8, "intermediate_size": 8,
               "num_hidden_layers": 1, "num_attention_heads": 1},
}  # fmt: skip
UNET = {
    "_target_": "diffusers.UNet2DConditionModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = config.Condition(length=6, encoder=ENCODER)
LABEL = config.Condition(kind="class", source="label", classes=10)
CONDITIONS = {"text": {"text": TEXT}, "label": {"label": LABEL}, "none": {}, "both": {"text": TEXT, "label": LABEL}}
PROMPT = {"text": "seven", "label": 7}


def job(conditions: dict[str, config.Condition], **model: object) -> config.TrainDenoiser:
    return config.TrainDenoiser(name="x", data=config.Data(name="d"), conditions=conditions,
                                denoiser=config.Denoiser(model={**UNET, **model}))  # fmt: skip


def built(conditions: dict[str, config.Condition], **model: object) -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(job(conditions, **model), (3, 4, 4))


@pytest.mark.parametrize("which", CONDITIONS)
def test_every_weight_is_trained_and_every_condition_is_seen(which: str) -> None:
    conditions = CONDITIONS[which]
    denoiser = built(conditions)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0, 999])
    cond, nothing = prompted(conditions, [PROMPT] * 2), empty(conditions)
    made = denoiser(x, t, cond)
    assert made.shape == x.shape
    made.square().sum().backward()
    for name, weight in denoiser.named_parameters():
        assert weight.grad is not None, f"{name} is never used: DDP would wait for its gradient for ever"
    for name in conditions:
        other = denoiser(x, t, {**cond, name: nothing[name].expand_as(cond[name])})
        assert not torch.allclose(other, made), name
    assert not torch.allclose(denoiser(x, torch.tensor([500, 500]), cond), made)


def test_masked_rows_are_not_seen(tmp_path: Path) -> None:
    """A padded text is the text alone, whatever lies behind it, also beside another that is longer."""
    tokenizer, sizes = load_tokenizer("small"), ENCODER["config"]
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **dict(list(sizes.items())[1:]))).save_pretrained(tmp_path)
    frozen = config.Condition(mode="masked", path=str(tmp_path), tokenizer="small", length=9)
    denoiser = built({"text": frozen}).eval()
    cond = prompted({"text": frozen}, ["a seven", "a photo of seven"])
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0, 999])
    made = denoiser(x, t, cond)
    for row, rows in ((0, 4), (1, 6)):
        alone = {"text": cond["text"][row : row + 1, :rows]}
        torch.testing.assert_close(denoiser(x[row : row + 1], t[row : row + 1], alone)[0], made[row])
    behind = torch.where(cond["text.mask"][..., None], cond["text"], 7)
    torch.testing.assert_close(denoiser(x, t, {**cond, "text": behind}), made)
    assert not torch.allclose(denoiser(x, t, {"text": cond["text"]}), made, atol=1e-4)
    half = denoiser.bfloat16()(x, t, cond)
    torch.testing.assert_close(half, made, atol=0.1, rtol=0.1)


def test_sizes_follow_from_latents_and_conditions() -> None:
    unet = built(CONDITIONS["both"]).unet.config
    assert (unet.in_channels, unet.out_channels, unet.sample_size) == (3, 3, 4)
    assert (unet.cross_attention_dim, unet.num_class_embeds) == (8, 11)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 4}, "in_channels=4"),
        ({"cross_attention_dim": 77}, "cross_attention_dim=77"),
        ({"_target_": "diffusers.AutoencoderKL"}, "only diffusers.UNet2DConditionModel"),
        ({"_target_": ""}, "_target_"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        built(CONDITIONS["text"], **changes)


def test_runs_in_half_precision_and_under_autocast() -> None:
    conditions = CONDITIONS["both"]
    denoiser, cond = built(conditions), prompted(conditions, [PROMPT] * 2)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([3, 999])
    exact = denoiser(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(denoiser(x, t, cond), exact, atol=0.1, rtol=0.1)
    half = denoiser.bfloat16()(x, t, cond)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)


def test_starts_from_a_diffusers_folder(tmp_path: Path) -> None:
    source = built(CONDITIONS["text"])
    source.unet.save_pretrained(tmp_path / "unet")
    source.conditioner.encoders["text"].save_pretrained(tmp_path / "text_encoder")
    settings = job(CONDITIONS["text"])
    settings = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, init_from=str(tmp_path)))
    torch.manual_seed(1)
    made = build_denoiser(settings, (3, 4, 4))
    for name, weight in source.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name
    with pytest.raises(ConfigError, match=r"denoiser\.init_from.* in another shape"):
        build_denoiser(settings, (4, 4, 4))


def test_weights_must_all_be_there_and_fit() -> None:
    denoiser = built(CONDITIONS["none"])
    state = dict(denoiser.state_dict())
    first = next(iter(state))
    with pytest.raises(ConfigError, match=f"the checkpoint lacks 1 weights, such as {first}"):
        load_weights(denoiser, {k: v for k, v in state.items() if k != first}, "the checkpoint")
    with pytest.raises(ConfigError, match="unlike this model, 1 weights, such as extra"):
        load_weights(denoiser, {**state, "extra": torch.zeros(1)}, "the checkpoint")
    load_weights(denoiser, {k: torch.zeros_like(v) for k, v in state.items()}, "the checkpoint")
    assert all(not value.any() for value in denoiser.state_dict().values())
