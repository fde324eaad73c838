"""What a rule remembers of a source sample: an average over its visits."""

from __future__ import annotations

import dataclasses

import jax

from saflex_jax import checks
from saflex_jax.core import memory
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.types import Batch, Reduce, RunInfo


@dataclasses.dataclass(frozen=True)
class VisitMean:
    """Averages over a source sample's visits, keyed by `Batch.index` (`core.memory`).

    Attributes:
      decay: in [0, 1), of the exponential average that follows a plain mean; 0 = the last visit;
        None = nothing is remembered.
      dtype: of the averages, "float32" or "bfloat16".
      top: how many classes' averages are kept of a sample, the largest, with the sum of the others
        as one number: 8 are 56 bytes a sample whatever K. Of beliefs alone; None = all.
    """

    decay: float | None = 0.97
    dtype: str = "float32"
    top: int | None = None

    def __post_init__(self):
        checks.choice(memory.DTYPES, dtype=self.dtype)
        if self.decay is not None:
            checks.decay(decay=self.decay)
        if self.top is not None:
            checks.whole(1, top=self.top)

    def init(self, run: RunInfo | None) -> Memory | TopMemory | None:
        """An empty memory; None where nothing is remembered or the run is unknown."""
        if self.decay is None or run is None:
            return None
        return memory.init(run.num_samples, run.num_classes, dtype=self.dtype, top=self.top)

    def add(
        self,
        kept: Memory | TopMemory,
        candidates: Batch,
        values: jax.Array,
        rows: jax.Array,
        reduce: Reduce,
    ) -> Memory | TopMemory:
        """The memory after a visit of the batch's `rows` bool[B], with `values` f32[B, K]."""
        assert self.decay is not None  # or nothing is kept
        added, _ = memory.update(
            kept, candidates.index, values, rows, decay=self.decay, reduce=reduce
        )
        return added
