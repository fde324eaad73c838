"""What a rule remembers of a source sample: an average over its visits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import memory
from saflex_jax.core.memory import Memory, TopMemory
from saflex_jax.types import Batch, Reduce, RunInfo


@dataclasses.dataclass(frozen=True)
class VisitMean:
    """Averages over a source sample's visits, keyed by `Batch.index` (`core.memory`).

    >>> VisitMean(decay=0.9, top=8).dtype
    'float32'

    Attributes:
      decay: in [0, 1), of the exponential average that follows a plain mean; 0 = the last visit;
        None = no memory.
      dtype: dtype of the averages, "float32" or "bfloat16".
      top: number of classes whose averages are kept per sample, the given label's and the largest;
        the others are kept as one sum. top = 8 takes 56 bytes per sample at any K. For beliefs
        only; None = all classes.
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
        if self.decay is None and (self.dtype, self.top) != ("float32", None):
            raise ValueError(f"dtype and top must be the defaults without a memory; given {self}")

    def init(self, run: RunInfo | None) -> Memory | TopMemory | None:
        """An empty memory; None if decay is None or the run is unknown.

        Args:
          run: what is known about the run.
        """
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
        """The memory after a visit of a batch.

        Args:
          kept: the memory so far.
          candidates: Batch of B.
          values: f32[B, K], what to average.
          rows: bool[B], rows to remember.
          reduce: mean over the data-parallel axis.
        """
        assert self.decay is not None  # or nothing is kept
        added, _ = memory.update(
            kept,
            candidates.index,
            values,
            rows,
            given=jnp.argmax(candidates.labels, axis=1).astype(jnp.int32),
            decay=self.decay,
            reduce=reduce,
        )
        return added
