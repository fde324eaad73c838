"""The posterior of labels and the estimate of their noise, against Bayes' rule by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import posterior
from tests.problems import soft_labels

CLASSES, SIZE, ETA = 4, 7, 0.3
_rng = np.random.default_rng(0)
GIVEN = np.eye(CLASSES, dtype=np.float32)[_rng.integers(CLASSES, size=SIZE)]
BELIEF = soft_labels(_rng, SIZE, CLASSES)


def likelihood(eta):
    """P(given = c | true = k), [K, K]."""
    return np.full((CLASSES, CLASSES), eta / (CLASSES - 1)) + np.eye(CLASSES) * (
        1 - eta - eta / (CLASSES - 1)
    )


def by_enumeration(belief, given, eta):
    """P(true = k | given), f64[B, K], from the joint table of every row."""
    joint = belief.astype(np.float64) * likelihood(eta)[:, given.argmax(1)].T
    return joint / joint.sum(1, keepdims=True)


def test_targets_are_the_posterior_whose_other_labels_count_as_far_as_they_are_certain():
    found = posterior.posterior_targets(GIVEN, BELIEF, ETA)
    exact = by_enumeration(BELIEF, GIVEN, ETA)
    right = (exact * GIVEN).sum(1)
    other = exact * (1 - GIVEN)
    certain = ((other / other.sum(1, keepdims=True)) ** 2).sum(1) ** 2
    parts = right[:, None] * GIVEN + certain[:, None] * other
    weights = parts.sum(1)
    np.testing.assert_allclose(found.utility, 2 * right - 1, atol=1e-5)
    np.testing.assert_allclose(found.labels, parts / weights[:, None], atol=1e-5)
    np.testing.assert_allclose(found.weights, weights / weights.mean(), atol=1e-5)
    assert (found.utility < 0).any() and (found.utility > 0).any()


def test_of_two_classes_the_labels_are_the_posterior_itself():
    given = np.eye(2, dtype=np.float32)[[0, 1, 1]]
    belief = np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], np.float32)
    found = posterior.posterior_targets(given, belief, ETA)
    joint = belief * np.where(given > 0, 1 - ETA, ETA)
    np.testing.assert_allclose(found.labels, joint / joint.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(found.weights, 1, atol=1e-6)


@pytest.mark.parametrize("prior", [GIVEN, soft_labels(_rng, SIZE, CLASSES)], ids=["hard", "mixed"])
def test_where_no_label_is_wrong_all_is_as_given_bit_for_bit(prior):
    found = jax.jit(posterior.posterior_targets)(prior, BELIEF, jnp.zeros(()))
    np.testing.assert_array_equal(found.labels, prior)
    np.testing.assert_array_equal(found.weights, 1)


def test_trusted_rows_and_rows_without_a_belief_stay_as_given_and_padding_has_no_weight():
    rows = np.arange(SIZE)
    belief = np.where((rows == 2)[:, None], 0, BELIEF)
    found = posterior.posterior_targets(GIVEN, belief, ETA, trusted=rows < 2, mask=rows < SIZE - 1)
    np.testing.assert_array_equal(found.labels[:3], GIVEN[:3])
    assert np.ptp(found.weights[:3]) == 0  # all one before they were rescaled
    assert found.weights[SIZE - 1] == 0 and found.weights[:-1].mean() == pytest.approx(1, abs=1e-6)
    alone = posterior.posterior_targets(GIVEN[:-1], belief[:-1], ETA, trusted=rows[:-1] < 2)
    np.testing.assert_allclose(found.weights[:-1], alone.weights, atol=1e-6)


def test_a_sample_of_no_known_class_is_left_out_and_one_of_another_class_is_relabelled():
    given = np.eye(CLASSES, dtype=np.float32)[[0, 0]]
    belief = np.array([[0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 1, 0]], np.float32)
    found = posterior.posterior_targets(given, belief, ETA)
    assert found.weights[0] / found.weights[1] == pytest.approx(1 / 9, rel=1e-4)
    np.testing.assert_array_equal(found.labels[1], [0, 0, 1, 0])


def test_what_is_not_finite_reaches_the_weights():
    belief = BELIEF.copy()
    belief[3] = np.nan
    assert np.isnan(posterior.posterior_targets(GIVEN, belief, ETA).weights).any()


# --- the share of wrong labels ---------------------------------------------------------------


def agreements(accuracy, eta):
    """(trusted, others): what a network that finds the right label so often agrees on average."""
    probs = np.full(CLASSES, (1 - accuracy) / (CLASSES - 1))
    probs[0] = accuracy  # the right class is 0, by symmetry
    return probs[0], likelihood(eta)[0] @ probs


def kept(trusted, others, count=100.0):
    pair = lambda mean: jnp.array([mean * count, count])
    return posterior.Agreement(pair(trusted), pair(others))


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.4, 0.7])
@pytest.mark.parametrize("accuracy", [0.4, 0.75, 1.0])
def test_the_share_of_wrong_labels_is_found_exactly_by_a_network_of_any_accuracy(accuracy, eta):
    found = posterior.noise_rate(kept(*agreements(accuracy, eta)), CLASSES)
    assert found == pytest.approx(eta, abs=1e-5)


@pytest.mark.parametrize(
    "sums", [posterior.no_agreement(), kept(0.25, 0.25), kept(0.6, 0.7), kept(0.1, 0.25)]
)
def test_without_evidence_no_label_is_wrong(sums):
    assert posterior.noise_rate(sums, CLASSES) == 0


def test_the_share_is_never_above_one():
    assert posterior.noise_rate(kept(0.3, 0.0), CLASSES) == 1


def test_agreement_is_the_probability_of_a_label_and_one_for_a_mixture_that_is_hit():
    np.testing.assert_allclose(
        posterior.agreement(BELIEF, GIVEN), BELIEF[np.arange(SIZE), GIVEN.argmax(1)], rtol=1e-6
    )
    np.testing.assert_allclose(posterior.agreement(BELIEF, BELIEF), 1, rtol=1e-6)


def test_sums_forget_and_are_per_row_of_a_batch():
    values = _rng.random((3, SIZE)).astype(np.float32)
    rows = _rng.random((3, SIZE)) < 0.5
    found, sums = posterior.no_agreement(), np.zeros((2, 2))
    for a, trusted in zip(values, rows):
        found = posterior.add_agreement(found, (a, trusted), (a, ~trusted), decay=0.8)
        new = [[a[r].sum(), r.sum()] for r in (trusted, ~trusted)]
        sums = 0.8 * sums + 0.2 * np.array(new) / SIZE
    np.testing.assert_allclose(np.stack(found), sums, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise_rate": 1.5}, "noise_rate .*1.5"),
        ({"noise_rate": -0.1}, "noise_rate .*-0.1"),
        ({"probs": BELIEF[:-1]}, "prior and probs"),
        ({"prior": 2 * GIVEN}, "prior .*sum"),
        ({"trusted": np.ones(2, bool)}, "trusted"),
        ({"mask": np.ones(2, bool)}, "mask"),
    ],
    ids=["above", "below", "probs", "prior", "trusted", "mask"],
)
def test_bad_input_is_named(change, message):
    options = {"prior": GIVEN, "probs": BELIEF, "noise_rate": ETA, **change}
    with pytest.raises(ValueError, match=message):
        posterior.posterior_targets(**options)
