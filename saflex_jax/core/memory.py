"""Averages of a source sample's scores over its visits: one score is noisy, dozens are not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.tree import identity
from saflex_jax.types import Reduce


class Memory(NamedTuple):
    """Score averages of N source samples.

    Attributes:
      mean: f32[N, K]; a plain mean over the first visits, then an exponential moving average.
      visits: i32[N].
    """

    mean: jax.Array
    visits: jax.Array


def init(num_samples: int, num_classes: int) -> Memory:
    """An empty memory."""
    checks.positive("num_samples", num_samples)
    return Memory(jnp.zeros((num_samples, num_classes)), jnp.zeros(num_samples, jnp.int32))


def update(
    memory: Memory,
    index: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    *,
    decay: float = 0.9,
    reduce: Reduce = identity,
) -> tuple[Memory, jax.Array]:
    """Adds one visit of the given samples and returns what is remembered of them.

        m <- m + max(1 - decay, 1 / visits) (s - m)

    Args:
      memory: of N samples.
      index: i32[B], source sample of each row; rows of the same sample are averaged first.
      scores: f32[B, K], already in a scale of their own (a raw score shrinks as training goes on).
      mask: bool[B]; False rows are not remembered.
      decay: in [0, 1); 0 remembers the last visit only.
      reduce: mean over the data-parallel axis, so that every device holds the same memory.

    Returns:
      (memory, f32[B, K] the updated means of the rows).

    Raises:
      ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1); given {decay}")
    size = memory.visits.shape[0]
    index = jnp.where(mask, index, size)  # out of range: dropped by the scatter
    seen = jnp.zeros(size, scores.dtype).at[index].add(1.0, mode="drop")
    total = jnp.zeros_like(memory.mean).at[index].add(scores, mode="drop")
    seen, total = reduce((seen, total))
    visited = seen > 0
    visits = memory.visits + visited
    rate = jnp.maximum(1 - decay, 1 / jnp.maximum(visits, 1))[:, None]
    fresh = total / jnp.where(visited, seen, 1.0)[:, None]
    mean = jnp.where(visited[:, None], memory.mean + rate * (fresh - memory.mean), memory.mean)
    return Memory(mean, visits), mean.at[index].get(mode="fill", fill_value=0.0)
