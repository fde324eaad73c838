"""Normalisation layers of the bundled networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks


def spread(x: jax.Array, shape: tuple[int, ...], *axes: int) -> jax.Array:
    """x repeated to `shape`, of which it has these axes, in one operation.

    Not by a reshape to axes of length one: XLA moves reshapes differently in the scores' forward
    pass and in the training gradient's, takes the two for different, and computes both. A reshape
    into groups of channels does the same. Without them the two share one forward pass, on a CPU
    (tests/cost_test.py counts operations) and on a GPU (docs/cost.md).

    >>> spread(jnp.array([1, 2]), (2, 3), 0).tolist()
    [[1, 1, 1], [2, 2, 2]]
    """
    return jax.lax.broadcast_in_dim(x, shape, axes)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis of f[..., C], computed in f32 or wider.

    Not flax.linen.LayerNorm, for the reason given at `spread`. Rows lie on one axis: with tokens on
    an axis of their own, a ViT's step takes twice the time on a GPU.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        return _normalised(self, rows, partial(jnp.mean, axis=-1), (0,)).reshape(x.shape)


class GroupNorm(nn.Module):
    """Group normalisation over up to 8 groups of the channels of f[B, ..., C].

    The same function as flax.linen.GroupNorm, written so that XLA sees which passes are the same
    (`spread`).

    Source: Wu and He, "Group Normalization", ECCV 2018.
    """

    groups: int = 8
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        groups = min(self.groups, channels)
        if channels % groups:
            raise ValueError(f"channels must be a multiple of {groups} groups; given {channels}")

        of_channel = jnp.arange(channels) // (channels // groups)
        member = of_channel[:, None] == jnp.arange(groups)[None]  # bool[C, groups]

        def mean(x):  # f[B, C], the same for all channels of a group
            by_channel = jnp.mean(x, range(1, x.ndim - 1))
            shape = *by_channel.shape, groups
            own = spread(member, shape, 1, 2)
            of_group = jnp.sum(jnp.where(own, spread(by_channel, shape, 0, 1), 0), axis=1)
            alike = jnp.sum(jnp.where(own, spread(of_group, shape, 0, 2), 0), axis=2)
            return alike * (groups / channels)

        return _normalised(self, x, mean, (0, x.ndim - 1))


def _normalised(module, x: jax.Array, mean: Callable, axes: Iterable[int]) -> jax.Array:
    """The module's scale (x - m) / sqrt(v + epsilon) + bias, by a mean that keeps some axes.

    In f32 or wider, then in the dtype that x and the parameters share: half precision stays half.
    """
    last = x.ndim - 1
    scale = module.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = module.param("bias", nn.initializers.zeros, x.shape[-1:])
    dtype = jnp.promote_types(x.dtype, scale.dtype)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - spread(mean(x), x.shape, *axes)
    rate = jax.lax.rsqrt(mean(centred * centred) + module.epsilon)
    normed = centred * spread(rate, x.shape, *axes)
    return (normed * spread(scale, x.shape, last) + spread(bias, x.shape, last)).astype(dtype)


class Norm(nn.Module):
    """GroupNorm or BatchNorm.

    Attributes:
      kind: "group" (rows independent, no state), "batch", or "frozen": BatchNorm that uses and
        keeps its running statistics in training mode too, for pretrained networks.
      axis_name: the pmap axis over which BatchNorm averages its statistics; None under jit, where
        the batch is already global.
    """

    kind: str = "group"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        checks.choice(("group", "batch", "frozen"), norm=self.kind)
        if self.kind == "group":
            return GroupNorm()(x)
        running = self.kind == "frozen" or not train
        return nn.BatchNorm(running, momentum=0.9, axis_name=self.axis_name)(x)
