"""Deferred reweighting: late in training a sample weighs as much as its class is rare.

Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
NeurIPS 2019 (the deferral); Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
CVPR 2019 (the weights).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.core.losses import CandidateLoss, check_counts, weighted_soft_cross_entropy
from saflex_jax.core.targets import prior_targets, rescale
from saflex_jax.methods.base import supervised
from saflex_jax.types import Method, Model, Refiner


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """Deferred reweighting as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def class_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """The inverse of the classes' effective number of samples, f32[K].

        v_k = (1 - beta) / (1 - beta^n_k)

    Args:
      counts: n, f[K], > 0.
      beta: in [0, 1): 0 gives ones, towards 1 it comes to 1 / n_k.
    """
    counts = np.asarray(counts, np.float64)
    return ((1 - beta) / (1 - beta**counts)).astype(np.float32)


def refiner(*, counts: np.ndarray, beta: float = 0.9999, start: int = 0) -> Refiner:
    """The rule of deferred reweighting; it reads no validation samples.

        w_i = <q_i, v> / mean_j <q_j, v>   from step `start` on, before it 1

    with v the `class_weights`. Labels stay the prior q.

    Args:
      counts: n, f[K], > 0: training samples of each class; the sum of their prior labels.
      beta: in [0, 1).
      start: first step on which classes weigh differently.

    Raises:
      ValueError: a value out of range, or labels of another number of classes.
    """
    check_counts(counts)
    checks.decay(beta=beta)
    checks.whole(start=start)
    of_class = class_weights(counts, beta)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        del logits_fn
        labels, mask = streams.candidates.labels, streams.candidates.mask
        checks.rows(labels.shape[1], counts=counts)
        targets = prior_targets(labels, mask)
        weights = jnp.where(mask, jnp.where(state.step >= start, labels @ of_class, 1.0), 0.0)
        return targets._replace(weights=rescale(weights, mask, reduce=reduce)), arrays, {}

    return Refiner(lambda params: (), apply)
