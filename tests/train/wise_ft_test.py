"""Weights between two states."""

import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import TrainState
from saflex_jax.train import interpolated


def state(weight, step):
    return TrainState(step, {"a": jnp.full(2, weight), "b": jnp.float32(-weight)}, {}, (), None)


def test_ends_are_the_states_own_weights_and_between_them_a_line():
    before, after, seen = state(0.3, 0), state(1.7, 9), []

    def evaluate(mixed):
        seen.append(mixed)
        return {"sum": float(sum(mixed.params["a"]) + mixed.params["b"])}

    found = interpolated(evaluate, before, after, [0.0, 0.25, 1.0])
    assert all(s.step == 9 for s in seen)
    for mixed, own in ((seen[0], before), (seen[2], after)):
        np.testing.assert_array_equal(mixed.params["a"], own.params["a"])
    np.testing.assert_allclose(list(found.values())[1]["sum"], 0.75 * 0.3 + 0.25 * 1.7, rtol=1e-6)
    assert list(found) == [0.0, 0.25, 1.0]


def test_refuses_shares_out_of_range_before_it_evaluates():
    def never(state):
        raise AssertionError

    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]; given 1.2"):
        interpolated(never, state(1, 0), state(2, 0), [0.5, 1.2])
