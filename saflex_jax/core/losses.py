"""Weighted soft-label cross-entropy, per sample, and the global mean that turns it into a loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.tree import identity
from saflex_jax.types import Reduce


def weighted_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy against soft labels, one value per sample.

        l_i = - w_i sum_k y_ik log softmax(z_i)_k

    Differentiable in logits, labels and weights, also where a label is exactly zero (so a
    hypergradient can raise it); hence no `where(labels == 0)` shortcut.

    Args:
      logits: f32[B, K].
      labels: f32[B, K], rows in the simplex.
      weights: f32[B], >= 0; None = ones.
      mask: bool[B]; False rows (padding) give exactly 0 and no gradient.

    Returns:
      f32[B], nats. Not averaged: see `masked_mean`.

    Raises:
      ValueError: shapes disagree.
    """
    checks.same_shape(labels=labels, logits=logits)
    checks.rows(logits.shape[0], weights=weights, mask=mask)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, 0.0)
    losses = -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
    if weights is not None:
        losses = weights * losses
    return losses if mask is None else jnp.where(mask, losses, 0.0)


def masked_mean(
    values: jax.Array, mask: jax.Array | None = None, *, reduce: Reduce = identity
) -> jax.Array:
    """Mean of `values` f32[B] over the unmasked rows of all devices; 0 when all are masked.

        sum_local(values) / reduce(count_local)

    Under jit this is the global mean. Under pmap it is the device's share of it: `reduce` of the
    result, or of its gradient, is the global value. Uneven padding is thus weighed exactly, which
    a mean of per-device means is not.
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    # Counts carry no gradient, so this reduce is safe inside a differentiated function.
    count = reduce(jnp.sum(mask, dtype=values.dtype))
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, jnp.finfo(values.dtype).tiny)
