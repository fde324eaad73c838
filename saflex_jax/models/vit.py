"""Vision transformer (Dosovitskiy et al., ICLR 2021), pre-norm, mean of tokens."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from saflex_jax import checks
from saflex_jax.models.feature_map import with_map
from saflex_jax.models.norm import LayerNorm, spread


class Block(nn.Module):
    """Attention and a two-layer perceptron, f32[B, T, D] -> f32[B, T, D], each added to its input.

    Attributes:
      heads: of the attention; must divide D.
      mlp_width: outputs of the perceptron's first layer.
      activation: of those outputs; it may return fewer, as `ft_transformer.reglu` does.
      norm_first: whether the attention sees normalised tokens, as the perceptron does.
      epsilon: of the normalisations.
      dtype: of matrix products; None = that of the inputs. Parameters are f32.

    Raises:
      ValueError: heads that do not divide D.
    """

    heads: int
    mlp_width: int
    activation: Callable[[jax.Array], jax.Array] = nn.gelu
    norm_first: bool = True
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, kept: int | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns the first `kept` tokens, which attend to all of x; None = all tokens.

        `mask` bool[1, 1, T, T] says which token (third axis) attends to which; None = all to all.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"width must be a multiple of {self.heads} heads; given {width}")
        seen = LayerNorm(self.epsilon, name="attention_norm")(x) if self.norm_first else x
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")
        x = x[:, :kept] + attention(seen[:, :kept], seen, mask=mask)
        hidden = LayerNorm(self.epsilon, name="mlp_norm")(x)
        hidden = nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(hidden)
        return x + nn.Dense(width, dtype=self.dtype, name="mlp_out")(self.activation(hidden))


class ViT(nn.Module):
    """Vision transformer, f32[B, H, W, C] -> f32[B, width]; by default ViT-S, 21 M parameters.

    Tokens are patches with learned positions; features are the mean of the tokens after the last
    normalisation (no class token). Without dropout, training and evaluation mode are the same.
    Called with `stage`, it also returns the tokens after that block as a feature map.

    >>> network = ViT(patch=4, width=64, depth=1, heads=1, mlp_width=64)
    >>> images = jnp.zeros((2, 8, 8, 3))
    >>> jax.eval_shape(
    ...     lambda: network.init_with_output(jax.random.key(0), images, train=False)[0]
    ... ).shape
    (2, 64)

    Attributes:
      patch: side of a patch in pixels; must divide H and W.
      width: D, of a token; a multiple of heads.
      depth: number of blocks.
      heads: of each attention.
      mlp_width: hidden width of each block's perceptron.
      remat: recompute each block's activations for its gradient: less memory for a third more work.
        Scores then need their own forward pass.

    Raises:
      ValueError: a size that does not divide.
    """

    patch: int = 4
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_width: int = 1536
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, stage: int | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        del train
        checks.images(inputs=x)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"inputs must have sides that are multiples of patch = {self.patch}; "
                f"given {x.shape[1]}x{x.shape[2]}"
            )
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", name="patches")(x)
        grid = x.shape
        x = x.reshape(len(x), -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = x + spread(positions, x.shape, 1, 2)
        maps, block = [], nn.remat(Block) if self.remat else Block
        for number in range(self.depth):
            x = block(self.heads, self.mlp_width, name=f"block_{number}")(x)
            maps.append(x.reshape(grid))
        return with_map(jnp.mean(LayerNorm(name="norm")(x), axis=1), maps, stage)
