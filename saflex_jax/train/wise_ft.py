"""WiSE-FT: mixtures of the weights before and after fine-tuning, for accuracy under shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from saflex_jax import checks
from saflex_jax.types import TrainState


def interpolated(
    evaluate: Callable[[TrainState], dict[str, float]],
    before: TrainState,
    after: TrainState,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> dict[float, dict[str, float]]:
    """Evaluates mixtures of the weights before and after fine-tuning: WiSE-FT.

        theta = (1 - a) theta_before + a theta_after

    Choose a on validation samples of the training distribution, as the source does.

    >>> def evaluate(state):
    ...     return {"weight": float(state.params)}
    >>> before = TrainState(0, 1.0, {}, (), None)
    >>> interpolated(evaluate, before, before._replace(params=3.0), [0.0, 0.5])
    {0.0: {'weight': 1.0}, 0.5: {'weight': 2.0}}

    Args:
      evaluate: state -> values, for instance from `make_evaluator`.
      before: the state before fine-tuning (zero-shot); only its parameters are read.
      after: the state after fine-tuning.
      shares: a, each in [0, 1].

    Raises:
      ValueError: a share outside [0, 1].

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
    """
    for share in shares:
        checks.fraction(share=share)

    def mixed(share):
        return jax.tree.map(lambda b, a: (1 - share) * b + share * a, before.params, after.params)

    return {share: evaluate(after._replace(params=mixed(share))) for share in shares}
