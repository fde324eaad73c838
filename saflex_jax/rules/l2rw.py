"""Learning to reweight: a sample's weight is how much a step on it lowers the validation loss.

Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.targets import prior_targets, rescale
from saflex_jax.core.tree import identity
from saflex_jax.rules.base import RuleSpec
from saflex_jax.rules.refinement import Refinement
from saflex_jax.rules.scoring import Scoring
from saflex_jax.types import Reduce, Targets


def reweight(
    scores: jax.Array, prior: jax.Array, *, mask: jax.Array, reduce: Reduce = identity
) -> Targets:
    """Weights proportional to the positive part of the prior label's score; labels are the prior.

        u_i = <q_i, S_i> ,   w_i = max(u_i, 0) / mean_j max(u_j, 0)   (all zero: the term vanishes)

    Args:
      scores: S, f32[B, K]; > 0 = lowers the validation loss.
      prior: q, f32[B, K].
      mask: bool[B]; False rows get weight 0.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient; the utility is u. A score that is not finite gives weights that are
      not finite.

    Raises:
      ValueError: shapes disagree.

    Source: Ren et al. 2018. Their weights sum to one, so their sum of w_i l_i is the mean here.
    """
    checks.same_shape(scores=scores, prior=prior)
    checks.rows(scores.shape[0], mask=mask)
    utility = jnp.where(mask, jnp.sum(prior * scores, axis=-1), 0.0)
    # 0 * utility is NaN where the utility is not finite: -inf must not count as "harmful".
    positive = jnp.maximum(utility, 0.0) + 0.0 * utility
    weights = rescale(positive, mask, reduce=reduce)
    return jax.lax.stop_gradient(Targets(weights, prior, utility))


@dataclasses.dataclass(frozen=True)
class Reweight:
    """Learning to reweight from label scores; a `refinement.ScoreRule` without arrays.

    >>> Reweight().init()
    ()
    """

    def init(self):
        """No arrays."""
        return ()

    def update(self, arrays, scored, streams, *, reduce):
        """Nothing to update."""
        del scored, streams, reduce
        return arrays

    def targets(self, arrays, scored, candidates, *, reduce):
        """`reweight`; the prior on steps without a scoring."""
        del arrays
        if scored is None:
            return prior_targets(candidates.labels, candidates.mask), {}
        labels, mask = candidates.labels, candidates.mask
        return reweight(scored.scores, labels, mask=mask, reduce=reduce), {}


def learning_to_reweight() -> Refinement:
    """The rule of learning to reweight, a `types.Rule`.

        theta^ = theta - lr grad sum_i eps_i l_i ,   u_i = - d L_val(theta^) / d eps_i at eps = 0

    At eps = 0 the look-ahead theta^ is theta, so u_i = lr <grad L_val, grad l_i>: the score of the
    prior label along the greedy direction. That takes one validation gradient and one forward-mode
    product, without nested backward passes. The learning rate cancels in the weights. As in the
    paper, the look-ahead moves all parameters; `Scoring("identity", "head")` costs little more than
    the validation samples' forward pass.
    """
    return Refinement(Scoring("identity", predicate=""), Reweight())


SPEC = RuleSpec(lambda run: learning_to_reweight())
