"""Learning to reweight: a sample weighs as much as a step on it lowers the validation loss.

Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.scores import Mode, scorer, validation_gradient
from saflex_jax.core.steps import total
from saflex_jax.core.targets import prior_targets, rescale
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import needs_val, supervised
from saflex_jax.types import Method, Model, PathPredicate, Reduce, Refiner, Targets


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """Learning to reweight as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def reweight(
    scores: jax.Array, prior: jax.Array, *, mask: jax.Array, reduce: Reduce = identity
) -> Targets:
    """Weights in proportion to the positive part of the prior label's score; labels stay the prior.

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

    Source: Ren et al. 2018, whose weights sum to one: the mean of w_i l_i here is their sum.
    """
    checks.same_shape(scores=scores, prior=prior)
    checks.rows(scores.shape[0], mask=mask)
    utility = jnp.where(mask, jnp.sum(prior * scores, axis=-1), 0.0)
    # 0 * utility is NaN where the utility is not finite: -inf must not count as "harmful".
    positive = jnp.maximum(utility, 0.0) + 0.0 * utility
    weights = rescale(positive, mask, reduce=reduce)
    return jax.lax.stop_gradient(Targets(weights, prior, utility))


def refiner(
    *,
    predicate: PathPredicate | None = None,
    mode: Mode = "jvp",
    chunk: int | None = None,
    start: int = 0,
) -> Refiner:
    """The rule of learning to reweight.

        theta^ = theta - lr grad sum_i eps_i l_i ,   u_i = - d L_val(theta^) / d eps_i at eps = 0

    At eps = 0 the look-ahead theta^ is theta itself, so that u_i = lr <grad L_val, grad l_i>, the
    score of the prior label: one validation gradient and one forward-mode product, no backward pass
    through a backward pass. The learning rate cancels in the weights.

    Args:
      predicate: the parameters that the look-ahead moves; None = all, as in the paper.
        `under("head")` costs little more than the validation samples' forward pass.
      mode, chunk: see `core.scores.label_scores`.
      start: first step on which weights are learned; the prior, weight one, before it.

    Raises:
      ValueError: a value out of range.
    """
    checks.whole(start=start)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        candidates, val = streams.candidates, streams.val
        needs_val("l2rw", val)

        # The candidates' forward pass, outside of the branch (see `scorer`).
        along = scorer(
            logits_fn,
            state.params,
            candidates.inputs,
            mask=candidates.mask,
            predicate=predicate,
            mode=mode,
            chunk=chunk,
            reduce=reduce,
        )

        def learned():
            val_loss, gradient = validation_gradient(
                logits_fn,
                state.params,
                val.inputs,
                val.labels,
                mask=val.mask,
                predicate=predicate,
                reduce=reduce,
            )
            scores, _, _ = along(gradient)
            targets = reweight(scores, candidates.labels, mask=candidates.mask, reduce=reduce)
            return targets, val_loss, jnp.ones(())

        def prior():
            targets = prior_targets(candidates.labels, candidates.mask)
            return targets, jnp.zeros(()), jnp.zeros(())

        if start == 0:
            targets, val_loss, count = learned()
        else:
            targets, val_loss, count = jax.lax.cond(state.step >= start, learned, prior)
        metrics = {
            "val_loss": (val_loss, count),
            "kept": total(targets.weights > 0, candidates.mask, reduce),
        }
        return targets, arrays, metrics

    return Refiner(lambda params: (), apply)
