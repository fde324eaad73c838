"""Label smoothing by its equation."""

import numpy as np
import pytest

from saflex_jax.methods import supervised
from saflex_jax.rules.label_smoothing import LabelSmoothing
from tests.problems import assert_close
from tests.rules.regression import (
    CLASSES,
    LINEAR,
    ROWS,
    RUNNERS,
    TX,
    candidates,
    start_state,
    step_under,
    stepped,
    targets,
)


def test_a_smooth_label_has_its_share_of_the_uniform_one():
    epsilons = 0.0, 1.0, LabelSmoothing().epsilon
    rules, batch = [LabelSmoothing(e) for e in epsilons], candidates()
    for epsilon, smooth in zip(epsilons, targets(rules, batch)):
        expected = [[(1 - epsilon) * q + epsilon / CLASSES for q in row] for row in batch.labels]
        np.testing.assert_allclose(smooth.labels, expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(smooth.weights, batch.mask)
    one_hot = batch._replace(labels=np.eye(CLASSES, dtype=np.float32)[[1] * ROWS])
    default = np.asarray(targets(rules, one_hot)[-1].labels)
    np.testing.assert_allclose(default[0], [0.025, 0.925, 0.025, 0.025], atol=1e-7)


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=() if r == "jit 8" else pytest.mark.slow) for r in RUNNERS],
)
def test_a_step_is_one_on_smooth_labels_of_unmasked_rows(runner):
    batch, epsilon = candidates(), 0.3
    method = supervised.make(LINEAR, TX, LabelSmoothing(epsilon))
    state = start_state(method)
    kernel = np.asarray(state.params["kernel"], np.float64)
    smooth = (1 - epsilon) * np.float64(batch.labels) + epsilon / CLASSES
    expected, loss = stepped(kernel, batch, smooth, np.ones(ROWS))
    state, metrics = step_under(runner, {"": method}, {"": state}, batch)[""]
    assert_close(state.params, expected, 2e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), loss, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(epsilon):
    with pytest.raises(ValueError, match=rf"epsilon must lie in \[0, 1\]; given {epsilon}"):
        LabelSmoothing(epsilon)
