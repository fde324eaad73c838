"""Averages of a source sample's scores over its visits: one score is noisy, dozens are not."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.tree import gather, identity
from saflex_jax.types import Reduce

# Rows are a multiple of this, so that they divide among devices; the surplus is never visited.
ROWS = 1024
DTYPES = ("float32", "bfloat16")


class Memory(NamedTuple):
    """Score averages of N source samples, N rounded up to a multiple of ROWS.

    The jit runner splits its rows among the devices; under pmap each device holds all of it.

    Attributes:
      mean: f32 or bf16 [N, K]; a plain mean over the first visits, then an exponential moving
        average.
      visits: i32[N].
    """

    by_rows = True  # see `types.TrainState`

    mean: jax.Array
    visits: jax.Array


def check(num_samples: int, num_classes: int, dtype: str) -> None:
    """Raises ValueError on what `init` does not take."""
    checks.whole(1, num_samples=num_samples)
    checks.whole(1, num_classes=num_classes)
    checks.choice(DTYPES, memory_dtype=dtype)


def init(num_samples: int, num_classes: int, *, dtype: str = "float32") -> Memory:
    """An empty memory.

    Args:
      num_samples, num_classes: N before rounding, and K.
      dtype: of the averages. "bfloat16" halves them; a visit is added in f32 and then rounded, so
        that a mean comes to rest within 2^-8 / (1 - decay) of its value (4 % at decay .9).

    Raises:
      ValueError: sizes < 1, another dtype.
    """
    check(num_samples, num_classes, dtype)
    rows = -(-num_samples // ROWS) * ROWS
    return Memory(jnp.zeros((rows, num_classes), dtype), jnp.zeros(rows, jnp.int32))


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

    The work grows with the batch, not with N.

    >>> memory, mask = init(num_samples=10, num_classes=2), jnp.ones(2, bool)
    >>> for scores in ([[1.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 2.0]]):
    ...     memory, mean = update(memory, jnp.array([7, 2]), jnp.array(scores), mask)
    >>> mean.tolist()
    [[2.0, 0.0], [0.0, 3.0]]

    Args:
      memory: of N samples.
      index: i32[B], source sample of each row; rows of the same sample are averaged first.
      scores: f32[B, K], already in a scale of their own (a raw score shrinks as training goes on).
      mask: bool[B]; False rows are not remembered.
      decay: in [0, 1); 0 remembers the last visit only.
      reduce: `identity` or a `Mean`: every device adds the rows of all devices.

    Returns:
      (memory, f32[B, K] the updated means of the rows, 0 where masked).

    Raises:
      ValueError: decay outside [0, 1); a reduce that can only average.
    """
    checks.decay(decay=decay)
    absent = memory.visits.shape[0]  # out of range: dropped by the scatter, filled by the gather
    index = jnp.where(mask, index, absent)
    everyone, scores = gather((index, scores), reduce)
    rows, place = jnp.unique(everyone, size=len(everyone), fill_value=absent, return_inverse=True)
    count = jax.ops.segment_sum(jnp.ones(len(place)), place, len(rows))
    fresh = jax.ops.segment_sum(scores, place, len(rows)) / jnp.maximum(count, 1)[:, None]
    visits = memory.visits.at[rows].get(mode="fill", fill_value=0) + 1
    old = memory.mean.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
    new = old + jnp.maximum(1 - decay, 1 / visits)[:, None] * (fresh - old)
    mean = memory.mean.at[rows].set(new.astype(memory.mean.dtype), mode="drop")
    memory = Memory(mean, memory.visits.at[rows].set(visits, mode="drop"))
    return memory, recall(memory, index)


def recall(memory: Memory, index: jax.Array) -> jax.Array:
    """What is remembered of samples i32[B], f32[B, K]; 0 before the first visit or out of range.

    >>> recall(init(num_samples=10, num_classes=2), jnp.array([3])).tolist()
    [[0.0, 0.0]]
    """
    return memory.mean.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
