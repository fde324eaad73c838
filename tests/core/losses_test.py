from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saflex_jax.core.losses import (
    augmix_loss,
    decoupled_mixup,
    decoupled_mixup_loss,
    jensen_shannon,
    ldam_loss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.types import Batch, Targets
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


@jax.jit
def masked_gradients(logits, labels, weights, mask):
    def loss(*args):
        return masked_mean(weighted_cross_entropy(*args, mask), mask)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(logits, labels, weights)


@jax.jit
def mean_gradient(logits, labels, weights):
    return jax.grad(lambda z: jnp.mean(weighted_cross_entropy(z, labels, weights)))(logits)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e6])
def test_masked_row_has_no_value_and_no_gradient(garbage):
    logits, labels, weights = drawn()
    logits[1] = garbage
    mask = np.array([True, False, True, True])

    assert weighted_cross_entropy(logits, labels, weights, mask)[1] == 0
    value, grads = jax.device_get(masked_gradients(logits, labels, weights, mask))
    assert np.isfinite(value)
    for grad in grads:
        np.testing.assert_array_equal(grad[1], 0)
        # the other rows feel the true count, three
        assert np.isfinite(grad).all() and np.abs(np.delete(grad, 1, 0)).min() > 0
    kept = mask.nonzero()[0]
    apart = mean_gradient(logits[kept], labels[kept], weights[kept])
    np.testing.assert_allclose(grads[0][kept], apart, rtol=1e-6)


def test_gradient_at_a_label_of_exactly_zero_is_the_surprise():
    logits = drawn()[0]
    labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    grad = jax.grad(lambda y: jnp.sum(weighted_cross_entropy(logits, y)))(labels)
    np.testing.assert_allclose(grad, -problems.log_softmax(logits), rtol=1e-5)


def test_all_masked_mean_is_zero():
    none = np.zeros(4, bool)

    def loss(v):
        return masked_mean(v, none)

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
    def loss(z, y, w=None):
        return np.asarray(weighted_cross_entropy(z, y, w), np.float64)

    tol = dict(rtol=1e-5, atol=1e-5)

    def blend(s, t):
        return np.float32(a) * s + np.float32(1 - a) * t

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


# --- several views


def divergence(logits):
    """NumPy reference: entropies. JSD = H(mean of p_v) - mean of H(p_v)."""
    probs = problems.softmax(logits)

    def entropy(p):
        return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)

    return entropy(probs.mean(0)) - entropy(probs).mean(0)


def test_jensen_shannon_is_the_entropy_of_the_mixture_beyond_that_of_the_views():
    logits = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32) * 3
    compiled = jax.jit(jensen_shannon)
    actual = compiled(logits)
    np.testing.assert_allclose(actual, divergence(logits), atol=1e-6)
    np.testing.assert_allclose(compiled(logits[[0, 0, 0]]), 0, atol=1e-6)
    np.testing.assert_allclose(compiled(logits[[2, 0, 1]]), actual, atol=1e-6)


def test_jensen_shannon_of_certain_views_is_finite_and_at_its_bound():
    logits = 1e4 * np.eye(3, dtype=np.float32)[:, None]  # every view sure of another class
    value, grad = jax.jit(jax.value_and_grad(lambda z: jensen_shannon(z)[0]))(logits)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    assert np.isfinite(grad).all()


def test_jensen_shannon_clips_the_mixture_as_the_source_does():
    logits = np.full((2, 1, 400), -18.0, np.float32)
    logits[:, :, 0] = 0
    probs = problems.softmax(logits)  # 1.5e-8 on all classes but one, in both views
    expected = (probs * (np.log(probs) - np.log(np.maximum(probs.mean(0), 1e-7)))).sum(-1).mean(0)
    assert expected < -1e-5
    np.testing.assert_allclose(jax.jit(jensen_shannon)(logits), expected, rtol=1e-2)


def made_batch(rng, rows, classes, labels=None, masked=()):
    labels = problems.soft_labels(rng, rows, classes) if labels is None else labels
    mask = ~np.isin(np.arange(rows), masked)
    weights = rng.uniform(0.5, 2, rows).astype(np.float32)
    batch = Batch(np.zeros((rows, 1), np.float32), labels, mask, np.arange(rows))
    return batch, Targets(weights, problems.soft_labels(rng, rows, classes), weights)


def test_the_default_candidate_loss_is_weighted_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    batch, targets = made_batch(rng, 6, 4, masked=(2,))
    expected = -targets.weights * (targets.labels * problems.log_softmax(logits)).sum(1)
    actual = weighted_soft_cross_entropy(logits, targets, batch)
    np.testing.assert_allclose(actual, expected * batch.mask, rtol=1e-6)


def test_augmix_loss_is_that_of_the_clean_view_and_the_divergence_of_all():
    rng = np.random.default_rng(1)
    views, samples, classes, strength = 3, 5, 4, 7.0
    logits = rng.normal(size=(samples, views, classes)).astype(np.float32)
    batch, targets = made_batch(rng, samples * views, classes)
    one = targets._replace(weights=np.ones(samples * views, np.float32))
    loss = jax.jit(augmix_loss(views, strength))
    clean = -(targets.labels[::views] * problems.log_softmax(logits[:, 0])).sum(1)
    alike = divergence(logits.swapaxes(0, 1))
    actual = loss(logits.reshape(-1, classes), one, batch)
    np.testing.assert_allclose(actual.mean(), (clean + strength * alike).mean(), rtol=1e-5)
    weights = targets.weights.reshape(samples, views)
    expected = weights * strength * alike[:, None]
    expected[:, 0] += weights[:, 0] * views * clean
    actual = loss(logits.reshape(-1, classes), targets, batch)
    np.testing.assert_allclose(actual, expected.ravel(), rtol=1e-5)


def pairs(logits, own, partner, share, first, second):
    """NumPy reference of decoupled mixup: eta_a = first, eta_b = second, f64[B] each."""
    losses = []
    rows = zip(np.float64(logits), own, partner, share, first, second)
    for z, a, b, s, eta_a, eta_b in rows:

        def without(z, drop, k):
            return np.log(np.exp(np.delete(z, drop)).sum()) - z[k]

        soft = np.log(np.exp(z).sum()) - s * z[a] - (1 - s) * z[b]
        losses.append(
            soft + eta_a * without(z, b, a) + eta_b * without(z, a, b) if a != b else soft
        )
    return np.array(losses)


@pytest.mark.parametrize("mode", ["both", "less", "more"])
@pytest.mark.parametrize(("threshold", "power"), [(0.5, 1.0), (0.3, 0.5), (0.5, 0.0)])
def test_decoupled_mixup_equals_numpy(mode, threshold, power):
    rng = np.random.default_rng(2)
    logits = 2 * rng.normal(size=(8, 5)).astype(np.float32)
    a = np.array([1, 3, 0, 4, 2, 2, 0, 1])  # a < b and a > b in turn, one of the same class
    b = np.array([3, 1, 4, 0, 2, 1, 3, 2])
    s = np.array([0.2, 0.2, 0.9, 0.4, 0.7, 0.35, 0.65, 0.6], np.float32)
    eta = 0.3
    first = {"both": s < 2, "less": s < threshold, "more": s >= threshold}[mode]
    second = {"both": s < 2, "less": s >= threshold, "more": s < threshold}[mode]
    expected = pairs(logits, a, b, s, eta * first * s**power, eta * second * (1 - s) ** power)
    loss = jax.jit(
        lambda *x: decoupled_mixup(*x, eta=eta, mode=mode, threshold=threshold, power=power)
    )
    actual = loss(logits, a, b, s)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # Exchanging the names of the classes exchanges nothing else: no order of class numbers.
    order = np.array([4, 2, 0, 3, 1])
    renamed = np.empty_like(logits)
    renamed[:, order] = logits
    np.testing.assert_allclose(loss(renamed, order[a], order[b], s), actual, rtol=1e-5)


def test_eta_goes_with_its_parent_also_where_the_own_class_is_the_greater():
    # The released code swaps the etas of (3, 1); a hand-made case in which that is seen.
    logits = np.array([[0.0, 2.0, 0.0, -1.0]] * 2, np.float32)
    share = np.array([0.2, 0.2], np.float32)
    a, b = np.array([1, 3]), np.array([3, 1])
    actual = jax.jit(partial(decoupled_mixup, eta=1.0))(logits, a, b, share)
    without_3 = np.log(2 + np.exp(2.0)) - 2
    without_1 = np.log(2 + np.exp(-1.0)) + 1
    whole = np.log(2 + np.exp(2.0) + np.exp(-1.0))
    first = whole - 0.2 * 2 + 0.8 * 1 + 0.2 * without_3 + 0.8 * without_1
    second = whole + 0.2 * 1 - 0.8 * 2 + 0.2 * without_1 + 0.8 * without_3
    np.testing.assert_allclose(actual, [first, second], rtol=1e-6)


def test_decoupled_mixup_is_plain_where_nothing_is_decoupled():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, 4)).astype(np.float32)
    a, b = np.array([1, 0, 2, 3, 0]), np.array([1, 2, 3, 0, 1])
    s = np.array([0.3, 0.5, 1.0, 0.0, 0.9995], np.float32)

    @jax.jit
    def losses_and_gradients(z, s):
        losses, pull = jax.vjp(
            lambda *x: decoupled_mixup(x[0], a, b, x[1], eta=0.3, power=0.5), z, s
        )
        return losses, pull(jnp.ones(5))

    losses, gradients = losses_and_gradients(logits, s)
    np.testing.assert_allclose(losses, pairs(logits, a, b, s, 0 * s, 0 * s), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("mode", ["both", "less", "more"])
def test_decoupled_mixup_loss_reads_the_parents_off_the_prior_in_any_order(mode):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    a, b = np.array([1, 3, 0, 4, 2, 2]), np.array([3, 1, 4, 0, 2, 1])
    s = np.array([0.2, 0.8, 0.9, 0.4, 0.7, 0.35], np.float32)
    eye = np.eye(5, dtype=np.float32)
    prior = s[:, None] * eye[a] + (1 - s[:, None]) * eye[b]
    batch, targets = made_batch(rng, 6, 5, labels=prior)
    loss = jax.jit(decoupled_mixup_loss(eta=0.3, mode=mode, power=0.5))
    of_parents = jax.jit(partial(decoupled_mixup, eta=0.3, mode=mode, power=0.5))
    of_prior = loss(logits, targets._replace(labels=prior), batch)
    for order in ((a, b, s), (b, a, 1 - s)):
        expected = targets.weights * of_parents(logits, *order)
        np.testing.assert_allclose(of_prior, expected, rtol=1e-5)
    # The targets' own labels are what the cross-entropy is against.
    learned = np.asarray(loss(logits, targets, batch)) - of_prior
    difference = ((prior - targets.labels) * problems.log_softmax(logits)).sum(1)
    np.testing.assert_allclose(learned, targets.weights * difference, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        weighted_soft_cross_entropy,
        augmix_loss(2),
        decoupled_mixup_loss(),
        ldam_loss(np.array([9.0, 3.0, 1.0]), scale=1.0),
    ],
)
def test_logits_in_bfloat16_lose_nothing_in_a_loss(loss):
    batch, targets = made_batch(np.random.default_rng(6), 4, 3)
    targets.labels[0] = [1, 0, 0]
    logits = jnp.array([[9.3, 1.1, -0.7], [3.3, 0.2, 1.9], [0.0, 9.0, 1.0], [1.0, 1.0, 1.0]])
    logits = logits.astype(jnp.bfloat16)

    @jax.jit
    def losses_and_gradient(z):
        losses, pull = jax.vjp(lambda z: loss(z, targets, batch), z)
        return losses, *pull(jnp.ones_like(losses))

    expected, gradient = losses_and_gradient(logits.astype(jnp.float32))
    losses, rounded = losses_and_gradient(logits)
    np.testing.assert_array_equal(losses, expected)
    np.testing.assert_array_equal(rounded, gradient.astype(jnp.bfloat16))
    assert losses.dtype == jnp.float32 and losses[0] > 0 and rounded[0, 0] != 0


@pytest.mark.parametrize("make", [augmix_loss, decoupled_mixup_loss])
def test_padding_has_no_part_in_a_candidate_loss(make):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(9, 4)).astype(np.float32)
    batch, targets = made_batch(rng, 9, 4, masked=(3, 4, 5))
    batch.labels[3] = 0

    @jax.jit
    def losses_and_gradient(z):
        losses, pull = jax.vjp(lambda z: make()(z, targets, batch), z)
        return losses, *pull(jnp.ones(9))

    clean_losses, clean_gradient = jax.device_get(losses_and_gradient(logits))
    assert np.abs(np.delete(clean_gradient, [3, 4, 5], 0)).min() > 0
    for garbage in (np.nan, np.inf):
        dirty = logits.copy()
        dirty[3:6] = garbage
        losses, gradient = losses_and_gradient(dirty)
        np.testing.assert_array_equal(losses[3:6], 0)
        np.testing.assert_array_equal(gradient[3:6], 0)
        np.testing.assert_array_equal(losses, clean_losses)
        np.testing.assert_array_equal(gradient, clean_gradient)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, a, s: jensen_shannon(z), r"^logits must have shape \[V, B, K\]"),
        (lambda z, a, s: decoupled_mixup(z, a[:2], a, s), r"^own must have shape \[4\]"),
        (lambda z, a, s: decoupled_mixup(z, a, a, s, mode="lesser"), r"^mode must .*'less'"),
        (lambda z, a, s: decoupled_mixup(z, a, a, s, eta=-1.0), r"^eta must be >= 0"),
        (lambda z, a, s: decoupled_mixup(z, a, a, s, threshold=2.0), r"^threshold must"),
        (lambda z, a, s: decoupled_mixup_loss(power=-1.0), r"^power must be >= 0"),
        (lambda z, a, s: augmix_loss(1), r"^views must be at least 2"),
        (lambda z, a, s: augmix_loss(3, -1.0), r"^strength must be >= 0"),
        (lambda z, a, s: augmix_loss(3)(z, None, None), r"^logits must have a multiple of 3 rows"),
    ],
)
def test_bad_arguments_of_losses_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.zeros(SHAPE, np.float32), np.zeros(4, int), np.zeros(4, np.float32))
