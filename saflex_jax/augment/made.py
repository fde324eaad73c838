"""The origin of a pool's candidates, as a trace by which rules and reports group them.

Columns are "candidate" (index in the pool), "prompt" and "generator" (indices in their lists),
"strength", and "flagged" (1 if the candidate failed a filter). A row that is not a candidate has
the identity in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.augment.base import OPERATIONS, _check_operation
from saflex_jax.types import Batch, Trace

MADE = ("candidate", "prompt", "strength", "generator", "flagged")


def candidate_trace(columns: Mapping[str, np.ndarray], index: np.ndarray) -> Trace:
    """The trace of candidates from columns f[T], NaN where a column does not apply.

    >>> trace = candidate_trace({"prompt": np.array([2.0, np.nan])}, np.array([5, 6]))
    >>> [OPERATIONS[place] for place in trace.operation[:, 0]]
    ['prompt', 'identity']

    Args:
      columns: name of OPERATIONS -> values; indices must be below 2^24.
      index: i[T], the sample of each row.

    Returns:
      Arrays [T, L], a column for each name.

    Raises:
      ValueError: a name that is not in OPERATIONS.
    """
    _check_operation(**{f"column {name}": name for name in columns})
    magnitude = np.stack([np.asarray(v, np.float32) for v in columns.values()], 1)
    known = ~np.isnan(magnitude)
    operation = np.where(known, [OPERATIONS.index(name) for name in columns], 0)
    partner = np.repeat(np.asarray(index, np.int32)[:, None], len(columns), 1)
    return Trace(operation.astype(np.int32), np.where(known, magnitude, 0), partner)


def groups(batch: Batch, name: str) -> jax.Array:
    """One column of the trace as groups for `core.pooled`, i32[B]; -1 = no group.

        g_i = magnitude of operation `name` in row i

    >>> trace = candidate_trace({"prompt": np.array([2.0, np.nan])}, np.array([5, 6]))
    >>> rows = np.arange(2)
    >>> groups(Batch(np.zeros((2, 3)), np.eye(2), rows >= 0, rows, trace), "prompt").tolist()
    [2, -1]

    Args:
      batch: B rows, with a trace.
      name: of OPERATIONS.

    Raises:
      ValueError: a batch without a trace, or a name that is not in OPERATIONS.
    """
    _check_operation(name=name)
    if batch.trace is None:
        raise ValueError("batch must have a trace; its rows are of no pool with one")
    here = jnp.asarray(batch.trace.operation) == OPERATIONS.index(name)
    value = jnp.max(jnp.where(here, batch.trace.magnitude, -1.0), axis=1)
    return value.astype(jnp.int32)
