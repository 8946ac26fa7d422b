"""Small latent caches, made by the job's own functions: datasets of noise, autoencoders that nobody trained."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calotype import runs
from calotype.config import Accept, Autoencoder, CacheLatents, Condition, Data, Encoding
from calotype.data import cache, shards
from calotype.data.manifest import DATASET, Manifest, Shard, load_dataset, publish_dataset
from calotype.data.shards import Sample
from calotype.data.store import Store, open_store
from calotype.environment import Worker
from calotype.model.conditioner import load_tokenizer
from calotype.tasks import cache as task
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

CONDITIONS = {
    "text": Condition(encoder={"_target_": "transformers.CLIPTextModel"}, length=8),
    "label": Condition(kind="class", source="label", classes=10),
}
SIZES = {"train": (9, 8), "held_out": (5,)}


def autoencoder_folder(folder: Path, seed: int = 0, scale: float = 1.0, channels: Sequence[int] = (8, 16)) -> str:
    torch.manual_seed(seed)
    sizes = {"block_out_channels": list(channels), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * len(channels),
             "up_block_types": ["UpDecoderBlock2D"] * len(channels)}  # fmt: skip
    model = AutoencoderKL(latent_channels=4, **sizes, **kinds)
    with torch.no_grad():
        model.quant_conv.weight.mul_(scale)
    model.save_pretrained(folder)
    return str(folder)


def text_folder(folder: Path, width: int = 16, length: int = 77) -> str:
    """A CLIP text model that nobody trained, one layer deep, with the small tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("small")
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=length, **sizes, **ends)
    CLIPTextModel(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def dataset(root: Path | str, sizes: dict[str, Sequence[int]] = SIZES, caption: str = "a {}") -> Manifest:
    store, rows, number = open_store(str(root)).at("datasets", "toy"), [], 0
    for split, counts in sizes.items():
        for index, count in enumerate(counts):
            samples = []
            for _ in range(count):
                samples.append(sample(number, caption))
                number += 1
            rows.append(shards.write_shard(store, f"shards/{split}-{len(sizes)}-{index:05d}.tar", samples, 4, split))
    manifest = Manifest(DATASET, "toy", ("json", "png", "txt"), tuple(rows))
    publish_dataset(store, manifest)
    return manifest


def sample(number: int, caption: str) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    about = json.dumps({"label": number % 10, "width": 24, "height": 20}).encode()
    return Sample(f"s{number:03d}", {"png": file.getvalue(), "txt": caption.format(number).encode(), "json": about})


def config_of(root: Path | str, weights: str, **changes: Any) -> CacheLatents:
    encoding = Encoding(resolution=16, batch=4)
    autoencoder = Autoencoder(kind="pretrained", path=weights)
    config = CacheLatents(name="c", root=str(root), data=Data(name="toy"), autoencoder=autoencoder, encoding=encoding,
                          conditions=CONDITIONS, accept=Accept(psnr=0))  # fmt: skip
    return task.resolve(replace(config, **changes))


def run(config: CacheLatents, order: Callable[[list[Shard]], Sequence[Shard]] = list) -> dict[str, Any]:
    encode_shard = task.make(config, Worker())
    return task.commit(config, [encode_shard(unit) for unit in order(task.plan(config))])


def latents_of(config: CacheLatents) -> Store:
    return open_store(config.root).at("latents", cache.encoding_id(cache.encoding_of(config)))


def another_version(config: CacheLatents) -> CacheLatents:
    """The dataset without its first shard and with a new one."""
    store = open_store(config.root).at("datasets", "toy")
    old = load_dataset(store)
    extra = shards.write_shard(store, "shards/train-new-00000.tar", [sample(n, "a {}") for n in range(90, 93)], 4)
    publish_dataset(store, replace(old, shards=(*old.shards[1:], extra)))
    return task.resolve(replace(config, data=Data(name="toy")))


def recorded(job: str, config: Any, finish: bool = True) -> runs.Record:
    """A run of the job, as its driver records it."""
    record = runs.begin(job, config, lambda _: ("", ""), lambda _: None)
    with runs.attempt_of(record) as publish:
        if finish:
            publish({"images": 1})
    return record
