"""Normalisation layers of the bundled networks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks


class GroupNorm(nn.Module):
    """Group normalisation over up to 8 groups of the channels of f32[B, ..., C].

    The same function as flax.linen.GroupNorm, with statistics broadcast in one operation instead of
    through [B, 1, 1, C] reshapes. XLA moves those reshapes differently in the scores' forward pass
    and in the training gradient's, and then computes both. Written like this, the two share one
    forward pass (tested by counting operations).

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
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.reshape(*x.shape[:-1], groups, channels // groups)
        inner = (*range(1, x.ndim - 1), x.ndim)

        def spread(statistic):  # f32[B, groups] -> the shape of `grouped`
            return jax.lax.broadcast_in_dim(statistic, grouped.shape, (0, x.ndim - 1))

        centred = grouped - spread(jnp.mean(grouped, axis=inner))
        variance = jnp.mean(centred * centred, axis=inner)
        normed = centred * spread(jax.lax.rsqrt(variance + self.epsilon))
        last = (x.ndim - 1,)
        return normed.reshape(x.shape) * jax.lax.broadcast_in_dim(
            scale, x.shape, last
        ) + jax.lax.broadcast_in_dim(bias, x.shape, last)


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
