"""Sources of datasets: which there are, and the real handwritten digits that the demo learns.

calotype.data.items    what every source gives: items, their order, one item -> one sample or a reason
calotype.data.folder   a folder of images with captions
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from calotype.config import Data
from calotype.data.folder import Folder
from calotype.data.items import Item, Listing, Raw, Source, digest, to_png

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {word} seven, {numeral} 7, {a} the article that suits the word.
PHRASINGS = (
    "{word}",
    "{a} {word}",
    "a handwritten {word}",
    "the digit {word}",
    "a photo of the number {word}",
    "the number {numeral}",
    "a handwritten {numeral}",
    "digit {numeral}, written by hand",
)
# For evaluation: no caption that is trained on reads like these, but every word of them occurs in captions.
UNSEEN_PHRASINGS = (
    "{word}, handwritten",
    "the handwritten digit {word}",
    "a photo of {a} {word}",
    "the number {word}, written by hand",
    "a photo of the digit {numeral}",
)


def open_source(data: Data) -> Source:
    """Where the images of a dataset come from.

    Raises:
        ConfigError: the folder or table that `data` names is not there.
    """
    return Digits(data.image_size) if data.kind == "digits" else Folder(data)


def caption_of(digit: int, phrasing: str) -> str:
    """`caption_of(8, "{a} {word}")` is "an eight"."""
    return phrasing.format(word=WORDS[digit], numeral=digit, a="an" if digit == 8 else "a")


def phrasing_of(key: str) -> str:
    """The phrasing that describes the digit of this key: by hash, so it never changes."""
    return PHRASINGS[int(digest("phrasing", key), 16) % len(PHRASINGS)]


class Digits:
    """scikit-learn's 1,797 real handwritten digits (Alpaydin & Kaynak 1998): 8x8, resized, white on black."""

    def __init__(self, image_size: int) -> None:
        self.size = image_size

    @cached_property
    def digits(self) -> Any:
        """`images` (1797, 8, 8) of 0..16 and `target` (1797,); loaded where used, because a submit needs neither."""
        from sklearn.datasets import load_digits

        return load_digits()

    def listing(self) -> Listing:
        return Listing(tuple(self._item(index, int(label)) for index, label in enumerate(self.digits.target)), WORDS)

    def _item(self, index: int, label: int) -> Item:
        key = f"digit-{index:04d}"
        return Item(key, key, label, caption_of(label, phrasing_of(key)).encode())

    def load(self, item: Item) -> Raw:
        import numpy as np
        from PIL import Image

        levels = np.rint(self.digits.images[int(item.key[-4:])] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(levels).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return Raw(to_png(image.convert("RGB")), item.caption)

    def fingerprint(self) -> str:
        return digest("digits", *PHRASINGS)
