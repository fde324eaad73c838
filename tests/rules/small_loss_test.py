"""Small-loss selection by its equations."""

import functools
import math
from fractions import Fraction

import jax
import numpy as np
import optax
import pytest

from saflex_jax import Batch
from saflex_jax.core.tree import Mean
from saflex_jax.methods import supervised
from saflex_jax.rules.small_loss import SmallLoss, select
from tests import cost_test
from tests.problems import assert_close, hard_labels
from tests.rules.regression import (
    CLASSES,
    LINEAR,
    MASKED,
    NOW,
    ROWS,
    RUNNERS,
    TX,
    assert_leaves_wrong_labels_out,
    candidates,
    evaluated,
    logits_as_inputs,
    plain_flops,
    start_state,
    step_under,
    stepped,
    targets,
    two_layers,
    weights_of,
)

FORGET, RAMP = Fraction("0.55"), 8
RULE = SmallLoss(float(FORGET), RAMP)


def test_the_share_left_out_grows_to_forget():
    steps = np.int32([0, 1, 9, 10, 11, 10**6])
    rates = np.asarray(SmallLoss(0.4, 10).rate_at(steps))
    np.testing.assert_allclose(rates[:3], [0, 0.04, 0.36], rtol=1e-6)
    assert rates[0] == 0 and (rates[3:] == np.float32(0.4)).all()
    assert SmallLoss(0.4, 1).rate_at(steps)[1] == np.float32(0.4)


def test_how_many_are_kept_is_exact():
    # At every number of rows, step of the ramp and share; by the number of them alone, tied or not.
    size, ramp, forgets = 40, 12, ("0.1", "0.2", "0.3", "0.45", "0.7", "0.9")
    batch = candidates(size, 0, labels=hard_labels)
    drawn = 3 * np.random.default_rng(0).normal(size=(size, CLASSES)).astype(np.float32)
    steps = np.arange(ramp + 2)
    rates = np.stack([SmallLoss(float(f), ramp).rate_at(steps) for f in forgets], 1)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def kept(logits, mask, rate):
        return select(logits, batch._replace(mask=mask), rate).weights > 0

    counts = np.arange(1, size + 1)
    masks = np.arange(size)[None] < counts[:, None]
    exact = [[Fraction(f) * min(t, ramp) / ramp for f in forgets] for t in steps.tolist()]
    expected = [[[n - math.floor(r * n) for r in row] for row in exact] for n in counts.tolist()]
    found = np.asarray(kept(drawn, masks[:, ::-1], rates))  # padding first
    np.testing.assert_array_equal(found.sum(-1), expected)
    assert not (found & ~masks[:, None, None, ::-1]).any()

    tied = np.asarray(kept(np.zeros_like(drawn), masks, rates))
    np.testing.assert_array_equal(tied.sum(-1), expected)


def test_of_equal_losses_the_earlier_rows_are_kept():
    labels = np.eye(2, dtype=np.float32)[[0, 0, 1, 0, 0, 0]]
    mask = np.array([False, True, True, True, True, False])
    logits = np.tile(np.float32([1, 0]), (6, 1))  # of class 1 the loss is larger
    batch = Batch(logits, labels, mask, np.arange(6))
    selected = jax.jit(select)
    for rate, kept in ((0.25, [1, 3, 4]), (0.5, [1, 3]), (0.75, [1]), (0.0, [1, 2, 3, 4])):
        weights = np.asarray(selected(logits, batch, rate).weights)
        assert np.flatnonzero(weights).tolist() == kept
        np.testing.assert_allclose(weights[kept], 4 / len(kept), rtol=1e-6)


def test_the_smallest_losses_are_kept_whatever_the_padding():
    batch = logits_as_inputs(candidates())
    for step, rate in ((0, 0), (3, FORGET * 3 / 8), (RAMP, FORGET)):
        (selected,) = targets([RULE], batch, step)
        expected = weights_of(batch.inputs, batch, rate)
        np.testing.assert_allclose(selected.weights, expected, rtol=1e-6)
        np.testing.assert_array_equal(selected.labels, batch.labels)
    (nothing,) = targets([RULE], batch._replace(mask=np.zeros(ROWS, bool)))
    np.testing.assert_array_equal(nothing.weights, 0)


def test_every_device_ranks_its_own_rows():
    batch = logits_as_inputs(candidates())

    def weights(share):
        return targets([RULE], share, RAMP, Mean("data"))[0].weights

    of_shares = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    expected = weights_of(batch.inputs, batch, FORGET, shares=4)
    found = np.asarray(jax.vmap(weights, axis_name="data")(of_shares))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)
    assert (expected != weights_of(batch.inputs, batch, FORGET)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_loss(value):
    batch = logits_as_inputs(candidates())
    row = np.flatnonzero(batch.mask)[2]
    batch.inputs[row, 1] = value
    (selected,) = targets([RULE], batch)
    assert np.flatnonzero(~np.isfinite(selected.weights)).tolist() == [row]
    assert np.isfinite(selected.labels).all()


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=pytest.mark.slow if r == "jit 1" else ()) for r in RUNNERS],
)
def test_a_step_is_one_on_the_selected_rows(runner):
    batch, shares = candidates(), RUNNERS[runner][2]
    method = supervised.make(LINEAR, TX, RULE)
    state = start_state(method)
    kernel = np.asarray(state.params["kernel"], np.float64)
    weights = weights_of(evaluated(kernel, batch), batch, FORGET * NOW / RAMP, shares)
    expected, loss = stepped(kernel, batch, batch.labels, weights)
    state, metrics = step_under(runner, {"": method}, {"": state}, batch)[""]
    assert_close(state.params, expected, 2e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), loss, rtol=1e-5)
    counts = batch.mask.reshape(shares, -1).sum(1).tolist()
    kept = sum(n - math.floor(FORGET * NOW / RAMP * n) for n in counts)
    assert np.divide(*metrics["kept"]) == pytest.approx(kept / (ROWS - MASKED))


def test_it_shares_the_training_steps_forward_pass():
    model = two_layers(256, cost_test.CLASSES)
    flops = cost_test.step_flops(supervised.make(model, cost_test.TX, SmallLoss()))
    assert 0.98 * plain_flops() < flops < 1.02 * plain_flops()


@pytest.mark.slow
def test_wrong_labels_are_left_out():
    method = supervised.make(two_layers(16, 4), optax.sgd(0.1), SmallLoss(0.4, 50))
    assert_leaves_wrong_labels_out(method)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"forget": 1.0}, r"forget must lie in \[0, 1\); given 1.0"),
        ({"ramp": 0}, "ramp must be a whole number >= 1; given 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmallLoss(**options)


def test_other_logits_are_refused():
    with pytest.raises(ValueError, match=r"must share one shape \[B, K\]; given .*\(24, 3\)"):
        targets([SmallLoss()], candidates())  # its inputs are no logits of four classes
