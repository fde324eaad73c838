"""Label smoothing, bootstrapping, small-loss selection and co-teaching by their equations."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, Streams, TrainState
from saflex_jax.core.tree import Mean, identity
from saflex_jax.methods import co_teaching, supervised
from saflex_jax.models import from_function
from saflex_jax.parallel import jit_runner, pmap_runner
from saflex_jax.rules import small_loss
from saflex_jax.rules.bootstrap import Bootstrap
from saflex_jax.rules.label_smoothing import LabelSmoothing
from saflex_jax.rules.small_loss import SmallLoss
from tests import cost_test
from tests.problems import assert_close, hard_labels, log_softmax, soft_labels, softmax

ROWS, MASKED, FEATURES, CLASSES, LR = 24, 5, 3, 4, 0.5
GAIN = 1.7  # of the logits in evaluation mode
EPSILON, BETA, FORGET, RAMP, START, NOW = 0.3, 0.6, 0.55, 8, 4, 5
OPTIONS = {
    "label_smoothing": {"epsilon": EPSILON},
    "bootstrap": {"beta": BETA, "start": START},
    "bootstrap_hard": {"beta": BETA, "start": START, "hard": True},
    "small_loss": {"forget": FORGET, "ramp": RAMP},
    "co_teaching": {"forget": FORGET, "ramp": RAMP},
}
RULES = {
    "label_smoothing": LabelSmoothing,
    "bootstrap": Bootstrap,
    "bootstrap_hard": Bootstrap,
    "small_loss": SmallLoss,
}


def method_of(name, model, tx, **options):
    """Co-teaching, or plain training with a rule."""
    if name == "co_teaching":
        return co_teaching.make(model, tx, co_teaching.Options(**options))
    return supervised.make(model, tx, RULES[name](**options))


def candidates(size=ROWS, masked=MASKED, seed=0, labels=soft_labels):
    """Padding anywhere, of large numbers and with labels of its own."""
    rng = np.random.default_rng(seed)
    mask = np.ones(size, bool)
    mask[rng.choice(size, masked, replace=False)] = False
    inputs = rng.normal(size=(size, FEATURES)).astype(np.float32) * np.where(mask, 1, 30)[:, None]
    index = rng.permutation(size).astype(np.int32)
    return Batch(inputs.astype(np.float32), labels(rng, size, CLASSES), mask, index)


def refined(rule, batch, step=NOW, reduce=identity):
    """Targets of a network whose inputs are its logits."""
    return _refined(rule, reduce)(batch, np.int32(step))


@functools.cache
def _refined(rule, reduce):
    def logits_fn(params, inputs):
        return inputs

    @jax.jit
    def targets_of(batch, step):
        state = TrainState(step, None, None, None, None)
        targets, arrays, _ = rule.apply((), state, logits_fn, Streams(batch), reduce=reduce)
        assert arrays == ()
        return targets

    return targets_of


# --- label smoothing -------------------------------------------------------------------------


def test_a_smooth_label_has_its_share_of_the_uniform_one():
    batch = candidates()
    for epsilon in (0.0, 0.1, 1.0):
        targets = refined(LabelSmoothing(epsilon), batch)
        expected = [[(1 - epsilon) * q + epsilon / CLASSES for q in row] for row in batch.labels]
        np.testing.assert_allclose(targets.labels, expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(targets.weights, batch.mask)
    one_hot = batch._replace(labels=np.eye(CLASSES, dtype=np.float32)[[1] * ROWS])
    found = refined(LabelSmoothing(), one_hot).labels[0]
    np.testing.assert_allclose(found, [0.025, 0.925, 0.025, 0.025], atol=1e-7)


# --- bootstrapping ---------------------------------------------------------------------------


def logits_as_inputs(batch, seed=3):
    """Padding has no logits that are numbers."""
    logits = 2 * np.random.default_rng(seed).normal(size=batch.labels.shape).astype(np.float32)
    logits[~batch.mask] = np.nan
    return batch._replace(inputs=logits)


@pytest.mark.parametrize("hard", [False, True])
def test_labels_move_to_what_the_network_says_from_start_on(hard):
    batch = logits_as_inputs(candidates())
    said, mask = softmax(batch.inputs[batch.mask]), batch.mask
    if hard:
        said = np.eye(CLASSES)[said.argmax(1)]
    rule = Bootstrap(BETA, hard, START)
    for step in (0, START - 1):
        np.testing.assert_array_equal(refined(rule, batch, step).labels, batch.labels)
    for step in (START, START + 9):
        targets = refined(rule, batch, step)
        expected = BETA * batch.labels[mask] + (1 - BETA) * said
        np.testing.assert_allclose(targets.labels[mask], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(targets.labels[~mask], batch.labels[~mask])
        np.testing.assert_array_equal(targets.weights, mask)
    alone = refined(Bootstrap(1.0, hard), batch)
    np.testing.assert_array_equal(alone.labels, batch.labels)


# --- small-loss selection --------------------------------------------------------------------


def picks(losses, mask, rate):
    """Rows of the smallest losses, the earlier of equal ones, by an exact rate."""
    rows = sorted(np.flatnonzero(mask), key=lambda i: (losses[i], i))
    return rows[: len(rows) - math.floor(rate * len(rows))]


def weights_of(logits, batch, rate, shares=1):
    """f64[B], where every share of the rows is ranked by itself."""
    losses = -np.sum(batch.labels * log_softmax(logits), 1)
    kept, size = np.zeros(len(losses)), len(losses) // shares
    for begin in range(0, len(losses), size):
        rows = slice(begin, begin + size)
        kept[begin + np.array(picks(losses[rows], batch.mask[rows], rate), int)] = 1
    return kept / kept[batch.mask].mean()


def test_the_share_left_out_grows_to_forget():
    def rate(t):
        return float(SmallLoss(forget=0.4, ramp=10).rate_at(np.int32(t)))

    assert rate(0) == 0
    assert rate(1) == pytest.approx(0.04) and rate(9) == pytest.approx(0.36)
    assert rate(10) == rate(11) == rate(10**6) == np.float32(0.4)
    assert SmallLoss(forget=0.4, ramp=1).rate_at(np.int32(1)) == np.float32(0.4)


def test_how_many_are_kept_is_exact():
    # At every number of rows, step of the ramp and share; by the number of them alone, tied or not.
    size, ramp, forgets = 40, 12, ("0.1", "0.2", "0.3", "0.45", "0.7", "0.9")
    batch = candidates(size, 0, labels=hard_labels)
    drawn = 3 * np.random.default_rng(0).normal(size=(size, CLASSES)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, None, None))
    @functools.partial(jax.vmap, in_axes=(None, None, 0, None))
    @functools.partial(jax.vmap, in_axes=(None, None, None, 0))
    def kept(logits, mask, step, forget):
        rate = forget * SmallLoss(0.5, ramp).rate_at(step) / 0.5  # the share is traced here
        return small_loss.select(logits, batch._replace(mask=mask), rate).weights > 0

    counts, steps = np.arange(1, size + 1), np.arange(ramp + 2)
    masks = np.arange(size)[None] < counts[:, None]
    rates = [[Fraction(f) * min(t, ramp) / ramp for f in forgets] for t in steps]
    expected = [[[n - math.floor(r * n) for r in row] for row in rates] for n in counts.tolist()]
    forget = np.array(forgets, np.float32)
    found = kept(drawn, masks[:, ::-1], steps, forget)  # padding first
    np.testing.assert_array_equal(found.sum(-1), expected)
    assert not (found & ~masks[:, None, None, ::-1]).any()

    tied = kept(np.zeros_like(drawn), masks, steps, forget)
    np.testing.assert_array_equal(tied.sum(-1), expected)


def test_of_equal_losses_the_earlier_rows_are_kept():
    labels = np.eye(2, dtype=np.float32)[[0, 0, 1, 0, 0, 0]]
    batch = Batch(None, labels, np.array([False, True, True, True, True, False]), None)
    logits = np.tile(np.float32([1, 0]), (6, 1))  # of class 1 the loss is larger
    select = jax.jit(small_loss.select)
    batch = batch._replace(inputs=logits, index=np.arange(6))
    for rate, kept in ((0.25, [1, 3, 4]), (0.5, [1, 3]), (0.75, [1]), (0.0, [1, 2, 3, 4])):
        weights = select(logits, batch, rate).weights
        assert np.flatnonzero(weights).tolist() == kept
        np.testing.assert_allclose(weights[np.array(kept)], 4 / len(kept), rtol=1e-6)


def test_the_smallest_losses_are_kept_whatever_the_padding():
    batch = logits_as_inputs(candidates())
    rule = SmallLoss(FORGET, RAMP)
    for step, rate in ((0, 0), (3, Fraction("0.55") * 3 / 8), (RAMP, Fraction("0.55"))):
        targets = refined(rule, batch, step)
        expected = weights_of(batch.inputs, batch, rate)
        np.testing.assert_allclose(targets.weights, expected, rtol=1e-6)
        np.testing.assert_array_equal(targets.labels, batch.labels)
    nothing = refined(rule, batch._replace(mask=np.zeros(ROWS, bool)))
    np.testing.assert_array_equal(nothing.weights, 0)


def test_every_device_ranks_its_own_rows():
    batch = logits_as_inputs(candidates())
    rule = SmallLoss(FORGET, RAMP)
    weights = jax.vmap(
        lambda batch: refined(rule, batch, RAMP, Mean("data")).weights, axis_name="data"
    )(jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch))
    expected = weights_of(batch.inputs, batch, Fraction("0.55"), shares=4)
    np.testing.assert_allclose(weights.ravel(), expected, rtol=1e-6)
    assert (expected != weights_of(batch.inputs, batch, Fraction("0.55"))).any()


@pytest.mark.parametrize("rule", ["bootstrap", "bootstrap_hard", "small_loss"])
def test_what_is_not_finite_reaches_the_loss(rule):
    batch = logits_as_inputs(candidates())
    row = np.flatnonzero(batch.mask)[2]
    for value in (np.nan, np.inf):
        batch.inputs[row, 1] = value
        targets = refined(RULES[rule](**OPTIONS[rule]), batch)
        found = np.isfinite(targets.labels).all(1) & np.isfinite(targets.weights)
        assert np.flatnonzero(~found).tolist() == [row]


# --- steps, by any runner --------------------------------------------------------------------


def linear_init(key, inputs):
    kernel = jax.random.normal(key, (inputs.shape[1], CLASSES))
    return {"kernel": kernel}, {"drawn": jnp.zeros(())}


def linear_train(params, model_state, inputs, key):
    return inputs @ params["kernel"], {"drawn": model_state["drawn"] + jax.random.uniform(key)}


# Training and evaluation mode differ, so that it shows which one a rule reads.
LINEAR = Model(linear_init, linear_train, lambda p, s, x: GAIN * (x @ p["kernel"]))


def make(name, **changes):
    return method_of(name, LINEAR, optax.sgd(LR), **{**OPTIONS[name], **changes})


def jitted(method):
    return jax.jit(functools.partial(method.step, reduce=identity))


def start_state(method, step=NOW):
    state = method.init(jax.random.key(0), candidates().inputs)
    if "b" in state.params:
        state.model_state["b"]["drawn"] += 10
    return state._replace(step=jnp.int32(step))


def stepped(kernel, batch, labels, weights):
    """The kernel after gradient descent on targets that are constants, and the loss, f64."""
    x, labels, weights = (a[batch.mask] for a in (batch.inputs, labels, weights))
    logits = x.astype(np.float64) @ kernel
    pull = weights[:, None] * (softmax(logits) - labels)
    loss = -np.mean(weights * np.sum(labels * log_softmax(logits), 1))
    return {"kernel": kernel - LR * x.T @ pull / len(x)}, loss


def expected_step(name, params, batch, shares):
    """The parameters after one step, and its loss."""

    def logits(kernel):
        return np.asarray(batch.inputs, np.float64) @ kernel

    def kernel(params):
        return np.asarray(params["kernel"], np.float64)

    rate = Fraction("0.55") * NOW / RAMP
    q, ones = np.asarray(batch.labels, np.float64), np.ones(ROWS)
    if name == "co_teaching":
        a, b = kernel(params["a"]), kernel(params["b"])
        by_a, by_b = (weights_of(logits(k), batch, rate, shares) for k in (a, b))
        assert (by_a != by_b).any()
        (a, of_a), (b, of_b) = stepped(a, batch, q, by_b), stepped(b, batch, q, by_a)
        return {"a": a, "b": b}, of_a + of_b
    own = kernel(params)
    seen = GAIN * logits(own)
    said = np.eye(CLASSES)[seen.argmax(1)] if name == "bootstrap_hard" else softmax(seen)
    labels, weights = {
        "label_smoothing": ((1 - EPSILON) * q + EPSILON / CLASSES, ones),
        "bootstrap": (BETA * q + (1 - BETA) * said, ones),
        "bootstrap_hard": (BETA * q + (1 - BETA) * said, ones),
        "small_loss": (q, weights_of(seen, batch, rate, shares)),
    }[name]
    return stepped(own, batch, labels, weights)


# Runner, devices, shares of the rows that are ranked by themselves.
RUNNERS = {"jit 1": (jit_runner, 1, 1), "jit 8": (jit_runner, 8, 1), "pmap 4": (pmap_runner, 4, 4)}
QUICK = [("jit 8", name) for name in OPTIONS] + [
    ("pmap 4", name) for name in ("bootstrap_hard", "small_loss", "co_teaching")
]


@pytest.mark.parametrize(
    "runner, name",
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(RUNNERS, OPTIONS)
    ],
)
def test_a_step_is_one_on_constant_targets_of_unmasked_rows(runner, name):
    make_runner, devices, shares = RUNNERS[runner]
    method, batch = make(name), candidates()
    run = make_runner(method.step, devices=jax.devices()[:devices])
    state = start_state(method)
    expected, loss = expected_step(name, state.params, batch, shares)
    state, metrics = run.step(run.put_state(state), run.put_batch(Streams(batch)))
    assert_close(state.params, expected, 2e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    networks = 1
    if name == "co_teaching":  # each has its own noise and its own running statistics
        networks, (a, b) = 2, (float(state.model_state[name]["drawn"]) for name in "ab")
        assert 0 < a < 1 and 10 < b < 11 and abs(b - 10 - a) > 1e-3
    np.testing.assert_allclose(np.divide(*metrics["candidate_loss"]), loss / networks, rtol=1e-5)
    if "kept" in metrics:
        counts = batch.mask.reshape(shares, -1).sum(1).tolist()
        kept = sum(n - math.floor(Fraction("0.55") * NOW / RAMP * n) for n in counts)
        assert np.divide(*metrics["kept"]) == pytest.approx(kept / (ROWS - MASKED))


def test_soft_bootstrapping_is_a_shorter_plain_step_where_the_modes_agree():
    model = LINEAR._replace(logits=lambda p, s, x: x @ p["kernel"])
    method, batch = method_of("bootstrap", model, optax.sgd(LR), beta=BETA), candidates()
    before = start_state(method)
    after, _ = jitted(method)(before, Streams(batch))
    own = np.asarray(before.params["kernel"])
    plain, _ = stepped(own, batch, batch.labels, np.ones(ROWS))
    assert_close(after.params["kernel"] - own, BETA * (plain["kernel"] - own), 1e-5)


# --- two networks ----------------------------------------------------------------------------


def test_the_networks_differ_and_the_first_is_the_one_of_this_key():
    method, inputs = make("co_teaching"), candidates().inputs
    state = method.init(jax.random.key(0), inputs)
    assert_close(state.params["a"], linear_init(jax.random.key(0), inputs)[0], 0)
    assert np.abs(state.params["a"]["kernel"] - state.params["b"]["kernel"]).min() > 0


def test_without_forgetting_each_network_is_trained_alone():
    alone = supervised.make(LINEAR, optax.adam(0.1))
    method = method_of("co_teaching", LINEAR, optax.adam(0.1), forget=0.0)
    state, streams = start_state(method), Streams(candidates())
    step, step_alone = jitted(method), jitted(alone)
    for name in "ab":
        one = alone.init(jax.random.key(0), streams.candidates.inputs)
        one, two = one._replace(params=state.params[name]), state
        for _ in range(3):
            one, _ = step_alone(one, streams)
            two, _ = step(two, streams)
        assert_close(two.params[name], one.params, 1e-5)


def test_what_is_predicted():
    batch = candidates(masked=0)
    state = start_state(make("co_teaching"))
    a, b = (GAIN * batch.inputs @ np.asarray(state.params[name]["kernel"]) for name in "ab")
    single = make("co_teaching").predict(state, batch.inputs)
    np.testing.assert_allclose(single, a, rtol=1e-5, atol=1e-5)
    mean = make("co_teaching", predict="mean").predict(state, batch.inputs)
    expected = np.log((softmax(a) + softmax(b)) / 2)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    far = make("co_teaching", predict="mean").predict(state, 100 * batch.inputs)
    assert np.isfinite(far).all()


def test_targets_to_look_at_are_those_of_the_step():
    batch, method = candidates(), make("co_teaching")
    state = start_state(method)
    targets = jax.jit(method.targets)(state, Streams(batch))
    logits = batch.inputs @ np.asarray(state.params["b"]["kernel"])
    expected = weights_of(logits, batch, Fraction("0.55") * NOW / RAMP)
    np.testing.assert_allclose(targets.weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(targets.labels, batch.labels)


# --- what it costs, what is refused, what it is for ------------------------------------------


def two_layers(hidden, classes):
    @jax.jit
    def init(key, inputs):
        first, second = jax.random.split(key)
        size = math.prod(inputs.shape[1:])
        drawn = jax.random.normal(first, (size, hidden)) / math.sqrt(size)
        return {"in": drawn, "out": jax.random.normal(second, (hidden, classes)) / hidden}

    def apply(params, inputs):
        return jax.nn.relu(inputs.reshape(len(inputs), -1) @ params["in"]) @ params["out"]

    return from_function(init, apply)


def test_what_a_step_costs():
    model, tx = two_layers(256, cost_test.CLASSES), cost_test.TX
    plain = cost_test.step_flops(supervised.make(model, tx))
    # A rule shares the training step's forward pass; two networks pick by their own.
    for name, steps in (("small_loss", 1), ("co_teaching", 2)):
        found = cost_test.step_flops(method_of(name, model, tx))
        assert (steps - 0.02) * plain < found < (steps + 0.02) * plain


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("label_smoothing", {"epsilon": -0.1}, r"epsilon must lie in \[0, 1\]; given -0.1"),
        ("label_smoothing", {"epsilon": 1.1}, r"epsilon must lie in \[0, 1\]; given 1.1"),
        ("bootstrap", {"beta": 1.5}, r"beta must lie in \[0, 1\]; given 1.5"),
        ("bootstrap", {"start": -1}, "start must be a whole number >= 0; given -1"),
        ("small_loss", {"forget": 1.0}, r"forget must lie in \[0, 1\); given 1.0"),
        ("small_loss", {"ramp": 0}, "ramp must be a whole number >= 1; given 0"),
        ("co_teaching", {"forget": -0.1}, r"forget must lie in \[0, 1\); given -0.1"),
        ("co_teaching", {"ramp": 2.5}, "ramp must be a whole number >= 1; given 2.5"),
        ("co_teaching", {"predict": "men"}, r"predict must be one of .*did you mean 'mean'\?"),
    ],
)
def test_an_option_out_of_range_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        method_of(name, LINEAR, optax.sgd(LR), **options)


def test_clean_samples_and_other_logits_are_refused():
    batch, method = candidates(), make("co_teaching")
    with pytest.raises(ValueError, match="co_teaching trains on candidates alone"):
        method.step(start_state(method), Streams(batch, clean=batch), reduce=identity)
    for name in ("bootstrap", "small_loss"):
        with pytest.raises(ValueError, match=r"must share one shape \[B, K\]; given .*\(24, 3\)"):
            refined(RULES[name](), batch)  # its inputs are no logits of four classes


@pytest.mark.parametrize(
    "name", [pytest.param("small_loss", marks=pytest.mark.slow), "co_teaching"]
)
def test_wrong_labels_are_left_out(name):
    # Blobs, 40 % of whose labels are wrong.
    rng = np.random.default_rng(0)
    centres, truth = 2 * rng.normal(size=(4, 6)), rng.integers(4, size=160)
    given = np.where(np.arange(160) < 64, (truth + rng.integers(1, 4, 160)) % 4, truth)
    inputs = (centres[truth] + rng.normal(size=(160, 6))).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[given]
    streams = Streams(Batch(inputs, labels, np.ones(160, bool), np.arange(160, dtype=np.int32)))
    method = method_of(name, two_layers(16, 4), optax.sgd(0.1), forget=0.4, ramp=50)
    state = method.init(jax.random.key(0), inputs)
    step = jitted(method)
    for _ in range(100):
        state, _ = step(state, streams)
    kept = jax.jit(method.targets)(state, streams).weights > 0
    assert kept.sum() == 96
    assert np.mean(np.arange(160)[kept] >= 64) > 0.9
