"""SLA, its baselines and self-distillation against the paper's equations in NumPy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, Refiner, Streams, Targets
from saflex_jax.core.losses import weighted_soft_cross_entropy
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.methods import erm, saflex, sla
from saflex_jax.models import MLP, Classifier, SmallCNN, from_linen
from saflex_jax.parallel import jit_runner, pmap_runner
from saflex_jax.types import Trace
from tests import cost_test
from tests.augment.transformations_test import views
from tests.parallel import setup_
from tests.problems import assert_close, log_softmax, soft_labels, softmax

CLASSES, SIZE, VAL_SIZE, FEATURES, SIDE = 3, 5, 2, 4, 2
GAIN = 0.5  # of the network's logits in evaluation mode
M = {"none": 1, "rotation": 4, "rotation2": 2, "color_perm3": 3}
HEADS = {
    "da": ["class"],
    "mt": ["class", "transformation"],
    "sla": ["joint"],
    "sd": ["joint", "class"],
}


def doubled(logits, targets, candidates):
    return 2 * weighted_soft_cross_entropy(logits, targets, candidates)


class Case(NamedTuple):
    mode: str
    transformations: str = "rotation"
    options: dict = {}  # noqa: RUF012
    given: bool = True  # whether a refiner sets the targets

    @property
    def views(self):
        return M[self.transformations]

    @property
    def refined(self):
        return "joint" if self.mode in ("sla", "sd") else "class"

    @property
    def width(self):
        """Of the refined head."""
        return CLASSES * (self.views if self.refined == "joint" else 1)


CASES = {
    "da": Case("da"),
    "da_prior": Case("da", given=False),
    "da_options": Case("da", "color_perm3", {"loss": doubled, "sum_views": True}),
    "mt": Case("mt"),
    "mt_options": Case("mt", "rotation2", {"loss": doubled, "sum_views": True}),
    "sla": Case("sla"),
    "sla_options": Case("sla", "rotation2", {"loss": doubled, "sum_views": True}),
    "sd": Case("sd"),
    "sd_prior": Case("sd", "rotation2", {"beta": 0.0}, given=False),
    "sd_options": Case(
        "sd",
        "color_perm3",
        {"loss": doubled, "sum_views": True, "temperature": 2.5, "beta": 0.3},
    ),
}
EVERY_MODE = pytest.mark.parametrize("mode", sla.MODES)


def batch(seed, size, masked=0):
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32),
        soft_labels(rng, size, CLASSES),
        np.arange(size) < size - masked,
        rng.permutation(20)[:size].astype(np.int32),
        Trace(
            rng.integers(9, size=(size, 2)).astype(np.int32),
            rng.normal(size=(size, 2)).astype(np.float32),
            rng.integers(20, size=(size, 2)).astype(np.int32),
        ),
    )


STREAMS = Streams(batch(0, SIZE, masked=1), batch(1, VAL_SIZE)._replace(trace=None))


# --- a network of linear maps, and all that SLA says about it --------------------------------


def linear_params(case):
    rng = np.random.default_rng(2)
    widths = {"class": CLASSES, "transformation": case.views, "joint": CLASSES * case.views}
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "backbone": draw(SIDE * SIDE * 3, FEATURES) / 2,
        "head": {name: draw(FEATURES, widths[name]) for name in HEADS[case.mode]},
    }


def linear_model(case) -> Model:
    def outputs(params, inputs):
        features = inputs.reshape(len(inputs), -1) @ params["backbone"]
        return {name: features @ kernel for name, kernel in params["head"].items()}

    def logits(params, model_state, inputs):
        return jax.tree.map(lambda x: model_state["gain"] * x, outputs(params, inputs))

    def train(params, model_state, inputs, key):
        return outputs(params, inputs), {"gain": model_state["gain"] + 1}

    return Model(lambda key, x: (linear_params(case), {"gain": np.float32(GAIN)}), train, logits)


def flat_views(case, inputs):
    """f64[B M, pixels]."""
    seen = [view for image in inputs for view in views(image, case.transformations)]
    return np.float64(seen).reshape(len(seen), -1)


def outputs_by_hand(params, flat):
    features = flat @ np.float64(params["backbone"])
    return {name: features @ np.float64(kernel) for name, kernel in params["head"].items()}


def given_targets(case) -> Targets:
    """Of a refiner that has its own mind, also about padding."""
    rng = np.random.default_rng(3)
    size = SIZE * case.views
    weights = rng.uniform(0.5, 2.0, size).astype(np.float32) * (rng.uniform(size=size) > 0.2)
    utility = rng.normal(size=size).astype(np.float32)
    return Targets(weights, soft_labels(rng, size, case.width), utility)


def stub_refiner(case) -> Refiner:
    """The given targets; its arrays are what it was shown."""

    def apply(arrays, state, logits_fn, streams, *, reduce):
        shown = {"streams": streams, "logits": logits_fn(state.params, streams.candidates.inputs)}
        return given_targets(case), {**shown, "number": arrays + 1}, {"stub": (2.0, 1.0)}

    return Refiner(lambda params: np.float32(len(params["head"])), apply)


def make(case, model=None, **options):
    refiner = stub_refiner(case) if case.given else None
    return sla.make(
        linear_model(case) if model is None else model,
        optax.sgd(1.0),
        refiner=refiner,
        mode=case.mode,
        transformations=case.transformations,
        **case.options | options,
    )


@functools.cache
def outcome(name):
    """A step and the targets, in one compilation: (state, new state, metrics, targets)."""
    method = make(CASES[name])
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)

    @jax.jit
    def run(state, streams):
        return *method.step(state, streams, reduce=identity), method.targets(state, streams)

    return state, *run(state, STREAMS)


def joint_by_hand(labels, size):
    """Class y of view j is label y M + j: the product of the label and a one-hot."""
    return np.stack([np.kron(y, np.eye(size)[j]) for y in labels for j in range(size)])


def targets_by_hand(case):
    """Weights and labels of every view."""
    if case.given:
        return given_targets(case)[:2]
    labels = STREAMS.candidates.labels
    seen = joint_by_hand if case.refined == "joint" else functools.partial(np.repeat, axis=0)
    return np.ones(SIZE * case.views), seen(labels, case.views)


def loss_by_hand(case, out):
    """The loss, its gradient for all outputs, and the divergences; rows [j::M] are view j."""
    size, real = case.views, STREAMS.candidates.mask
    temperature, beta = (case.options.get(name, 1.0) for name in ("temperature", "beta"))
    weights, labels = targets_by_hand(case)
    loss, grads = [], {name: np.zeros_like(x) for name, x in out.items()}

    def add(scale, head, view, values, slopes):
        """scale times the weighted mean over samples of a term in one view."""
        share = scale * weights[view::size] * real / real.sum()
        loss.append(share @ values)
        grads[head][view::size] += share[:, None] * slopes

    def cross_entropy(scale, head, view, labels):
        z = out[head][view::size]
        add(scale, head, view, -(labels * log_softmax(z)).sum(1), softmax(z) - labels)

    scale = 2 if "loss" in case.options else 1
    if case.refined == "joint" and case.options.get("sum_views"):
        scale *= size
    for j in range(size):
        cross_entropy(scale / size, case.refined, j, labels[j::size])
        if case.mode == "mt":
            cross_entropy(1 / size, "transformation", j, np.eye(size)[[j] * SIZE])
    apart = None
    if case.mode == "sd":
        of_classes = labels[::size].reshape(SIZE, CLASSES, size).sum(2)
        cross_entropy(beta, "class", 0, of_classes)
        teacher = sum(out["joint"][j::size, j::size] for j in range(size)) / size
        p, q = (softmax(z / temperature) for z in (teacher, out["class"][::size]))
        apart = temperature**2 * (p * np.log(p / q)).sum(1)
        add(1.0, "class", 0, apart, temperature * (q - p))  # for the student alone
    return sum(loss), grads, apart


# --- one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_step_descends_the_papers_loss(name):
    # Of the backbone, too: each head's gradient flows into it, but none through the teacher.
    case = CASES[name]
    state, new, metrics, _ = outcome(name)
    flat = flat_views(case, STREAMS.candidates.inputs)
    out = outputs_by_hand(state.params, flat)
    loss, of_outputs, apart = loss_by_hand(case, out)
    features = flat @ np.float64(state.params["backbone"])
    heads = state.params["head"]
    expected = {
        "backbone": flat.T @ sum(of_outputs[n] @ np.float64(heads[n]).T for n in heads),
        "head": {n: features.T @ of_outputs[n] for n in heads},
    }
    assert_close(jax.tree.map(np.subtract, state.params, new.params), expected)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    assert new.step == 1 and new.model_state["gain"] == GAIN + 1

    real = STREAMS.candidates.mask
    assert metrics["candidate_loss"][1] == real.sum() * case.views
    assert ("distillation" in metrics) == (case.mode == "sd")
    if case.mode == "sd":
        np.testing.assert_allclose(metrics["distillation"], (apart[real].sum(), real.sum()), 1e-5)


@pytest.mark.parametrize("name", ["da", "mt", "sla", "sd"])
def test_the_refiner_sees_the_views_as_candidates_of_one_label_space(name):
    case = CASES[name]
    state, new, metrics, _ = outcome(name)
    assert state.extra == len(HEADS[name]) and new.extra["number"] == state.extra + 1
    assert metrics["stub"] == (2, 1)
    for found, given in zip(new.extra["streams"], STREAMS):
        if given is None:
            assert found is None
            continue
        labels = joint_by_hand(given.labels, 4) if name in ("sla", "sd") else given.labels
        assert_close(found.inputs.reshape(len(found.inputs), -1), flat_views(case, given.inputs), 0)
        assert_close(found.labels, labels if name in ("sla", "sd") else labels.repeat(4, 0), 1e-6)
        np.testing.assert_array_equal(found.mask, [m for m in given.mask for _ in range(4)])
        np.testing.assert_array_equal(
            found.index, [4 * i + j for i in given.index for j in range(4)]
        )
        assert jax.tree.structure(found.trace) == jax.tree.structure(given.trace)
        if given.trace is not None:  # a view's partner is the same view of the sample's
            np.testing.assert_array_equal(found.trace.operation, given.trace.operation.repeat(4, 0))
            np.testing.assert_array_equal(found.trace.magnitude, given.trace.magnitude.repeat(4, 0))
            partner = 4 * given.trace.partner[:, None] + np.arange(4)[:, None]
            np.testing.assert_array_equal(
                found.trace.partner, partner.reshape(-1, partner.shape[2])
            )
    out = outputs_by_hand(state.params, flat_views(case, STREAMS.candidates.inputs))
    assert_close(new.extra["logits"], GAIN * out[case.refined])  # in evaluation mode


@pytest.mark.parametrize("name", ["da", "mt_options", "sla_options", "sd_options", "sd_prior"])
def test_targets_are_of_samples_means_over_views(name):
    case = CASES[name]
    weights, labels = targets_by_hand(case)
    rows = np.arange(SIZE * case.views).reshape(SIZE, case.views)
    if case.refined == "joint":  # P(y) = sum of P(y, j) over j
        columns = [[y * case.views + j for j in range(case.views)] for y in range(CLASSES)]
        labels = np.stack([labels[:, c].sum(1) for c in columns], 1)
    found = outcome(name)[-1]
    if case.given:
        assert_close(found.weights, weights[rows].mean(1))
        assert_close(found.utility, given_targets(case).utility[rows].mean(1))
    else:
        np.testing.assert_array_equal(found.weights, STREAMS.candidates.mask)
        assert_close(labels[rows].mean(1), STREAMS.candidates.labels)
    assert_close(found.labels, labels[rows].mean(1))


@EVERY_MODE
def test_all_views_go_through_the_network_once(mode):
    case, calls = Case(mode, given=False), []

    def counted(name, function):
        def run(params, model_state, inputs, *key):
            calls.append((name, len(inputs)))
            return function(params, model_state, inputs, *key)

        return run

    model = linear_model(case)
    model = model._replace(
        train=counted("train", model.train), logits=counted("logits", model.logits)
    )
    method = make(case, model)
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    jax.eval_shape(functools.partial(method.step, reduce=identity), state, STREAMS)
    assert calls == [("train", 4 * SIZE)]
    calls.clear()
    for predict, rows in ("single", SIZE), ("aggregated", 4 * SIZE):
        jax.eval_shape(make(case, model, predict=predict).predict, state, STREAMS.candidates.inputs)
        assert calls.pop() == ("logits", rows) and not calls


# --- labels and predictions ------------------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("name", M)
def test_priors_are_the_views_labels(mode, name):
    labels, size = STREAMS.candidates.labels, M[name]
    found = np.asarray(sla.priors(labels, mode=mode, transformations=name))
    if mode in ("da", "mt"):
        np.testing.assert_array_equal(found, [y for y in labels for _ in range(size)])
        return
    np.testing.assert_array_equal(found, np.float32(joint_by_hand(labels, size)))
    cube = found.reshape(SIZE, size, CLASSES, size)
    assert_close(cube.sum((2, 3)), np.ones((SIZE, size)), 1e-6)
    # Its marginals are the label, and the transformation that was made.
    assert_close(sla.class_labels(found, size), labels.repeat(size, 0), 1e-6)
    for j in range(size):
        assert_close(cube[:, j].sum(1), np.eye(size)[[j] * SIZE], 1e-6)


def test_the_marginal_of_a_joint_softmax_is_the_sum_over_transformations():
    joint = softmax(np.random.default_rng(0).normal(size=(6, CLASSES * 4)))
    expected = [joint[:, [y * 4 + j for j in range(4)]].sum(1) for y in range(CLASSES)]
    assert_close(sla.class_labels(np.float32(joint), 4), np.stack(expected, 1), 1e-6)


@EVERY_MODE
@pytest.mark.parametrize("predict", sla.PREDICTIONS)
@pytest.mark.parametrize("name", ["rotation", "color_perm3"])
def test_predictions_are_the_papers(mode, predict, name):
    case = Case(mode, name, given=False)
    method, size = make(case, predict=predict), M[name]
    inputs = STREAMS.candidates.inputs
    state = method.init(jax.random.key(0), inputs)
    found = np.asarray(jax.jit(method.predict)(state, inputs))
    out = outputs_by_hand(state.params, flat_views(case, inputs))
    out = {head: GAIN * z for head, z in out.items()}
    if predict == "single" and mode != "sla":
        expected = out["class"][::size]
    elif predict == "single":
        expected = out["joint"][::size, ::size]
    elif mode in ("da", "mt"):
        expected = np.log(sum(softmax(out["class"][j::size]) for j in range(size)) / size)
    else:
        expected = sum(out["joint"][j::size, j::size] for j in range(size)) / size
    assert_close(found, expected)
    if mode == "sla":
        # Of the joint distribution: P(y | x_0, 0), or the geometric mean of all P(y | x_j, j).
        cube = softmax(out["joint"]).reshape(SIZE, size, CLASSES, size)
        given_view = [cube[:, j, :, j] / cube[:, j, :, j].sum(1)[:, None] for j in range(size)]
        mean = given_view[0] if predict == "single" else np.prod(given_view, 0) ** (1 / size)
        assert_close(softmax(found), mean / mean.sum(1)[:, None])


def test_distillation_is_finite_where_both_are_certain():
    logits = np.float32([[1e4, 0, -1e4], [0, 1e4, 0]])
    value = lambda student: jnp.sum(sla.divergence(logits, student, 0.5))
    loss, slope = jax.value_and_grad(value)(logits[::-1])
    assert 1e3 < loss < np.inf and np.isfinite(slope).all()
    assert value(logits) == 0


# --- one view is plain training --------------------------------------------------------------


BACKBONE = SmallCNN((4,), norm="batch")
PLAIN, TX = from_linen(Classifier(BACKBONE, CLASSES)), optax.adam(0.01)


@functools.cache
def initial():
    """Of the plain network: parameters and statistics."""
    return jax.device_get(jax.jit(PLAIN.init)(jax.random.key(0), STREAMS.candidates.inputs))


def trained(method, params):
    """The state after some steps from the given parameters, and the last step's loss."""
    state = init_state(jax.random.key(0), params, initial()[1], TX)
    step = jax.jit(functools.partial(method.step, reduce=identity))
    for _ in range(4):
        state, metrics = step(state, Streams(STREAMS.candidates))
    return state, metrics["loss"]


def predicted(method, state):
    return jax.jit(method.predict)(state, STREAMS.candidates.inputs)


@functools.cache
def plainly_trained():
    method = erm.make(PLAIN, TX)
    state, loss = trained(method, initial()[0])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params, initial()[0])
    assert min(jax.tree.leaves(moved)) > 1e-3
    return state, loss, predicted(method, state)


@EVERY_MODE
def test_one_view_is_plain_training_exactly(mode):
    (params, _), (plain, plain_loss, logits) = initial(), plainly_trained()
    main = "joint" if mode in ("sla", "sd") else "class"
    # A softmax over one transformation has nothing to learn, nor to teach the backbone.
    idle = {"kernel": np.ones((4, 1), np.float32), "bias": np.ones(1, np.float32)}
    others = {"transformation": idle} if mode == "mt" else {}
    names = dict(mode=mode, transformations="none")
    model = from_linen(sla.network(BACKBONE, CLASSES, **names))
    options = dict(temperature=2.0, beta=3.0, sum_views=True)
    single, aggregated = (
        sla.make(model, TX, predict=predict, **names, **options) for predict in sla.PREDICTIONS
    )
    state, loss = trained(single, params | {"head": {main: params["head"], **others}})

    heads = {main: plain.params["head"], **others}
    assert_close(state.params, plain.params | {"head": heads}, 0)
    assert_close((state.model_state, loss), (plain.model_state, plain_loss), 0)
    assert_close(predicted(single, state), logits, 0)
    if main == "joint":
        assert_close(predicted(aggregated, state), logits, 0)
    else:  # logarithms of probabilities
        assert_close(predicted(aggregated, state), log_softmax(logits), 1e-6)


# --- padding and runners, with SAFLEX on the views -------------------------------------------


ROWS, PADDING, STEPS = 16, 3, 3
NETWORK = from_linen(sla.network(MLP((6,)), CLASSES))


def learning_method():
    memory = dict(memory_decay=0.9, num_samples=ROWS * 4, num_classes=CLASSES * 4)
    # Well conditioned, so that rounding is not amplified.
    rule = dict(rule="simplex", direction="identity", temperature=0.5, tolerance=0.0)
    refiner = saflex.refiner(**rule, **memory)
    return sla.make(NETWORK, optax.sgd(0.1, momentum=0.9), refiner=refiner, temperature=2.0)


@functools.cache
def learning_state():
    return jax.jit(learning_method().init)(jax.random.key(0), STREAMS.candidates.inputs)


def padded(seed, garbage):
    rows = batch(seed, ROWS, PADDING)
    inputs, index = rows.inputs.copy(), np.arange(ROWS, dtype=np.int32)
    labels = np.eye(CLASSES, dtype=np.float32)[rows.labels.argmax(1)]
    if garbage:
        inputs[-PADDING:] *= 1e3
        labels[-PADDING:], index[-PADDING:] = 1 / CLASSES, 1
    return rows._replace(inputs=inputs, labels=labels, index=index, trace=None)


def run(runner, garbage=False):
    """State and metrics, as averages, after some steps."""
    state = runner.put_state(learning_state())
    for number in range(STEPS):
        streams = Streams(padded(2 * number, garbage), padded(2 * number + 1, garbage))
        state, metrics = runner.step(state, runner.put_batch(streams))
    averages = {f"metrics/{name}": total / count for name, (total, count) in metrics.items()}
    return setup_.flatten((state, averages))


@functools.cache
def on_one_device():
    return jit_runner(learning_method().step, devices=jax.devices()[:1])


def test_padding_changes_nothing():
    expected, found = (run(on_one_device(), garbage) for garbage in (False, True))
    assert 0 < expected["1/metrics/kept"] < 1 and expected["1/metrics/relabelled"] > 0
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    visits = expected["0/extra/memory/visits"][: ROWS * 4]
    np.testing.assert_array_equal(visits, STEPS * np.repeat(np.arange(ROWS) < ROWS - PADDING, 4))


@pytest.mark.slow
def test_saflex_shares_the_forward_pass_of_all_views():
    # Beside it, the validation samples' own and products with features.
    model = from_linen(sla.network(SmallCNN((16, 32)), cost_test.CLASSES))
    plain, refined = (
        cost_test.step_flops(sla.make(model, TX, refiner=refiner))
        for refiner in (None, saflex.refiner(direction="identity"))
    )
    method = sla.make(model, TX, predict="aggregated")
    inputs = cost_test.STREAMS.val.inputs
    forward = cost_test.flops(method.predict, method.init(jax.random.key(0), inputs), inputs)
    assert refined <= plain + forward + 0.03 * plain


@pytest.mark.parametrize("make_runner", [jit_runner, pmap_runner])
def test_eight_devices_agree_with_one(make_runner):
    assert jax.device_count() == 8
    expected, found = (run(r) for r in (on_one_device(), make_runner(learning_method().step)))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        tol = 1e-6 if np.issubdtype(value.dtype, np.floating) else 0
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tol, err_msg=name)


# --- what is refused, and the network --------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("name", M)
def test_the_network_has_the_heads_of_its_mode(mode, name):
    module = sla.network(SmallCNN((4,)), CLASSES, mode=mode, transformations=name)
    model = from_linen(module)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), STREAMS.candidates.inputs)
    widths = {"class": CLASSES, "transformation": M[name], "joint": CLASSES * M[name]}
    heads = HEADS["sla" if mode == "sd" and name == "none" else mode]
    found = {head: x["kernel"].shape[1] for head, x in params["head"].items()}
    assert found == {head: widths[head] for head in heads}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "sl"}, r"mode must be one of \['da', 'mt', 'sd', 'sla'\]; given 'sl'; did you"),
        ({"transformations": "rotate"}, "transformations must be .*; did you mean 'rotation'"),
        ({"predict": "aggregate"}, "predict must be one of .*; did you mean 'aggregated'"),
        ({"temperature": 0.0}, r"temperature must be positive and finite; given 0\.0"),
        ({"beta": -0.5}, r"beta must be >= 0; given -0\.5"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sla.make(linear_model(Case("sd")), TX, **options)
    if options.keys() & {"mode", "transformations"}:
        with pytest.raises(ValueError, match=message):
            sla.network(SmallCNN((4,)), CLASSES, **options)
        with pytest.raises(ValueError, match=message):
            sla.priors(STREAMS.candidates.labels, **options)


def test_clean_samples_are_refused():
    method = make(Case("sd"))
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    streams = STREAMS._replace(clean=STREAMS.candidates)
    for call in (functools.partial(method.step, reduce=identity), method.targets):
        with pytest.raises(ValueError, match="sla trains on candidates alone"):
            call(state, streams)
