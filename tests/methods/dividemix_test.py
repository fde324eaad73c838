"""DivideMix: its mixture of Gaussians, its division and its step by the equations."""

import functools

import jax
import numpy as np
import optax
import pytest
from sklearn.mixture import GaussianMixture

from saflex_jax import Batch, RunInfo, Streams
from saflex_jax.augment import mixup
from saflex_jax.core import memory
from saflex_jax.core.steps import draws_key
from saflex_jax.methods import dividemix
from saflex_jax.methods.dividemix import Division, Mixture
from saflex_jax.types import Trace
from tests import cost_test
from tests.problems import assert_close, hard_labels, log_softmax, softmax
from tests.rules.regression import (
    CLASSES,
    GAIN,
    LINEAR,
    LR,
    ROWS,
    RUNNERS,
    TX,
    candidates,
    plain_flops,
    start_state,
    stepped,
    two_layers,
)

EPOCH, WARMUP, RAMP, WEIGHT, ALPHA = 3, 2, 4, 7.0, 2.0
START = EPOCH * WARMUP
RUN = RunInfo(ROWS, CLASSES, steps_per_epoch=float(EPOCH))


def make(model=LINEAR, tx=TX, run=RUN, **changes):
    options = {"warmup": WARMUP, "ramp": RAMP, "unlabelled_weight": WEIGHT, "alpha": ALPHA}
    options["decay"] = 0.0
    return dividemix.make(model, tx, dividemix.Options(**options | changes), run=run)


# --- the mixture -----------------------------------------------------------------------------


def two_groups(size, apart, rng):
    upper = np.arange(size) < 0.3 * size
    values = np.where(upper, 0.5 + apart + 0.6 * rng.normal(size=size), rng.gamma(2, 0.1, size))
    return values.astype(np.float32), upper


def test_two_groups_are_told_apart():
    losses, upper = two_groups(500, 4.0, np.random.default_rng(0))
    seen = np.arange(500) % 5 > 0
    mixture = jax.jit(dividemix.fit)(np.where(seen, losses, 1e3), seen)
    of_lower = np.asarray(dividemix.probability_of_lower(losses, mixture))
    assert (of_lower[~upper] > 0.99).all() and (of_lower[upper] < 0.01).all()
    np.testing.assert_allclose(mixture.weight, [0.7, 0.3], atol=0.02)
    width = np.ptp(losses[seen])
    for group, mean, variance in zip((~upper, upper), mixture.mean, mixture.variance):
        values = losses[seen & group]
        assert mean == pytest.approx(values.mean(), rel=1e-3)
        assert variance == pytest.approx(values.var() + 5e-4 * width**2, rel=0.1)


def test_it_is_that_of_scikit_learn():
    losses, _ = two_groups(2000, 0.7, np.random.default_rng(1))  # groups that overlap
    scaled = ((losses - losses.min()) / np.ptp(losses))[:, None].astype(np.float64)
    theirs = GaussianMixture(2, reg_covar=5e-4, tol=1e-9, max_iter=1000, random_state=0).fit(scaled)
    order = theirs.means_[:, 0].argsort()
    ours = jax.jit(functools.partial(dividemix.fit, steps=1000))(losses, np.ones(2000, bool))
    width = np.ptp(losses)
    found = ours.weight, (ours.mean - losses.min()) / width, ours.variance / width**2
    expected = theirs.weights_, theirs.means_[:, 0], theirs.covariances_[:, 0, 0]
    for mine, reference in zip(found, expected):
        np.testing.assert_allclose(mine, reference[order], rtol=2e-3)
    of_lower = dividemix.probability_of_lower(losses, ours)
    np.testing.assert_allclose(of_lower, theirs.predict_proba(scaled)[:, order[0]], atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_losses_are_all_of_the_lower_one(value):
    losses = np.full(8, value, np.float32)
    mixture = dividemix.fit(losses, np.arange(8) < 6)
    assert all(np.isfinite(x).all() for x in mixture)
    np.testing.assert_array_equal(dividemix.probability_of_lower(losses, mixture), 1)


# --- a step ----------------------------------------------------------------------------------

MIXTURES = Mixture(
    np.float32([[0.6, 0.4], [0.5, 0.5]]),
    np.float32([[0.5, 2.0], [0.8, 1.7]]),
    np.float32([[0.3, 0.5], [0.2, 0.8]]),
)


def density(losses, weight, mean, variance):
    return weight / np.sqrt(variance) * np.exp(-((losses - mean) ** 2) / (2 * variance))


def probability(losses, place):
    """By network a (0) or b (1)."""
    lower, upper = (density(losses, *(x[place, k] for x in MIXTURES)) for k in (0, 1))
    return lower / np.maximum(lower + upper, 1e-300)  # of padding both are 0


def divided(logits, labels, right):
    """Network -> labels of the rows, and which of these count as labelled."""
    probs = {name: softmax(z) for name, z in logits.items()}
    found = {}
    for name, other in (("a", 1), ("b", 0)):
        w = right[:, other, None]
        labelled = w >= 0.5
        own = w * labels + (1 - w) * probs[name]
        chosen = np.where(labelled, own, (probs["a"] + probs["b"]) / 2) ** 2
        found[name] = chosen / chosen.sum(1, keepdims=True), labelled[:, 0]
    return found


def loss_and_pull(logits, labels, labelled, numbers, weight, shares):
    """A device's part of a network's loss, and its gradient in the logits, by hand."""
    p, (of_labelled, others) = softmax(logits), numbers
    apart, mean = p - labels, p.mean(0)
    entropy = -(labels * log_softmax(logits)).sum(1)
    loss = entropy[labelled].sum() / of_labelled
    loss += weight * (apart[~labelled] ** 2).mean(1).sum() / others
    loss += -np.log(CLASSES * mean).mean() / shares

    def through_softmax(x):
        return p * (x - (p * x).sum(1, keepdims=True))

    square = weight * 2 / CLASSES * through_softmax(apart) / others
    pull = np.where(labelled[:, None], apart / of_labelled, square)
    pull -= through_softmax(np.broadcast_to(1 / mean, p.shape)) / (len(p) * CLASSES * shares)
    return loss, pull


@functools.cache
def mixed_by():
    """Compiled."""
    return jax.jit(mixup(ALPHA))


def after_step(kernel, batch, labels, labelled, key, weight, shares):
    """(the kernel, the loss) of one network, every device mixing its own rows."""
    refined, size = batch._replace(labels=labels.astype(np.float32)), ROWS // shares
    numbers = (labelled & batch.mask).sum(), (~labelled & batch.mask).sum()
    assert min(numbers) > 0
    total, new = 0.0, np.float64(kernel)
    for begin in range(0, ROWS, size):
        rows = np.arange(begin, begin + size)
        mixed = mixed_by()(key, Batch(*(x[rows] for x in refined[:4])))
        keep = batch.mask[rows]
        x, y = (np.float64(a)[keep] for a in (mixed.inputs, mixed.labels))
        loss, pull = loss_and_pull(x @ kernel, y, labelled[rows][keep], numbers, weight, shares)
        total, new = total + loss, new - LR * x.T @ pull
    return new, total


@functools.cache
def runner_of(name):
    """Of the method that `make` gives; the tests share what it compiles."""
    make_runner, devices, _ = RUNNERS[name]
    return make_runner(make().step, devices=jax.devices()[:devices])


def step_under(name, state, batch):
    """(state without its key, metrics)."""
    run = runner_of(name)
    state, metrics = run.step(run.put_state(state), run.put_batch(Streams(batch)))
    return jax.device_get((state._replace(key=()), metrics))


def state_at(method, step):
    state = start_state(method, step)
    return state._replace(extra=Division(state.extra.losses, MIXTURES))


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=pytest.mark.slow if r == "jit 1" else ()) for r in RUNNERS],
)
def test_a_step_by_hand(runner):
    step = START + EPOCH + 1  # nothing is fitted; the weight is a third of the way
    method, batch, shares = make(), candidates(labels=hard_labels), RUNNERS[runner][2]
    batch = batch._replace(inputs=0.3 * batch.inputs)
    state = state_at(method, step)
    kernels = {n: np.asarray(state.params[n]["kernel"]) for n in "ab"}
    logits = {n: GAIN * np.float64(batch.inputs @ k) for n, k in kernels.items()}
    losses = np.stack([-(batch.labels * log_softmax(z)).sum(1) for z in logits.values()], 1)
    right = np.stack([probability(losses[:, place], place) for place in (0, 1)], 1)
    parts = divided(logits, batch.labels, right)
    keys = jax.random.split(draws_key(state))
    weight, expected, total = WEIGHT * (step - START) / (RAMP * EPOCH), {}, 0.0
    for name, key in zip("ab", keys):
        kernel, loss = after_step(kernels[name], batch, *parts[name], key, weight, shares)
        expected[name], total = {"kernel": kernel}, total + loss
    after, metrics = step_under(runner, state, batch)
    assert_close(after.params, expected, 2e-6)
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-5)
    kept = np.mean([labelled[batch.mask] for _, labelled in parts.values()])
    assert np.divide(*metrics["kept"]) == pytest.approx(kept)
    rows = batch.index[batch.mask]
    np.testing.assert_allclose(after.extra.losses.mean[rows], losses[batch.mask], rtol=1e-5)
    assert after.extra.losses.visits.sum() == len(rows)
    assert_close(after.extra.mixtures, MIXTURES, 0)


def test_mixtures_are_fitted_where_an_epoch_begins():
    method, batch = make(), candidates(labels=hard_labels)
    fit = jax.jit(dividemix.fit)
    for number in (0, 1, EPOCH - 1, EPOCH):
        state, _ = step_under("jit 8", state_at(method, number), batch)
        losses = state.extra.losses
        for place in (0, 1):
            expected = Mixture(*(x[place] for x in MIXTURES))
            if number % EPOCH == 0:
                expected = fit(losses.mean[:, place], losses.visits > 0)
            assert_close(Mixture(*(x[place] for x in state.extra.mixtures)), expected, 1e-5)


@pytest.mark.parametrize(
    "runner", [pytest.param("jit 8", marks=pytest.mark.slow), pytest.param("pmap 4")]
)
def test_warming_up_is_plain_training_of_both(runner):
    method, batch = make(), candidates()
    state, total = start_state(method, START - 1), 0.0
    after, metrics = step_under(runner, state, batch)
    for name in "ab":
        kernel = np.asarray(state.params[name]["kernel"], np.float64)
        expected, loss = stepped(kernel, batch, batch.labels, np.ones(ROWS))
        assert_close(after.params[name], expected, 2e-6)
        total += loss
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-5)
    np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), total / 2, rtol=1e-5)
    assert np.divide(*metrics["kept"]) == 1


def test_mixed_rows_are_as_likely_right_as_their_parents():
    rng, method = np.random.default_rng(0), make()
    losses = rng.uniform(0, 3, size=(ROWS, 2)).astype(np.float32)
    share = np.array([1.0, 0.7, 0.6, 0.5], np.float32)
    index, partner = np.arange(4, dtype=np.int32), np.array([0, 3, 9, 0], np.int32)
    visits = np.where(np.arange(ROWS) == 9, 0, 5)  # one was never seen
    labels = hard_labels(rng, ROWS, CLASSES)
    mixed = share[:, None] * labels[index] + (1 - share[:, None]) * labels[partner]
    inputs = rng.normal(size=(4, 3)).astype(np.float32)
    trace = Trace(np.zeros((4, 1), np.int32), share[:, None], partner[:, None])
    batch = Batch(inputs, mixed, np.ones(4, bool), index, trace)
    empty, state = memory.init(ROWS, 2), state_at(method, START + 1)
    kept = memory.Memory(
        empty.mean.at[:ROWS].set(losses), empty.visits.at[:ROWS].set(visits.astype(np.int32))
    )
    state = state._replace(extra=state.extra._replace(losses=kept))
    logits = {n: GAIN * np.float64(inputs @ state.params[n]["kernel"]) for n in "ab"}
    losses[0] = [-(mixed[0] * log_softmax(z[0])).sum() for z in logits.values()]  # its last visit
    right = np.stack([probability(losses[:, place], place) for place in (0, 1)], 1)
    expected = share[:, None] * right[index] + (1 - share[:, None]) * right[partner]
    expected[2] = 1
    targets = jax.jit(method.targets)(state, Streams(batch))
    np.testing.assert_allclose(targets.utility, 2 * expected[:, 1] - 1, atol=1e-5)
    np.testing.assert_allclose(targets.labels, divided(logits, mixed, expected)["a"][0], atol=1e-5)
    np.testing.assert_array_equal(targets.weights, 1)


def test_the_networks_differ_and_both_predict():
    inputs = candidates(masked=0).inputs
    state = start_state(make())
    a, b = (GAIN * inputs @ np.asarray(state.params[n]["kernel"]) for n in "ab")
    assert np.abs(a - b).min(1).max() > 0
    np.testing.assert_allclose(make(predict="a").predict(state, inputs), a, rtol=1e-5, atol=1e-5)
    both = np.log((softmax(a) + softmax(b)) / 2)
    np.testing.assert_allclose(make().predict(state, inputs), both, rtol=1e-4, atol=1e-4)


def test_padding_alone_does_nothing():
    method, batch = make(), candidates(labels=hard_labels)
    batch = batch._replace(mask=np.zeros(ROWS, bool))
    before = state_at(method, START + 1)
    after, _ = step_under("jit 8", before, batch)
    assert_close(after.params, before.params, 0)
    assert not after.extra.losses.visits.any()


@pytest.mark.slow
def test_a_step_costs_two_plain_ones_and_two_forward_passes():
    run = RunInfo(cost_test.BATCH, cost_test.CLASSES, steps_per_epoch=2.0)
    method = make(two_layers(256, cost_test.CLASSES), cost_test.TX, run)
    state = method.init(jax.random.key(0), cost_test.STREAMS.candidates.inputs)
    both = cost_test.flops(method.predict, state, cost_test.STREAMS.candidates.inputs)
    expected = 2 * plain_flops() + both
    assert 0.98 * expected < cost_test.step_flops(method) < 1.1 * expected


# --- what it is for --------------------------------------------------------------------------


def test_wrong_labels_are_found_and_not_learned():
    rng = np.random.default_rng(0)
    centres, truth = 2 * rng.normal(size=(4, 6)), rng.integers(4, size=160)
    wrong = np.arange(160) < 64
    given = np.where(wrong, (truth + rng.integers(1, 4, 160)) % 4, truth)
    inputs = (centres[truth] + rng.normal(size=(160, 6))).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[given]
    streams = Streams(Batch(inputs, labels, np.ones(160, bool), np.arange(160, dtype=np.int32)))
    run = RunInfo(160, 4, steps_per_epoch=1.0)
    method = make(two_layers(16, 4), optax.adam(0.02), run, warmup=30.0, ramp=30.0)
    state, step = method.init(jax.random.key(0), inputs), jax.jit(method.step)
    for _ in range(100):
        state, _ = step(state, streams)
    right = state.extra.right(streams.candidates.index)  # by either network
    assert ((right < 0.5) == wrong[:, None]).mean() > 0.9
    predicted = np.asarray(method.predict(state, inputs)).argmax(1)
    assert (predicted == truth)[wrong].mean() > 0.9


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"warmup": -1.0}, "warmup must be >= 0 and finite; given -1.0"),
        ({"ramp": 0.0}, "ramp must be positive and finite; given 0.0"),
        ({"temperature": 0.1}, r"temperature must lie in \[0.125, inf\]; given 0.1"),
        ({"threshold": 1.1}, r"threshold must lie in \[0, 1\]; given 1.1"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\); given 1.0"),
        ({"predict": "men"}, r"predict must be one of .*did you mean 'mean'\?"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dividemix.Options(**options)


def test_what_it_cannot_do_without_is_asked_for():
    with pytest.raises(ValueError, match=r"dividemix needs run\.steps_per_epoch"):
        make(run=RunInfo(ROWS, CLASSES))
    batch, method = candidates(), make()
    with pytest.raises(ValueError, match="dividemix trains on candidates alone"):
        method.step(start_state(method), Streams(batch, clean=batch))
