"""Pictures for people: captioned grids, and the names under which MLflow's UI shows them."""

from __future__ import annotations

import io
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from calotype.data.store import Store

log = logging.getLogger(__name__)

CELL = 96  # least edge of a picture in a grid, in pixels: small ones are enlarged without smoothing
TEXT = 14  # height of a caption line, in pixels
GAP = 6
RED, INK, PAPER = (214, 40, 40), (40, 40, 40), (255, 255, 255)


def captioned(pictures: Sequence[Any], captions: Sequence[str], wrong: Sequence[bool] = (), columns: int = 0) -> Any:
    """PIL images -> one image, each with its caption below, those that are `wrong` outlined in red."""
    columns = columns or min(len(pictures), max(1, math.ceil(math.sqrt(len(pictures)))), 16)
    rows = math.ceil(len(pictures) / columns)
    scale = max(1, CELL // max(pictures[0].size))
    width, height = (edge * scale for edge in pictures[0].size)
    font = ImageFont.load_default(TEXT - 3)
    lines = max((len(_wrapped(caption, width, font)) for caption in captions), default=0)
    across, down = width + GAP, height + lines * TEXT + GAP
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if number < len(wrong) and wrong[number]:
            draw.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), outline=RED, width=3)
        for line, words in enumerate(_wrapped(caption, width, font)):
            draw.text((left, top + height + line * TEXT + 1), words, fill=INK, font=font)
    return sheet


def _wrapped(caption: str, width: int, font: Any) -> list[str]:
    """At most three lines of at most `width` pixels; what does not fit ends in dots."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + "..."]
    return [line if font.getlength(line) <= width else _cut(line, width, font) for line in lines if line]


def _cut(line: str, width: int, font: Any) -> str:
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def png(picture: Any) -> bytes:
    """PIL image -> PNG."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def write_picture(store: Store, name: str, picture: Any, images: int) -> None:
    """PNG and thumbnail under the names from which MLflow's UI builds its step slider; once per step.

    Args:
        store: the run's artifact root.
        images: images seen, MLflow's step.
    """
    stem = f"images/{name.replace('/', '~')}+step+{images}+timestamp+"
    if any(True for _ in store.list(stem)):
        return
    stem += f"{int(time.time() * 1000)}+{uuid.uuid4()}"
    small, thumbnail = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((256, 256))
    small.save(thumbnail, "WEBP")
    store.publish(f"{stem}.png", png(picture))
    store.publish(f"{stem}+compressed.webp", thumbnail.getvalue())


def surely(what: str, write: Callable[[], Any]) -> None:
    """A picture is not worth a run: what cannot be written is said, and the run goes on."""
    try:
        write()
    except Exception as error:
        log.error("%s was not written: %s", what, error)
