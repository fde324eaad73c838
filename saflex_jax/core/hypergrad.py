"""Gradients of an outer loss through the optimum of an inner problem.

For theta*(phi) = argmin_theta L_in(theta, phi) the implicit function theorem gives

    d L_out / d phi = d_phi L_out - d_phi <grad_theta L_in(theta*, phi), v> ,
    v = (grad^2_theta L_in + damping I)^-1 grad_theta L_out

phi (`meta`) is one explicit pytree: sample weights, soft labels, or any meta-parameters. A loss may
close over data but not over what is differentiated. Neither the path to theta* nor its starting
point is differentiated.

If phi holds the soft labels, L_in is their mean cross-entropy and v = grad L_out
(`identity_solve`), the hypergradient is -scores / B: SAFLEX is the implicit gradient with the
identity as inverse Hessian.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import curvature
from saflex_jax.core.linear_solve import cg_solve
from saflex_jax.core.tree import identity
from saflex_jax.types import LinearSolve, Params, PyTree, Reduce, SolveInfo

Loss = Callable[[Params, PyTree], jax.Array]

# Conjugate gradients until the residual is at rounding, relative to ||b||. The cap is for systems
# that have no solution (a singular Hessian); others end long before.
CONVERGED = cg_solve(maxiter=1000, tol=0.0, damping=0.0)


def implicit_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Params,
    meta: PyTree,
    *,
    solve: LinearSolve = CONVERGED,
    reduce: Reduce = identity,
) -> tuple[jax.Array, PyTree, SolveInfo]:
    """The outer loss and its total derivative with respect to `meta` at an inner optimum.

    >>> def inner_loss(params, meta):
    ...     return (params - meta) ** 2
    >>> def outer_loss(params, meta):
    ...     return params**3
    >>> value, gradient, info = implicit_hypergradient(inner_loss, outer_loss, 2.0, 2.0)
    >>> float(value), float(gradient), float(info.residual)
    (8.0, 12.0, 0.0)

    Args:
      inner_loss: (params, meta) -> f32[]; under pmap the device's share (`losses.masked_mean`).
      outer_loss: (params, meta) -> f32[]; under pmap also the device's share.
      params: an (approximate) minimiser of inner_loss(., meta).
      meta: pytree of floats, the same on every device.
      solve: a LinearSolve for the inner Hessian. The default solves to rounding error and needs a
        positive definite Hessian.
      reduce: mean over the data-parallel axis.

    Returns:
      (f32[] outer loss, gradient like meta, SolveInfo).
    """
    value, (rhs, direct) = reduce(jax.value_and_grad(outer_loss, argnums=(0, 1))(params, meta))
    hvp = curvature.hessian(lambda p: inner_loss(p, meta), params, reduce=reduce)
    v, info = solve(hvp, rhs)
    indirect = reduce(_cross(inner_loss, params, meta, v))
    return value, jax.tree.map(jnp.subtract, direct, indirect), info


def _cross(inner_loss: Loss, params: Params, meta: PyTree, v: Params) -> PyTree:
    """d_meta <grad_theta L_in(theta, meta), v>, as the gradient of a directional derivative."""

    def slope(m):
        return jax.jvp(lambda p: inner_loss(p, m), (params,), (v,))[1]

    return jax.grad(slope)(meta)


def differentiable_argmin(
    inner_loss: Loss,
    minimise: Callable[[Params, PyTree], Params],
    *,
    solve: LinearSolve = CONVERGED,
) -> Callable[..., Params]:
    """An inner solver whose backward pass is the implicit function theorem.

    >>> def inner_loss(params, meta):
    ...     return (params - meta) ** 2
    >>> argmin = differentiable_argmin(inner_loss, minimise=lambda params0, meta: meta)
    >>> float(jax.grad(lambda meta: argmin(0.0, meta) ** 3)(2.0))  # 3 meta^2
    12.0

    `argmin` takes a third argument whose gradient is the relative residual ||A v - b|| / ||b|| of
    the backward pass's linear system. Check it: unless the residual is small, the gradient is not
    that of the optimum.

    >>> def outer_loss(meta, probe):
    ...     return argmin(0.0, meta, probe) ** 3
    >>> gradient, residual = jax.grad(outer_loss, argnums=(0, 1))(2.0, 0.0)
    >>> float(residual)
    0.0

    Args:
      inner_loss: (params, meta) -> f32[].
      minimise: (params0, meta) -> params, any solver; it is never differentiated.
      solve: a LinearSolve for (inner Hessian) v = cotangent. The default runs conjugate gradients
        to rounding error and needs a positive definite Hessian: a minimum, regularised if need be.

    Returns:
      argmin: (params0, meta, probe = 0.0) -> params, differentiable in meta. The gradient with
      respect to params0 is zero. With respect to `probe` f32[] it is the residual (NaN if `solve`
      reports none), summed over the calls that share a probe.
    """

    @jax.custom_vjp
    def argmin(params0, meta, probe):
        return minimise(params0, meta)

    def forward(params0, meta, probe):
        params = minimise(params0, meta)
        return params, (params, meta)

    def backward(saved, cotangent):
        params, meta = saved
        hvp = curvature.hessian(lambda p: inner_loss(p, meta), params)
        v, info = solve(hvp, cotangent)
        residual = jnp.nan if info.residual is None else info.residual
        # params0 has the shapes of params.
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads = jax.tree.map(jnp.negative, _cross(inner_loss, params, meta, v))
        return zeros, grads, jnp.asarray(residual, jnp.float32)

    argmin.defvjp(forward, backward)

    def with_probe(params0: Params, meta: PyTree, probe: jax.Array | float = 0.0) -> Params:
        return argmin(params0, meta, jnp.asarray(probe, jnp.float32))

    return with_probe


def unrolled_argmin(
    inner_loss: Loss,
    params: Params,
    meta: PyTree,
    *,
    tx: optax.GradientTransformation,
    steps: int,
) -> Params:
    """Takes `steps` optimiser steps on the inner loss and differentiates through all of them.

    jax.grad of an outer loss of the result is the exact hypergradient of the truncated problem.
    Its memory grows with `steps`.

    >>> def inner_loss(params, meta):
    ...     return (params - meta) ** 2
    >>> float(unrolled_argmin(inner_loss, jnp.zeros(()), 2.0, tx=optax.sgd(0.25), steps=2))
    1.5

    Args:
      inner_loss: (params, meta) -> f32[].
      params: where to start.
      meta: pytree of floats.
      tx: the optimiser; its state starts fresh.
      steps: >= 1, optimiser steps.

    Raises:
      ValueError: steps is no whole number >= 1.
    """
    checks.whole(1, steps=steps)

    def body(carry, _):
        p, opt_state = carry
        updates, opt_state = tx.update(jax.grad(inner_loss)(p, meta), opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), None, length=steps)
    return params
