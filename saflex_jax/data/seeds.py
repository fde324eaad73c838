"""Independent random numbers for the many purposes of one seed."""

from __future__ import annotations

import zlib

import numpy as np

from saflex_jax import checks


def generator(purpose: str, seed: int, *numbers: int) -> np.random.Generator:
    """The generator of (purpose, seed, numbers), independent of every other purpose's.

    With the seed alone, two functions would draw the same numbers: the wrong labels and the samples
    from outside, for instance, would be the same rows. NumPy pads a seed with zeros, so that s, (s,
    0) and (s, 0, 0) are the same seed.

    >>> [int(generator("order", 0, epoch).integers(1000)) for epoch in (0, 1, 0)]
    [615, 221, 615]

    Args:
      purpose: a name; use it always with the same count of numbers.
      seed: >= 0.
      *numbers: >= 0, such as an epoch.

    Raises:
      ValueError: a seed that is not a whole number >= 0.
    """
    checks.whole(seed=seed)
    return np.random.default_rng((zlib.crc32(purpose.encode()), seed, *numbers))
