"""The draw among views that were made beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import Batch, augment

ROWS, VIEWS = 64, 4
# Each number tells its row, view and feature.
INPUTS = np.float32(np.arange(ROWS * VIEWS * 2).reshape(ROWS, VIEWS, 2))


def batch(rows):
    rows = np.asarray(rows, np.int32)
    labels = np.eye(2, dtype=np.float32)[rows % 2]
    return Batch(jnp.asarray(INPUTS[rows]), labels, np.ones(len(rows), bool), jnp.asarray(rows))


def test_a_row_gets_one_of_its_views_and_the_trace_says_which():
    key = jax.random.key(0)
    drawn = jax.jit(augment.parse("view"))(key, batch(range(ROWS)))
    views = np.asarray(drawn.trace.magnitude[:, 0], int)
    np.testing.assert_array_equal(drawn.inputs, INPUTS[np.arange(ROWS), views])
    assert {augment.OPERATIONS[n] for n in np.asarray(drawn.trace.operation).ravel()} == {"view"}
    np.testing.assert_array_equal(drawn.labels, batch(range(ROWS)).labels)
    # By its index alone, whatever the other rows are.
    some = augment.view()(key, batch([40, 3]))
    np.testing.assert_array_equal(some.inputs, drawn.inputs[np.array([40, 3])])


def test_all_views_are_equally_likely():
    keys = jax.random.split(jax.random.key(1), 50)
    draws = jax.vmap(lambda k: augment.view()(k, batch(range(ROWS))).trace.magnitude)(keys)
    share = np.bincount(np.asarray(draws, int).ravel(), minlength=VIEWS) / draws.size
    assert share.shape == (VIEWS,)
    np.testing.assert_allclose(share, 1 / VIEWS, atol=0.03)  # 4 standard deviations


def test_a_pipeline_goes_on_after_it():
    made = augment.parse("view | mixup(0.2)")(jax.random.key(0), batch(range(ROWS)))
    assert made.inputs.shape == (ROWS, 2) and made.trace.operation.shape == (ROWS, 2)


@pytest.mark.parametrize("inputs", [np.zeros((4, 2)), {"x": np.zeros((4, 3, 2))}])
def test_inputs_without_views_are_refused(inputs):
    given = batch(range(4))._replace(inputs=inputs)
    with pytest.raises(ValueError, match=r"view must have inputs \[B, V, D\]; given"):
        augment.view()(jax.random.key(0), given)
