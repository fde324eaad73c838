"""Gradients of an outer loss through the optimum of an inner problem.

For theta*(phi) = argmin_theta L_in(theta, phi) the implicit function theorem gives

    d L_out / d phi = d_phi L_out - d_phi <grad_theta L_in(theta*, phi), v> ,
    v = (grad^2_theta L_in + damping I)^-1 grad_theta L_out

phi (`meta`) is one explicit pytree: sample weights, soft labels, or any meta-parameters; a loss may
close over data but not over what is differentiated. What is *not* differentiated: the path by
which theta* was found, and therefore the starting point.

With phi = the soft labels, L_in their mean cross-entropy and v = grad L_out (`identity_solve`) the
hypergradient is -scores / B: SAFLEX is the implicit gradient with the identity as inverse Hessian.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core import curvature
from saflex_jax.core.tree import identity
from saflex_jax.types import LinearSolve, Params, PyTree, Reduce, SolveInfo

Loss = Callable[[Params, PyTree], jax.Array]


def implicit_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Params,
    meta: PyTree,
    *,
    solve: LinearSolve,
    reduce: Reduce = identity,
) -> tuple[jax.Array, PyTree, SolveInfo]:
    """Outer loss and its total derivative with respect to `meta` at an inner optimum.

    Args:
      inner_loss: (params, meta) -> f32[]; under pmap the device's share (`losses.masked_mean`).
      outer_loss: (params, meta) -> f32[]; likewise.
      params: an (approximate) minimiser of inner_loss(., meta).
      meta: pytree of floats, the same on every device.
      solve: a LinearSolve; it receives the product with the inner Hessian.
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
    inner_loss: Loss, minimise: Callable[[Params, PyTree], Params], *, solve: LinearSolve
) -> Callable[[Params, PyTree], Params]:
    """Makes an inner solver whose backward pass is the implicit function theorem.

        argmin = differentiable_argmin(inner_loss, minimise, solve=cg_solve(damping=0.0))
        jax.grad(lambda meta: outer_loss(argmin(params0, meta)))(meta)

    Args:
      inner_loss: (params, meta) -> f32[].
      minimise: (params0, meta) -> params, any solver; it is never differentiated.
      solve: a LinearSolve for (inner Hessian) v = cotangent.

    Returns:
      (params0, meta) -> params, differentiable in meta; the gradient for params0 is zero.
    """

    @jax.custom_vjp
    def argmin(params0, meta):
        return minimise(params0, meta)

    def forward(params0, meta):
        params = minimise(params0, meta)
        return params, (params, meta)

    def backward(saved, cotangent):
        params, meta = saved
        hvp = curvature.hessian(lambda p: inner_loss(p, meta), params)
        v, _ = solve(hvp, cotangent)
        # params0 has the shapes of params.
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, jax.tree.map(jnp.negative, _cross(inner_loss, params, meta, v))

    argmin.defvjp(forward, backward)
    return argmin


def unrolled_argmin(
    inner_loss: Loss,
    params: Params,
    meta: PyTree,
    *,
    tx: optax.GradientTransformation,
    steps: int,
) -> Params:
    """`steps` optimiser steps on the inner loss; ordinary autodiff goes through all of them.

    The ground truth for hypergradients: jax.grad of an outer loss of this is exact for the
    truncated problem, at a memory cost that grows with `steps`.

    Raises:
      ValueError: steps < 1.
    """
    checks.positive(steps=steps)

    def body(carry, _):
        p, opt_state = carry
        updates, opt_state = tx.update(jax.grad(inner_loss)(p, meta), opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), None, length=steps)
    return params
