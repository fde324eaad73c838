"""A convolutional network small enough to train on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.models.feature_map import with_map
from saflex_jax.models.norm import Norm


class SmallCNN(nn.Module):
    """3x3 convolutions, stride 2 between stages, global mean: f32[B, H, W, C] -> f32[B, D].

    Called with `stage`, it also returns that stage's feature map.

    >>> import jax
    >>> network, images = SmallCNN(), jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(
    ...     lambda: network.init_with_output(jax.random.key(0), images, train=False)[0]
    ... ).shape
    (2, 32)

    Attributes:
      widths: channels of the stages; the last is the number of features.
      norm: "group" or "batch".
      axis_name: see `Norm`.

    Raises:
      ValueError: inputs that are not images.
    """

    widths: Sequence[int] = (16, 32)
    norm: str = "group"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, stage: int | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        checks.images(inputs=x)
        maps = []
        for number, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if number == 0 else 2, use_bias=False)(x)
            x = nn.relu(Norm(self.norm, self.axis_name)(x, train=train))
            maps.append(x)
        return with_map(jnp.mean(x, axis=(1, 2)), maps, stage)
