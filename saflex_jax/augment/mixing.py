"""Augmentations that mix two samples of a batch: the label's share is the realised share.

A sample's partner is another row of the batch, named explicitly. Partners come from one random
permutation: under jit of the global batch, under pmap of each device's rows. Everything else is
drawn by the sample's index.

The larger share is the sample's own (save for `resizemix`): a share below one half is replaced by
its complement. Since (a, b) and (b, a) are equally likely pairs, this changes which parent is
called the own one and not the distribution of mixed images and labels; and `Batch.index` names the
parent that dominates.
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
    with probability s_i. Nobody is mixed with padding (nor with itself): its m is 1.

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
    """Partners and own parts such that nobody is mixed with padding or with itself, and the shares.

    Args:
      batch: of B rows.
      partner: i32[B], rows.
      own: f32[B, ...] in [0, 1].

    Returns:
      (partner, the row itself where nothing is mixed; own; share f32[B], the mean of own).
    """
    rows = jnp.arange(partner.shape[0])
    other = batch.mask[partner] & (partner != rows)
    own = jnp.where(_spread(other, own), own, 1.0)
    # By way of the partner's share, so that the own one is exactly 1 where nothing is mixed: a
    # compiled mean multiplies by 1/n, and 49 * (1/49) may not be 1.
    share = own if own.ndim == 1 else 1 - jnp.mean(1 - own, tuple(range(1, own.ndim)))
    return jnp.where(share < 1, partner, rows), own, share


def blend(x: jax.Array, other: jax.Array, own: jax.Array) -> jax.Array:
    """own x + (1 - own) other in f32, `own` over the leading axes; the dtype is that of x."""
    own = _spread(own, x)
    return (own * x + (1 - own) * other).astype(x.dtype)


def labelled(
    batch: Batch, inputs: PyTree, partner: jax.Array, share: jax.Array, name: str
) -> Batch:
    """The batch with mixed inputs, its labels mixed by `share` f32[B], and its trace."""
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
    """draw(key) for each sample by its index, or one for all of them; the leading axis is B."""
    if per_sample:
        return jax.vmap(draw)(sample_keys(key, batch))
    one = draw(key)
    return jnp.broadcast_to(one, (batch.index.shape[0], *one.shape))


def sometimes(
    draw: Callable[[jax.Array], jax.Array], probability: float, otherwise: float = 1.0
) -> Callable[[jax.Array], jax.Array]:
    """The draw with some probability, and `otherwise` (by default: all one's own) without."""
    checks.fraction(probability=probability)

    def maybe(key):
        of_use, of_draw = jax.random.split(key)
        return jnp.where(
            jax.random.bernoulli(of_use, jnp.float32(probability)), draw(of_draw), otherwise
        )

    return maybe


def beta(key: jax.Array, alpha: float) -> jax.Array:
    """f32[] ~ Beta(alpha, alpha), in closed form from two uniforms u and v.

        1/2 + sign(c) / 2 sqrt((1 - w) c^2 / (w + (1 - w) c^2)) ,  w = u^(1/alpha), c = cos(2 pi v)

    It is t / sqrt(1 + t^2) of Bailey's Student t, for every alpha; `jax.random.beta`, a rejection
    sampler, compiles for seconds.

    Source: Devroye, "Random variate generation in one line of code", WSC 1996.
    """
    u, v = jax.random.uniform(key, (2,))
    power, cosine = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
    square = (1 - power) * cosine**2
    return 0.5 + 0.5 * jnp.sign(cosine) * jnp.sqrt(square / (power + square))


def dominating(own: jax.Array) -> jax.Array:
    """The share or mask, or its complement where less than half of it is one's own."""
    return jnp.where(jnp.mean(own) < 0.5, 1 - own, own)


def box(key: jax.Array, ratio: jax.Array, shape: Shape) -> jax.Array:
    """i32[2, 2], (first, past the last) row, then column, of a box of `ratio` of each side.

    Its centre is uniform over the pixels, its sides rounded; what leaves the image is cut off.
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
    """Convex combination with a random partner; any pytree of inputs.

        x_i <- l_i x_i + (1 - l_i) x_p(i) ,  q_i likewise
        l_i = max(l, 1 - l) ,  l ~ Beta(alpha, alpha)

    Integer leaves are codes, as `mix` says: a table's categories stay categories.

    Args:
      alpha: > 0.
      probability: of mixing at all.
      per_sample: False = one l for the whole batch.

    Source: Zhang et al., "mixup", ICLR 2018.
    """
    draw = _shares(alpha, probability)

    def augment(key, batch):
        of_partner, of_share, of_codes = jax.random.split(key, 3)
        share = draws(draw, of_share, batch, per_sample=per_sample)
        keys = sample_keys(of_codes, batch)
        return mix(batch, partners(of_partner, batch), share, "mixup", keys=keys)

    return augment


def manifold_mixup(
    alpha: float, *, layers: int = 2, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Mixup inside the network, at a layer drawn for every batch; here only labels are mixed.

        h_i <- l_i h_i + (1 - l_i) h_p(i)  at layer t ~ U{0, ..., layers - 1} ;  q_i likewise

    The inputs become {"inputs": as they were, "partner": rows i32[B], "share": l f32[B], "layer":
    i32[B], the same number in every row}. The network must know such a dict and mix at each of the
    layers, else labels are mixed and features are not: `models.Classifier` has two, 0 = the inputs
    and 1 = the backbone's features. A mixed row's logits depend on its partner's row, in evaluation
    mode too: the batch must be neither split (`chunk`) nor joined (`clean`) before the network.

    Args:
      alpha: > 0, l = max(l', 1 - l') with l' ~ Beta(alpha, alpha).
      layers: number of places where the network can mix.
      probability: of mixing at all.
      per_sample: False = one l for the whole batch.

    The trace calls it mixup. Source: Verma et al., "Manifold Mixup", ICML 2019.
    """
    checks.whole(1, layers=layers)
    draw = _shares(alpha, probability)

    def augment(key, batch):
        of_partner, of_share, of_layer = jax.random.split(key, 3)
        share = draws(draw, of_share, batch, per_sample=per_sample)
        partner, share, _ = settle(batch, partners(of_partner, batch), share)
        layer = jax.random.randint(of_layer, (), 0, layers)
        inputs = {
            "inputs": batch.inputs,
            "partner": partner,
            "share": share,
            "layer": jnp.broadcast_to(layer, partner.shape),
        }
        return labelled(batch, inputs, partner, share, "mixup")

    return augment


def cutmix(alpha: float, *, probability: float = 1.0, per_sample: bool = True) -> Augment:
    """The partner's pixels in a box of sqrt(1 - l) of each side, l ~ Beta(alpha, alpha).

    The centre is uniform over the pixels and the box is cut off at the border, so the share is
    1 - its area and not l. Where the box is more than half of the image, its inside is one's own.

    Args:
      alpha: > 0.
      probability: of mixing at all.
      per_sample: False = one box for the whole batch.

    Source: Yun et al., "CutMix", ICCV 2019, section 3.
    """
    checks.positive(alpha=alpha)

    def draw(key, shape):
        of_share, of_box = jax.random.split(key)
        ratio = jnp.sqrt(1 - beta(of_share, alpha))
        return outside(box(of_box, ratio, shape), shape)

    return _masked("cutmix", draw, probability, per_sample)


def fmix(
    alpha: float, decay: float = 3.0, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """One's own pixels where low-frequency noise is largest.

    The mask has exactly round(l H W) ones, l ~ Beta(alpha, alpha), or is the complement where
    that is less than half.

    Args:
      alpha: > 0.
      decay: >= 0, power with which the noise's amplitude falls with frequency.
      probability: of mixing at all.
      per_sample: False = one mask for the whole batch.

    Source: Harris et al., "FMix", arXiv 2002.12047.
    """
    checks.positive(alpha=alpha)
    checks.at_least_zero(decay=decay)

    def draw(key, shape):
        of_share, of_noise = jax.random.split(key)
        share = beta(of_share, alpha)
        return largest(low_frequency(of_noise, shape, decay), share)

    return _masked("fmix", draw, probability, per_sample)


def gridmix(
    alpha: float, cells: int = 4, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """Cells of a grid, each one's own with probability l ~ Beta(alpha, alpha), or the partner's.

    Args:
      alpha: > 0.
      cells: of the grid along each side; sizes differ by at most a pixel.
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
        of_share, of_cells = jax.random.split(key)
        share = beta(of_share, alpha)
        own = jax.random.bernoulli(of_cells, share, (cells, cells)).astype(jnp.float32)
        rows, columns = (np.arange(side) * cells // side for side in shape)
        return own[rows[:, None], columns[None]]

    return _masked("gridmix", draw, probability, per_sample)


def smoothmix(
    low: float = 0.25, high: float = 0.5, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """The partner's pixels under a Gaussian bell, softly; the share is the mean of the mask.

        m = 1 - exp(-(dy / (sigma H))^2 / 2 - (dx / (sigma W))^2 / 2) ,  sigma ~ U(low, high)

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
        of_sigma, of_place = jax.random.split(key)
        sigma = jax.random.uniform(of_sigma, minval=low, maxval=high)
        return 1 - bell(of_place, sigma, shape)

    return _masked("smoothmix", draw, probability, per_sample)


def resizemix(
    low: float = 0.1, high: float = 0.8, *, probability: float = 1.0, per_sample: bool = True
) -> Augment:
    """The whole partner, shrunk (nearest pixel) into a box of tau ~ U(low, high) of each side.

    The box's centre is uniform over the pixels, its outside is cut off before the partner is
    shrunk into what is left. The own share is 1 - its area; it may be below one half, since the
    complement would not be an image of this kind: `index` then names the lesser parent.

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
        of_partner, of_box = jax.random.split(key)

        def draw(key):
            of_ratio, of_place = jax.random.split(key)
            ratio = jax.random.uniform(of_ratio, minval=low, maxval=high)
            return box(of_place, ratio, shape)

        boxes = draws(sometimes(draw, probability, 0), of_box, batch, per_sample=per_sample)
        own = jax.vmap(partial(outside, shape=shape))(boxes)
        partner, own, share = settle(batch, partners(of_partner, batch), own)
        rows, columns = (
            jax.vmap(partial(_shrunk, side=side))(boxes[:, axis]) for axis, side in enumerate(shape)
        )
        place = partner[:, None, None], rows[:, :, None], columns[:, None, :]
        pasted = batch.inputs.at[place].get(mode="promise_in_bounds")
        return labelled(batch, blend(batch.inputs, pasted, own), partner, share, "resizemix")

    return augment


def _shrunk(ends: jax.Array, side: int) -> jax.Array:
    """i32[side], where a pixel looks in an image that is shrunk into [first, last)."""
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
    """Mixing by masks: draw(key, (H, W)) -> f32[H, W], one's own part."""
    maybe = lambda shape: sometimes(lambda key: dominating(draw(key, shape)), probability)
    checks.fraction(probability=probability)

    def augment(key, batch):
        checks.images(inputs=batch.inputs)
        of_partner, of_mask = jax.random.split(key)
        own = draws(maybe(batch.inputs.shape[1:3]), of_mask, batch, per_sample=per_sample)
        return mix(batch, partners(of_partner, batch), own, name)

    return augment
