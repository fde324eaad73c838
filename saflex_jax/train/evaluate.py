"""Exact evaluation: sums and counts over padded batches of one shape, no means of means."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.batches import floats
from saflex_jax.core.losses import at_least_f32, weighted_cross_entropy
from saflex_jax.types import Method, PyTree, TrainState

# One compilation for all sets and seeds of a method. Bounded, for an entry keeps its method's
# `predict` alive, with all that it closes over; more than the arms that a comparison goes through.
_of_method = functools.lru_cache(maxsize=32)


@_of_method
def _compiled(predict: Callable) -> Callable:
    @jax.jit
    def sums(state, x, y, mask):
        logits = predict(state, x)
        right = (jnp.argmax(logits, -1) == jnp.argmax(y, -1)) & mask
        return jnp.sum(right), jnp.sum(weighted_cross_entropy(logits, y, mask=mask))

    return sums


def make_evaluator(
    method: Method,
    inputs: PyTree,
    labels: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    batch_size: int = 512,
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"accuracy": share, "loss": mean cross-entropy in nats} over a fixed set.

    The last batch is padded and masked, so that one compilation serves and every sample counts.

    >>> def predict(state, inputs):
    ...     return inputs
    >>> method = Method(None, None, predict)
    >>> inputs = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], "float32")
    >>> evaluate = make_evaluator(method, inputs, np.eye(2)[[0, 1, 1]], batch_size=2)
    >>> round(evaluate(state=None)["accuracy"], 3)
    0.667

    Args:
      method: its `predict` is called.
      inputs: pytree of [N, ...] that can be sliced; read a batch at a time. 8-bit images become
        floats in [0, 1].
      labels: f32[N, K]; accuracy compares the largest entry.
      mask: bool[N], the rows that count; `predict` also sees the others, whose labels may be
        anything. None = all count.
      batch_size: rows at a time.

    Raises:
      ValueError: the set is empty or malformed.
    """
    size = len(labels)
    mask = np.ones(size, bool) if mask is None else mask
    checks.rows(size, mask=mask)
    count = int(np.sum(mask))
    if count == 0:
        raise ValueError("labels must hold at least one sample to evaluate on; given 0")
    for leaf in jax.tree.leaves(inputs):
        if len(leaf) != size:
            raise ValueError(f"inputs must have {size} rows, as labels have; given {len(leaf)}")
    checks.finite(inputs=inputs)
    checks.simplex(mask, labels=labels)
    checks.whole(1, batch_size=batch_size)
    batch_size = min(batch_size, size)

    sums = _compiled(method.predict)

    def evaluate(state):
        right, loss = 0, 0.0
        for x, y, counted in _padded(inputs, labels, mask, batch_size):
            r, l = jax.device_get(sums(state, x, y, counted))
            right, loss = right + int(r), loss + float(l)
        return {"accuracy": right / count, "loss": loss / count}

    return evaluate


def probabilities(
    method: Method, state: TrainState, inputs: PyTree, *, batch_size: int = 512
) -> np.ndarray:
    """Softmax probabilities f32[N, K], for measures that are not sums over samples.

    >>> def predict(state, inputs):
    ...     return jnp.log(inputs)
    >>> odds = np.array([[1.0, 3.0], [2.0, 2.0]], "float32")
    >>> probabilities(Method(None, None, predict), None, odds).round(2).tolist()
    [[0.25, 0.75], [0.5, 0.5]]

    Args:
      method: its `predict` is called.
      state: TrainState.
      inputs: pytree of [N, ...].
      batch_size: rows at a time.
    """
    size = len(jax.tree.leaves(inputs)[0])
    rows = _padded(inputs, np.empty((size, 0)), np.ones(size, bool), min(batch_size, size))
    softmax = _softmax(method.predict)
    return np.concatenate([np.asarray(softmax(state, x))[mask] for x, _, mask in rows])


@_of_method
def _softmax(predict: Callable) -> Callable:
    return jax.jit(lambda state, x: jax.nn.softmax(at_least_f32(predict(state, x))))


def _padded(
    inputs: PyTree, labels: np.ndarray, mask: np.ndarray, batch_size: int
) -> Iterator[tuple]:
    """Batches (inputs, labels, mask) of one shape; the last is padded with zeros."""

    def pad(rows):
        missing = batch_size - len(rows)
        return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])

    for begin in range(0, len(labels), batch_size):
        x, y, m = jax.tree.map(lambda a, b=begin: a[b : b + batch_size], (inputs, labels, mask))
        yield jax.tree.map(pad, (floats(x), y, m))
