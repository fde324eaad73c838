"""Random numbers of one seed for many purposes, none of which repeats another's."""

from __future__ import annotations

import zlib

import numpy as np


def generator(purpose: str, seed: int, *numbers: int) -> np.random.Generator:
    """The generator of (purpose, seed, numbers), independent of that of any other purpose.

    With the seed alone, what one function draws would be what another draws from it: the wrong
    labels, say, and the samples from outside would be the same rows. And NumPy pads a seed with
    zeros, so that s, (s, 0) and (s, 0, 0) are one.

    Args:
      purpose: a name; always with the same count of numbers.
      seed: >= 0.
      numbers: such as an epoch, >= 0.
    """
    return np.random.default_rng((zlib.crc32(purpose.encode()), seed, *numbers))
