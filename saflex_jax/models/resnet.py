"""ResNets (He et al., CVPR 2016), CIFAR and ImageNet stems; torchvision's with the latter."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.models.feature_map import with_map
from saflex_jax.models.norm import Norm

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(nn.Module):
    """Residual network, f32[B, H, W, C] -> f32[B, D]; D is the channels of the last stage.

    With stem="imagenet" and norm="batch" it is torchvision's network without its last layer, for
    `pretrained.from_torchvision`. Called with `stage`, it also returns that stage's feature map.

    >>> network, images = ResNet(blocks=(1, 1), width=8), jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(
    ...     lambda: network.init_with_output(jax.random.key(0), images, train=False)[0]
    ... ).shape
    (2, 16)

    Attributes:
      stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, max-pool).
      blocks: residual blocks per stage.
      width: channels inside the blocks of the first stage; each stage doubles them.
      norm: "group", "batch" or "frozen"; see `Norm`.
      axis_name: see `Norm`.
      bottleneck: whether a block is 1x1, 3x3 (with the stride), 1x1 to 4 times the channels,
        instead of 3x3, 3x3.

    Raises:
      ValueError: an unknown name; inputs that are not images.
    """

    stem: str = "cifar"
    blocks: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    norm: str = "group"
    axis_name: str | None = None
    bottleneck: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, stage: int | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        checks.choice(("cifar", "imagenet"), stem=self.stem)
        checks.images(inputs=x)

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
                if self.bottleneck:
                    y = nn.relu(norm(conv(width, 1, 1)(x)))
                    y = nn.relu(norm(conv(width, 3, stride)(y)))
                    y = norm(conv(4 * width, 1, 1)(y))
                else:
                    y = nn.relu(norm(conv(width, 3, stride)(x)))
                    y = norm(conv(width, 3, 1)(y))
                if x.shape != y.shape:
                    x = norm(conv(y.shape[-1], 1, stride)(x))
                x = nn.relu(x + y)
            maps.append(x)
        return with_map(jnp.mean(x, axis=(1, 2)), maps, stage)


class ResNet18(ResNet):
    """`ResNet` of 8 basic blocks, f32[B, H, W, C] -> f32[B, 8 * width]; 11.2 M at width 64.

    >>> ResNet18(norm="batch").blocks
    (2, 2, 2, 2)

    Attributes:
      stem, blocks, width, norm, axis_name, bottleneck: see `ResNet`.
    """


class ResNet50(ResNet):
    """`ResNet` of 16 bottlenecks, f32[B, H, W, C] -> f32[B, 32 * width]; 23.5 M at width 64.

    >>> ResNet50().blocks
    (3, 4, 6, 3)

    Attributes:
      stem, blocks, width, norm, axis_name, bottleneck: see `ResNet`.
    """

    blocks: Sequence[int] = (3, 4, 6, 3)
    bottleneck: bool = True
