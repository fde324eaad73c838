"""The transition matrix: what it recovers, what keeps it from going astray."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import transition
from saflex_jax.core.transition import Pairs
from saflex_jax.core.tree import Mean
from tests.problems import soft_labels

CLASSES, SIZE, MANY = 4, 6, 10**6
_rng = np.random.default_rng(0)
TRUE = np.array([[0.7, 0.3, 0, 0], [0.1, 0.8, 0.1, 0], [0, 0, 1, 0], [0.2, 0.2, 0.2, 0.4]])
FREQUENT = np.array([0.4, 0.3, 0.2, 0.1])
ETA = float(FREQUENT @ (1 - np.diag(TRUE)))


def pairs(joint, trusted=FREQUENT):
    return Pairs(jnp.asarray(joint, jnp.float32), jnp.asarray(trusted, jnp.float32))


def uniform(eta):
    return np.full((CLASSES, CLASSES), eta / (CLASSES - 1)) * (1 - np.eye(CLASSES)) + (
        (1 - eta) * np.eye(CLASSES)
    )


def test_beliefs_that_are_right_recover_the_matrix_and_their_scale_does_not_matter():
    joint = FREQUENT[:, None] * TRUE
    for scale in (1.0, 1e-6):
        found = transition.likelihood(pairs(scale * joint), ETA, num_trusted=MANY)
        np.testing.assert_allclose(found, TRUE, atol=1e-4)


def test_without_trusted_samples_or_pairs_all_wrong_labels_are_alike():
    for sums, number in ((pairs(TRUE), 0), (transition.no_pairs(CLASSES), 100)):
        found = transition.likelihood(sums, 0.3, num_trusted=number)
        np.testing.assert_allclose(found, uniform(0.3), atol=1e-6)


def test_of_few_trusted_samples_it_lies_between():
    sums = pairs(FREQUENT[:, None] * TRUE)
    apart = [
        np.abs(transition.likelihood(sums, ETA, num_trusted=n) - uniform(ETA)).max()
        for n in (0, 10, 100, MANY)
    ]
    assert apart[0] < 1e-6 and apart == sorted(apart) and apart[1] < 0.7 * apart[3]


@pytest.mark.parametrize("eta", [0.0, 0.05, 0.2, 1.0])
def test_no_more_labels_are_wrong_than_the_trusted_samples_say(eta):
    joint = soft_labels(_rng, CLASSES, CLASSES) * _rng.random((CLASSES, 1))
    believed = joint.sum(1) / joint.sum()
    found = transition.likelihood(pairs(joint, believed), eta, num_trusted=50)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    wrong = believed @ (1 - np.diag(found))
    assert wrong <= eta + 1e-6 and (found >= 0).all()
    assert eta > 0.5 or wrong == pytest.approx(eta, abs=1e-6)


def test_without_wrong_labels_it_is_diagonal_exactly():
    found = transition.likelihood(pairs(soft_labels(_rng, CLASSES, CLASSES)), 0.0, num_trusted=9)
    np.testing.assert_array_equal(found, np.diag(np.diag(found)))


def test_a_class_that_beliefs_exaggerate_counts_for_less():
    joint = np.diag([0.4, 0.1, 0.25, 0.25])  # the first has swallowed most of the second
    found = transition.likelihood(pairs(joint, np.ones(CLASSES)), 0.0, num_trusted=100)
    np.testing.assert_allclose(np.diag(found), [26 / 41, 26 / 11, 1, 1], rtol=1e-5)


def test_of_views_each_is_given_as_the_same_view():
    views, classes = 3, 2
    belief = soft_labels(_rng, SIZE, classes * views)
    given = np.eye(classes * views, dtype=np.float32)[_rng.integers(classes * views, size=SIZE)]
    rows = np.ones(SIZE, bool)
    sums = transition.add_pairs(
        transition.no_pairs(classes), belief, given, rows, given, rows, decay=0.0
    )
    joint = np.zeros((classes, classes))
    for b, q in zip(belief, given):
        for k, j, m in np.ndindex(classes, classes, views):
            joint[k, j] += b[k * views + m] * q[j * views + m] / SIZE
    np.testing.assert_allclose(sums.joint, joint, rtol=1e-5)
    of_views = transition.likelihood(sums, 0.3, num_trusted=40, blocks=views)
    of_classes = transition.likelihood(sums, 0.3, num_trusted=40)
    assert of_classes[0, 1] > 0.05
    for k, m, j, n in np.ndindex(classes, views, classes, views):
        wanted = of_classes[k, j] if m == n else 0
        assert of_views[k * views + m, j * views + n] == wanted


def added(sums, batch, **options):
    return transition.add_pairs(sums, *batch, **options)


def batch(size):
    return (
        soft_labels(_rng, size, CLASSES),
        soft_labels(_rng, size, CLASSES),
        _rng.random(size) < 0.7,
        soft_labels(_rng, size, CLASSES),
        _rng.random(size) < 0.7,
    )


def test_sums_forget_and_leave_out_what_does_not_count():
    found = transition.no_pairs(CLASSES)
    joint, trusted = np.zeros((CLASSES, CLASSES)), np.zeros(CLASSES)
    for _ in range(3):
        p, q, rows, v, counted = given = batch(SIZE)
        found = added(found, given, decay=0.8)
        joint = 0.8 * joint + 0.2 * p[rows].T @ q[rows] / SIZE
        trusted = 0.8 * trusted + 0.2 * v[counted].mean(0)
    np.testing.assert_allclose(found.joint, joint, rtol=1e-5)
    np.testing.assert_allclose(found.trusted, trusted, rtol=1e-5)


def test_padding_does_not_change_the_sums():
    p, q, rows, v, _ = batch(SIZE)
    all_rows, padding = np.ones(SIZE, bool), np.zeros(3, bool)

    def padded(x):
        return np.concatenate([x, x[:3]])

    whole = added(transition.no_pairs(CLASSES), (p, q, rows, v, all_rows))
    more = padded(p), padded(q), np.append(rows, padding), padded(v), np.append(all_rows, padding)
    found = added(transition.no_pairs(CLASSES), more, mask=np.append(all_rows, padding))
    for a, b in zip(found, whole):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_eight_devices_keep_the_sums_of_one():
    whole = batch(8 * SIZE)
    one = added(transition.no_pairs(CLASSES), whole)
    shares = jax.tree.map(lambda x: x.reshape(8, SIZE, *x.shape[1:]), whole)
    add = functools.partial(added, transition.no_pairs(CLASSES), reduce=Mean("data"))
    for mine, all_ in zip(one, jax.pmap(add, "data")(shares)):
        np.testing.assert_allclose(all_, np.broadcast_to(mine, all_.shape), rtol=1e-5)


def test_of_fewer_rows_than_devices_they_keep_the_same():
    whole, mask = batch(8), np.arange(8) < 2
    one = added(transition.no_pairs(CLASSES), whole, mask=mask)
    shares = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), (whole, mask))

    def add(whole, mask):
        return added(transition.no_pairs(CLASSES), whole, mask=mask, reduce=Mean("data"))

    found = jax.vmap(add, axis_name="data")(*shares)
    np.testing.assert_allclose(found.joint, np.broadcast_to(one.joint, found.joint.shape), 1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: transition.no_pairs(1), "num_classes .*>= 2; given 1"),
        (lambda: transition.likelihood(pairs(TRUE), 1.5, num_trusted=1), "noise_rate .*1.5"),
        (lambda: transition.likelihood(pairs(TRUE), 0.5, num_trusted=-1), "num_trusted .*-1"),
        (lambda: transition.likelihood(pairs(TRUE), 0.5, num_trusted=1, blocks=0), "blocks .*0"),
        (lambda: added(pairs(TRUE), batch(3), decay=1.0), "decay .*1.0"),
        (lambda: added(pairs(TRUE), (TRUE[:2], *batch(3)[1:])), "probs and prior"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _given_by(belief, matrix):
    return np.array([_rng.choice(CLASSES, p=matrix[k]) for k in belief])


def test_the_most_likely_matrix_is_the_true_one():
    right = _rng.choice(CLASSES, 20_000, p=FREQUENT)
    belief = 0.9 * np.eye(CLASSES)[right] + 0.1 / CLASSES
    # Of rows that do not count any label may be given.
    given, counted = _given_by(right, TRUE), _rng.random(len(right)) < 0.8
    given[~counted] = 0
    found = transition.most_likely(*map(jnp.asarray, (belief.astype("f4"), given, counted)))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, TRUE, atol=0.05)


def test_of_a_class_that_is_never_seen_the_matrix_is_that_of_one_share():
    right = _rng.integers(2, size=400)
    belief = np.eye(CLASSES, dtype=np.float32)[right]
    given = _given_by(right, uniform(0.3))
    found = transition.most_likely(jnp.asarray(belief), jnp.asarray(given))
    np.testing.assert_allclose(found[2], uniform(float(1 - found[2, 2]))[2], atol=1e-6)
    assert 1 - found[2, 2] == pytest.approx((given != right).mean(), abs=0.02)
