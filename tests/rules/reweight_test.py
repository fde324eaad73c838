"""Learning to reweight and Meta-Weight-Net against their definitions: gradients through a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Streams
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.parallel import pmap_runner
from saflex_jax.rules import Refinement, Schedule, Scoring, l2rw, meta_weight_net
from saflex_jax.rules.base import predicate_of
from saflex_jax.rules.meta_weight_net import MetaWeightNet
from tests import cost_test, problems
from tests.parallel import setup_
from tests.problems import assert_close

NAMES = ("l2rw", "meta_weight_net")
TX = optax.sgd(0.1)
SIZE, VAL_SIZE, MASKED, LR = 12, 8, 2, 0.5


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def rule_of(name, *, moved="", start=0, **options):
    """The rule, its look-ahead moving the parameters below `moved`."""
    if name == "meta_weight_net":
        return MetaWeightNet(predicate=moved, start=start, **options)
    return Refinement(Scoring("identity", predicate=moved), l2rw.Reweight(), Schedule(start))


@functools.cache
def problem(model="mlp"):
    p = problems.problem(model, size=SIZE, val_size=VAL_SIZE, masked=MASKED)
    labels = problems.hard_labels(np.random.default_rng(0), SIZE)  # some helpful, some harmful
    candidates = p.streams.candidates._replace(labels=labels)
    return p._replace(streams=p.streams._replace(candidates=candidates))


@functools.cache
def make(name, model="mlp", moved="", start=0):
    options = {"l2rw": {}, "meta_weight_net": {"inner_learning_rate": LR}}[name]
    rule = rule_of(name, moved=moved, start=start, **options)
    return supervised.make(problem(model).model, TX, rule)


def start_state(method, step=0, model="mlp"):
    state = method.init(jax.random.key(0), problem(model).streams.candidates.inputs)
    return state._replace(step=np.int32(step))


@functools.cache
def learn(method):
    """(state, streams) -> (targets, new state, metrics), in one compilation."""
    step = functools.partial(method.step, reduce=identity)
    return jax.jit(lambda state, streams: (method.targets(state, streams), *step(state, streams)))


# --- the definitions, by differentiating through the look-ahead ------------------------------


def real(batch):
    """Inputs and labels of the rows that are no padding."""
    return batch.inputs[batch.mask], batch.labels[batch.mask]


def cross_entropy(logits, labels):
    return -jnp.sum(labels * (logits - jax.nn.logsumexp(logits, 1, keepdims=True)), 1)


def loss_ahead(p, mean_loss, moved):
    """Validation loss after a step of gradient descent on the parameters below `moved`."""

    def step(path, param, grad):
        return param - LR * grad if jax.tree_util.keystr(path).find(moved) >= 0 else param

    ahead = jax.tree_util.tree_map_with_path(step, p.params, jax.grad(mean_loss)(p.params))
    inputs, labels = real(p.streams.val)
    return jnp.mean(cross_entropy(p.logits_fn(ahead, inputs), labels))


def utilities(p, moved):
    """By how much the validation loss falls per unit of a sample's eps, at eps = 0."""
    inputs, labels = real(p.streams.candidates)

    def val_loss(eps):
        def weighted_loss(params):
            return jnp.sum(eps * cross_entropy(p.logits_fn(params, inputs), labels))

        return loss_ahead(p, weighted_loss, moved)

    return -jax.jit(jax.grad(val_loss))(jnp.zeros(len(labels)))


def weigh(net, losses):
    hidden = jnp.maximum(
        jnp.outer(losses, net["hidden"]["kernel"][0]) + net["hidden"]["bias"][None], 0
    )
    return 1 / (1 + jnp.exp(-(hidden @ net["out"]["kernel"][:, 0] + net["out"]["bias"][0])))


def net_gradient(p, net, moved):
    """The validation loss, its gradient for the weight net, and for the weights themselves."""
    inputs, labels = real(p.streams.candidates)

    def val_loss(net, more):
        def mean_loss(params):
            losses = cross_entropy(p.logits_fn(params, inputs), labels)
            weights = weigh(net, jax.lax.stop_gradient(losses)) + more
            return jnp.mean(weights * losses)

        return loss_ahead(p, mean_loss, moved)

    return jax.jit(jax.value_and_grad(val_loss, (0, 1)))(net, jnp.zeros(len(labels)))


# a model, and the part of it that looks ahead
CASES = [("mlp", ""), ("mlp", "head")]
CNN = ("cnn", "")


@pytest.mark.parametrize("model, moved", [*CASES, CNN])
def test_l2rw_is_the_gradient_through_a_step(model, moved):
    p = problem(model)
    method = make("l2rw", model, moved)
    targets = jax.jit(method.targets)(start_state(method, model=model), p.streams)
    expected = utilities(p, moved)
    assert_close(LR * targets.utility[:-MASKED], expected)
    positive = np.maximum(expected, 0)
    assert 0 < (positive > 0).mean() < 1
    assert_close(targets.weights[:-MASKED], len(positive) * positive / positive.sum())
    np.testing.assert_array_equal(targets.weights[-MASKED:], 0)
    np.testing.assert_array_equal(targets.labels, p.streams.candidates.labels)


@pytest.mark.parametrize("model, moved", [*CASES, pytest.param(*CNN, marks=pytest.mark.slow)])
def test_the_weight_nets_gradient_is_the_one_through_a_step(model, moved):
    p = problem(model)
    predicate = predicate_of(moved)

    @jax.jit
    def found(net):
        losses, push = meta_weight_net.linear_losses(
            p.logits_fn, p.params, p.streams.candidates, predicate=predicate
        )
        options = dict(inner_learning_rate=LR, predicate=predicate)
        return meta_weight_net.meta_gradient(
            net, losses, push, p.logits_fn, p.params, p.streams, **options
        )

    net = meta_weight_net.init_net(jax.random.key(1), 16)
    grads, utility, found_loss = found(net)
    val_loss, (expected, of_weights) = net_gradient(p, net, moved)
    assert_close(grads, expected)
    assert_close(found_loss, val_loss)
    assert_close(-LR / len(of_weights) * utility[:-MASKED], of_weights)


def test_meta_weight_net_moves_the_net_by_the_papers_adam_and_then_weighs():
    p = problem()
    method = make("meta_weight_net")
    state = start_state(method)
    net, _ = state.extra
    assert net["hidden"]["kernel"].shape == (1, 100)
    targets, new, metrics = learn(method)(state, p.streams)
    _, (grads, _) = net_gradient(p, net, "")
    # Adam's first step is the sign of gradient plus L2: without L2 a dead unit would stay.
    total = jax.tree.map(lambda g, x: g + 1e-4 * x, grads, net)
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g / (np.abs(g) + 1e-8), net, total)
    for found, expected in zip(jax.tree.leaves(new.extra[0]), jax.tree.leaves(moved)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)

    inputs, labels = real(p.streams.candidates)
    weights = weigh(new.extra[0], cross_entropy(p.logits_fn(p.params, inputs), labels))
    np.testing.assert_allclose(targets.weights[:-MASKED], weights, atol=1e-6)
    np.testing.assert_array_equal(targets.weights[-MASKED:], 0)
    np.testing.assert_array_equal(targets.labels, p.streams.candidates.labels)
    np.testing.assert_allclose(np.divide(*metrics["weight"]), weights.mean(), rtol=1e-6)


# --- what it costs ---------------------------------------------------------------------------


WIDE = from_linen(Classifier(MLP((128, 128)), cost_test.CLASSES))  # products outweigh the rest


@functools.cache
def plain_flops():
    """Of a plain step, and of a forward pass on its batch."""
    method = supervised.make(WIDE, cost_test.TX)
    inputs = cost_test.STREAMS.candidates.inputs
    state = method.init(jax.random.key(0), inputs)
    return cost_test.step_flops(method), cost_test.flops(method.predict, state, inputs)


def test_no_forward_pass_is_repeated(name):
    step, forward = plain_flops()
    # Beside the validation gradient: l2rw takes a product, and Meta-Weight-Net a backward pass too.
    # Either counts as two forward passes. A branch must not bring in one of its own, hence `start`.
    passes = {"l2rw": 2, "meta_weight_net": 4}[name]
    found = cost_test.step_flops(supervised.make(WIDE, cost_test.TX, rule_of(name, start=3)))
    assert found <= step + step * cost_test.VAL / cost_test.BATCH + (passes + 0.1) * forward


# --- runners ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("l2rw", marks=pytest.mark.slow), "meta_weight_net"])
def test_eight_devices_agree_with_one(name, monkeypatch):
    options = {"l2rw": {}, "meta_weight_net": {"meta_tx": optax.sgd(10.0)}}[name]
    monkeypatch.setitem(setup_.VARIANTS, name, (rule_of(name, **options), setup_.PADDING, False))
    found = setup_.run(pmap_runner, name, axis_name="data")
    setup_.assert_agrees(found, name)
    weights = found["extra/targets"][..., 0]
    assert (weights > 0).any() and np.ptp(weights[weights > 0]) > 1e-3


# --- when there is nothing to learn from, or nothing yet -------------------------------------


def test_start_leaves_the_prior_and_the_arrays_alone_until_then(name):
    p = problem()
    late, now = make(name, start=2), make(name)
    state = start_state(late, 1)
    targets, new, metrics = learn(late)(state, p.streams)
    assert_close(new.extra, state.extra, 0)
    assert metrics["val_loss"] == (0, 0) and metrics["kept"][0] == metrics["kept"][1]
    np.testing.assert_array_equal(targets.weights, p.streams.candidates.mask)
    np.testing.assert_array_equal(targets.labels, p.streams.candidates.labels)

    state = start_state(late, 2)
    found, expected = (learn(method)(state, p.streams) for method in (late, now))
    assert metrics.keys() == found[2].keys() == expected[2].keys()
    for part in (lambda x: x[0], lambda x: x[1].params, lambda x: x[1].extra, lambda x: x[2]):
        assert_close(part(found), part(expected), 1e-6)


def test_harmful_samples_alone_take_no_step():
    # The same input with another label: each pulls where the validation loss does not want it.
    def rows(size, label):
        inputs = np.repeat(problem().streams.val.inputs[:1], size, axis=0)
        labels = np.eye(problems.CLASSES, dtype=np.float32)[[label] * size]
        return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))

    method = make("l2rw")
    state = start_state(method)
    targets, new, metrics = learn(method)(state, Streams(rows(SIZE, 0), rows(VAL_SIZE, 1)))
    assert (targets.utility < 0).all()
    np.testing.assert_array_equal(targets.weights, 0)
    assert_close(new.params, state.params, 0)
    assert metrics["loss"][0] == 0 and metrics["kept"][0] == 0


@pytest.mark.parametrize("where", ["val", "candidates"])
def test_what_is_not_finite_reaches_the_loss(name, where):
    p = problem()
    batch = getattr(p.streams, where)
    inputs = batch.inputs.copy()
    inputs[0] = np.nan
    method = make(name)
    streams = p.streams._replace(**{where: batch._replace(inputs=inputs)})
    targets, _, metrics = learn(method)(start_state(method), streams)
    assert not np.isfinite(targets.weights).all()
    assert not np.isfinite(metrics["loss"][0])


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_l2rw_drops_no_score_that_is_not_finite(value):
    scores = np.ones((3, 2), np.float32)
    scores[1, 0], scores[2] = value, np.nan  # the last row is padding
    prior, mask = np.eye(2, dtype=np.float32)[[0, 0, 1]], np.array([True, True, False])
    targets = l2rw.reweight(scores, prior, mask=mask)
    assert not np.isfinite(targets.weights[1]) and targets.weights[2] == 0


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("meta_weight_net", {"start": -1}, "start must be a whole number >= 0; given -1"),
        ("meta_weight_net", {"hidden": 0}, "hidden must be a whole number >= 1; given 0"),
        ("meta_weight_net", {"inner_learning_rate": 0.0}, "inner_learning_rate must be positive"),
        ("meta_weight_net", {"meta_tx": -1.0}, "meta_tx must be positive and finite; given -1.0"),
    ],
)
def test_an_option_out_of_range_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        rule_of(method, **options)


def test_validation_samples_are_needed_and_the_predicate_must_select(name):
    streams, method = problem().streams, make(name)
    with pytest.raises(ValueError, match=r"needs validation samples; given streams\.val = None"):
        method.targets(start_state(method), streams._replace(val=None))
    method = make(name, moved="hed")
    with pytest.raises(ValueError, match="predicate selects no parameter; the paths are"):
        method.targets(start_state(method), streams)


# --- what it is for --------------------------------------------------------------------------


def test_wrong_labels_weigh_less(name):
    # Blobs, half of whose labels are wrong, and a few trusted samples.
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(4, 6))

    def draw(size, wrong):
        truth = rng.integers(4, size=size)
        given = np.where(np.arange(size) < wrong, (truth + rng.integers(1, 4, size)) % 4, truth)
        inputs = (centres[truth] + rng.normal(size=(size, 6))).astype(np.float32)
        labels = np.eye(4, dtype=np.float32)[given]
        return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))

    streams = Streams(draw(128, wrong=64), draw(32, wrong=0))
    right = np.arange(128) >= 64
    options = {"l2rw": {}, "meta_weight_net": {"seed": 1}}[name]
    rule = rule_of(name, **options)
    method = supervised.make(from_linen(Classifier(MLP((16,)), 4)), TX, rule)
    state = method.init(jax.random.key(0), streams.candidates.inputs)
    if name == "meta_weight_net":  # it starts with more weight where the loss is larger
        low, high = meta_weight_net.apply_net(state.extra[0], np.array([0.0, 4.0]))
        assert low < high
    step = jax.jit(functools.partial(method.step, reduce=identity))
    for _ in range(200):
        state, _ = step(state, streams)
    weights = np.asarray(jax.jit(method.targets)(state, streams).weights)
    # By rank: a correlation hangs on the few largest weights, which change with JAX's version.
    assert np.mean(weights[right, None] > weights[~right]) > 0.85
