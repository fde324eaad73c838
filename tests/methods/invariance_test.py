"""Invariance-constrained training: the chain's law, the multiplier's recursion, plain training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, Streams
from saflex_jax.augment import sample_keys
from saflex_jax.methods import invariance, supervised
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
    step, after = jax.jit(method.step), []
    for _ in range(count):
        state, metrics = step(state, Streams(batch))
        after.append((state, jax.device_get(metrics)))
    return after


# --- the chain -------------------------------------------------------------------------------

STATES = 4
# Losses of the four augmentations, for samples with an even and with an odd index.
TABLES = np.array([[0.1, 0.4, 1.0, 3.0], [2.0, 0.0, 0.5, 0.5]], np.float32)


def draw_state(key, batch):
    """One of the four, uniform."""

    def draw(key):
        return jax.random.randint(key, (), 0, STATES)

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


@functools.cache
def chains(proposals):
    """(key, batch) -> the chains' ends and moves, compiled."""
    return jax.jit(
        functools.partial(
            invariance.metropolis_hastings,
            propose=draw_state, losses_of=table_losses, steps=proposals,
        )
    )  # fmt: skip


SAMPLES = rows(np.full(2**16, -1, np.int32), np.zeros((2**16, 1), np.float32))


@pytest.mark.parametrize("proposals", [1, 3, 30])
def test_every_samples_chain_has_the_law_of_its_own_losses(proposals):
    chosen, moves = chains(proposals)(jax.random.key(proposals), SAMPLES)
    size = len(SAMPLES.mask)
    for odd, losses in enumerate(TABLES.astype(np.float64)):
        expected, mean_moves = law(losses, proposals)
        if proposals == 30:  # the law that the paper asks for
            np.testing.assert_allclose(expected, losses / losses.sum(), atol=1e-4)
        shares = np.bincount(chosen.inputs[odd::2], minlength=STATES) / (size / 2)
        deviation = np.sqrt(expected * (1 - expected) / (size / 2))
        assert (np.abs(shares - expected) <= 5 * deviation + 1e-6).all()
        np.testing.assert_allclose(np.mean(moves[odd::2]), mean_moves, rtol=0.01, atol=1e-6)
    np.testing.assert_array_equal(chosen.index, SAMPLES.index)


def test_a_sample_draws_the_same_wherever_it_stands():
    index = SAMPLES.index[::-1] + 40  # others came for the first 40
    other = SAMPLES._replace(index=index)
    here, there = (jax.device_get(chains(3)(jax.random.key(0), b)) for b in (SAMPLES, other))
    assert len(set(here[0].inputs[40:])) == STATES
    for one, two in zip(jax.tree.leaves(here), jax.tree.leaves(there)):
        np.testing.assert_array_equal(one[40:], two[::-1][:-40])


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
    options = invariance.Options(augment=draw_state, mh_steps=3)
    method = invariance.make(by_table(of_training=trained), optax.sgd(0.1), options)
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
        lambda key, inputs: ({"kernel": start}, {}),
        lambda params, stats, x, key: (2 * x @ params["kernel"], stats),
        lambda params, stats, x: x @ params["kernel"],
    )
    epsilon, dual_rate, count = 1.6, 0.5, 40

    def reflect(key, batch):
        return batch._replace(inputs=0.5 - batch.inputs)

    options = invariance.Options(augment=reflect, epsilon=epsilon, dual_rate=dual_rate)
    method = invariance.make(model, optax.sgd(rate), options)
    after = run(method, method.init(jax.random.key(0), inputs), batch, count)

    kernel, gamma, gammas = start.astype(np.float64), 0.0, []
    x, y = inputs[mask].astype(np.float64), batch.labels[mask].astype(np.float64)

    def loss_and_gradient(x):
        p = softmax(2 * x @ kernel)
        return -(y * np.log(p)).sum(1).mean(), 2 * x.T @ (p - y) / len(x)

    for state, metrics in after:
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
    """Linear regression on inputs less a running mean, which training mode moves."""

    def train(params, stats, x, key):
        stats = {"mean": 0.5 * stats["mean"] + 0.5 * x.mean(0)}
        return (x - x.mean(0, keepdims=True)) @ params["kernel"], stats

    return Model(
        lambda key, x: (
            {"kernel": np.float32([[1, -2], [0, 3]])},
            {"mean": np.zeros(2, np.float32)},
        ),
        train,
        lambda params, stats, x: (x - stats["mean"][None]) @ params["kernel"],
    )


def square(logits, targets, candidates):
    """Half the squared error."""
    losses = jnp.sum((logits - targets.labels) ** 2, 1) / 2
    return targets.weights * jnp.where(candidates.mask, losses, 0.0)


def test_with_gamma_at_zero_it_is_plain_training_bit_for_bit():
    # Numbers are whole, means are over powers of two: no sum is rounded, in whatever order.
    inputs = np.float32([[5, 1], [3, 2], [1, 0], [-1, 5], [2, 7], [4, -3], [2, 2], [0, 2]])
    np.testing.assert_array_equal(inputs.mean(0), [2, 2])
    mask = np.arange(8) < 4
    streams = Streams(rows(inputs, np.eye(2, dtype=np.float32)[[0, 1, 1, 0] * 2], mask))
    model, tx = centring(), optax.sgd(0.5, momentum=0.5)

    def shifted(key, batch):
        return batch._replace(inputs=batch.inputs + 2 * batch.inputs[:, :1])

    options = invariance.Options(augment=shifted, epsilon=1e6, dual_rate=1.0)
    slack = invariance.make(model, tx, options, loss=square)
    plain = supervised.make(model, tx, loss=square)
    steps = {method: jax.jit(method.step) for method in (plain, slack)}

    def after(method, gamma):
        state = method.init(jax.random.key(0), inputs)._replace(extra=gamma)
        for _ in range(2):
            state, _ = steps[method](state, streams)
        return jax.device_get(state._replace(key=0))

    expected, state = after(plain, ()), after(slack, np.float32(0))
    assert state.extra == 0
    assert np.abs(expected.params["kernel"]).max() > 4 and expected.model_state["mean"].all()
    for part in ("params", "model_state", "opt_state"):
        one, two = (jax.tree.leaves(getattr(s, part)) for s in (expected, state))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    # Gamma reaches the parameters, and never the running statistics.
    active = after(slack, np.float32(1e4))
    assert np.abs(active.params["kernel"] - expected.params["kernel"]).max() > 1e-3
    np.testing.assert_array_equal(active.model_state["mean"], expected.model_state["mean"])


# --- runners ---------------------------------------------------------------------------------


def on_devices(make_runner, axis_name=None):
    """State and metrics after some steps, padding among the rows."""
    options = invariance.Options("shift(4) | flip", epsilon=0.0, dual_rate=0.2, mh_steps=3)
    method = invariance.make(setup_.make_model(axis_name), setup_.TX, options)
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
        invariance.Options(**options)


def test_rows_must_stay_and_clean_samples_are_the_candidates():
    p = problems.problem("cnn")
    method = invariance.make(p.model, optax.sgd(0.1), invariance.Options("views(2, shift(1))"))
    state = method.init(jax.random.key(0), p.streams.candidates.inputs)
    with pytest.raises(ValueError, match="augment must keep the number of rows; it made 12 of 6"):
        jax.eval_shape(method.step, state, p.streams)
    streams = p.streams._replace(clean=p.streams.candidates)
    with pytest.raises(ValueError, match="invariance trains on candidates alone"):
        method.step(state, streams)
