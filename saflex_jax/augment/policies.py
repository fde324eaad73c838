"""RandAugment, TrivialAugment, AutoAugment and AugMix, on whole batches inside the compiled step.

A policy draws an operation and a value for every sample and layer; `apply` runs one layer. Images
are f32[B, H, W, C] in [0, 1] (or bf16). Pixels may leave [0, 1] between the layers and are clipped
once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.augment import image as ops
from saflex_jax.augment.base import OPERATIONS, Augment, record, sample_keys
from saflex_jax.augment.mixing import beta
from saflex_jax.augment.rows import map_rows
from saflex_jax.types import Batch

_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# The other operations, each (image, value) -> image.
_TONAL = {
    "autocontrast": lambda image, value: ops.autocontrast(image),
    "equalize": lambda image, value: ops.equalize(image),
    "invert": lambda image, value: ops.invert(image),
    "solarize": ops.solarize,
    "posterize": ops.posterize,
    "brightness": ops.brightness,
    "color": ops.color,
    "contrast": ops.contrast,
    "sharpness": ops.sharpness,
}


def apply(
    images: jax.Array,
    operation: jax.Array,
    value: jax.Array,
    *,
    names: Collection[str],
    fill: float = 0.0,
    interpolation: str = "nearest",
) -> jax.Array:
    """Applies to each image its own operation, at the cost of one operation per sample.

    `vmap(lax.switch)` would run all operations on all samples. Here each operation runs on its own
    samples only (`map_rows`), and all geometric ones share one affine warp.

    >>> images = jnp.full((2, 1, 1, 1), 0.25)
    >>> operation = jnp.array([OPERATIONS.index("brightness"), OPERATIONS.index("identity")])
    >>> apply(images, operation, jnp.full(2, 3.0), names=["brightness"]).ravel().tolist()
    [0.75, 0.25]

    Args:
      images: f32[B, H, W, C].
      operation: i32[B], indices into OPERATIONS.
      value: f32[B], the operation's argument: degrees, slope, pixels, factor, threshold or bits.
      names: operations that can occur; any other leaves the image unchanged.
      fill: value outside the image after a geometric operation.
      interpolation: of geometric operations, "nearest" or "bilinear".
    """
    geometric = [_NUMBER[name] for name in _GEOMETRIC if name in names]
    if geometric:
        warp = partial(ops.warp, fill=fill, interpolation=interpolation)
        matrix = jax.vmap(partial(_matrix, images.shape[1:3]))(operation, value)
        images = map_rows(warp, jnp.isin(operation, jnp.array(geometric)), images, matrix)
    for name, op in _TONAL.items():
        if name in names:
            images = map_rows(op, operation == _NUMBER[name], images, value)
    return images


def _matrix(shape: tuple[int, int], operation: jax.Array, value: jax.Array) -> jax.Array:
    """f32[2, 3], the affine map of a geometric operation: x_in = x + slope y, x_in = x + pixels."""

    def entry(name):
        return jnp.where(operation == _NUMBER[name], value, 0.0)

    moved = jnp.array([[1, entry("shear_x"), entry("translate_x")],
                       [entry("shear_y"), 1, entry("translate_y")]])  # fmt: skip
    return jnp.where(operation == _NUMBER["rotate"], ops.rotation(value, *shape), moved)


class Range(NamedTuple):
    """The values of an operation: low + (high - low) strength, strength in [0, 1].

    Attributes:
      low, high: at strength 0 and 1.
      signed: whether the sign of the deviation from `low` is drawn.
      integer: whether the deviation is rounded.
      of_side: whether in units of the image's width (translate_x) or height (translate_y).
    """

    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    integer: bool = False
    of_side: bool = False


def _space(*, shear, translate, of_side, rotate, enhance, posterize, solarize=0.0):
    """The 14 operations of RandAugment and TrivialAugment with the given largest values."""
    moved = Range(0.0, translate, signed=True, of_side=of_side)
    factor = Range(1.0, 1.0 + enhance, signed=True)
    return {
        "identity": Range(),
        "autocontrast": Range(),
        "equalize": Range(),
        "rotate": Range(0.0, rotate, signed=True),
        "solarize": Range(1.0, solarize),
        "color": factor,
        "posterize": Range(8, posterize, integer=True),
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": Range(0.0, shear, signed=True),
        "shear_y": Range(0.0, shear, signed=True),
        "translate_x": moved,
        "translate_y": moved,
    }


# RandAugment and AutoAugment have torchvision's ranges, TrivialAugment those of its paper.
STANDARD = _space(
    shear=0.3, translate=150 / 331, of_side=True, rotate=30.0, enhance=0.9, posterize=4
)
TRIVIAL = _space(shear=0.3, translate=10.0, of_side=False, rotate=30.0, enhance=0.9, posterize=4)
TRIVIAL_WIDE = _space(
    shear=0.99, translate=32.0, of_side=False, rotate=135.0, enhance=0.99, posterize=2
)
_AUGMIX = {
    name: STANDARD[name]
    for name in ("autocontrast", "equalize", "rotate", "shear_x", "shear_y")
} | {
    "posterize": Range(4, 0, integer=True),
    "solarize": Range(1.0, 0.0),
    "translate_x": Range(0.0, 1 / 3, signed=True, of_side=True),
    "translate_y": Range(0.0, 1 / 3, signed=True, of_side=True),
}  # fmt: skip


def values(
    space: dict[str, Range], drawn: jax.Array, strength: jax.Array, sign: jax.Array, shape: tuple
) -> jax.Array:
    """The values of drawn operations of a space at strengths in [0, 1].

    >>> drawn = jnp.array([list(STANDARD).index("posterize")])
    >>> values(STANDARD, drawn, jnp.array([0.5]), jnp.ones(1), (32, 32)).tolist()  # bits
    [6.0]

    Args:
      space: name -> Range.
      drawn: i32[...], places in the space.
      strength: f32[...].
      sign: f32[...], -1 or 1; used by signed ranges.
      shape: (height, width) of the images.

    Returns:
      f32[...], in units of the operation.
    """
    height, width = shape
    side = {"translate_x": width, "translate_y": height}
    rows = [
        (r.low, (r.high - r.low) * (side[name] if r.of_side else 1), r.signed, r.integer)
        for name, r in space.items()
    ]
    low, span, signed, integer = zip(*rows)
    low, span = (jnp.asarray(column, jnp.float32)[drawn] for column in (low, span))
    signed, integer = (jnp.asarray(column)[drawn] for column in (signed, integer))
    deviation = span * strength
    # Halves go to the even number, as in torchvision's table of bits.
    deviation = jnp.where(integer, jnp.round(deviation), deviation)
    return low + jnp.where(signed, sign, 1.0) * deviation


def _numbers(space: dict[str, Range]) -> jax.Array:
    return jnp.array([_NUMBER[name] for name in space], jnp.int32)


def _one_of(count: int, uniform: jax.Array) -> jax.Array:
    """i32[...] in [0, count), from a uniform: one draw of uniforms for all choices costs least."""
    return (count * uniform).astype(jnp.int32)


def _sign(uniform: jax.Array) -> jax.Array:
    return jnp.where(uniform < 0.5, -1.0, 1.0)


def _dirichlet(key: jax.Array, alpha: float, size: int) -> jax.Array:
    """f32[size] ~ Dirichlet(alpha, ..., alpha)."""
    if alpha == 1:  # the general sampler takes seconds to compile; exponentials do not
        parts = jax.random.exponential(key, (size,))
        return parts / parts.sum()
    return jax.nn.softmax(jax.random.loggamma(key, alpha, (size,)))  # gammas may all be 0


def _layers(images: jax.Array, operation: jax.Array, value: jax.Array, **options) -> jax.Array:
    """Applies the L layers operation i32[B, L] and value f32[B, L] in turn, and clips."""

    def layer(images, drawn):
        return apply(images, *drawn, **options), None

    # A scan compiles one layer, whatever their number.
    return jnp.clip(jax.lax.scan(layer, images, (operation.T, value.T))[0], 0, 1)


def _check_warp(fill: float, interpolation: str) -> None:
    checks.fraction(fill=fill)
    checks.choice(ops.INTERPOLATIONS, interpolation=interpolation)


def _image_shape(batch: Batch) -> tuple[int, int]:
    """(height, width) of the batch's images, which it checks."""
    checks.images(inputs=batch.inputs)
    return batch.inputs.shape[1:3]


def _policy(
    space: dict[str, Range],
    draw: Callable[[jax.Array, tuple[int, int]], tuple[jax.Array, jax.Array]],
    **options,
) -> Augment:
    """An augmentation from a draw (key, (height, width)) -> (places in `space` i32[L], f32[L])."""

    def augment(key, batch):
        shape = _image_shape(batch)
        drawn, value = jax.vmap(lambda key: draw(key, shape))(sample_keys(key, batch))
        operation = _numbers(space)[drawn]
        images = _layers(batch.inputs.astype(jnp.float32), operation, value, **options)
        for column in range(operation.shape[1]):
            batch = record(batch, operation[:, column], value[:, column])
        return batch._replace(inputs=images.astype(batch.inputs.dtype))

    return augment


def randaugment(
    n: int = 2, m: float = 9, *, bins: int = 31, fill: float = 0.0, interpolation: str = "nearest"
) -> Augment:
    """Applies n operations out of 14, uniform with replacement, at strength m / (bins - 1).

    >>> augment = randaugment(2, 9)  # as text: parse("randaugment(2, 9)")

    Args:
      n: operations per sample, >= 1.
      m: strength in [0, bins - 1]; signs are drawn.
      bins: of the scale; 31 as in torchvision and the paper.
      fill: grey value in [0, 1] outside the image.
      interpolation: "nearest" or "bilinear".

    Raises:
      ValueError: an option out of range.

    Source: Cubuk et al., "RandAugment", NeurIPS 2020; ranges and scale as torchvision's.
    """
    checks.whole(1, n=n)
    _check_warp(fill, interpolation)
    if not 0 <= m <= bins - 1:
        raise ValueError(f"m must lie in [0, {bins - 1}]; given {m}")

    def draw(key, shape):
        u, v = jax.random.uniform(key, (2, n))
        drawn = _one_of(len(STANDARD), u)
        return drawn, values(STANDARD, drawn, m / (bins - 1), _sign(v), shape)

    return _policy(STANDARD, draw, names=STANDARD, fill=fill, interpolation=interpolation)


def trivialaugment(
    wide: bool = True, *, fill: float = 0.0, interpolation: str = "nearest"
) -> Augment:
    """Applies one operation out of 14, uniform, at one of 31 strengths, uniform.

    >>> augment = trivialaugment()  # as text: parse("trivialaugment")

    Args:
      wide: whether to take the paper's wide ranges (shear .99, 32 pixels, 135 degrees, factors .01
        to 1.99, 2 bits) or the standard ones (.3, 10 pixels, 30 degrees, .1 to 1.9, 4 bits).
      fill, interpolation: see `randaugment`.

    Source: Müller and Hutter, "TrivialAugment", ICCV 2021.
    """
    _check_warp(fill, interpolation)
    space = TRIVIAL_WIDE if wide else TRIVIAL

    def draw(key, shape):
        u, v, w = jax.random.uniform(key, (3, 1))
        drawn, strength = _one_of(len(space), u), _one_of(31, v) / 30
        return drawn, values(space, drawn, strength, _sign(w), shape)

    return _policy(space, draw, names=space, fill=fill, interpolation=interpolation)


def autoaugment(
    policy: str = "cifar10", *, fill: float = 0.0, interpolation: str = "nearest"
) -> Augment:
    """Applies one of 25 published pairs of operations, each operation with its probability.

    >>> augment = autoaugment("svhn")  # as text: parse("autoaugment('svhn')")

    Args:
      policy: "cifar10", "imagenet" or "svhn".
      fill, interpolation: see `randaugment`.

    Source: Cubuk et al., "AutoAugment", CVPR 2019, appendix; ranges as torchvision's (10 bins).
    """
    checks.choice(POLICIES, policy=policy)
    _check_warp(fill, interpolation)
    pairs = POLICIES[policy]
    space = STANDARD | {"invert": Range()}
    names = list(space)
    number = np.array([[names.index(half[0]) for half in pair] for pair in pairs])
    probability = np.array([[half[1] for half in pair] for pair in pairs], np.float32)
    strength = np.array([[half[2] / 9 for half in pair] for pair in pairs], np.float32)
    used = {name for pair in pairs for name, _, _ in pair}

    def draw(key, shape):
        u = jax.random.uniform(key, (5,))
        pair = _one_of(len(pairs), u[0])
        drawn = jnp.asarray(number)[pair]
        use = u[1:3] < jnp.asarray(probability)[pair]
        value = values(space, drawn, jnp.asarray(strength)[pair], _sign(u[3:]), shape)
        nothing = names.index("identity")
        return jnp.where(use, drawn, nothing), jnp.where(use, value, 0.0)

    return _policy(space, draw, names=used, fill=fill, interpolation=interpolation)


def augmix(
    severity: float = 3.0,
    *,
    width: int = 3,
    depth: int = 3,
    alpha: float = 1.0,
    fill: float = 0.0,
    interpolation: str = "nearest",
) -> Augment:
    """Mixes the image with `width` chains of 1 to `depth` operations.

        x <- (1 - m) x + m sum_i w_i chain_i(x) ,  m ~ Beta(alpha, alpha) ,  w ~ Dirichlet(alpha)

    The chains draw from nine operations (without color, contrast, brightness and sharpness, which
    corruption benchmarks contain), each at strength U(.1, severity) / 10. The trace has one column,
    magnitude m. For the paper's Jensen-Shannon loss over a clean and two augmented views, use
    `views(identity, a, a)` upstream and `core.losses.augmix_loss` as the method's loss.

    >>> augment = augmix(3.0)  # as text: parse("augmix(3.0)")

    Args:
      severity: in [.1, 10], largest strength times 10.
      width: number of chains.
      depth: most operations in a chain.
      alpha: of the Beta and Dirichlet distributions, > 0.
      fill, interpolation: see `randaugment`.

    Source: Hendrycks et al., "AugMix", ICLR 2020.
    """
    if not 0.1 <= severity <= 10:
        raise ValueError(f"severity must lie in [0.1, 10]; given {severity}")
    checks.whole(1, width=width, depth=depth)
    checks.positive(alpha=alpha)
    _check_warp(fill, interpolation)

    def augment(key, batch):
        shape = _image_shape(batch)

        def draw(key):
            chains_key, length_key, weight_key, share_key = jax.random.split(key, 4)
            u, v, w = jax.random.uniform(chains_key, (3, width, depth))
            drawn, strength = _one_of(len(_AUGMIX), u), (0.1 + (severity - 0.1) * v) / 10
            value = values(_AUGMIX, drawn, strength, _sign(w), shape)
            length = 1 + _one_of(depth, jax.random.uniform(length_key, (width, 1)))
            operation = jnp.where(jnp.arange(depth)[None] < length, _numbers(_AUGMIX)[drawn], 0)
            return operation, value, _dirichlet(weight_key, alpha, width), beta(share_key, alpha)

        operation, value, weight, share = jax.vmap(draw)(sample_keys(key, batch))
        images = batch.inputs.astype(jnp.float32)
        # Row i * width + w is chain w of sample i: a sample's chains stay on its device.
        chains = jnp.repeat(images, width, 0)
        operation, value = (x.reshape(-1, depth) for x in (operation, value))
        chains = _layers(
            chains, operation, value, names=_AUGMIX, fill=fill, interpolation=interpolation
        ).reshape(-1, width, *images.shape[1:])
        mixed = jnp.einsum("bw,bwhvc->bhvc", weight, chains)
        part = share[:, None, None, None]
        out = ((1 - part) * images + part * mixed).astype(batch.inputs.dtype)
        return record(batch._replace(inputs=out), "augmix", share)

    return augment


def _pairs(text: str) -> tuple:
    """Lines of "name probability level, name probability level" as nested tuples."""

    def half(words):
        name, probability, level = words.split()
        return name, float(probability), int(level)

    return tuple(
        tuple(half(words) for words in line.split(",")) for line in text.strip().splitlines()
    )


# Level 0 where an operation takes no value.
POLICIES = {
    "cifar10": _pairs("""
        invert 0.1 0, contrast 0.2 6
        rotate 0.7 2, translate_x 0.3 9
        sharpness 0.8 1, sharpness 0.9 3
        shear_y 0.5 8, translate_y 0.7 9
        autocontrast 0.5 0, equalize 0.9 0
        shear_y 0.2 7, posterize 0.3 7
        color 0.4 3, brightness 0.6 7
        sharpness 0.3 9, brightness 0.7 9
        equalize 0.6 0, equalize 0.5 0
        contrast 0.6 7, sharpness 0.6 5
        color 0.7 7, translate_x 0.5 8
        equalize 0.3 0, autocontrast 0.4 0
        translate_y 0.4 3, sharpness 0.2 6
        brightness 0.9 6, color 0.2 8
        solarize 0.5 2, invert 0.0 0
        equalize 0.2 0, autocontrast 0.6 0
        equalize 0.2 0, equalize 0.6 0
        color 0.9 9, equalize 0.6 0
        autocontrast 0.8 0, solarize 0.2 8
        brightness 0.1 3, color 0.7 0
        solarize 0.4 5, autocontrast 0.9 0
        translate_y 0.9 9, translate_y 0.7 9
        autocontrast 0.9 0, solarize 0.8 3
        equalize 0.8 0, invert 0.1 0
        translate_y 0.7 9, autocontrast 0.9 0
    """),
    "imagenet": _pairs("""
        posterize 0.4 8, rotate 0.6 9
        solarize 0.6 5, autocontrast 0.6 0
        equalize 0.8 0, equalize 0.6 0
        posterize 0.6 7, posterize 0.6 6
        equalize 0.4 0, solarize 0.2 4
        equalize 0.4 0, rotate 0.8 8
        solarize 0.6 3, equalize 0.6 0
        posterize 0.8 5, equalize 1.0 0
        rotate 0.2 3, solarize 0.6 8
        equalize 0.6 0, posterize 0.4 6
        rotate 0.8 8, color 0.4 0
        rotate 0.4 9, equalize 0.6 0
        equalize 0.0 0, equalize 0.8 0
        invert 0.6 0, equalize 1.0 0
        color 0.6 4, contrast 1.0 8
        rotate 0.8 8, color 1.0 2
        color 0.8 8, solarize 0.8 7
        sharpness 0.4 7, invert 0.6 0
        shear_x 0.6 5, equalize 1.0 0
        color 0.4 0, equalize 0.6 0
        equalize 0.4 0, solarize 0.2 4
        solarize 0.6 5, autocontrast 0.6 0
        invert 0.6 0, equalize 1.0 0
        color 0.6 4, contrast 1.0 8
        equalize 0.8 0, equalize 0.6 0
    """),
    "svhn": _pairs("""
        shear_x 0.9 4, invert 0.2 0
        shear_y 0.9 8, invert 0.7 0
        equalize 0.6 0, solarize 0.6 6
        invert 0.9 0, equalize 0.6 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, autocontrast 0.8 0
        shear_y 0.9 8, invert 0.4 0
        shear_y 0.9 5, solarize 0.2 6
        invert 0.9 0, autocontrast 0.8 0
        equalize 0.6 0, rotate 0.9 3
        shear_x 0.9 4, solarize 0.3 3
        shear_y 0.8 8, invert 0.7 0
        equalize 0.9 0, translate_y 0.6 6
        invert 0.9 0, equalize 0.6 0
        contrast 0.3 3, rotate 0.8 4
        invert 0.8 0, translate_y 0.0 2
        shear_y 0.7 6, solarize 0.4 8
        invert 0.6 0, rotate 0.8 4
        shear_y 0.3 7, translate_x 0.9 3
        shear_x 0.1 6, invert 0.6 0
        solarize 0.7 2, translate_y 0.6 7
        shear_y 0.8 4, invert 0.8 0
        shear_x 0.7 9, translate_y 0.8 3
        shear_y 0.8 5, autocontrast 0.7 0
        shear_x 0.7 2, invert 0.1 0
    """),
}
