"""Scoring: which parameters, along which direction, and how often with a fresh gradient.

    validation gradient -> direction -> scores                        (the algebra: `core.scores`)

`prepare` makes the candidates' forward pass outside of any branch, where XLA shares it with the
training step. The function that it returns turns a validation gradient into scores and may stand in
a branch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import curvature, scores
from saflex_jax.core.tree import Everywhere, identity, is_little, select, zeros
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
    """Scores of one batch, without gradient.

    >>> of_rows, of_val = jnp.zeros((4, 2)), jnp.zeros((3, 2))
    >>> Scored(of_rows, of_rows, of_val, jnp.ones(3, bool), True, 65.0).fresh
    True

    Attributes:
      scores: f32[B, K]; > 0 = a step on (x_i, k) lowers the validation loss.
      log_probs: f32[B, K], the network's, from the same forward pass.
      val_probs: f32[M, K], the network's on the validation samples; zeros where not `fresh`.
      val_mask: bool[M], False on padding among them.
      fresh: bool[], whether the validation gradient was computed on this step.
      features: f32[], number of inputs of the scored parameters: for each array the product of all
        axes but the last.
    """

    scores: jax.Array
    log_probs: jax.Array
    val_probs: jax.Array
    val_mask: jax.Array
    fresh: jax.Array | bool
    features: jax.Array | float


class Result(NamedTuple):
    """What one scoring hands to a rule.

    Attributes:
      scored: scores of the batch.
      streams: the same samples; where that is cheap, all but their inputs are replicated.
      reduce: mean over the data-parallel axis, for results of `scored` and `streams`.
      gradient: the gradient to keep; None if it is not reused.
      metrics: to log.
    """

    scored: Scored
    streams: Streams
    reduce: Reduce
    gradient: PyTree
    metrics: Metrics


# (kept gradient, number of scorings before this one) -> Result
Score = Callable[[PyTree, jax.Array], Result]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How to compute label scores from a validation gradient.

    >>> Scoring("neumann(5)", predicate="").val_every
    1

    Attributes:
      direction: a `directions.Direction`, or its text: "identity" (the paper's greedy step),
        "adam(b2=0.999)", "neumann(10, scale=0.1)", "cg(10, damping=0.1)".
      predicate: the scored parameters, as a predicate on paths or a path; "" = all. The default,
        the head, costs the validation samples' forward pass and products with features.
      mode: "jvp" or "finite_difference", see `core.scores.label_scores`.
      chunk: rows scored at a time, to bound memory along "identity" and "adam" (the others need
        the whole batch's pass); None = all at once.
      compute_dtype: dtype of both forward passes, see `core.scores.score`.
      val_every: compute a fresh validation gradient every `val_every` scorings; otherwise reuse the
        last.
      val_decay: in [0, 1), decay of an average of validation gradients (a plain mean at first); 0 =
        only the last.
    """

    direction: Direction | str = "cg"
    predicate: PathPredicate | str = "head"
    mode: scores.Mode = "jvp"
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
        """The gradient to keep, zeros like the selected parameters; None if it is not reused.

        Args:
          params: the network's parameters.
        """
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
        """The candidates' forward pass, and the function from a validation gradient to scores.

        Under jit on several devices, small results of both passes are gathered once and every
        device solves for the direction. Large ones stay split, and each product of the solver is
        summed over the devices.

        Args:
          state: TrainState.
          logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
          streams: candidates of B and validation samples of M.
          reduce: mean over the data-parallel axis.
        """
        of_trusted = checks.given(val=streams.val)
        scores.at_least_one(of_trusted.inputs)
        direction = self.direction
        if isinstance(direction, str):
            direction = directions.parse(direction)
        predicate = predicate_of(self.predicate)
        selected = select(state.params, predicate)
        arrays = jax.tree.leaves(selected)
        features = float(sum(math.prod(x.shape[:-1]) for x in arrays))
        network = scores.in_dtype(logits_fn, self.compute_dtype)
        linear = partial(curvature.linear_logits, network, state.params, predicate=predicate)
        of_val = linear(of_trusted.inputs) if self.val_every == 1 else None
        passes = linear(streams.candidates.inputs), of_val
        size = sum(x.size for x in arrays)
        (forward, val_forward), known, over = _on_all(passes, streams, reduce, size)
        candidates, val = known.candidates, known.val
        along = scores.scorer(
            network,
            state.params,
            candidates.inputs,
            mask=candidates.mask,
            predicate=predicate,
            solve=direction(state),
            mode=self.mode,
            chunk=self.chunk,
            forward=forward,
            reduce=over,
        )

        def fresh(kept, turn):
            of_val = linear(val.inputs) if val_forward is None else val_forward
            val_loss, gradient = scores.loss_gradient(
                of_val, selected, val.labels, mask=val.mask, reduce=over
            )
            if self.val_decay > 0:
                gradient = self._averaged(kept, gradient, turn)
            return gradient, jax.nn.softmax(of_val[0]), (val_loss, jnp.ones(()))

        def stale(kept, turn):
            _, *like = jax.eval_shape(fresh, kept, turn)
            return kept, *zeros(like)

        def score(kept, turn):
            if self.val_every == 1:
                is_fresh = True
                gradient, val_probs, val_loss = fresh(kept, turn)
            else:
                is_fresh = turn % self.val_every == 0
                gradient, val_probs, val_loss = jax.lax.cond(is_fresh, fresh, stale, kept, turn)
            gradient = jax.lax.stop_gradient(gradient)
            label_scores, log_probs, info = along(gradient)
            arrays = label_scores, log_probs, val_probs
            if isinstance(over, Everywhere):
                arrays, result = over.gather(arrays), (known, over)
            else:
                arrays, *result = _on_all(arrays, streams, reduce)
            of_val = checks.given(val=result[0].val)
            metrics = {"val_loss": val_loss}
            if info.residual is not None:
                metrics["solve_residual"] = info.residual, jnp.ones(())
            scored = Scored(*arrays, of_val.mask, is_fresh, features)
            scored, metrics = jax.lax.stop_gradient((scored, metrics))
            return Result(scored, *result, None if kept is None else gradient, metrics)

        return score

    def _averaged(self, kept: Params, gradient: Params, turn: jax.Array) -> Params:
        rate = jnp.maximum(1 - self.val_decay, 1 / (turn // self.val_every + 1))
        return jax.tree.map(lambda g, k: (k + rate * (g - k)).astype(k.dtype), gradient, kept)


def _on_all(
    arrays: PyTree, streams: Streams, reduce: Reduce, size: int = 0
) -> tuple[PyTree, Streams, Reduce]:
    """Arrays of rows, and what belongs to them, on every device under jit, where they are little.

    Args:
      arrays: with the rows of the candidates or the validation samples.
      streams: their inputs stay where they are.
      reduce: of the arrays as they are.
      size: unknowns of a system that is solved with them; 0 = none is.

    Returns:
      (arrays, streams, the `reduce` of what is made of them).
    """
    if not isinstance(reduce, Everywhere):
        return arrays, streams, reduce
    pair = streams.candidates, streams.val
    known = [checks.given(val=batch)._replace(inputs=()) for batch in pair]
    numbers = sum(x.size for x in jax.tree.leaves((arrays, known)))
    sizes = [len(batch.mask) for batch in known]
    if not is_little(numbers, rows=sum(sizes), size=size):
        return arrays, streams, identity
    arrays, known = reduce.gather_rows((arrays, known), set(sizes))
    known = [batch._replace(inputs=own.inputs) for batch, own in zip(known, pair) if own]
    return arrays, streams._replace(candidates=known[0], val=known[1]), reduce
