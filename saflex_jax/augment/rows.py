"""Applies an operation to selected rows of a batch, at the cost of those rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from saflex_jax.types import PyTree

# Pixels that one round of the loop takes together. On a CPU a round costs next to nothing, so small
# rounds waste least; on an accelerator it is a few kernels, so rounds are large.
_PIXELS = {"cpu": 2**13}
_PIXELS_ELSEWHERE = 2**18


def map_rows(
    op: Callable[..., jax.Array], select: jax.Array, images: jax.Array, *params: PyTree
) -> jax.Array:
    """Applies op(image, *params) to the selected rows; the others stay unchanged.

        out_i = op(images_i, params_i)  if select_i  else  images_i

    `vmap(where(select, op(x), x))` and `vmap(lax.cond)` compute all rows. Here a loop gathers the
    selected rows, a fixed number at a time, until none is left. Rows move only within equal groups
    of neighbours, one per device, so that on a mesh no image leaves its device.

    >>> images = jnp.ones((3, 1, 1, 1))
    >>> map_rows(jnp.negative, jnp.array([True, False, True]), images).ravel().tolist()
    [-1.0, 1.0, -1.0]

    Args:
      op: keeps the shape and dtype of its image.
      select: bool[B].
      images: [B, H, W, C].
      *params: pytrees of arrays with leading axis B.
    """
    size, height, width, _ = images.shape
    groups = math.gcd(size, jax.device_count())
    members = size // groups
    pixels = _PIXELS.get(jax.default_backend(), _PIXELS_ELSEWHERE)
    taken = max(1, min(members, pixels // (height * width)))

    def grouped(x):
        return x.reshape(groups, members, *x.shape[1:])

    select, params = grouped(select), jax.tree.map(grouped, params)
    order = jax.vmap(_selected)(select)
    count = select.sum(1, keepdims=True)
    take = jax.vmap(lambda x, rows: x.at[rows].get(mode="promise_in_bounds"))
    put = jax.vmap(lambda x, rows, y: x.at[rows].set(y, mode="drop", unique_indices=True))

    def body(carry):
        start, images = carry
        place = start + jnp.arange(taken)[None]
        rows = take(order, jnp.broadcast_to(jnp.minimum(place, members - 1), (groups, taken)))
        new = jax.vmap(jax.vmap(op))(
            take(images, rows), *jax.tree.map(lambda p: take(p, rows), params)
        )
        # Places past the last selected row write nowhere: `members + place` is out of range.
        rows = jnp.where(place < count, rows, members + place)
        return start + taken, put(images, rows, new)

    most = count.max()  # before the loop: devices agree on it once, not in every round
    start = jnp.zeros((), jnp.int32)
    carry = jax.lax.while_loop(lambda carry: carry[0] < most, body, (start, grouped(images)))
    return carry[1].reshape(images.shape)


def _selected(select: jax.Array) -> jax.Array:
    """i32[n], the places of the true entries of bool[n], in order, and zeros."""
    size = select.shape[0]
    # A running count and a scatter: a sort costs as much as an operation on the images.
    to = jnp.where(select, jnp.cumsum(select) - 1, size)
    places = jnp.zeros(size, jnp.int32)
    return places.at[to].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
