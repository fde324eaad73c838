"""Deferred reweighting: late in training, rarer classes get larger weights.

Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
NeurIPS 2019 (the deferral); Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
CVPR 2019 (the weights).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.losses import check_counts
from saflex_jax.core.targets import prior_targets, rescale
from saflex_jax.core.tree import identity
from saflex_jax.rules.base import RuleSpec
from saflex_jax.types import RunInfo


def class_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """The inverse of the classes' effective number of samples, f32[K].

        v_k = (1 - beta) / (1 - beta^n_k)

    Args:
      counts: n, f[K], > 0.
      beta: in [0, 1): 0 gives ones; towards 1, the weights approach 1 / n_k.
    """
    counts = np.asarray(counts, np.float64)
    return ((1 - beta) / (1 - beta**counts)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredReweighting:
    """Deferred reweighting; a `types.Rule` that reads no validation samples.

        w_i = <q_i, v> / mean_j <q_j, v>   from step `start` on, before it 1

    v are the `class_weights`. Labels stay the prior q.

    >>> run = RunInfo(num_samples=100, num_classes=2, counts=np.array([90.0, 10.0]))
    >>> DeferredReweighting(run, start=1000).beta
    0.9999

    Attributes:
      run: what is known about the run; the rule reads `counts`.
      beta: in [0, 1), of the effective number of samples.
      start: first step with class weights.

    Raises:
      ValueError: a value out of range; at the first step, no counts, or labels of another number of
        classes.
    """

    run: RunInfo | None = None
    beta: float = 0.9999
    start: int = 0

    def __post_init__(self):
        if self.run is not None and self.run.counts is not None:
            check_counts(self.run.counts)
        checks.decay(beta=self.beta)
        checks.whole(start=self.start)

    def init(self, params):
        """No arrays."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        del logits_fn
        if self.run is None or self.run.counts is None:
            raise ValueError("drw needs run.counts, the training samples of each class; given None")
        labels, mask = streams.candidates.labels, streams.candidates.mask
        checks.rows(labels.shape[1], counts=self.run.counts)
        of_class = class_weights(self.run.counts, self.beta)
        targets = prior_targets(labels, mask)
        weights = jnp.where(state.step >= self.start, labels @ of_class, 1.0)
        weights = rescale(jnp.where(mask, weights, 0.0), mask, reduce=reduce)
        return targets._replace(weights=weights), arrays, {}


SPEC = RuleSpec(DeferredReweighting, of_labels=True)
