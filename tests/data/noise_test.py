import numpy as np
import pytest
from scipy import stats

from saflex_jax.data import noise
from saflex_jax.data.noise import (
    instance_noise,
    outside_candidates,
    pairwise_noise,
    symmetric_noise,
)
from tests.data.splits_test import Slices

SIZE, CLASSES = 240, 5
LABELS = np.random.default_rng(0).integers(CLASSES, size=SIZE)
INPUTS = np.random.default_rng(1).normal(size=(SIZE, 4))
OTHER = 100 + np.random.default_rng(2).normal(size=(500, 4))


def wrong(kind, share, seed, labels=LABELS):
    """(what came out, which rows were changed)."""
    if kind == "outside":
        found, outside = outside_candidates(INPUTS, OTHER, share=share, seed=seed)
        np.testing.assert_array_equal(outside, (found != INPUTS).any(1))
        return found, outside
    if kind == "instance":
        found = instance_noise(INPUTS, labels, CLASSES, share=share, seed=seed)
    else:
        make = {"pairwise": pairwise_noise, "symmetric": symmetric_noise}[kind]
        found = make(labels, CLASSES, share=share, seed=seed)
    return found, found != labels


KINDS = pytest.mark.parametrize("kind", ["symmetric", "pairwise", "instance", "outside"])


# --- laws of all kinds


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 0.5, 1.0])
def test_exactly_a_share_is_changed_and_the_arguments_are_not(kind, share):
    before = LABELS.copy(), INPUTS.copy(), OTHER.copy()
    found, changed = wrong(kind, share, 3)
    assert changed.sum() == round(share * SIZE)
    original = INPUTS if kind == "outside" else LABELS
    assert found.shape == original.shape and found.dtype == original.dtype
    assert not np.shares_memory(found, original)
    if kind != "outside":
        assert found.min() >= 0 and found.max() < CLASSES
    assert all(map(np.array_equal, before, (LABELS, INPUTS, OTHER)))
    np.testing.assert_array_equal(found, wrong(kind, share, 3)[0])


@KINDS
def test_rows_are_chosen_uniformly_and_independently_from_seed_to_seed(kind):
    draws, share = 300, 0.3
    chosen = np.stack([wrong(kind, share, seed)[1] for seed in range(draws)])
    z = (chosen.sum(0) - draws * share) / np.sqrt(draws * share * (1 - share))
    # Draws without replacement: the z are exchangeable with sum zero.
    assert 1e-4 < stats.chi2.sf((z**2).sum() * (SIZE - 1) / SIZE, SIZE - 1) < 1 - 1e-4
    overlap = stats.hypergeom(SIZE, 72, 72)
    both = (chosen[::2] & chosen[1::2]).sum(1)
    assert abs(both.mean() - overlap.mean()) < 5 * overlap.std() / np.sqrt(len(both))


@pytest.mark.parametrize("kind", ["symmetric", "pairwise", "instance"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_labels_keep_their_type_up_to_its_last_class(kind, dtype):
    classes = min(np.iinfo(dtype).max + 1, 300)
    labels = np.arange(classes).astype(dtype)
    make = {"symmetric": symmetric_noise, "pairwise": pairwise_noise}.get(kind)
    if make is None:
        found = instance_noise(labels[:, None], labels, classes, share=1.0, seed=0)
    else:
        found = make(labels, classes, share=1.0, seed=0)
    assert found.dtype == dtype and (found != labels).all()
    assert found.min() >= 0 and int(found.max()) < classes


# --- symmetric


def test_noise_is_uniform_over_the_other_classes():
    labels = np.zeros(30_000, int)
    counts = np.bincount(symmetric_noise(labels, 4, share=1.0, seed=0), minlength=4)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 10_000, atol=5 * np.sqrt(30_000 * 2 / 9))  # 5 sigma


# --- pairwise


def test_pairwise_noise_moves_a_class_to_the_next():
    found, changed = wrong("pairwise", 0.4, 0)
    following = {0: 1, 1: 2, 2: 3, 3: 4, 4: 0}
    assert found[changed].tolist() == [following[k] for k in LABELS[changed].tolist()]
    assert set(LABELS[changed].tolist()) == set(range(5))
    labels = LABELS
    for _ in range(CLASSES):  # a cycle
        assert (labels != LABELS).all() or labels is LABELS
        labels = pairwise_noise(labels, CLASSES, share=1.0, seed=0)
    np.testing.assert_array_equal(labels, LABELS)


# --- instance-dependent


# With one feature x the odds of wrong class a against b are exp(x (w_a - w_b)), for every true
# class. In the unknowns u = w_0 - w_1 and v = w_1 - w_2 the log odds are x v of 1 : 2 (true class
# 0), x (u + v) of 0 : 2 (true class 1) and x u of 0 : 1 (true class 2).
VALUES = np.array([-3.0, -1.0, 1.0, 3.0])
CONTRASTS = np.array([[0, 1], [1, 1], [1, 0]])  # of (u, v), by true class
DESIGN = (VALUES[:, None, None] * CONTRASTS).reshape(12, 2)


def cells(size):
    """Every pair of a value of the feature and a true class, `size` times each."""
    x, y = np.meshgrid(np.repeat(VALUES, size), np.arange(3), indexing="ij")
    return x.ravel(), y.ravel()


def log_odds(x, y, noisy):
    """Of the first wrong class against the second, and their variance: 4 values by 3 classes."""
    counts = np.zeros((4, 3, 3))
    np.add.at(counts, (np.searchsorted(VALUES, x), y, noisy), 1)
    # The half is Haldane's: no logarithm of zero, and less bias.
    counts = 0.5 + counts[:, ~np.eye(3, dtype=bool)].reshape(4, 3, 2)
    return np.log(counts[..., 0] / counts[..., 1]), (1 / counts).sum(-1)


def fit(x, y, noisy):
    """Weighted least squares of (u, v): (estimate, chi-square on 12 - 2 degrees of freedom)."""
    found, variance = (a.ravel() for a in log_odds(x, y, noisy))
    scale = 1 / np.sqrt(variance)
    estimate, *_ = np.linalg.lstsq(DESIGN * scale[:, None], found * scale, rcond=None)
    return estimate, (((found - DESIGN @ estimate) * scale) ** 2).sum()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_wrong_classes_follow_a_softmax_of_a_projection(seed):
    x, y = cells(4000)
    noisy = instance_noise(x[:, None], y, 3, share=1.0, seed=seed)
    estimate, chi_square = fit(x, y, noisy)
    assert stats.chi2.sf(chi_square, 10) > 1e-4
    # It does depend on the instance: without x the fit is impossible.
    found, variance = log_odds(x, y, noisy)
    assert stats.chi2.sf((found**2 / variance).sum(), 12) < 1e-12 and np.abs(estimate).max() > 0.1


def test_the_projection_is_standard_normal_on_standardised_inputs():
    x, y = cells(600)
    raw = np.stack([1000 - 70 * x, np.full(len(x), 7.0)], -1).astype(np.float32)
    found = []
    for seed in range(80):
        # Per unit of x, whose standard deviation is sqrt(5), u and v are N(0, 2 / 5).
        estimate, _ = fit(x, y, instance_noise(raw, y, 3, share=1.0, seed=seed))
        found.append(estimate / np.sqrt(2 / 5))
    u, v = np.array(found).T
    for normal in (u, v, (u + 2 * v) / np.sqrt(3)):  # corr(u, v) = -1/2
        assert stats.kstest(normal, "norm").pvalue > 1e-4
    assert abs(np.mean(u * v) + 0.5) < 5 * np.sqrt(1.25 / 80)


def test_inputs_that_are_alike_become_alike():
    rng = np.random.default_rng(3)
    # With many features the preference is strong, so that chance rarely decides.
    images = rng.integers(256, size=(100, 20, 20, 3)).astype(np.uint8)
    inputs, labels = np.concatenate([images, images]), np.tile(rng.integers(9, size=100), 2)
    all_ = instance_noise(inputs, labels, 9, share=1.0, seed=0)
    assert (all_[:100] == all_[100:]).mean() > 0.9
    assert (all_[:100] == np.roll(all_[100:], 1)).mean() < 0.4
    # The preference is the input's own, whatever the share; another seed has another.
    some = instance_noise(inputs, labels, 9, share=0.5, seed=0)
    changed = some != labels
    assert (some == all_)[changed].mean() > 0.9
    other = instance_noise(inputs, labels, 9, share=1.0, seed=1)
    assert (other == all_).mean() < 0.4
    flat = instance_noise(inputs.reshape(200, -1) / 255, labels, 9, share=1.0, seed=0)
    np.testing.assert_array_equal(flat, all_)


@pytest.mark.parametrize("chunk", [1, 7, 60, 240])
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_inputs_are_read_in_chunks_that_change_nothing(chunk, share, monkeypatch):
    expected = instance_noise(INPUTS, LABELS, CLASSES, share=share, seed=0)
    monkeypatch.setattr(noise, "CHUNK", chunk)
    lazy = Slices(INPUTS)
    found = instance_noise(lazy, LABELS, CLASSES, share=share, seed=0)
    np.testing.assert_array_equal(found, expected)
    assert max(lazy.read) <= chunk and sum(lazy.read) <= 2 * SIZE


# --- candidates from outside


@pytest.mark.parametrize("size", [1, 60, 96, 500])
def test_outside_candidates_are_rows_of_the_other_set(size):
    found, outside = outside_candidates(INPUTS, OTHER[:size], share=0.4, seed=0)
    np.testing.assert_array_equal(found[~outside], INPUTS[~outside])
    places = (found[outside, None] == OTHER[None, :size]).all(-1)
    assert (places.sum(1) == 1).all()
    repeated = places.sum(0).max() > 1
    assert repeated == (size < 96)


def test_outside_rows_are_drawn_uniformly():
    counts = np.zeros(500)
    for seed in range(300):
        found, outside = outside_candidates(INPUTS, OTHER, share=0.5, seed=seed)
        counts += np.isin(OTHER[:, 0], found[outside, 0])
    p = 120 / 500
    z = (counts - 300 * p) / np.sqrt(300 * p * (1 - p))
    assert 1e-4 < stats.chi2.sf((z**2).sum() * 499 / 500, 499) < 1 - 1e-4


# --- errors


@pytest.mark.parametrize("kind", [symmetric_noise, pairwise_noise, "instance"])
@pytest.mark.parametrize(
    "labels, classes, share, message",
    [
        ([0, 1, 2], 3, 1.1, r"share must lie in \[0, 1\]; given 1.1"),
        ([0, 1, 2], 3, -0.1, r"share must lie in \[0, 1\]; given -0.1"),
        ([0, 1, 2], 3, np.nan, r"share must lie in \[0, 1\]; given nan"),
        ([0, 1, 3], 3, 0.5, r"labels must lie in \[0, 3\); row 2 is 3"),
        ([0, -1, 1], 3, 0.5, r"labels must lie in \[0, 3\); row 1 is -1"),
        ([0.0, 1.0, 2.0], 3, 0.5, r"labels must be integers of shape \[N\]; given float64"),
        ([[0, 1, 2]], 3, 0.5, r"labels must be integers of shape \[N\]; given int64\[1, 3\]"),
        ([0, 0, 0], 1, 0.5, "num_classes must be a whole number >= 2; given 1"),
    ],
)
def test_label_noise_errors(kind, labels, classes, share, message):
    make = (
        (lambda *a, **k: instance_noise(np.ones((3, 2)), *a, **k)) if kind == "instance" else kind
    )
    with pytest.raises(ValueError, match=message):
        make(np.array(labels), classes, share=share, seed=0)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (INPUTS[:-1], "inputs must have 240 rows, as labels; given 239"),
        (
            np.where(np.arange(SIZE)[:, None] == 130, np.nan, INPUTS),
            r"inputs\[100:\] .* at \[30, 0",
        ),
        (np.full((SIZE, 2), None), r"inputs\[0:100\] must be an array of 100 rows; given object"),
    ],
)
def test_instance_noise_errors(inputs, message, monkeypatch):
    monkeypatch.setattr(noise, "CHUNK", 100)
    with pytest.raises(ValueError, match=message):
        instance_noise(inputs, LABELS, CLASSES, share=0.5, seed=0)


@pytest.mark.parametrize(
    "other, share, message",
    [
        (OTHER[:, :3], 0.5, r"other must have rows float64\[4\], as inputs; given float64\[3\]"),
        (np.float32(OTHER), 0.5, r"other must have rows float64\[4\], .* given float32\[4\]"),
        (OTHER[:0], 0.5, "other must hold at least one row; given 0"),
        (OTHER, 1.5, r"share must lie in \[0, 1\]; given 1.5"),
    ],
)
def test_outside_errors(other, share, message):
    with pytest.raises(ValueError, match=message):
        outside_candidates(INPUTS, other, share=share, seed=0)
