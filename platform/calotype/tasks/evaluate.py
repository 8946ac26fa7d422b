"""evaluate: how good a denoiser is, in figures and in one picture.

Recognised prompts (digits), FID and KID, the autoencoder's PSNR and SSIM, and what latent space saves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from calotype import config, runs, track
from calotype.console import Progress
from calotype.data import Dataset
from calotype.data.elsewhere import dataset_store
from calotype.data.manifest import load_dataset
from calotype.data.shards import Sample
from calotype.environment import Worker
from calotype.errors import ConfigError
from calotype.pictures import captioned, png
from calotype.tasks import batches, compare, sample

BATCH = 64  # held-out images per encoder call
RECONSTRUCTED = 4096  # held-out images that PSNR and SSIM are taken over, at most
SHOWN = 100  # pictures in the report
SHUFFLES = 50  # of the control: one alone would scatter by a few per cent
SMALL = 64  # edge in pixels up to which the pixel-space UNet is measured without being asked for

Figures = dict[str, Any]
SourceOf = Callable[[str], Dataset]  # split -> its samples that may be used


@dataclass(frozen=True)
class Drawn:
    """Pictures asked for, and what a recogniser saw in them (empty where nobody can tell)."""

    prompts: list[Any]
    images: Any  # (B, 3, H, W)
    wanted: list[int]
    seen: list[int]

    @property
    def wrong(self) -> list[bool]:
        return [seen != wanted for seen, wanted in zip(self.seen, self.wanted, strict=False)]

    @property
    def accuracy(self) -> float:
        return 1 - sum(self.wrong) / len(self.wrong)


def resolve(settings: config.Evaluate) -> config.Evaluate:
    """Name the runs by identity and the checkpoint by digest.

    Raises:
        ConfigError: the runs cannot be compared.
        CalotypeError: no such run, or it has no checkpoint yet.
    """
    record, found = sample.chosen(settings.root, settings.run, settings.run_digest)
    sample.average_of(sample.trained(record), settings.ema_halflife)
    pixel = settings.pixel_run
    if pixel:
        other = runs.find(settings.root, "train_denoiser", pixel)
        compare.check(sample.trained(record), sample.trained(other))
        pixel = other.identity
    if settings.images < 1:
        raise ConfigError(f"images={settings.images}: at least one picture must be drawn")
    if settings.fid_images == 1:
        raise ConfigError("fid_images=1: FID compares sets of pictures, give 0 or a few thousand")
    return dataclasses.replace(settings, run=record.identity, run_digest=found.digest, pixel_run=pixel)


def evaluate(settings: config.Evaluate, worker: Worker, record: runs.Record) -> Figures:
    """Every figure that this model and dataset allow; the report goes to report/ of the run."""
    tracker = track.attach(settings, record)
    source = runs.find(settings.root, "train_denoiser", settings.run)
    model = sample.load_denoiser(source, settings.ema, settings.run_digest, worker.device, settings.ema_halflife)
    data = dataset_store(settings.root, model.settings.data.name)
    manifest = load_dataset(data, model.settings.data.digest)
    source_of = batches.source_of(model.settings.data, settings.root, data, manifest)
    tracker.inputs([track.Dataset(manifest.name, manifest.digest, data.uri, "evaluation")], [source])

    figures: Figures = {"images": settings.images, "images_seen": model.images}
    if manifest.meta["source"].get("kind") == "digits" and model.settings.conditions:
        drawn, found = recognised(settings, model)
        figures |= found
    else:
        drawn = described(settings, model, source_of)
    figures |= reconstructed(model, source_of)
    if settings.fid_images:
        figures |= distances(settings, model, source_of)
    if not compare.is_pixel(model.settings):
        pixel = runs.find(settings.root, "train_denoiser", settings.pixel_run) if settings.pixel_run else None
        if pixel or model.settings.encoding.resolution <= SMALL:
            figures |= compare.speeds(settings, model, pixel, worker.device)
    publish(record, tracker, model, drawn, figures)
    tracker.finish()
    return figures


# ------------------------------------------------------------------------------------------------ pictures


def recognised(settings: config.Evaluate, model: sample.Model) -> tuple[Drawn, Figures]:
    """Accuracies on prompted digits: training phrasings, unseen ones, and prompts shuffled against images.

    The control must fall to about 0.1: it would not if the recogniser answered to anything but the picture.
    """
    import numpy as np

    from calotype.data.sources import PHRASINGS, UNSEEN_PHRASINGS
    from calotype.model.metrics import recogniser

    seen = _prompted(settings, model, PHRASINGS, settings.seed)
    generator = np.random.Generator(np.random.Philox(settings.seed))
    guesses = [np.mean(generator.permutation(seen.wanted) == np.asarray(seen.seen)) for _ in range(SHUFFLES)]
    figures: Figures = {
        "accuracy": seen.accuracy,
        "accuracy_shuffled": float(np.mean(guesses)),
        "accuracy_recogniser": recogniser().accuracy,
    }
    if any(condition.source == "text" for condition in model.settings.conditions.values()):
        unseen = _prompted(settings, model, UNSEEN_PHRASINGS, settings.seed + settings.images)
        figures["accuracy_unseen_phrasing"] = unseen.accuracy
    return seen, figures


def _prompted(settings: config.Evaluate, model: sample.Model, phrasings: Sequence[str], seed: int) -> Drawn:
    from calotype.data.sources import caption_of
    from calotype.model.metrics import recogniser

    wanted = [number % 10 for number in range(settings.images)]
    texts = [caption_of(digit, phrasings[number // 10 % len(phrasings)]) for number, digit in enumerate(wanted)]
    prompts = [sample.prompt(model.settings.conditions, text, digit) for text, digit in zip(texts, wanted, strict=True)]
    images = _draw(settings, model, prompts, seed, "recognise")
    return Drawn(prompts, images, wanted, [int(digit) for digit in recogniser()(images)])


def described(settings: config.Evaluate, model: sample.Model, source_of: SourceOf) -> Drawn:
    """Pictures for captions of the dataset, held-out ones first: for eyes only."""
    samples = list(islice(chain.from_iterable(source_of(split).samples() for split in ("held_out", "train")),
                          settings.images))  # fmt: skip
    prompts = [_prompt_of(model, item) for item in samples]
    return Drawn(prompts, _draw(settings, model, prompts, settings.seed, "draw"), [], [])


def _draw(settings: config.Evaluate, model: sample.Model, prompts: Sequence[Any], seed: int, title: str) -> Any:
    with Progress(len(prompts), "images", title) as progress:
        return model.draw(prompts, settings.sampler, range(seed, seed + len(prompts)), progress.update)


def _prompt_of(model: sample.Model, item: Sample) -> Any:
    about = json.loads(bytes(item.members["json"])) if "json" in item.members else {}
    text = bytes(item.members.get("txt", b"")).decode()
    return sample.prompt(model.settings.conditions, text, about.get("label", 0))


# ------------------------------------------------------------------------------------------------ figures


def reconstructed(model: sample.Model, source_of: SourceOf) -> Figures:
    """PSNR (dB) and SSIM of the autoencoder on held-out images, through the posterior's mean; none in pixel space."""
    import torch

    from calotype.model import metrics

    held_out = source_of("held_out")
    if compare.is_pixel(model.settings) or not len(held_out):
        return {}
    psnr, ssim = [], []
    for batch in _batches(islice(held_out.samples(), RECONSTRUCTED), model.settings.encoding.resolution):
        mean, _ = model.autoencoder.encode(batch.to(model.device))
        back = model.autoencoder.decode(mean).cpu()
        psnr.append(metrics.psnr(back, batch))
        ssim.append(metrics.ssim(back, batch))
    return {
        "psnr_heldout": float(torch.cat(psnr).mean()),
        "ssim_heldout": float(torch.cat(ssim).mean()),
        "reconstructed": sum(map(len, psnr)),
    }


def distances(settings: config.Evaluate, model: sample.Model, source_of: SourceOf) -> Figures:
    """FID and KID of `fid_images` pictures, drawn for captions of the training split, against the training split."""
    from calotype.model import metrics

    prompts: list[Any] = []
    trained_on = source_of("train")
    for item in trained_on.samples():
        prompts.append(_prompt_of(model, item))
        if len(prompts) == settings.fid_images:
            break
    prompts = [prompts[number % len(prompts)] for number in range(settings.fid_images)]
    # Seeds of their own: the accuracies' pictures must not come back here.
    drawn = _draw(settings, model, prompts, settings.seed + 1_000_000, "FID")
    against = islice(trained_on.samples(), max(50_000, settings.fid_images))
    real = _batches(against, model.settings.encoding.resolution)
    found = metrics.distances(real, drawn.split(BATCH), settings.features, model.device, settings.seed)
    return {
        "fid": found.fid,
        "kid": found.kid,
        "kid_std": found.kid_std,
        "fid_real": found.real,
        "fid_drawn": found.drawn,
    }


def _batches(samples: Iterator[Sample], resolution: int) -> Iterator[Any]:
    """Images as the encoder saw them, (B, 3, S, S) in [-1, 1]."""
    import numpy as np
    import torch

    from calotype.data.images import decode, image_bytes

    while part := list(islice(samples, BATCH)):
        pixels = np.stack([decode(image_bytes(item), resolution, item.key).pixels for item in part])
        yield torch.from_numpy(pixels).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ report


def publish(
    record: runs.Record, tracker: track.Tracker, model: sample.Model, drawn: Drawn, figures: Mapping[str, Any]
) -> None:
    """report/: grid.png (wrong ones outlined), report.json, report.md."""
    captions = [
        f"{prompt}" if not wrong else f"{prompt} (reads {seen})"
        for prompt, wrong, seen in zip(
            drawn.prompts,
            drawn.wrong or [False] * len(drawn.prompts),
            drawn.seen or [0] * len(drawn.prompts),
            strict=True,
        )
    ]
    picture = captioned(sample.as_pictures(drawn.images[:SHOWN]), captions[:SHOWN], drawn.wrong)
    told = [
        {"prompt": prompt, **({"wanted": drawn.wanted[i], "seen": drawn.seen[i]} if drawn.seen else {})}
        for i, prompt in enumerate(drawn.prompts)
    ]
    report = {"run": model.settings.name, "images_seen": model.images, "figures": figures, "drawn": told}
    record.check_current()
    sample.write_all(
        record.artifacts.at("report"),
        {
            "grid.png": png(picture),
            "report.json": json.dumps(report, indent=1).encode(),
            "report.md": markdown(model, figures).encode(),
        },
    )
    tracker.picture("evaluation", picture, model.images)


def markdown(model: sample.Model, figures: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    head = f"# {model.settings.name} at {model.images:,} images\n\n| figure | value |\n|---|---:|\n"
    return head + "\n".join(rows) + "\n\n![drawn; wrong ones outlined](grid.png)\n"
