from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from saflex_jax._compat import enable_x64
from saflex_jax.core import linear_solve
from saflex_jax.core.hypergrad import (
    differentiable_argmin,
    implicit_hypergradient,
    unrolled_argmin,
)
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.scores import score
from saflex_jax.core.tree import merge, select, under
from saflex_jax.types import SolveInfo
from tests import problems
from tests.problems import Convex, assert_close

# Nine parameters: CG ends after nine iterations, here with room for rounding.
EXACT = linear_solve.cg_solve(maxiter=30, damping=0.0)


def finite_difference(f, meta, e=1e-5):
    """f at a pytree, and its central differences in every coordinate."""
    flat, unravel = ravel_pytree(meta)
    flat, basis = np.asarray(flat), e * np.eye(len(flat))
    points = np.concatenate([flat[None], flat + basis, flat - basis])
    value, *moved = np.asarray(jax.jit(jax.vmap(lambda m: f(unravel(m))))(points))
    above, below = np.split(np.array(moved), 2)
    return value, unravel((above - below) / (2 * e))


CONVEX = Convex()


@partial(jax.jit, static_argnums=2)
def implicit(params, meta, solve=EXACT):
    return implicit_hypergradient(CONVEX.inner, CONVEX.outer, params, meta, solve=solve)


minimum = jax.jit(partial(CONVEX.minimise, CONVEX.params))


@pytest.fixture(scope="module")
def optimum():
    with enable_x64(True):
        return minimum(CONVEX.meta)


@pytest.fixture(scope="module")
def exact(optimum):
    """(value, gradient, info) of the convex problem in double precision."""
    with enable_x64(True):
        return implicit(optimum, CONVEX.meta)


def test_implicit_equals_finite_difference_and_both_gradients_through_the_optimum(
    x64, exact, optimum
):
    def total(meta):
        return CONVEX.outer(CONVEX.minimise(CONVEX.params, meta), meta)

    expected_value, expected = finite_difference(total, CONVEX.meta)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(expected))

    value, grads, info = exact
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    assert info.residual < 1e-9
    assert_close(grads, expected, 1e-8)

    def unrolled(meta):
        params = unrolled_argmin(CONVEX.inner, CONVEX.params, meta, tx=optax.sgd(0.5), steps=200)
        return CONVEX.outer(params, meta)

    assert_close(jax.jit(jax.grad(unrolled))(CONVEX.meta), expected, 1e-8)

    argmin = differentiable_argmin(CONVEX.inner, lambda start, meta: optimum, solve=EXACT)

    def through(meta):
        return CONVEX.outer(argmin(CONVEX.params, meta), meta)

    assert_close(jax.jit(jax.grad(through))(CONVEX.meta), expected, 1e-8)


def test_meta_that_the_outer_loss_sees_alone(x64, exact, optimum):
    # An outer loss may hold meta-parameters of its own: their gradient is the direct one.
    meta = {"inner": CONVEX.meta, "outer": np.array([0.7])}

    def inner(params, meta):
        return CONVEX.inner(params, meta["inner"])

    def outer(params, meta):
        return CONVEX.outer(params, meta["inner"]) + jnp.sum(meta["outer"] ** 3)

    _, grads, _ = jax.jit(partial(implicit_hypergradient, inner, outer, solve=EXACT))(optimum, meta)
    np.testing.assert_allclose(grads["outer"], [3 * 0.7**2])
    assert_close(grads["inner"], exact[1], 1e-10)


def test_neumann_equals_the_unrolled_gradient_of_as_many_steps(x64, exact, optimum):
    # From the optimum, T gradient steps differentiate to the series of T terms, no more, no less.
    rate, steps = 0.3, 4
    solve = linear_solve.neumann_solve(steps=steps - 1, scale=rate)
    _, grads, _ = implicit(optimum, CONVEX.meta, solve)

    def unrolled(meta):
        params = unrolled_argmin(CONVEX.inner, optimum, meta, tx=optax.sgd(rate), steps=steps)
        return CONVEX.outer(params, meta)

    expected = jax.jit(jax.grad(unrolled))(CONVEX.meta)
    assert_close(grads, expected, 1e-8)
    assert np.abs(exact[1]["weights"] - expected["weights"]).max() > 1e-3  # truncation does show


def test_gradient_through_the_optimum_under_vmap_and_of_the_starting_point(x64):
    argmin = differentiable_argmin(CONVEX.inner, CONVEX.minimise, solve=EXACT)

    def through(params0, meta):
        return CONVEX.outer(argmin(params0, meta), meta)

    metas = [jax.tree.map(lambda x: scale * x, CONVEX.meta) for scale in (1, 1.2, 0.7)]  # noqa: B023
    batched = jax.jit(jax.vmap(jax.grad(through, argnums=(0, 1)), (None, 0)))
    start, grads = batched(CONVEX.params, jax.tree.map(lambda *x: np.stack(x), *metas))
    np.testing.assert_array_equal(start["kernel"], 0)
    for i, meta in enumerate(metas):
        single = jax.tree.map(lambda x: x[i], grads)  # noqa: B023
        assert_close(single, implicit(minimum(meta), meta)[1], 1e-8)


class Ridge:
    """Least squares whose features have decaying scales, and all of it in closed form.

    inner = mean_i (x_i theta - y_i)^2 / 2 + exp(rho) / 2 |theta|^2; outer = validation error.
    """

    def __init__(self, l2, size=60, features=30):
        rng = np.random.default_rng(0)
        scale = 0.7 ** np.arange(features)
        x, val_x = scale * rng.normal(size=(2, size, features))
        truth = rng.normal(size=features) / np.sqrt(scale)
        y, val_y = x @ truth + 0.1 * rng.normal(size=size), val_x @ truth
        curvature = x.T @ x / size + l2 * np.eye(features)
        theta = np.linalg.solve(curvature, x.T @ y / size)
        residual = val_x @ theta - val_y
        gradient = -(val_x.T @ residual / size) @ np.linalg.solve(curvature, l2 * theta)
        self.rho, self.gradient = np.float32(np.log(l2)), gradient
        self.data = [np.float32(a) for a in (x, y, val_x, val_y)]
        self.theta = np.float32(theta)

    def inner(self, theta, rho):
        x, y, _, _ = self.data
        return jnp.mean((x @ theta - y) ** 2) / 2 + jnp.exp(rho) / 2 * jnp.sum(theta**2)

    def outer(self, theta):
        _, _, x, y = self.data
        return jnp.mean((x @ theta - y) ** 2) / 2

    def gradient_and_residual(self, **options):
        argmin = differentiable_argmin(self.inner, lambda start, rho: self.theta, **options)

        def total(rho, probe):
            return self.outer(argmin(jnp.zeros_like(self.theta), rho, probe))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(self.rho, 0.0)


@pytest.mark.parametrize("l2", [1e-2, 1e-5])  # condition numbers of 120 and 120,000
def test_by_default_a_weakly_regularised_gradient_is_solved_to_convergence(l2):
    ridge = Ridge(l2)
    gradient, residual = ridge.gradient_and_residual()
    np.testing.assert_allclose(gradient, ridge.gradient, rtol=1e-4)
    assert residual < 1e-5


def test_the_residual_tells_when_a_solver_of_ones_own_stops_early():
    ridge = Ridge(1e-4)
    few = linear_solve.cg_solve(maxiter=10, damping=0.0)
    gradient, residual = ridge.gradient_and_residual(solve=few)
    assert abs(gradient / ridge.gradient - 1) > 0.2 and residual > 0.01

    def silent(matvec, rhs):
        x, _ = EXACT(matvec, rhs)
        return x, SolveInfo(None)

    gradient, residual = ridge.gradient_and_residual(solve=silent)
    assert np.isnan(residual) and np.isfinite(gradient)


def test_implicit_hypergradient_solves_to_convergence_by_default(x64, exact, optimum):
    run = jax.jit(partial(implicit_hypergradient, CONVEX.inner, CONVEX.outer))
    _, grads, info = run(optimum, CONVEX.meta)
    assert info.residual < 1e-12
    assert_close(grads, exact[1], 1e-10)


def test_identity_solve_gives_minus_the_scores_over_the_batch():
    p = problems.problem("mlp", masked=2)
    candidates, val = p.streams.candidates, p.streams.val
    meta = {"weights": np.ones(6, np.float32), "labels": candidates.labels}

    def inner(params, meta):
        logits = p.logits_fn(params, candidates.inputs)
        losses = weighted_cross_entropy(logits, meta["labels"], meta["weights"])
        return masked_mean(losses, candidates.mask)

    def outer(params, _):
        losses = weighted_cross_entropy(p.logits_fn(params, val.inputs), val.labels)
        return masked_mean(losses, val.mask)

    @jax.jit
    def run(params, meta):
        solve = linear_solve.identity_solve()
        value, grads, _ = implicit_hypergradient(inner, outer, params, meta, solve=solve)
        options = dict(mask=candidates.mask, val_mask=val.mask)
        scored = score(p.logits_fn, params, candidates.inputs, val.inputs, val.labels, **options)
        return value, grads, scored.scores, scored.val_loss

    value, grads, scores, val_loss = run(p.params, meta)
    scores = np.asarray(scores) * candidates.mask[:, None]
    assert_close(grads["labels"], -scores / 4, 1e-6)
    assert_close(grads["weights"], -(candidates.labels * scores).sum(1) / 4, 1e-6)
    np.testing.assert_allclose(value, val_loss, rtol=1e-6)


def test_head_hypergradient_does_not_run_the_network_inside_the_solver():
    p = problems.problem("cnn")
    candidates, val = p.streams.candidates, p.streams.val

    def loss(part, meta, batch):
        logits = p.logits_fn(merge(part, p.params), batch.inputs)
        return masked_mean(weighted_cross_entropy(logits, batch.labels, meta[: len(logits)]))

    def loop(predicate):
        inner, outer = partial(loss, batch=candidates), partial(loss, batch=val)
        run = partial(implicit_hypergradient, inner, outer, solve=EXACT)
        jaxpr = jax.make_jaxpr(run)(select(p.params, predicate), jnp.ones(6)).jaxpr
        return problems.primitives(jaxpr, only_loops=True)

    head = loop(under("head"))
    assert "dot_general" in head and "conv_general_dilated" not in head
    assert "conv_general_dilated" in loop(None)  # there it must run


@pytest.mark.parametrize("number", [0, 0.5, 1.5])
def test_unrolled_needs_whole_steps(number):
    problem = Convex(np.float32)
    options = {"tx": optax.sgd(0.1), "steps": number}
    with pytest.raises(ValueError, match=f"steps must be a whole number >= 1; given {number}"):
        unrolled_argmin(problem.inner, problem.params, problem.meta, **options)
