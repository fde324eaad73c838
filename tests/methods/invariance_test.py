"""Invariance-constrained training: the chain's law, the multiplier's recursion, plain training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, Streams
from saflex_jax.augment import sample_keys
from saflex_jax.core.tree import identity
from saflex_jax.methods import erm, invariance
from saflex_jax.parallel import RUNNERS, jit_runner
from tests import problems
from tests.parallel import setup_
from tests.problems import softmax


def rows(inputs, labels, mask=None, first=0):
    size = len(inputs)
    mask = np.ones(size, bool) if mask is None else mask
    return Batch(inputs, labels, mask, np.arange(first, first + size, dtype=np.int32))


def run(method, state, batch, count=1):
    """States and metrics after each of some steps on one batch."""
    step = jax.jit(functools.partial(method.step, reduce=identity))
    found = []
    for _ in range(count):
        state, metrics = step(state, Streams(batch))
        found.append((state, jax.device_get(metrics)))
    return found


# --- the chain -------------------------------------------------------------------------------

STATES = 4
# Losses of the four augmentations, for samples with an even and with an odd index.
TABLES = np.array([[0.1, 0.4, 1.0, 3.0], [2.0, 0.0, 0.5, 0.5]], np.float32)


def draw_state(key, batch):
    """One of the four, uniform."""
    draw = lambda key: jax.random.randint(key, (), 0, STATES)
    return batch._replace(inputs=jax.vmap(draw)(sample_keys(key, batch)))


def table_losses(batch):
    return jnp.asarray(TABLES)[batch.index % 2, batch.inputs]


def law(losses, proposals):
    """Of the chain's end and its mean number of moves, by its transition matrix."""
    accept = np.array([[min(1, new / old) if old else 1 for new in losses] for old in losses])
    transition = accept / STATES
    transition += np.diag(1 - transition.sum(1))
    p, moves = np.full(STATES, 1 / STATES), 0.0
    for _ in range(proposals - 1):
        moves += p @ accept.mean(1)
        p = p @ transition
    return p, moves


@pytest.mark.parametrize("proposals", [1, 2, 3, 30])
def test_every_samples_chain_has_the_law_of_its_own_losses(proposals):
    size = 2**16
    batch = rows(np.full(size, -1, np.int32), np.zeros((size, 1), np.float32))
    sample = jax.jit(
        functools.partial(
            invariance.metropolis_hastings,
            propose=draw_state, losses_of=table_losses, steps=proposals,
        )
    )  # fmt: skip
    chosen, moves = sample(jax.random.key(proposals), batch)
    for odd, losses in enumerate(TABLES.astype(np.float64)):
        expected, mean_moves = law(losses, proposals)
        if proposals == 30:  # the law that the paper asks for
            np.testing.assert_allclose(expected, losses / losses.sum(), atol=1e-4)
        found = np.bincount(chosen.inputs[odd::2], minlength=STATES) / (size / 2)
        deviation = np.sqrt(expected * (1 - expected) / (size / 2))
        assert (np.abs(found - expected) <= 5 * deviation + 1e-6).all()
        np.testing.assert_allclose(np.mean(moves[odd::2]), mean_moves, rtol=0.01, atol=1e-6)
    np.testing.assert_array_equal(chosen.index, batch.index)


def test_a_sample_draws_the_same_wherever_it_stands():
    batch = rows(np.zeros(64, np.int32), np.zeros((64, 1), np.float32))
    other = jax.tree.map(lambda x: x[::-1][:40], batch)
    options = dict(propose=draw_state, losses_of=table_losses, steps=3)
    found = invariance.metropolis_hastings(jax.random.key(0), batch, **options)
    moved = invariance.metropolis_hastings(jax.random.key(0), other, **options)
    assert len(set(np.asarray(found[0].inputs))) == STATES
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(moved)):
        np.testing.assert_array_equal(one[::-1][:40], two)


def by_table(*, of_training=None):
    """Two classes whose cross-entropy for the first is TABLES[0] of the input, in evaluation mode.

    Training mode has the losses `of_training` in their place.
    """

    def logits(table, inputs):
        z = jnp.log(jnp.expm1(jnp.asarray(table, jnp.float32)))[inputs]
        return jnp.stack([jnp.zeros_like(z), z], 1)

    training = TABLES[0] if of_training is None else of_training
    return Model(
        lambda key, inputs: ({"unused": jnp.zeros(())}, {}),
        lambda params, stats, inputs, key: (logits(training, inputs), stats),
        lambda params, stats, inputs: logits(TABLES[0], inputs),
    )


def test_a_step_trains_on_the_ends_of_chains_that_saw_evaluation_mode():
    size = 2**14
    labels = np.eye(2, dtype=np.float32)[np.zeros(size, int)]
    batch = rows(np.zeros(size, np.int32), labels, np.arange(size) < size - 100)
    trained = np.array([4.0, 3.0, 2.0, 1.0])
    method = invariance.make(
        by_table(of_training=trained), optax.sgd(0.1), augment=draw_state, mh_steps=3
    )
    ((_, metrics),) = run(method, method.init(jax.random.key(0), batch.inputs), batch)
    expected, moves = law(TABLES[0].astype(np.float64), 3)
    real = size - 100
    deviation = np.sqrt(expected @ trained**2 - (expected @ trained) ** 2) / np.sqrt(real)
    assert abs(np.divide(*metrics["hard_loss"]) - expected @ trained) < 5 * deviation
    assert metrics["hard_loss"][1] == real
    np.testing.assert_allclose(np.divide(*metrics["clean_loss"]), trained[0], rtol=1e-5)
    assert metrics["acceptance"][1] == 2 * real
    np.testing.assert_allclose(np.divide(*metrics["acceptance"]), moves / 2, rtol=0.02)


# --- primal and dual steps -------------------------------------------------------------------


def test_parameters_and_multiplier_follow_their_equations():
    # Softmax regression, with logits that are doubled in training mode, and one augmentation that
    # is always the same: the chain ends there.
    rng = np.random.default_rng(0)
    size, masked, features, classes, rate = 12, 3, 4, 3, 0.4
    mask = np.arange(size) < size - masked
    inputs = np.where(mask[:, None], rng.normal(size=(size, features)), 1e3).astype(np.float32)
    batch = rows(inputs, problems.soft_labels(rng, size, classes), mask)
    start = rng.normal(size=(features, classes)).astype(np.float32)
    model = Model(
        lambda key, inputs: ({"kernel": jnp.asarray(start)}, {}),
        lambda params, stats, x, key: (2 * x @ params["kernel"], stats),
        lambda params, stats, x: x @ params["kernel"],
    )
    epsilon, dual_rate, count = 1.6, 0.5, 40
    method = invariance.make(
        model,
        optax.sgd(rate),
        augment=lambda key, batch: batch._replace(inputs=0.5 - batch.inputs),
        epsilon=epsilon,
        dual_rate=dual_rate,
    )
    found = run(method, method.init(jax.random.key(0), inputs), batch, count)

    kernel, gamma, gammas = start.astype(np.float64), 0.0, []
    x, y = inputs[mask].astype(np.float64), batch.labels[mask].astype(np.float64)

    def loss_and_gradient(x):
        p = softmax(2 * x @ kernel)
        return -(y * np.log(p)).sum(1).mean(), 2 * x.T @ (p - y) / len(x)

    for state, metrics in found:
        (clean, of_clean), (hard, of_hard) = loss_and_gradient(x), loss_and_gradient(0.5 - x)
        np.testing.assert_allclose(metrics["loss"][0], clean + gamma * hard, rtol=1e-4)
        np.testing.assert_allclose(np.divide(*metrics["clean_loss"]), clean, rtol=1e-4)
        np.testing.assert_allclose(np.divide(*metrics["hard_loss"]), hard, rtol=1e-4)
        kernel -= rate * (of_clean + gamma * of_hard)
        gamma = max(gamma + dual_rate * (hard - epsilon), 0.0)
        gammas.append(gamma)
        np.testing.assert_allclose(state.params["kernel"], kernel, atol=1e-4)
        np.testing.assert_allclose(state.extra, gamma, atol=1e-4)
        assert metrics["gamma"] == (state.extra, 1)
        assert metrics["acceptance"] == (9, 9)
    # It has risen, fallen, and been held at zero.
    assert max(gammas) > 0.5 and gammas[-1] == 0
    assert dual_rate * (hard - epsilon) < -0.01


def centring():
    """Softmax regression on inputs less a running mean, which training mode moves."""
    start = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)

    def train(params, stats, x, key):
        stats = {"mean": 0.5 * stats["mean"] + 0.5 * x.mean(0)}
        return (x - x.mean(0, keepdims=True)) @ params["kernel"], stats

    return Model(
        lambda key, x: ({"kernel": jnp.asarray(start)}, {"mean": jnp.zeros(4)}),
        train,
        lambda params, stats, x: (x - stats["mean"][None]) @ params["kernel"],
    )


def test_with_gamma_at_zero_it_is_plain_training_bit_for_bit():
    rng = np.random.default_rng(2)
    inputs, labels = rng.normal(size=(8, 4)).astype(np.float32), problems.soft_labels(rng, 8, 3)
    streams = Streams(rows(inputs, labels, np.arange(8) < 6))
    model, tx = centring(), optax.adam(1e-2)

    def after(method, gamma):
        """Not compiled: XLA rounds the sums of another program otherwise."""
        state = method.init(jax.random.key(0), inputs)._replace(extra=gamma)
        for _ in range(2):
            state, _ = method.step(state, streams, reduce=identity)
        return state

    shifted = lambda key, batch: batch._replace(inputs=batch.inputs + 1.5 * batch.inputs[:, :1])
    slack = invariance.make(model, tx, augment=shifted, epsilon=1e3, dual_rate=1.0)
    plain, found = after(erm.make(model, tx), ()), after(slack, jnp.zeros(()))
    assert found.extra == 0
    same = lambda s: (s.params, s.model_state, s.opt_state)
    for one, two in zip(jax.tree.leaves(same(plain)), jax.tree.leaves(same(found)), strict=True):
        np.testing.assert_array_equal(one, two)
    # Gamma reaches the parameters, and never the running statistics.
    active = after(slack, jnp.full((), 1e4))
    assert np.abs(active.params["kernel"] - plain.params["kernel"]).max() > 1e-3
    np.testing.assert_array_equal(active.model_state["mean"], plain.model_state["mean"])


# --- runners ---------------------------------------------------------------------------------


def on_devices(make_runner, axis_name=None):
    """State and metrics after some steps, padding among the rows."""
    method = invariance.make(
        setup_.make_model(axis_name),
        setup_.TX,
        augment="shift(4) | flip",
        epsilon=0.0,
        dual_rate=0.2,
        mh_steps=3,
    )
    runner = make_runner(method.step)
    state = runner.put_state(method.init(jax.random.key(0), setup_.POOL.inputs[:2]))
    for batch in setup_.make_batches("implicit_padding"):
        state, metrics = runner.step(state, runner.put_batch(batch))
    averages = {name: np.divide(*pair) for name, pair in jax.device_get(metrics).items()}
    return setup_.flatten(state), averages


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    expected, metrics = on_devices(functools.partial(jit_runner, devices=jax.devices()[:1]))
    assert expected["extra"] > 0.5 and 0 < metrics["acceptance"] < 1
    for name, axis in {"jit": None, "pmap": "data"}.items():
        state, found = on_devices(RUNNERS[name], axis)
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=2e-6, err_msg=key)
        for key, value in metrics.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": -1.0}, "epsilon must be >= 0 and finite; given -1.0"),
        ({"dual_rate": float("inf")}, "dual_rate must be >= 0 and finite; given inf"),
        ({"mh_steps": 0}, "mh_steps must be a whole number >= 1; given 0"),
        ({"augment": "trivialaugmnt"}, "did you mean 'trivialaugment'"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        invariance.make(by_table(), optax.sgd(0.1), **options)


def test_rows_must_stay_and_clean_samples_are_the_candidates():
    p = problems.problem("cnn")
    method = invariance.make(p.model, optax.sgd(0.1), augment="views(2, shift(1))")
    state = method.init(jax.random.key(0), p.streams.candidates.inputs)
    with pytest.raises(ValueError, match="augment must keep the number of rows; it made 12 of 6"):
        method.step(state, p.streams, reduce=identity)
    streams = p.streams._replace(clean=p.streams.candidates)
    with pytest.raises(ValueError, match="invariance trains on candidates alone"):
        method.step(state, streams, reduce=identity)
