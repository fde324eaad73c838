"""Mix blocks: from the feature maps of several images to the mask of each in a mixture.

Both have __call__(maps f32[n, B, h, w, C], shares f32[n], *, size) -> masks f32[n, B, *size], in
[0, 1] and summing to one over the n images at every pixel. Write your own with the same signature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks

_init = nn.initializers.normal(0.01)  # so that masks start near 1/n everywhere
UPSAMPLING = {"nearest": "nearest", "bilinear": "linear"}  # half-pixel centres


@dataclasses.dataclass(frozen=True)
class MixBlockOptions:
    """Options of `MixBlock`.

    >>> MixBlockOptions(upsample="nearest", v_neck=True).reduction
    2

    Attributes:
      reduction: C / D, >= 1.
      upsample: "nearest" or "bilinear", of the logits.
      lam_concat: add the image's own share as a channel of the inputs of q, k and v; not together
        with `lam_concat_v`, `lam_mul` or `qk_concat`.
      lam_concat_v: add it to the input of v only; not together with `v_neck`, which removes
        constants.
      lam_mul: > 0: scale the maps by 1 + lam_mul l and 1 + lam_mul (1 - l); 0 = do not.
      lam_mul_k: >= 0: use the `rescaled` l there; None = l itself.
      qk_concat: q and k are separate maps of the channels of both images.
      v_concat: v sees the channels of both images.
      v_neck: v has two layers with `BatchStatistics` and ELU between them, without biases.

    Raises:
      ValueError: an unknown name, a value out of range, or options that exclude each other.
    """

    reduction: int = 2
    upsample: str = "nearest"
    lam_concat: bool = False
    lam_concat_v: bool = False
    lam_mul: float = 0.0
    lam_mul_k: float | None = None
    qk_concat: bool = False
    v_concat: bool = False
    v_neck: bool = False

    def __post_init__(self):
        checks.whole(1, reduction=self.reduction)
        checks.choice(UPSAMPLING, upsample=self.upsample)
        checks.amount(lam_mul=self.lam_mul)
        if self.lam_concat:
            self._check_off("lam_concat_v", "lam_mul", "qk_concat", beside="lam_concat")
        if self.v_neck:
            self._check_off("lam_concat_v", beside="v_neck")
        if self.lam_mul_k is not None:
            checks.amount(lam_mul_k=self.lam_mul_k)
            if not self.lam_mul:
                raise ValueError(f"lam_mul_k needs lam_mul > 0; given {self.lam_mul_k!r}")

    def _check_off(self, *names: str, beside: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ValueError(f"{name} must be off with {beside}; given {getattr(self, name)!r}")


class MixBlock(nn.Module):
    """AutoMix's block of two images: each position attends to the partner's positions.

        m = sigmoid(upsample(softmax(q(z) k(z') / sqrt(D)) v(z'))) ,  masks (1 - m, m)

    q = k without `qk_concat`. With the default options masks do not depend on the shares. For
    C = 256 it has 33,153 parameters; SAMix's has 164,480.

    >>> maps, shares = jnp.zeros((2, 1, 2, 2, 8)), jnp.array([0.3, 0.7])
    >>> masks, _ = MixBlock().init_with_output(jax.random.key(0), maps, shares, size=(4, 4))
    >>> masks.shape
    (2, 1, 4, 4)

    Attributes:
      options: see `MixBlockOptions`.
      axis_name: see `models.norm.Norm`; for `v_neck`.

    Raises:
      ValueError: not two images.

    Source: Liu et al., "AutoMix", ECCV 2022; Li et al., "SAMix", arXiv 2111.15454; the repository
    Westlake-AI/openmixup, whose names the options have.
    """

    options: MixBlockOptions = MixBlockOptions()
    axis_name: str | None = None

    @nn.compact
    def __call__(self, maps: jax.Array, shares: jax.Array, *, size: Sequence[int]) -> jax.Array:
        options = self.options
        if len(maps) != 2:
            raise ValueError(f"maps must be of 2 images; given {len(maps)}")
        grid, channels = maps.shape[2:4], maps.shape[4]
        width = max(channels // options.reduction, 1)
        own, partner = maps
        lam, rest = shares
        if options.lam_mul:
            curve = lam if options.lam_mul_k is None else rescaled(lam, options.lam_mul_k)
            own = own * (1 + options.lam_mul * curve)
            partner = partner * (1 + options.lam_mul * (1 - curve))
        if options.lam_concat:
            own, partner = _add_channel(own, lam), _add_channel(partner, rest)

        both = jnp.concatenate([own, partner], -1)
        valued = both if options.v_concat else partner
        if options.lam_concat_v:
            valued = _add_channel(valued, rest)
        if options.v_neck:
            hidden = _linear(width, "value_in", bias=False)(valued)
            hidden = nn.elu(BatchStatistics(self.axis_name, name="value_norm")(hidden))
            value = _linear(1, "value_out", bias=False)(hidden)
        else:
            value = _linear(1, "value")(valued)

        query = _linear(width, "query")
        if options.qk_concat:
            q, k = query(both), _linear(width, "key")(both)
        else:
            q, k = query(own), query(partner)
        q, k, value = map(_flat, (q, k, value))
        attention = jax.nn.softmax(jnp.einsum("bpd,brd->bpr", q, k) / jnp.sqrt(width))
        logits = jnp.einsum("bpr,brv->bpv", attention, value)[..., 0]
        mask = jax.nn.sigmoid(_upsampled(logits, grid, size, options.upsample))
        return jnp.stack([1 - mask, mask])


@dataclasses.dataclass(frozen=True)
class AdversarialMixBlockOptions:
    """Options of `AdversarialMixBlock`.

    >>> AdversarialMixBlockOptions(upsample="nearest").upsample
    'nearest'

    Attributes:
      reduction: C / D, >= 1.
      upsample: "nearest" or "bilinear", of the logits.
      lam_concat: add the image's own share as a channel of its map.

    Raises:
      ValueError: an unknown name, or a value out of range.
    """

    reduction: int = 2
    upsample: str = "bilinear"
    lam_concat: bool = False

    def __post_init__(self):
        checks.whole(1, reduction=self.reduction)
        checks.choice(UPSAMPLING, upsample=self.upsample)


class AdversarialMixBlock(nn.Module):
    """AdAutoMix's block of n images: each image's positions attend to those of all others.

        s_i = softmax(sum_(j != i) q_i k_j / sqrt(D)) v_i ,  masks = softmax over i of upsample(s_i)

    q and k are a 1x1 convolution and ReLU of the maps, v a 1x1 convolution.

    >>> maps, shares = jnp.zeros((3, 1, 2, 2, 8)), jnp.full(3, 1 / 3)
    >>> block = AdversarialMixBlock()
    >>> masks, _ = block.init_with_output(jax.random.key(0), maps, shares, size=(4, 4))
    >>> masks.shape
    (3, 1, 4, 4)

    Attributes:
      options: see `AdversarialMixBlockOptions`.

    Raises:
      ValueError: fewer than two images.

    Source: Qin et al., "Adversarial AutoMixup", ICLR 2024; the repository
    JinXins/Adversarial-AutoMixup.
    """

    options: AdversarialMixBlockOptions = AdversarialMixBlockOptions()

    @nn.compact
    def __call__(self, maps: jax.Array, shares: jax.Array, *, size: Sequence[int]) -> jax.Array:
        options = self.options
        if len(maps) < 2:
            raise ValueError(f"maps must be of at least 2 images; given {len(maps)}")
        images, batch, *grid, channels = maps.shape
        width = max(channels // options.reduction, 1)
        if options.lam_concat:
            maps = jnp.stack([_add_channel(x, share) for x, share in zip(maps, shares)])
        flat = maps.reshape(images, batch, -1, maps.shape[-1])
        q = nn.relu(_linear(width, "query")(flat))
        k = nn.relu(_linear(width, "key")(flat))
        value = _linear(1, "value")(flat)
        others = jnp.sum(k, 0, keepdims=True) - k
        attention = jax.nn.softmax(jnp.einsum("nbpd,nbrd->nbpr", q, others) / jnp.sqrt(width))
        logits = jnp.einsum("nbpr,nbrv->nbpv", attention, value)[..., 0]
        return jax.nn.softmax(_upsampled(logits, grid, size, options.upsample), axis=0)


class BatchStatistics(nn.Module):
    """Batch normalisation that always uses the current batch's statistics: f32[..., C].

    Attributes:
      axis_name: see `models.norm.Norm`.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        centred = x - self._mean(x)
        normed = centred * jax.lax.rsqrt(self._mean(centred**2) + 1e-5)
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        return normed * scale.reshape(shape) + bias.reshape(shape)

    def _mean(self, x):
        """Over all but the channels, and over all devices."""
        mean = jnp.mean(x, tuple(range(x.ndim - 1)), keepdims=True)
        return mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)


def rescaled(share: jax.Array, k: float) -> jax.Array:
    """SAMix's replacement for lambda: a curve through (0, 0), (1/2, 1/2) and (1, 1).

        (4/3 l^3 - 2 l^2 + (k + 1) l) / (k + 1/3)

    >>> rescaled(0.5, k=0.25)
    0.5
    """
    return (4 / 3 * share**3 - 2 * share**2 + (k + 1) * share) / (k + 1 / 3)


def _linear(width: int, name: str, *, bias: bool = True) -> nn.Module:
    """A 1x1 convolution."""
    return nn.Dense(width, use_bias=bias, kernel_init=_init, name=name)


def _flat(x: jax.Array) -> jax.Array:
    """f32[B, h, w, C] -> f32[B, h w, C]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _add_channel(x: jax.Array, value: jax.Array) -> jax.Array:
    """One more channel, the value everywhere."""
    return jnp.concatenate([x, jnp.full((*x.shape[:-1], 1), value, x.dtype)], -1)


def _upsampled(x: jax.Array, grid: Sequence[int], size: Sequence[int], method: str) -> jax.Array:
    """f32[..., h w] on a grid -> f32[..., H, W]."""
    lead = x.shape[:-1]
    return jax.image.resize(x.reshape(*lead, *grid), (*lead, *size), UPSAMPLING[method])
