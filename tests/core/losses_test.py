import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from tests import problems

SHAPE = (4, 3)


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=SHAPE).astype(np.float32)
    return logits, problems.soft_labels(rng, *SHAPE), rng.uniform(0, 2, 4).astype(np.float32)


def test_equals_numpy():
    logits, labels, weights = drawn()
    mask = np.array([True, False, True, True])
    expected = -weights * (labels * problems.log_softmax(logits)).sum(1) * mask
    losses = weighted_cross_entropy(logits, labels, weights, mask)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(masked_mean(losses, mask), expected.sum() / 3, rtol=1e-6)
    np.testing.assert_allclose(masked_mean(losses), expected.sum() / 4, rtol=1e-6)
    np.testing.assert_allclose(
        weighted_cross_entropy(logits, labels),
        weighted_cross_entropy(logits, labels, np.ones(4, np.float32)),
    )


def test_large_logits_do_not_overflow():
    losses = weighted_cross_entropy(jnp.array([[1e4, 0.0]]), jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(losses, 1e4)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e6])
def test_masked_row_has_no_value_and_no_gradient(garbage):
    logits, labels, weights = drawn()
    logits[1] = garbage
    mask = np.array([True, False, True, True])

    def loss(*args):
        return masked_mean(weighted_cross_entropy(*args, mask), mask)

    assert weighted_cross_entropy(logits, labels, weights, mask)[1] == 0
    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(logits, labels, weights)
    assert np.isfinite(value)
    for grad in grads:
        np.testing.assert_array_equal(grad[1], 0)
        # the other rows feel the true count, three
        assert np.isfinite(grad).all() and np.abs(np.delete(grad, 1, 0)).min() > 0
    kept = mask.nonzero()[0]
    apart = jax.grad(lambda z: jnp.mean(weighted_cross_entropy(z, labels[kept], weights[kept])))
    np.testing.assert_allclose(grads[0][kept], apart(logits[kept]), rtol=1e-6)


def test_gradient_at_a_label_of_exactly_zero_is_the_surprise():
    logits = drawn()[0]
    labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    grad = jax.grad(lambda y: jnp.sum(weighted_cross_entropy(logits, y)))(labels)
    np.testing.assert_allclose(grad, -problems.log_softmax(logits), rtol=1e-5)


def test_all_masked_mean_is_zero():
    none = np.zeros(4, bool)
    loss = lambda v: masked_mean(v, none)
    value, grad = jax.value_and_grad(loss)(jnp.array([1.0, jnp.nan, jnp.inf, 2.0]))
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


@problems.PROPERTY
@given(
    problems.arrays(*SHAPE),
    problems.arrays(*SHAPE),
    problems.simplices(*SHAPE),
    problems.simplices(*SHAPE),
    problems.arrays(4, low=0, high=3),
    st.floats(0, 1, width=32),
)
def test_laws(z, z2, y, y2, w, a):
    loss = lambda z, y, w=None: np.asarray(weighted_cross_entropy(z, y, w), np.float64)
    tol = dict(rtol=1e-5, atol=1e-5)
    blend = lambda s, t: np.float32(a) * s + np.float32(1 - a) * t
    # linear in the labels and in the weights
    np.testing.assert_allclose(loss(z, blend(y, y2)), blend(loss(z, y), loss(z, y2)), **tol)
    np.testing.assert_allclose(loss(z, y, w), w * loss(z, y), **tol)
    # convex in the logits, and blind to a shift of them
    assert (loss(blend(z, z2), y) <= blend(loss(z, y), loss(z2, y)) + 1e-5).all()
    np.testing.assert_allclose(loss(z + z2[:, :1], y), loss(z, y), **tol)
    # never below the entropy of the label (Gibbs), which is reached at the label itself
    entropy = -(y * np.log(np.maximum(y, 1e-30))).sum(1)
    assert (loss(z, y) >= entropy - 1e-5).all()
    np.testing.assert_allclose(loss(np.log(np.maximum(y, 1e-30)), y), entropy, **tol)


@problems.PROPERTY
@given(
    problems.arrays(*SHAPE),
    problems.simplices(*SHAPE),
    problems.arrays(4, low=0, high=3),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.permutations(range(4)),
    st.permutations(range(3)),
)
def test_permutations(z, y, w, mask, rows, classes):
    mask = np.array(mask)
    losses = weighted_cross_entropy(z, y, w, mask)
    rows, classes = np.array(rows), np.array(classes)
    moved = weighted_cross_entropy(z[rows][:, classes], y[rows][:, classes], w[rows], mask[rows])
    np.testing.assert_allclose(moved, losses[rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        masked_mean(moved, mask[rows]), masked_mean(losses, mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 3), (4, 2)), r"labels \(4, 2\), logits \(4, 3\)"),
        (((4, 3), (3, 3)), "must share one shape"),
        (((4,), (4,)), r"must share one shape \[B, K\]"),
        (((4, 3), (4, 3), (4, 1)), r"weights must have shape \[4\]"),
        (((4, 3), (4, 3), (4,), (3,)), r"mask must have shape \[4\]"),
    ],
)
def test_shapes_that_disagree(arguments, message):
    arrays = [np.ones(shape, bool if i == 3 else np.float32) for i, shape in enumerate(arguments)]
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(*arrays)
    with pytest.raises(ValueError, match=message):  # also while tracing, before compilation
        jax.eval_shape(weighted_cross_entropy, *arrays)
