"""What a rule remembers of a source sample: an average over its visits."""

from __future__ import annotations

import dataclasses

import jax

from saflex_jax import checks
from saflex_jax.core import memory
from saflex_jax.core.memory import Memory
from saflex_jax.types import Batch, Reduce, RunInfo


@dataclasses.dataclass(frozen=True)
class VisitMean:
    """Averages over a source sample's visits, keyed by `Batch.index` (`core.memory`).

    Attributes:
      decay: in [0, 1), of the exponential average that follows a plain mean; 0 = the last visit;
        None = nothing is remembered.
      dtype: of the averages, "float32" or "bfloat16".
    """

    decay: float | None = 0.97
    dtype: str = "float32"

    def __post_init__(self):
        checks.choice(memory.DTYPES, dtype=self.dtype)
        if self.decay is not None:
            checks.decay(decay=self.decay)

    def init(self, run: RunInfo | None) -> Memory | None:
        """An empty memory; None where nothing is remembered or the run is unknown."""
        if self.decay is None or run is None:
            return None
        return memory.init(run.num_samples, run.num_classes, dtype=self.dtype)

    def add(
        self, kept: Memory, candidates: Batch, values: jax.Array, rows: jax.Array, reduce: Reduce
    ) -> Memory:
        """The memory after a visit of the batch's `rows` bool[B], with `values` f32[B, K]."""
        added, _ = memory.update(
            kept, candidates.index, values, rows, decay=self.decay, reduce=reduce
        )
        return added
