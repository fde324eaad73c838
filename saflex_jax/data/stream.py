"""A shuffled, endless, resumable stream of aligned batches over arrays in memory.

Batch t is a function of (seed, t) alone: the position is one number, and every process count sees
the same global batches. Indices come from one NumPy permutation per epoch, since a per-sample
pipeline costs more than the step of a small model (docs/design.md); anything with the same three
methods, such as grain's iterators, can stand in its place.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from saflex_jax import checks
from saflex_jax.data.pool import Pool
from saflex_jax.types import Batch, Streams


class ArrayStream:
    """Streams of host batches: `next(stream)` gives this process's rows of the next global batch.

    Args:
      pools: Streams of whole data sets, each a Batch of N rows; all are shuffled separately.
      batch_size: global rows of candidates (and of clean samples).
      val_batch_size: global rows of validation samples; None = all of them.
      seed: of the order.
      generated: candidates of a generator, by the candidates' `index`: where a source has some, one
        of them, drawn uniformly by (seed, step, index) alone, takes the row's place, its inputs
        and its label; where it has none the row stays.
      process_index, process_count: which block of each global batch is this process's.

    Raises:
      ValueError: an empty or malformed pool; a batch size that the processes do not divide;
        generated candidates that do not fit the others.
    """

    def __init__(
        self,
        pools: Streams,
        *,
        batch_size: int,
        val_batch_size: int | None = None,
        seed: int,
        generated: Pool | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        checks.positive("batch_size", batch_size)
        if val_batch_size is not None:
            checks.positive("val_batch_size", val_batch_size)
        checks.streams(pools)
        sizes = {"candidates": batch_size, "clean": batch_size}
        if pools.val is not None:
            sizes["val"] = val_batch_size or len(pools.val.labels)
        for name, size in sizes.items():
            if size % process_count:
                raise ValueError(
                    f"the batch of {name} must be a multiple of {process_count} processes; "
                    f"given {size}"
                )
        if generated is not None:
            _fits(generated, pools.candidates)
        self._generated = generated
        self._pools, self._sizes, self._seed = pools, sizes, seed
        self._process = process_index, process_count
        self._step = 0
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # the current epoch's permutation

    def _order(self, name: str, number: int, epoch: int, size: int) -> np.ndarray:
        if self._orders.get(name, (None,))[0] != epoch:
            rng = np.random.default_rng((self._seed, number, epoch))
            self._orders[name] = epoch, rng.permutation(size)
        return self._orders[name][1]

    def _rows(self, name: str, number: int) -> Batch:
        pool, size = getattr(self._pools, name), self._sizes[name]
        index, count = self._process
        share = size // count
        epochs, places = np.divmod(
            self._step * size + index * share + np.arange(share), len(pool.labels)
        )
        rows = np.empty(share, np.int64)
        for epoch in np.unique(epochs):  # an epoch may end inside a batch
            here = epochs == epoch
            rows[here] = self._order(name, number, int(epoch), len(pool.labels))[places[here]]
        return jax.tree.map(lambda x: x[rows], pool)

    def _replaced(self, rows: Batch) -> Batch:
        """The rows, those whose source has generated candidates replaced by one of them."""
        counts = self._generated.draws(rows.index)
        # One number for every source, so that no row depends on which others are here.
        rng = np.random.default_rng((self._seed, len(Streams._fields), self._step))
        draws = (rng.random(len(self._generated))[rows.index] * counts).astype(np.int64)
        has = np.flatnonzero(counts)
        inputs, labels = np.array(rows.inputs), np.array(rows.labels)
        inputs[has], labels[has] = self._generated(rows.index[has], draws[has])
        return rows._replace(inputs=inputs, labels=labels)

    def __iter__(self) -> ArrayStream:
        return self

    def __next__(self) -> Streams:
        batch = Streams(
            *(
                None if getattr(self._pools, name) is None else self._rows(name, number)
                for number, name in enumerate(Streams._fields)
            )
        )
        if self._generated is not None:
            batch = batch._replace(candidates=self._replaced(batch.candidates))
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position."""
        self._step = int(state["step"])


def _fits(generated: Pool, candidates: Batch) -> None:
    """Raises unless generated candidates can stand in the place of the others."""
    inputs = candidates.inputs
    if not hasattr(inputs, "dtype") or inputs.dtype != np.float32:
        given = getattr(inputs, "dtype", type(inputs).__name__)
        raise ValueError(f"candidates.inputs must be float32, as generated is; given {given}")
    for name, found, wanted in (
        ("shape", generated.shape, inputs.shape[1:]),
        ("num_classes", generated.num_classes, candidates.labels.shape[1]),
    ):
        if found != wanted:
            raise ValueError(f"generated.{name} must be {wanted}; given {found}")
    if not 0 <= np.min(candidates.index) <= np.max(candidates.index) < len(generated):
        raise ValueError(
            f"candidates.index must lie in [0, {len(generated)}), the sources of generated; given "
            f"{np.min(candidates.index)} to {np.max(candidates.index)}"
        )
