"""SAFLEX as a method: plain training on the weights and labels that its rule learns.

    >>> from saflex_jax.methods import saflex
    >>> rule = saflex.posterior()        # or saflex.paper(); both go into any method

Its rule and how to replace a part of it: `saflex_jax.rules.saflex`.
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
    """SAFLEX with its default rule, as measured in docs/results.md.

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> run = RunInfo(num_samples=1000, num_classes=10)
    >>> method = make(from_linen(Classifier(MLP(), 10)), optax.sgd(0.1), run)

    Args:
      model: see `types.Model`; needs a parameter path "head", which `models.Classifier` has.
      tx: optax transformation.
      run: what is known about the run. Results are measured with it: beliefs are then averaged over
        each sample's visits, and the run's trusted samples tell how many labels are wrong.
      loss: of the candidates (see `core.losses`).
    """
    return supervised.make(model, tx, posterior(run), loss=loss)
