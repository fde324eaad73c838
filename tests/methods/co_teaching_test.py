"""Co-teaching: two networks that pick each other's samples, by their equations."""

import math
from fractions import Fraction

import jax
import numpy as np
import optax
import pytest

from saflex_jax import Streams
from saflex_jax.methods import co_teaching, supervised
from tests import cost_test
from tests.problems import assert_close, softmax
from tests.rules.regression import (
    GAIN,
    LINEAR,
    MASKED,
    NOW,
    ROWS,
    RUNNERS,
    TX,
    assert_leaves_wrong_labels_out,
    candidates,
    linear_init,
    plain_flops,
    start_state,
    step_under,
    stepped,
    two_layers,
    weights_of,
)

FORGET, RAMP = Fraction("0.55"), 8
RATE = FORGET * NOW / RAMP


def make(model=LINEAR, tx=TX, **changes):
    options = {"forget": float(FORGET), "ramp": RAMP} | changes
    return co_teaching.make(model, tx, co_teaching.Options(**options))


def kernels(state):
    return {name: np.asarray(state.params[name]["kernel"], np.float64) for name in "ab"}


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=pytest.mark.slow if r == "jit 1" else ()) for r in RUNNERS],
)
def test_a_step_is_one_on_what_the_other_network_picks(runner):
    batch, shares, method = candidates(), RUNNERS[runner][2], make()
    state = start_state(method)
    state.model_state["b"]["drawn"] += 10
    a, b = kernels(state).values()
    # By the logits of training mode.
    by_a, by_b = (weights_of(batch.inputs @ k, batch, RATE, shares) for k in (a, b))
    assert (by_a != by_b).any()
    (a, of_a), (b, of_b) = (
        stepped(a, batch, batch.labels, by_b),
        stepped(b, batch, batch.labels, by_a),
    )
    state, metrics = step_under(runner, {"": method}, {"": state}, batch)[""]
    assert_close(state.params, {"a": a, "b": b}, 2e-6)
    np.testing.assert_allclose(metrics["loss"][0], of_a + of_b, rtol=1e-5)
    mean = np.divide(*metrics["candidate_loss"])
    np.testing.assert_allclose(mean, (of_a + of_b) / 2, rtol=1e-5)
    # Each has its own noise and its own running statistics.
    of_a, of_b = (float(state.model_state[name]["drawn"]) for name in "ab")
    assert 0 < of_a < 1 and 10 < of_b < 11 and abs(of_b - 10 - of_a) > 1e-3
    counts = batch.mask.reshape(shares, -1).sum(1).tolist()
    kept = sum(n - math.floor(RATE * n) for n in counts)
    assert np.divide(*metrics["kept"]) == pytest.approx(kept / (ROWS - MASKED))


def test_the_networks_differ_and_the_first_is_the_one_of_this_key():
    inputs = candidates().inputs
    state = make().init(jax.random.key(0), inputs)
    assert_close(state.params["a"], linear_init(jax.random.key(0), inputs)[0], 0)
    a, b = kernels(state).values()
    assert np.abs(a - b).min() > 0


def test_without_forgetting_each_network_is_trained_alone():
    tx, streams = optax.adam(0.1), Streams(candidates())
    alone, method = supervised.make(LINEAR, tx), make(tx=tx, forget=0.0)
    together = start_state(method)
    one = {
        name: alone.init(jax.random.key(0), streams.candidates.inputs)._replace(
            params=together.params[name]
        )
        for name in "ab"
    }

    @jax.jit
    def step(one, together):
        """Of the methods on their own states."""
        stepped_alone = {name: alone.step(state, streams)[0] for name, state in one.items()}
        return stepped_alone, method.step(together, streams)[0]

    for _ in range(3):
        one, together = step(one, together)
    for name in "ab":
        assert_close(together.params[name], one[name].params, 1e-5)


def test_what_is_predicted():
    batch = candidates(masked=0)
    state = start_state(make())
    a, b = (GAIN * batch.inputs @ kernel for kernel in kernels(state).values())
    single, mean = make(), make(predict="mean")

    @jax.jit
    def predict(inputs):
        return single.predict(state, inputs), mean.predict(state, inputs)

    of_a, of_both = predict(batch.inputs)
    np.testing.assert_allclose(of_a, a, rtol=1e-5, atol=1e-5)
    expected = np.log((softmax(a) + softmax(b)) / 2)
    np.testing.assert_allclose(of_both, expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(predict(100 * batch.inputs)[1]).all()


def test_targets_to_look_at_are_those_of_the_step():
    batch, method = candidates(), make()
    state = start_state(method)
    targets = jax.jit(method.targets)(state, Streams(batch))
    expected = weights_of(batch.inputs @ kernels(state)["b"], batch, RATE)
    np.testing.assert_allclose(targets.weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(targets.labels, batch.labels)


def test_a_step_costs_two_plain_ones():
    method = co_teaching.make(two_layers(256, cost_test.CLASSES), cost_test.TX)
    flops = cost_test.step_flops(method)
    assert 1.98 * plain_flops() < flops < 2.02 * plain_flops()


def test_wrong_labels_are_left_out():
    method = make(two_layers(16, 4), optax.sgd(0.1), forget=0.4, ramp=50)
    assert_leaves_wrong_labels_out(method)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget": -0.1}, r"forget must lie in \[0, 1\); given -0.1"),
        ({"ramp": 2.5}, "ramp must be a whole number >= 1; given 2.5"),
        ({"predict": "men"}, r"predict must be one of .*did you mean 'mean'\?"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        co_teaching.Options(**options)


def test_clean_samples_are_refused():
    batch, method = candidates(), make()
    with pytest.raises(ValueError, match="co_teaching trains on candidates alone"):
        method.step(start_state(method), Streams(batch, clean=batch))
