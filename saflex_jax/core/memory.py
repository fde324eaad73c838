"""Averages of a sample's scores over its visits: one score is noisy, dozens are not."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.tree import gather, identity
from saflex_jax.types import Reduce

# Rows are a multiple of this, so that they divide among devices; the surplus is never visited.
ROWS = 1024
DTYPES = ("float32", "bfloat16")


class Memory(NamedTuple):
    """Mean scores of N source samples, N rounded up to a multiple of ROWS.

    The jit runner splits the rows among the devices; under pmap each device holds all of them.

    >>> memory = init(num_samples=10, num_classes=2)
    >>> memory.mean.shape, memory.visits.shape
    ((1024, 2), (1024,))

    Attributes:
      mean: f32 or bf16 [N, K]; a plain mean over the first visits, then an exponential moving
        average.
      visits: i32[N], number of visits.
    """

    mean: jax.Array
    visits: jax.Array

    @property
    def by_rows(self) -> bool:
        """See `types.TrainState`; a property, for a NamedTuple's constants look like fields."""
        return True


class TopMemory(NamedTuple):
    """Mean beliefs of N source samples, of which only the k largest entries are kept.

    Memory per sample does not grow with K. The given label's entry is always kept. The sum of the
    other entries counts as spread evenly.

    >>> [x.shape[1:] for x in init(num_samples=10, num_classes=1000, top=8)]
    [(8,), (8,), (), ()]

    Attributes:
      classes: u16 (i32 from 2^16 classes on) [N, k], the classes of the kept entries.
      values: f32 or bf16 [N, k], the kept entries.
      rest: f32[N], sum of the other entries.
      visits: i32[N], number of visits.
    """

    classes: jax.Array
    values: jax.Array
    rest: jax.Array
    visits: jax.Array

    @property
    def by_rows(self) -> bool:
        """As of `Memory`."""
        return True


def check(num_samples: int, num_classes: int, dtype: str, top: int | None = None) -> None:
    """Raises ValueError on arguments that `init` does not take.

    >>> check(10, 2, "float32")

    Args:
      num_samples, num_classes: N and K, >= 1.
      dtype: "float32" or "bfloat16".
      top: below num_classes, or None.
    """
    checks.whole(1, num_samples=num_samples)
    checks.whole(1, num_classes=num_classes)
    checks.choice(DTYPES, memory_dtype=dtype)
    if top is not None:
        checks.whole(1, top=top)
        if top >= num_classes:
            raise ValueError(f"top must be below num_classes = {num_classes}; given {top}")


def init(
    num_samples: int, num_classes: int, *, dtype: str = "float32", top: int | None = None
) -> Memory | TopMemory:
    """An empty memory.

    >>> arrays = init(1024, 1000, top=8)
    >>> sum(x.nbytes for x in arrays) / 1024  # bytes per sample; with all 1000 means 4004
    56.0

    Args:
      num_samples, num_classes: N before rounding, and K.
      dtype: of the averages. "bfloat16" halves them. A visit is added in f32 and then rounded, so a
        mean comes to rest within 2^-8 / (1 - decay) of its value (4 % at decay .9).
      top: k < K, number of entries to keep (`TopMemory`); None = all (`Memory`).

    Raises:
      ValueError: sizes < 1, another dtype, top not below K.
    """
    check(num_samples, num_classes, dtype, top)
    rows = -(-num_samples // ROWS) * ROWS
    visits = jnp.zeros(rows, jnp.int32)
    if top is None:
        return Memory(jnp.zeros((rows, num_classes), dtype), visits)
    classes = jnp.zeros((rows, top), jnp.uint16 if num_classes <= 2**16 else jnp.int32)
    return TopMemory(classes, jnp.zeros((rows, top), dtype), jnp.zeros(rows), visits)


def started(memory: Memory, beliefs: jax.Array, *, visits: int) -> Memory:
    """The memory as if each sample had been visited so often, each time with the same scores.

    >>> memory = started(init(num_samples=2, num_classes=2), jnp.eye(2), visits=3)
    >>> _, mean = update(memory, jnp.array([0]), jnp.array([[5.0, 4.0]]), jnp.ones(1, bool))
    >>> mean.tolist()  # the fourth visit
    [[2.0, 1.0]]

    Args:
      memory: what `init` returned.
      beliefs: scores, f32[N, K], of all samples.
      visits: >= 1.

    Raises:
      ValueError: beliefs of another shape, a `TopMemory`, no visit.
    """
    checks.whole(1, visits=visits)
    if not isinstance(memory, Memory):
        raise ValueError(
            f"memory must be one of all classes, top=None; given a {type(memory).__name__}"
        )
    rows, size = memory.mean.shape
    if np.ndim(beliefs) != 2 or beliefs.shape[1] != size or not 0 <= rows - len(beliefs) < ROWS:
        raise ValueError(
            f"beliefs must have a row for each of the {rows - ROWS + 1} to {rows} samples and "
            f"{size} classes; given {list(np.shape(beliefs))}"
        )
    own = slice(len(beliefs))
    mean = memory.mean.at[own].set(jnp.asarray(beliefs).astype(memory.mean.dtype))
    return Memory(mean, memory.visits.at[own].set(visits))


def update(
    memory: Memory | TopMemory,
    index: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    *,
    given: jax.Array | None = None,
    decay: float = 0.9,
    reduce: Reduce = identity,
) -> tuple[Memory | TopMemory, jax.Array]:
    """Adds one visit of the given samples; returns the memory and their new means.

        m <- m + max(1 - decay, 1 / visits) (s - m)

    The work grows with the batch, not with N.

    >>> memory, mask = init(num_samples=10, num_classes=2), jnp.ones(2, bool)
    >>> for scores in ([[1.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 2.0]]):
    ...     memory, mean = update(memory, jnp.array([7, 2]), jnp.array(scores), mask)
    >>> mean.tolist()
    [[2.0, 0.0], [0.0, 3.0]]

    Args:
      memory: what `init` or an earlier update returned.
      index: i32[B], source sample of each row; rows of the same sample are averaged first.
      scores: f32[B, K], on a scale that does not drift (raw scores shrink during training); for a
        `TopMemory` beliefs, >= 0.
      mask: bool[B]; False rows are not remembered.
      given: i32[B], the given label of each row, whose entry a `TopMemory` always keeps: among many
        classes a wrong label is rarely one of the largest, and a right one is not at first.
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
    if isinstance(memory, Memory) or given is None:
        everyone, scores = gather((index, scores), reduce)
        given = None
    else:  # in one array: what is gathered apart is one more exchange
        about, scores = gather((jnp.stack((index, given)).T, scores), reduce)
        everyone, given = about.T
    rows, place = jnp.unique(everyone, size=len(everyone), fill_value=absent, return_inverse=True)
    if given is not None:
        given = jax.ops.segment_max(given, place, len(rows))
    count = jax.ops.segment_sum(jnp.ones(len(place)), place, len(rows))
    fresh = jax.ops.segment_sum(scores, place, len(rows)) / jnp.maximum(count, 1)[:, None]
    memory = _each_share(reduce, partial(_visited, decay=decay), memory, rows, fresh, given)
    return memory, recall(memory, index, scores.shape[1])


def _visited(memory, rows: jax.Array, fresh: jax.Array, given: jax.Array | None, *, decay: float):
    """The memory after a visit of different `rows` i32[B], of which those out of range drop."""
    visits = memory.visits.at[rows].get(mode="fill", fill_value=0) + 1
    old = recall(memory, rows, fresh.shape[1])
    new = old + jnp.maximum(1 - decay, 1 / visits)[:, None] * (fresh - old)

    def at_rows(kept, values):
        return kept.at[rows].set(values.astype(kept.dtype), mode="drop")

    visits = at_rows(memory.visits, visits)
    if isinstance(memory, Memory):
        return Memory(at_rows(memory.mean, new), visits)
    ranks = new if given is None else new.at[jnp.arange(len(new)), given].set(jnp.inf)
    _, classes = jax.lax.top_k(ranks, memory.values.shape[1])
    values = jnp.take_along_axis(new, classes, axis=1)
    rest = jnp.maximum(jnp.sum(new, axis=1) - jnp.sum(values, axis=1), 0.0)
    return TopMemory(
        at_rows(memory.classes, classes),
        at_rows(memory.values, values),
        at_rows(memory.rest, rest),
        visits,
    )


def _each_share(reduce: Reduce, visited, memory, rows: jax.Array, fresh: jax.Array, given):
    """`visited`; under jit on several devices by each of them on the rows that it holds.

    Of one array of all devices' rows, XLA looks the old values up for every device.
    """
    absent, shares = len(memory.visits), getattr(reduce, "devices", 1)
    if shares == 1 or absent % shares:
        return visited(memory, rows, fresh, given)
    own = absent // shares
    place = rows[None] - own * jnp.arange(shares)[:, None]
    place = jnp.where((place >= 0) & (place < own), place, own)
    split = jax.tree.map(lambda x: x.reshape(shares, own, *x.shape[1:]), memory)
    new = jax.vmap(visited, (0, 0, None, None))(split, place, fresh, given)
    return jax.tree.map(lambda x: x.reshape(absent, *x.shape[2:]), new)


def recall(
    memory: Memory | TopMemory, index: jax.Array, num_classes: int | None = None
) -> jax.Array:
    """The means of samples, f32[..., K]; 0 before the first visit or out of range.

    >>> recall(init(num_samples=10, num_classes=2), jnp.array([3])).tolist()
    [[0.0, 0.0]]

    Args:
      memory: what `init` or `update` returned.
      index: i32[...], source samples.
      num_classes: K; needed by a `TopMemory`.
    """

    def at(kept):
        return kept.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)

    if isinstance(memory, Memory):
        return at(memory.mean)
    values, rest = at(memory.values), at(memory.rest)
    classes = memory.classes.at[index].get(mode="fill", fill_value=0).astype(jnp.int32)
    others = rest[..., None] / (num_classes - values.shape[-1])
    others = jnp.broadcast_to(others, (*rest.shape, num_classes))
    return jnp.put_along_axis(others, classes, values, axis=-1, inplace=False)
