"""Label scores: how much a step on (sample, label) would lower the validation loss.

    S_ik = <v, grad_theta CE(f_theta(x_i), k)> = -(J_i v)_k
    J_i = d log softmax(f_theta(x_i)) / d theta

v is the direction that a linear solver makes of the validation gradient. One forward-mode product
scores all K labels of all B samples, without per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core import curvature as curvatures
from saflex_jax.core.linear_solve import identity_solve
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.tree import axpy, cast_floats, identity, restrict, select
from saflex_jax.types import LinearSolve, LogitsFn, Params, PathPredicate, PyTree, Reduce, SolveInfo

Mode = Literal["jvp", "finite_difference"]


class Scores(NamedTuple):
    """Scores of one batch.

    >>> def linear(params, x):
    ...     return x @ params
    >>> x, labels = jnp.eye(2), jnp.eye(2)
    >>> result = score(linear, jnp.zeros((2, 2)), x, val_inputs=x, val_labels=labels)
    >>> result.scores.shape, round(float(result.val_loss), 4)
    ((2, 2), 0.6931)

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


# (logits, their linear part), see `curvature.linear_logits`
Forward = tuple[jax.Array, Callable[[Params], jax.Array]]
# gradient of the validation loss -> (scores f32[B, K], log_probs f32[B, K], SolveInfo)
Scorer = Callable[[Params], tuple[jax.Array, jax.Array, SolveInfo]]


def check(mode: str, compute_dtype: str | None) -> None:
    """Raises ValueError on arguments that `score` does not take.

    >>> check("jvp", None)

    Args:
      mode: "jvp" or "finite_difference".
      compute_dtype: a floating-point dtype, or None.
    """
    checks.choice(("jvp", "finite_difference"), mode=mode)
    if compute_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(compute_dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"compute_dtype must be a floating-point dtype; given {compute_dtype!r}")
    if mode == "finite_difference":
        raise ValueError(
            f"compute_dtype must be None where mode is 'finite_difference', whose differences need "
            f"f32; given {compute_dtype!r}"
        )


def in_dtype(logits_fn: LogitsFn, dtype: str | None) -> LogitsFn:
    """The network computed in another precision, with logits in f32.

    >>> def linear(params, x):
    ...     return x @ params
    >>> in_dtype(linear, "bfloat16")(jnp.full((1, 1), 1.001), jnp.ones((1, 1))).tolist()
    [[1.0]]

    Args:
      logits_fn: (params, inputs) -> logits [B, K].
      dtype: of parameters and floating-point inputs, for instance "bfloat16"; None = unchanged.
    """
    if dtype is None:
        return logits_fn

    def logits(params, inputs):
        out = logits_fn(cast_floats(params, dtype), cast_floats(inputs, dtype))
        return out.astype(jnp.float32)

    return logits


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
    """Validation loss and its gradient, averaged over all devices.

        L_val(theta) = mean_j loss(f_theta(x_j), y_j) ,   g = grad_theta L_val

    >>> def linear(params, x):
    ...     return x @ params
    >>> loss, gradient = validation_gradient(linear, jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2))
    >>> gradient.tolist()  # x^T (p - y) / 2
    [[-0.25, 0.25], [0.25, -0.25]]

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

    Raises:
      ValueError: shapes disagree, no sample, or a network of one logit.
    """
    at_least_one(inputs)
    forward = curvatures.linear_logits(logits_fn, params, inputs, predicate=predicate)
    like = select(params, predicate)
    return loss_gradient(forward, like, labels, mask=mask, loss_fn=loss_fn, reduce=reduce)


def at_least_one(val_inputs: PyTree) -> None:
    """Raises ValueError if there is no validation sample.

    >>> at_least_one(jnp.zeros((1, 3)))

    Args:
      val_inputs: pytree with leading axis M.
    """
    if jax.tree.leaves(val_inputs)[0].shape[0] == 0:
        raise ValueError("val_inputs must hold at least one sample; given 0")


def loss_gradient(
    forward: Forward,
    params: Params,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    loss_fn=weighted_cross_entropy,
    reduce: Reduce = identity,
) -> tuple[jax.Array, Params]:
    """`validation_gradient` from a forward pass that was already made.

    >>> from saflex_jax.core.curvature import linear_logits
    >>> def linear(params, x):
    ...     return x @ params
    >>> params, x, labels = jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2)
    >>> loss, gradient = loss_gradient(linear_logits(linear, params, x), params, labels)
    >>> gradient.tolist()
    [[-0.25, 0.25], [0.25, -0.25]]

    Args:
      forward: of M validation samples, see `curvature.linear_logits`.
      params: the selected parameters.
      labels, mask, loss_fn, reduce: see `validation_gradient`.
    """
    logits, push = forward
    checks.same_shape(val_labels=labels, val_logits=logits)
    _at_least_two_classes(logits)

    def loss(logits):
        return masked_mean(loss_fn(logits, labels), mask, reduce=reduce)

    value, slope = jax.value_and_grad(loss)(logits)
    (gradient,) = jax.linear_transpose(push, params)(slope)
    return reduce((value, gradient))


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

    A leaf of the direction that is None (see `tree.select`) stays fixed, so head-only scores cost
    one product with the features and need no change of the model.

    >>> def linear(params, x):
    ...     return x @ params
    >>> params, x, direction = jnp.zeros((2, 2)), jnp.eye(2)[:1], -jnp.eye(2)
    >>> log_probs, scores = label_scores(linear, params, x, direction)
    >>> scores.tolist()  # a step along -direction makes class 0 more likely
    [[0.5, -0.5]]

    Args:
      logits_fn: (params, inputs) -> f32[B, K], in evaluation mode: with batch statistics a row's
        score would depend on the other rows.
      params: pytree.
      inputs: pytree with leading axis B.
      direction: v, like params or with None leaves.
      mode: "jvp" (exact) or "finite_difference": -(log p(theta + e v) - log p(theta)) / e with
        e = epsilon / ||v||; a forward pass instead of a product, f32 only.
      epsilon: length of the finite-difference step in parameter space.
      chunk: rows scored at a time, to bound memory; must divide B. None = all at once.

    Returns:
      (log_probs f32[B, K], scores f32[B, K]).

    Raises:
      ValueError: an unknown mode, epsilon <= 0, a chunk that does not divide B, or a network of one
        logit.
    """
    checks.choice(("jvp", "finite_difference"), mode=mode)
    checks.positive(epsilon=epsilon)
    if chunk is not None:
        size = jax.tree.leaves(inputs)[0].shape[0]
        if chunk < 1 or size % chunk:
            raise ValueError(f"chunk must divide the batch of {size} rows; given {chunk}")
        chunks = jax.tree.map(lambda x: x.reshape(size // chunk, chunk, *x.shape[1:]), inputs)
        out = jax.lax.map(
            lambda x: label_scores(logits_fn, params, x, direction, mode=mode, epsilon=epsilon),
            chunks,
        )
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), out)

    start = restrict(params, direction)
    logits = curvatures.logits_of(logits_fn, params, inputs)
    if mode == "jvp":
        out, change = jax.jvp(logits, (start,), (direction,))
        _at_least_two_classes(out)
        log_probs = jax.nn.log_softmax(out)
        return log_probs, _along(change, log_probs)
    log_probs = jax.nn.log_softmax(logits(start))
    return log_probs, _difference(logits, log_probs, start, direction, epsilon)


def _at_least_two_classes(logits: jax.Array) -> None:
    """One logit has log-probability zero whatever the parameters: all its scores would be zero."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits_fn must give logits [B, K] of K >= 2 classes; given {logits.shape}: for two "
            "classes give two logits, such as (0, z)"
        )


def _along(change: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Scores from the change of the logits along v: S_ik = <p_i, dz_i> - dz_ik, f32[B, K]."""
    return jnp.sum(jnp.exp(log_probs) * change, axis=-1, keepdims=True) - change


def _difference(logits, log_probs, start, direction, epsilon) -> jax.Array:
    """Scores f32[B, K] from the network at start + e v and its log_probs at start."""
    norm = jnp.sqrt(curvatures.dot(direction, direction))
    step = epsilon / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    moved = jax.nn.log_softmax(logits(axpy(step, direction, start)))
    return (log_probs - moved) / step


def scorer(
    logits_fn: LogitsFn,
    params: Params,
    inputs: PyTree,
    *,
    mask: jax.Array | None = None,
    predicate: PathPredicate | None = None,
    solve: LinearSolve = identity_solve(),
    mode: Mode = "jvp",
    epsilon: float = 1e-2,
    chunk: int | None = None,
    forward: Forward | None = None,
    reduce: Reduce = identity,
) -> Scorer:
    """A function that turns a validation gradient into scores of these candidates.

        g -> v = solve(G + damping I, g) -> S_ik = -(J_i v)_k

    The candidates' forward pass happens here, outside the returned function. So the function may
    stand in a branch (`lax.cond`) while XLA still shares the pass with the training step. With
    finite differences or chunks the network runs again inside.

    >>> def linear(params, x):
    ...     return x @ params
    >>> along = scorer(linear, jnp.zeros((2, 2)), jnp.eye(2)[:1])
    >>> scores, log_probs, info = along(-jnp.eye(2))
    >>> scores.tolist()
    [[0.5, -0.5]]

    Args:
      logits_fn: (params, inputs) -> f32[B, K], evaluation mode.
      params: pytree.
      inputs: candidates, leading axis B.
      mask: bool[B]; False rows do not count in the curvature.
      predicate: path -> bool, the parameters that the gradient holds; None = all.
      solve: a LinearSolve.
      mode, epsilon, chunk: see `label_scores`.
      forward: the candidates' pass if it was already made (`curvature.linear_logits`).
      reduce: mean over the data-parallel axis.
    """

    checks.choice(("jvp", "finite_difference"), mode=mode)
    checks.positive(epsilon=epsilon)
    # Where nothing asks for a product, or for these logits, jit drops them.
    if forward is None:
        forward = curvatures.linear_logits(logits_fn, params, inputs, predicate=predicate)
    logits, push = forward
    log_probs = jax.nn.log_softmax(logits)

    def along(gradient):
        matvec = curvatures.gauss_newton(logits, push, gradient, mask=mask, reduce=reduce)
        direction, info = solve(matvec, gradient)
        if chunk is not None:
            options = dict(mode=mode, epsilon=epsilon, chunk=chunk)
            again, scores = label_scores(logits_fn, params, inputs, direction, **options)
            return scores, again, info
        if mode == "jvp":
            return _along(push(direction), log_probs), log_probs, info
        start = restrict(params, direction)
        logits_at = curvatures.logits_of(logits_fn, params, inputs)
        moved = _difference(logits_at, log_probs, start, direction, epsilon)
        return moved, log_probs, info

    return along


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
    compute_dtype: str | None = None,
    reduce: Reduce = identity,
) -> Scores:
    """Validation gradient -> direction -> label scores: the first half of SAFLEX.

        v = solve(G + damping I, grad L_val) ,   S_ik = -(J_i v)_k

    `solve` sets the direction: `identity_solve()` is the paper's greedy step,
    `preconditioned_solve` an optimiser's step; `neumann_solve` and `cg_solve` are implicit
    differentiation. G is the Gauss-Newton matrix of the candidates' mean cross-entropy: positive
    semi-definite and, for a linear head, exactly the Hessian. With `predicate=under("head")` the
    network runs once, and every product with G is a product with its features.

    >>> def linear(params, x):
    ...     return x @ params
    >>> x, labels = jnp.eye(2), jnp.eye(2)
    >>> result = score(linear, jnp.zeros((2, 2)), x, val_inputs=x, val_labels=labels)
    >>> (result.scores > 0).tolist()  # the right labels help, the wrong ones harm
    [[True, False], [False, True]]

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
      compute_dtype: of both passes, see `in_dtype`. If the training step uses another precision, it
        no longer shares the candidates' pass.
      reduce: mean over the data-parallel axis.

    Returns:
      Scores, without gradient (stop_gradient).

    Raises:
      ValueError: shapes disagree, no validation sample, labels outside the simplex, parameters that
        are not floats, a network of one logit, or an argument that is no function or no array.
    """
    check(mode, compute_dtype)
    checks.function("(params, inputs) -> logits [B, K]", 2, logits_fn=logits_fn)
    checks.function("(matvec, rhs) -> (x, info), such as cg_solve()", 2, solve=solve)
    if predicate is not None:
        checks.function("of a path, such as under('head')", 1, predicate=predicate)
    checks.arrays(val_labels=val_labels)
    checks.rows(jax.tree.leaves(inputs)[0].shape[0], mask=mask)
    number = jax.tree.leaves(val_inputs)[0].shape[0]
    checks.rows(number, val_mask=val_mask)
    if number:
        checks.keeps_some(val_mask=val_mask)
    checks.simplex(val_mask, val_labels=val_labels)
    logits_fn = in_dtype(logits_fn, compute_dtype)
    val_loss, gradient = validation_gradient(
        logits_fn, params, val_inputs, val_labels, mask=val_mask, predicate=predicate, reduce=reduce
    )
    scores, log_probs, info = scorer(
        logits_fn,
        params,
        inputs,
        mask=mask,
        predicate=predicate,
        solve=solve,
        mode=mode,
        epsilon=epsilon,
        chunk=chunk,
        reduce=reduce,
    )(gradient)
    return jax.lax.stop_gradient(Scores(scores, log_probs, val_loss, info))
