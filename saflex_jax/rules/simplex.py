"""The paper's rule: weights and labels in closed form from scores (`core.targets`).

Source: Ding et al., "SAFLEX: Self-Adaptive Augmentation via Feature Label EXtrapolation",
ICLR 2024, section 4.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from saflex_jax.core import memory, parents, targets
from saflex_jax.rules.visits import VisitMean
from saflex_jax.types import Batch, Reduce, RunInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Simplex:
    """Weights and labels in closed form from scores; a `refinement.ScoreRule`.

    >>> Simplex(tolerance=0.0, learn="weights").temperature
    0.3

    Attributes:
      prior_strength, temperature, tolerance: see `core.targets.solve_targets`.
      scale, learn, anchor: see `core.targets.solve_targets`.
      run: what is known about the run, for the memory.
      memory: averages scores over a sample's visits; none by default. Needs `run`. Mixed rows are
        not remembered; their parents' scores are mixed as the labels are (`core.parents`).

    Raises:
      ValueError: a value out of range, or a memory without a run.
    """

    prior_strength: float = 3.0
    temperature: float = 0.3
    tolerance: float = 0.25
    scale: str = "rms"
    learn: str = "both"
    anchor: str = "linear"
    run: RunInfo | None = None
    memory: VisitMean = VisitMean(decay=None)

    def __post_init__(self):
        targets.check(**self._options())
        if self.run is None and self.memory.decay is not None:
            raise ValueError(f"memory needs run, for the number of samples; given {self.memory}")
        if self.memory.decay is not None and self.scale == "raw":
            raise ValueError("scale must be 'rms' with a memory, of scaled scores; given 'raw'")

    def _options(self) -> dict:
        return dict(
            prior_strength=self.prior_strength,
            temperature=self.temperature,
            tolerance=self.tolerance,
            scale=self.scale,
            learn=self.learn,
            anchor=self.anchor,
        )

    def init(self):
        """The memory; None without one.

        Raises:
          ValueError: a memory that keeps only some classes, which is for beliefs.
        """
        if self.memory.top is not None:
            raise ValueError(f"memory.top must be None, scores are signed; given {self.memory}")
        return self.memory.init(self.run)

    def update(self, arrays, scored, streams, *, reduce):
        """Remembers the scores of whole rows, divided by their root mean square."""
        if arrays is None:
            return None
        candidates = streams.candidates
        rows = candidates.mask & parents.is_whole(candidates)
        return self.memory.add(arrays, candidates, _visit(scored, candidates, reduce), rows, reduce)

    def targets(self, arrays, scored, candidates, *, reduce):
        """`solve_targets` of the remembered scores or of this step's; else the prior."""
        if arrays is None and scored is None:
            return targets.prior_targets(candidates.labels, candidates.mask), {}
        solve = partial(
            targets.solve_targets, prior=candidates.labels, mask=candidates.mask, reduce=reduce
        )
        if arrays is None:
            return solve(scored.scores, **self._options()), {}
        unseen = jnp.zeros_like(candidates.labels)
        visit = unseen if scored is None else _visit(scored, candidates, reduce)
        scores = parents.mixture(candidates, partial(memory.recall, arrays), visit)
        known = jnp.any(scores != 0, axis=-1) | (scored is not None)
        # Rows of which nothing is known neither enter the scale nor move.
        scale = targets.score_scale(scores, candidates.mask & known, reduce=reduce)
        learned = solve(scores / scale, **self._options() | {"scale": "raw"})
        labels = jnp.where(known[:, None], learned.labels, candidates.labels)
        return learned._replace(labels=labels), {}


def _visit(scored, candidates: Batch, reduce: Reduce) -> jax.Array:
    """This visit's scores, f32[B, K]; raw ones shrink as training goes on: no average of them."""
    return scored.scores / targets.score_scale(scored.scores, candidates.mask, reduce=reduce)
