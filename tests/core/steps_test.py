import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax.core import linear_solve, steps
from saflex_jax.methods import supervised
from saflex_jax.rules import Refinement, Scoring, Simplex
from saflex_jax.types import Targets
from tests import problems
from tests.problems import Convex, assert_close

SIZE = 6


def start(p, method):
    """The method's first state."""
    return jax.jit(method.init)(jax.random.key(0), p.streams.candidates.inputs)


def runner(p, method):
    """(state, number of steps) -> (state, metrics of the last), compiled once."""
    step = jax.jit(lambda state: method.step(state, p.streams))

    def run(state, num_steps):
        for _ in range(num_steps):
            state, metrics = step(state)
        return state, metrics

    return run


def same_type(after, before):
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_prior_at_infinity_and_weights_of_one_is_the_upstream_step():
    p = problems.problem("cnn", norm="batch", masked=1)
    tx = optax.sgd(0.1, momentum=0.9)
    anchored = Simplex(prior_strength=math.inf, learn="labels", tolerance=0.0)
    ends = []
    for method in (
        supervised.make(p.model, tx),
        supervised.make(p.model, tx, Refinement(Scoring("identity"), anchored)),
    ):
        state, metrics = runner(p, method)(start(p, method), 3)
        ends.append((state.params, state.model_state, metrics["loss"]))
    upstream, saflexed = ends
    assert_close(saflexed, upstream, 1e-6)
    assert metrics["val_loss"][1] == 1  # scores were taken, and did not matter


def mean_loss(p, params, batch, labels, weights):
    """The definition, over the real rows alone."""
    rows = batch.mask.nonzero()[0]
    logits = p.logits_fn(params, batch.inputs[rows])
    losses = -jnp.sum(labels[rows] * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(weights[rows] * losses) / len(rows)


@pytest.mark.parametrize("with_clean", [False, True])
def test_inner_step_is_the_gradient_step_on_the_losses_taken_apart(with_clean):
    p = problems.problem("mlp", masked=2)
    rate = 0.1
    tx = optax.sgd(rate)
    state = steps.init_state(jax.random.key(0), p.params, p.model_state, tx)
    candidates, clean = p.streams.candidates, p.streams.val if with_clean else None
    weights = np.array([0.0, 2.0, 1.0, 0.5, 9.0, 9.0], np.float32)
    targets = Targets(weights, candidates.labels[::-1], np.zeros(SIZE, np.float32))

    @jax.jit
    def step(state):
        return steps.inner_step(
            state, candidates, targets, train_fn=p.model.train, tx=tx, clean=clean
        )

    after, metrics = step(state)

    parts = {"candidate": (candidates, targets.labels, weights)}
    if with_clean:
        parts["clean"] = (clean, clean.labels, np.ones(4, np.float32))
    gradient = jax.tree.map(jnp.zeros_like, p.params)
    loss = 0.0
    for name, part in parts.items():
        loss_of = jax.value_and_grad(lambda params, part=part: mean_loss(p, params, *part))
        value, grads = jax.jit(loss_of)(p.params)
        gradient, loss = jax.tree.map(jnp.add, gradient, grads), loss + value
        total, count = metrics[f"{name}_loss"]
        real = part[0].mask.sum()
        assert count == real
        np.testing.assert_allclose(total, value * real, rtol=1e-5)
    assert_close(after.params, jax.tree.map(lambda a, g: a - rate * g, p.params, gradient), 1e-6)
    np.testing.assert_allclose(metrics["loss"], (loss, 1), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], (optax.global_norm(gradient), 1), rtol=1e-5)
    assert "clean_loss" in metrics or not with_clean
    assert after.step == 1
    same_type(after, state)


def test_outer_step_moves_meta_downhill_inside_its_set(x64):
    problem = Convex()
    meta_tx = optax.sgd(0.3)

    def project(meta):
        labels = jax.vmap(optax.projections.projection_simplex)(meta["labels"])
        return {**meta, "weights": jnp.clip(meta["weights"], 0.0, 2.0), "labels": labels}

    @jax.jit
    def step(meta, opt_state):
        params = problem.minimise(problem.params, meta)
        return steps.outer_step(
            meta,
            opt_state,
            params,
            inner_loss=problem.inner,
            outer_loss=problem.outer,
            meta_tx=meta_tx,
            solve=linear_solve.cg_solve(maxiter=30, damping=0.0),
            project=project,
        )

    meta, opt_state = problem.meta, meta_tx.init(problem.meta)
    values = []
    for _ in range(10):
        meta, opt_state, metrics = step(meta, opt_state)
        values.append(float(metrics["val_loss"][0]))
        assert metrics["solve_residual"][0] < 1e-9
        assert (meta["weights"] >= 0).all() and (meta["labels"] >= 0).all()
        np.testing.assert_allclose(meta["labels"].sum(1), 1, atol=1e-12)
    assert (np.diff(values) < 0).all()
    assert values[0] - values[-1] > 0.05
    same_type(meta, problem.meta)
