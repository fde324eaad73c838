"""LDAM and deferred reweighting by their equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, task
from experiments.configs import digits
from saflex_jax import configure
from saflex_jax.core.losses import ldam_loss
from saflex_jax.core.tree import Mean, identity, paths
from saflex_jax.rules import RULES, RuleSpec, drw
from saflex_jax.rules.drw import DeferredReweighting
from saflex_jax.types import Batch, RunInfo, Streams, Targets, TrainState
from tests import problems

# --- LDAM ----------------------------------------------------------------------------------------

COUNTS = np.array([500, 60, 7, 1, 90])
MASK = np.array([True, True, False, True, True, True])


def ldam(logits, labels, weights, *, max_margin, scale):
    """The equations in double precision, one class after the other."""
    margins = 1 / np.sqrt(np.sqrt(COUNTS))
    margins *= max_margin / margins.max()
    losses = np.zeros(len(logits))
    for row, k in itertools.product(range(len(logits)), range(len(COUNTS))):
        z = np.array(logits[row], np.float64)
        z[k] -= margins[k]
        losses[row] -= weights[row] * labels[row, k] * problems.log_softmax(scale * z)[k]
    return losses


def drawn(*, spread=1.0, soft=True):
    rng = np.random.default_rng(4)
    shape = len(MASK), len(COUNTS)
    logits = (spread * rng.normal(size=shape)).astype(np.float32)
    labels = (problems.soft_labels if soft else problems.hard_labels)(rng, *shape)
    return logits, labels, rng.uniform(0.5, 2, len(MASK)).astype(np.float32)


@functools.cache
def program(**options):
    def losses(logits, labels, weights):
        logits = jnp.where(MASK[:, None], logits, np.nan)  # the masked row is garbage
        batch = Batch(None, labels, MASK, None)
        loss = ldam_loss(COUNTS, **options)
        return loss(logits, Targets(weights, labels, weights), batch)

    return jax.jit(losses)


def found(*args, **options):
    """The loss of the code."""
    return program(**options)(*args)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("spread", [0.02, 1.0, 20.0])  # at 20 the softmax is one-hot in float32
def test_ldam_is_its_equation(spread, soft):
    args = drawn(spread=spread, soft=soft)
    for options in ({"max_margin": 0.5, "scale": 30.0}, {"max_margin": 2.0, "scale": 1.0}):
        expected = np.where(MASK, ldam(*args, **options), 0)
        assert expected.max() > 0.5
        np.testing.assert_allclose(found(*args, **options), expected, rtol=2e-5, atol=1e-6)


def test_a_confident_row_keeps_its_margin():
    # The label's logit leads by less and by more than its margin of 1/2, times 30.
    counts = np.array([1, 1, 1])
    leads = np.array([0.1, 0.45, 0.5, 0.55, 0.9], np.float32)
    logits = np.stack([leads, 0 * leads, 0 * leads - 9], 1)
    labels, mask = np.eye(3, dtype=np.float32)[[0] * 5], np.ones(5, bool)
    targets = Targets(np.ones(5, np.float32), labels, np.zeros(5))
    loss = jax.jit(ldam_loss(counts))(logits, targets, Batch(None, labels, mask, None))
    expected = np.log1p(np.exp(30 * (0.5 - leads.astype(np.float64))))
    np.testing.assert_allclose(loss, expected, rtol=3e-5)


def test_ldams_gradients_are_those_of_its_equation():
    args, step = drawn(), 1e-5
    options = {"max_margin": 0.5, "scale": 3.0}

    def total(*args):
        return found(*args, **options).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*args)
    exact = [np.array(x, np.float64) for x in args]
    for place, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        for where in np.ndindex(gradient.shape):
            if not MASK[where[0]]:
                assert gradient[where] == 0
                continue
            moved = [[x.copy() for x in exact] for _ in range(2)]
            moved[0][place][where] -= step
            moved[1][place][where] += step
            below, above = (ldam(*m, **options).sum() for m in moved)
            expected = (above - below) / (2 * step)
            assert gradient[where] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_ldams_defaults_are_the_papers():
    given = {"max_margin": 0.5, "scale": 30.0}
    np.testing.assert_array_equal(found(*drawn()), found(*drawn(), **given))


def test_ldam_refuses_what_it_cannot_weigh():
    for counts, message in (
        ([3, 0], "counts must be positive and finite; class 1 has 0"),
        ([3, np.nan], "counts must be positive and finite; class 1 has nan"),
        ([[3, 4]], r"counts must have shape \[K\]; given \[1, 2\]"),
    ):
        for make in (ldam_loss, deferred):
            with pytest.raises(ValueError, match=message):
                make(np.array(counts))
    with pytest.raises(ValueError, match="scale must be positive and finite; given 0"):
        ldam_loss(COUNTS, scale=0)
    with pytest.raises(ValueError, match="max_margin must be positive and finite; given -1"):
        ldam_loss(COUNTS, max_margin=-1)
    logits, labels, weights = drawn()
    targets, batch = Targets(weights, labels, weights), Batch(None, labels, MASK, None)
    with pytest.raises(ValueError, match=r"counts must have shape \[5\]; given \(4,\)"):
        ldam_loss(COUNTS[:4])(logits, targets, batch)


# --- deferred reweighting ------------------------------------------------------------------------


def deferred(counts, **options):
    return DeferredReweighting(RunInfo(9, len(counts), counts=counts), **options)


def refined(step, labels, mask, *, reduce=identity, **options):
    state = TrainState(np.int32(step), None, None, None, None)
    streams = Streams(Batch(None, labels, mask, None))
    return deferred(COUNTS, **options).apply((), state, None, streams, reduce=reduce)


def test_samples_weigh_by_the_effective_number_of_their_classes():
    _, labels, _ = drawn()
    beta, mask = 0.99, np.array([True] * 5 + [False])
    # A geometric sum: the expected number of distinct samples among n.
    effective = [sum(beta**i for i in range(n)) for n in COUNTS]
    raw = labels @ (1 / np.array(effective))
    targets, arrays, metrics = refined(7, labels, mask, beta=beta, start=7)
    np.testing.assert_allclose(targets.weights, mask * raw / raw[mask].mean(), rtol=1e-5)
    assert targets.weights[:5].std() > 0.1
    np.testing.assert_array_equal(targets.labels, labels)
    assert arrays == () and metrics == {}

    before, *_ = refined(6, labels, mask, beta=beta, start=7)
    np.testing.assert_array_equal(before.weights, mask)
    np.testing.assert_array_equal(before.labels, labels)


def test_beta_goes_from_no_reweighting_to_the_inverse_of_the_counts():
    np.testing.assert_array_equal(drw.class_weights(COUNTS, 0.0), np.ones(5))
    np.testing.assert_allclose(drw.class_weights(COUNTS, 1 - 1e-9), 1 / COUNTS, rtol=1e-5)
    for beta, message in ((1.0, r"beta must lie in \[0, 1\); given 1.0"),):
        with pytest.raises(ValueError, match=message):
            deferred(COUNTS, beta=beta)
    with pytest.raises(ValueError, match="start must be a whole number >= 0; given -1"):
        deferred(COUNTS, start=-1)
    with pytest.raises(ValueError, match=r"counts must have shape \[4\]; given \(5,\)"):
        refined(0, np.eye(4, dtype=np.float32), np.ones(4, bool))


def test_the_mean_weight_is_one_over_all_devices():
    _, labels, _ = drawn()
    whole, *_ = refined(0, labels, MASK)
    shares = jax.vmap(
        lambda labels, mask: refined(0, labels, mask, reduce=Mean("data"))[0].weights,
        axis_name="data",
    )(labels.reshape(2, 3, -1), MASK.reshape(2, 3))
    np.testing.assert_allclose(shares.ravel(), whole.weights, rtol=1e-6)
    np.testing.assert_allclose(whole.weights.sum() / MASK.sum(), 1, rtol=1e-6)


# --- by configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("method, views", [("supervised", 1), ("sla", 4)])
def test_loss_and_rule_are_given_the_counts_of_what_is_trained_on(monkeypatch, method, views):
    config = digits.get_config()
    config.data.update({"noise": 0.0, "imbalance": 10.0})
    config.model.cosine = True
    config.method.update({"name": method, "rule": "drw", "loss": "ldam"})
    config.method.drw.beta = 0.5
    build.check(config)
    data = task.make_data(config)
    given = {}

    def loss(run):
        given["loss"] = run.counts
        return ldam_loss(run.counts)

    def rule(run):
        given["rule"] = None if run is None else run.counts
        return DeferredReweighting(run)

    monkeypatch.setitem(configure.LOSSES, "ldam", configure.LossSpec(loss, of_labels=True))
    monkeypatch.setitem(RULES, "drw", RuleSpec(rule, of_labels=True))
    build.make_method(config, data.pools)
    sizes = np.bincount(data.clean_labels)
    assert sizes[9] == sizes[0] // 10 and len(sizes) == 10
    # Class y of view j is label y M + j.
    np.testing.assert_array_equal(given["loss"], np.repeat(sizes, views))
    np.testing.assert_array_equal(given["rule"], given["loss"])
    section = config.method.to_dict()
    assert configure.make_rule(section, build.run_info(config, data.pools)).beta == 0.5
    model = build.make_model(config, data.pools)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    assert not any(path.endswith("bias") for path in paths(params["head"]))  # of cosines


def test_deferred_reweighting_needs_the_counts():
    with pytest.raises(ValueError, match=r"drw needs run\.counts"):
        batch = Batch(None, np.eye(2, dtype=np.float32), np.ones(2, bool), None)
        DeferredReweighting().apply((), None, None, Streams(batch))
