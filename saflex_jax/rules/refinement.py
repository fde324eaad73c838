"""A rule from scores: SAFLEX's pipeline, with any way of making targets of scores in it.

    scoring -> rule (update, targets), on a schedule

`Refinement(Scoring(), Posterior(run))` is SAFLEX; `Refinement(Scoring("identity", ""), Reweight())`
is learning to reweight.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from saflex_jax.core.steps import total
from saflex_jax.core.tree import identity, on_all, on_own
from saflex_jax.rules.base import needs_val
from saflex_jax.rules.schedule import Schedule
from saflex_jax.rules.scoring import Scored, Scoring
from saflex_jax.types import Batch, Metrics, Params, PyTree, Reduce, Streams, Targets


class ScoreRule(Protocol):
    """What makes targets of scores; fork `posterior.py`, `simplex.py` or `l2rw.py` for another."""

    def init(self) -> PyTree:
        """Arrays that the rule keeps between steps; () for none."""
        ...

    def update(self, arrays: PyTree, scored: Scored, streams: Streams, *, reduce: Reduce) -> PyTree:
        """The arrays after a scoring."""
        ...

    def targets(
        self, arrays: PyTree, scored: Scored | None, candidates: Batch, *, reduce: Reduce
    ) -> tuple[Targets, Metrics]:
        """Targets by the updated arrays; `scored` is None on a step between two scorings."""
        ...


class Refined(NamedTuple):
    """What a `Refinement` keeps between steps.

    Attributes:
      rule: the rule's arrays.
      gradient: of the validation loss, like the selected parameters; None where none is reused.
    """

    rule: PyTree
    gradient: Params | None


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Weights and soft labels from label scores; a `types.Rule`.

    Attributes:
      scoring: how scores are made.
      rule: what makes targets of them.
      schedule: when. Between two scorings the rule answers from what it remembers, or with the
        prior. The candidates' forward pass is made on all steps: it is the training step's own
        (not where that has another: BatchNorm, dropout, clean samples).
    """

    scoring: Scoring
    rule: ScoreRule
    schedule: Schedule = Schedule()

    def init(self, params):
        """See `types.Rule`."""
        return Refined(self.rule.init(), self.scoring.init(params))

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`.

        Raises:
          ValueError: no validation samples; shapes disagree.
        """
        needs_val(type(self.rule).__name__, streams.val)
        candidates = streams.candidates
        score = self.scoring.prepare(state, logits_fn, streams, reduce=reduce)

        def learn(arrays):
            turn = self.schedule.turn(state.step)
            scored, known, over, gradient, metrics = score(arrays.gradient, turn)
            kept = self.rule.update(arrays.rule, scored, known, reduce=over)
            targets, more = self.rule.targets(kept, scored, known.candidates, reduce=over)
            return on_all(targets, over), Refined(kept, gradient), metrics | more

        def between(arrays):
            targets, metrics = self.rule.targets(arrays.rule, None, candidates, reduce=reduce)
            return targets, arrays, metrics

        targets, arrays, metrics = self.schedule.run(state.step, candidates, learn, between, arrays)
        relabelled = jnp.argmax(on_own(targets.labels, reduce), -1) != jnp.argmax(
            candidates.labels, -1
        )
        metrics |= {
            "kept": total(targets.weights > 0, candidates.mask, reduce),
            "relabelled": total(relabelled, candidates.mask, reduce),
        }
        return targets, arrays, metrics
