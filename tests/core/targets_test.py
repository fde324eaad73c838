import math
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.targets import prior_targets, score_scale, solve_targets
from tests import problems

SIZE, CLASSES = 6, 4
SHAPE = (SIZE, CLASSES)


def drawn(seed=0, *, hard=False):
    rng = np.random.default_rng(seed)
    prior = (problems.hard_labels if hard else problems.soft_labels)(rng, SIZE, CLASSES)
    return (0.1 * rng.normal(size=SHAPE)).astype(np.float32), prior


def pull(prior, anchor):
    """What beta multiplies, NumPy float64."""
    prior = np.asarray(prior, np.float64)
    return prior if anchor == "linear" else np.log(np.maximum(prior, 1e-3))


def normalised(scores, scale):
    scores = np.asarray(scores, np.float64)
    return scores / np.sqrt((scores**2).mean()) if scale == "rms" else scores


def entropy(y):
    return -np.where(y > 0, y * np.log(np.where(y > 0, y, 1)), 0).sum(-1)


@pytest.mark.parametrize("anchor", ["linear", "log"])
@pytest.mark.parametrize("scale", ["rms", "raw"])
def test_closed_form_beats_dirichlet_draws_on_its_objective(anchor, scale):
    scores, prior = drawn()
    strength, temperature = 1.3, 0.6
    found = solve_targets(
        scores,
        prior,
        prior_strength=strength,
        temperature=temperature,
        scale=scale,
        anchor=anchor,
    )
    linear = normalised(scores, scale) + strength * pull(prior, anchor)

    def objective(y):
        return (y * linear).sum(-1) + temperature * entropy(y)

    rng = np.random.default_rng(1)
    draws = np.concatenate([rng.dirichlet(np.full(CLASSES, a), 1000) for a in (0.1, 0.5, 1, 5)])
    labels = np.asarray(found.labels, np.float64)
    best = objective(labels)
    # Far draws, and the same pulled to within 1 % of the solution, where a wrong one would lose.
    for distance in (1.0, 0.1, 0.01):
        rivals = (1 - distance) * labels + distance * draws[:, None]
        assert (best >= objective(rivals).max(0) - 1e-9).all()
    # the maximum of a linear function plus entropy is the log-partition function
    log_partition = temperature * np.log(np.exp(linear / temperature).sum(1))
    np.testing.assert_allclose(best, log_partition, rtol=1e-6)


@pytest.mark.parametrize("scale", ["rms", "raw"])
def test_low_temperature_gives_the_best_class(scale):
    scores, prior = drawn()
    found = solve_targets(scores, prior, prior_strength=0.2, temperature=1e-5, scale=scale)
    best = (normalised(scores, scale) + 0.2 * prior).argmax(1)
    np.testing.assert_allclose(found.labels, np.eye(CLASSES)[best], atol=1e-6)
    assert (best != prior.argmax(1)).any()  # the scores do decide here


@pytest.mark.parametrize("anchor", ["linear", "log"])
def test_strong_prior_wins(anchor):
    scores, one_hot = drawn(hard=True)
    solve = partial(solve_targets, scores, anchor=anchor)
    np.testing.assert_allclose(solve(one_hot, prior_strength=1e4).labels, one_hot, atol=1e-6)
    # A finite strength sharpens a mixed prior; infinity alone returns it, to the bit.
    mixed = drawn()[1]
    peak = np.eye(CLASSES)[mixed.argmax(1)]
    np.testing.assert_allclose(solve(mixed, prior_strength=1e4).labels, peak, atol=1e-6)
    for prior in (one_hot, mixed):
        found = solve(prior, prior_strength=math.inf, learn="labels")
        np.testing.assert_array_equal(found.labels, prior)
        np.testing.assert_array_equal(found.weights, 1)


def test_log_anchor_leaves_a_mixed_prior_where_scores_are_zero():
    prior = 0.9 * drawn()[1] + np.float32(0.1 / CLASSES)  # above the floor
    zero = np.zeros_like(prior)
    found = solve_targets(zero, prior, prior_strength=0.3, temperature=0.3, anchor="log")
    np.testing.assert_allclose(found.labels, prior, rtol=1e-5)
    np.testing.assert_array_equal(found.weights, 1)


@pytest.mark.parametrize("learn", ["both", "weights"])
@pytest.mark.parametrize("tolerance", [0.0, 0.25, 1.0, math.inf])
def test_tolerance_rule(tolerance, learn):
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(40, CLASSES)).astype(np.float32)
    prior = problems.hard_labels(rng, 40, CLASSES)
    found = solve_targets(scores, prior, tolerance=tolerance, learn=learn)
    u = normalised(scores, "rms")
    labels = prior if learn == "weights" else problems.softmax((u + 3.0 * prior) / 0.3)
    utility = (labels * u).sum(1)
    np.testing.assert_allclose(found.utility, utility, atol=1e-5)
    keep = utility >= -tolerance
    assert keep.any() and keep.all() == (tolerance == math.inf)
    np.testing.assert_allclose(found.weights, keep * 40 / keep.sum(), rtol=1e-6)


def test_tolerance_includes_its_boundary():
    scores = np.array([[-0.25, 1.0], [-0.2500001, 1.0]], np.float32)
    prior = np.array([[1.0, 0.0]] * 2, np.float32)
    found = solve_targets(scores, prior, learn="weights", scale="raw", tolerance=0.25)
    np.testing.assert_array_equal(found.weights, [2.0, 0.0])


def test_learn_chooses_what_is_learned():
    scores, prior = drawn(2, hard=True)
    both, weights, labels = (
        solve_targets(
            scores, prior, learn=learn, tolerance=0.0, prior_strength=0.5, temperature=0.01
        )
        for learn in ("both", "weights", "labels")
    )
    np.testing.assert_array_equal(weights.labels, prior)
    np.testing.assert_array_equal(labels.weights, 1)
    np.testing.assert_array_equal(both.labels, labels.labels)
    # A learned label is judged by its own utility, no worse than the prior's (but for tau log K).
    assert (np.asarray(both.utility) >= np.asarray(weights.utility) - 0.014).all()
    kept = [(np.asarray(found.weights) > 0).sum() for found in (weights, both)]
    assert 0 < kept[0] < kept[1]


def test_masked_rows_do_not_count():
    scores, prior = drawn()
    scores[4:], prior[4:] = np.nan, 7.0  # neither scores nor labels of padding are read
    mask = np.arange(SIZE) < 4
    found = solve_targets(scores, prior, mask=mask, tolerance=0.0, learn="weights")
    alone = solve_targets(scores[:4], prior[:4], tolerance=0.0, learn="weights")
    for padded, row in zip(found, alone):
        np.testing.assert_allclose(padded[:4], row, rtol=1e-6)
    np.testing.assert_array_equal(found.weights[4:], 0)
    np.testing.assert_allclose(found.weights.sum(), 4, rtol=1e-6)
    np.testing.assert_allclose(score_scale(scores[:4]), np.sqrt((scores[:4] ** 2).mean()), 1e-6)
    np.testing.assert_array_equal(prior_targets(prior, mask).weights, mask)


def test_everything_dropped_is_no_training_and_no_nan():
    prior = drawn(hard=True)[1]
    found = solve_targets(1 - 2 * prior, prior, learn="weights", tolerance=0.5)
    np.testing.assert_array_equal(found.weights, 0)
    logits = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)

    def loss(z):
        return masked_mean(weighted_cross_entropy(z, found.labels, found.weights))

    value, grad = jax.value_and_grad(loss)(logits)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("learn", ["both", "weights", "labels"])
@pytest.mark.parametrize("scale", ["rms", "raw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_surfaces(bad, scale, learn):
    scores, prior = drawn(hard=True)
    row = 2
    scores[row, prior[row].argmax()] = bad  # the class on which all of the prior rests
    solve = partial(solve_targets, scale=scale, learn=learn)
    with pytest.raises(ValueError, match=rf"scores must be finite; given {bad} at \[{row}, \d\]"):
        solve(scores, prior)
    found = jax.jit(solve)(scores, prior)  # values cannot be read while tracing
    assert not np.isfinite(found.weights[row])
    # padding rows may hold anything
    found = jax.jit(solve)(scores, prior, mask=np.arange(SIZE) != row)
    assert np.isfinite(found.weights).all()


@problems.PROPERTY
@given(
    problems.arrays(*SHAPE),
    problems.simplices(*SHAPE),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    st.permutations(range(SIZE)),
    st.permutations(range(CLASSES)),
    st.sampled_from(["linear", "log"]),
    st.sampled_from(["both", "weights", "labels"]),
    st.sampled_from(["rms", "raw"]),
)
def test_laws(scores, prior, mask, rows, classes, anchor, learn, scale):
    mask, rows, classes = np.array(mask), np.array(rows), np.array(classes)
    solve = partial(solve_targets, anchor=anchor, learn=learn, scale=scale)
    found = solve(scores, prior, mask=mask)
    weights, labels = np.asarray(found.weights), np.asarray(found.labels)
    assert (labels >= 0).all()
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    assert (weights >= 0).all() and (weights[~mask] == 0).all()
    if (weights > 0).any():
        np.testing.assert_allclose(weights[mask].mean(), 1, rtol=1e-5)
        assert len(np.unique(weights[weights > 0])) == 1
    moved = solve(scores[rows][:, classes], prior[rows][:, classes], mask=mask[rows])
    np.testing.assert_allclose(moved.labels, labels[rows][:, classes], atol=1e-5)
    np.testing.assert_allclose(moved.utility, found.utility[rows], atol=1e-5)
    clear = np.abs(np.asarray(found.utility) + 0.25).min() > 1e-4  # no row on the edge
    if learn == "labels" or clear:
        np.testing.assert_allclose(moved.weights, weights[rows], rtol=1e-5)


@problems.PROPERTY
@given(problems.arrays(*SHAPE), problems.simplices(*SHAPE), st.floats(-6, 6))
def test_rms_scale_makes_targets_blind_to_the_size_of_scores(scores, prior, exponent):
    hypothesis.assume(np.abs(scores).max() > 0.1)
    found = solve_targets(scores, prior)
    hypothesis.assume(np.abs(np.asarray(found.utility) + 0.25).min() > 1e-4)
    resized = solve_targets(scores * np.float32(10**exponent), prior)
    np.testing.assert_allclose(resized.labels, found.labels, atol=1e-5)
    np.testing.assert_allclose(resized.weights, found.weights, rtol=1e-5)


def test_raw_scale_feels_the_size_of_scores():
    scores, prior = drawn()
    small, large = (solve_targets(c * scores, prior, scale="raw") for c in (1, 30))
    assert np.abs(small.labels - large.labels).max() > 0.1


def test_no_gradient_flows_through_targets():
    scores, prior = drawn()

    def total(s):
        return sum(jnp.sum(x**2) for x in solve_targets(s, prior))

    np.testing.assert_array_equal(jax.grad(total)(scores), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite; given 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"prior_strength": -1.0}, "prior_strength must be >= 0; given -1.0"),
        ({"prior_strength": math.nan}, "prior_strength must be >= 0"),
        ({"tolerance": -0.1}, "tolerance must be >= 0"),
        ({"scale": "rsm"}, "scale must be one of .* did you mean 'rms'"),
        ({"learn": "label"}, "learn must be one of .* did you mean 'labels'"),
        ({"anchor": "linaer"}, "anchor must be one of .* did you mean 'linear'"),
        ({"mask": np.ones(SIZE - 1, bool)}, r"mask must have shape \[6\]; given \(5,\)"),
    ],
)
def test_bad_options_are_named_before_compilation(options, message):
    scores, prior = drawn()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda s, q: solve_targets(s, q, **options), scores, prior)


def test_bad_scores_and_priors():
    scores, prior = drawn()
    with pytest.raises(ValueError, match=r"scores \(6, 4\), prior \(6, 3\)"):
        solve_targets(scores, prior[:, :3])
    with pytest.raises(ValueError, match=r"scores \(6, 4\), prior \(5, 4\)"):
        solve_targets(scores, prior[:5])
    for wrong in ([0.5, 0.5, 0.5, 0.0], [1.5, -0.5, 0.0, 0.0], [np.nan, 1.0, 0.0, 0.0]):
        prior[3] = wrong
        with pytest.raises(ValueError, match="prior must have rows >= 0 that sum to one; row 3"):
            solve_targets(scores, prior)
