"""Random numbers that belong to a sample, not to a process: keyed by (seed, purpose, position) (Salmon et al. 2011)."""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
MASK = 2**64 - 1


class Purpose(IntEnum):
    """What a stream of random numbers is for.  Numbers are for ever: runs resume by them."""

    NOISE = 1
    TIMESTEP = 2
    DROP = 3
    POSTERIOR = 4
    FLIP = 5
    CHUNKS = 101
    WINDOW = 102
    SHAPES = 103


class _Mine(threading.local):
    """One generator per thread: setting its state takes a tenth of the time of making a new one."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = self.bits.state
        self.counter: Any = self.state["state"]["counter"]
        self.key: Any = self.state["state"]["key"]


_mine = _Mine()


def philox(seed: int, position: int, purpose: int) -> np.random.Generator:
    """Random numbers of one sample for one purpose: the same on any rank, in any order.

    Good until this thread asks for the next one.
    """
    _bits(seed, purpose, position)
    return _mine.generator


def _bits(seed: int, purpose: int, *counter: int) -> np.random.Philox:
    """The first counter word is left to the generator: 2^64 numbers before it meets a neighbour."""
    own = _mine.counter
    own[:] = 0
    for place, word in enumerate(counter, 1):
        own[place] = word & MASK
    _mine.key[0], _mine.key[1] = seed & MASK, purpose
    _mine.bits.state = _mine.state
    return _mine.bits


def permutation(size: int, seed: int, purpose: int, *counter: int) -> Ints:
    """By sorting raw bits: numpy promises those for ever, and not what its `permutation` makes of them.

    The lowest bits give way to the index, so that sorting in place is enough: 10^7 take 0.3 s and twice their bytes.
    """
    low = np.uint64((1 << max(size - 1, 1).bit_length()) - 1)
    keys = _bits(seed, purpose, *counter).random_raw(size)
    keys &= ~low
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)
