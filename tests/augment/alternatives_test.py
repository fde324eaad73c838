import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import Batch, augment
from saflex_jax.augment import OPERATIONS, of_operations, of_pipelines, of_views

SIZE = 2000


def batch(inputs):
    size = len(inputs)
    return Batch(inputs, np.eye(size, 2, dtype=np.float32), np.ones(size, bool), np.arange(size))


VIEWS = batch(np.arange(SIZE * 4.0, dtype=np.float32).reshape(SIZE, 4, 1))
DRAW = jax.jit(of_views([1, 0, 1, 1], ["a", "b"]).draw)


def test_views_are_drawn_with_the_probabilities_given():
    made, cell = DRAW(jax.random.key(0), VIEWS, jnp.log(jnp.array([0.3, 0.9])))  # not normalised
    view = np.asarray(made.trace.magnitude[:, 0]).astype(int)
    np.testing.assert_array_equal(np.asarray(made.inputs)[:, 0], 4 * np.arange(SIZE) + view)
    np.testing.assert_array_equal(cell, view != 1)
    np.testing.assert_allclose(np.bincount(view) / SIZE, [0.25] * 4, atol=0.04)
    _, never = DRAW(jax.random.key(0), VIEWS, jnp.array([0.0, -jnp.inf]))
    assert not never.any()
    assert DRAW._cache_size() == 1  # other probabilities compile nothing


def test_a_row_draws_by_its_index_alone():
    rows = np.array([70, 3])
    few = jax.tree.map(lambda x: x[rows], VIEWS)
    log_p = jnp.zeros(2)
    whole, part = (DRAW(jax.random.key(1), b, log_p)[0].inputs for b in (VIEWS, few))
    np.testing.assert_array_equal(whole[rows], part)


def test_rows_may_have_probabilities_of_their_own():
    log_p = jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]])[jnp.arange(SIZE) % 2]
    _, cell = DRAW(jax.random.key(0), VIEWS, log_p)
    np.testing.assert_array_equal(cell, np.arange(SIZE) % 2)
    alike = jnp.log(jnp.array([0.3, 0.9]))
    _, by_row = DRAW(jax.random.key(0), VIEWS, jnp.tile(alike, (SIZE, 1)))
    np.testing.assert_array_equal(by_row, DRAW(jax.random.key(0), VIEWS, alike)[1])


def test_operations_at_strengths_are_those_of_the_policy():
    alternatives = of_operations((0.5, 1.0), operations=("identity", "brightness", "rotate"))
    assert alternatives.names == (
        "identity", "brightness(0.5)", "brightness(1)", "rotate(0.5)", "rotate(1)"
    )  # fmt: skip
    images = batch(np.full((64, 6, 6, 1), 0.4, np.float32))
    made, cell = jax.jit(alternatives.draw)(jax.random.key(0), images, jnp.zeros(5))
    names = np.array(OPERATIONS)[np.asarray(made.trace.operation[:, 0])]
    expected = np.array(["identity", "brightness", "brightness", "rotate", "rotate"])[cell]
    np.testing.assert_array_equal(names, expected)
    magnitude = np.asarray(made.trace.magnitude[:, 0])
    bright = np.asarray(made.inputs)[:, 0, 0, 0]
    for place, factors in ((1, (0.55, 1.45)), (2, (0.1, 1.9))):
        np.testing.assert_allclose(np.unique(magnitude[cell == place]), factors, rtol=1e-6)
        np.testing.assert_allclose(bright[cell == place], 0.4 * magnitude[cell == place], rtol=1e-5)
    np.testing.assert_allclose(np.unique(np.abs(magnitude[cell == 4])), [30.0], rtol=1e-6)


def test_whole_pipelines_with_traces_of_several_lengths():
    pipelines = {"two": augment.parse("flip(1.0) | flip(1.0)"), "none": augment.identity}
    images = batch(np.random.default_rng(0).random((40, 3, 4, 1)).astype(np.float32))
    made, cell = of_pipelines(pipelines).draw(jax.random.key(0), images, jnp.zeros(2))
    np.testing.assert_array_equal(made.inputs, images.inputs)  # flipped twice
    flips = (np.array(OPERATIONS)[np.asarray(made.trace.operation)] == "flip").sum(1)
    np.testing.assert_array_equal(flips, np.where(cell == 0, 2, 0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: of_views([0, 0], ["a", "b"]), "group must have a view of each of"),
        (lambda: of_views([0, 2], ["a", "b"]), r"group must lie in \[0, 2\)"),
        (lambda: of_pipelines({}), "the number of pipelines must be"),
        (lambda: of_operations((2.0,)), "a strength must lie in"),
        (lambda: of_operations(operations=("rotat",)), "did you mean 'rotate'"),
        (
            lambda: of_views([0], ["a"]).draw(jax.random.key(0), VIEWS, jnp.zeros(1)),
            r"inputs must have 1 views \[B, V, ...\]; given \(2000, 4, 1\)",
        ),
        (
            lambda: of_pipelines({"v": augment.views(augment.identity, augment.identity)}).draw(
                jax.random.key(0), VIEWS, jnp.zeros(1)
            ),
            "must keep the number of rows; v made 4000 of 2000",
        ),
        (
            lambda: DRAW(jax.random.key(0), VIEWS, jnp.zeros(3)),
            r"log_p must have shape \[2\] or \[2000, 2\]",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
