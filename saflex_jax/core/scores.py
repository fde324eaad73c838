"""Label scores: how much a step on (sample, label) would lower the validation loss.

    S_ik = <v, grad_theta CE(f_theta(x_i), k)> = -(J_i v)_k
    J_i = d log softmax(f_theta(x_i)) / d theta

with v the direction that a linear solver makes of the validation gradient. One forward-mode
product gives all K labels of all B samples; no per-example gradient is formed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import curvature as curvatures
from saflex_jax.core.linear_solve import identity_solve
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import axpy, identity, merge, restrict, select
from saflex_jax.types import LinearSolve, LogitsFn, Params, PathPredicate, PyTree, Reduce, SolveInfo

Mode = Literal["jvp", "finite_difference"]


class Scores(NamedTuple):
    """Scores of one batch.

    Attributes:
      scores: f32[B, K]; > 0 = a step on (x_i, k) lowers the validation loss.
      log_probs: f32[B, K], of the same forward pass.
      val_loss: f32[], nats, global mean.
      info: how well the direction's linear system was solved.
    """

    scores: jax.Array
    log_probs: jax.Array
    val_loss: jax.Array
    info: SolveInfo


def validation_gradient(
    logits_fn: LogitsFn,
    params: Params,
    inputs: PyTree,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    predicate: PathPredicate | None = None,
    loss_fn=weighted_cross_entropy,
    reduce: Reduce = identity,
) -> tuple[jax.Array, Params]:
    """Validation loss and its gradient, averaged over all devices before anyone uses it.

        L_val(theta) = mean_j loss(f_theta(x_j), y_j) ,   g = grad_theta L_val

    Args:
      logits_fn: (params, inputs) -> f32[M, K], evaluation mode.
      params: pytree.
      inputs: pytree with leading axis M.
      labels: f32[M, K].
      mask: bool[M], False on padding rows.
      predicate: selects the parameters to differentiate; the others are None in the gradient.
      loss_fn: (logits, labels) -> f32[M].
      reduce: mean over the data-parallel axis.

    Returns:
      (f32[] in nats, gradient tree).
    """
    selected = select(params, predicate)

    def loss(part):
        logits = logits_fn(merge(part, params), inputs)
        checks.same_shape(val_labels=labels, val_logits=logits)
        return masked_mean(loss_fn(logits, labels), mask, reduce=reduce)

    return reduce(jax.value_and_grad(loss)(selected))


def label_scores(
    logits_fn: LogitsFn,
    params: Params,
    inputs: PyTree,
    direction: Params,
    *,
    mode: Mode = "jvp",
    epsilon: float = 1e-2,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scores of all labels along a direction.

        S_ik = - d/de log p_k(x_i; theta + e v) at e = 0

    The direction says which parameters move: a leaf that is None (see `tree.select`) stays fixed,
    so head-only scores cost one product with the features and no change of the model.

    Args:
      logits_fn: (params, inputs) -> f32[B, K]. Evaluation mode: with batch statistics one row's
        score would depend on the other rows.
      params: pytree.
      inputs: pytree with leading axis B.
      direction: v, like params or with None leaves.
      mode: "jvp" (exact) or "finite_difference": -(log p(theta + e v) - log p(theta)) / e with
        e = epsilon / ||v||; one more forward pass, no forward-mode rules needed, f32 only.
      epsilon: length of the finite-difference step in parameter space.
      chunk: rows scored at a time, to bound memory; must divide B. None = all at once.

    Returns:
      (log_probs f32[B, K], scores f32[B, K]).

    Raises:
      ValueError: unknown mode, epsilon <= 0, or a chunk that does not divide B.
    """
    checks.choice("mode", mode, ("jvp", "finite_difference"))
    checks.positive("epsilon", epsilon)
    if chunk is not None:
        size = jax.tree.leaves(inputs)[0].shape[0]
        if chunk < 1 or size % chunk:
            raise ValueError(f"chunk must divide the batch of {size} rows; given {chunk}")
        chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs)
        out = jax.lax.map(
            lambda x: label_scores(logits_fn, params, x, direction, mode=mode, epsilon=epsilon),
            chunks,
        )
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), out)

    start = restrict(params, direction)

    def log_probs(part):
        return jax.nn.log_softmax(logits_fn(merge(part, params), inputs))

    if mode == "jvp":
        base, change = jax.jvp(log_probs, (start,), (direction,))
        return base, -change
    norm = jnp.sqrt(curvatures.dot(direction, direction))
    step = epsilon / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    base, moved = log_probs(start), log_probs(axpy(step, direction, start))
    return base, (base - moved) / step


def score(
    logits_fn: LogitsFn,
    params: Params,
    inputs: PyTree,
    val_inputs: PyTree,
    val_labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    val_mask: jax.Array | None = None,
    predicate: PathPredicate | None = None,
    solve: LinearSolve = identity_solve(),
    mode: Mode = "jvp",
    epsilon: float = 1e-2,
    chunk: int | None = None,
    reduce: Reduce = identity,
) -> Scores:
    """Validation gradient -> direction -> label scores: the first half of SAFLEX.

        v = solve(G + damping I, grad L_val) ,   S_ik = -(J_i v)_k

    `solve` decides what the direction is: `identity_solve()` the paper's greedy step,
    `preconditioned_solve` an optimiser's step, `neumann_solve` and `cg_solve` implicit
    differentiation. G is the Gauss-Newton matrix of the candidates' mean cross-entropy, positive
    semi-definite and, for a linear head, exactly the Hessian. With `predicate=under("head")` the
    network runs once and every product with G is a product with its features.

    Args:
      logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
      params: pytree.
      inputs: candidates, leading axis B.
      val_inputs: validation samples, leading axis M.
      val_labels: f32[M, K].
      mask, val_mask: bool[B], bool[M]; False on padding rows.
      predicate: path -> bool, the parameters that scores see; None = all.
      solve: a LinearSolve.
      mode, epsilon, chunk: see `label_scores`.
      reduce: mean over the data-parallel axis.

    Returns:
      Scores, without gradient (stop_gradient).

    Raises:
      ValueError: shapes disagree, or no validation sample.
    """
    if jax.tree.leaves(val_inputs)[0].shape[0] == 0:
        raise ValueError("val_inputs must hold at least one sample; given 0")
    val_loss, gradient = validation_gradient(
        logits_fn, params, val_inputs, val_labels, mask=val_mask, predicate=predicate, reduce=reduce
    )
    matvec = curvatures.gauss_newton(
        logits_fn, params, inputs, mask=mask, predicate=predicate, reduce=reduce
    )
    direction, info = solve(matvec, gradient)
    log_probs, scores = label_scores(
        logits_fn, params, inputs, direction, mode=mode, epsilon=epsilon, chunk=chunk
    )
    return jax.lax.stop_gradient(Scores(scores, log_probs, val_loss, info))
