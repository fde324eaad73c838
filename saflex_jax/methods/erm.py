"""ERM: the upstream pipeline alone (prior labels, weight one). The baseline of every comparison."""

from __future__ import annotations

import optax

from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.methods.base import prior_refiner, supervised
from saflex_jax.types import Method, Model


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """Plain training on the candidates.

        theta <- theta + tx(grad mean_i CE(f(x_i), q_i))

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      loss: of the candidates (see `core.losses`), in the place of the cross-entropy.
    """
    return supervised(model, tx, prior_refiner(), loss=loss)
