"""Exact evaluation: sums and counts over padded batches of one shape, never means of means."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.losses import weighted_cross_entropy
from saflex_jax.types import Method, TrainState


@functools.cache  # one compilation serves every set and seed of a method
def _compiled(predict: Callable) -> Callable:
    @jax.jit
    def sums(state, x, y, mask):
        logits = predict(state, x)
        right = (jnp.argmax(logits, -1) == jnp.argmax(y, -1)) & mask
        return jnp.sum(right), jnp.sum(weighted_cross_entropy(logits, y, mask=mask))

    return sums


def make_evaluator(
    method: Method, inputs: np.ndarray, labels: np.ndarray, *, batch_size: int = 512
) -> Callable[[TrainState], dict[str, float]]:
    """state -> {"accuracy": share, "loss": mean cross-entropy in nats} over a fixed set.

    The last batch is padded and masked, so there is one compilation and no sample is left out.

    Args:
      method: supplies `predict`.
      inputs: [N, ...].
      labels: f32[N, K]; accuracy compares the largest entry.
      batch_size: rows at a time.

    Raises:
      ValueError: the set is empty or malformed.
    """
    size = len(labels)
    if size == 0:
        raise ValueError("labels must hold at least one sample to evaluate on; given 0")
    if len(inputs) != size:
        raise ValueError(f"inputs must have {size} rows, as labels have; given {len(inputs)}")
    checks.finite("inputs", inputs)
    checks.simplex("labels", labels)
    batch_size = min(batch_size, size)

    sums = _compiled(method.predict)

    def evaluate(state):
        right, loss = 0, 0.0
        for begin in range(0, size, batch_size):
            x, y = inputs[begin : begin + batch_size], labels[begin : begin + batch_size]
            pad = batch_size - len(y)
            mask = np.arange(batch_size) < len(y)
            x, y = (np.concatenate([a, np.zeros((pad, *a.shape[1:]), a.dtype)]) for a in (x, y))
            r, l = jax.device_get(sums(state, x, y, mask))
            right, loss = right + int(r), loss + float(l)
        return {"accuracy": right / size, "loss": loss / size}

    return evaluate
