"""Random crops, flips, erasing, blur and affine maps, with one draw per image of a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.augment import image as ops
from saflex_jax.augment.base import Augment, check_interval, per_image, record, sample_keys


def _check_positive_interval(**intervals: tuple[float, float]) -> None:
    check_interval(0.0, math.inf, **intervals)
    for name, bounds in intervals.items():
        for bound in bounds:
            checks.positive(**{name: bound})


def flip(probability: float = 0.5) -> Augment:
    """Mirrors left and right with the given probability; magnitude 1 on mirrored images.

    >>> from saflex_jax import Batch
    >>> images = jnp.arange(3.0).reshape(1, 1, 3, 1)
    >>> batch = Batch(images, jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> flip(1.0)(jax.random.key(0), batch).inputs.ravel().tolist()
    [2.0, 1.0, 0.0]

    Args:
      probability: of mirroring an image.
    """
    checks.fraction(probability=probability)

    def op(key, image):
        use = jax.random.bernoulli(key, jnp.float32(probability))
        return jnp.where(use, image[:, ::-1], image), use.astype(jnp.float32)

    return per_image("flip", op)


def shift(pixels: int, *, padding: str = "zero") -> Augment:
    """Pads by `pixels` and crops back at a uniform position, as CIFAR recipes do.

    >>> augment = shift(4, padding="reflect")  # as text: parse("shift(4, padding='reflect')")

    Args:
      pixels: on every side, >= 0; magnitude is the distance moved.
      padding: "zero" or "reflect".
    """
    checks.whole(pixels=pixels)
    checks.choice(("zero", "reflect"), padding=padding)
    mode = {"zero": "constant", "reflect": "reflect"}[padding]

    def op(key, image):
        padded = jnp.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
        corner = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        moved = jnp.linalg.norm((corner - pixels).astype(jnp.float32))
        return jax.lax.dynamic_slice(padded, (*corner, 0), image.shape), moved

    return per_image("shift", op)


def affine(
    *,
    degrees: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    fill: float = 0.0,
    interpolation: str = "bilinear",
) -> Augment:
    """Rotates, scales and shears at random about the centre.

        x_out(r) = x_in(A r),  A = rotation(U(-degrees, degrees)) [[s, h], [0, s]],  r = (x, y)

    >>> augment = affine(degrees=15.0, scale=0.1)  # as text: parse("affine(degrees=15, scale=.1)")

    Args:
      degrees: largest rotation; magnitude is the drawn rotation.
      scale: s ~ U(1 - scale, 1 + scale), with 0 <= scale < 1.
      shear: h ~ U(-shear, shear).
      fill: grey value in [0, 1] outside the image.
      interpolation: "nearest" or "bilinear".
    """
    checks.amount(degrees=degrees, shear=shear)
    checks.fraction(fill=fill)
    checks.choice(ops.INTERPOLATIONS, interpolation=interpolation)
    if not 0 <= scale < 1:
        raise ValueError(f"scale must lie in [0, 1); given {scale}")

    def op(key, image):
        angle, size, slant = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
        angle, size, slant = degrees * angle, 1 + scale * size, shear * slant
        height, width, _ = image.shape
        linear = ops.rotation(angle, height, width)[:, :2]
        linear = linear @ jnp.array([[size, slant], [0.0, size]])
        centre = jnp.array([width / 2, height / 2])
        matrix = jnp.column_stack([linear, centre - linear @ centre])
        return ops.warp(image, matrix, fill=fill, interpolation=interpolation), angle

    return per_image("affine", op)


def resized_crop(
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    interpolation: str = "bilinear",
) -> Augment:
    """Enlarges a random box to the whole image, as ImageNet recipes do.

    Area ~ U(scale) of the image, log(width / height) ~ U(log ratio), position uniform. A side
    longer than the image is cut to it, so the area can fall short (the usual recipe draws again).

    >>> augment = resized_crop((0.2, 1.0))  # as text: parse("resized_crop((.2, 1.))")

    Args:
      scale: bounds of the area share, within [0, 1]; magnitude is the realised share.
      ratio: bounds of width / height, in pixels.
      interpolation: "nearest" or "bilinear".
    """
    check_interval(0.0, 1.0, scale=scale)
    _check_positive_interval(ratio=ratio)
    checks.choice(ops.INTERPOLATIONS, interpolation=interpolation)

    def op(key, image):
        height, width, _ = image.shape
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        rows, columns = _sides(area_key, ratio_key, scale, ratio, (height, width))
        rows, columns = jnp.minimum(rows, height), jnp.minimum(columns, width)
        top, left = jax.random.uniform(place_key, (2,)) * jnp.array(
            [height - rows, width - columns]
        )
        matrix = jnp.array([[columns / width, 0, left], [0, rows / height, top]])
        share = rows * columns / (height * width)
        return ops.warp(image, matrix, interpolation=interpolation), share

    return per_image("resized_crop", op)


def _sides(area_key, ratio_key, scale, ratio, shape):
    """(rows, columns) f32 of a box with area share ~ U(scale) and log ratio uniform."""
    area = jax.random.uniform(area_key, minval=scale[0], maxval=scale[1]) * shape[0] * shape[1]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    wide = jnp.exp(jax.random.uniform(ratio_key, minval=low, maxval=high))
    return jnp.sqrt(area / wide), jnp.sqrt(area * wide)


def _erase(image, top, left, rows, columns, fill):
    """(image with the box filled, realised share of the box)."""
    height, width, _ = image.shape
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    box = (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)
    return jnp.where(box[..., None], jnp.asarray(fill, image.dtype), image), box.mean()


def cutout(side: int, *, fill: float = 0.0) -> Augment:
    """Fills a square whose centre is uniform over the pixels, cut at the borders.

    >>> augment = cutout(8)  # as text: parse("cutout(8)")

    Args:
      side: in pixels, >= 0; magnitude is the realised share of the image.
      fill: grey value in [0, 1].

    Source: DeVries and Taylor, "Cutout", 2017.
    """
    checks.whole(side=side)
    checks.fraction(fill=fill)

    def op(key, image):
        centre = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]))
        top, left = centre - side // 2
        return _erase(image, top, left, side, side, fill)

    return per_image("cutout", op)


def random_erasing(
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    *,
    fill: float = 0.0,
) -> Augment:
    """Fills a random box inside the image with the given probability.

    >>> augment = random_erasing(0.25)  # as text: parse("random_erasing(.25)")

    Args:
      probability: of erasing at all.
      scale: bounds of the area share; magnitude is the realised share.
      ratio: bounds of width / height.
      fill: grey value in [0, 1].

    Source: Zhong et al., "Random Erasing", AAAI 2020.
    """
    checks.fraction(probability=probability, fill=fill)
    check_interval(0.0, 1.0, scale=scale)
    _check_positive_interval(ratio=ratio)

    def op(key, image):
        height, width, _ = image.shape
        use_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
        rows, columns = _sides(area_key, ratio_key, scale, ratio, (height, width))
        rows, columns = jnp.minimum(rows, height).round(), jnp.minimum(columns, width).round()
        room = jnp.array([height - rows, width - columns]) + 1
        top, left = jnp.floor(jax.random.uniform(place_key, (2,)) * room)
        rows = jnp.where(jax.random.bernoulli(use_key, jnp.float32(probability)), rows, 0)
        return _erase(image, top, left, rows, columns, fill)

    return per_image("random_erasing", op)


def blur(sigma: tuple[float, float] = (0.1, 2.0), *, probability: float = 1.0) -> Augment:
    """Blurs by a Gaussian of standard deviation ~ U(sigma) pixels, cut at 3 max(sigma).

    >>> augment = blur((0.1, 2.0), probability=0.5)  # as text: parse("blur(probability=.5)")

    Args:
      sigma: bounds, > 0; magnitude is the drawn sigma, 0 on images without blur.
      probability: of blurring at all.
    """
    _check_positive_interval(sigma=sigma)
    checks.fraction(probability=probability)
    radius = math.ceil(3 * sigma[1])

    def op(key, image):
        sigma_key, use_key = jax.random.split(key)
        drawn = jax.random.uniform(sigma_key, minval=sigma[0], maxval=sigma[1])
        use = jax.random.bernoulli(use_key, jnp.float32(probability))
        blurred = ops.gaussian_blur(image, drawn, radius=radius)
        return jnp.where(use, blurred, image), jnp.where(use, drawn, 0.0)

    return per_image("blur", op)


def soft_crop(
    deviation: float, *, power: float = 2.0, floor: float | None = None, fill: float = 0.0
) -> Augment:
    """Crops at a position that may leave the image, and softens the label by the lost share.

        t = int(N(0, deviation)) with |t| <= side, per axis ;  v = (H - |t_y|)(W - |t_x|) / (H W)
        p = 1 - (1 - floor)(1 - v)^power ,  q <- a q + (1 - a) / K  with  a + (1 - a) / K = p

    A one-hot label keeps p on its class and spreads the rest equally. The trace's magnitude is v.
    The source also weights the loss by p; here SAFLEX learns weights.

    >>> augment = soft_crop(4.0)  # as text: parse("soft_crop(4.0)")

    Args:
      deviation: of the offset, in pixels.
      power: > 0; a larger power softens labels less.
      floor: p where nothing is visible, in [1/K, 1]; None = 1/K, chance.
      fill: grey value in [0, 1] outside the image.

    Source: Liu et al., "Soft Augmentation for Image Classification", CVPR 2023.
    """
    checks.amount(deviation=deviation)
    checks.positive(power=power)
    checks.fraction(fill=fill)

    def augment(key, batch):
        checks.images(inputs=batch.inputs)
        checks.soft(labels=batch.labels)
        size, height, width, _ = batch.inputs.shape
        classes = batch.labels.shape[1]
        chance = 1 / classes
        if floor is not None and not chance <= floor <= 1:
            raise ValueError(f"floor must lie in [1/{classes}, 1]; given {floor}")
        sides = jnp.array([height, width], jnp.float32)

        def draw(key):
            if not deviation:
                return jnp.zeros(2)
            bound = (sides + 1) / deviation  # int() below then keeps |t| <= side
            return jnp.trunc(deviation * jax.random.truncated_normal(key, -bound, bound))

        offset = jax.vmap(draw)(sample_keys(key, batch))
        offset = jnp.clip(offset, -sides[None], sides[None])
        visible = jnp.prod(1 - jnp.abs(offset) / sides[None], axis=1)
        kept = 1 - (1 - (chance if floor is None else floor)) * (1 - visible) ** power
        share = ((kept - chance) / (1 - chance) if classes > 1 else jnp.ones(size))[:, None]

        def crop(image, offset):
            down, right = offset
            matrix = jnp.array([[1, 0, right], [0, 1, down]])
            return ops.warp(image, matrix, fill=fill)

        images = jax.vmap(crop)(batch.inputs.astype(jnp.float32), offset)
        labels = share * batch.labels + (1 - share) * chance
        cropped = batch._replace(
            inputs=images.astype(batch.inputs.dtype), labels=labels.astype(batch.labels.dtype)
        )
        return record(cropped, "soft_crop", visible)

    return augment
