"""Geometric augmentations of images f32[B, H, W, C]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.augment.base import Augment, per_example


def shift(pixels: int) -> Augment:
    """Zero-pads by `pixels` and crops back at a random place (the crop of CIFAR recipes)."""
    checks.at_least_zero("pixels", pixels)

    def op(key, image):
        padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)))
        row, column = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)

    return per_example(op)


def affine(*, degrees: float = 0.0, scale: float = 0.0, shear: float = 0.0) -> Augment:
    """Random rotation, scaling and shear about the centre; bilinear, zeros outside.

        x_out(r) = x_in(A r),  A = rotation(U(-degrees, degrees)) [[s, h], [0, s]]

    Args:
      degrees: largest rotation.
      scale: s ~ U(1 - scale, 1 + scale), with 0 <= scale < 1.
      shear: h ~ U(-shear, shear).
    """
    checks.at_least_zero("degrees", degrees)
    checks.at_least_zero("shear", shear)
    if not 0 <= scale < 1:
        raise ValueError(f"scale must lie in [0, 1); given {scale}")

    def op(key, image):
        angle, size, slant = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
        angle, size, slant = jnp.deg2rad(degrees) * angle, 1 + scale * size, shear * slant
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        matrix = jnp.array([[cos, -sin], [sin, cos]]) @ jnp.array([[size, slant], [0.0, size]])
        height, width, _ = image.shape
        centre = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
        grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
        where = jnp.einsum("ij,jhw->ihw", matrix, grid - centre) + centre
        warp = lambda channel: jax.scipy.ndimage.map_coordinates(channel, where, order=1)
        return jax.vmap(warp, in_axes=-1, out_axes=-1)(image)

    return per_example(op)
