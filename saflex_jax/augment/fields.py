"""Affine and colour augmentations whose parameters vary over the image as random fields."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.augment.base import Augment, per_image

# RGB -> YIQ (NTSC): the luma, and two axes of the chroma, which is zero for grey.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def gaussian_field(key: jax.Array, shape: tuple[int, int], *, length: float) -> jax.Array:
    """Draws a stationary Gaussian random field of zero mean and unit variance on the torus.

        z = F^-1[ a(k) F[white noise] ] ,  a(k)^2 ~ exp(-2 pi^2 length^2 |k|^2) ,  mean_k a(k)^2 = 1

    so that points at distance d correlate as exp(-d^2 / (2 length^2)), for length >= 1 and summed
    over the images of the torus: opposite edges are neighbours. The spectrum sets the scale, so a
    single draw need not have mean zero and variance one.

    >>> gaussian_field(jax.random.key(0), (4, 6), length=2.0).shape
    (4, 6)

    Args:
      key: of the draw.
      shape: (H, W).
      length: of the correlation, in pixels, > 0.

    Returns:
      f32[H, W].

    Raises:
      ValueError: `length` is not positive and finite.

    Source: Mansfield et al., "Random Field Augmentations for Self-Supervised Representation
    Learning", PMLR 228, 2024 (arXiv 2311.03629). The squared-exponential spectrum is chosen here.
    """
    checks.positive(length=length)
    height, width = shape

    # The filter separates; as two products it stays on its device where batches are sharded, while
    # XLA gathers the whole batch for an FFT.
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    noise = jax.random.normal(key, shape)
    return product(product(_filter(height, length), noise), _filter(width, length))


def _filter(size: int, length: float) -> np.ndarray:
    """f32[size, size]: the symmetric circulant matrix that filters one axis of white noise."""
    spectrum = np.exp(-((np.pi * length * np.fft.fftfreq(size)) ** 2))
    kernel = np.fft.ifft(spectrum / np.sqrt(np.mean(spectrum**2))).real
    place = np.arange(size)
    return kernel[place[:, None] - place].astype(np.float32)


def bilinear(image: jax.Array, where: jax.Array) -> jax.Array:
    """Reads the image at real-valued positions, bilinearly; outside it is zero.

        x(r) = sum_n x[n] max(0, 1 - |r_1 - n_1|) max(0, 1 - |r_2 - n_2|)

    Args:
      image: f[H, W, C].
      where: f32[2, ...], rows and columns in pixels.

    Returns:
      f32[..., C].
    """
    height, width, _ = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    # A pixel and its three neighbours side by side: one gather instead of four.
    corners = jnp.concatenate(
        [padded[r : r + height + 1, c : c + width + 1] for r in (0, 1) for c in (0, 1)], -1
    )

    def split(at, size):  # beyond -1 and `size` everything is zero, as it is there
        at = jnp.clip(at, -1, size)
        low = jnp.minimum(jnp.floor(at), size - 1)
        return low.astype(jnp.int32) + 1, (at - low)[..., None]

    (row, down), (column, right) = split(where[0], height), split(where[1], width)
    pixels = corners.at[row, column].get(mode="promise_in_bounds").astype(jnp.float32)
    weights = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    return sum(w * x for w, x in zip(weights, jnp.split(pixels, 4, -1)))


def recolour(
    image: jax.Array,
    *,
    hue: jax.Array | float = 0.0,
    saturation: jax.Array | float = 0.0,
    brightness: jax.Array | float = 0.0,
) -> jax.Array:
    """Rotates the hue, blends with the grey image and scales; zeros change nothing.

        (Y, I, Q) -> (1 + brightness) (Y, (1 + saturation) rotation(2 pi hue) (I, Q))

    >>> grey = recolour(jnp.array([[[1.0, 0.0, 0.0]]]), saturation=-1.0)
    >>> [round(float(x), 3) for x in grey.ravel()]
    [0.299, 0.299, 0.299]

    Args:
      image: f32[H, W, 3], RGB; not clipped.
      hue: f32[H, W] or scalar, in turns of the chroma plane.
      saturation: f32[H, W] or scalar; -1 is grey, Y = .299 R + .587 G + .114 B.
      brightness: f32[H, W] or scalar; -1 is black.

    Returns:
      f32[H, W, 3].
    """

    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    luma, first, second = jnp.moveaxis(product(image, np.float32(YIQ.T)), -1, 0)
    angle = 2 * jnp.pi * jnp.asarray(hue)
    cos, sin = (1 + saturation) * jnp.cos(angle), (1 + saturation) * jnp.sin(angle)
    turned = luma, cos * first - sin * second, sin * first + cos * second
    scaled = jnp.stack([(1 + brightness) * part for part in turned], -1)
    return product(scaled, np.float32(np.linalg.inv(YIQ).T))


def random_field(
    *,
    length: float,
    translate: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    hue: float = 0.0,
    saturation: float = 0.0,
    brightness: float = 0.0,
) -> Augment:
    """Affine and colour transforms whose parameters are Gaussian random fields over the image.

        x_out(r) = colour_r( x_in( A(r) (r - c) + c + t(r) ) ) ,  A = (1 + s) rotation(phi)

    c is the centre. t (two fields), phi, s and the parameters of `recolour` are independent
    `gaussian_field`s times their amplitudes. Bilinear, zeros outside, nothing clipped. An amplitude
    is a standard deviation; zero leaves its part out. The magnitude in the trace is the root mean
    square displacement in pixels. For images f[B, H, W, C]; `hue` and `saturation` need C = 3 and
    else do nothing.

    >>> from saflex_jax import Batch
    >>> images = jnp.ones((1, 4, 4, 3))
    >>> batch = Batch(images, jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> augment = random_field(length=2.0, translate=1.0)
    >>> jax.eval_shape(augment, jax.random.key(0), batch).inputs.shape
    (1, 4, 4, 3)

    Args:
      length: correlation length of all fields, in pixels. Much longer than the image gives one
        transform for the whole image; short lengths tear the structure apart.
      translate: amplitude of t, in pixels along each axis.
      rotate: amplitude of phi, in degrees.
      scale: amplitude of s.
      hue: amplitude, in turns.
      saturation: amplitude of the factor on the chroma.
      brightness: amplitude of the factor on all channels.

    Raises:
      ValueError: a length that is not positive, an amplitude that is negative or not finite; inputs
        that are not images of a floating-point dtype.

    Source: Mansfield et al., PMLR 228, 2024 (arXiv 2311.03629). The list of parameters, their
    units and the chroma plane are chosen here.
    """
    checks.positive(length=length)
    amplitudes = {
        "translate": translate, "rotate": rotate, "scale": scale,
        "hue": hue, "saturation": saturation, "brightness": brightness,
    }  # fmt: skip
    checks.amount(**amplitudes)

    def op(key, image):
        height, width, channels = image.shape
        keys = jax.random.split(key, 7)

        def field(number, amplitude):
            if amplitude == 0:
                return 0.0
            return amplitude * gaussian_field(keys[number], (height, width), length=length)

        out, magnitude = image, 0.0
        if translate or rotate or scale:
            row = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
            column = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2
            angle, factor = jnp.deg2rad(field(2, rotate)), 1 + field(3, scale)
            cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
            move = jnp.stack(
                [
                    (cos - 1) * row - sin * column + field(0, translate),
                    sin * row + (cos - 1) * column + field(1, translate),
                ]
            )
            magnitude = jnp.sqrt(jnp.mean(jnp.sum(move**2, 0)))
            rest = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
            out = bilinear(image, rest + move)
        if channels == 3 and (hue or saturation):
            out = recolour(
                out,
                hue=field(4, hue),
                saturation=field(5, saturation),
                brightness=field(6, brightness),
            )
        elif brightness:
            out = (1 + field(6, brightness)[..., None]) * out
        return out, magnitude

    return per_image("random_field", op)
