"""SAFLEX as a method: plain training on the weights and labels that its rule learns.

    >>> from saflex_jax.methods import saflex
    >>> rule = saflex.posterior()        # or saflex.paper(); both go into any method

The rule, its parts and how to replace one: `saflex_jax.rules.saflex`.
"""

from __future__ import annotations

import optax

from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.methods import supervised
from saflex_jax.rules.saflex import paper, posterior
from saflex_jax.types import Method, Model, RunInfo

__all__ = ["make", "paper", "posterior"]


def make(
    model: Model,
    tx: optax.GradientTransformation,
    run: RunInfo | None = None,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """SAFLEX by its default rule, as measured in docs/results.md.

    Args:
      model: see `types.Model`; a parameter path "head" must exist (`models.Classifier` has it).
      tx: optax transformation.
      run: what the run knows. With it samples are remembered over their visits, and its trusted
        samples say how many labels are wrong; results were measured so.
      loss: of the candidates (see `core.losses`).
    """
    return supervised.make(model, tx, posterior(run), loss=loss)
