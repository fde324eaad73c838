"""SAFLEX: weights and soft labels for every upstream sample, from the validation gradient.

    direction -> scores -> (memory) -> targets -> weighted inner step

Two compositions: `posterior`, the default, which docs/results.md measures, and `paper`. For other
options replace a part:

    >>> import dataclasses
    >>> rule = posterior(RunInfo(num_samples=1000, num_classes=10))
    >>> rule = dataclasses.replace(rule, scoring=Scoring("cg(20, damping=0.03)"))

Source: Ding et al., "SAFLEX: Self-Adaptive Augmentation via Feature Label EXtrapolation",
ICLR 2024.
"""

from __future__ import annotations

from saflex_jax.rules.base import RuleSpec
from saflex_jax.rules.posterior import Posterior
from saflex_jax.rules.refinement import Refinement
from saflex_jax.rules.scoring import Scoring
from saflex_jax.rules.simplex import Simplex
from saflex_jax.types import RunInfo


def posterior(run: RunInfo | None = None) -> Refinement:
    """SAFLEX with its default rule: implicit direction on the head, `Posterior`.

    >>> posterior(RunInfo(num_samples=1000, num_classes=10, num_trusted=50)).scoring.direction
    'cg'

    Args:
      run: what is known about the run. Give it if the candidates come from a finite pool: beliefs
        are then averaged over each sample's visits.
    """
    return Refinement(Scoring(), Posterior(run))


def paper(run: RunInfo | None = None) -> Refinement:
    """SAFLEX as in the paper: the greedy direction over all parameters, `Simplex`, no memory.

    >>> paper().scoring.direction, paper().rule.memory.decay
    ('identity', None)

    Args:
      run: what is known about the run; only a memory reads it, and the paper has none.
    """
    return Refinement(Scoring("identity", predicate=""), Simplex(tolerance=0.0, run=run))


SPEC = RuleSpec(posterior, posterior=True)
PAPER = RuleSpec(paper)
