"""sample: a trained denoiser draws pictures; here too is how any task gets a trained denoiser back."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calotype import compose, config, runs, track
from calotype.console import Progress
from calotype.data.store import Store, open_store
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.pictures import captioned, png

log = logging.getLogger(__name__)


def resolve(settings: config.Sample) -> config.Sample:
    """Name the run by its identity and the checkpoint by its digest, and read the prompts' file: it is on this machine.

    Raises:
        ConfigError: prompts that this model cannot be given.
        CalotypeError: no such run, or it has no checkpoint yet.
    """
    record, found = chosen(settings.root, settings.run, settings.run_digest)
    average_of(trained(record), settings.ema_halflife)
    prompts = list(settings.prompts)
    if settings.prompts_file:
        if prompts:
            raise ConfigError("prompts and prompts_file are both given: choose one")
        prompts = read_prompts(settings.prompts_file)
    prompts = checked(prompts, trained(record).conditions)
    return dataclasses.replace(
        settings,
        run=record.identity,
        run_digest=found.digest,
        prompts=prompts,
        prompts_file="",
        out=str(Path(settings.out).expanduser().absolute()) if settings.out else "",
    )


def draw(settings: config.Sample, worker: Worker, record: runs.Record) -> dict[str, Any]:
    """Draw `per_prompt` images of every prompt; PNGs, a captioned grid and a list go to samples/ of the run.

    Image number i is drawn from seed + i, whatever the batch.
    """
    tracker = track.attach(settings, record)
    source = runs.find(settings.root, "train_denoiser", settings.run)
    model = load_denoiser(source, settings.ema, settings.run_digest, worker.device, settings.ema_halflife)
    prompts = [prompt for prompt in settings.prompts for _ in range(settings.per_prompt)]
    seeds = [settings.seed + number for number in range(len(prompts))]
    start = time.monotonic()
    with Progress(len(prompts), "images", "draw") as progress:
        images = model.draw(prompts, settings.sampler, seeds, progress.update)
    seconds = time.monotonic() - start

    pictures = as_pictures(images)
    names = [f"{number:05d}.png" for number in range(len(prompts))]
    files = {name: png(picture) for name, picture in zip(names, pictures, strict=True)}
    shown = captioned(pictures[:200], [str(prompt) for prompt in prompts[:200]])
    files["grid.png"] = png(shown)
    told = [{"file": n, "prompt": p, "seed": s} for n, p, s in zip(names, prompts, seeds, strict=True)]
    files["samples.json"] = json.dumps(told, indent=1).encode()
    record.check_current()
    write_all(record.artifacts.at("samples"), files)
    tracker.picture("samples", shown, model.images)
    tracker.inputs(used=[source])
    tracker.finish()
    return {"images": len(prompts), "seconds_per_image": seconds / len(prompts), "images_seen": model.images}


# ------------------------------------------------------------------------------------------------ a trained model


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: images seen, and the SHA-256 of its commit marker, which names everything in it."""

    images: int
    digest: str


@dataclass(frozen=True)
class Model:
    """A trained denoiser with all it needs to draw.

    Attributes:
        settings: the config it was trained with.
        shape: (C, h, w) of a latent.
        mean, std: (C,) channel statistics of the cache: model latents x whiten raw latents z, x = (z - mean) / std.
        images: seen in training.
    """

    settings: config.TrainDenoiser
    denoiser: Any
    autoencoder: Any
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    device: str

    def draw(
        self,
        prompts: Sequence[Any],
        sampler: config.Sampler,
        seeds: Sequence[int],
        done: Callable[[int], None] | None = None,
    ) -> Any:
        """One image per prompt, (B, 3, H, W) float32 in about [-1, 1], on the CPU; `done` hears how many are drawn."""
        import torch

        from calotype.data.cache import from_model
        from calotype.model import conditioner
        from calotype.model.diffusion import Diffusion
        from calotype.model.sampler import sample

        if cut := _cut(self.settings.conditions, prompts):
            log.warning(
                "%d of %d prompts are longer than the model's text input: their ends are lost", cut, len(prompts)
            )
        drawn = 0

        def count(more: int) -> None:
            nonlocal drawn
            drawn += more
            if done is not None:
                done(drawn)

        x = sample(
            self.denoiser,
            Diffusion(self.settings.diffusion),
            sampler,
            conditioner.prompted(self.settings.conditions, prompts, self.device),
            conditioner.empty(self.settings.conditions, self.device),
            self.shape,
            list(seeds),
            self.device,
            count,
        )
        with torch.no_grad():
            parts = [self.autoencoder.decode(from_model(part, self.mean, self.std)) for part in x.split(sampler.batch)]
        return torch.cat(parts).cpu()


def trained(record: runs.Record) -> config.TrainDenoiser:
    """The config of a train_denoiser run."""
    return compose.build(config.TrainDenoiser, record.config)


def chosen(root: str, reference: str, digest: str = "") -> tuple[runs.Record, Checkpoint]:
    """The run that `run:NAME` or `run:NAME@IMAGES` means, and its newest checkpoint, or that of `digest` or IMAGES.

    Raises:
        CalotypeError: there is none; a checkpoint that was named has lost files, or was never whole: says which.
    """
    from calotype.train import checkpoint

    name, images = runs.parted(reference)
    record = runs.find(root, "train_denoiser", name)
    if images is None:
        return record, newest(record, digest)
    checkpoint.check(record.artifacts, images)
    return record, Checkpoint(images, checkpoint.digest(record.artifacts, images))


def average_of(settings: config.TrainDenoiser, halflife: int) -> int:
    """Which average of a run: `halflife`, of `ema.halflives`; 0 for the first, that of `ema.halflife`.

    Raises:
        ConfigError: the run keeps no such average; names those that it does.
    """
    kept = [settings.ema.halflife, *settings.ema.halflives]
    if halflife and halflife not in kept:
        raise ConfigError(
            f"the run {settings.name} keeps no average of halflife {halflife}: choose one of "
            f"{', '.join(map(str, kept))} (ema.halflife and ema.halflives of its training)"
        )
    return 0 if halflife == kept[0] else halflife


def newest(record: runs.Record, digest: str = "") -> Checkpoint:
    """The newest committed checkpoint of a run, or the one of `digest`.

    Raises:
        CalotypeError: there is none.
    """
    from calotype.train import checkpoint

    found = [Checkpoint(n, checkpoint.digest(record.artifacts, n)) for n in checkpoint.committed(record.artifacts)]
    found = [entry for entry in found if digest in ("", entry.digest)]
    if not found:
        what = f"its checkpoint {digest[:12]} any more (train.keep)" if digest else "a checkpoint yet"
        raise CalotypeError(
            f"train_denoiser run {record.name} ({record.identity[:8]}) does not have {what}: train it on"
        )
    return found[-1]


def load_denoiser(
    record: runs.Record, ema: bool = True, digest: str = "", device: str = "cpu", halflife: int = 0
) -> Model:
    """A trained denoiser, ready to draw.

    Args:
        ema: the averaged weights, where the run keeps any.
        digest: of the checkpoint; the newest if empty.
        halflife: of the average; 0 for the first.
    """
    from calotype.data.cache import held_digest, load_cache, shape_of
    from calotype.model.autoencoder import load_autoencoder
    from calotype.model.denoiser import build_denoiser, load_weights
    from calotype.train import checkpoint

    settings = trained(record)
    found = newest(record, digest)
    root = open_store(record.root)
    cache = load_cache(root, settings, held_digest(root, settings))  # whose statistics its latents are whitened by
    shape = shape_of(cache.meta["encoding"])
    fresh = dataclasses.replace(settings, denoiser=dataclasses.replace(settings.denoiser, init_from=""))
    denoiser = build_denoiser(fresh, shape)
    weights = checkpoint.weights(record.artifacts, found.images, "denoiser", ema, average_of(settings, halflife))
    load_weights(denoiser, weights, f"checkpoint {found.images} of {record.name}")
    return Model(
        settings,
        denoiser.eval().requires_grad_(False).to(device),
        load_autoencoder(settings.autoencoder).eval().requires_grad_(False).to(device),
        shape,
        tuple(cache.meta["channel_mean"]),
        tuple(cache.meta["channel_std"]),
        found.images,
        device,
    )


def _cut(conditions: Mapping[str, config.Condition], prompts: Sequence[Any]) -> int:
    from calotype.model.conditioner import cut

    count = 0
    for name, condition in conditions.items():
        if condition.source == "text":
            texts = [str(prompt[name] if isinstance(prompt, Mapping) else prompt) for prompt in prompts]
            count += cut(condition.tokenizer, texts, condition.length)
    return count


# ------------------------------------------------------------------------------------------------ prompts and files


def read_prompts(path: str) -> list[str]:
    """One prompt per line; empty lines do not count."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file={path} cannot be read as UTF-8 text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def prompt(conditions: Mapping[str, config.Condition], text: str, label: int = 0) -> Any:
    """What a model with these conditions is given for an image of that caption and label."""
    values = {name: label if c.source == "label" else text for name, c in conditions.items()}
    return values if len(values) > 1 else next(iter(values.values()), "")


def checked(prompts: list[Any], conditions: Mapping[str, config.Condition]) -> list[Any]:
    """Prompts that this model can be given: texts, labels, or {condition: value} where it has several.

    A model without conditions takes one number instead, how many pictures to draw.
    """
    if not conditions:
        if len(prompts) > 1 or not all(isinstance(prompt, int) and prompt > 0 for prompt in prompts):
            raise ConfigError("this model is unconditional: prompts=[16] draws sixteen pictures")
        return [""] * (prompts[0] if prompts else 1)
    if not prompts:
        raise ConfigError("prompts is empty: give prompts='[...]' or prompts_file=FILE")
    for name, condition in conditions.items():
        for prompt in prompts:
            value = prompt.get(name) if isinstance(prompt, Mapping) else prompt
            if len(conditions) > 1 and (not isinstance(prompt, Mapping) or value is None):
                wanted = ", ".join(f"{key}: ..." for key in conditions)
                raise ConfigError(f"prompt {prompt!r} must be {{{wanted}}}: this model has several conditions")
            if condition.source == "label" and not _is_label(value, condition.classes):
                raise ConfigError(f"prompt {value!r} is not a label: this model knows 0 to {condition.classes - 1}")
    return prompts


def _is_label(value: Any, classes: int) -> bool:
    return str(value).strip().isdigit() and int(value) < classes


def as_pictures(images: Any) -> list[Any]:
    """(B, 3, H, W) in [-1, 1] -> PIL images."""
    from PIL import Image

    from calotype.model.metrics import to_bytes

    return [Image.fromarray(picture) for picture in to_bytes(images).permute(0, 2, 3, 1).contiguous().numpy()]


def write_all(store: Store, files: Mapping[str, bytes]) -> None:
    """Write several files at once: small objects wait for the store, not for this machine."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write(name, files[name]), files))
