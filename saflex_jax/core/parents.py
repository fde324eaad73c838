"""Parents of mixed rows: how much of a row is its own sample, and whose is the rest.

A row counts as its own sample from a share of WHOLE on. Knowledge about samples (trusted or not,
remembered beliefs) reaches mixed rows through their parents, as labels do. If a pipeline mixes more
than once, a partner's own partner is not in the trace and is ignored.
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

    Args:
      batch: B rows.
    """
    if batch.trace is None:
        return jnp.max(batch.labels, axis=-1)
    return jnp.prod(_shares(batch.index, batch.trace), axis=-1)


def is_whole(batch: Batch) -> jax.Array:
    """Rows that count as their own sample, bool[B].

    >>> labels = jnp.array([[1.0, 0.0], [0.6, 0.4]])
    >>> is_whole(Batch(jnp.zeros((2, 3)), labels, jnp.ones(2, bool), jnp.arange(2))).tolist()
    [True, False]

    Args:
      batch: B rows.
    """
    return own_share(batch) >= WHOLE


def of_all(batch: Batch, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rows all of whose parents have a property, bool[B]; without a trace, no mixed row.

    >>> labels = jnp.array([[1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])
    >>> batch = Batch(jnp.zeros((3, 3)), labels, jnp.ones(3, bool), jnp.arange(3))
    >>> of_all(batch, lambda index: index < 2).tolist()
    [True, False, False]

    Args:
      batch: B rows.
      holds: index i32[...] of source samples -> bool[...].
    """
    partners: Any = False
    if batch.trace is not None:
        partners = jnp.all(holds(jnp.asarray(batch.trace.partner)), axis=-1)
    return holds(batch.index) & (is_whole(batch) | partners)


def samples(batch: Batch) -> jax.Array:
    """The source samples of each row: its own and its partners', i32[B, 1 + L].

    >>> trace = Trace(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.array([[7], [5]]))
    >>> samples(Batch((), jnp.eye(2), jnp.ones(2, bool), jnp.array([5, 7]), trace)).tolist()
    [[5, 7], [7, 5]]

    Args:
      batch: B rows.
    """
    own = batch.index[:, None]
    if batch.trace is None:
        return own
    return jnp.concatenate([own, jnp.asarray(batch.trace.partner)], axis=1)


def mixed(batch: Batch, recall: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """What all source samples have, mixed as their rows were, f32[B, K].

        s_i m_i + (1 - s_i) m_p(i)

    >>> trace = Trace(jnp.zeros((1, 1)), jnp.array([[0.75]]), jnp.array([[1]]))
    >>> batch = Batch((), jnp.array([[0.75, 0.25]]), jnp.ones(1, bool), jnp.arange(1), trace)
    >>> mixed(batch, lambda index: jnp.eye(2)[index]).tolist()
    [[0.75, 0.25]]

    Args:
      batch: B rows.
      recall: index i32[...] of source samples -> f32[..., K].
    """
    own, *others = jnp.moveaxis(recall(samples(batch)), 1, 0)
    return _mix(batch, own, others)


def mixture(
    batch: Batch, recall: Callable[[jax.Array], jax.Array], otherwise: jax.Array
) -> jax.Array:
    """Mixes what is known of source samples as their rows were mixed, f32[B, K].

        m_i  of a whole row ,  s_i m_i + (1 - s_i) m_p(i)  of one mixed with p(i)

    >>> batch = Batch(jnp.zeros((2, 3)), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> beliefs = jnp.array([[0.5, 0.5], [0.0, 0.0]])  # nothing is known of the second sample
    >>> mixture(batch, lambda index: beliefs[index], otherwise=jnp.eye(2)).tolist()
    [[0.5, 0.5], [0.0, 1.0]]

    Args:
      batch: B rows.
      recall: index i32[...] of source samples -> f32[..., K] >= 0, all 0 where nothing is known.
      otherwise: f32[B, K], used where nothing is known of one of a row's parents.
    """

    def known(values):  # NaN is known
        return jnp.any(values != 0, axis=-1, keepdims=True)

    whole = is_whole(batch)[:, None]
    if batch.trace is None:
        own = recall(batch.index)
        return jnp.where(whole & known(own), own, otherwise)
    # One look-up: a memory may lie on many devices.
    own, *others = jnp.moveaxis(recall(samples(batch)), 1, 0)
    complete = known(own)
    for other in others:
        complete &= known(other)
    value = jnp.where(whole, own, _mix(batch, own, others))
    return jnp.where(jnp.where(whole, known(own), complete), value, otherwise)


def _mix(batch: Batch, own: jax.Array, others: list[jax.Array]) -> jax.Array:
    """Values f32[B, K] of the own samples, mixed with those of each operation's partners."""
    if batch.trace is None:
        return own
    for share, other in zip(_shares(batch.index, batch.trace).T, others):
        own = share[:, None] * own + (1 - share[:, None]) * other
    return own


def _shares(index: jax.Array, trace: Trace) -> jax.Array:
    """Own share in every operation of the trace, f32[B, L]; 1 where it did not mix."""
    return jnp.where(trace.partner != index[:, None], trace.magnitude, 1.0)
