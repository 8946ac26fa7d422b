"""`calotype export RUN DIR` and `promote RUN`: what a finished training gives to others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from calotype.environment import home

PROMOTE = """The best average (`ema.halflife`, `ema.halflives`) of the run's best checkpoint becomes a version of a
registered model in MLflow, with a diffusers export, a grid of samples, and what they were made from.  The best of the
checkpoints that are kept has the least validation loss; it is the last where none was measured.  Done again, the same
average of the same checkpoint is the same version, and an alias moves in one step."""


def add_to(verbs: Any) -> None:
    """`export` and `promote` among the verbs of `calotype`."""
    text = "write a diffusers folder that StableDiffusionPipeline loads"
    out = verbs.add_parser("export", help=text, description=text)
    made = verbs.add_parser(
        "promote", help="make a finished run a version of a registered model in MLflow", description=PROMOTE
    )
    for parser in (out, made):
        parser.add_argument("run", metavar="RUN", help="run:NAME, run:NAME@IMAGES or identity of a train_denoiser run")
        parser.add_argument("--root", default="s3://calotype", help="where runs live (default %(default)s)")
    out.add_argument("folder", metavar="DIR")
    out.add_argument("--ema", type=int, default=0, metavar="HALFLIFE", help="one of its ema.halflives")
    out.set_defaults(call=export)
    made.add_argument("--model", metavar="NAME", default="", help="registered model (default: the dataset's name)")
    made.add_argument("--alias", default="", help="move this alias to it, as in models:/NAME@champion")
    made.set_defaults(call=promote)


def export(args: argparse.Namespace) -> int:
    from calotype.cluster import local
    from calotype.tasks.export import export_run

    local.check_up(home(), args.root)
    export_run(args.root, args.run, Path(args.folder), args.ema)
    print(f"{args.folder}: diffusers.StableDiffusionPipeline.from_pretrained({args.folder!r}) loads it")
    return 0


def promote(args: argparse.Namespace) -> int:
    from calotype.cluster import local
    from calotype.tasks.promote import promote as run

    local.check_up(home(), args.root)
    found = run(args.root, args.run, args.model, args.alias)
    was = "is now" if found.fresh else "was already"
    print(f"{args.run} at {found.images:,} images {was} version {found.version} of {found.model}")
    if args.alias:
        print(f"models:/{found.model}@{args.alias} means it")
    print(f"as a diffusers folder: {found.export}" if found.export else f"without a diffusers export: {found.why}")
    return 0
