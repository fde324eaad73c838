"""Transformations that a network can learn to tell apart: quarter turns, orders of channels."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks


class Transformation(NamedTuple):
    """A rearrangement of an image's pixels.

    Attributes:
      turns: number of counter-clockwise turns by 90 degrees.
      channels: order of the channels; None = unchanged.
    """

    turns: int = 0
    channels: tuple[int, ...] | None = None


_TURNS, _HALF_TURNS = (0, 1, 2, 3), (0, 2)
_CYCLIC = (None, (1, 2, 0), (2, 0, 1))  # RGB, GBR, BRG
_ORDERS = (None, (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # also RBG, GRB, BGR


def _composed(turns, orders) -> tuple[Transformation, ...]:
    return tuple(Transformation(turn, order) for turn in turns for order in orders)


# Sets of M transformations, the identity first; where composed, the channels change fastest. Names
# and order are those of the repository hankook/SLA.
TRANSFORMATIONS = {
    "none": _composed((0,), (None,)),
    "rotation": _composed(_TURNS, (None,)),
    "rotation2": _composed(_HALF_TURNS, (None,)),
    "color_perm": _composed((0,), _ORDERS),
    "color_perm3": _composed((0,), _CYCLIC),
    "rot_color_perm6": _composed(_HALF_TURNS, _CYCLIC),
    "rot_color_perm12": _composed(_TURNS, _CYCLIC),
    "rot_color_perm24": _composed(_TURNS, _ORDERS),
}


def transformed(images: jax.Array, name: str) -> jax.Array:
    """All views of all images, f[B, H, W, C] -> f[B M, H, W, C]; row i M + j is view j of image i.

    >>> transformed(jnp.arange(4.0).reshape(1, 2, 2, 1), "rotation2")[..., 0].tolist()
    [[[0.0, 1.0], [2.0, 3.0]], [[3.0, 2.0], [1.0, 0.0]]]

    Args:
      images: floats.
      name: of TRANSFORMATIONS.

    Raises:
      ValueError: an unknown name, quarter turns of images that are not square, or orders of
        channels for images without three.
    """
    checks.choice(TRANSFORMATIONS, transformations=name)
    checks.images(inputs=images)
    views, (_, height, width, channels) = TRANSFORMATIONS[name], images.shape
    if height != width and any(t.turns % 2 for t in views):
        raise ValueError(f"inputs must be square for {name!r}; given {height}x{width}")
    if channels != 3 and any(t.channels for t in views):
        raise ValueError(f"inputs must have 3 channels for {name!r}; given {channels}")

    def view(turns, channels):
        turned = jnp.rot90(images, turns, axes=(1, 2))
        return turned if channels is None else turned[..., jnp.array(channels)]

    return jnp.stack([view(*t) for t in views], 1).reshape(-1, height, width, channels)
