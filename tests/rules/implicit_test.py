"""Persistent weights and labels over several steps, against a loop that keeps its own books."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from saflex_jax.methods import supervised
from saflex_jax.rules.implicit import Implicit
from saflex_jax.types import RunInfo, Trace
from tests import problems
from tests.core.steps_test import runner as stepper
from tests.core.steps_test import same_type, start
from tests.problems import CLASSES, assert_close
from tests.rules.running_test import found_scores as greedy_scores
from tests.rules.stepping import (
    POOL,
    REAL,
    SIZE,
    assert_trained_on,
    pieces,
    runner,
    scores_along,
    streams_of,
)

MAX_WEIGHT = 1.5
PRIOR = problems.soft_labels(np.random.default_rng(7), POOL)
RUN = RunInfo(POOL, CLASSES, labels=lambda: PRIOR)


def pool_streams_of(step):
    """`streams_of` with the labels of the pool."""
    given = streams_of(step)
    labels = PRIOR[given.candidates.index]
    return given._replace(candidates=given.candidates._replace(labels=labels))


def simplex_projection(row):
    """The nearest point of the simplex, by bisection on what is taken from every entry."""
    low, high = row.min() - 1, row.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


def project(meta, learn="both"):
    """The whole pool."""
    weights = np.clip(meta["weights"], 0, MAX_WEIGHT)
    labels = np.stack([simplex_projection(row) for row in np.asarray(meta["labels"], np.float64)])
    return {
        "weights": np.ones(POOL) if learn == "labels" else weights,
        "labels": PRIOR if learn == "weights" else labels,
    }


META_TX = {"momentum": optax.sgd(4.0, momentum=0.9), "adam": optax.adam(0.3)}


@pytest.mark.parametrize("learn, meta_tx", [("both", "adam"), ("weights", "momentum")])
def test_implicit_is_gradient_descent_on_a_pool_that_is_projected_whenever_read(learn, meta_tx):
    tx = META_TX[meta_tx]
    arrays, run = runner(
        Implicit(
            RUN,
            meta_tx=tx,
            direction="identity",
            predicate="",
            max_weight=MAX_WEIGHT,
            learn=learn,
        ),
        streams=pool_streams_of,
    )
    meta = {"weights": np.ones(POOL, np.float32), "labels": PRIOR}
    opt, infeasible = tx.init(meta), 0
    for step in range(6):
        rows = streams_of(step).candidates.index[:REAL]
        read = project(meta, learn)
        infeasible = max(infeasible, np.abs(read["weights"] - meta["weights"])[rows].max())
        gradient, jacobian = pieces(step)
        scores = scores_along(jacobian, gradient)
        # With H = I: dL/dw_i = -<y_i, S_i> / n and dL/dy_ik = -w_i S_ik / n.
        hyper = {"weights": np.zeros(POOL, np.float32), "labels": np.zeros_like(PRIOR)}
        hyper["weights"][rows] = -(read["labels"][rows] * scores).sum(1) / REAL
        hyper["labels"][rows] = -read["weights"][rows, None] * scores / REAL
        updates, opt = tx.update(hyper, opt, read)
        meta = jax.tree.map(lambda x, u: x + np.asarray(u), read, updates)
        used = project(meta, learn)
        weights = used["weights"][rows]
        found, arrays, _ = run(arrays, step)
        assert_trained_on(found, weights / weights.mean(), used["labels"][rows], 1e-4)
    assert infeasible > 0.05  # momentum carried rows of the other batch outside


@pytest.mark.parametrize(
    "learn, meta_tx", [("both", "adam"), ("weights", "momentum"), ("labels", "momentum")]
)
def test_implicit_trains_on_what_is_feasible(learn, meta_tx):
    arrays, run = runner(
        Implicit(RUN, meta_tx=META_TX[meta_tx], max_weight=MAX_WEIGHT, learn=learn),
        streams=pool_streams_of,
    )
    reached = set()
    for step in range(8):
        rows = streams_of(step).candidates.index[:REAL]
        found, arrays, metrics = run(arrays, step)
        labels, weights = np.asarray(found.labels[:REAL]), np.asarray(arrays[0]["weights"][rows])
        assert (labels >= 0).all()
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
        assert (weights >= 0).all() and (weights <= MAX_WEIGHT).all()
        np.testing.assert_allclose(found.weights[:REAL] * weights.mean(), weights, atol=1e-5)
        if learn == "weights":
            np.testing.assert_array_equal(labels, PRIOR[rows])
        if learn == "labels":
            np.testing.assert_array_equal(weights, 1)
        assert np.isfinite(metrics["solve_residual"][0])
        reached |= set(weights.tolist()) & {0.0, MAX_WEIGHT}
    assert reached or learn == "labels"


# --- rows whose labels the pipeline changed ----------------------------------------------------


def mixed_streams(step):
    """Real rows: two whole ones, two mixed with another sample, one of another label."""
    given = pool_streams_of(step)
    share = np.array([1, 1, 0.7, 0.95, 1, 1], np.float32)
    order = np.array([0, 1, 0, 1, 4, 5])
    batch = given.candidates
    trace = Trace(np.zeros((SIZE, 1), np.int32), share[:, None], batch.index[order][:, None])
    labels = share[:, None] * batch.labels + (1 - share[:, None]) * batch.labels[order]
    labels[4] = np.roll(batch.labels[4], 1)
    return given._replace(candidates=batch._replace(labels=labels, trace=trace))


def test_learned_labels_reach_mixed_rows_and_before_that_all_train_as_given():
    given = mixed_streams(0).candidates
    for options in ({"start": 100}, {"learn": "weights"}):
        arrays, run = runner(Implicit(RUN, direction="identity", **options), streams=mixed_streams)
        found, arrays, _ = run(arrays, 0)
        np.testing.assert_array_equal(found.labels, given.labels)
    arrays, run = runner(
        Implicit(RUN, meta_tx=4.0, direction="identity", predicate="", learn="labels"),
        streams=mixed_streams,
    )
    found, (meta, _), _ = run(arrays, 0)
    gradient, jacobian = pieces(0, mixed_streams)
    scores = scores_along(jacobian, gradient)
    # Along the scores of a sample's own rows and, as far as they are its, of those mixed with it.
    moved = PRIOR[:REAL].astype(np.float64)
    for sample, row, part in [(0, 0, 1), (1, 1, 1), (0, 2, 0.3), (2, 2, 0.7), (1, 3, 0.05),
                              (3, 3, 0.95)]:  # fmt: skip
        moved[sample] += 4 * part * scores[row] / REAL
    moved = np.stack([simplex_projection(row) for row in moved])
    np.testing.assert_allclose(meta["labels"][:REAL], moved, atol=1e-5)
    assert np.abs(moved[:4] - PRIOR[:4]).max(1).min() > 0.01
    moved[2] = 0.7 * moved[2] + 0.3 * moved[0]
    moved[3] = 0.95 * moved[3] + 0.05 * moved[1]
    np.testing.assert_allclose(found.labels[:4], moved[:4], atol=1e-5)
    np.testing.assert_array_equal(found.labels[4], given.labels[4])


# --- inside a training step --------------------------------------------------------------------


def pool_run(labels):
    return RunInfo(*labels.shape, labels=lambda: labels)


@pytest.mark.parametrize("learn", ["both", "weights", "labels"])
def test_implicit_keeps_its_pool_feasible(learn):
    p = problems.problem("mlp", masked=1)
    pool = np.concatenate([p.streams.candidates.labels, p.streams.val.labels])
    # The greedy direction is the cheapest to compile; what is learned does not depend on it.
    direction = "cg(3)" if learn == "both" else "identity"
    rule = Implicit(
        pool_run(pool), learn=learn, max_weight=1.5, meta_tx=optax.adam(0.4), direction=direction
    )
    method = supervised.make(p.model, optax.adam(1e-2), rule)
    before = start(p, method)
    state, metrics = stepper(p, method)(before, 2)
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
    rule = Implicit(
        pool_run(candidates.labels),
        meta_tx=optax.sgd(rate),
        direction="identity",
        predicate="",
        learn="weights",
        max_weight=100.0,
    )
    method = supervised.make(p.model, optax.sgd(0.1), rule)
    state = start(p, method)
    after, _ = stepper(p, method)(state, 1)
    found = jax.jit(method.targets)(state, p.streams)
    scores = np.asarray(jax.jit(lambda state: greedy_scores(p, state))(state))
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
    rule = Implicit(pool_run(prior), start=2, meta_tx=optax.adam(0.1), direction="identity")
    method = supervised.make(p.model, tx, rule)
    run = stepper(p, method)
    before = start(p, method)
    state, _ = run(before, 2)
    # neither the pool nor its optimiser's moments have moved, and training was the plain one
    for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(before.extra)):
        np.testing.assert_array_equal(a, b)
    plain = supervised.make(p.model, tx)
    assert_close(state.params, stepper(p, plain)(start(p, plain), 2)[0].params, 1e-6)
    state, _ = run(state, 1)
    assert (state.extra[0]["labels"] != prior).any()


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_weight": 0.0}, "max_weight .*0.0"),
        ({"learn": "all"}, "learn .*'all'"),
        ({"meta_tx": -1.0}, "meta_tx .*-1.0"),
        ({"direction": "cgg"}, "direction .*did you mean 'cg'"),
    ],
    ids=str,
)
def test_implicit_refuses_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Implicit(RUN, **options)


def test_labels_that_are_no_mixture_are_not_learned():
    run = RUN._replace(upstream="flip | soft_crop(2.0)")
    with pytest.raises(ValueError, match=r"learn must be 'weights' behind soft_crop.*'both'"):
        Implicit(run)
    assert Implicit(run, learn="weights").learn == "weights"


def test_implicit_needs_the_labels_of_the_pool():
    for run in (None, RunInfo(POOL, CLASSES)):
        with pytest.raises(ValueError, match=r"implicit needs run\.labels"):
            Implicit(run).init({})
    outside = RunInfo(POOL, CLASSES, labels=lambda: 2 * PRIOR)
    with pytest.raises(ValueError, match="prior must have rows >= 0 that sum to one"):
        Implicit(outside).init({})
