"""Small-loss selection: train only on the samples of a batch that the network fits best.

Source: Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
Labels", NeurIPS 2018: its selection and schedule, with one network that picks for itself.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.losses import weighted_cross_entropy
from saflex_jax.core.steps import total
from saflex_jax.core.targets import prior_targets, rescale
from saflex_jax.core.tree import identity
from saflex_jax.rules.base import RuleSpec
from saflex_jax.types import Batch, Reduce, Targets


def select(
    logits: jax.Array, candidates: Batch, rate: jax.Array, *, reduce: Reduce = identity
) -> Targets:
    """Weights of the samples with the smallest loss, zero for the others; labels are the prior.

        w_i = 1[l_i is among the n - floor(R n) smallest] / its mean ,  l_i = CE(z_i, q_i)

    n is the number of unmasked rows. Among equal losses, earlier rows come first. Under pmap each
    device ranks its own n rows; the mean weight over all devices is one.

    Args:
      logits: z, f32[B, K], of the network that picks.
      candidates: Batch of B.
      rate: R, f32[], in [0, 1), share of samples to leave out.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient. A loss that is not finite gives a weight that is not finite.

    Raises:
      ValueError: shapes disagree.

    Source: Han et al. 2018, algorithm 1; its repository bhanML/Co-teaching rounds the number of
    picks down, not up.
    """
    mask = candidates.mask
    losses = weighted_cross_entropy(jax.lax.stop_gradient(logits), candidates.labels, mask=mask)
    count = jnp.sum(mask)
    # In single precision what is a whole number (.45 * 10 / 12 * 8) may come out just below it.
    dropped = jnp.floor(rate * count * (1 + 1e-6)).astype(count.dtype)
    order = jnp.lexsort((losses, ~mask))  # padding last
    kept = jnp.zeros_like(mask).at[order].set(jnp.arange(len(mask)) < count - dropped)
    # 0 * loss is NaN where the loss is not finite: such a row must not be dropped in silence.
    weights = jnp.where(mask, kept + 0.0 * losses, 0.0)
    targets = prior_targets(candidates.labels, mask)
    return targets._replace(weights=rescale(weights, mask, reduce=reduce))


@dataclasses.dataclass(frozen=True)
class SmallLoss:
    """Small-loss selection; a `types.Rule` that reads no validation samples.

        w = `select` by the current network in evaluation mode, with R(t) = forget min(t / ramp, 1)

    The forward pass is the training step's own, or one more if training mode differs (batch
    statistics, dropout). Under pmap each device ranks its own rows.

    >>> float(SmallLoss(forget=0.4, ramp=100).rate_at(jnp.array(50)))
    0.20000000298023224

    Attributes:
      forget: share of samples left out after the ramp, in [0, 1). The source sets it to the share
        of wrong labels, which it takes as known.
      ramp: steps until `forget` is reached, >= 1. The source uses 10 epochs, about 3,900 of its
        steps.

    Raises:
      ValueError: a value out of range.
    """

    forget: float = 0.2
    ramp: int = 1000

    def __post_init__(self):
        checks.decay(forget=self.forget)
        checks.whole(1, ramp=self.ramp)

    def rate_at(self, step: jax.Array) -> jax.Array:
        """The share of samples that a step leaves out: R(t) = forget min(t / ramp, 1), f32[].

        Args:
          step: t, i32[].
        """
        return self.forget * jnp.minimum(step / self.ramp, 1.0)

    def init(self, params):
        """No arrays."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        candidates = streams.candidates
        logits = logits_fn(state.params, candidates.inputs)
        targets = select(logits, candidates, self.rate_at(state.step), reduce=reduce)
        kept = total(targets.weights > 0, candidates.mask, reduce)
        return targets, arrays, {"kept": kept}


SPEC = RuleSpec(lambda run: SmallLoss())
