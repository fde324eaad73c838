"""The power of beliefs: what it recovers, what leaves it as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import calibration
from saflex_jax.core.calibration import POWERS
from saflex_jax.core.posterior import USUAL
from saflex_jax.core.tree import Mean
from tests.problems import hard_labels, soft_labels

CLASSES, SIZE = 4, 6
_rng = np.random.default_rng(0)
CONFUSED = np.array([[0.5, 0.5, 0, 0], [0.1, 0.8, 0.1, 0], [0, 0, 1, 0], [0.2, 0.2, 0.2, 0.4]])
UNIFORM = 0.4 / 3 + (0.6 - 0.4 / 3) * np.eye(CLASSES)


def power_of(fits, num_trusted=10**6):
    return float(calibration.best_power(fits, CLASSES, num_trusted=num_trusted))


def added(fits, batch, noise=CONFUSED, **options):
    return calibration.add_fits(fits, *batch, jnp.asarray(noise, jnp.float32), **options)


def batch(size):
    return (
        soft_labels(_rng, size, CLASSES),
        hard_labels(_rng, size, CLASSES),
        _rng.random(size) < 0.7,
    )


def sharp(beliefs, power):
    powers = beliefs**power
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("noise", [UNIFORM, CONFUSED], ids=["one share", "confused"])
@pytest.mark.parametrize("power", [1.2, 1.7, 2.6])
def test_the_power_that_made_the_labels_is_found_through_the_noise(power, noise):
    beliefs = soft_labels(_rng, 40_000, CLASSES)
    given = sharp(beliefs, power) @ noise
    labels = (given.cumsum(1) > _rng.random((len(given), 1))).argmax(1)
    rows = np.ones(len(given), bool)
    # Rows that do not count have labels that would mislead.
    rows[::5], labels[::5] = False, beliefs[::5].argmin(1)
    prior = np.eye(CLASSES, dtype=np.float32)[labels]
    found = power_of(added(calibration.no_fits(), (beliefs, prior, rows), noise))
    assert found == pytest.approx(power, rel=0.07)


def test_each_fit_is_the_mean_log_likelihood_and_forgets():
    fits, wanted = calibration.no_fits(), np.zeros(len(POWERS))
    ratio = np.array([2, 1, 0.5, 1])[:, None]  # of class shares: rows need not sum to one
    for _ in range(3):
        p, q, rows = given = batch(SIZE)
        p[0] = 0  # nothing is known of it
        fits = added(fits, given, ratio * CONFUSED, decay=0.8)
        for a, power in enumerate(POWERS):
            logs = []
            for row in np.flatnonzero(rows & p.any(1)):
                joint = sharp(p[row : row + 1], power)[0] @ (ratio * CONFUSED)
                logs.append(np.log(joint[q[row].argmax()] / joint.sum()))
            wanted[a] = 0.8 * wanted[a] + 0.2 * (np.mean(logs) if logs else 0)
    np.testing.assert_allclose(fits, wanted, rtol=1e-5)


def test_one_share_is_the_matrix_of_uniform_noise():
    given = batch(SIZE)
    one = calibration.add_fits(calibration.no_fits(), *given, 0.4)
    np.testing.assert_allclose(one, added(calibration.no_fits(), given, UNIFORM), rtol=1e-6)


@pytest.mark.parametrize("noise", [0.0, np.diag([0.3, 1.7, 1.0, 0.9])], ids=["share", "matrix"])
def test_while_no_label_is_wrong_nothing_is_learned(noise):
    before = jnp.arange(len(POWERS), dtype=jnp.float32)
    after = added(before, batch(SIZE), noise)
    np.testing.assert_array_equal(after, before)
    after = jax.jit(calibration.add_fits)(before, *batch(SIZE), jnp.float32(0.0))
    np.testing.assert_array_equal(after, before)


def test_a_batch_in_which_no_row_counts_changes_no_power():
    fits = added(calibration.no_fits(), batch(200))
    p, q, rows = batch(SIZE)
    after = added(fits, (p, q, np.zeros_like(rows)))
    assert power_of(after) == pytest.approx(power_of(fits), rel=1e-5)


def test_padding_changes_nothing_and_eight_devices_keep_the_fits_of_one():
    whole = batch(8 * SIZE)
    one = added(calibration.no_fits(), whole)
    padded = jax.tree.map(lambda x: np.concatenate([x, 0 * x[:5]]), whole)
    np.testing.assert_allclose(added(calibration.no_fits(), padded), one, rtol=1e-5)
    shares = jax.tree.map(lambda x: x.reshape(8, SIZE, *x.shape[1:]), whole)
    add = functools.partial(added, calibration.no_fits(), reduce=Mean("data"))
    of_all = jax.pmap(add, "data")(shares)
    np.testing.assert_allclose(of_all, np.broadcast_to(one, of_all.shape), rtol=1e-5)


def test_beliefs_that_exclude_the_given_label_give_finite_fits():
    certain = np.eye(CLASSES, dtype=np.float32)[[0, 1]]
    given = certain, certain[::-1], np.ones(2, bool)
    never = np.eye(CLASSES) + np.diag([0.1], k=CLASSES - 1)  # 0 and 1 are not confused
    assert np.isfinite(added(calibration.no_fits(), given, never)).all()


def peaked(at, num_trusted=10**9):
    """The power where the fits are a parabola in log a."""
    return power_of(-((jnp.log(jnp.array(POWERS)) - np.log(at)) ** 2), num_trusted)


def test_the_best_power_lies_between_those_that_were_tried_and_never_beyond():
    for at in (1.0, 1.1, 2.0, 3.9):
        assert peaked(at) == pytest.approx(at, rel=1e-4)
    assert peaked(0.1) == pytest.approx(1) and peaked(50.0) == pytest.approx(4)


@pytest.mark.parametrize(
    "fits, power",
    [
        ([0.0, -3.0, -4.0, -4.5, -4.8], 1.0),  # falls ever slower
        ([0.0, -1.0, -2.0, -3.0, -4.0], 1.0),
        ([-4.0, -3.0, -2.0, -1.0, 0.0], 4.0),
        ([-4.8, -4.5, -4.0, -3.0, 0.0], 4.0),
        ([-1.0, -1.0, -1.0, -1.0, -1.0], 2**0.5),  # level: the place where it stands
    ],
)
def test_where_the_parabola_has_no_maximum_the_best_power_is_one_that_was_tried(fits, power):
    found = calibration.best_power(jnp.array(fits), 2, num_trusted=10**9)
    assert float(found) == pytest.approx(power, rel=1e-5)


def test_of_few_trusted_samples_it_is_near_the_usual_one():
    found = [peaked(1.0, number) for number in (0, 10, 5 * CLASSES, 1000)]
    assert found == sorted(found, reverse=True)
    assert calibration.best_power(calibration.no_fits(), CLASSES, num_trusted=9) == USUAL
    assert found[0] == 2 and found[2] == pytest.approx(2**0.5) and found[3] < 1.02


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: calibration.best_power(calibration.no_fits(), 1, num_trusted=5), "num_classes"),
        (lambda: power_of(calibration.no_fits(), -1), "num_trusted .*-1"),
        (lambda: added(calibration.no_fits(), batch(3), 1.5), "noise .*1.5"),
        (lambda: added(calibration.no_fits(), batch(3), np.eye(3)), "noise .*3, 3"),
        (lambda: added(calibration.no_fits(), batch(3), -CONFUSED), "noise .*-"),
        (lambda: added(calibration.no_fits(), batch(3), decay=1.0), "decay .*1.0"),
        (lambda: added(calibration.no_fits(), (*batch(3)[:2], np.ones(2, bool))), "rows"),
        (lambda: added(calibration.no_fits(), (batch(2)[0], *batch(3)[1:])), "probs and prior"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
