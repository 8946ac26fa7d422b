from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model.digests import condition_digest, encoder_digest, tensors, text_encoder_digest, text_width
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

# Caches carry these digests for years: a change here orphans them.
SMALL = "564e72962f17ea56c7b3f0ceb6929d1514f8727865bcbfe774cab4926336cbfe"
GOLDEN = "fd60dadcce94dada133bbdad8252b1a9855fdea2b68612cb76922d8d86aad306"


def model(seed: int = 0, **changes: object) -> AutoencoderKL:
    torch.manual_seed(seed)
    settings = {"block_out_channels": [4, 4], "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 2}  # fmt: skip
    return AutoencoderKL(**{**settings, **changes})


def saved(made: AutoencoderKL, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def test_the_decoder_half_does_not_matter_and_the_encoder_half_does(tmp_path: Path) -> None:
    made = model()
    digest = encoder_digest(saved(made, tmp_path / "a"))
    with torch.no_grad():
        made.decoder.conv_in.weight.add_(1)
        made.post_quant_conv.weight.add_(1)
    assert encoder_digest(saved(made, tmp_path / "b")) == digest
    with torch.no_grad():
        made.quant_conv.bias[0] += 1e-6
    assert encoder_digest(saved(made, tmp_path / "c")) != digest


def test_a_state_in_memory_and_its_folder_agree(tmp_path: Path) -> None:
    made = model()
    assert encoder_digest(made.state_dict(), made.config) == encoder_digest(saved(made, tmp_path))


def test_config_matters_where_the_encoder_reads_it(tmp_path: Path) -> None:
    made = model()
    config_ = {key: value for key, value in made.config.items() if not key.startswith("_")}
    digest = encoder_digest(made.state_dict(), config_)
    assert encoder_digest(made.state_dict(), {**config_, "norm_num_groups": 4}) != digest
    assert encoder_digest(made.state_dict(), {**config_, "scaling_factor": 7, "up_block_types": []}) == digest
    config_.pop("mid_block_add_attention")  # older folders do not say it
    assert encoder_digest(made.state_dict(), config_) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_count_and_not_the_file_they_are_in(tmp_path: Path, dtype: torch.dtype) -> None:
    made = model().to(torch.bfloat16).to(torch.float16).float()  # values that every dtype holds exactly
    digest = encoder_digest(saved(made, tmp_path / "a"))
    file = saved(made, tmp_path / "b") / "diffusion_pytorch_model.safetensors"
    state = {name: value.to(dtype) for name, value in reversed(load_file(file).items())}
    save_file(state, file)
    read = dict(tensors([file]))
    for name, value in state.items():
        np.testing.assert_array_equal(read[name], value.float().numpy())
    assert encoder_digest(tmp_path / "b") == digest


def test_old_names_of_attention_are_the_same_weights(tmp_path: Path) -> None:
    file = saved(model(), tmp_path) / "diffusion_pytorch_model.safetensors"
    digest = encoder_digest(tmp_path)
    state = load_file(file)
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        state = {name.replace(new, old): value for name, value in state.items()}
    save_file({k: v[:, :, None, None] if k.endswith("query.weight") else v for k, v in state.items()}, file)
    assert any(".query." in name for name in state)
    assert encoder_digest(tmp_path) == digest


def test_text(tmp_path: Path) -> None:
    assert condition_digest(config.Condition()) == SMALL
    assert condition_digest(config.Condition(drop=0.5, encoder={"a": 1})) == SMALL
    assert condition_digest(config.Condition(kind="class", source="label", classes=3)) == ""
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    encoder.save_pretrained(tmp_path)
    assert text_width(str(tmp_path)) == 8
    frozen = config.Condition(mode="full", path=str(tmp_path))
    before = condition_digest(frozen)
    assert before not in ("", SMALL)
    with torch.no_grad():
        encoder.final_layer_norm.bias[0] += 1
    encoder.save_pretrained(tmp_path)
    assert condition_digest(frozen) != before
    settings = json.loads((tmp_path / "config.json").read_text())
    digest = text_encoder_digest(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "transformers_version": "0", "dtype": "float16"}))
    assert text_encoder_digest(str(tmp_path)) == digest


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no vae"):
        encoder_digest(tmp_path)
    with pytest.raises(ConfigError, match="no encoder"):
        encoder_digest({"unet.weight": np.zeros(1)}, {})


def test_submit_needs_no_torch() -> None:
    script = (
        "import sys\nfrom calotype import config\nfrom calotype.model.digests import condition_digest\n"
        "condition_digest(config.Condition())\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_digest_of_known_weights_never_changes() -> None:
    state = {f"encoder.{name}.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7 for name in "ab"}
    state["decoder.x"] = np.ones(1, np.float32)
    assert encoder_digest(state, {"latent_channels": 4, "block_out_channels": (8, 8)}) == GOLDEN
