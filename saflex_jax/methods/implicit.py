"""Weights and soft labels of a finite pool as meta-parameters, by implicit differentiation.

Each source sample owns a weight and a soft label. Every step moves those of the batch along the
implicit hypergradient of the validation loss and projects them back (labels on the simplex, weights
on [0, max_weight]); the inner step then trains on them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.core import linear_solve, steps
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.targets import rescale
from saflex_jax.core.tree import gather, merge, select, under
from saflex_jax.methods.base import needs_val, supervised
from saflex_jax.types import LinearSolve, Method, Model, PathPredicate, Refiner, Targets


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """Implicit differentiation as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def refiner(
    *,
    prior: np.ndarray,
    meta_tx: optax.GradientTransformation | float = 10.0,
    solve: LinearSolve = linear_solve.cg_solve(maxiter=10, damping=1e-2),
    predicate: PathPredicate | None = under("head"),
    max_weight: float = 2.0,
    learn: str = "both",
    start: int = 0,
) -> Refiner:
    """Persistent targets updated by `core.steps.outer_step`.

        phi = (weights f32[N], labels f32[N, K]) <- project(phi + meta_tx(d L_val / d phi))

    Rows are projected when they are read and when they have moved; an optimiser with momentum moves
    others, too, which stay as they are until they are read.

    Args:
      prior: f32[N, K], the pool's labels: where phi starts, with weights one.
      meta_tx: optax transformation for phi; a number is SGD's learning rate. A sample's own
        gradient is of order 1/B, so rates of order B/10 are natural.
      solve: a LinearSolve; it is given the inner Hessian on the selected parameters.
      predicate: the parameters that the implicit solve sees; None = all.
      max_weight: weights stay in [0, max_weight].
      learn: "both", "weights" or "labels".
      start: first step on which phi moves.

    Raises:
      ValueError: prior not in the simplex; an unknown option or a value out of range.
    """
    checks.simplex(prior=prior)
    checks.positive(max_weight=max_weight)
    checks.choice(("both", "weights", "labels"), learn=learn)
    checks.whole(start=start)
    prior = np.asarray(prior)  # on the host: a refiner may be built before JAX starts
    if isinstance(meta_tx, int | float):
        checks.positive(meta_tx=meta_tx)
        meta_tx = optax.sgd(meta_tx)

    def project(meta, rows):  # of the pool it would cost a sort of each of its N rows
        weights = jnp.clip(meta["weights"][rows], 0.0, max_weight)
        labels = jax.vmap(optax.projections.projection_simplex)(meta["labels"][rows])
        if learn == "labels":
            weights = jnp.ones_like(weights)
        if learn == "weights":
            labels = jnp.asarray(prior)[rows]
        return {
            "weights": meta["weights"].at[rows].set(weights),
            "labels": meta["labels"].at[rows].set(labels),
        }

    def init(params):
        del params
        meta = {"weights": jnp.ones(len(prior)), "labels": jnp.asarray(prior)}
        return meta, meta_tx.init(meta)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        candidates, val = streams.candidates, streams.val
        needs_val("implicit", val)

        def logits(part, batch):
            return logits_fn(merge(part, state.params), batch.inputs)

        def inner_loss(part, meta):
            losses = weighted_cross_entropy(
                logits(part, candidates),
                meta["labels"][candidates.index],
                meta["weights"][candidates.index],
                candidates.mask,
            )
            return masked_mean(losses, candidates.mask, reduce=reduce)

        def outer_loss(part, meta):
            del meta  # the validation loss depends on it through the inner optimum only
            losses = weighted_cross_entropy(logits(part, val), val.labels, mask=val.mask)
            return masked_mean(losses, val.mask, reduce=reduce)

        feasible = partial(project, rows=gather(candidates.index, reduce))
        old_meta, old_opt = arrays
        meta, opt, metrics = steps.outer_step(
            feasible(old_meta),
            old_opt,
            select(state.params, predicate),
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            meta_tx=meta_tx,
            solve=solve,
            project=feasible,
            reduce=reduce,
        )
        started = state.step >= start
        meta, opt = jax.tree.map(
            lambda new, old: jnp.where(started, new, old), (meta, opt), (old_meta, old_opt)
        )
        labels = meta["labels"][candidates.index]
        weights = rescale(
            jnp.where(candidates.mask, meta["weights"][candidates.index], 0.0),
            candidates.mask,
            reduce=reduce,
        )
        learned = Targets(weights, labels, jnp.zeros_like(weights))
        metrics["kept"] = steps.total(weights > 0, candidates.mask, reduce)
        return jax.lax.stop_gradient(learned), (meta, opt), metrics

    return Refiner(init, apply)
