"""Rules inside a training step: state kept, directions taken, schedules followed."""

import functools

import jax
import numpy as np
import optax
import pytest

from saflex_jax import augment
from saflex_jax.core import linear_solve, memory
from saflex_jax.core.scores import score
from saflex_jax.core.targets import score_scale, solve_targets
from saflex_jax.core.tree import select, under
from saflex_jax.methods import supervised
from saflex_jax.rules import Posterior, Refinement, Schedule, Scoring, Simplex, VisitMean
from saflex_jax.rules.directions import DIRECTIONS
from saflex_jax.types import RunInfo, Targets
from tests import problems
from tests.core.steps_test import runner, same_type, start
from tests.problems import CLASSES, assert_close

SIZE = 6
RUN = RunInfo(SIZE, CLASSES)


@pytest.mark.parametrize(
    "direction, run, schedule",
    [
        ("identity", RUN, Schedule()),
        ("adam", None, Schedule()),
        ("neumann(3)", RUN, Schedule()),
        ("cg(3)", None, Schedule()),
        ("adam", RUN, Schedule(1, 2)),
    ],
)
def test_saflex_runs_and_keeps_the_state(direction, run, schedule):
    p = problems.problem("mlp", masked=1)
    rule = Refinement(Scoring(direction), Posterior(run), schedule)
    method = supervised.make(p.model, optax.adam(1e-2), rule)
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
    method = supervised.make(p.model, optax.adam(1e-2))
    return p, runner(p, method)(start(p, method), 1)[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_direction_is_what_its_solver_makes_of_the_validation_gradient(direction):
    p, state = after_one_plain_step()
    diagonal = linear_solve.adam_inverse_diagonal(state.opt_state)
    solve = {
        "identity": linear_solve.identity_solve(),
        "adam": linear_solve.preconditioned_solve(select(diagonal, under("head"))),
        "neumann": linear_solve.neumann_solve(steps=3, scale=0.2, damping=0.1),
        "cg": linear_solve.cg_solve(maxiter=3, damping=0.1),
    }
    text = {"neumann": "neumann(3, scale=0.2)", "cg": "cg(3)"}.get(direction, direction)
    rule = Refinement(Scoring(text), Simplex())
    method = supervised.make(p.model, optax.adam(1e-2), rule)
    candidates = p.streams.candidates

    def expected(direction):
        scores = found_scores(p, state, solve[direction], under("head"))
        return solve_targets(scores, candidates.labels, mask=candidates.mask)

    found = method.targets(state._replace(extra=rule.init(state.params)), p.streams)
    assert_close(found, expected(direction))
    rival = expected("identity" if direction != "identity" else "cg")
    assert np.abs(rival.labels - found.labels).max() > 1e-3


@pytest.mark.parametrize("remember", [False, True])
def test_start_and_every(remember):
    p = problems.problem("mlp", masked=1)
    candidates = augment.record(p.streams.candidates, "identity", 1.0)  # soft labels, none mixed
    p = p._replace(streams=p.streams._replace(candidates=candidates))
    memory_of = dict(run=RUN, memory=VisitMean(0.5)) if remember else {}
    rule = Refinement(
        Scoring("identity", predicate=""), Simplex(tolerance=0.0, **memory_of), Schedule(1, 2)
    )
    method = supervised.make(p.model, optax.sgd(0.1), rule)
    state = start(p, method)
    run = runner(p, method)
    targets = jax.jit(lambda state: method.targets(state, p.streams))
    scores = jax.jit(lambda state: found_scores(p, state))
    arrays = memory.init(SIZE, CLASSES)

    def solved(scores):
        return solve_targets(scores, candidates.labels, tolerance=0.0, mask=candidates.mask)

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
            known = candidates.mask[:, None]  # padding is never remembered
            expected = expected._replace(labels=np.where(known, expected.labels, candidates.labels))
        assert_close(targets(state), expected)
        state, metrics = run(state, 1)
        assert metrics["val_loss"][1] == due
        if remember:
            assert_close(state.extra.rule.mean, arrays.mean)
            np.testing.assert_array_equal(state.extra.rule.visits, arrays.visits)
    assert np.abs(expected.labels - candidates.labels).max() > 0.01  # learning did happen
