"""promote: the best checkpoint of a finished run becomes a version of a registered model in MLflow."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from calotype import registry, runs
from calotype.config import TrainDenoiser
from calotype.data.store import Store
from calotype.errors import CalotypeError, ConfigError, DataError
from calotype.tasks.sample import load_denoiser, trained
from calotype.train import checkpoint

METRIC = "validation_loss"
INDEX = "model_index.json"  # of a diffusers folder: written last, so that a part of one is none


@dataclass(frozen=True)
class Promoted:
    """A version of a registered model.

    Attributes:
        fresh: it was made now.
        export: where its diffusers folder lies; "" where diffusers' pipeline has no place for it, and `why`.
    """

    model: str
    version: str
    images: int
    fresh: bool
    export: str
    why: str = ""


def promote(root: str, reference: str, model: str = "", alias: str = "") -> Promoted:
    """Register the averaged weights with the least validation loss, or the last ones where there is none.

    A model that StableDiffusionPipeline has no place for is registered too, without an export: `calotype sample` draws
    with it all the same, and the version says why.

    Args:
        model: name of the registered model; that of the run's dataset if empty.
        alias: is moved to the version.

    Raises:
        CalotypeError: the run is not finished, is not in MLflow, or MLflow refuses.
    """
    record = runs.find(root, "train_denoiser", reference)
    if record.status() != "finished":
        raise CalotypeError(f"train_denoiser {record.name} is {record.status()}, not finished: nothing is promoted yet")
    if not record.mlflow_run_id:
        raise CalotypeError(
            f"train_denoiser {record.name} was trained with track=none: MLflow has no run that a version could be of"
        )
    settings = trained(record)
    model = model or settings.data.name
    images, halflife, loss = best(record)
    digest = checkpoint.digest(record.artifacts, images)
    which = f"@{halflife}" if halflife else ""  # of the averages in a checkpoint, where it is not the first
    place = record.artifacts.at("exports", f"{images:012d}-{digest[:16]}{which}")
    version, why = registry.version_of(model, digest + which), ""
    if fresh := not version:
        why = "" if place.exists(INDEX) else _export(record, settings, digest, halflife, place)
        source = checkpoint.place(record.artifacts, images) if why else place
        told = _told(record, settings, images, halflife, loss, why)
        if why:  # nothing else has these weights: a training that goes on must not forget them
            checkpoint.hold(record.artifacts, images)
        grid = _grid(record, images)
        if grid and not why:
            place.write("samples.png", record.artifacts.read(grid))
        words = f"{METRIC} {loss:.4g} at " if loss is not None else ""
        shown = f"Samples: `{record.artifacts.uri}/{grid}`" if grid else "No samples were drawn while it trained."
        description = f"{record.name}: {words}{images:,} images. {shown}{f' No export: {why}' if why else ''}"
        version = registry.register(record, model, digest + which, source.uri, told, description)
    if alias:
        registry.point(model, alias, version)
    return Promoted(model, version, images, fresh, place.uri if place.exists(INDEX) else "", why)


def best(record: runs.Record) -> tuple[int, int, float | None]:
    """(images seen, halflife of one of `ema.halflives` or 0 for the first average, validation loss) of the best average
    in the checkpoints that are kept; the newest of equals, and the first average of the newest where none has a loss.

    A checkpoint between two validations carries the figures of the last one, which are not those of its own weights:
    they do not count, nor does a loss that is not finite.

    Raises:
        CalotypeError: there is no checkpoint.
    """
    names = {0: METRIC} | {one: f"{METRIC}_ema_{one}" for one in trained(record).ema.halflives}
    found: list[tuple[float, int, int]] = []
    for images in checkpoint.committed(record.artifacts):
        try:
            with checkpoint.opened(record.artifacts, images, ()) as saved:
                validated = saved.state.get("validated", images)  # not known of those that older versions wrote
                known = saved.state["figures"] if validated == images else {}
        except DataError:
            if images in checkpoint.committed(record.artifacts):
                raise
            continue  # forgotten since it was listed: the run is being continued
        losses = {halflife: known.get(name, math.inf) for halflife, name in names.items()}
        found += [(loss if math.isfinite(loss) else math.inf, -images, halflife) for halflife, loss in losses.items()]
    if not found:
        raise CalotypeError(f"train_denoiser {record.name} has no checkpoint any more: train it again")
    loss, negative, halflife = min(found)
    return -negative, halflife, loss if loss < math.inf else None


def _export(record: runs.Record, settings: TrainDenoiser, digest: str, halflife: int, place: Store) -> str:
    """Put a diffusers folder at `place`; or why diffusers has no place for such a model."""
    from calotype.model.export import check_exportable, export

    try:
        check_exportable(settings)
    except ConfigError as error:
        return str(error)
    made = load_denoiser(record, digest=digest, halflife=halflife)
    with tempfile.TemporaryDirectory(prefix="calotype-") as name:
        try:
            export(Path(name), made.denoiser, made.autoencoder, settings, made.mean, made.std)
        except ConfigError as error:
            return str(error)
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == INDEX):
            place.write(str(path.relative_to(name)), path)
    return ""


def _told(
    record: runs.Record, settings: TrainDenoiser, images: int, halflife: int, loss: float | None, why: str
) -> dict[str, str]:
    """Lineage, as tags."""
    return registry.tags_of(
        {
            "run": record.identity,
            "name": record.name,
            "images": images,
            "ema_halflife": halflife or settings.ema.halflife,
            METRIC: loss,
            "dataset": f"{settings.data.name} {settings.data.digest}",
            "cache": settings.cache,
            "autoencoder": f"{settings.autoencoder.path} {settings.autoencoder.digest}".strip(),
            "export": why or "diffusers",
        }
    )


def _grid(record: runs.Record, images: int) -> str:
    """Key of the newest picture of samples that was drawn by then; "" if there is none."""
    drawn = [entry.key for entry in record.artifacts.list("images/samples+step+") if entry.key.endswith(".png")]
    steps = [(int(key.split("+")[2]), key) for key in drawn]
    return max((pair for pair in steps if pair[0] <= images), default=(0, ""))[1]
