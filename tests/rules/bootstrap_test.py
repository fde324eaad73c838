"""Bootstrapping, soft and hard, by its equations."""

import jax
import numpy as np
import pytest

from saflex_jax.methods import supervised
from saflex_jax.rules.bootstrap import Bootstrap
from tests.problems import assert_close, softmax
from tests.rules.regression import (
    CLASSES,
    LINEAR,
    ROWS,
    RUNNERS,
    TX,
    candidates,
    evaluated,
    logits_as_inputs,
    start_state,
    step_under,
    stepped,
    targets,
)

BETA, START = 0.6, 4
RULES = {hard: Bootstrap(BETA, hard=hard, start=START) for hard in (False, True)}


def predicted(logits, hard):
    return np.eye(CLASSES)[logits.argmax(1)] if hard else softmax(logits)


def test_labels_move_to_what_the_network_predicts_from_start_on():
    batch = logits_as_inputs(candidates())
    mask, steps = batch.mask, (0, START - 1, START, START + 9)
    by_step = {
        step: dict(zip(RULES, jax.device_get(targets(RULES.values(), batch, step))))
        for step in steps
    }
    for hard in RULES:
        for step in (0, START - 1):
            np.testing.assert_array_equal(by_step[step][hard].labels, batch.labels)
        p = predicted(batch.inputs[mask], hard)
        for step in (START, START + 9):
            moved = by_step[step][hard]
            expected = BETA * batch.labels[mask] + (1 - BETA) * p
            np.testing.assert_allclose(moved.labels[mask], expected, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(moved.labels[~mask], batch.labels[~mask])
            np.testing.assert_array_equal(moved.weights, mask)
    for alone in targets([Bootstrap(1.0), Bootstrap(1.0, hard=True)], batch):
        np.testing.assert_array_equal(alone.labels, batch.labels)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_loss(value):
    batch = logits_as_inputs(candidates())
    row = np.flatnonzero(batch.mask)[2]
    batch.inputs[row, 1] = value
    for moved in targets(RULES.values(), batch):
        finite = np.isfinite(moved.labels).all(1) & np.isfinite(moved.weights)
        assert np.flatnonzero(~finite).tolist() == [row]


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=() if r == "jit 8" else pytest.mark.slow) for r in RUNNERS],
)
def test_a_step_is_one_on_moved_labels_of_unmasked_rows(runner):
    batch = candidates()
    methods = {hard: supervised.make(LINEAR, TX, rule) for hard, rule in RULES.items()}
    states = {hard: start_state(method) for hard, method in methods.items()}
    kernel = np.asarray(states[False].params["kernel"], np.float64)
    for hard, (state, metrics) in step_under(runner, methods, states, batch).items():
        p = predicted(evaluated(kernel, batch), hard)
        moved = BETA * np.float64(batch.labels) + (1 - BETA) * p
        expected, loss = stepped(kernel, batch, moved, np.ones(ROWS))
        assert_close(state.params, expected, 2e-6)
        np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
        np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), loss, rtol=1e-5)


def test_soft_bootstrapping_is_a_shorter_plain_step_where_the_modes_agree():
    model = LINEAR._replace(logits=lambda p, s, x: x @ p["kernel"])
    method, batch = supervised.make(model, TX, Bootstrap(BETA)), candidates()
    state = start_state(method)
    own = np.asarray(state.params["kernel"])
    after, _ = step_under("jit 1", {"": method}, {"": state}, batch)[""]
    plain, _ = stepped(own, batch, batch.labels, np.ones(ROWS))
    assert_close(after.params["kernel"] - own, BETA * (plain["kernel"] - own), 1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]; given 1.5"),
        ({"start": -1}, "start must be a whole number >= 0; given -1"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**options)


def test_other_logits_are_refused():
    with pytest.raises(ValueError, match=r"must share one shape \[B, K\]; given .*\(24, 3\)"):
        targets([Bootstrap()], candidates())  # its inputs are no logits of four classes
