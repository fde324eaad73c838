"""Seeded corruption: three kinds of wrong labels, and samples from another data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.data.seeds import generator
from saflex_jax.data.splits import chunks

CHUNK = 256  # inputs in memory at once


def symmetric_noise(labels: np.ndarray, num_classes: int, *, share: float, seed: int) -> np.ndarray:
    """Replaces exactly round(share * N) labels by another class, uniformly.

    >>> labels = np.array([0, 1, 2, 3] * 10)
    >>> noisy = symmetric_noise(labels, 4, share=0.3, seed=0)
    >>> int((noisy != labels).sum())
    12

    Args:
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1], of labels to replace.
      seed: of the choice of samples and classes.

    Returns:
      int[N], a copy.

    Raises:
      ValueError: share outside [0, 1], labels out of range, or fewer than two classes.
    """
    rng = generator("noise", seed)
    wrong = _wrong(labels, num_classes, share=share, rng=rng)
    return _moved(labels, wrong, rng.integers(1, num_classes, size=len(wrong)), num_classes)


def pairwise_noise(labels: np.ndarray, num_classes: int, *, share: float, seed: int) -> np.ndarray:
    """Replaces exactly round(share * N) labels by the next class, k by k + 1 mod K.

    >>> pairwise_noise(np.array([0, 1, 2]), 3, share=1.0, seed=0).tolist()
    [1, 2, 0]

    Args:
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1], of labels to replace.
      seed: of the choice of samples.

    Returns:
      int[N], a copy.

    Raises:
      ValueError: share outside [0, 1], labels out of range, or fewer than two classes.

    Source: Han et al., "Co-teaching", NeurIPS 2018 ("pair flipping").
    """
    wrong = _wrong(labels, num_classes, share=share, rng=generator("noise", seed))
    return _moved(labels, wrong, np.ones(len(wrong), np.int64), num_classes)


def instance_noise(
    inputs: Any, labels: np.ndarray, num_classes: int, *, share: float, seed: int
) -> np.ndarray:
    """Replaces exactly round(share * N) labels by a class that looks right for the input.

    A mislabelled sample of class y with input x, flattened and standardised per feature over the
    data set, becomes class k with probability

      softmax(x W)_k over k != y,    W ~ N(0, 1)^{S x K}, which depends on the seed alone.

    In the paper sample i flips with probability q_i ~ N(share, 0.1^2) truncated to [0, 1], so the
    number of flips is random. The q_i are independent of x and of each other, so all sets of
    flipped samples of one size are equally likely. Here the number is exact and the set is uniform.
    The authors' code has one W per true class; a single W takes memory S K instead of S K^2.

    >>> inputs, labels = np.eye(8), np.arange(8) % 4
    >>> noisy = instance_noise(inputs, labels, 4, share=0.5, seed=0)
    >>> int((noisy != labels).sum())
    4

    Args:
      inputs: [N, ...], an array or anything with a length whose slices are arrays; read twice, in
        chunks.
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1], of labels to replace.
      seed: of the projection, the samples and the classes.

    Returns:
      int[N], a copy.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: share outside [0, 1], labels out of range, fewer than two classes, different
        numbers of inputs and labels, or inputs that are not finite numbers.

    Source: Xia et al., "Part-dependent Label Noise", NeurIPS 2020, Algorithm 2.
    """
    with optional("scikit-learn"):
        from sklearn.preprocessing import StandardScaler

    choices, weights, draws = generator("noise", seed).spawn(3)
    wrong = np.sort(_wrong(labels, num_classes, share=share, rng=choices))
    if len(inputs) != len(labels):
        raise ValueError(f"inputs must have {len(labels)} rows, as labels; given {len(inputs)}")
    noisy = np.array(labels)
    if not wrong.size:
        return noisy
    scaler = StandardScaler()
    for number, rows in enumerate(chunks(inputs, CHUNK)):
        checks.finite(**{f"inputs[{number * CHUNK}:]": rows})
        scaler.partial_fit(rows.reshape(len(rows), -1))
    projection = weights.standard_normal((scaler.n_features_in_, num_classes))
    wrong_by_chunk = np.split(wrong, np.searchsorted(wrong, np.arange(CHUNK, len(labels), CHUNK)))
    for places, rows in zip(wrong_by_chunk, chunks(inputs, CHUNK)):
        if places.size:
            features = scaler.transform(rows[places % CHUNK].reshape(len(places), -1))
            logits = features @ projection
            logits[np.arange(len(places)), noisy[places]] = -np.inf
            # The Gumbel-max trick: a sample of the softmax.
            noisy[places] = np.argmax(logits + draws.gumbel(size=logits.shape), 1)
    return noisy


def outside_candidates(
    inputs: np.ndarray, other: np.ndarray, *, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces exactly round(share * N) inputs by rows of another data set: no class fits them.

    >>> mixed, outside = outside_candidates(np.zeros(5), np.ones(9), share=0.4, seed=0)
    >>> int(outside.sum()), bool((mixed == outside).all())
    (2, True)

    Args:
      inputs: [N, ...].
      other: [M, ...] of the same shape and dtype, of classes that `inputs` does not have. A row is
        drawn twice only if M is less than the number replaced.
      share: in [0, 1], of inputs to replace.
      seed: of the choice of samples and of rows.

    Returns:
      (inputs [N, ...], outside bool[N]), copies.

    Raises:
      ValueError: share outside [0, 1], rows of another shape or dtype, or no rows in `other`.
    """
    if (other.shape[1:], other.dtype) != (inputs.shape[1:], inputs.dtype):
        raise ValueError(
            f"other must have rows {inputs.dtype}{list(inputs.shape[1:])}, as inputs; "
            f"given {other.dtype}{list(other.shape[1:])}"
        )
    if not len(other):
        raise ValueError("other must hold at least one row; given 0")
    rng = generator("outside", seed)
    replaced = _chosen(len(inputs), share=share, rng=rng)
    count = len(replaced)
    mixed, outside = np.array(inputs), np.zeros(len(inputs), bool)
    mixed[replaced] = other[rng.choice(len(other), count, replace=count > len(other))]
    outside[replaced] = True
    return mixed, outside


def _chosen(size: int, *, share: float, rng: np.random.Generator) -> np.ndarray:
    """round(share * size) different places out of `size`, uniformly."""
    checks.fraction(share=share)
    return rng.choice(size, size=round(share * size), replace=False)


def _wrong(
    labels: np.ndarray, num_classes: int, *, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Places of the labels to corrupt; raises where labels or classes do not allow it."""
    checks.whole(2, num_classes=num_classes)
    checks.integers(num_classes, labels=labels)
    return _chosen(len(labels), share=share, rng=rng)


def _moved(
    labels: np.ndarray, wrong: np.ndarray, steps: np.ndarray, num_classes: int
) -> np.ndarray:
    """The labels; those at `wrong` are moved on by `steps` classes."""
    noisy = np.array(labels)
    noisy[wrong] = (noisy[wrong] + steps) % num_classes
    return noisy
