"""FT-Transformer for tables: every column is a token."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.models.columns import columns
from saflex_jax.models.norm import LayerNorm, spread
from saflex_jax.models.vit import Block
from saflex_jax.types import PyTree


def reglu(x: jax.Array) -> jax.Array:
    """f32[..., 2 H] -> f32[..., H]: a relu(b) of the halves (a, b).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    a, b = jnp.split(x, 2, axis=-1)
    return a * nn.relu(b)


class Tokens(nn.Module):
    """The tokens f32[B, 1 + D + E, width] of D numeric and E categorical columns.

        T_0 = t,   T_j = x_j w_j + b_j,   T_j = W_j[c_j] + b_j

    A code out of range, such as a missing value's, gives b_j. All parameters start as
    uniform(-1/sqrt(width), 1/sqrt(width)).

    Attributes:
      width: of a token.
      categories: number of categories of each categorical column.

    Source: Gorishniy et al. 2021, section 3.3, "Feature Tokenizer".
    """

    width: int
    categories: Sequence[int]

    @nn.compact
    def __call__(self, numeric: jax.Array, codes: jax.Array) -> jax.Array:
        bound = self.width**-0.5

        def vectors(name, number):
            def uniform(key, shape):
                return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

            return self.param(name, uniform, (number, self.width))

        rows, number = numeric.shape
        columns = []
        if number:
            shape = (rows, number, self.width)
            weights = vectors("numeric", number)
            columns.append(spread(numeric, shape, 0, 1) * spread(weights, shape, 1, 2))
        for n, size in enumerate(self.categories):
            table = vectors(f"category_{n}", size)
            token = jax.nn.one_hot(codes[:, n], size, dtype=table.dtype) @ table
            columns.append(spread(token, (rows, 1, self.width), 0, 2))
        columns = jnp.concatenate(columns, axis=1)
        columns = columns + spread(vectors("bias", columns.shape[1]), columns.shape, 1, 2)
        first = spread(vectors("cls", 1), (rows, 1, self.width), 1, 2)
        return jnp.concatenate([first, columns], axis=1)


class FTTransformer(nn.Module):
    """Features f32[B, width] of a table: a transformer over its columns and a class token.

        features = relu(norm(T_0)), T_0 the class token after the last block

    A table is f32[B, D], or with categories {"numeric": f32[B, D], "categorical": codes
    i32[B, E]}. Blocks are pre-norm, the first without its first normalisation; the last computes
    only the class token. Without dropout (the paper uses .2 in attention and .1 in perceptrons),
    training and evaluation mode are the same and rows are independent. Default sizes are the
    paper's; the blocks are initialised as in `ViT`.

    >>> network = FTTransformer(width=64, depth=1, heads=1, mlp_width=64)
    >>> table = jnp.zeros((2, 5))
    >>> jax.eval_shape(
    ...     lambda: network.init_with_output(jax.random.key(0), table, train=False)[0]
    ... ).shape
    (2, 64)

    Attributes:
      width: of a token; a multiple of heads.
      depth: number of blocks.
      heads: of each attention.
      mlp_width: hidden width of each block's perceptron, after ReGLU; the paper's is 4/3 width.
      categories: number of categories of each categorical column; () for inputs that are one array.

    Raises:
      ValueError: sizes below 1, heads that do not divide the width; inputs that are not a table,
        have no columns, or have other categorical columns than `categories`.

    Source: Gorishniy et al., "Revisiting Deep Learning Models for Tabular Data", NeurIPS 2021,
    section 3.3; the repository yandex-research/rtdl.
    """

    width: int = 192
    depth: int = 3
    heads: int = 8
    mlp_width: int = 256
    categories: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: PyTree, *, train: bool) -> jax.Array:
        del train
        checks.whole(
            1, width=self.width, depth=self.depth, heads=self.heads, mlp_width=self.mlp_width
        )
        numeric, codes = columns(x, self.categories)
        if not numeric.shape[1] + codes.shape[1]:
            raise ValueError("inputs must have at least one column; given 0")
        x = Tokens(self.width, self.categories, name="tokens")(numeric, codes)
        for number in range(self.depth):
            last = number == self.depth - 1
            block = Block(self.heads, 2 * self.mlp_width, reglu, number > 0, name=f"block_{number}")
            x = block(x, kept=1 if last else None)
        return nn.relu(LayerNorm(name="norm")(x)[:, 0])
