"""What a sample takes in a latent shard that the job's own functions write, beside the naive layout.

256 px, a frozen text encoder of width 1024, captions of 15 tokens between start and end.  The naive layout: 77 x 1024
float16 embeddings and one draw of the posterior.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

NAIVE = 2 * (77 * 1024 + 4 * 32 * 32)  # a sample, in no container at all
CAPTION = "the number " * 6 + "a {:02d}"  # 15 tokens of the small tokenizer


def stored_bytes(folder: Path, mode: str, images: int = 32) -> tuple[float, dict[str, int]]:
    """(bytes per sample of a latent shard, of it all, its sidecar too; of each member of its first sample)."""
    from calotype.config import Condition, Encoding
    from calotype.data import cache, shards
    from calotype.data.store import open_store

    from tests.caches import autoencoder_folder, config_of, dataset, latents_of, run, text_folder

    text = Condition(mode=mode, length=77, tokenizer="small", encoder={"_target_": "transformers.CLIPTextModel"})
    if mode != "tokens":
        text = replace(text, path=text_folder(folder / "text", width=1024))
    dataset(folder, {"train": (images,)}, caption=CAPTION)
    weights = autoencoder_folder(folder / "autoencoder", channels=(4, 4, 4, 4))
    config = config_of(folder, weights, conditions={"text": text}, encoding=Encoding(resolution=256, batch=8))
    run(config)
    manifest = cache.load_cache(open_store(config.root), config)
    sample = next(shards.iterate(latents_of(config), manifest.shards))
    about = json.loads(bytes(sample.members["json"]))
    assert (manifest.meta["captions_cut"], about["text"]) == (0, CAPTION.format(0))
    beside = sum(entry.size for entry in latents_of(config).list() if entry.key.endswith(".sidecar.json"))
    members = {name: len(data) for name, data in sample.members.items()}
    return (manifest.shards[0].bytes + beside) / images, members


def tell() -> None:
    print(f"bytes a sample at 256 px, captions of 15 tokens; naive layout: {NAIVE:,}")
    for mode in ("tokens", "masked", "full"):
        with tempfile.TemporaryDirectory() as folder:
            size, members = stored_bytes(Path(folder), mode, images=128)
        parts = ", ".join(f"{name} {data:,}" for name, data in members.items())
        print(f"    {mode:<8}{size:10,.0f}  {size / NAIVE:5.3f} of naive   ({parts})", flush=True)
