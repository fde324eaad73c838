"""Label smoothing: a share of every label is spread evenly over all classes.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
section 7.
"""

from __future__ import annotations

import optax

from saflex_jax import checks
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.targets import prior_targets
from saflex_jax.methods.base import supervised
from saflex_jax.types import Method, Model, Refiner


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """Label smoothing as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def refiner(*, epsilon: float = 0.1) -> Refiner:
    """The rule of label smoothing; it reads no validation samples.

        y_i = (1 - epsilon) q_i + epsilon / K ,  w_i = 1

    Args:
      epsilon: in [0, 1]; 0 = the prior q. The paper has .1.

    Raises:
      ValueError: a value out of range.
    """
    checks.fraction(epsilon=epsilon)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        del state, logits_fn, reduce
        labels, mask = streams.candidates.labels, streams.candidates.mask
        smooth = (1 - epsilon) * labels + epsilon / labels.shape[1]
        return prior_targets(smooth, mask), arrays, {}

    return Refiner(lambda params: (), apply)
