"""Alternative augmentations, drawn with probabilities that may change while a program runs.

    cell_i ~ p ,   x_i <- alternative cell_i of x_i

The probabilities are an array f[C] argument, in a training state or a sweep's options, so a new
value compiles nothing. An operation at several strengths counts as several alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.augment import policies
from saflex_jax.augment.base import OPERATIONS, Augment, _picked, record, sample_keys
from saflex_jax.types import Batch


class Alternatives(NamedTuple):
    """C alternatives, of which each sample draws one.

    >>> of_views([0, 1], ["weak", "strong"]).names
    ('weak', 'strong')

    Attributes:
      names: of the alternatives.
      draw: (key, batch, log_p f[C], or f[B, C] by row) -> (augmented batch, cell i32[B]). log_p
        need not be normalised; -inf is never drawn.
    """

    names: tuple[str, ...]
    draw: Callable[[jax.Array, Batch, jax.Array], tuple[Batch, jax.Array]]


def of_pipelines(pipelines: Mapping[str, Augment]) -> Alternatives:
    """Whole pipelines as alternatives; all of them run on the whole batch, see `of_operations`.

    >>> from saflex_jax.augment import parse
    >>> both = of_pipelines({"none": parse("identity"), "flip": parse("flip(1.0)")})
    >>> image = jnp.arange(2.0).reshape(1, 1, 2, 1)
    >>> batch = Batch(image, jnp.ones((1, 1)), jnp.ones(1, bool), jnp.arange(1))
    >>> flipped, cell = jax.jit(both.draw)(jax.random.key(0), batch, np.array([-np.inf, 0.0]))
    >>> flipped.inputs.ravel().tolist(), cell.tolist()
    ([1.0, 0.0], [1])

    Args:
      pipelines: name -> a pipeline that keeps the number of rows.

    Raises:
      ValueError: no pipeline; (when drawn) one that changes the number of rows.
    """
    names = tuple(pipelines)
    checks.whole(1, **{"the number of pipelines": len(names)})

    def draw(key, batch, log_p):
        cell_key, *keys = jax.random.split(key, 1 + len(names))
        cell = _drawn(cell_key, batch, log_p, len(names))
        made = [pipeline(k, batch) for pipeline, k in zip(pipelines.values(), keys)]
        return _picked(batch, cell, dict(zip(names, made))), cell

    return Alternatives(names, draw)


def of_operations(
    strengths: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    operations: Sequence[str] | None = None,
    fill: float = 0.0,
    interpolation: str = "nearest",
) -> Alternatives:
    """RandAugment's operations at several strengths, at the cost of one operation per sample.

    >>> of_operations([0.5, 1.0], operations=["rotate", "identity"]).names
    ('identity', 'rotate(0.5)', 'rotate(1)')

    Args:
      strengths: in [0, 1]; 1 is RandAugment's m = 30. "identity" has no strength.
      operations: of `policies.STANDARD`; None = all 14.
      fill, interpolation: see `randaugment`.

    Raises:
      ValueError: strengths out of range, or an unknown operation.
    """
    space = policies.STANDARD
    operations = list(space) if operations is None else list(operations)
    for name in operations:
        checks.choice(space, **{"an operation": name})
    for strength in strengths:
        checks.fraction(**{"a strength": strength})
    policies._check_warp(fill, interpolation)
    plain = [n for n in operations if space[n].low == space[n].high]
    cells = [(n, 0.0) for n in plain]
    cells += [(n, s) for n in operations if n not in plain for s in strengths]
    place = jnp.array([list(space).index(n) for n, _ in cells])
    strength = jnp.array([s for _, s in cells], jnp.float32)
    number = jnp.array([OPERATIONS.index(n) for n, _ in cells], jnp.int32)

    def draw(key, batch, log_p):
        shape = policies._image_shape(batch)
        cell_key, sign_key = jax.random.split(key)
        cell = _drawn(cell_key, batch, log_p, len(cells))
        uniform = jax.vmap(jax.random.uniform)(sample_keys(sign_key, batch))
        sign = policies._sign(uniform)
        value = policies.values(space, place[cell], strength[cell], sign, shape)
        images = policies.apply(
            batch.inputs.astype(jnp.float32), number[cell], value,
            names=operations, fill=fill, interpolation=interpolation,
        )  # fmt: skip
        images = jnp.clip(images, 0, 1).astype(batch.inputs.dtype)
        return record(batch._replace(inputs=images), number[cell], value), cell

    return Alternatives(tuple(n if n in plain else f"{n}({s:g})" for n, s in cells), draw)


def of_views(group: Sequence[int] | np.ndarray, names: Sequence[str]) -> Alternatives:
    """Groups of precomputed views as alternatives: f[B, V, ...] -> f[B, ...].

    A row draws a group and then one of its views, uniformly.

    >>> views = jnp.arange(3.0).reshape(1, 3, 1)
    >>> batch = Batch(views, jnp.ones((1, 1)), jnp.ones(1, bool), jnp.arange(1))
    >>> draw = jax.jit(of_views([0, 0, 1], ["weak", "strong"]).draw)
    >>> draw(jax.random.key(0), batch, np.array([-np.inf, 0.0]))[0].inputs.tolist()
    [[2.0]]

    Args:
      group: i[V] in [0, C), the group of each view.
      names: of the C groups; each has at least one view.

    Raises:
      ValueError: groups out of range, or one without a view; (when drawn) another number of views.
    """
    group = np.asarray(group)
    checks.integers(len(names), group=group)
    size = np.bincount(group, minlength=len(names))
    if not size.all():
        raise ValueError(f"group must have a view of each of {list(names)}; given {size.tolist()}")
    views = np.argsort(group, kind="stable")
    first = np.cumsum(size) - size

    def draw(key, batch, log_p):
        if np.ndim(batch.inputs) < 2 or batch.inputs.shape[1] != len(group):
            raise ValueError(
                f"inputs must have {len(group)} views [B, V, ...]; given {np.shape(batch.inputs)}"
            )
        cell_key, view_key = jax.random.split(key)
        cell = _drawn(cell_key, batch, log_p, len(names))
        uniform = jax.vmap(jax.random.uniform)(sample_keys(view_key, batch))
        number = jnp.asarray(size)[cell]
        within = jnp.minimum((uniform * number).astype(jnp.int32), number - 1)
        view = jnp.asarray(views)[jnp.asarray(first)[cell] + within]
        inputs = batch.inputs[jnp.arange(len(cell)), view]
        return record(batch._replace(inputs=inputs), "view", view), cell

    return Alternatives(tuple(names), draw)


def _drawn(key: jax.Array, batch: Batch, log_p: jax.Array, number: int) -> jax.Array:
    """The alternative of each row, by its index and log_p alone, i32[B]."""
    rows = len(batch.index)
    if np.shape(log_p) not in ((number,), (rows, number)):
        raise ValueError(
            f"log_p must have shape [{number}] or [{rows}, {number}]; given {np.shape(log_p)}"
        )
    log_p = jnp.broadcast_to(log_p, (rows, number))
    return jax.vmap(jax.random.categorical)(sample_keys(key, batch), log_p).astype(jnp.int32)
