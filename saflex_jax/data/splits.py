"""Deterministic, stratified index sets."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split


def stratified_split(
    labels: np.ndarray, *, val: int, test: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint (train, val, test) indices with the classes in proportion.

    Args:
      labels: int[N].
      val, test: number of samples, each at least one per class.
      seed: of the shuffle.

    Raises:
      ValueError: a split would be empty or smaller than the number of classes.
    """
    classes = len(np.unique(labels))
    train = len(labels) - val - test
    for name, size in {"train": train, "val": val, "test": test}.items():
        if size < classes:
            raise ValueError(
                f"the {name} split must hold at least one sample for each of {classes} classes; "
                f"given {size} of {len(labels)}"
            )
    rest, test_index = train_test_split(
        np.arange(len(labels)), test_size=test, random_state=seed, stratify=labels
    )
    train_index, val_index = train_test_split(
        rest, test_size=val, random_state=seed, stratify=labels[rest]
    )
    return np.sort(train_index), np.sort(val_index), np.sort(test_index)
