"""SAFLEX: weights and soft labels for every upstream sample, from the validation gradient.

    direction -> scores -> (memory) -> targets -> weighted inner step

Source: Ding et al., "SAFLEX: Self-Adaptive Augmentation via Feature Label Extrapolation",
ICLR 2024.
The paper's rule is `direction="identity", predicate=None, tolerance=0, memory_decay=None`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import linear_solve, memory, scores, targets
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.steps import total
from saflex_jax.core.tree import restrict, select, under
from saflex_jax.methods.base import supervised
from saflex_jax.types import LinearSolve, Method, Model, PathPredicate, Refiner

DIRECTIONS = ("identity", "adam", "neumann", "cg")


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """SAFLEX as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def refiner(
    *,
    direction: str = "cg",
    iterations: int = 10,
    damping: float = 1e-2,
    neumann_scale: float = 0.1,
    predicate: PathPredicate | None = under("head"),
    mode: scores.Mode = "jvp",
    chunk: int | None = None,
    prior_strength: float = 3.0,
    temperature: float = 0.3,
    tolerance: float = 0.25,
    scale: targets.Scale = "rms",
    learn: targets.Learn = "both",
    anchor: targets.Anchor = "linear",
    memory_decay: float | None = None,
    num_samples: int = 0,
    num_classes: int = 0,
    start: int = 0,
    every: int = 1,
) -> Refiner:
    """The SAFLEX rule.

    Args:
      direction: "identity" (the paper's greedy step), "adam" (the optimiser's preconditioner),
        "neumann" or "cg" (implicit differentiation with the Gauss-Newton matrix).
      iterations: of Neumann or CG.
      damping: added to the Gauss-Newton matrix, Neumann and CG.
      neumann_scale: step of the Neumann series.
      predicate: the parameters that scores see; None = all. The default, the head, costs one more
        forward pass (the validation samples') and products with features.
      mode, chunk: see `core.scores.label_scores`.
      prior_strength, temperature, tolerance, scale, learn, anchor: see
        `core.targets.solve_targets`.
      memory_decay: averages a source sample's scores over its visits (`core.memory`), keyed by
        `Batch.index`; None = no memory. Needs num_samples and num_classes.
      num_samples, num_classes: size of the memory.
      start: first step on which targets are learned; the prior before it.
      every: scores are computed every so many steps; on the others the memory's are used, or,
        without a memory, the prior.

    Raises:
      ValueError: an unknown option, or a value out of range.
    """
    checks.choice("direction", direction, DIRECTIONS)
    checks.at_least_zero("start", start)
    checks.positive("every", every)
    if memory_decay is not None:
        checks.positive("num_classes", num_classes)

    def init():
        return () if memory_decay is None else memory.init(num_samples, num_classes)

    def solver(state) -> LinearSolve:
        if direction == "identity":
            return linear_solve.identity_solve()
        if direction == "adam":
            diagonal = linear_solve.adam_inverse_diagonal(state.opt_state)
            return linear_solve.preconditioned_solve(
                restrict(diagonal, select(state.params, predicate))
            )
        if direction == "neumann":
            return linear_solve.neumann_solve(
                steps=iterations, scale=neumann_scale, damping=damping
            )
        return linear_solve.cg_solve(maxiter=iterations, damping=damping)

    def solve_targets(label_scores, candidates, reduce):
        return targets.solve_targets(
            label_scores,
            candidates.labels,
            prior_strength=prior_strength,
            temperature=temperature,
            tolerance=tolerance,
            scale=scale,
            learn=learn,
            anchor=anchor,
            mask=candidates.mask,
            reduce=reduce,
        )

    def apply(arrays, state, logits_fn, streams, *, reduce):
        candidates, val = streams.candidates, streams.val
        if val is None:
            raise ValueError("saflex needs validation samples; given streams.val = None")

        def scored(arrays):
            found = scores.score(
                logits_fn,
                state.params,
                candidates.inputs,
                val.inputs,
                val.labels,
                mask=candidates.mask,
                val_mask=val.mask,
                predicate=predicate,
                solve=solver(state),
                mode=mode,
                chunk=chunk,
                reduce=reduce,
            )
            label_scores = found.scores
            if memory_decay is not None:
                sigma = targets.score_scale(label_scores, candidates.mask, reduce=reduce)
                arrays, label_scores = memory.update(
                    arrays,
                    candidates.index,
                    label_scores / sigma,
                    candidates.mask,
                    decay=memory_decay,
                    reduce=reduce,
                )
            learned = solve_targets(label_scores, candidates, reduce)
            return learned, arrays, found.val_loss, found.info.residual, jnp.ones(())

        def unscored(arrays):
            learned = targets.prior_targets(candidates.labels, candidates.mask)
            if memory_decay is not None:
                remembered = arrays.mean[candidates.index]
                learned = jax.lax.cond(
                    state.step >= start,
                    lambda: solve_targets(remembered, candidates, reduce),
                    lambda: learned,
                )
            return learned, arrays, jnp.zeros(()), jnp.zeros(()), jnp.zeros(())

        if start == 0 and every == 1:
            learned, arrays, val_loss, residual, count = scored(arrays)
        else:
            due = (state.step >= start) & ((state.step - start) % every == 0)
            learned, arrays, val_loss, residual, count = jax.lax.cond(due, scored, unscored, arrays)

        moved = jnp.argmax(learned.labels, -1) != jnp.argmax(candidates.labels, -1)
        metrics = {
            "val_loss": (val_loss, count),
            "kept": total(learned.weights > 0, candidates.mask, reduce),
            "relabelled": total(moved, candidates.mask, reduce),
        }
        # Of the other directions, reading the residual would cost a product with the curvature.
        if direction in ("neumann", "cg"):
            metrics["solve_residual"] = (residual, count)
        return learned, arrays, metrics

    return Refiner(init, apply)
