"""Rows that upstream mixing made of several samples: how much is a row's own, and whose the rest.

A row is taken for its own sample from a share of WHOLE on. What is known of samples, that they are
trusted or what is believed of them, reaches other rows through their parents, as labels do. Where
a pipeline mixes more than once, a partner's own partner is not in the trace and is overlooked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saflex_jax.types import Batch, Trace

WHOLE = 0.9


def own_share(batch: Batch) -> jax.Array:
    """How much of each row is its own sample, f32[B]: the product of its mixings' shares.

    Without a trace, use the largest entry of the label.

    >>> labels = jnp.array([[1.0, 0.0], [0.6, 0.4]])
    >>> own_share(Batch(jnp.zeros((2, 3)), labels, jnp.ones(2, bool), jnp.arange(2))).tolist()
    [1.0, 0.6000000238418579]
    """
    if batch.trace is None:
        return jnp.max(batch.labels, axis=-1)
    return jnp.prod(_shares(batch.index, batch.trace), axis=-1)


def is_whole(batch: Batch) -> jax.Array:
    """Rows that are, all but a little, their own sample, bool[B]."""
    return own_share(batch) >= WHOLE


def of_all(batch: Batch, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rows all of whose parents have a property, bool[B]; no mixed row where there is no trace.

    Args:
      batch: B rows; those that are whole have one parent.
      holds: index i32[...] of source samples -> bool[...].
    """
    partners: Any = False
    if batch.trace is not None:
        partners = jnp.all(holds(jnp.asarray(batch.trace.partner)), axis=-1)
    return holds(batch.index) & (is_whole(batch) | partners)


def mixture(
    batch: Batch, recall: Callable[[jax.Array], jax.Array], otherwise: jax.Array
) -> jax.Array:
    """What is known of source samples as it is of rows: mixed where they are, by the same shares.

        m_i  of a whole row ,  s_i m_i + (1 - s_i) m_p(i)  of one mixed with p(i), as its label is

    Args:
      batch: B rows.
      recall: index i32[...] of source samples -> f32[..., K] >= 0, all 0 where nothing is known.
      otherwise: f32[B, K], of rows with a parent of which nothing is known.
    """

    def known(values):  # NaN is known
        return jnp.any(values != 0, axis=-1, keepdims=True)

    whole = is_whole(batch)[:, None]
    if batch.trace is None:
        own = recall(batch.index)
        return jnp.where(whole & known(own), own, otherwise)
    # One look-up: a memory may lie on many devices.
    own, *others = jnp.moveaxis(
        recall(jnp.concatenate([batch.index[:, None], batch.trace.partner], axis=1)), 1, 0
    )
    mixed, complete = own, known(own)
    for share, other in zip(_shares(batch.index, batch.trace).T, others):
        mixed = share[:, None] * mixed + (1 - share[:, None]) * other
        complete &= known(other)
    value, complete = jnp.where(whole, own, mixed), jnp.where(whole, known(own), complete)
    return jnp.where(complete, value, otherwise)


def _shares(index: jax.Array, trace: Trace) -> jax.Array:
    """Own share in every operation of the trace, f32[B, L]; 1 where it did not mix."""
    return jnp.where(trace.partner != index[:, None], trace.magnitude, 1.0)
