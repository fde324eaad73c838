"""Weights and soft labels in closed form from scores: the second half of SAFLEX."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.losses import masked_mean
from saflex_jax.core.tree import identity
from saflex_jax.types import Reduce, Targets

Scale = Literal["rms", "raw"]
Learn = Literal["both", "weights", "labels"]
Anchor = Literal["linear", "log"]

_LOG_FLOOR = 1e-3  # what a class with prior zero counts as under anchor="log"


def score_scale(
    scores: jax.Array, mask: jax.Array | None = None, *, reduce: Reduce = identity
) -> jax.Array:
    """Root mean square of the unmasked scores over all devices, f32[]; 1 if all are 0.

    >>> float(score_scale(jnp.array([[3.0, -3.0], [3.0, 3.0]])))
    3.0

    Args:
      scores: f32[B, K].
      mask: bool[B]; False rows do not count.
      reduce: mean over the data-parallel axis.
    """
    square = reduce(masked_mean(jnp.mean(scores**2, axis=-1), mask, reduce=reduce))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)


def check(
    prior_strength: float,
    temperature: float,
    tolerance: float,
    scale: str,
    learn: str,
    anchor: str,
) -> None:
    """Raises ValueError on arguments that `solve_targets` does not take.

    >>> check(3.0, 0.3, 0.25, "rms", "both", "linear")

    Args:
      prior_strength, temperature, tolerance, scale, learn, anchor: see `solve_targets`.
    """
    checks.positive(temperature=temperature)
    checks.at_least_zero(prior_strength=prior_strength, tolerance=tolerance)
    checks.choice(get_args(Scale), scale=scale)
    checks.choice(get_args(Learn), learn=learn)
    checks.choice(get_args(Anchor), anchor=anchor)


def solve_targets(
    scores: jax.Array,
    prior: jax.Array,
    *,
    prior_strength: float = 3.0,
    temperature: float = 0.3,
    tolerance: float = 0.25,
    scale: Scale = "rms",
    learn: Learn = "both",
    anchor: Anchor = "linear",
    mask: jax.Array | None = None,
    reduce: Reduce = identity,
) -> Targets:
    """Soft label and weight of each sample in closed form, from its scores and its prior.

        y_i = softmax((S_i / sigma + beta q_i) / tau)
              which maximises <y, S_i / sigma + beta q_i> + tau H(y) over the simplex
        u_i = <y_i, S_i / sigma>
        w_i = 1[u_i >= -tolerance], rescaled to global mean one (all zero: the term vanishes)

    >>> scores, prior = jnp.array([[1.0, -1.0], [-9.0, 9.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> targets = solve_targets(scores, prior, learn="weights")
    >>> targets.weights.tolist()  # the second label harms: its sample is dropped
    [2.0, 0.0]
    >>> solve_targets(scores, prior, scale="raw").labels.argmax(1).tolist()  # or relabelled
    [0, 1]

    Args:
      scores: S, f32[B, K]; > 0 = lowers the validation loss.
      prior: q, f32[B, K], the upstream pipeline's labels.
      prior_strength: beta >= 0, in units of the scale. math.inf returns the prior itself; with
        tolerance=math.inf, too, this is the plain upstream pipeline. (A finite beta sharpens a
        *mixed* prior towards its largest class; see `anchor`.)
      temperature: tau > 0; the lower, the harder the labels.
      tolerance: >= 0, in units of the scale: drop samples whose utility is below -tolerance. 0 is
        the paper's rule, math.inf drops nothing.
      scale: sigma; "rms" = RMS of the global batch's scores, "raw" = 1.
      learn: "both"; "weights" keeps y = q; "labels" keeps w = 1.
      anchor: "linear" adds beta q. "log" adds beta log max(q, 1e-3): with beta = tau a zero score
        leaves every prior unchanged, also a mixed one.
      mask: bool[B]; False rows get weight 0 and do not enter the scale.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient. A score that is not finite makes the weights not finite, so that
      the loss shows it instead of silently dropping samples.

    Raises:
      ValueError: no arrays; shapes disagree; fewer than two classes; temperature <= 0; negative
        prior_strength or tolerance; an unknown option; and, on concrete arrays, scores not finite
        or prior not in the simplex.

    Source: SAFLEX (ICLR 2024), section 4; scale, tolerance and anchor are this project's.
    """
    checks.arrays(scores=scores, prior=prior)
    checks.same_shape(scores=scores, prior=prior)
    checks.whole(2, num_classes=prior.shape[1])
    checks.rows(scores.shape[0], mask=mask)
    check(prior_strength, temperature, tolerance, scale, learn, anchor)
    mask = jnp.ones(scores.shape[0], bool) if mask is None else mask
    scores = jnp.where(mask[:, None], scores, 0.0)
    checks.finite(scores=scores)
    checks.simplex(mask, prior=prior)

    if scale == "rms":
        scores = scores / score_scale(scores, mask, reduce=reduce)
    if learn == "weights" or prior_strength == math.inf:
        labels = prior
    else:
        pull = prior if anchor == "linear" else jnp.log(jnp.maximum(prior, _LOG_FLOOR))
        labels = jax.nn.softmax((scores + prior_strength * pull) / temperature)
    utility = jnp.sum(labels * scores, axis=-1)
    keep = True if learn == "labels" else ~(utility < -tolerance)
    # 0 * utility is NaN where the utility is not finite: it reaches the loss, nothing is dropped.
    weights = jnp.where(mask, keep + 0.0 * utility, 0.0)
    weights = rescale(weights, mask, reduce=reduce)
    return jax.lax.stop_gradient(Targets(weights, labels, utility))


def rescale(weights: jax.Array, mask: jax.Array, *, reduce: Reduce = identity) -> jax.Array:
    """Scales weights to mean one over all devices' unmasked rows; all zero stays so.

    >>> rescale(jnp.array([1.0, 0.0, 2.0]), jnp.ones(3, bool)).tolist()
    [1.0, 0.0, 2.0]

    Args:
      weights: f32[B], >= 0.
      mask: bool[B]; False rows do not count.
      reduce: mean over the data-parallel axis.
    """
    mean = reduce(masked_mean(weights, mask, reduce=reduce))
    return weights / jnp.where(mean > 0, mean, 1.0)


def prior_targets(prior: jax.Array, mask: jax.Array) -> Targets:
    """The targets of the plain upstream pipeline: prior labels, weight one, utility zero.

    >>> prior_targets(jnp.eye(2), jnp.array([True, False])).weights.tolist()
    [1.0, 0.0]

    Args:
      prior: q, f32[B, K].
      mask: bool[B]; False rows get weight 0.
    """
    weights = mask.astype(prior.dtype)
    return Targets(weights, prior, jnp.zeros_like(weights))
