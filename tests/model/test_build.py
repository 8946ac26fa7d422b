from __future__ import annotations

import copy

import pytest
import torch
from calotype.errors import ConfigError
from calotype.model.build import checkpoint_activations, instantiate, target
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

TEXT = {"_target_": "transformers.CLIPTextConfig", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 16}  # fmt: skip


def test_builds_nested_specs() -> None:
    model = instantiate({"_target_": "transformers.CLIPTextModel", "config": TEXT})
    assert isinstance(model, CLIPTextModel)
    assert isinstance(model.config, CLIPTextConfig)
    assert model.config.hidden_size == 8


def test_extra_arguments_win() -> None:
    made = instantiate({"_target_": "diffusers.AutoencoderKL", "norm_num_groups": 32, "latent_channels": 8},
                       norm_num_groups=4, block_out_channels=[4])  # fmt: skip
    assert made.config.norm_num_groups == 4
    assert made.config.latent_channels == 8


def test_optimizers_and_long_names() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert isinstance(instantiate({"_target_": "torch.optim.AdamW", "lr": 0.1}, params=weights), torch.optim.AdamW)
    assert target("diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL") is AutoencoderKL
    assert target("diffusers.models.UNet2DConditionModel") is UNet2DConditionModel


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "calotype.model.build.instantiate",
        "diffusersx.AutoencoderKL",
        "torch.load",
        "torch.nn.Linear",
        "",
        # spelled well, ending elsewhere
        "diffusers.utils.os.system",
        "diffusers.utils.logging.os.popen",
        "transformers.utils.import_utils.subprocess.Popen",
        "transformers.utils.import_utils.importlib.import_module",
        "torch.optim.lr_scheduler.types.FunctionType",
        "torch.optim.optimizer.torch.load",
        "diffusers.models.modeling_utils.torch.nn.Linear",
        "diffusers.models.autoencoders.autoencoder_kl.nn.Sequential",
        # theirs, but not something a config may build
        "diffusers.AutoencoderKL.from_pretrained",
        "transformers.AutoModel.from_pretrained",
        "transformers.pipeline",
        "diffusers.DiffusionPipeline",
        "diffusers.utils.load_image",
        "transformers.AutoModel",
        "diffusers.utils.import_utils",
        # private names and ways around them
        "diffusers.AutoencoderKL.__init__.__globals__",
        "diffusers.__builtins__",
        "diffusers.models.__class__",
        "diffusers..AutoencoderKL",
        "diffusers.",
        "diffusers.NoSuchThing",
        "diffusers.AutoencoderKL()",
    ],
)
def test_refuses_whatever_is_not_theirs(name: str) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        instantiate({"_target_": name})
    with pytest.raises(ConfigError, match="_target_"):
        instantiate({"_target_": "transformers.CLIPTextModel", "config": [{"deep": {"_target_": name}}]})


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_", "_anything"])
def test_refuses_keys_with_a_meaning(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        instantiate({"_target_": "diffusers.AutoencoderKL", key: True})
    with pytest.raises(ConfigError, match=key):
        instantiate({"_target_": "transformers.CLIPTextModel", "config": {**TEXT, key: True}})


@pytest.mark.parametrize("name", [["diffusers.AutoencoderKL"], {"a": 1}, 3, None])
def test_refuses_targets_that_are_not_names(name: object) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        instantiate({"_target_": name})


def test_yaml_aliases_are_checked_where_they_land(tmp_path: object) -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        "evil: &evil {_target_: os.system, command: 'true'}\n"
        "model: {_target_: transformers.CLIPTextModel, config: *evil}\n"
        "by_reference: {_target_: transformers.CLIPTextModel, config: '${evil}'}"
    )
    data = OmegaConf.to_container(node, resolve=True)
    assert isinstance(data, dict)
    for key in ("model", "by_reference"):
        with pytest.raises(ConfigError, match=r"os\.system"):
            instantiate(data[key])


def test_settings_that_the_class_refuses_are_the_users() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        instantiate({"_target_": "diffusers.UNet2DConditionModel", "no_such": 1})
    with pytest.raises(ConfigError, match="without _target_"):
        instantiate({"config": TEXT})


def test_checkpointed_activations_change_no_gradient() -> None:
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    plain = AutoencoderKL(**sizes, **kinds)
    again = copy.deepcopy(plain)
    checkpoint_activations(torch.nn.ModuleList([again]))
    assert again.encoder.gradient_checkpointing
    images, gradients = torch.randn(2, 3, 16, 16), []
    for model in (plain, again):
        model.train()(images).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
