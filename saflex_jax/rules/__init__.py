"""Rules, one file each: what to train on. Any rule goes into any method that takes one.

To add a rule, write its file (fork `label_smoothing.py`, or `l2rw.py` for a rule from scores) and
name it in RULES; the loop, methods and configs need no change. From outside the package, use
`RULES["mine"] = RuleSpec(...)`.
"""

from saflex_jax.rules import (
    base,
    bootstrap,
    drw,
    implicit,
    l2rw,
    label_smoothing,
    meta_weight_net,
    saflex,
    small_loss,
)
from saflex_jax.rules.base import AsGiven, RuleSpec
from saflex_jax.rules.posterior import Posterior, started
from saflex_jax.rules.refinement import Refinement, ScoreRule
from saflex_jax.rules.schedule import Schedule
from saflex_jax.rules.scoring import Scored, Scoring
from saflex_jax.rules.simplex import Simplex
from saflex_jax.rules.visits import VisitMean

RULES = {
    "as_given": base.SPEC,
    "saflex": saflex.SPEC,
    "saflex_paper": saflex.PAPER,
    "implicit": implicit.SPEC,
    "l2rw": l2rw.SPEC,
    "meta_weight_net": meta_weight_net.SPEC,
    "drw": drw.SPEC,
    "label_smoothing": label_smoothing.SPEC,
    "bootstrap": bootstrap.SPEC,
    "small_loss": small_loss.SPEC,
}

__all__ = [
    "RULES",
    "AsGiven",
    "Posterior",
    "Refinement",
    "RuleSpec",
    "Schedule",
    "ScoreRule",
    "Scored",
    "Scoring",
    "Simplex",
    "VisitMean",
    "started",
]
