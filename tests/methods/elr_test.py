"""ELR: its averages, its gradient and its step by the equations; plain training without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams, Targets
from saflex_jax._compat import enable_x64
from saflex_jax.core import memory
from saflex_jax.core.tree import Mean
from saflex_jax.methods import elr, supervised
from saflex_jax.rules import AsGiven, Posterior, Refinement, Scoring
from saflex_jax.types import Trace
from tests import cost_test, problems
from tests.problems import hard_labels, log_softmax, softmax
from tests.rules.regression import (
    CLASSES,
    LINEAR,
    LR,
    ROWS,
    RUNNERS,
    TX,
    candidates,
    plain_flops,
    start_state,
    step_under,
    two_layers,
)

STRENGTH, DECAY = 2.5, 0.6
RUN, SMALL = RunInfo(ROWS, CLASSES), RunInfo(6, problems.CLASSES)


def posterior(**options):
    """SAFLEX's rule for the run SMALL."""
    return Refinement(Scoring(), Posterior(SMALL, **options))


def make(model=LINEAR, tx=TX, run=RUN, rule=None, **changes):
    options = {"strength": STRENGTH, "decay": DECAY} | changes
    return elr.make(model, tx, elr.Options(**options), rule=rule, run=run)


class OfRows:
    """A rule that knows nothing of the network: other weights and labels, from the given labels."""

    def init(self, params):
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce):
        weights, labels = of_rows(streams.candidates.labels)
        return Targets(weights, labels, weights), arrays, {"applied": (weights.sum(), 1.0)}


def of_rows(labels):
    """Weights, and labels of which little moves: less than what gives ELR its full strength."""
    return 0.95 + 0.1 * labels[:, 0], 0.98 * labels + 0.02 / CLASSES


def by_hand(kernel, batch, averages, weights=None, labels=None, strength=STRENGTH):
    """The kernel after gradient descent, f64, and the two means of the loss."""
    weights = np.ones(len(batch.mask)) if weights is None else weights
    labels = batch.labels if labels is None else labels
    w, labels, t = (a[batch.mask] for a in (weights[:, None], labels, averages))
    x = np.float64(batch.inputs)[batch.mask]
    p = softmax(x @ kernel)
    agreed = (p * t).sum(1, keepdims=True)
    pull = w * (p - labels) + strength * p * (agreed - t) / (1 - agreed)
    cross_entropy = -np.mean(np.sum(w * labels * log_softmax(x @ kernel), 1))
    return kernel - LR * x.T @ pull / len(x), cross_entropy, np.log(1 - agreed).mean()


# --- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runner",
    [pytest.param(r, marks=pytest.mark.slow if r == "jit 1" else ()) for r in RUNNERS],
)
def test_steps_by_hand_on_the_targets_of_a_rule(runner):
    batch, method = candidates(labels=hard_labels), make(rule=OfRows(), enough=0.3)
    batch = batch._replace(inputs=0.3 * batch.inputs)  # no probability is cut
    of_rule = weights, labels = of_rows(batch.labels)
    left = np.maximum(batch.labels - weights[:, None] * labels, 0).sum(1)
    strength = left[batch.mask].mean() / 0.3 * STRENGTH
    assert 0 < strength < STRENGTH
    make_runner, devices, _ = RUNNERS[runner]
    run = make_runner(method.step, devices=jax.devices()[:devices])
    t, state = np.zeros((ROWS, CLASSES)), run.put_state(start_state(method))
    for visits in (1, 2, 3):
        kernel = np.asarray(state.params["kernel"], np.float64)
        t = DECAY * t + (1 - DECAY) * softmax(batch.inputs @ kernel)
        expected, cross_entropy, pulls = by_hand(kernel, batch, t, *of_rule, strength)
        state, metrics = run.step(state, run.put_batch(Streams(batch)))
        np.testing.assert_allclose(state.params["kernel"], expected, atol=2e-6)
        loss = cross_entropy + strength * pulls
        np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
        np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), loss, rtol=1e-5)
        np.testing.assert_allclose(np.divide(*metrics["regulariser"]), pulls, rtol=1e-5)
        assert "applied" in metrics
        rows = batch.index[batch.mask]
        np.testing.assert_allclose(state.extra.past.mean[rows], t[batch.mask], atol=1e-6)
        seen = np.asarray(state.extra.past.visits) - elr.MANY
        np.testing.assert_array_equal(seen[rows], visits)
        assert seen.sum() == visits * len(rows)


@functools.cache
def after_steps(make_method, **options):
    """The state, without its key, and the targets of the next step.

    Not compiled as a whole: JAX 0.12 fuses two programs differently, which rounds.
    """
    p, tx = problems.problem("mlp", masked=1), optax.adam(1e-2)
    labels = hard_labels(np.random.default_rng(0), 6, problems.CLASSES)  # else all rows are mixed
    streams = p.streams._replace(candidates=p.streams.candidates._replace(labels=labels))
    method = make_method(p.model, tx, **options)
    state = jax.jit(method.init)(jax.random.key(0), streams.candidates)
    for _ in range(3):
        state, _ = method.step(state, streams)
    return jax.device_get((state._replace(key=()), method.targets(state, streams)))


@pytest.mark.parametrize("rule", [None, posterior(noise_rate=0.4)], ids=["as given", "saflex"])
def test_without_strength_it_is_the_rule_alone_bit_for_bit(rule):
    alone, learned = after_steps(supervised.make, rule=rule)
    found, targets = after_steps(make, run=SMALL, rule=rule, strength=0.0)
    found = found._replace(extra=found.extra.rule)
    jax.tree.map(np.testing.assert_array_equal, (found, targets), (alone, learned))
    assert (learned.weights[0] == 1) == (rule is None)


def test_while_its_rule_finds_no_label_wrong_it_is_plain_training_bit_for_bit():
    alone, _ = after_steps(supervised.make, rule=None)
    found, _ = after_steps(make, run=SMALL, rule=posterior(noise_rate=0.0))
    assert found.extra.past.mean.any()
    found = found._replace(extra=())
    jax.tree.map(np.testing.assert_array_equal, found, alone)


def test_full_strength_needs_no_wrong_label_where_none_is_enough():
    source, _ = after_steps(make, run=SMALL, rule=None)
    found, _ = after_steps(make, run=SMALL, rule=posterior(noise_rate=0.0), enough=0.0)
    assert found.extra.past.mean.any()
    found = found._replace(extra=source.extra)
    jax.tree.map(np.testing.assert_array_equal, found, source)


def test_the_rule_as_given_is_the_method_without_a_rule():
    alone, found = (after_steps(make, run=SMALL, rule=rule)[0] for rule in (None, AsGiven()))
    jax.tree.map(np.testing.assert_array_equal, found, alone)


def test_mixed_rows_have_the_mixture_of_their_parents():
    rng, method = np.random.default_rng(0), make()
    kept = softmax(rng.normal(size=(ROWS, CLASSES))).astype(np.float32)
    kept[5] = 0  # never seen
    share = np.array([1.0, 0.95, 0.7, 0.6, 0.5], np.float32)[:, None]
    index, partner = np.arange(5, dtype=np.int32), np.array([[0], [1], [3], [5], [1]], np.int32)
    labels = hard_labels(rng, ROWS, CLASSES)
    mixed = share * labels[index] + (1 - share) * labels[partner[:, 0]]
    inputs = 0.3 * rng.normal(size=(5, 3)).astype(np.float32)
    batch = Batch(inputs, mixed, np.ones(5, bool), index, Trace(0 * partner, share, partner))
    empty = memory.init(ROWS, CLASSES)
    state = start_state(method)._replace(
        extra=elr.PastAndRule(
            memory.Memory(
                empty.mean.at[:ROWS].set(kept), empty.visits.at[:ROWS].set(9 * kept.any(1))
            ),
            (),
        )
    )
    kernel = np.asarray(state.params["kernel"], np.float64)
    p = softmax(inputs @ kernel)
    t = share * kept[index] + (1 - share) * kept[partner[:, 0]]
    t[:2] = kept[:2] + (1 - DECAY) * (p[:2] - kept[:2])  # whole rows alone are remembered
    t[3] = 0  # of a parent nothing is known
    t[4] = share[4] * kept[4] + (1 - share[4]) * t[1]  # which was just remembered
    after, _ = step_under("jit 1", {"": method}, {"": state}, batch)[""]
    np.testing.assert_allclose(after.params["kernel"], by_hand(kernel, batch, t)[0], atol=2e-6)
    np.testing.assert_allclose(after.extra.past.mean[:2], t[:2], atol=1e-6)
    np.testing.assert_array_equal(after.extra.past.mean[2:ROWS], kept[2:])


def test_a_step_costs_a_plain_one():
    method = make(two_layers(256, cost_test.CLASSES), cost_test.TX, RunInfo(64, cost_test.CLASSES))
    assert plain_flops() < cost_test.step_flops(method) < 1.02 * plain_flops()


def test_what_a_rule_moved_is_a_mean_over_all_devices_rows():
    prior, mask = np.eye(2, dtype=np.float32)[[0, 1] * 4], np.arange(8) < 2
    targets = Targets(np.ones(8, np.float32), prior[::-1], np.zeros(8, np.float32))
    rows = targets, Batch((), prior, mask, np.arange(8))
    shares = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), rows)
    found = jax.vmap(functools.partial(elr.moved, reduce=Mean("data")), axis_name="data")(*shares)
    np.testing.assert_array_equal(found, elr.moved(*rows))
    np.testing.assert_array_equal(found, 1)


# --- the regulariser -------------------------------------------------------------------------


def test_its_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    logits, t = rng.normal(size=(4, CLASSES)), softmax(rng.normal(size=(4, CLASSES)))

    def total(logits):
        return elr.regulariser(logits, t).sum()

    with enable_x64(True):
        grads, total = jax.grad(total)(logits), jax.jit(total)
        for place in np.ndindex(*logits.shape):
            e = np.zeros_like(logits)
            e[place] = 1e-5
            difference = total(logits + e) - total(logits - e)
            np.testing.assert_allclose(grads[place], difference / 2e-5, atol=1e-9)


def test_it_pulls_towards_what_was_said_before_and_stays_finite():
    logits = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
    t = jnp.array([[0.8, 0.1, 0.1], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    value, grads = jax.value_and_grad(lambda z: elr.regulariser(z, t).sum())(logits)
    assert np.isfinite(value) and np.isfinite(grads).all()
    assert grads[0].argmin() == 0 and (grads[0, 1:] > 0).all()
    assert not grads[1:].any()


# --- what it is for --------------------------------------------------------------------------


def test_wrong_labels_are_not_learned_by_heart():
    rng = np.random.default_rng(0)
    centres, truth = 2 * rng.normal(size=(4, 6)), rng.integers(4, size=160)
    wrong = np.arange(160) < 64
    given = np.where(wrong, (truth + rng.integers(1, 4, 160)) % 4, truth)
    inputs = (centres[truth] + rng.normal(size=(160, 6))).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[given]
    streams = Streams(Batch(inputs, labels, np.ones(160, bool), np.arange(160, dtype=np.int32)))
    model, tx, right = two_layers(64, 4), optax.adam(0.02), {}
    methods = {
        "plain": supervised.make(model, tx),
        "elr": make(model, tx, RunInfo(160, 4), strength=3.0, decay=0.7),
    }
    for name, method in methods.items():
        state, step = jax.jit(method.init)(jax.random.key(0), inputs), jax.jit(method.step)
        for _ in range(200):
            state, _ = step(state, streams)
        predicted = np.asarray(jax.jit(method.predict)(state, inputs)).argmax(1)
        right[name] = (predicted == truth)[wrong].mean()
    assert right["plain"] < 0.6 < 0.9 < right["elr"]


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": -1.0}, "strength must be >= 0 and finite; given -1.0"),
        ({"enough": -0.1}, "enough must be >= 0 and finite; given -0.1"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\); given 1.0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        elr.Options(**options)


def test_clean_samples_are_refused():
    batch, method = candidates(), make()
    with pytest.raises(ValueError, match="elr trains on candidates alone"):
        method.step(start_state(method), Streams(batch, clean=batch))
