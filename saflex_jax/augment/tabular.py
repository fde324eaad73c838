"""Augmentations of standardised numeric tables f32[B, D]."""

from __future__ import annotations

import jax

from saflex_jax import checks
from saflex_jax.augment.base import Augment, per_example


def feature_noise(deviation: float) -> Augment:
    """Adds Gaussian noise; `deviation` is in units of the columns' standard deviation."""
    checks.at_least_zero("deviation", deviation)
    return per_example(
        lambda key, row: row + deviation * jax.random.normal(key, row.shape, row.dtype)
    )
