from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax.core import linear_solve
from saflex_jax.core.hypergrad import (
    differentiable_argmin,
    implicit_hypergradient,
    unrolled_argmin,
)
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.scores import score
from saflex_jax.core.tree import merge, select, under
from tests import problems
from tests.problems import Convex, assert_close

# Nine parameters: CG ends after nine iterations, here with room for rounding.
EXACT = linear_solve.cg_solve(maxiter=30, damping=0.0)


def finite_difference(f, meta, e=1e-5):
    """Central differences in every coordinate of a pytree."""
    flat, unravel = jax.flatten_util.ravel_pytree(meta)
    values = jax.jit(jax.vmap(lambda m: f(unravel(m))))
    basis = e * jnp.eye(len(flat), dtype=flat.dtype)
    return unravel((values(flat[None] + basis) - values(flat[None] - basis)) / (2 * e))


@partial(jax.jit, static_argnums=(0, 2))
def implicit(problem, meta, solve=EXACT):
    params = problem.minimise(problem.params, meta)
    return implicit_hypergradient(problem.inner, problem.outer, params, meta, solve=solve)


def test_implicit_equals_finite_difference_and_both_gradients_through_the_optimum(x64):
    problem = Convex()

    def total(meta):
        return problem.outer(problem.minimise(problem.params, meta), meta)

    expected = finite_difference(total, problem.meta)
    assert all(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(expected))

    value, grads, info = implicit(problem, problem.meta)
    np.testing.assert_allclose(value, total(problem.meta), rtol=1e-12)
    assert info.residual < 1e-9
    assert_close(grads, expected, 1e-8)

    def unrolled(meta):
        params = unrolled_argmin(problem.inner, problem.params, meta, tx=optax.sgd(0.5), steps=200)
        return problem.outer(params, meta)

    assert_close(jax.jit(jax.grad(unrolled))(problem.meta), expected, 1e-8)

    argmin = differentiable_argmin(problem.inner, problem.minimise, solve=EXACT)

    def through(meta):
        return problem.outer(argmin(problem.params, meta), meta)

    assert_close(jax.jit(jax.grad(through))(problem.meta), expected, 1e-8)


def test_meta_that_the_outer_loss_sees_alone(x64):
    # An outer loss may hold meta-parameters of its own: their gradient is the direct one.
    problem = Convex()
    meta = {"inner": problem.meta, "outer": jnp.array([0.7])}

    def inner(p, m):
        return problem.inner(p, m["inner"])

    def outer(p, m):
        return problem.outer(p, m["inner"]) + jnp.sum(m["outer"] ** 3)

    params = problem.minimise(problem.params, problem.meta)
    run = jax.jit(partial(implicit_hypergradient, inner, outer, solve=EXACT))
    _, grads, _ = run(params, meta)
    np.testing.assert_allclose(grads["outer"], [3 * 0.7**2])
    assert_close(grads["inner"], implicit(problem, problem.meta)[1], 1e-10)


def test_neumann_equals_the_unrolled_gradient_of_as_many_steps(x64):
    # From the optimum, T gradient steps differentiate to the series of T terms, no more, no less.
    problem = Convex()
    optimum = problem.minimise(problem.params, problem.meta)
    rate, steps = 0.3, 4
    solve = linear_solve.neumann_solve(steps=steps - 1, scale=rate)
    _, grads, _ = implicit(problem, problem.meta, solve)

    def unrolled(meta):
        params = unrolled_argmin(problem.inner, optimum, meta, tx=optax.sgd(rate), steps=steps)
        return problem.outer(params, meta)

    expected = jax.jit(jax.grad(unrolled))(problem.meta)
    assert_close(grads, expected, 1e-8)
    exact = implicit(problem, problem.meta)[1]
    assert np.abs(exact["weights"] - expected["weights"]).max() > 1e-3  # truncation does show


def test_gradient_through_the_optimum_under_vmap_and_of_the_starting_point(x64):
    problem = Convex()
    argmin = differentiable_argmin(problem.inner, problem.minimise, solve=EXACT)

    def total(params0, meta):
        return problem.outer(argmin(params0, meta), meta)

    metas = jax.tree.map(lambda x: jnp.stack([x, 1.2 * x, 0.7 * x]), problem.meta)
    batched = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1)), (None, 0)))(problem.params, metas)
    start, meta = batched
    np.testing.assert_array_equal(start["kernel"], 0)
    for i in range(3):
        one = jax.tree.map(lambda x: x[i], metas)  # noqa: B023
        single = jax.tree.map(lambda x: x[i], meta)  # noqa: B023
        assert_close(single, implicit(problem, one)[1], 1e-8)


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

    run = partial(implicit_hypergradient, inner, outer, solve=linear_solve.identity_solve())
    value, grads, _ = jax.jit(run)(p.params, meta)
    found = score(
        p.logits_fn,
        p.params,
        candidates.inputs,
        val.inputs,
        val.labels,
        mask=candidates.mask,
        val_mask=val.mask,
    )
    scores = np.asarray(found.scores) * candidates.mask[:, None]
    assert_close(grads["labels"], -scores / 4, 1e-6)
    assert_close(grads["weights"], -(candidates.labels * scores).sum(1) / 4, 1e-6)
    np.testing.assert_allclose(value, found.val_loss, rtol=1e-6)


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


def test_unrolled_needs_a_step():
    problem = Convex(np.float32)
    with pytest.raises(ValueError, match="steps must be positive and finite; given 0"):
        unrolled_argmin(problem.inner, problem.params, problem.meta, tx=optax.sgd(0.1), steps=0)
