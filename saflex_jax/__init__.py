"""SAFLEX and learned augmentation in JAX.

The names below are the core, for use in a training loop of your own. The packages
`saflex_jax.methods`, `.parallel`, `.train`, `.augment`, `.data` and `.models` are imported by name.
Importing this makes no JAX computation and no network call.
"""

from saflex_jax.core.hypergrad import (
    differentiable_argmin,
    implicit_hypergradient,
    unrolled_argmin,
)
from saflex_jax.core.linear_solve import (
    adam_inverse_diagonal,
    cg_solve,
    identity_solve,
    neumann_solve,
    preconditioned_solve,
)
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.posterior import (
    Agreement,
    add_agreement,
    agreement,
    estimate_noise_rate,
    no_agreement,
    posterior_targets,
)
from saflex_jax.core.scores import Scores, label_scores, score, validation_gradient
from saflex_jax.core.steps import bilevel_step, inner_step, outer_step
from saflex_jax.core.targets import solve_targets
from saflex_jax.core.tree import Mean, identity, under
from saflex_jax.types import Batch, Method, Model, Rule, RunInfo, Streams, Targets, TrainState

__version__ = "0.2.0"

__all__ = [
    "Agreement",
    "Batch",
    "Mean",
    "Method",
    "Model",
    "Rule",
    "RunInfo",
    "Scores",
    "Streams",
    "Targets",
    "TrainState",
    "adam_inverse_diagonal",
    "add_agreement",
    "agreement",
    "bilevel_step",
    "cg_solve",
    "differentiable_argmin",
    "estimate_noise_rate",
    "identity",
    "identity_solve",
    "implicit_hypergradient",
    "inner_step",
    "label_scores",
    "masked_mean",
    "neumann_solve",
    "no_agreement",
    "outer_step",
    "posterior_targets",
    "preconditioned_solve",
    "score",
    "solve_targets",
    "under",
    "unrolled_argmin",
    "validation_gradient",
    "weighted_cross_entropy",
]
