"""A rule from scores: SAFLEX's pipeline, with any rule that turns scores into targets.

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
    """Turns scores into targets; fork `posterior.py`, `simplex.py` or `l2rw.py` to write one.

    >>> from saflex_jax.rules.l2rw import Reweight
    >>> rule: ScoreRule = Reweight()
    """

    def init(self) -> PyTree:
        """Arrays that the rule keeps between steps; () for none."""
        ...

    def update(self, arrays: PyTree, scored: Scored, streams: Streams, *, reduce: Reduce) -> PyTree:
        """The arrays after a scoring.

        Args:
          arrays: what `init` or the last update returned.
          scored: this step's scores.
          streams: candidates of B and validation samples of M.
          reduce: mean over the data-parallel axis.
        """
        ...

    def targets(
        self, arrays: PyTree, scored: Scored | None, candidates: Batch, *, reduce: Reduce
    ) -> tuple[Targets, Metrics]:
        """Targets from the updated arrays, and metrics to log.

        Args:
          arrays: what `update` returned.
          scored: this step's scores; None on a step without a scoring.
          candidates: Batch of B.
          reduce: mean over the data-parallel axis.
        """
        ...


class Refined(NamedTuple):
    """What a `Refinement` keeps between steps.

    Attributes:
      rule: the rule's arrays.
      gradient: of the validation loss, like the selected parameters; None if it is not reused.
    """

    rule: PyTree
    gradient: Params | None


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Weights and soft labels from label scores; a `types.Rule`.

    >>> from saflex_jax.rules import Posterior
    >>> rule = Refinement(Scoring("cg(20)"), Posterior(), Schedule(every=2))

    Attributes:
      scoring: how to compute scores.
      rule: turns scores into targets.
      schedule: when to score. On the other steps the rule uses its memory or the prior. The
        candidates' forward pass runs on every step. It is the training step's own, unless that
        differs (BatchNorm, dropout, clean samples).
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
