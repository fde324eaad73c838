"""Seeded label corruption."""

from __future__ import annotations

import numpy as np

from saflex_jax import checks


def symmetric_noise(labels: np.ndarray, num_classes: int, *, share: float, seed: int) -> np.ndarray:
    """Replaces exactly round(share * N) labels by another class, uniformly.

    Args:
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1].
      seed: of the choice of samples and classes.

    Returns:
      int[N]; the argument is left as it is, so the clean labels stay beside.

    Raises:
      ValueError: share outside [0, 1], or labels out of range.
    """
    checks.class_labels("labels", labels, num_classes)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1]; given {share}")
    rng = np.random.default_rng(seed)
    wrong = rng.choice(len(labels), size=round(share * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + rng.integers(1, num_classes, size=len(wrong))) % num_classes
    return noisy
