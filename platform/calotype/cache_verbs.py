"""`calotype cache ls | show | verify | diff | gc`: the latent caches under a root, and who uses them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from calotype import caches, console, runs
from calotype.console import age, many, megabytes, size, speed
from calotype.data import cache, differences, garbage, verify
from calotype.data.files import Entry
from calotype.data.filters import takedown_keys
from calotype.data.manifest import Manifest, cache_versions, stored_encoding
from calotype.data.store import Missing, Store, open_store
from calotype.data_verbs import family, positive
from calotype.errors import CalotypeError

NOT_RECORDED = "not recorded"
NAMED = 5  # runs, samples and shards that a line names

VERIFY = """Repeat the gate that a cache passed when it was made, on what lies there now:

  bytes    the SHA-256 of every shard, the hash of every chunk, sidecars, the encoding; numbers of samples, also beside
           those of the dataset
  figures  no latent is infinite or not a number; channel mean and deviation, computed anew, are those that training
           whitens by; channels that say nothing of the image
  images   some samples of every shard, decoded and compared with their images, within the limits that the job had

Lists all that is wrong; exit status 1 if anything is.  What cannot be looked at any more (the autoencoder or the images
are gone, or another) is said, and does not change the exit status."""

GC = """Delete latent shards that no cache and no run refers to: left behind by jobs that were given up, by dataset
versions that nobody trained on, by other encodings.  Shows what would go and asks first.

A cache named as CACHE is given up: its manifests go too, and with them the shards that no other cache or run needs.
It is refused while a run that trained on it is there.

--takedown FILE takes samples out of the bytes: every latent shard of every encoding that holds some is written anew
without them, every cache that names it gets a newer manifest, and then the old shards are deleted, whatever their age.
No job encodes these samples again, and nothing undoes that: before it asks it says in which datasets it found the keys,
for they are looked for in all.  A sample prepared again into another shard is another sample: only its old shard is
marked.  Killed in the middle, the same command finishes it; damaged shards are named, and all others rewritten.  Older
manifests can still be read (`calotype cache show CACHE --digest D`); a training run that began with one cannot go on,
for its order is gone: start a new one from its weights with denoiser.init_from=run:NAME.  Images in datasets stay: they
are named.  Chunks on local disks (stream.cache) go when others take their room."""


def add_to(verbs: Any) -> None:
    """The verb `cache` and its own verbs."""
    text = "latent caches: list them with who uses them, look into one, verify its bytes, compare two, delete leftovers"
    verb = family(verbs, "cache", "latent caches: ls, show CACHE, verify CACHE, diff A B, gc", text)

    listed = verb("ls", "list the caches under a root: encoding, size, progress, age, which runs use it", _list)
    shown = verb("show", "what a cache is: its encoding, statistics, acceptance report, what was left out", _show)
    verified = verb("verify", "the gate again: every byte hashed, statistics, samples decoded", _verify, VERIFY)
    shown.add_argument("--digest", default="", help="of an older manifest, or how it begins (default: the newest)")
    compared = verb("diff", "in what two caches differ; exit status 1 if they do", _diff)
    collected = verb("gc", "delete latents that nobody refers to, or samples that were taken down", _gc, GC)
    reference = "its id or how that begins, or the name of its cache_latents run"
    for one in (shown, verified):
        one.add_argument("reference", metavar="CACHE", help=reference)
    compared.add_argument("references", metavar="CACHE", nargs=2, help=reference)
    collected.add_argument("references", metavar="CACHE", nargs="*", help=f"to be given up: {reference}")
    for one in (listed, shown):
        one.add_argument("--json", action="store_true", help="for programs")
    verified.add_argument("--jobs", type=positive, default=8, metavar="N", help="shards at once (default %(default)s)")
    verified.add_argument(
        "--samples", type=_count, metavar="N", help="decoded of each shard (default: as many as its job did; 0: none)"
    )
    collected.add_argument("--takedown", metavar="FILE", help="a text file of keys, here or s3://, one per line")
    collected.add_argument("--yes", action="store_true", help="do not ask")
    collected.add_argument(
        "--hours", type=float, default=24.0, help="spare what is younger (default %(default)s): its job may still run"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples")
    return int(text)


# ---------------------------------------------------------------------------------------------- ls, show


def _list(args: argparse.Namespace) -> int:
    found, names = caches.known(args.root), runs.names(args.root)
    if args.json:
        print(json.dumps([_as_json(one, names) for one in found], indent=1))
        return 0
    rows = []
    for one in found:
        rows.append(
            [
                one.id[:8],
                f"{one.dataset} {one.digest[:8]}",
                _words(one.encoding),
                one.samples if one.manifest else "",
                size(one.bytes) if one.manifest else "",
                one.state,
                _named(one.makers, names),
                _named(one.users, names) or "nobody",
                age(time.time() - one.modified) if one.modified else "",
            ]
        )
    columns = ["cache", "dataset", "encoding", "samples", "size", "state", "made by", "used by", "age"]
    console.table(f"latent caches under {args.root}", columns, rows)
    return 0


def _words(encoding: dict[str, Any]) -> str:
    """An encoding in a line: 256 px, f 8, float16 gaussian, encoder 1a2b3c4d, text tokens."""
    if not encoding:
        return ""
    autoencoder = encoding["autoencoder"]
    conditions = [f"{name} {form.get('mode', form['source'])}" for name, form in encoding["conditions"].items()]
    shapes = f" in {len(encoding['buckets'])} shapes" if "buckets" in encoding else ""
    how = [word for word, chosen in (("bf16", "precision" in encoding), ("compiled", "compile" in encoding)) if chosen]
    words = [
        f"{encoding['resolution']} px{shapes}",
        f"f {autoencoder['f']}",
        f"{encoding['dtype']} {encoding['posterior']}",
    ]
    return ", ".join([*words, " ".join([f"encoder {autoencoder['encoder'][:8]}", *how]), *conditions])


def _named(records: Sequence[runs.Record], names: dict[str, list[str]]) -> str:
    found = sorted({name for record in records for name in names.get(record.identity, [record.identity[:8]])})
    return ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")


def _as_json(one: caches.Known, names: dict[str, list[str]]) -> dict[str, Any]:
    made: dict[str, Any] = {name: getattr(one, name) for name in ("id", "encoding", "dataset", "digest", "state")}
    made |= {"samples": one.samples, "bytes": one.bytes, "modified": one.modified}
    if one.manifest is not None:
        made |= {"shards": len(one.manifest.shards), "meta": one.manifest.meta, "manifest": one.manifest.digest}
    for what in ("makers", "users"):
        listed = [
            {"identity": r.identity, "names": names.get(r.identity, []), "job": r.job} for r in getattr(one, what)
        ]
        made[what] = listed
    return made


def _show(args: argparse.Namespace) -> int:
    one, names = caches.found_by(args.root, args.reference), runs.names(args.root)
    newest, older = one.manifest, caches.older(args.root, one)
    if args.digest:
        fitting = [made for made in (newest, *older) if made and made.digest.startswith(args.digest)]
        if not fitting:
            raise CalotypeError(f"cache {one.id[:8]} has no manifest {args.digest}: `calotype cache show` lists them")
        one.manifest = fitting[0]
    if args.json:
        print(json.dumps(_as_json(one, names), indent=1))
        return 0
    rows: list[list[Any]] = [["cache", one.id], ["state", one.state], ["dataset", f"{one.dataset} {one.digest}"]]
    rows += [[name, value] for name, value in differences.flat(one.encoding).items()]
    if one.manifest is not None:
        for split, part in one.manifest.totals().items():
            held = f"{many(part['samples'], 'sample')} in {many(part['shards'], 'shard')}, {size(part['bytes'])}"
            rows.append([split.replace("_", " "), held])
        meta = one.manifest.meta
        rows += [
            ["members", " ".join(one.manifest.members)],
            ["latent (C, h, w)", " x ".join(map(str, meta.get("shape", ()))) or NOT_RECORDED],
            ["channel mean", _numbers(meta.get("channel_mean", ()))],
            ["channel std", _numbers(meta.get("channel_std", ()))],
            ["channel signal", _numbers(meta.get("channel_signal", ()))],
            ["acceptance", _accepted(meta.get("acceptance"))],
            ["left out", _left_out(meta.get("quarantined", ()))],
            ["made on", "; ".join(meta.get("devices", ())) or NOT_RECORDED],
            ["manifest", one.manifest.digest],
        ]
        rows += [["older manifest", _superseded(made, newest)] for made in older if one.manifest is newest]
        rows += [["since then", _superseded(one.manifest, newest)]] if one.manifest is not newest else []
    lies = f"{open_store(args.root).uri}/latents/{cache.encoding_id(one.encoding)}" if one.encoding else ""
    rows += [["shards at", lies], ["made by", _named(one.makers, names)], ["used by", _named(one.users, names)]]
    console.table(f"latent cache {one.id[:8]}", ["what", "value"], rows)
    return 0


def _superseded(made: Manifest, newest: Manifest | None) -> str:
    """What became of an older manifest's shards."""
    there = {shard.key for shard in newest.shards} if newest else set()
    gone = sum(shard.key not in there for shard in made.shards)
    return f"{made.digest}: samples of {gone:,} of its {many(len(made.shards), 'shard')} were taken down"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(console.figure(float(value)) for value in values) or NOT_RECORDED


def _accepted(report: dict[str, Any] | None) -> str:
    if not report:
        return "not recorded: it was made before there was a gate"
    if "psnr" not in report:
        return "no sample was decoded"
    worst = ", ".join(f"{key} {psnr:g}" for key, psnr in report["worst"])
    fresh = f"{report['psnr_fresh']:g} encoded anew"
    return f"{report['psnr']:g} dB over {many(report['decoded'], 'decoded sample')} ({fresh}; worst: {worst})"


def _left_out(lost: Sequence[dict[str, Any]]) -> str:
    named = "; ".join(f"{one['shard']}/{one['key']} ({one['reason']})" for one in lost[:NAMED])
    return f"{len(lost):,}" + (f": {named}{'; ...' if len(lost) > NAMED else ''}" if lost else "")


# ------------------------------------------------------------------------------------------ verify, diff


def _verify(args: argparse.Namespace) -> int:
    from calotype.tasks import verify as gate

    one, manifest, latents = caches.finished(args.root, args.reference)
    began, total = time.monotonic(), 2 * one.bytes
    found = gate.counts(args.root, manifest)
    merged: dict[str, Any] = {}
    with megabytes(total, f"verify {one.id[:8]}") as told:
        damaged = verify.verify(latents, manifest, args.jobs, lambda done, _: told(done, total))
        if not damaged:
            strange, merged = gate.figures(latents, manifest, args.jobs, total, total // 2, told)
            found.wrong += strange.wrong
    took = time.monotonic() - began
    found.wrong += damaged + _encoding_changed(latents, one)
    if merged:
        seen = gate.images(one, args.root, latents, merged, args.samples, args.jobs)
        found = gate.Found(found.wrong + seen.wrong, found.said + seen.said)
    for what in (*found.wrong, *found.said):
        print(what)
    said = "all as its manifest says" if not found.wrong else f"{many(len(found.wrong), 'thing')} wrong, above"
    read = f"{many(len(manifest.shards), 'shard')}, {many(one.samples, 'sample')}"
    print(f"cache {one.id[:8]}: {read}, {speed(one.bytes, took)}: {said}")
    return 1 if found.wrong else 0


def _encoding_changed(latents: Store, one: caches.Known) -> list[str]:
    with suppress(Missing):
        if latents.read("encoding.json") == json.dumps(one.encoding, indent=1, sort_keys=True).encode():
            return []
    return [f"{latents.uri}/encoding.json is not the encoding of the manifest: it was changed"]


def _diff(args: argparse.Namespace) -> int:
    one, other = (caches.found_by(args.root, reference) for reference in args.references)
    rows: list[list[Any]] = [
        [name, differences.shortly(old), differences.shortly(new)]
        for name, old, new in differences.differing(one.encoding, other.encoding)
    ]
    if one.digest != other.digest:
        rows.append(["dataset", *(f"{each.dataset} {each.digest[:8]}" for each in (one, other))])
    if one.manifest is not None and other.manifest is not None:
        mine, theirs = ({shard.source_sha256 for shard in each.manifest.shards} for each in (one, other))  # type: ignore[union-attr]
        if mine != theirs:
            alone = (f"{many(len(some), 'source shard')} of its own" for some in (mine - theirs, theirs - mine))
            rows.append([f"shards (both have {len(mine & theirs):,})", *alone])
        for name in ("channel_mean", "channel_std"):
            values = [each.manifest.meta.get(name, ()) for each in (one, other)]  # type: ignore[union-attr]
            if values[0] != values[1]:
                rows.append([name, *map(_numbers, values)])
        psnr = [(each.manifest.meta.get("acceptance") or {}).get("psnr") for each in (one, other)]  # type: ignore[union-attr]
        if psnr[0] != psnr[1]:
            rows.append(["psnr, dB", *psnr])
    elif one.state != other.state:
        rows.append(["state", one.state, other.state])
    if not rows:
        print(f"{one.id[:8]} and {other.id[:8]} do not differ")
        return 0
    console.table("two latent caches", ["differs in", one.id[:8], other.id[:8]], rows)
    return 1


# --------------------------------------------------------------------------------------------------- gc


def _gc(args: argparse.Namespace) -> int:
    if args.takedown is not None:
        return _take_down(args)
    root = open_store(args.root)
    given_up = [caches.found_by(args.root, reference) for reference in args.references]
    for one in given_up:
        if one.users:
            users = _named(one.users, runs.names(args.root))
            raise CalotypeError(f"cache {one.id[:8]} of dataset {one.dataset} is what {users} trained on: it stays")
    ids = {one.id for one in given_up}
    kept = caches.kept(args.root, ids)
    found, whole = garbage.find(root, kept, args.hours * 3600), garbage.find(root, kept, 0)
    young, cut = _size(whole) - _size(found), {"": garbage.unfinished(root, args.hours * 3600)}
    spared = (
        f"; {size(young)} are younger than {args.hours:g} hours and stay: --hours 0 takes them too" if young else ""
    )
    if not found and not given_up and not cut[""]:
        print(f"nothing{' else' * bool(young)} under {args.root}/latents is without a cache or run that refers to it"
              f"{spared}")  # fmt: skip
        return 0
    rows: list[list[Any]] = [[f"cache {one.id[:8]}", one.dataset, _words(one.encoding), "", ""] for one in given_up]
    for encoding, entries in found.items():
        shards = sum(entry.key.endswith(".tar") for entry in entries)
        about = _words(stored_encoding(root, encoding) or {}) or "unknown"
        rows.append([f"latents/{encoding[:8]}", "", about, shards, size(sum(entry.size for entry in entries))])
    if cut[""]:
        rows.append(["unfinished files", "", "", "", size(_size(cut))])
    console.table(f"to be deleted under {args.root}", ["what", "dataset", "encoding", "shards", "size"], rows)
    if not _agreed(args, f"Delete {size(_size(found | cut))}{spared}?"):
        return 1
    for one in given_up:
        place = root.at("caches", one.id)
        for key in cache_versions(place):  # first, and the newest last: nobody may find it half
            place.delete(key)
        for maker in one.makers:
            maker.store.delete("result.json")  # the same command makes it again
    still = garbage.find(root, caches.kept(args.root, ids), args.hours * 3600)  # somebody may have begun meanwhile
    going = {encoding: [entry for entry in entries if entry in found[encoding]]
             for encoding, entries in still.items() if encoding in found}  # fmt: skip
    garbage.delete(root, going)
    for entry in cut[""]:
        root.give_up(entry)
    print(f"{size(_size(going | cut))} deleted{spared}")
    return 0


def _size(found: Mapping[str, Sequence[Entry]]) -> int:
    return sum(entry.size for entries in found.values() for entry in entries)


def _agreed(args: argparse.Namespace, question: str) -> bool:
    """Whether the user says yes.

    Raises:
        CalotypeError: there is nobody to ask.
    """
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise CalotypeError("nothing is deleted without a word: say --yes where there is no terminal to ask on")
    agreed = input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    if not agreed:
        print("nothing was deleted")
    return agreed


def _take_down(args: argparse.Namespace) -> int:
    from calotype.tasks import takedown

    keys = takedown_keys(args.takedown, "--takedown ")
    if args.references:
        raise CalotypeError("--takedown is for all caches: give one up in a command of its own")
    if not keys:
        raise CalotypeError(f"--takedown {args.takedown} names no key: write one per line")
    found = takedown.survey(args.root, keys)
    for why in found.unread:
        print(f"cannot be searched: {why}")
    if found.unknown:
        told = f"{found.unknown:,} of {len(keys):,}"
        print(f"keys of the list that are in no dataset and no latents under {args.root}: {told}")
    if not found.hits and not found.stale and not found.caches:
        return 1 if found.unread else 0
    if found.unmarked or found.stale or found.caches:
        _show_takedown(args.root, found)
        samples = many(sum(map(len, found.hits.values())), "sample")
        if not _agreed(args, f"Take down {samples} for good, and delete {size(_size(found.stale))} of old latents?"):
            return 1
        print(f"{size(takedown.take_down(args.root, found))} deleted")
    else:
        print("no latents hold the others: they were taken down before, or never encoded")
    for name, (images, held) in found.places().items():
        lie = f"of {many(images, 'sample')} still lie in {many(held, 'shard')} of {args.root}/datasets/{name}"
        print(f"the images {lie}: take them out of its source, and prepare it again")
    if found.unread:
        unread = many(len(found.unread), "shard")
        print(f"{unread} could not be searched, as said above: mend or delete these, and give the same command again")
        return 1
    return 0


def _show_takedown(root: str, found: Any) -> None:
    """What would be written anew, and whose training ends with it."""
    names = runs.names(root)
    rows: list[list[Any]] = []
    for one in found.caches:
        mine = found.rows(one.manifest)
        lost, held = found.lost(mine), size(sum(row.bytes for row in mine))
        users = _named(one.users, names)
        rows.append([f"cache {one.id[:8]}", one.dataset, _words(one.encoding), lost, len(mine), held, users])
    for encoding, entries in found.stale.items():
        tars = [entry for entry in entries if entry.key.endswith(".tar")]
        held = size(sum(entry.size for entry in entries))
        rows.append([f"latents/{encoding[:8]}", "", "", "", len(tars), held, ""])
    columns = ["what", "dataset", "encoding", "samples", "shards", "size", "used by"]
    for name, (samples, held_in) in sorted(found.places().items()):
        print(f"the list names {many(samples, 'sample')} in {many(held_in, 'shard')} of dataset {name}")
    if found.orphans:
        print(f"the list names {many(found.orphans, 'sample')} in latents that no dataset here is the source of")
    console.table(f"to be taken down under {root}", columns, rows)
    if any(one.users for one in found.caches):
        print("runs that use them cannot go on: start new ones from their weights with denoiser.init_from=run:NAME")
