"""Precomputed augmentations: a draw among the views of each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.augment.base import Augment, record, sample_keys
from saflex_jax.types import Batch


def view() -> Augment:
    """Draws one of the V views of each row, f[B, V, D] -> f[B, D]; first in a pipeline.

        x_i <- x_(i, v) ,   v uniform on {0, ..., V - 1}

    `data.from_features` reads such views: features of several augmentations of an image, computed
    once. Magnitude in the trace: v.

    >>> views = jnp.arange(12.0).reshape(2, 3, 2)
    >>> batch = Batch(views, jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> drawn = view()(jax.random.key(0), batch)
    >>> v = drawn.trace.magnitude[:, 0].astype(int)
    >>> bool((drawn.inputs == views[jnp.arange(2), v]).all())
    True

    Raises:
      ValueError: (when called) inputs without views.
    """

    def augment(key: jax.Array, batch: Batch) -> Batch:
        shape = None if isinstance(batch.inputs, dict) else np.shape(batch.inputs)
        if shape is None or len(shape) != 3:
            raise ValueError(f"view must have inputs [B, V, D]; given {shape or 'a dictionary'}")
        keys = sample_keys(key, batch)
        drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, shape[1]))(keys)
        inputs = jnp.take_along_axis(batch.inputs, drawn[:, None, None], 1)[:, 0]
        return record(batch._replace(inputs=inputs), "view", drawn)

    return augment
