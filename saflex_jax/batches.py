"""From rows of a data set to what a step trains on; one definition for the host and the device."""

from __future__ import annotations

import jax
import numpy as np

from saflex_jax.types import Batch, PyTree, Streams

# A product: XLA compiles a quotient by a constant to another rounding than NumPy's.
LEVEL = np.float32(1 / 255)


def floats(inputs: PyTree) -> PyTree:
    """8-bit levels as f32 in [0, 1]; other leaves stay as they are.

        uint8 x -> x * f32(1 / 255)

    The same bits in NumPy and in compiled JAX.
    """
    return jax.tree.map(lambda x: x.astype("float32") * LEVEL if x.dtype == "uint8" else x, inputs)


def take(pools: Streams, rows: Streams) -> Streams:
    """The batch of these rows, 8-bit inputs as floats; NumPy in, NumPy out, and the same traced.

    Args:
      pools: whole data sets, a Batch of N rows each, or None.
      rows: for each of them i[B] in [0, N); not checked where traced.
    """

    def gather(pool: Batch, places):
        batch = jax.tree.map(lambda x: x[places], pool)
        return batch._replace(inputs=floats(batch.inputs))

    return Streams(*(None if p is None else gather(p, i) for p, i in zip(pools, rows)))
