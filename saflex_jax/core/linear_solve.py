"""Approximate solutions of A x = b on pytrees, behind one signature.

    (matvec, rhs) -> (x, SolveInfo(residual))

A is the curvature of the inner problem, b the validation gradient, x the direction of the scores.
identity: the paper's greedy step. preconditioned: the optimiser's own scaling of a gradient.
Neumann, CG: implicit differentiation. `residual` is ||A x - b|| / ||b||, with the damping inside A
where there is one. Under jit it costs nothing unless it is used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core.curvature import Matvec, dot
from saflex_jax.core.tree import axpy, restrict
from saflex_jax.types import LinearSolve, PyTree, SolveInfo


def _info(matvec: Matvec, x: PyTree, rhs: PyTree) -> SolveInfo:
    error = axpy(-1.0, rhs, matvec(x))
    size = jnp.maximum(dot(rhs, rhs), jnp.finfo(jnp.float32).tiny)
    return SolveInfo(jnp.sqrt(dot(error, error) / size))


def _damped(matvec: Matvec, damping: float) -> Matvec:
    return lambda u: axpy(damping, u, matvec(u))


def identity_solve(*, scale: float = 1.0) -> LinearSolve:
    """x = scale * b: the greedy direction of the paper.

    >>> x, info = identity_solve(scale=0.5)(lambda v: 2 * v, jnp.array([4.0]))
    >>> float(x[0]), float(info.residual)
    (2.0, 0.0)

    Args:
      scale: step length; the learning rate gives a gradient step.
    """
    checks.positive(scale=scale)

    def solve(matvec, rhs):
        x = jax.tree.map(lambda b: scale * b, rhs)
        return x, _info(matvec, x, rhs)

    return solve


def preconditioned_solve(inverse_diagonal: PyTree) -> LinearSolve:
    """x = D b with a diagonal D.

    >>> x, info = preconditioned_solve(jnp.array([0.5, 0.25]))(lambda v: v, jnp.ones(2))
    >>> x.tolist()
    [0.5, 0.25]

    Args:
      inverse_diagonal: D, a tree like b or with more leaves, for instance `adam_inverse_diagonal`.
    """

    def solve(matvec, rhs):
        x = jax.tree.map(lambda d, b: d * b, restrict(inverse_diagonal, rhs), rhs)
        return x, _info(matvec, x, rhs)

    return solve


def adam_inverse_diagonal(opt_state: PyTree, *, b2: float = 0.999, eps: float = 1e-8) -> PyTree:
    """The diagonal by which Adam multiplies a gradient: a tree like params.

        1 / (sqrt(nu / (1 - b2^t)) + eps) ,   ones before the first step

    >>> adam_inverse_diagonal(optax.adam(1e-3).init(jnp.zeros(2))).tolist()
    [1.0, 1.0]

    Args:
      opt_state: optax state with Adam's second moment nu, nested or not.
      b2, eps: the optimiser's own; optax does not keep them in its state.

    Raises:
      ValueError: the state holds no second moment.
    """
    moments = [
        s
        for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(s, optax.ScaleByAdamState)
    ]
    if len(moments) != 1:
        raise ValueError(
            f"opt_state must hold exactly one optax.ScaleByAdamState; given {len(moments)} "
            f"in {type(opt_state).__name__}"
        )
    count, nu = moments[0].count, moments[0].nu
    correction = jnp.where(count > 0, 1 - b2 ** count.astype(jnp.float32), 1.0)
    return jax.tree.map(
        lambda n: jnp.where(count > 0, 1 / (jnp.sqrt(n / correction) + eps), jnp.ones_like(n)), nu
    )


def neumann_solve(*, steps: int, scale: float, damping: float = 0.0) -> LinearSolve:
    """x = scale * sum_{j=0..steps} (I - scale (A + damping I))^j b.

    Converges to (A + damping I)^-1 b for 0 < scale < 2 / (largest eigenvalue). Equals `steps + 1`
    unrolled gradient-descent steps at a fixed Hessian; with steps = 0, `identity_solve`.

    >>> x, info = neumann_solve(steps=2, scale=0.5)(lambda v: v, jnp.ones(1))
    >>> x.tolist(), float(info.residual)  # 1/2 + 1/4 + 1/8
    ([0.875], 0.125)

    Args:
      steps: >= 0, products with A.
      scale: > 0, step length.
      damping: >= 0, added to every eigenvalue of A.

    Raises:
      ValueError: steps < 0, scale <= 0, damping < 0.
    """
    checks.whole(steps=steps)
    checks.positive(scale=scale)
    checks.amount(damping=damping)

    def solve(matvec, rhs):
        matvec = _damped(matvec, damping)

        def body(_, x):  # x <- x + scale (b - A x)
            return axpy(scale, axpy(-1.0, matvec(x), rhs), x)

        x = jax.lax.fori_loop(0, steps, body, jax.tree.map(lambda b: scale * b, rhs))
        return x, _info(matvec, x, rhs)

    return solve


def cg_solve(*, maxiter: int = 10, tol: float = 0.0, damping: float = 0.1) -> LinearSolve:
    """(A + damping I) x = b by `maxiter` conjugate-gradient iterations.

    A must be symmetric positive semi-definite. Gauss-Newton always is; a Hessian only at a minimum.
    The loop has a fixed length, so that devices need not agree on an end; once it has converged, or
    nothing but rounding curves along the next direction, x stays. The latter happens where A +
    damping I is singular; if b is not in its range, no x solves the system and the residual is
    large. It replaces `jax.scipy.sparse.linalg.cg`, which XLA's CPU backend computes wrongly under
    vmap around a network (JAX 0.10 to 0.12, docs/sharp_edges.md).

    >>> x, info = cg_solve(damping=0.0)(lambda v: 4 * v, jnp.ones(2))
    >>> x.round(6).tolist()
    [0.25, 0.25]

    Args:
      maxiter: >= 1, iterations; check `info.residual` if A + damping I is ill-conditioned.
      tol: >= 0, stop at this residual relative to ||b||; 0 = at rounding error.
      damping: >= 0, added to every eigenvalue of A.

    Raises:
      ValueError: maxiter < 1, tol < 0, damping < 0.
    """
    checks.whole(1, maxiter=maxiter)
    checks.amount(tol=tol, damping=damping)

    def solve(matvec, rhs):
        matvec = _damped(matvec, damping)
        # Solved for b of length one, so that the end is the same whatever the scale of b is.
        size = jnp.sqrt(dot(rhs, rhs))
        unit = jax.tree.map(lambda b: b / jnp.where(size > 0, size, 1.0), rhs)
        eps = float(jnp.finfo(size.dtype).eps)
        end = max(tol, eps) ** 2

        def body(_, carry):
            x, residual, direction, square, length, most, done = carry
            product = matvec(direction)
            bent = dot(direction, product)
            most = jnp.maximum(most, bent / jnp.where(length > 0, length, 1.0))  # curvature so far
            # Beyond the end step lengths become 0 / 0; without curvature they have no limit.
            done |= (square <= end) | (bent <= 10 * eps * most * length)
            far = jnp.where(done, 0.0, square / jnp.where(done, 1.0, bent))
            x, residual = axpy(far, direction, x), axpy(-far, product, residual)
            new = dot(residual, residual)
            turn = jnp.where(done, 0.0, new / jnp.where(done, 1.0, square))
            direction, length = axpy(turn, direction, residual), new + turn**2 * length
            return x, residual, direction, new, length, most, done

        zeros, one = jax.tree.map(jnp.zeros_like, unit), dot(unit, unit)
        carry = zeros, unit, unit, one, one, jnp.zeros_like(one), jnp.zeros_like(one, bool)
        x, *_ = jax.lax.fori_loop(0, maxiter, body, carry)
        x = jax.tree.map(lambda u: size * u, x)
        return x, _info(matvec, x, rhs)

    return solve
