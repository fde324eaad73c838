"""The posterior of labels and the estimate of their noise, against Bayes' rule by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import posterior
from saflex_jax.core.tree import Mean
from tests.problems import soft_labels

CLASSES, SIZE, ETA = 4, 7, 0.3
_rng = np.random.default_rng(0)
GIVEN = np.eye(CLASSES, dtype=np.float32)[_rng.integers(CLASSES, size=SIZE)]
BELIEF = soft_labels(_rng, SIZE, CLASSES)


def sharp(belief, power=2):
    found = belief.astype(np.float64) ** power
    return found / found.sum(1, keepdims=True)


def likelihood(eta):
    """P(given = c | true = k), [K, K]."""
    if np.ndim(eta):
        return eta
    return np.full((CLASSES, CLASSES), eta / (CLASSES - 1)) + np.eye(CLASSES) * (
        1 - eta - eta / (CLASSES - 1)
    )


def certainty(belief, given):
    """Of what is believed beyond the given labels, before any sharpening."""
    rest = np.maximum(belief.astype(np.float64) - given, 0)
    return ((rest / rest.sum(1, keepdims=True)) ** 2).sum(1) ** 2


def by_enumeration(belief, given, eta):
    """P(true = k | given), f64[B, K], from the joint table of every row."""
    joint = belief.astype(np.float64) * likelihood(eta)[:, given.argmax(1)].T
    return joint / joint.sum(1, keepdims=True)


# Classes 0 and 1 are confused, 2 is never given as another, rows are no probabilities.
CONFUSED = np.array([[0.6, 0.4, 0, 0], [0.8, 1.0, 0.2, 0], [0, 0, 0.3, 0], [0.1, 0.1, 0.1, 0.7]])


@pytest.mark.parametrize("noise", [ETA, CONFUSED], ids=["share", "matrix"])
@pytest.mark.parametrize("options", [{}, {"sharpness": 1.0}, {"sharpness": 0.5}], ids=str)
def test_targets_are_the_posterior_whose_other_labels_count_as_far_as_they_are_certain(
    options, noise
):
    found = posterior.posterior_targets(GIVEN, BELIEF, noise, **options)
    exact = by_enumeration(sharp(BELIEF, options.get("sharpness", 2)), GIVEN, noise)
    right = (exact * GIVEN).sum(1)
    other = exact * (1 - GIVEN)
    certain = certainty(BELIEF, GIVEN)
    parts = right[:, None] * GIVEN + certain[:, None] * other
    weights = parts.sum(1)
    np.testing.assert_allclose(found.utility, 2 * right - 1, atol=1e-5)
    np.testing.assert_allclose(found.labels, parts / weights[:, None], atol=1e-5)
    np.testing.assert_allclose(found.weights, weights / weights.mean(), atol=1e-5)
    assert np.ptp(found.utility) > 0.4 and np.ptp(found.weights) > 0.2


def test_of_two_classes_the_labels_are_the_posterior_itself():
    given = np.eye(2, dtype=np.float32)[[0, 1, 1]]
    belief = np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]], np.float32)
    found = posterior.posterior_targets(given, belief, ETA, sharpness=1.0)
    joint = belief * np.where(given > 0, 1 - ETA, ETA)
    np.testing.assert_allclose(found.labels, joint / joint.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(found.weights, 1, atol=1e-6)


def by_parts(given, belief, certain, eta):
    """(weights, labels) of one row, from a coupling of given and believed labels that is worked
    out entry by entry: what agrees stays, what is left of the one goes to what is left of the
    other; then Bayes' rule for every given label, as if it were the only one."""
    classes = len(given)
    belief = belief.astype(np.float64)
    stays = np.minimum(given, belief)
    rest = belief - stays
    rest = rest / rest.sum() if rest.sum() else rest
    labels, weight = np.zeros(classes), 0.0
    for c in np.flatnonzero(given):
        share = stays[c] / given[c]  # below one only where nothing of the rest is in c
        believed = share * np.eye(classes)[c] + (1 - share) * rest
        (joint,) = by_enumeration(believed[None], np.eye(classes)[[c]], eta)
        others = joint * (np.arange(classes) != c)
        labels += given[c] * (joint - others + certain * others)
        weight += given[c] * (joint[c] + certain * others.sum())
    return weight, labels / weight


@pytest.mark.parametrize("noise", [ETA, CONFUSED], ids=["share", "matrix"])
def test_a_mixed_label_is_several_given_ones_each_with_its_share_of_the_belief(noise):
    mixed = soft_labels(_rng, SIZE, CLASSES)
    mixed[:3] = 0.7 * GIVEN[:3] + 0.3 * GIVEN[[1, 2, 0]]
    found = posterior.posterior_targets(mixed, BELIEF, noise)
    weights, labels = zip(
        *(by_parts(*row, noise) for row in zip(mixed, sharp(BELIEF), certainty(BELIEF, mixed)))
    )
    np.testing.assert_allclose(found.weights, weights / np.mean(weights), atol=1e-5)
    np.testing.assert_allclose(found.labels, labels, atol=1e-5)
    assert np.abs(found.labels - mixed).max() > 0.1


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_a_mixture_that_is_believed_stays_and_one_of_a_wrong_label_loses_that_part(share):
    eye = np.eye(CLASSES, dtype=np.float32)
    given = share * eye[[0, 0]] + (1 - share) * eye[[1, 1]]
    belief = np.stack([given[0], share * eye[2] + (1 - share) * eye[1]])  # of the second, 0 is 2
    found = posterior.posterior_targets(given, belief, ETA, sharpness=1.0)
    np.testing.assert_allclose(found.labels, belief, atol=1e-6)
    np.testing.assert_allclose(found.weights, 1, atol=1e-6)
    np.testing.assert_allclose(found.utility, [1, 1 - 2 * share], atol=1e-6)


@pytest.mark.parametrize("prior", [GIVEN, soft_labels(_rng, SIZE, CLASSES)], ids=["hard", "mixed"])
@pytest.mark.parametrize("noise", [0.0, np.diag([0.3, 1.7, 1.0, 0.9])], ids=["share", "matrix"])
def test_where_no_label_is_wrong_all_is_as_given_bit_for_bit(prior, noise):
    found = jax.jit(posterior.posterior_targets)(prior, BELIEF, jnp.asarray(noise))
    np.testing.assert_array_equal(found.labels, prior)
    np.testing.assert_array_equal(found.weights, 1)


def test_one_share_is_its_matrix_up_to_rounding():
    prior = soft_labels(_rng, SIZE, CLASSES)
    one = posterior.posterior_targets(prior, BELIEF, ETA)
    matrix = posterior.posterior_targets(prior, BELIEF, likelihood(ETA).astype(np.float32))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one, matrix)


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


def test_the_sharpest_power_loses_no_belief_among_many_classes():
    flat = np.full((1, 50_000), 1 / 50_000, np.float32)
    flat[0, 3] *= 1.2
    sharpest = np.asarray(posterior.sharpened(flat, posterior.SHARPEST))
    assert sharpest.sum() == pytest.approx(1, rel=1e-4)
    assert sharpest[0, 3] / sharpest[0, 0] == pytest.approx(1.2**8, rel=1e-3)
    with pytest.raises(ValueError, match=r"sharpness must lie in \(0, 8\]; given 20.0"):
        posterior.sharpened(flat, 20.0)


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


def kept(trusted, others, seen=1e12, spread=0.3):
    """Sums with these means; by default of so many samples that nothing is shrunk."""

    def sums(mean):
        return 100 * jnp.array([mean, 1, mean**2 + spread**2])

    return posterior.Agreement(sums(trusted), sums(others), jnp.float32(seen))


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.4, 0.7])
@pytest.mark.parametrize("accuracy", [0.4, 0.75, 1.0])
def test_the_share_of_wrong_labels_is_found_exactly_by_a_network_of_any_accuracy(accuracy, eta):
    found = posterior.estimate_noise_rate(kept(*agreements(accuracy, eta)), CLASSES)
    assert found == pytest.approx(eta, abs=1e-5)


@pytest.mark.parametrize(
    "sums", [posterior.no_agreement(), kept(0.25, 0.25), kept(0.6, 0.7), kept(0.1, 0.25)]
)
def test_without_evidence_no_label_is_wrong(sums):
    assert posterior.estimate_noise_rate(sums, CLASSES) == 0


def test_the_share_is_never_above_one():
    assert posterior.estimate_noise_rate(kept(0.3, 0.0), CLASSES) == 1


@pytest.mark.parametrize("accuracy, spread", [(0.6, 0.4), (0.6, 0.1), (0.9, 0.2)])
@pytest.mark.parametrize("number, seen", [(25, 1e6), (400, 1e6), (0, 100), (400, 100), (10, 100)])
def test_an_estimate_is_shrunk_by_its_standard_error_and_a_smaller_one_is_none(
    number, seen, accuracy, spread
):
    known = min(number or seen, seen)
    chance = (1 - accuracy) / (CLASSES - 1)
    error = spread / np.sqrt(known - 1) / (accuracy - chance)
    for eta in (0.5 * error, 0.9 * error, 1.1 * error, 2 * error):
        sums = kept(*agreements(accuracy, eta), seen, spread)
        found = posterior.estimate_noise_rate(sums, CLASSES, num_trusted=number)
        wanted = eta - error**2 / eta if eta > error else 0
        assert found == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("number, seen", [(1, 1e6), (25, 1), (0, 1)])
def test_one_trusted_sample_shows_no_spread_and_tells_nothing(number, seen):
    sums = kept(*agreements(0.9, 0.4), seen, 0.0)
    assert posterior.estimate_noise_rate(sums, CLASSES, num_trusted=number) == 0


def test_equal_agreements_need_two_trusted_samples():
    """Rounding leaves no variance below zero, of which the root would be NaN."""
    for accuracy in (0.4, 0.7, 0.9999):
        rate = posterior.estimate_noise_rate(kept(*agreements(accuracy, 0.3), 2, 0.0), CLASSES)
        assert rate == pytest.approx(0.3, abs=1e-3)


def test_sums_without_squares_are_refused():
    sums = kept(0.9, 0.5)._replace(others=jnp.ones(2))
    with pytest.raises(ValueError, match=r"sums.others must be f32\[3\]; given shape \(2,\)"):
        posterior.estimate_noise_rate(sums, CLASSES)


def test_agreement_is_the_probability_of_a_label_and_what_a_mixture_has_in_common():
    np.testing.assert_allclose(
        posterior.agreement(BELIEF, GIVEN), BELIEF[np.arange(SIZE), GIVEN.argmax(1)], rtol=1e-6
    )
    np.testing.assert_allclose(posterior.agreement(BELIEF, BELIEF), 1, rtol=1e-6)
    belief, given = np.array([[0.2, 0.8, 0.0]]), np.array([[0.5, 0.0, 0.5]])
    np.testing.assert_allclose(posterior.agreement(belief, given), 0.2, rtol=1e-6)


def test_sums_forget_and_are_per_row_of_a_batch():
    values = _rng.random((3, SIZE)).astype(np.float32)
    rows = _rng.random((3, SIZE)) < 0.5
    found, sums = posterior.no_agreement(), np.zeros((2, 3))
    for a, trusted in zip(values, rows):
        found = posterior.add_agreement(found, (a, trusted), (a, ~trusted), decay=0.8)
        new = [[a[on].sum(), on.sum(), (a[on] ** 2).sum()] for on in (trusted, ~trusted)]
        sums = 0.8 * sums + 0.2 * np.array(new) / SIZE
    np.testing.assert_allclose(np.stack(found[:2]), sums, rtol=1e-5)
    assert found.seen == rows.sum()


def test_eight_devices_keep_the_sums_of_one():
    values = _rng.random((8, SIZE)).astype(np.float32)
    trusted = np.arange(8)[:, None] * SIZE + np.arange(SIZE) < 2.5 * SIZE  # none on most devices

    def add(a, rows, **how):
        return posterior.add_agreement(posterior.no_agreement(), (a, rows), (a, ~rows), **how)

    found = jax.pmap(functools.partial(add, reduce=Mean("data")), "data")(values, trusted)
    for one, eight in zip(add(values.ravel(), trusted.ravel()), found):
        np.testing.assert_allclose(eight, np.broadcast_to(one, eight.shape), rtol=1e-6)
    assert found.seen[0] == trusted.sum()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise": 1.5}, "noise .*1.5"),
        ({"noise": -0.1}, "noise .*-0.1"),
        ({"noise": np.float32(1.5)}, "noise .*1.5"),
        ({"noise": jnp.float32(40)}, "noise .*40"),
        ({"noise": "0.4"}, "noise .*'0.4'"),
        ({"noise": np.eye(3)}, r"noise .*\[4, 4\]; given \(3, 3\)"),
        ({"noise": np.eye(4) - 0.1}, "noise must be >= 0; given -0.1"),
        ({"probs": np.log(BELIEF + 0.01)}, "probs must be >= 0, .* probabilities, not logits"),
        ({"prior": GIVEN[:, :1], "probs": BELIEF[:, :1]}, "num_classes must be .*>= 2; given 1"),
        ({"sharpness": 0.0}, "sharpness .*0.0"),
        ({"sharpness": 20.0}, r"sharpness must lie in \(0, 8\]; given 20.0"),
        ({"probs": BELIEF[:-1]}, "prior and probs"),
        ({"prior": 2 * GIVEN}, "prior .*sum"),
        ({"trusted": np.ones(2, bool)}, "trusted"),
        ({"mask": np.ones(2, bool)}, "mask"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"prior": GIVEN, "probs": BELIEF, "noise": ETA, **change}
    with pytest.raises(ValueError, match=message):
        posterior.posterior_targets(**options)


@pytest.mark.parametrize("rate", [-0.1, 1.1, 40.0, np.nan])
def test_a_traced_rate_out_of_range_surfaces_in_the_weights(rate):
    compiled = jax.jit(posterior.posterior_targets)
    assert np.isfinite(compiled(GIVEN, BELIEF, jnp.float32(ETA)).weights).all()
    assert np.isnan(compiled(GIVEN, BELIEF, jnp.float32(rate)).weights).all()
