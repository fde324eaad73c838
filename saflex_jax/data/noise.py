"""Seeded corruption: wrong labels of three kinds, and candidates from outside."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.preprocessing import StandardScaler

from saflex_jax import checks
from saflex_jax.data.seeds import generator
from saflex_jax.data.splits import chunks

CHUNK = 256  # inputs in memory at once


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
      ValueError: share outside [0, 1], labels out of range, or fewer than two classes.
    """
    rng = generator("noise", seed)
    wrong = _wrong(labels, num_classes, share=share, rng=rng)
    return _moved(labels, wrong, rng.integers(1, num_classes, size=len(wrong)), num_classes)


def pairwise_noise(labels: np.ndarray, num_classes: int, *, share: float, seed: int) -> np.ndarray:
    """Replaces exactly round(share * N) labels by the next class, k by k + 1 mod K.

    Args:
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1].
      seed: of the choice of samples.

    Returns:
      int[N]; the argument is left as it is.

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

    A wrong sample of class y with input x, flattened and each feature standardised over the data
    set, becomes class k with probability

      softmax(x W)_k over k != y,    W ~ N(0, 1)^{S x K}, which depends on the seed alone.

    The paper flips sample i with probability q_i ~ N(share, 0.1^2) truncated to [0, 1], so that the
    share is random. Its q_i are independent of x and of each other: given how many samples flip,
    all sets of that size are equally likely, and so they are drawn here, with the number exact. The
    authors' code has a W for every true class; here one serves all, so memory is S K, not S K^2.

    Args:
      inputs: [N, ...], an array or anything with a length whose slices are arrays; read twice, in
        chunks.
      labels: int[N] in [0, num_classes).
      num_classes: K >= 2.
      share: in [0, 1].
      seed: of the projection, the samples and the classes.

    Returns:
      int[N]; the arguments are left as they are.

    Raises:
      ValueError: share outside [0, 1], labels out of range, fewer than two classes, another number
        of inputs than of labels, or inputs that are not finite numbers.

    Source: Xia et al., "Part-dependent Label Noise", NeurIPS 2020, Algorithm 2.
    """
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
    parts = np.split(wrong, np.searchsorted(wrong, np.arange(CHUNK, len(labels), CHUNK)))
    for here, rows in zip(parts, chunks(inputs, CHUNK)):
        if here.size:
            features = scaler.transform(rows[here % CHUNK].reshape(len(here), -1))
            scores = features @ projection
            scores[np.arange(len(here)), noisy[here]] = -np.inf
            noisy[here] = np.argmax(scores + draws.gumbel(size=scores.shape), 1)  # ~ softmax
    return noisy


def outside_candidates(
    inputs: np.ndarray, other: np.ndarray, *, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces exactly round(share * N) inputs by rows of another data set: no label is right.

    Args:
      inputs: [N, ...].
      other: [M, ...] of the same shape and dtype, of classes that `inputs` does not have; a row
        comes in twice only where M is less than the number replaced.
      share: in [0, 1].
      seed: of the choice of samples and of rows.

    Returns:
      (inputs [N, ...], outside bool[N]); the arguments are left as they are.

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
    """Exactly round(share * size) different places out of `size`, uniformly."""
    checks.fraction(share=share)
    return rng.choice(size, size=round(share * size), replace=False)


def _wrong(
    labels: np.ndarray, num_classes: int, *, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Places of the labels to corrupt, if there is a way to."""
    checks.whole(2, num_classes=num_classes)
    checks.integers(num_classes, labels=labels)
    return _chosen(len(labels), share=share, rng=rng)


def _moved(
    labels: np.ndarray, wrong: np.ndarray, steps: np.ndarray, num_classes: int
) -> np.ndarray:
    """The labels, those at `wrong` moved on by `steps` classes."""
    noisy = np.array(labels)
    noisy[wrong] = (noisy[wrong] + steps) % num_classes
    return noisy
