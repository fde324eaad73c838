"""The columns of a table, as networks read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from saflex_jax import checks
from saflex_jax.types import PyTree


def columns(inputs: PyTree, categories: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A table's numbers f32[B, D] and codes i32[B, E].

    Args:
      inputs: f32[B, D], or {"numeric": f32[B, D], "categorical": codes i32[B, E]}.
      categories: number of categories of each categorical column.

    Raises:
      ValueError: inputs that are not such a table, or E columns other than `categories`.
    """
    table = inputs if isinstance(inputs, Mapping) else {"numeric": inputs}
    checks.known("inputs", table, ("numeric", "categorical"))
    numeric = _matrix("numeric", table.get("numeric"))
    none = np.zeros((len(numeric), 0), np.int32)
    codes = _matrix("categorical", table.get("categorical", none))
    if codes.shape[1] != len(categories):
        raise ValueError(f"categories must name {codes.shape[1]} columns; given {len(categories)}")
    return numeric, codes


def _matrix(name: str, x: PyTree) -> jax.Array:
    array = isinstance(x, jax.Array | np.ndarray)
    if not array or x.ndim != 2:
        given = f"shape {list(x.shape)}" if array else type(x).__name__
        raise ValueError(f"{name} inputs must be a table [B, D]; given {given}")
    return x
