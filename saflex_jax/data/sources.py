"""Real data that scikit-learn carries inside its package: no download, no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn import datasets


class Arrays(NamedTuple):
    """A labelled data set in memory.

    Attributes:
      inputs: f32[N, ...]; images [N, H, W, C] in [0, 1], tables [N, D] as measured.
      labels: int[N] in [0, num_classes).
      num_classes: K.
    """

    inputs: np.ndarray
    labels: np.ndarray
    num_classes: int


def digits() -> Arrays:
    """Handwritten digits: 1,797 grey images of 8x8, 10 classes (UCI, via scikit-learn)."""
    data = datasets.load_digits()
    return Arrays((data.images[..., None] / 16).astype(np.float32), data.target, 10)


def wdbc() -> Arrays:
    """Wisconsin breast cancer: 569 rows, 30 numeric columns, 2 classes (UCI, via scikit-learn)."""
    data = datasets.load_breast_cancer()
    return Arrays(data.data.astype(np.float32), data.target, 2)


SOURCES = {"digits": digits, "wdbc": wdbc}
