"""From row numbers of a data set to the batch of a step; one definition for host and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.types import Batch, PyTree, Streams

# A product: XLA compiles a quotient by a constant to another rounding than NumPy's.
LEVEL = np.float32(1 / 255)


def floats(inputs: PyTree) -> PyTree:
    """8-bit levels as f32 in [0, 1]; other leaves stay.

        uint8 x -> x * f32(1 / 255)

    NumPy and compiled JAX give the same bits.

    >>> floats(np.uint8([0, 51, 255])).round(6).tolist()
    [0.0, 0.20000000298023224, 1.0]

    Args:
      inputs: pytree of arrays.
    """
    return jax.tree.map(lambda x: x.astype("float32") * LEVEL if x.dtype == "uint8" else x, inputs)


def take(pools: Streams, rows: Streams) -> Streams:
    """The batch of these rows, with 8-bit inputs as floats; for NumPy and traced arrays.

    >>> pool = Batch(np.float32([5, 6, 7]), np.eye(3), np.ones(3, bool), np.arange(3))
    >>> take(Streams(pool), Streams(np.array([2, 0]))).candidates.inputs.tolist()
    [7.0, 5.0]

    Args:
      pools: whole data sets, a Batch of N rows each, or None.
      rows: row numbers i[B] in [0, N) of each; not checked when traced. -1 is padding: any sample,
        masked.
    """

    def gather(pool: Batch, places):
        batch = jax.tree.map(lambda x: x[places], pool)
        return batch._replace(inputs=floats(batch.inputs), mask=batch.mask & (places >= 0))

    return Streams(*(None if p is None else gather(p, i) for p, i in zip(pools, rows)))


def padded(streams: Streams, multiple: int) -> Streams:
    """The host's batch, padded with masked rows to sizes that divide.

    >>> padded(Streams(np.array([5, 6, 7])), 2).candidates.tolist()
    [5, 6, 7, -1]

    Args:
      streams: row numbers i[B] of data sets, or samples.
      multiple: the divisor of all resulting sizes.
    """

    def pad(part: Any):
        if part is None:
            return None
        is_batch = isinstance(part, Batch)
        missing = -len(part.mask if is_batch else part) % multiple
        if missing == 0:
            return part
        if not is_batch:
            return np.append(part, np.full(missing, -1, part.dtype))
        more = jax.tree.map(lambda x: np.append(x, np.repeat(x[-1:], missing, 0), 0), part)
        return more._replace(mask=np.append(part.mask, np.zeros(missing, bool)))

    return Streams(*map(pad, streams))


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of one structure along a new leading axis; NumPy in, NumPy out.

    >>> stack([{"x": np.zeros(3)}, {"x": np.ones(3)}])["x"].shape
    (2, 3)

    Args:
      trees: of one structure.

    Raises:
      ValueError: the trees' leaves differ in shape; names the leaf.
    """

    def joined(path, *leaves):
        shapes = sorted({np.shape(leaf) for leaf in leaves})
        if len(shapes) > 1:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} must have one shape in all members; given {shapes}")
        on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        return (jnp if on_device else np).stack(leaves)

    return jax.tree_util.tree_map_with_path(joined, *trees)
