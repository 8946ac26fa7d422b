"""Random numbers that belong to a sample, not to a process: keyed by (seed, purpose, position) (Salmon et al. 2011)."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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


def philox(seed: int, position: int, purpose: int) -> np.random.Generator:
    """Random numbers of one sample for one purpose: the same on any rank, in any order."""
    return np.random.Generator(_bits(seed, purpose, position))


def _bits(seed: int, purpose: int, *counter: int) -> np.random.Philox:
    """The first counter word is left to the generator: 2^64 numbers before it meets a neighbour."""
    words = sum(word << 64 * (index + 1) for index, word in enumerate(counter))
    return np.random.Philox(counter=words, key=seed % 2**64 | purpose << 64)


def permutation(size: int, seed: int, purpose: int, *counter: int) -> Ints:
    """By sorting raw bits: numpy promises those for ever, and not what its `permutation` makes of them."""
    return np.argsort(_bits(seed, purpose, *counter).random_raw(size), kind="stable")
