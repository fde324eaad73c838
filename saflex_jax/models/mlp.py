"""Multi-layer perceptron for tables."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.models.columns import columns
from saflex_jax.models.norm import Norm
from saflex_jax.types import PyTree


class MLP(nn.Module):
    """Features f32[B, D] of inputs f32[B, ...] (flattened) or of a table with categories.

    A table with categories is {"numeric": f32[B, D], "categorical": codes i32[B, E]}; codes enter
    one-hot. A code out of range, such as a missing value's, enters as zeros.

    >>> features, _ = MLP((8,)).init_with_output(jax.random.key(0), jnp.zeros((1, 4)), train=False)
    >>> features.shape
    (1, 8)

    Attributes:
      widths: hidden widths; the last is the number of features.
      categories: number of categories of each categorical column; () for inputs that are one array.
      norm: "none", "group" or "batch" before each activation.
      axis_name: see `Norm`.

    Raises:
      ValueError: inputs that are not such a table, or other categorical columns than `categories`.
    """

    widths: Sequence[int] = (64, 64)
    categories: Sequence[int] = ()
    norm: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: PyTree, *, train: bool) -> jax.Array:
        if isinstance(x, jax.Array | np.ndarray) and not self.categories:
            x = x.reshape(x.shape[0], -1)
        else:
            numeric, codes = columns(x, self.categories)
            coded = [jax.nn.one_hot(codes[:, n], size) for n, size in enumerate(self.categories)]
            x = jnp.concatenate([numeric, *coded], axis=1)
        for width in self.widths:
            x = nn.Dense(width)(x)
            if self.norm != "none":
                x = Norm(self.norm, self.axis_name)(x, train=train)
            x = nn.relu(x)
        return x
