"""`calotype data ls | show | verify | index`: the datasets under a root, as people and programs read them."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from calotype import console
from calotype.console import age, many, megabytes, size, speed
from calotype.data import foreign, verify
from calotype.data.elsewhere import dataset_store, shards_at
from calotype.data.manifest import DATASETS, Manifest, versions_of
from calotype.data.shards import columns_of
from calotype.data.store import Store, open_store
from calotype.environment import home
from calotype.errors import CalotypeError, DataError

NAMED = 5  # keys and quarantined samples that `show` names
ROOT = "s3://calotype"
SPLITS = ("train", "held_out")

INDEX = """Make a dataset of WebDataset shards that lie somewhere already: every *.tar below URI, in this or another
bucket.  The tars are read once and stay where and as they are; sidecars, columns and the manifest go to
ROOT/datasets/NAME.  Run again it goes on where it was killed, and reads new shards only.

A sample's files must follow each other in one tar, with names as WebDataset splits them (KEY.jpg KEY.txt KEY.json).
Packed tars (.tar.gz) are refused: unpack them.  Numbers in KEY.json, and true and false as 1 and 0, become columns
that data.filter can use.

example: calotype data index s3://their-bucket/laion --name laion --held-out 0.01 --jobs 16"""

VERIFY = """Read all of a dataset and compare it with its manifest: the SHA-256 of every shard, the hash of every chunk,
sidecars, columns, keys and numbers of samples.  Lists all that is wrong; exit status 1 if anything is."""


def add_to(verbs: Any) -> None:
    """The verb `data` and its own verbs."""
    text = "datasets: list them, look into one, verify its bytes, index shards that somebody else wrote"
    verb = family(verbs, "data", "datasets: ls, show NAME, verify NAME, index URI --name NAME", text)
    listed = verb("ls", "list the datasets under a root: newest version, samples, shards, bytes", _list)
    shown = verb("show", "what a dataset's manifest holds: splits, members, chunks, columns, source, some keys", _show)
    verified = verb("verify", "hash every byte again and compare it with the manifest", _verify, VERIFY)
    indexed = verb("index", "make a manifest for WebDataset shards that have none", _index, INDEX)
    for one in (shown, verified):
        one.add_argument("name", metavar="NAME")
        one.add_argument("--digest", default="", help="of an older version, or how it begins (default: the newest)")
    for one in (listed, shown):
        one.add_argument("--json", action="store_true", help="for programs")
    for one in (verified, indexed):
        one.add_argument("--jobs", type=positive, default=8, metavar="N", help="shards at once (default %(default)s)")
    indexed.add_argument("uri", metavar="URI", help="s3://BUCKET/PREFIX or folder of the tars")
    indexed.add_argument("--name", required=True, help="of the dataset: data.name of the jobs")
    indexed.add_argument(
        "--held-out", type=_share, default=0.0, metavar="SHARE", help="of the shards, held out whole (default none)"
    )


def family(verbs: Any, name: str, what: str, text: str) -> Callable[..., argparse.ArgumentParser]:
    """A verb with verbs of its own: the function that adds one of those, (name, help, run, text)."""
    made = verbs.add_parser(name, help=what, description=text)
    inner = made.add_subparsers(dest=name, metavar="VERB", required=True)

    def verb(name: str, what: str, run: Callable[[argparse.Namespace], int], text: str = "") -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = inner.add_parser(
            name, help=what, description=text or what, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.set_defaults(call=lambda args: checked(args, run))
        made.add_argument("--root", default=ROOT, help="where datasets, caches and runs lie (default %(default)s)")
        return made

    return verb


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1024")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: at least 0 and below 1, like 0.01")
    return share


def checked(args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run a verb, once the store that it reads is known to be up."""
    from calotype.cluster import local

    for place in (args.root, getattr(args, "uri", "")):
        local.check_up(home(), place)
    return run(args)


# ------------------------------------------------------------------------------------------------ ls, show


def _list(args: argparse.Namespace) -> int:
    found = [_described(args.root, name) for name in open_store(args.root).folders("datasets")]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = []
    for one in found:
        splits = [one["splits"].get(split, {}) for split in SPLITS]
        about = [sum(split.get(what, 0) for split in one["splits"].values()) for what in ("shards", "bytes")]
        row = [one["name"], one["digest"][:8], *(split.get("samples", 0) for split in splits), about[0], size(about[1])]
        members = one.get("error") or " ".join(one["members"])
        rows.append([*row, members, one["versions"], age(time.time() - one["created"]) if one["created"] else ""])
    columns = ["name", "newest", "train", "held out", "shards", "size", "members", "versions", "age"]
    console.table(f"datasets under {args.root}", columns, rows)
    return 0


def _described(root: str, name: str) -> dict[str, Any]:
    """A line of `ls`; a dataset that cannot be read must not hide the others."""
    store = open_store(root).at("datasets", name)
    keys = versions_of(store)
    made: dict[str, Any] = {"name": name, "digest": "", "versions": len(keys), "created": 0.0, "splits": {}}
    made["members"] = []
    if not keys:
        return made | {"error": "no version yet: its job has not ended"}
    made["created"] = next((entry.modified for entry in store.list(keys[-1])), 0.0)
    data = store.read(keys[-1])
    made["digest"] = hashlib.sha256(data).hexdigest()
    try:
        manifest = Manifest.from_bytes(data)
    except DataError as error:
        return made | {"error": str(error)}
    return made | {"splits": manifest.totals(), "members": list(manifest.members)}


def _version(store: Store, name: str, beginning: str) -> tuple[str, Manifest]:
    """(digest, manifest) of the newest version whose digest begins so."""
    for key in reversed(versions_of(store)):
        data = store.read(key)
        digest = hashlib.sha256(data).hexdigest()
        if digest.startswith(beginning):
            manifest = Manifest.from_bytes(data)
            if manifest.format not in DATASETS or not manifest.shards:
                raise DataError(f"{store.where(key)} is no dataset but a {manifest.format}, or has no shards")
            return digest, manifest
    what = f"version {beginning} of dataset {name!r}" if beginning else f"dataset {name!r}"
    raise CalotypeError(f"there is no {what} at {store.uri}: `calotype data ls` lists what there is")


def _show(args: argparse.Namespace) -> int:
    store = dataset_store(args.root, args.name)
    digest, manifest = _version(store, args.name, args.digest)
    columns = columns_of(store, manifest.shards[0])
    schema = {} if columns is None else {field.name: str(field.type) for field in columns.schema}
    steps = sorted({shard.chunk_samples for shard in manifest.shards})
    chunks = sum(shard.chunks for shard in manifest.shards)
    total = sum(shard.bytes for shard in manifest.shards)
    largest = max(shard.chunk_bytes for shard in manifest.shards)
    quarantined = manifest.meta.get("quarantined", [])
    place = shards_at(open_store(args.root).at("datasets", args.name))
    found: dict[str, Any] = {
        "name": manifest.name,
        "format": manifest.format,
        "digest": digest,
        "splits": manifest.totals(),
        "members": list(manifest.members),
        "chunks": {
            "count": chunks,
            "samples": [steps[0], steps[-1]],
            "bytes": min(total // chunks, largest or total),
            "largest": largest,
        },
        "columns": schema,
        "source": manifest.meta.get("source", {}),
        "passed_by": manifest.meta.get("passed_by", {}),
        "quarantined": quarantined,
        "shards_at": place or f"{store.uri}/shards",
        "keys": [] if columns is None else columns["key"][:NAMED].to_pylist(),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [[what, found[what]] for what in ("format", "digest")]
    for split, part in found["splits"].items():
        held = f"{many(part['samples'], 'sample')} in {many(part['shards'], 'shard')}"
        rows.append([split.replace("_", " "), f"{held}, {size(part['bytes'])}"])
    samples = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    most = f", the largest {size(largest)}" if largest else ""
    rows += [
        ["members", " ".join(manifest.members)],
        ["chunks", f"{chunks:,} of {samples} samples, {size(found['chunks']['bytes'])} on average{most}"],
        ["columns", ", ".join(f"{name} {kind}" for name, kind in schema.items()) or "none"],
        ["source", _pairs(found["source"])],
        ["passed by", _pairs(found["passed_by"]) or "not recorded: its run says it"],
        ["quarantined", _quarantined(quarantined)],
        ["shards at", found["shards_at"]],
        ["keys", ", ".join(found["keys"]) + (", ..." if found["keys"] else "in the shards")],
    ]
    console.table(f"dataset {manifest.name}", ["what", "value"], rows)
    return 0


def _pairs(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {console.figure(value)}" for name, value in found.items())


def _quarantined(found: list[dict[str, str]]) -> str:
    named = ", ".join(f"{one['name']} ({one['reason']})" for one in found[:NAMED])
    return f"{len(found):,}" + (f": {named}{', ...' if len(found) > NAMED else ''}" if found else "")


# ------------------------------------------------------------------------------------------------ verify, index


def _verify(args: argparse.Namespace) -> int:
    store = dataset_store(args.root, args.name)
    digest, manifest = _version(store, args.name, args.digest)
    total = sum(shard.bytes for shard in manifest.shards)
    began = time.monotonic()
    with megabytes(total, f"verify {args.name}") as told:
        wrong = verify.verify(store, manifest, args.jobs, told)
    for what in wrong:
        print(what)
    samples = sum(shard.samples for shard in manifest.shards)
    things = "one thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
    said = "all as its manifest says" if not wrong else f"{things} wrong, above"
    read = f"{many(len(manifest.shards), 'shard')}, {many(samples, 'sample')}, {speed(total, time.monotonic() - began)}"
    print(f"{args.name} {digest[:8]}: {read}: {said}")
    return 1 if wrong else 0


def _index(args: argparse.Namespace) -> int:
    began = time.monotonic()
    with megabytes(0, f"index {args.name}") as told:
        found = foreign.index(args.root, args.name, args.uri, args.jobs, args.held_out, told)
    for _, why in found.bad:
        print(why, flush=True)
    if found.bad:
        raise CalotypeError(
            f"{many(len(found.bad), 'shard')} of {args.uri} cannot be used, above, and nothing is published: mend or "
            "remove what is wrong, and run the same command again, which reads only that"
        )
    manifest = Manifest(DATASETS[0], args.name, found.members, found.shards)
    fresh = sum(shard.bytes for shard in found.shards if shard.key in found.read)
    took = f", {speed(fresh, time.monotonic() - began)}" if fresh else ""
    rows = [[f"{split.replace('_', ' ')} samples", part["samples"]] for split, part in manifest.totals().items()]
    rows += [
        ["shards", len(found.shards)],
        ["size", size(sum(shard.bytes for shard in found.shards))],
        ["read now", f"{many(len(found.read), 'shard')}{took}"],
        ["members", " ".join(found.members)],
        ["passed by", _pairs(found.passed_by) or "nothing"],
        ["other files there", _pairs(found.beside) or "none"],
        ["digest", found.digest],
        [
            "its columns",
            " ".join(["calotype data show", args.name, *(["--root", args.root] if args.root != ROOT else [])]),
        ],
    ]
    console.table(f"dataset {args.name}: the shards at {args.uri}", ["what", "value"], rows)
    return 0
