from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calotype import config
from calotype.errors import ConfigError
from calotype.model import autoencoder as room
from calotype.model.digests import autoencoder_shape, encoder_digest
from diffusers import AutoencoderKL

MODEL = {
    "_target_": "diffusers.AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
}


def fresh(**changes: object) -> config.Autoencoder:
    return config.Autoencoder(**{"f": 2, "channels": 3, "model": MODEL, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    room.load_autoencoder(fresh()).model.save_pretrained(path)
    return path


def brought(path: object, **changes: object) -> config.Autoencoder:
    return config.Autoencoder(**{"kind": "pretrained", "path": str(path), "f": 2, "channels": 3, **changes})  # type: ignore[arg-type]


def test_raw_latents_are_diffusers_posterior(folder: Path) -> None:
    images = torch.randn(3, 3, 8, 8)
    ours = room.load_autoencoder(brought(folder))
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    mean, std = ours.encode(images)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(std, posterior.std)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(posterior.mean).sample)
    assert mean.shape == (3, 3, 4, 4)


def test_bits_of_a_latent_depend_on_nothing_beside_it(folder: Path) -> None:
    ours = room.load_autoencoder(brought(folder))
    images = torch.randn(7, 3, 16, 16)
    whole, whole_std = ours.encode(images, batch=4)
    tail, tail_std = ours.encode(images[4:], batch=4)
    assert whole_std is not None
    assert tail_std is not None
    assert torch.equal(tail, whole[4:])
    assert torch.equal(tail_std, whole_std[4:])
    others = torch.cat([images[:1], torch.randn(2, 3, 16, 16)])
    assert torch.equal(ours.encode(others, batch=4)[0][0], whole[0])
    assert torch.equal(ours.decode(whole, batch=4)[4:], ours.decode(whole[4:], batch=4))


def test_pixel_space_is_the_identity() -> None:
    ours = room.load_autoencoder(config.Autoencoder(kind="identity", f=1, channels=3))
    images = torch.randn(2, 3, 8, 8)
    mean, std = ours.encode(images)
    assert std is None
    assert torch.equal(mean, images)
    assert torch.equal(ours.decode(mean), images)


def test_objective_is_the_papers_by_hand() -> None:
    images, made = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0], [0, 3]]]])
    mean, logvar = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.5]]]])
    kl = 0.5 * (4 + torch.tensor(0.5).exp() - 1 - 0.5)
    expected = 4 / 4 + 2 * 10 / 4 + 0.1 * kl / 4
    torch.testing.assert_close(room.loss(images, (made, mean, logvar), 2.0, 0.1), expected.reshape(1))


def test_training_reaches_every_weight_and_learns() -> None:
    torch.manual_seed(0)
    model = room.load_autoencoder(fresh())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images = torch.linspace(-1, 1, 8 * 8 * 3).reshape(1, 3, 8, 8)
    losses = []
    for _ in range(12):
        loss = room.loss(images, model(images, torch.randn(1, 3, 4, 4)), 1.0, 1e-6).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_sizes_that_contradict_the_weights_are_named(folder: Path) -> None:
    assert autoencoder_shape(folder) == (2, 3)
    with pytest.raises(ConfigError, match=r"autoencoder\.f=4 .*set autoencoder\.f=2"):
        room.load_autoencoder(brought(folder, f=4))


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(ConfigError, match="safetensors"):
        room.load_autoencoder(brought(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "no such thing", ""])
def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(ConfigError, match=r"autoencoder\.path"):
        room.load_autoencoder(brought(path))


def test_hub_without_network_is_one_sentence(tmp_path: Path) -> None:
    script = (
        "from calotype import config\nfrom calotype.errors import ConfigError\n"
        "from calotype.model.digests import encoder_digest\n"
        "try: encoder_digest('nobody/nothing')\n"
        "except ConfigError as error: print(error)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("autoencoder.path='nobody/nothing' is not a folder here and cannot be fetched"), done
    assert len(done.stdout.strip().splitlines()) == 1


def test_a_whole_pipeline_folder_and_a_store_are_read_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(folder)
    assert encoder_digest(tmp_path / "pipeline") == encoder_digest(folder)
    assert encoder_digest(f"file://{folder}") == encoder_digest(folder)
    images = torch.randn(1, 3, 8, 8)
    from_store = room.load_autoencoder(brought(f"file://{folder}")).encode(images)[0]
    assert torch.equal(from_store, room.load_autoencoder(brought(folder)).encode(images)[0])
