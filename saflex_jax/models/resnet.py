"""ResNet-18 (He et al., CVPR 2016), CIFAR and ImageNet stems."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.models.feature_map import with_map
from saflex_jax.models.norm import Norm

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet18(nn.Module):
    """Basic-block ResNet, f32[B, H, W, C] -> f32[B, 8 * width]; 11.2 M parameters at width 64.

    Called with `stage`, it returns the feature map of that stage as well.

    Attributes:
      stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, max-pool).
      blocks: basic blocks per stage.
      width: channels of the first stage.
      norm: "group" or "batch".
      axis_name: see `Norm`.
    """

    stem: str = "cifar"
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    norm: str = "group"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, stage: int | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        checks.choice(("cifar", "imagenet"), stem=self.stem)

        def conv(width, size, stride, name=None):
            return nn.Conv(
                width,
                (size, size),
                stride,
                padding=size // 2,
                use_bias=False,
                kernel_init=_conv_init,
                name=name,
            )

        def norm(x):
            return Norm(self.norm, self.axis_name)(x, train=train)

        if self.stem == "cifar":
            x = nn.relu(norm(conv(self.width, 3, 1, name="stem")(x)))
        else:
            x = nn.relu(norm(conv(self.width, 7, 2, name="stem")(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        maps = []
        for number, count in enumerate(self.blocks):
            width = self.width * 2**number
            for block in range(count):
                stride = 2 if number > 0 and block == 0 else 1
                y = nn.relu(norm(conv(width, 3, stride)(x)))
                y = norm(conv(width, 3, 1)(y))
                if x.shape != y.shape:
                    x = norm(conv(width, 1, stride)(x))
                x = nn.relu(x + y)
            maps.append(x)
        return with_map(jnp.mean(x, axis=(1, 2)), maps, stage)
