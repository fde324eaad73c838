"""Common corruptions at five severities, on the device: for shifted test sets, not for training.

All constants, kernels and borders are those of the source's code
(github.com/hendrycks/robustness): CIFAR-10-C's for images whose smaller side is below 64 pixels,
else ImageNet-C's. Its random draws are not reproduced; images need not be square, and only the JPEG
is rounded to 8 bits. Three of its lists do not grow throughout: `saturate` removes colour at
severities 1 and 2 and adds it from 3 on; at 3 and 4 the small `motion_blur` is the same to 1e-7,
and the large `fog` equally strong.

Left out: glass_blur (thousands of sequential swaps), frost (needs photographs of ice),
elastic_transform (its published severities are not ordered) and spatter (edge detection).

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.augment import image as ops

LARGE = 64  # pixels of the smaller side from which on ImageNet-C's severities hold
SEVERITIES = 5


def corrupt(
    key: jax.Array,
    images: jax.Array,
    *,
    name: str,
    severity: int,
    index: jax.Array | None = None,
) -> jax.Array:
    """Applies one corruption to every image and clips to [0, 1].

    A row depends on `key`, its index and its image, not on its position or on other rows. One key
    gives the same draws at every severity. Under jit make `name` and `severity` static:
    `jax.jit(corrupt, static_argnames=("name", "severity"))`.

    >>> images = jnp.full((2, 8, 8, 3), 0.5)
    >>> darker = corrupt(jax.random.key(0), images.at[:, :4].set(0.1), name="contrast", severity=5)
    >>> darker.shape, round(float(darker.max() - darker.min()), 2)
    ((2, 8, 8, 3), 0.06)

    Args:
      key: of all draws; row i draws from fold_in(key, index[i]).
      images: f[B, H, W, C] in [0, 1], any C; computed in f32, returned in their own dtype.
      name: a key of CORRUPTIONS; static.
      severity: 1 to 5; static.
      index: i32[B], the sample of each row; None = 0, ..., B - 1.

    Returns:
      f[B, H, W, C].

    Raises:
      ValueError: an unknown name, a severity that is not 1 to 5, or images of another shape, dtype
        or range (the range cannot be checked under jit).
    """
    checks.choice(CORRUPTIONS, name=name)
    if not isinstance(severity, numbers.Integral) or not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity must be a whole number from 1 to 5; given {severity}")
    checks.images(images=images)
    size, height, width, _ = images.shape
    index = jnp.arange(size) if index is None else index
    checks.rows(size, index=index)
    _unit_range("images", images)
    kind = CORRUPTIONS[name]
    constants = (kind.small if min(height, width) < LARGE else kind.large)[severity - 1]

    def one(index, image):
        clean = jnp.clip(image.astype(jnp.float32), 0, 1)
        corrupted = kind.op(jax.random.fold_in(key, index), clean, constants)
        return jnp.clip(corrupted, 0, 1).astype(image.dtype)

    return jax.vmap(one)(index, images)


def _unit_range(name: str, images: jax.Array) -> None:
    """Raises on concrete images with NaN, or outside [0, 1] by more than rounding."""
    checks.finite(**{name: images})
    if checks.concrete(images) and images.size:
        low, high = float(images.min()), float(images.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"{name} must lie in [0, 1]; given {low:.4g} to {high:.4g}")


# --- noise


def gaussian_noise(key: jax.Array, image: jax.Array, deviation: float) -> jax.Array:
    """x + N(0, deviation^2)."""
    return image + deviation * jax.random.normal(key, image.shape)


def shot_noise(key: jax.Array, image: jax.Array, photons: float) -> jax.Array:
    """Poisson(photons x) / photons."""
    return jax.random.poisson(key, photons * image) / photons


def impulse_noise(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Sets a share of all values to 0 or 1 with equal probability, channels independently."""
    u = jax.random.uniform(key, image.shape)
    return jnp.where(u < share / 2, 0.0, jnp.where(u < share, 1.0, image))


def speckle_noise(key: jax.Array, image: jax.Array, deviation: float) -> jax.Array:
    """x + x N(0, deviation^2)."""
    return image * (1 + deviation * jax.random.normal(key, image.shape))


# --- blur


def gaussian_blur(key: jax.Array, image: jax.Array, sigma: float) -> jax.Array:
    """Gaussian of `sigma` pixels, cut at four of them; border repeated."""
    del key
    return ops.gaussian_blur(image, sigma, radius=int(4 * sigma + 0.5))


def defocus_blur(key: jax.Array, image: jax.Array, constants: tuple[float, float]) -> jax.Array:
    """Convolution with a disk (its radius, and the sigma that softens it); border mirrored."""
    del key
    kernel = jnp.asarray(_disk(*constants))[None, None]
    reach = kernel.shape[-1] // 2
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    planes = jnp.moveaxis(padded, -1, 0)[:, None]
    blurred = jax.lax.conv(planes, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(blurred[:, 0], 0, -1)


def _disk(radius: float, sigma: float) -> np.ndarray:
    """f32[K, K]: the pixels within `radius`, softened by a Gaussian of 3 taps, 5 above radius 8."""
    place = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    reach = 1 if radius <= 8 else 2
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(disk / disk.sum(), reach, mode="reflect")
    for axis in (0, 1):

        def soften(line):
            return np.convolve(line, taps / taps.sum(), "valid")

        padded = np.apply_along_axis(soften, axis, padded)
    used = np.abs(place) <= math.floor(radius) + reach  # all else is zero
    return padded[np.ix_(used, used)].astype(np.float32)


def motion_blur(key: jax.Array, image: jax.Array, constants: tuple[int, float]) -> jax.Array:
    """A streak (its radius and sigma in pixels) at an angle ~ U(-45, 45) degrees."""
    angle = jax.random.uniform(key, minval=-math.pi / 4, maxval=math.pi / 4)
    return _streak(image, angle, *constants)


def _streak(image: jax.Array, angle: jax.Array, radius: int, sigma: float) -> jax.Array:
    """Half a Gaussian along `angle`, one tap a pixel, 2 radius + 1 of them; border repeated.

    Source: ImageMagick, `MotionBlurImage`.
    """
    taps, reach = np.arange(2 * radius + 1), 2 * radius
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    steps = jnp.stack([taps * jnp.sin(angle), taps * jnp.cos(angle)], -1)
    steps = jnp.ceil(steps - 0.5).astype(jnp.int32)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")

    def add(total, tap):
        weight, step = tap
        shifted = jax.lax.dynamic_slice(padded, (*(reach + step), 0), image.shape)
        return total + weight * shifted, None

    return jax.lax.scan(add, jnp.zeros_like(image), (jnp.asarray(weights), steps))[0]


def zoom_blur(key: jax.Array, image: jax.Array, factors: Sequence[float]) -> jax.Array:
    """Averages the image with its enlargements by all factors."""
    del key
    rows, columns = (np.stack([_zoom(n, f) for f in factors]) for n in image.shape[:2])

    def add(total, matrices):
        return total + _resample(image, *matrices), None

    total, _ = jax.lax.scan(add, image, (jnp.asarray(rows), jnp.asarray(columns)))
    return total / (len(factors) + 1)


def _zoom(size: int, factor: float) -> np.ndarray:
    """f32[size, size]: linear enlargement of the middle of one axis, cut back to its length.

    The middle has a whole number of pixels, and its first and last one stay at the ends.
    """
    inner = math.ceil(size / factor)
    zoomed = round(inner * factor)
    place = np.arange(size) + (zoomed - size) // 2
    place = (size - inner) // 2 + place * (inner - 1) / max(zoomed - 1, 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size))).astype(np.float32)


def _resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Both axes times a matrix."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("hi,ijc,wj->hwc", rows, image, columns, precision=highest)


# --- weather


def fog(key: jax.Array, image: jax.Array, constants: tuple[float, float]) -> jax.Array:
    """(x + strength p) max(x) / (max(x) + strength), p a `plasma` of the given decay."""
    strength, decay = constants
    height, width, _ = image.shape
    layer = plasma(key, max(height, width), decay)[:height, :width, None]
    return (image + strength * layer) * image.max() / (image.max() + strength)


def plasma(key: jax.Array, least: int, decay: float) -> jax.Array:
    """f32[S, S], a random cloud from 0 to 1 on the torus, by the diamond-square algorithm.

    From each grid to the next, twice as fine: a new point is the mean of its four neighbours plus
    U(-a, a), where a falls by decay^2.

    Args:
      key: of the draw.
      least: bound of the side; S is the smallest power of two from there on.
      decay: > 1; larger is smoother.
    """
    levels = math.ceil(math.log2(least))
    draws = jax.random.uniform(key, (4**levels,), minval=-1.0, maxval=1.0)
    cloud = jnp.zeros((1, 1))
    for level in range(levels):
        noise = draws[4**level : 4 ** (level + 1)].reshape(3, *cloud.shape)
        noise = noise / decay ** (2 * level)
        right, below = jnp.roll(cloud, -1, 1), jnp.roll(cloud, -1, 0)
        centre = (cloud + right + below + jnp.roll(right, -1, 0)) / 4 + noise[0]
        top = (cloud + right + centre + jnp.roll(centre, 1, 0)) / 4 + noise[1]
        left = (cloud + below + centre + jnp.roll(centre, 1, 1)) / 4 + noise[2]
        pairs = [jnp.stack([cloud, top], -1), jnp.stack([left, centre], -1)]
        cloud = jnp.stack(pairs, 1).reshape(2 * len(cloud), -1)
        # Without the barrier XLA's fusion works out the coarse grids anew for every fine point.
        cloud = jax.lax.optimization_barrier(cloud)
    low, high = cloud.min(), cloud.max()
    return (cloud - low) / jnp.maximum(high - low, 1e-12)


def snow(key: jax.Array, image: jax.Array, constants: Sequence[float]) -> jax.Array:
    """Whitens the image and adds falling flakes, once as drawn and once turned by 180 degrees.

    The flakes are what N(mean, deviation^2) has above `least`, enlarged by `factor`, as streaks of
    (radius, sigma) at U(-135, -45) degrees; `kept` is the share of the image against its white.
    """
    mean, deviation, factor, least, radius, sigma, kept = constants
    flakes_key, angle_key = jax.random.split(key)
    height, width, _ = image.shape
    flakes = mean + deviation * jax.random.normal(flakes_key, (height, width, 1))
    flakes = _resample(flakes, _zoom(height, factor), _zoom(width, factor))
    flakes = jnp.where(flakes < least, 0.0, jnp.minimum(flakes, 1.0))
    angle = jax.random.uniform(angle_key, minval=-0.75 * math.pi, maxval=-0.25 * math.pi)
    flakes = _streak(flakes, angle, radius, sigma)
    white = jnp.maximum(image, 1.5 * ops.grey(image) + 0.5)
    return kept * image + (1 - kept) * white + flakes + flakes[::-1, ::-1]


def brightness(key: jax.Array, image: jax.Array, amount: float) -> jax.Array:
    """Adds to the value max_c x_c of HSV, up to 1; hue and saturation stay."""
    del key
    value = image.max(-1, keepdims=True)
    brighter = jnp.minimum(value + amount, 1)
    return jnp.where(value > 0, image * (brighter / jnp.where(value > 0, value, 1)), brighter)


# --- digital


def contrast(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Mean + factor (x - mean), each channel with its own mean."""
    del key
    mean = image.mean((0, 1), keepdims=True)
    return mean + factor * (image - mean)


def saturate(key: jax.Array, image: jax.Array, constants: tuple[float, float]) -> jax.Array:
    """Saturation of HSV <- factor s + offset, within [0, 1]; the identity unless C = 3.

    A grey pixel has hue 0, so that an offset makes it red, as in the source.
    """
    del key
    if image.shape[-1] != 3:
        return image
    factor, offset = constants
    value = image.max(-1, keepdims=True)
    chroma = value - image.min(-1, keepdims=True)
    saturation = jnp.clip(factor * chroma / jnp.where(value > 0, value, 1) + offset, 0, 1)
    off = (value - image) / jnp.where(chroma > 0, chroma, 1)
    off = jnp.where(chroma > 0, off, jnp.array([0.0, 1.0, 1.0])[None, None])
    return value * (1 - saturation * off)


def pixelate(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Resizes by `factor` and back, with a box filter."""
    del key
    matrices = []
    for size in image.shape[:2]:
        small = max(int(size * factor), 1)
        matrices.append(_box(small, size) @ _box(size, small))
    return _resample(image, *map(jnp.asarray, matrices))


def _box(size: int, new_size: int) -> np.ndarray:
    """f32[new_size, size]: resizes one axis; a pixel is the mean of those centred in its width.

    Source: Pillow, `Image.resize(BOX)`.
    """
    scale = size / new_size
    width, centre = max(scale, 1), (np.arange(new_size)[:, None] + 0.5) * scale
    place = np.arange(size)
    # Ties are frequent; both of Pillow's tests, as it rounds them.
    first, end = (np.floor(centre + side * width / 2 + 0.5) for side in (-1, 1))
    off = (place - centre + 0.5) * (1 / width)
    inside = (place >= first) & (place < end) & (off > -0.5) & (off <= 0.5)
    inside = inside.astype(np.float32)
    return inside / inside.sum(1, keepdims=True)


# Quantisation of the luma and of the chroma: ITU-T T.81, annex K, tables 1 and 2.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def jpeg_compression(key: jax.Array, image: jax.Array, quality: int) -> jax.Array:
    """JPEG of libjpeg's `quality`: chroma at half the resolution (4:2:0); all luma unless C = 3."""
    del key
    height, width, channels = image.shape

    def pad(size):
        return (0, -size % 16)

    padded = jnp.pad(255 * image, (pad(height), pad(width), (0, 0)), mode="edge") - 128

    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    planes = _round(product(padded, np.float32(YCBCR.T)) if channels == 3 else padded)

    def chroma(plane):
        halves = plane.reshape(len(plane) // 2, 2, -1, 2).mean((1, 3))
        up = np.resize(np.float32([0.25, 0.5]), halves.shape[1])[None]  # halves down, up, down ...
        coded = _coded(jnp.floor(halves + up), _steps(CHROMA, quality))
        coded = coded[: -(-height // 2), : -(-width // 2)]
        doubled = jax.image.resize(coded, [2 * n for n in coded.shape], "linear")
        return doubled[:height, :width]

    def luma(plane):
        return _coded(plane, _steps(LUMA, quality))[:height, :width]

    coders = [luma, chroma, chroma] if channels == 3 else [luma] * channels
    coded = jnp.stack([code(planes[..., n]) for n, code in enumerate(coders)], -1)
    if channels == 3:
        coded = product(coded, np.float32(np.linalg.inv(YCBCR).T))
    return _round(coded + 128) / 255


def _steps(table: np.ndarray, quality: int) -> np.ndarray:
    """i[8, 8]: the quantisation steps of a quality from 1 to 100."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * percent + 50) // 100, 1, 255)


def _coded(plane: jax.Array, steps: np.ndarray) -> jax.Array:
    """f32[H, W] in levels, -128 to 127, after the quantised cosine transform of 8x8 blocks."""
    height, width = plane.shape
    n = np.arange(8)
    cosines = np.cos(np.pi / 8 * n[:, None] * (n + 0.5)) * np.where(n, 0.5, 0.125**0.5)[:, None]
    cosines, steps = np.float32(cosines), np.float32(steps)[None, :, None]

    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    blocks = plane.reshape(height // 8, 8, width // 8, 8)
    coefficients = einsum("ui,aibj,vj->aubv", cosines, blocks, cosines) / steps
    quantised = steps * jnp.sign(coefficients) * _round(jnp.abs(coefficients))
    decoded = einsum("ui,aubv,vj->aibj", cosines, quantised, cosines)
    return jnp.clip(_round(decoded), -128, 127).reshape(height, width)


def _round(x: jax.Array) -> jax.Array:
    """The nearest integer; halves, which are frequent in flat blocks, go up despite float error."""
    return jnp.floor(x + 0.5 + 1e-4)


class Corruption(NamedTuple):
    """An operation and its constants at the severities 1 to 5.

    Attributes:
      op: (key, f32[H, W, C] in [0, 1], constants) -> f32[H, W, C], not clipped.
      small: of images whose smaller side is below LARGE pixels (CIFAR-10-C).
      large: of the others (ImageNet-C).
    """

    op: Callable[[jax.Array, jax.Array, Any], jax.Array]
    small: Sequence[Any]
    large: Sequence[Any]


# NumPy's `arange` with a fractional step may pass its end by one; so it did in the source.
def _zooms(*ends_and_steps):
    return [np.arange(1, *pair) for pair in ends_and_steps]


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        gaussian_noise, [0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": Corruption(shot_noise, [500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "impulse_noise": Corruption(
        impulse_noise, [0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "speckle_noise": Corruption(
        speckle_noise, [0.06, 0.1, 0.12, 0.16, 0.2], [0.15, 0.2, 0.35, 0.45, 0.6]),
    "gaussian_blur": Corruption(gaussian_blur, [0.4, 0.6, 0.7, 0.8, 1], [1, 2, 3, 4, 6]),
    "defocus_blur": Corruption(
        defocus_blur,
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]),
    "motion_blur": Corruption(
        motion_blur,
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": Corruption(
        zoom_blur,
        _zooms((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _zooms((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "fog": Corruption(
        fog,
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "snow": Corruption(
        snow,
        [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
         (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
         (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
        [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
         (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
         (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)]),
    "brightness": Corruption(brightness, [0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": Corruption(contrast, [0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "saturate": Corruption(
        saturate,
        [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)]),
    "pixelate": Corruption(pixelate, [0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": Corruption(jpeg_compression, [80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
}  # fmt: skip
NAMES = tuple(CORRUPTIONS)
