"""Augmentations that mix two samples of a batch; labels are mixed by the realised share.

A sample's partner is another row of the batch. Partners come from one random permutation: of the
global batch under jit, of each device's rows under pmap. Everything else is drawn by the sample's
index.

The larger share is the sample's own (except in `resizemix`): a share below one half is replaced by
its complement. Since the pairs (a, b) and (b, a) are equally likely, this changes which parent
counts as the own one, but not the distribution of mixed images and labels. `Batch.index` is the
dominant parent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.augment.base import Augment, check_interval, record, sample_keys
from saflex_jax.types import Batch, PyTree

Shape = tuple[int, int]  # height, width

# --- mixing, given partners and shares


def mix(
    batch: Batch,
    partner: jax.Array,
    own: jax.Array,
    name: str,
    *,
    keys: jax.Array | None = None,
) -> Batch:
    """Mixes every row with its partner, and the labels by the realised share.

        x_i <- m_i x_i + (1 - m_i) x_p(i) ,  q_i <- s_i q_i + (1 - s_i) q_p(i) ,  s_i = mean(m_i)

    Integers are codes, which have no average: each column comes whole from one parent, the own one
    with probability s_i. A row whose partner is padding or itself is not mixed (m = 1).

    >>> batch = Batch(jnp.array([[0.0], [8.0]]), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> mixed = mix(batch, jnp.array([1, 0]), jnp.array([0.75, 1.0]), "mixup")
    >>> mixed.inputs.tolist(), mixed.labels.tolist()
    ([[2.0], [8.0]], [[0.75, 0.25], [0.0, 1.0]])

    Args:
      batch: inputs are any pytree of arrays [B, ...] for shares, images f32[B, H, W, C] for masks.
      partner: i32[B], rows.
      own: m, f32[B] shares or f32[B, H, W] masks, in [0, 1].
      name: of OPERATIONS; the trace's magnitude is s, its partner `batch.index[partner]`.
      keys: key[B], of the codes; None when there are none.

    Raises:
      ValueError: `own` does not fit the inputs; integers that are not codes [B, E] with keys.
    """
    if own.ndim == 3:
        checks.images(inputs=batch.inputs)
    if own.shape not in (partner.shape, getattr(batch.inputs, "shape", ())[:3]):
        raise ValueError(f"own must have shape [B] or the images' [B, H, W]; given {own.shape}")
    partner, own, share = settle(batch, partner, own)

    def mixed(number, x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return blend(x, x[partner], own)
        if keys is None or x.ndim != 2:
            raise ValueError(
                f"inputs must be floats, or integer codes [B, E] mixed by shares and keys; "
                f"given {x.dtype}{x.shape}"
            )
        return _chosen(jax.vmap(partial(jax.random.fold_in, data=number))(keys), x, partner, share)

    leaves, structure = jax.tree.flatten(batch.inputs)
    inputs = structure.unflatten([mixed(number, x) for number, x in enumerate(leaves)])
    return labelled(batch, inputs, partner, share, name)


def settle(
    batch: Batch, partner: jax.Array, own: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sets own parts to 1 where the partner is padding or the row itself, and takes their means.

    Args:
      batch: of B rows.
      partner: i32[B], rows.
      own: f32[B, ...] in [0, 1].

    Returns:
      (partner i32[B], the row itself where nothing is mixed; own; share f32[B], the mean of own).
    """
    rows = jnp.arange(partner.shape[0])
    other = batch.mask[partner] & (partner != rows)
    own = jnp.where(_spread(other, own), own, 1.0)
    # 1 - the mean of the partner's part, so that the share is exactly 1 where nothing is mixed: a
    # compiled mean multiplies by 1/n, and 49 * (1/49) need not be 1.
    share = own if own.ndim == 1 else 1 - jnp.mean(1 - own, tuple(range(1, own.ndim)))
    return jnp.where(share < 1, partner, rows), own, share


def blend(x: jax.Array, other: jax.Array, own: jax.Array) -> jax.Array:
    """own x + (1 - own) other in f32, `own` over the leading axes, in the dtype of x."""
    own = _spread(own, x)
    return (own * x + (1 - own) * other).astype(x.dtype)


def labelled(
    batch: Batch, inputs: PyTree, partner: jax.Array, share: jax.Array, name: str
) -> Batch:
    """The batch with these mixed inputs, labels mixed by `share` f32[B], and the trace of both."""
    checks.soft(labels=batch.labels)
    labels = blend(batch.labels, batch.labels[partner], share)
    return record(batch._replace(inputs=inputs, labels=labels), name, share, batch.index[partner])


def _chosen(keys: jax.Array, codes: jax.Array, partner: jax.Array, share: jax.Array) -> jax.Array:
    """Codes i32[B, E], each the own one with probability `share`, the partner's otherwise."""
    own = jax.vmap(partial(jax.random.bernoulli, shape=codes.shape[1:]))(keys, share)
    return jnp.where(own, codes, codes[partner])


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


# --- drawing


def partners(key: jax.Array, batch: Batch) -> jax.Array:
    """i32[B], a random permutation of the rows."""
    return jax.random.permutation(key, batch.index.shape[0])


def draws(
    draw: Callable[[jax.Array], jax.Array], key: jax.Array, batch: Batch, *, per_sample: bool
) -> jax.Array:
    """draw(key) for each sample by its index, or one draw for all of them: [B, ...]."""
    if per_sample:
        return jax.vmap(draw)(sample_keys(key, batch))
    one = draw(key)
    return jnp.broadcast_to(one, (batch.index.shape[0], *one.shape))


def sometimes(
    draw: Callable[[jax.Array], jax.Array], probability: float, otherwise: float = 1.0
) -> Callable[[jax.Array], jax.Array]:
    """Draws with the given probability and else returns `otherwise`, by default a share of 1."""
    checks.fraction(probability=probability)

    def maybe(key):
        use_key, draw_key = jax.random.split(key)
        return jnp.where(
            jax.random.bernoulli(use_key, jnp.float32(probability)), draw(draw_key), otherwise
        )

    return maybe


def beta(key: jax.Array, alpha: float) -> jax.Array:
    """f32[] ~ Beta(alpha, alpha), in closed form from two uniforms u and v.

        1/2 + sign(c) / 2 sqrt((1 - w) c^2 / (w + (1 - w) c^2)) ,  w = u^(1/alpha), c = cos(2 pi v)

    It is t / sqrt(1 + t^2) of Bailey's Student t, for every alpha. The rejection sampler of
    `jax.random.beta` takes seconds to compile.

    Source: Devroye, "Random variate generation in one line of code", WSC 1996.
    """
    u, v = jax.random.uniform(key, (2,))
    power, cosine = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
    square = (1 - power) * cosine**2
    return 0.5 + 0.5 * jnp.sign(cosine) * jnp.sqrt(square / (power + square))


def dominating(own: jax.Array) -> jax.Array:
    """The share or mask, or its complement where its mean is below one half.

    >>> float(dominating(jnp.array(0.25)))
    0.75
    """
    return jnp.where(jnp.mean(own) < 0.5, 1 - own, own)


def box(key: jax.Array, ratio: jax.Array, shape: Shape) -> jax.Array:
    """i32[2, 2], (first, past the last) row, then column, of a box of `ratio` times each side.

    Its centre is uniform over the pixels, its sides are rounded and cut at the image's border.
    """
    sides = jnp.array(shape)
    length = jnp.round(ratio * sides).astype(jnp.int32)
    first = jax.random.randint(key, (2,), 0, sides) - length // 2
    return jnp.stack([jnp.clip(first, 0, sides), jnp.clip(first + length, 0, sides)], 1)


def outside(box: jax.Array, shape: Shape) -> jax.Array:
    """f32[H, W], 0 inside the box and 1 outside."""
    within = [
        (jnp.arange(side) >= first) & (jnp.arange(side) < last)
        for side, (first, last) in zip(shape, box)
    ]
    return 1.0 - (within[0][:, None] & within[1][None])


def low_frequency(key: jax.Array, shape: Shape, decay: float) -> jax.Array:
    """f32[H, W], Gaussian noise whose amplitude falls as 1 / max(f, 1/max(H, W))^decay."""
    height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    scale = np.float32(np.maximum(frequency * max(shape), 1) ** -decay)
    real, imaginary = scale[None] * jax.random.normal(key, (2, *scale.shape))
    return jnp.fft.irfft2(jax.lax.complex(real, imaginary), s=shape)


def largest(values: jax.Array, share: jax.Array) -> jax.Array:
    """f32, 1 on the round(share * size) largest values and 0 elsewhere; ties by place."""
    order = jnp.argsort(-values.ravel(), stable=True)
    count = jnp.round(share * values.size)
    ones = (jnp.arange(values.size) < count).astype(jnp.float32)
    placed = jnp.zeros_like(ones).at[order].set(ones, unique_indices=True)
    return placed.reshape(values.shape)


def bell(key: jax.Array, sigma: jax.Array, shape: Shape) -> jax.Array:
    """f32[H, W], a Gaussian of height 1, `sigma` of each side wide, its centre any pixel."""
    centre = jax.random.randint(key, (2,), 0, jnp.array(shape))
    rows, columns = (
        jnp.exp(-0.5 * ((jnp.arange(side) - c) / (sigma * side)) ** 2)
        for side, c in zip(shape, centre)
    )
    return rows[:, None] * columns[None]


# --- the augmentations


def mixup(alpha: float, *, probability: float = 1.0, per_sample: bool = True) -> Augment:
    """Mixes each sample with a random partner; any pytree of inputs.

        x_i <- l_i x_i + (1 - l_i) x_p(i) ,  q_i likewise
        l_i = max(l, 1 - l) ,  l ~ Beta(alpha, alpha)

    Integer leaves are codes (see `mix`): a table's categories stay categories.

    >>> batch = Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> mixed = jax.jit(mixup(1.0))(jax.random.key(0), batch)
    >>> bool((mixed.inputs == mixed.labels).all())  # labels are mixed by the same share
    True

    Args:
      alpha: > 0, of the Beta distribution of l.
      probability: of mixing at all.
      per_sample: False = one l for the whole batch.

    Source: Zhang et al., "mixup", ICLR 2018.
    """
    draw = _shares(alpha, probability)

    def augment(key, batch):
        partner_key, share_key, codes_key = jax.random.split(key, 3)
        share = draws(draw, share_key, batch, per_sample=per_sample)
        keys = sample_keys(codes_key, batch)
        return mix(batch, partners(partner_key, batch), share, "mixup", keys=keys)

    return augment


def manifold_mixup(
    alpha: float, *, layers: int = 2, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Mixup inside the network, at a layer drawn for every batch; mixes only the labels here.

        h_i <- l_i h_i + (1 - l_i) h_p(i)  at layer t ~ U{0, ..., layers - 1} ;  q_i likewise

    The inputs become {"inputs": unchanged, "partner": rows i32[B], "share": l f32[B], "layer":
    i32[B], the same number in every row}. The network must take such a dict and mix at each of the
    layers; otherwise only the labels are mixed. `models.Classifier` has two layers: 0 = the inputs,
    1 = the backbone's features. A mixed row's logits depend on its partner's row, in evaluation
    mode too: do not split the batch (`chunk`) or join it with others (`clean`) before the network.
    Its name in the trace is "mixup".

    >>> batch = Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> sorted(jax.eval_shape(manifold_mixup(1.0), jax.random.key(0), batch).inputs)
    ['inputs', 'layer', 'partner', 'share']

    Args:
      alpha: > 0, l = max(l', 1 - l') with l' ~ Beta(alpha, alpha).
      layers: number of places where the network can mix.
      probability: of mixing at all.
      per_sample: False = one l for the whole batch.

    Source: Verma et al., "Manifold Mixup", ICML 2019.
    """
    checks.whole(1, layers=layers)
    draw = _shares(alpha, probability)

    def augment(key, batch):
        partner_key, share_key, layer_key = jax.random.split(key, 3)
        share = draws(draw, share_key, batch, per_sample=per_sample)
        partner, share, _ = settle(batch, partners(partner_key, batch), share)
        layer = jax.random.randint(layer_key, (), 0, layers)
        inputs = {
            "inputs": batch.inputs,
            "partner": partner,
            "share": share,
            "layer": jnp.broadcast_to(layer, partner.shape),
        }
        return labelled(batch, inputs, partner, share, "mixup")

    return augment


def cutmix(alpha: float, *, probability: float = 1.0, per_sample: bool = True) -> Augment:
    """Pastes a box of the partner, sqrt(1 - l) of each side, l ~ Beta(alpha, alpha).

    The centre is uniform over the pixels and the box is cut at the border, so the label's share is
    1 - its area, not l. If the box covers more than half of the image, the own pixels are inside.

    >>> images = np.float32([0, 1]).reshape(2, 1, 1, 1).repeat(4, 1).repeat(4, 2)
    >>> batch = Batch(images, np.eye(2), np.ones(2, bool), np.arange(2))
    >>> mixed = jax.jit(cutmix(1.0))(jax.random.key(1), batch)
    >>> bool((mixed.labels[:, 1] == np.mean(mixed.inputs, (1, 2, 3))).all())
    True

    Args:
      alpha: > 0, of the Beta distribution of l.
      probability: of mixing at all.
      per_sample: False = one box for the whole batch.

    Source: Yun et al., "CutMix", ICCV 2019, section 3.
    """
    checks.positive(alpha=alpha)

    def draw(key, shape):
        share_key, box_key = jax.random.split(key)
        ratio = jnp.sqrt(1 - beta(share_key, alpha))
        return outside(box(box_key, ratio, shape), shape)

    return _masked("cutmix", draw, probability, per_sample)


def fmix(
    alpha: float, decay: float = 3.0, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Keeps the own pixels where low-frequency noise is largest, the partner's elsewhere.

    The mask has exactly round(l H W) ones, l ~ Beta(alpha, alpha), or is the complement if that
    is less than half.

    >>> augment = fmix(1.0)  # as text: parse("fmix(1.0)")

    Args:
      alpha: > 0, of the Beta distribution of l.
      decay: >= 0, power with which the noise's amplitude falls with frequency.
      probability: of mixing at all.
      per_sample: False = one mask for the whole batch.

    Source: Harris et al., "FMix", arXiv 2002.12047.
    """
    checks.positive(alpha=alpha)
    checks.at_least_zero(decay=decay)

    def draw(key, shape):
        share_key, noise_key = jax.random.split(key)
        share = beta(share_key, alpha)
        return largest(low_frequency(noise_key, shape, decay), share)

    return _masked("fmix", draw, probability, per_sample)


def gridmix(
    alpha: float, cells: int = 4, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Keeps each cell of a grid with probability l ~ Beta(alpha, alpha), else takes the partner's.

    >>> augment = gridmix(1.0, cells=4)  # as text: parse("gridmix(1.0, 4)")

    Args:
      alpha: > 0, of the Beta distribution of l.
      cells: number of cells along each side; sizes differ by at most a pixel.
      probability: of mixing at all.
      per_sample: False = one grid for the whole batch.

    Raises:
      ValueError: more cells than pixels along a side.

    Source: Baek et al., "GridMix", Pattern Recognition 2021.
    """
    checks.positive(alpha=alpha)
    checks.whole(1, cells=cells)

    def draw(key, shape):
        if cells > min(shape):
            raise ValueError(f"cells must be at most {min(shape)}, the shorter side; given {cells}")
        share_key, cells_key = jax.random.split(key)
        share = beta(share_key, alpha)
        own = jax.random.bernoulli(cells_key, share, (cells, cells)).astype(jnp.float32)
        rows, columns = (np.arange(side) * cells // side for side in shape)
        return own[rows[:, None], columns[None]]

    return _masked("gridmix", draw, probability, per_sample)


def smoothmix(
    low: float = 0.25, high: float = 0.5, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Blends in the partner under a Gaussian bell; the label's share is the mean of the mask.

        m = 1 - exp(-(dy / (sigma H))^2 / 2 - (dx / (sigma W))^2 / 2) ,  sigma ~ U(low, high)

    >>> augment = smoothmix(0.25, 0.5)  # as text: parse("smoothmix(0.25, 0.5)")

    Args:
      low: > 0, smallest sigma, in units of the image's sides.
      high: largest sigma.
      probability: of mixing at all.
      per_sample: False = one mask for the whole batch.

    Source: Lee et al., "SmoothMix", CVPR workshops 2020.
    """
    checks.positive(low=low)
    check_interval(0.0, float("inf"), **{"low and high": (low, high)})

    def draw(key, shape):
        sigma_key, place_key = jax.random.split(key)
        sigma = jax.random.uniform(sigma_key, minval=low, maxval=high)
        return 1 - bell(place_key, sigma, shape)

    return _masked("smoothmix", draw, probability, per_sample)


def resizemix(
    low: float = 0.1, high: float = 0.8, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Pastes the whole partner, shrunk to tau ~ U(low, high) of each side (nearest pixel).

    The box's centre is uniform over the pixels. The box is cut at the border before the partner is
    shrunk into it. The own share is 1 - the box's area. It may be below one half, and then `index`
    is the lesser parent.

    >>> augment = resizemix(0.1, 0.8)  # as text: parse("resizemix(0.1, 0.8)")

    Args:
      low: > 0, smallest tau.
      high: largest tau, at most 1.
      probability: of mixing at all.
      per_sample: False = one box for the whole batch.

    Source: Qin et al., "ResizeMix", arXiv 2012.11101.
    """
    checks.positive(low=low)
    check_interval(0.0, 1.0, **{"low and high": (low, high)})
    checks.fraction(probability=probability)

    def augment(key, batch):
        checks.images(inputs=batch.inputs)
        shape = batch.inputs.shape[1:3]
        partner_key, box_key = jax.random.split(key)

        def draw(key):
            ratio_key, place_key = jax.random.split(key)
            ratio = jax.random.uniform(ratio_key, minval=low, maxval=high)
            return box(place_key, ratio, shape)

        boxes = draws(sometimes(draw, probability, 0), box_key, batch, per_sample=per_sample)
        own = jax.vmap(partial(outside, shape=shape))(boxes)
        partner, own, share = settle(batch, partners(partner_key, batch), own)
        rows, columns = (
            jax.vmap(partial(_shrunk, side=side))(boxes[:, axis]) for axis, side in enumerate(shape)
        )
        place = partner[:, None, None], rows[:, :, None], columns[:, None, :]
        pasted = batch.inputs.at[place].get(mode="promise_in_bounds")
        return labelled(batch, blend(batch.inputs, pasted, own), partner, share, "resizemix")

    return augment


def _shrunk(ends: jax.Array, side: int) -> jax.Array:
    """i32[side], the source pixel of each pixel when an image is shrunk into [first, last)."""
    first, last = ends
    # floor((place + 1/2) * side / length), in integers
    place = 2 * (jnp.arange(side) - first) + 1
    return jnp.clip(place * side // (2 * jnp.maximum(last - first, 1)), 0, side - 1)


def _shares(alpha: float, probability: float) -> Callable[[jax.Array], jax.Array]:
    """key -> f32[], the own share of mixup, at least one half."""
    checks.positive(alpha=alpha)
    return sometimes(lambda key: dominating(beta(key, alpha)), probability)


def _masked(
    name: str,
    draw: Callable[[jax.Array, Shape], jax.Array],
    probability: float,
    per_sample: bool,
) -> Augment:
    """Mixing by masks: draw(key, (H, W)) -> f32[H, W], the own part."""
    checks.fraction(probability=probability)

    def augment(key, batch):
        checks.images(inputs=batch.inputs)
        shape = batch.inputs.shape[1:3]
        partner_key, mask_key = jax.random.split(key)
        mask = sometimes(lambda key: dominating(draw(key, shape)), probability)
        own = draws(mask, mask_key, batch, per_sample=per_sample)
        return mix(batch, partners(partner_key, batch), own, name)

    return augment
