"""Multi-layer perceptron for tables."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from saflex_jax.models.norm import Norm


class MLP(nn.Module):
    """Features of f32[B, ...] inputs (flattened).

    Attributes:
      widths: hidden widths; the last is the number of features.
      norm: "none", "group" or "batch" before each activation.
      axis_name: see `Norm`.
    """

    widths: Sequence[int] = (64, 64)
    norm: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.Dense(width)(x)
            if self.norm != "none":
                x = Norm(self.norm, self.axis_name)(x, train=train)
            x = nn.relu(x)
        return x
