"""prepare: a source becomes WebDataset shards, sidecars and a manifest in the object store.

A shard is named after its content: the settings that shape it, and name, label, bytes and caption of every item in it.
So a shard that exists is recognised by reading its source files and decoding none; a second run writes nothing; and a
file that is added, removed or changed costs the one shard that it falls into (`items.cut`), because which items make
a shard depends on hashes of their names.  Modification times are never part of it: the same files, copied anywhere,
give the same bytes and the same manifest digest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from calotype.compose import digest_of
from calotype.config import Data, Prepare
from calotype.data import shards
from calotype.data.images import decode, image_bytes
from calotype.data.items import Item, Listing, Raw, cut, digest, read, split
from calotype.data.manifest import DATASET, Manifest, Shard, load_dataset, publish_dataset
from calotype.data.sources import open_source
from calotype.data.store import Missing, Store, open_store
from calotype.environment import Worker
from calotype.errors import ConfigError, DataError
from calotype.runs import Record

RECIPE = 2  # counted up when the same input would become other bytes
NAMED = 5  # kinds of quarantine that an error spells out


@dataclass(frozen=True)
class Unit:
    """One shard to write: items [start, stop) of a split, in its order; `digest` is that of their names."""

    split: str
    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """All shards of a dataset; together they hold each of the source's `items` once."""

    units: tuple[Unit, ...]
    digest: str
    items: int


@dataclass(frozen=True)
class Made:
    """What became of a unit's items: samples in its shard, the others quarantined as (name, reason)."""

    unit: Unit
    shard: Shard | None
    members: tuple[str, ...]
    quarantined: tuple[tuple[str, str], ...]


def resolve(config: Prepare) -> Prepare:
    """The config with absolute paths, and with `data.digest` naming the state of the source.

    A finished run is recognised by it.  It holds the fingerprint of the source (names, sizes, times: cheap) and what
    was prepared under this name before, so that going back to an earlier source publishes that one again.

    Raises:
        ConfigError: the folder or table is not there, or the name cannot be one.
    """
    data = config.data
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", data.name):
        raise ConfigError(
            f"data.name={data.name!r} must be letters, digits, - _ and . and begin with a letter or digit"
        )
    if data.digest:
        return config
    data = dataclasses.replace(data, path=_absolute(data.path), table=_absolute(data.table))
    state = digest_of([data.name, _settings(data), open_source(data).fingerprint()])[:32]
    before = _published_state(config)
    if before[:32] != state:
        before = state + digest(before)[:32]
    return dataclasses.replace(config, data=dataclasses.replace(data, digest=before))


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser()) if path else ""


def plan(config: Prepare) -> Plan:
    """The shards that the dataset is to have.

    Raises:
        DataError: the source is empty.
    """
    return _plan(config.data, open_source(config.data).listing())


def make(config: Prepare, worker: Worker) -> Callable[[Unit], Made]:
    """The worker's function unit -> shard, written unless it exists.  Every worker must see the source's folder."""
    source, store = open_source(config.data), dataset_store(config)
    parts = split(source.listing().items, config.data.held_out)

    def write(unit: Unit) -> Made:
        items = parts[unit.split][unit.start : unit.stop]
        if _names_digest(items) != unit.digest:
            raise DataError(_changed(config))
        raws = [source.load(item) for item in items]
        key = f"shards/{unit.split}-{_content_digest(config.data, unit, items, raws)[:16]}.tar"
        found = shards.existing_shard(store, key)
        if found is not None and found.samples == len(items):
            return Made(unit, found, shards.read_sidecar(store, found).members, ())
        return _written(config, unit, items, raws, key, found)

    return write


def commit(config: Prepare, results: Iterable[Made], record: Record | None = None) -> dict[str, Any]:
    """Publish the manifest of what was made.

    Args:
        record: the run, which gets a list of what is quarantined.

    Returns:
        samples (held out ones included), held_out, shards, bytes, quarantined, passed_by (files that are no images),
        passed_by_suffix, digest (of the manifest).

    Raises:
        DataError: more items are quarantined than `data.error_budget`, nothing is left, or the source changed.
    """
    listing = open_source(config.data).listing()
    planned = _plan(config.data, listing)
    made = {result.unit: result for result in results}
    if set(made) != set(planned.units):
        raise DataError(_changed(config))
    results = [made[unit] for unit in planned.units]
    written = [result.shard for result in results if result.shard is not None]
    quarantined = sorted(entry for result in results for entry in result.quarantined)
    samples = sum(shard.samples for shard in written)
    assert samples + len(quarantined) == planned.items, "an item was lost"
    store = dataset_store(config)
    _keep_within_budget(config.data, store, quarantined, planned.items)
    if not any(shard.split == "train" for shard in written):
        raise DataError(
            f"dataset {config.data.name!r} has no sample to train on: {planned.items} items, "
            f"{len(quarantined)} quarantined, data.held_out={config.data.held_out:g}"
        )
    meta: dict[str, Any] = {
        "source": _settings(config.data),
        "quarantined": [{"name": name, "reason": reason} for name, reason in quarantined],
    }
    if listing.classes:
        meta |= {"classes": len(listing.classes), "class_names": list(listing.classes)}
    members = tuple(sorted({member for result in results for member in result.members}))
    manifest = Manifest(DATASET, config.data.name, members, tuple(written), meta)
    published = publish_dataset(store, manifest)
    if record is not None and quarantined:
        record.list_left_out(quarantined)
    store.delete("quarantined.jsonl")  # of an attempt that failed; the manifest lists what is left out now
    store.write("prepared.json", json.dumps({"state": config.data.digest}).encode())
    return {
        "samples": samples,
        "held_out": sum(shard.samples for shard in written if shard.split == "held_out"),
        "shards": len(written),
        "bytes": sum(shard.bytes for shard in written),
        "quarantined": len(quarantined),
        "passed_by": sum(listing.passed_by.values()),
        "passed_by_suffix": listing.passed_by,
        "digest": published,
    }


def picture(config: Prepare, count: int = 64) -> Image.Image:
    """Contact sheet of the newest version: up to `count` training samples, each with the first words of its caption."""
    store = dataset_store(config)
    cell, line = 96, 14
    chosen: list[shards.Sample] = []
    for shard in load_dataset(store).split("train"):
        chosen += shards.read_chunk(store, shard, shards.read_sidecar(store, shard), 0)[: count - len(chosen)]
        if len(chosen) == count:
            break
    columns = min(8, len(chosen))
    height = -(-len(chosen) // columns) * (cell + line)
    sheet, font = Image.new("RGB", (columns * cell, height), "white"), ImageFont.load_default(10)
    draw = ImageDraw.Draw(sheet)
    for index, sample in enumerate(chosen):
        left, top = index % columns * cell, index // columns * (cell + line)
        pixels = decode(image_bytes(sample), cell - 4, sample.key, config.data.max_pixels).pixels
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (left + 2, top + 2))
        words = bytes(sample.members.get("txt", b"")).decode().split()
        text = " ".join(words)
        while text and draw.textlength(text, font) > cell - 4:
            text = text.rpartition(" ")[0] if " " in text else text[:-1]
        draw.text((left + 2, top + cell), text, "black", font)
    return sheet


def dataset_store(config: Prepare) -> Store:
    """`ROOT/datasets/NAME`."""
    return open_store(config.root).at("datasets", config.data.name)


# ------------------------------------------------------------------------------------------------ one shard


def _written(
    config: Prepare, unit: Unit, items: Sequence[Item], raws: Sequence[Raw], key: str, found: Shard | None
) -> Made:
    """Read every item; write the samples, unless `found` has been written with just these, and name the rest."""
    samples: list[shards.Sample] = []
    rows: list[dict[str, Any]] = []
    quarantined: list[tuple[str, str]] = []
    for item, raw in zip(items, raws, strict=True):
        outcome = read(item, raw, config.data)
        if isinstance(outcome, str):
            quarantined.append((item.name, outcome))
        else:
            samples.append(outcome[0])
            rows.append(outcome[1])
    assert len(samples) + len(quarantined) == len(items), "an item was lost"
    if not samples:
        return Made(unit, None, (), tuple(quarantined))
    members = tuple(sorted({member for sample in samples for member in sample.members}))
    if found is None or found.samples != len(samples):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        store = dataset_store(config)
        found = shards.write_shard(store, key, samples, config.data.chunk_samples, unit.split, columns)
    return Made(unit, found, members, tuple(quarantined))


def _content_digest(data: Data, unit: Unit, items: Sequence[Item], raws: Sequence[Raw]) -> str:
    settings = [RECIPE, unit.split, data.chunk_samples, data.max_pixels, data.max_caption]
    parts: list[str | bytes] = [json.dumps(settings)]
    for item, raw in zip(items, raws, strict=True):
        parts += [item.name, item.key, str(item.label), item.reason or raw.reason]
        parts += ["none" if raw.caption is None else digest(raw.caption), digest(raw.image)]
    return digest(*parts)


def _names_digest(items: Sequence[Item]) -> str:
    return digest(*(part for item in items for part in (item.name, str(item.label), item.reason)))[:32]


# ------------------------------------------------------------------------------------------------ the whole


def _settings(data: Data) -> dict[str, Any]:
    """What shapes a dataset besides its files, for the manifest.  No path: a moved folder is the same source."""
    common = {"recipe": RECIPE, "kind": data.kind, "held_out": data.held_out, "max_pixels": data.max_pixels}
    common |= {"max_caption": data.max_caption, "chunk_samples": data.chunk_samples}
    common |= {"shard_samples": data.shard_samples}
    if data.shard_mb != Data.shard_mb:  # else what was prepared before there was this is what it was
        common |= {"shard_mb": data.shard_mb}
    if data.kind == "digits":
        return common | {"image_size": data.image_size}
    columns = {"file_column": data.file_column, "caption_column": data.caption_column}
    return common | {"captions": data.captions} | (columns if data.captions == "table" else {})


def _plan(data: Data, listing: Listing) -> Plan:
    if not listing.items:
        others = ", ".join(f"{count} {kind}" for kind, count in listing.passed_by.items()) or "none"
        raise DataError(f"data.path={data.path!r} holds no images (other files there: {others})")
    parts = split(listing.items, data.held_out)
    units = tuple(
        Unit(name, start, stop, _names_digest(items[start:stop]))
        for name, items in parts.items()
        for start, stop in cut(items, data.shard_samples, data.shard_mb * 1e6)
    )
    assert sum(unit.stop - unit.start for unit in units) == len(listing.items), "an item was lost"
    described = [_settings(data), [dataclasses.astuple(unit) for unit in units]]
    return Plan(units, digest_of(described), len(listing.items))


def _published_state(config: Prepare) -> str:
    try:
        return str(json.loads(dataset_store(config).read("prepared.json"))["state"])
    except Missing:
        return ""


def _changed(config: Prepare) -> str:
    return f"data.path={config.data.path!r} changed while it was being prepared, or a worker sees another folder: rerun"


def _keep_within_budget(data: Data, store: Store, quarantined: Sequence[tuple[str, str]], items: int) -> None:
    """Refuse too many quarantined items: the commonest reasons by example, the whole list in the store."""
    if len(quarantined) <= data.error_budget:
        return
    lines = "".join(json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in quarantined)
    store.write("quarantined.jsonl", lines.encode())
    names: dict[str, str] = {}
    for name, reason in quarantined:
        names.setdefault(reason, name)
    worst = [
        f"{names[reason]!r}{f' and {count - 1} more' if count > 1 else ''} ({reason})"
        for reason, count in Counter(reason for _, reason in quarantined).most_common(NAMED)
    ]
    rest = f", and {len(names) - NAMED} other reasons" if len(names) > NAMED else ""
    raise DataError(
        f"{len(quarantined)} of {items} items are quarantined, more than data.error_budget={data.error_budget}: "
        f"{', '.join(worst)}{rest}; all of them: {store.uri}/quarantined.jsonl; "
        f"mend or remove them, or set data.error_budget={len(quarantined)}"
    )
