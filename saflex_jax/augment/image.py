"""Deterministic operations on one image f32[H, W, C] in [0, 1]: op(image, value).

Pillow's semantics, on floats and without Pillow's rounding: nothing is clipped, so that operations
chain; `equalize` and `posterize` read the nearest of 256 levels. Any number of channels; for three
of them grey is ITU-R 601 luma, otherwise the channels' mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks

INTERPOLATIONS = ("nearest", "bilinear")


def levels(image: jax.Array) -> jax.Array:
    """i32, the nearest of the 256 levels of an 8-bit image; values outside [0, 1] are clipped.

    >>> levels(jnp.array([0.0, 0.5, 1.2])).tolist()
    [0, 128, 255]
    """
    return jnp.clip(jnp.round(image * 255), 0, 255).astype(jnp.int32)


def grey(image: jax.Array) -> jax.Array:
    """[..., C] -> [..., 1]: 0.299 R + 0.587 G + 0.114 B, or the mean if C is not three.

    >>> grey(jnp.array([0.25, 0.25, 0.25])).tolist(), grey(jnp.array([0.0, 1.0])).tolist()
    ([0.25], [0.5])
    """
    if image.shape[-1] != 3:
        return image.mean(-1, keepdims=True)
    red, green, blue = jnp.split(image, 3, -1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    return degenerate + factor * (image - degenerate)


def _over_pixels(reduce, image: jax.Array) -> jax.Array:
    """f[C], a reduction over height, which runs along memory, and then over width."""
    height, width, channels = image.shape
    columns = reduce(image.reshape(height, width * channels), 0)
    # Without the barrier XLA merges the two into one slow reduction over a short last axis.
    return reduce(jax.lax.optimization_barrier(columns).reshape(width, channels), 0)


def _stretch(image: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """scale x + offset, each f[C]; on flat rows, as XLA does not vectorise over few channels."""
    height, width, channels = image.shape
    flat = image.reshape(height, width * channels)
    return (jnp.tile(scale, width)[None] * flat + jnp.tile(offset, width)[None]).reshape(
        image.shape
    )


# --- geometry


def warp(
    image: jax.Array, matrix: jax.Array, *, fill: float = 0.0, interpolation: str = "nearest"
) -> jax.Array:
    """Affine resampling: the output at (x, y) is the input at `matrix` (x, y, 1).

        x_in = m00 (x + 1/2) + m01 (y + 1/2) + m02 ,  y_in = m10 (x + 1/2) + m11 (y + 1/2) + m12

    x to the right, y down, in pixels, centres at one half. Outside pixels are `fill`.

    Args:
      image: f32[H, W, C], sides below 2^15.
      matrix: f32[2, 3], Pillow's (a, b, c), (d, e, f).
      fill: value outside the image.
      interpolation: "nearest" or "bilinear" (which repeats the border by half a pixel).

    Raises:
      ValueError: another interpolation.

    Source: Pillow, `Image.transform(AFFINE)`.
    """
    checks.choice(INTERPOLATIONS, interpolation=interpolation)
    height, width, channels = image.shape
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    pixels = image.reshape(-1, channels)

    def look(row, column):
        place = (row * width + column).reshape(-1, 1)
        values = jnp.take_along_axis(pixels, place, 0, mode="promise_in_bounds")
        return values.reshape(image.shape)

    def clipped(row, column):
        return look(jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1))

    # In fixed point with 16 fractional bits, as in Pillow: no compiler's rounding can then move a
    # place across the border of a pixel.
    corner = matrix[:, 2] + (matrix[:, 0] + matrix[:, 1]) / 2
    fixed = jnp.floor(jnp.column_stack([matrix[:, :2], corner]) * 2**16 + 0.5).astype(jnp.int32)
    column, row = (jnp.right_shift(a * x + b * y + c, 16) for a, b, c in fixed)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    if interpolation == "nearest":
        out = look(jnp.where(inside, row, 0), jnp.where(inside, column, 0))
    else:
        x_in, y_in = (a * x + b * y + c - 0.5 for (a, b, _), c in zip(matrix, corner))
        left, top = jnp.floor(x_in), jnp.floor(y_in)
        column, row = left.astype(jnp.int32), top.astype(jnp.int32)
        right, below = (x_in - left)[..., None], (y_in - top)[..., None]

        def near(down, aside):
            return clipped(row + down, column + aside)

        upper = _blend(near(0, 0), near(0, 1), right)
        lower = _blend(near(1, 0), near(1, 1), right)
        out = _blend(upper, lower, below)
    return jnp.where(inside[..., None], out, jnp.asarray(fill, image.dtype))


def rotation(degrees: jax.Array, height: int, width: int) -> jax.Array:
    """f32[2, 3], the matrix of a counter-clockwise rotation about the centre."""
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    return jnp.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


# --- tone


def autocontrast(image: jax.Array) -> jax.Array:
    """(x - min) / (max - min) in each channel; a constant channel stays."""
    low, high = _over_pixels(jnp.min, image), _over_pixels(jnp.max, image)
    flat = high <= low
    scale = jnp.where(flat, 1.0, 1 / jnp.where(flat, 1.0, high - low))
    return _stretch(image, scale, jnp.where(flat, 0.0, -low * scale))


def equalize(image: jax.Array) -> jax.Array:
    """Flattens each channel's histogram h of 256 levels.

        x <- floor((sum_{j < x} h_j + floor(s / 2)) / s) ,  s = floor((sum_j h_j - h_max x) / 255)

    A channel with s = 0 (few pixels, or constant) stays.

    Source: Pillow, `ImageOps.equalize`.
    """
    height, width, channels = image.shape
    level = levels(image).reshape(-1, channels)
    counts = jnp.zeros((256, channels), jnp.int32)
    counts = counts.at[level, jnp.arange(channels)[None]].add(1, mode="promise_in_bounds")
    brightest = 255 - jnp.argmax(counts[::-1] > 0, 0)
    step = (height * width - counts[brightest, jnp.arange(channels)]) // 255
    below = jnp.cumsum(counts, 0) - counts + step[None] // 2
    table = jnp.minimum(below // jnp.maximum(step, 1)[None], 255)
    table = jnp.where(step[None] > 0, table, jnp.arange(256)[:, None])
    # The scatter keeps XLA from fusing, which would compute the table again for every pixel.
    table = jnp.zeros((256, channels)).at[jnp.arange(256)].set(table / 255, unique_indices=True)
    out = jnp.take_along_axis(table, level, 0, mode="promise_in_bounds")
    return out.reshape(image.shape).astype(image.dtype)


def invert(image: jax.Array) -> jax.Array:
    """1 - x."""
    return 1 - image


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """1 - x where x >= threshold, which is in [0, 1]."""
    # 1e-4 below, so that a level equal to the threshold counts however k / 255 was rounded.
    return jnp.where(image < threshold - 1e-4, image, 1 - image)


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the upper `bits` (0 to 8) of the nearest level."""
    dropped = 8 - jnp.asarray(bits, jnp.int32)
    kept = jnp.left_shift(jnp.right_shift(levels(image), dropped), dropped)
    return (kept / 255).astype(image.dtype)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Factor x: 0 is black, 1 the image."""
    return factor * image


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Grey + factor (x - grey): 0 is grey, 1 the image; the identity for one channel."""
    return _blend(grey(image), image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Mean + factor (x - mean), with the mean of the grey image to the nearest level, as in Pillow.

    Pillow first rounds every grey pixel, so its mean may differ by one level.
    """
    height, width, _ = image.shape
    mean = grey(_over_pixels(jnp.sum, image) / (height * width))[0]
    mean = jnp.floor(mean * 255 + 0.5) / 255
    return _blend(mean, image.reshape(height, -1), factor).reshape(image.shape)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Smooth + factor (x - smooth): 0 is smooth, 1 the image; the border stays.

    Smooth is the 3x3 mean with weight 5 at the centre, over 13.

    Source: Pillow, `ImageEnhance.Sharpness` and `ImageFilter.SMOOTH`.
    """
    height, width, channels = image.shape
    flat = image.reshape(height, width * channels)
    padded = jnp.pad(flat, ((1, 1), (channels, channels)))
    column = padded[:-2] + padded[1:-1] + padded[2:]
    box = column[:, : -2 * channels] + column[:, channels:-channels] + column[:, 2 * channels :]
    y, x = jnp.arange(height)[:, None], jnp.arange(width * channels)[None] // channels
    border = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    smooth = jnp.where(border, flat, (box + 4 * flat) / 13)
    return _blend(smooth, flat, factor).reshape(image.shape)


def gaussian_blur(image: jax.Array, sigma: jax.Array, *, radius: int) -> jax.Array:
    """Separable Gaussian of standard deviation `sigma` pixels, cut at `radius`; border repeated."""
    offset = jnp.arange(-radius, radius + 1)
    kernel = jnp.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(image.dtype)
    padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    height, width, _ = image.shape
    rows = sum(kernel[n] * padded[n : n + height] for n in range(2 * radius + 1))
    return sum(kernel[n] * rows[:, n : n + width] for n in range(2 * radius + 1))
