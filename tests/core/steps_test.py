import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax.core import linear_solve, memory, steps
from saflex_jax.core.scores import score
from saflex_jax.core.targets import score_scale, solve_targets
from saflex_jax.core.tree import identity, select, under
from saflex_jax.methods import erm, implicit, saflex
from saflex_jax.types import Targets
from tests import problems
from tests.problems import CLASSES, Convex, assert_close

SIZE = 6
PAPER = dict(rule="simplex", direction="identity", tolerance=0.0)  # the cheapest rule to compile
MEMORY = dict(memory_decay=0.5, num_samples=SIZE, num_classes=CLASSES)


def start(p, method):
    """The method's first state."""
    return method.init(jax.random.key(0), p.streams.candidates.inputs)


def runner(p, method):
    """(state, number of steps) -> (state, metrics of the last), compiled once."""
    step = jax.jit(lambda state: method.step(state, p.streams, reduce=identity))

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
    ends = []
    for method in (
        erm.make(p.model, tx),
        saflex.make(p.model, tx, prior_strength=math.inf, learn="labels", **PAPER),
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

    step = lambda state: steps.inner_step(
        state, candidates, targets, train_fn=p.model.train, tx=tx, clean=clean
    )
    after, metrics = jax.jit(step)(state)

    parts = {"candidate": (candidates, targets.labels, weights)}
    if with_clean:
        parts["clean"] = (clean, clean.labels, np.ones(4, np.float32))
    gradient = jax.tree.map(jnp.zeros_like, p.params)
    loss = 0.0
    for name, part in parts.items():
        value, grads = jax.value_and_grad(lambda params: mean_loss(p, params, *part))(p.params)  # noqa: B023
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


@pytest.mark.parametrize(
    "options",
    [
        dict(direction="identity", **MEMORY),
        dict(direction="adam"),
        dict(direction="neumann", iterations=3, **MEMORY),
        dict(direction="cg", iterations=3),
        dict(direction="adam", every=2, start=1, **MEMORY),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_saflex_runs_and_keeps_the_state(options):
    p = problems.problem("mlp", masked=1)
    method = saflex.make(p.model, optax.adam(1e-2), **options)
    before = start(p, method)
    state, metrics = runner(p, method)(before, 2)
    same_type(state, before)
    assert state.step == 2
    for total, count in metrics.values():
        assert np.isfinite(total)
        assert count in (1, 5)  # padding is not counted
    for after, initial in zip(jax.tree.leaves(state.params), jax.tree.leaves(p.params)):
        assert np.isfinite(after).all() and (after != initial).any()


def found_scores(p, state, solve=linear_solve.identity_solve(), predicate=None):
    candidates, val = p.streams.candidates, p.streams.val
    return score(
        lambda params, x: p.model.logits(params, state.model_state, x),
        state.params,
        candidates.inputs,
        val.inputs,
        val.labels,
        mask=candidates.mask,
        val_mask=val.mask,
        solve=solve,
        predicate=predicate,
    ).scores


@functools.cache
def after_one_plain_step():
    """A problem and its state with moments of Adam that are not empty."""
    p = problems.problem("mlp", masked=1)
    method = erm.make(p.model, optax.adam(1e-2))
    return p, runner(p, method)(start(p, method), 1)[0]


@pytest.mark.parametrize("direction", saflex.DIRECTIONS)
def test_direction_is_what_its_solver_makes_of_the_validation_gradient(direction):
    p, state = after_one_plain_step()
    diagonal = linear_solve.adam_inverse_diagonal(state.opt_state)
    solve = {
        "identity": linear_solve.identity_solve(),
        "adam": linear_solve.preconditioned_solve(select(diagonal, under("head"))),
        "neumann": linear_solve.neumann_solve(steps=3, scale=0.2, damping=0.1),
        "cg": linear_solve.cg_solve(maxiter=3, damping=0.1),
    }
    options = dict(rule="simplex", iterations=3, damping=0.1, neumann_scale=0.2)
    method = saflex.make(p.model, optax.adam(1e-2), direction=direction, **options)
    candidates = p.streams.candidates

    def expected(direction):
        scores = found_scores(p, state, solve[direction], under("head"))
        return solve_targets(scores, candidates.labels, mask=candidates.mask)

    found = method.targets(state, p.streams)
    assert_close(found, expected(direction))
    rival = expected("identity" if direction != "identity" else "cg")
    assert np.abs(rival.labels - found.labels).max() > 1e-3


@pytest.mark.parametrize("remember", [False, True])
def test_start_and_every(remember):
    p = problems.problem("mlp", masked=1)
    candidates = p.streams.candidates
    options = dict(start=1, every=2, predicate=None, **PAPER, **(MEMORY if remember else {}))
    method = saflex.make(p.model, optax.sgd(0.1), **options)
    state = start(p, method)
    run = runner(p, method)
    targets = jax.jit(lambda state: method.targets(state, p.streams))
    scores = jax.jit(lambda state: found_scores(p, state))
    arrays = memory.init(SIZE, CLASSES)
    solved = lambda scores: solve_targets(
        scores, candidates.labels, tolerance=0.0, mask=candidates.mask
    )
    prior = Targets(candidates.mask * np.float32(1), candidates.labels, np.zeros(SIZE, np.float32))
    for step, due in enumerate([False, True, False, True]):
        assert state.step == step
        expected = prior
        if due:
            raw = scores(state)
            expected = solved(raw)
        if remember and due:
            normalised = raw / score_scale(raw, candidates.mask)
            arrays, remembered = memory.update(
                arrays, candidates.index, normalised, candidates.mask, decay=0.5
            )
            expected = solved(remembered)
        elif remember and step > 1:  # no new scores: what is remembered decides
            expected = solved(arrays.mean[candidates.index])
        assert_close(targets(state), expected)
        state, metrics = run(state, 1)
        assert metrics["val_loss"][1] == due
        if remember:
            assert_close(state.extra.memory.mean, arrays.mean)
            np.testing.assert_array_equal(state.extra.memory.visits, arrays.visits)
    assert np.abs(expected.labels - candidates.labels).max() > 0.01  # learning did happen


@pytest.mark.parametrize("learn", ["both", "weights", "labels"])
def test_implicit_keeps_its_pool_feasible(learn):
    p = problems.problem("mlp", masked=1)
    pool = np.concatenate([p.streams.candidates.labels, p.streams.val.labels])
    options = dict(prior=pool, learn=learn, max_weight=1.5, meta_tx=optax.adam(0.4))
    if learn != "both":  # the cheapest to compile; what is learned does not depend on it
        options["solve"] = linear_solve.identity_solve()
    method = implicit.make(p.model, optax.adam(1e-2), **options)
    before = start(p, method)
    state, metrics = runner(p, method)(before, 2)
    same_type(state, before)
    meta = jax.tree.map(np.asarray, state.extra[0])
    assert (meta["weights"] >= 0).all() and (meta["weights"] <= 1.5).all()
    assert (meta["labels"] >= 0).all()
    np.testing.assert_allclose(meta["labels"].sum(1), 1, atol=1e-5)
    # Only what is learned moves, and only for the real rows of the batch; the bounds are reached.
    moved = {
        "weights": np.abs(meta["weights"] - 1) > 1e-3,
        "labels": np.abs(meta["labels"] - pool).max(1) > 1e-3,
    }
    for name, rows in moved.items():
        np.testing.assert_array_equal(rows, (np.arange(10) < 5) & (learn in ("both", name)))
    if learn != "labels":
        assert {0.0, 1.5} & set(meta["weights"].tolist())
    assert all(np.isfinite(total) for total, _ in metrics.values())


def test_first_implicit_step_with_the_identity_is_a_step_along_the_scores():
    p = problems.problem("mlp", masked=1)
    candidates = p.streams.candidates
    rate = 0.5
    method = implicit.make(
        p.model,
        optax.sgd(0.1),
        prior=candidates.labels,
        meta_tx=optax.sgd(rate),
        solve=linear_solve.identity_solve(),
        predicate=None,
        learn="weights",
        max_weight=100.0,
    )
    state = start(p, method)
    after, _ = runner(p, method)(state, 1)
    found = method.targets(state, p.streams)
    scores = np.asarray(found_scores(p, state))
    utility = (candidates.labels * scores).sum(1) * candidates.mask
    weights = np.maximum(1 + rate * utility / 5, 0)
    assert_close(after.extra[0]["weights"], weights)
    # what is trained on has mean one over the five real rows
    weights *= candidates.mask
    assert_close(found.weights, weights * 5 / weights.sum())
    np.testing.assert_array_equal(after.extra[0]["labels"], candidates.labels)


def test_implicit_waits_for_its_start():
    p = problems.problem("mlp")
    prior = p.streams.candidates.labels
    tx = optax.sgd(0.1)
    method = implicit.make(p.model, tx, prior=prior, start=2, meta_tx=optax.adam(0.1))
    run = runner(p, method)
    before = start(p, method)
    state, _ = run(before, 2)
    # neither the pool nor its optimiser's moments have moved, and training was the plain one
    for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(before.extra)):
        np.testing.assert_array_equal(a, b)
    plain = erm.make(p.model, tx)
    assert_close(state.params, runner(p, plain)(start(p, plain), 2)[0].params, 1e-6)
    state, _ = run(state, 1)
    assert (state.extra[0]["labels"] != prior).any()


@pytest.mark.parametrize("make", [saflex.make, implicit.make])
def test_methods_that_need_validation_samples_say_so(make):
    p = problems.problem("mlp")
    options = {"prior": p.streams.candidates.labels} if make is implicit.make else {}
    method = make(p.model, optax.sgd(0.1), **options)
    state = start(p, method)
    with pytest.raises(ValueError, match=r"needs validation samples; given streams.val = None"):
        method.step(state, p.streams._replace(val=None), reduce=identity)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (saflex.refiner, {"direction": "newman"}, "direction must be .* did you mean 'neumann'"),
        (saflex.refiner, {"start": -1}, "start must be a whole number >= 0"),
        (saflex.refiner, {"every": 0}, "every must be a whole number >= 1"),
        (
            saflex.refiner,
            {"memory_decay": 0.9, "num_samples": 5},
            "num_classes must be a whole number >= 1",
        ),
        (implicit.refiner, {"prior": np.full((2, 3), 0.5)}, "prior must have rows .* sum to one"),
        (implicit.refiner, {"prior": np.eye(3), "max_weight": 0.0}, "max_weight must be positive"),
        (implicit.refiner, {"prior": np.eye(3), "learn": "weight"}, "did you mean 'weights'"),
        (implicit.refiner, {"prior": np.eye(3), "start": -1}, "start must be a whole number >= 0"),
    ],
)
def test_bad_options_of_the_rules(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
