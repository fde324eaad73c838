"""Scoring: which parameters scores see, along which direction, how often a gradient is fresh.

    validation gradient -> direction -> scores                        (the algebra: `core.scores`)

In two halves. `prepare` makes the candidates' forward pass, which is the training step's own and
which XLA shares only outside of branches. What it returns turns a validation gradient into
scores and may stand in a branch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import scores
from saflex_jax.core.tree import identity, select
from saflex_jax.rules import directions
from saflex_jax.rules.base import predicate_of
from saflex_jax.rules.directions import Direction
from saflex_jax.types import (
    LogitsFn,
    Metrics,
    Params,
    PathPredicate,
    PyTree,
    Reduce,
    Streams,
    TrainState,
)


class Scored(NamedTuple):
    """One scoring of a batch, without gradient.

    Attributes:
      scores: f32[B, K]; > 0 = a step on (x_i, k) lowers the validation loss.
      log_probs: f32[B, K], the network's, of the same forward pass.
      val_probs: f32[M, K], the network's on the validation samples; zeros where not `fresh`.
      fresh: bool[], whether the validation gradient is of this step.
      features: f32[], inputs of the parameters that scores see: of each array the product of all
        axes but the last.
    """

    scores: jax.Array
    log_probs: jax.Array
    val_probs: jax.Array
    fresh: jax.Array | bool
    features: jax.Array | float


# (kept gradient, number of scorings before this one) -> (Scored, gradient to keep, metrics)
Score = Callable[[PyTree, jax.Array], tuple[Scored, PyTree, Metrics]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How label scores are made of a validation gradient.

    Attributes:
      direction: a `directions.Direction`, or its text: "identity" (the paper's greedy step),
        "adam(b2=0.999)", "neumann(10, scale=0.1)", "cg(10, damping=0.1)".
      predicate: the parameters that scores see, as a predicate on paths or a path; "" = all. The
        default, the head, costs one more forward pass (the validation samples') and products with
        features.
      mode: "jvp" or "finite_difference", see `core.scores.label_scores`.
      chunk: rows scored at a time, to bound memory; None = all at once.
      compute_dtype: of both forward passes, see `core.scores.score`.
      val_every: compute a fresh validation gradient every `val_every` scorings; otherwise reuse the
        last.
      val_decay: in [0, 1); average validation gradients, first plainly and then exponentially;
        0 = the last one alone.
    """

    direction: Direction | str = "cg"
    predicate: PathPredicate | str = "head"
    mode: str = "jvp"
    chunk: int | None = None
    compute_dtype: str | None = None
    val_every: int = 1
    val_decay: float = 0.0

    def __post_init__(self):
        scores.check(self.mode, self.compute_dtype)
        if self.chunk is not None:
            checks.whole(1, chunk=self.chunk)
        checks.whole(1, val_every=self.val_every)
        checks.decay(val_decay=self.val_decay)
        if isinstance(self.direction, str):
            directions.parse(self.direction)

    def init(self, params: Params) -> PyTree:
        """The gradient to keep, zeros like the selected parameters; None where none is reused."""
        if self.val_every == 1 and self.val_decay == 0:
            return None
        return jax.tree.map(jnp.zeros_like, select(params, predicate_of(self.predicate)))

    def prepare(
        self,
        state: TrainState,
        logits_fn: LogitsFn,
        streams: Streams,
        *,
        reduce: Reduce = identity,
    ) -> Score:
        """The candidates' forward pass, and what scores them along a validation gradient.

        Args:
          state: TrainState.
          logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
          streams: candidates of B and validation samples of M.
          reduce: mean over the data-parallel axis.
        """
        candidates, val = streams.candidates, streams.val
        direction = self.direction
        if isinstance(direction, str):
            direction = directions.parse(direction)
        predicate = predicate_of(self.predicate)
        seen = jax.tree.leaves(select(state.params, predicate))
        features = float(sum(math.prod(x.shape[:-1]) for x in seen))
        network = scores.in_dtype(logits_fn, self.compute_dtype)
        along = scores.scorer(
            network,
            state.params,
            candidates.inputs,
            mask=candidates.mask,
            predicate=predicate,
            solve=direction(state),
            mode=self.mode,
            chunk=self.chunk,
            reduce=reduce,
        )

        def fresh(kept, turn):
            val_loss, gradient = scores.validation_gradient(
                network,
                state.params,
                val.inputs,
                val.labels,
                mask=val.mask,
                predicate=predicate,
                reduce=reduce,
            )
            if self.val_decay > 0:
                gradient = self._averaged(kept, gradient, turn)
            # The forward pass is the gradient's own.
            val_probs = jax.nn.softmax(network(state.params, val.inputs))
            return gradient, val_probs, (val_loss, jnp.ones(()))

        def stale(kept, turn):
            del turn
            return kept, jnp.zeros_like(val.labels), (jnp.zeros(()), jnp.zeros(()))

        def score(kept, turn):
            if self.val_every == 1:
                is_fresh = True
                gradient, val_probs, val_loss = fresh(kept, turn)
            else:
                is_fresh = turn % self.val_every == 0
                gradient, val_probs, val_loss = jax.lax.cond(is_fresh, fresh, stale, kept, turn)
            gradient = jax.lax.stop_gradient(gradient)
            label_scores, log_probs, info = along(gradient)
            metrics = {"val_loss": val_loss}
            if info.residual is not None:
                metrics["solve_residual"] = info.residual, jnp.ones(())
            scored = Scored(label_scores, log_probs, val_probs, is_fresh, features)
            scored, metrics = jax.lax.stop_gradient((scored, metrics))
            return scored, None if kept is None else gradient, metrics

        return score

    def _averaged(self, kept: Params, gradient: Params, turn: jax.Array) -> Params:
        rate = jnp.maximum(1 - self.val_decay, 1 / (turn // self.val_every + 1))
        return jax.tree.map(lambda g, k: (k + rate * (g - k)).astype(k.dtype), gradient, kept)
