"""SLA, its baselines and self-distillation against the paper's equations in NumPy."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Model, RunInfo, Streams, Targets
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.posterior import Agreement, estimate_noise_rate
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.methods import sla, supervised
from saflex_jax.models import Classifier, SmallCNN, from_linen
from saflex_jax.parallel import jit_runner, pmap_runner
from saflex_jax.rules import Posterior, Refinement, Scoring, Simplex, VisitMean
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
    given: bool = True  # whether a rule sets the targets
    loss: CandidateLoss = weighted_soft_cross_entropy

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
    "da_options": Case("da", "color_perm3", {"sum_views": True}, loss=doubled),
    "mt": Case("mt"),
    "mt_options": Case("mt", "rotation2", {"sum_views": True}, loss=doubled),
    "sla": Case("sla"),
    "sla_options": Case("sla", "rotation2", {"sum_views": True}, loss=doubled),
    "sd": Case("sd"),
    "sd_prior": Case("sd", "rotation2", {"beta": 0.0}, given=False),
    "sd_options": Case(
        "sd",
        "color_perm3",
        {"sum_views": True, "temperature": 2.5, "beta": 0.3},
        loss=doubled,
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

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

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
    """Of a rule that has its own mind, also about padding."""
    rng = np.random.default_rng(3)
    size = SIZE * case.views
    weights = rng.uniform(0.5, 2.0, size).astype(np.float32) * (rng.uniform(size=size) > 0.2)
    utility = rng.normal(size=size).astype(np.float32)
    return Targets(weights, soft_labels(rng, size, case.width), utility)


class Stub(NamedTuple):
    """The given targets; its arrays are what it was shown."""

    case: Case

    def init(self, params):
        return np.float32(len(params["head"]))

    def apply(self, arrays, state, logits_fn, streams, *, reduce):
        shown = {"streams": streams, "logits": logits_fn(state.params, streams.candidates.inputs)}
        return given_targets(self.case), {**shown, "number": arrays + 1}, {"stub": (2.0, 1.0)}


def make(case, model=None, **changes):
    options = sla.Options(case.mode, case.transformations, **case.options | changes)
    model = linear_model(case) if model is None else model
    rule = Stub(case) if case.given else None
    return sla.make(model, optax.sgd(1.0), options, rule=rule, loss=case.loss)


@functools.cache
def outcomes():
    """Of every case a step and the targets, in one compilation.

    Name -> (state, new state, metrics, targets).
    """
    methods = {name: make(case) for name, case in CASES.items()}
    inputs = STREAMS.candidates.inputs
    states = {name: method.init(jax.random.key(0), inputs) for name, method in methods.items()}

    @jax.jit
    def run(states, streams):
        return {
            name: (*method.step(states[name], streams), method.targets(states[name], streams))
            for name, method in methods.items()
        }

    after = run(states, STREAMS)
    return {name: (states[name], *after[name]) for name in CASES}


def joint_by_hand(labels, size):
    """Class y of view j is label y M + j: the product of the label and a one-hot."""
    return np.stack([np.kron(y, np.eye(size)[j]) for y in labels for j in range(size)])


def targets_by_hand(case):
    """Weights and labels of every view."""
    if case.given:
        return given_targets(case)[:2]
    labels = STREAMS.candidates.labels
    of_views = joint_by_hand if case.refined == "joint" else functools.partial(np.repeat, axis=0)
    return np.ones(SIZE * case.views), of_views(labels, case.views)


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

    scale = 2 if case.loss is doubled else 1
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
    state, new, metrics, _ = outcomes()[name]
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
def test_the_rule_sees_the_views_as_candidates_of_one_label_space(name):
    case = CASES[name]
    state, new, metrics, _ = outcomes()[name]
    assert state.extra == len(HEADS[name]) and new.extra["number"] == state.extra + 1
    assert metrics["stub"] == (2, 1)
    for shown, given in zip(new.extra["streams"], STREAMS):
        if given is None:
            assert shown is None
            continue
        labels = joint_by_hand(given.labels, 4) if name in ("sla", "sd") else given.labels
        assert_close(shown.inputs.reshape(len(shown.inputs), -1), flat_views(case, given.inputs), 0)
        assert_close(shown.labels, labels if name in ("sla", "sd") else labels.repeat(4, 0), 1e-6)
        np.testing.assert_array_equal(shown.mask, [m for m in given.mask for _ in range(4)])
        np.testing.assert_array_equal(
            shown.index, [4 * i + j for i in given.index for j in range(4)]
        )
        assert jax.tree.structure(shown.trace) == jax.tree.structure(given.trace)
        if given.trace is not None:  # a view's partner is the same view of the sample's
            np.testing.assert_array_equal(shown.trace.operation, given.trace.operation.repeat(4, 0))
            np.testing.assert_array_equal(shown.trace.magnitude, given.trace.magnitude.repeat(4, 0))
            partner = 4 * given.trace.partner[:, None] + np.arange(4)[:, None]
            np.testing.assert_array_equal(
                shown.trace.partner, partner.reshape(-1, partner.shape[2])
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
    targets = outcomes()[name][-1]
    if case.given:
        assert_close(targets.weights, weights[rows].mean(1))
        assert_close(targets.utility, given_targets(case).utility[rows].mean(1))
    else:
        np.testing.assert_array_equal(targets.weights, STREAMS.candidates.mask)
        assert_close(labels[rows].mean(1), STREAMS.candidates.labels)
    assert_close(targets.labels, labels[rows].mean(1))


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
    jax.eval_shape(method.step, state, STREAMS)
    assert calls == [("train", 4 * SIZE)]
    calls.clear()
    for predict, rows in ("single", SIZE), ("aggregated", 4 * SIZE):
        jax.eval_shape(make(case, model, predict=predict).predict, state, STREAMS.candidates.inputs)
        assert calls.pop() == ("logits", rows) and not calls


# --- labels and predictions ------------------------------------------------------------------


@functools.cache
def all_priors():
    """(mode, transformations) -> priors and their marginals, in one compilation."""

    @jax.jit
    def run(labels):
        priors = {
            (m, name): sla.priors(labels, sla.Options(m, name)) for m in sla.MODES for name in M
        }
        joint = {key: x for key, x in priors.items() if key[0] in ("sla", "sd")}
        marginals = {key: sla.class_labels(x, M[key[1]]) for key, x in joint.items()}
        return priors, dict.fromkeys(priors) | marginals

    return jax.device_get(run(STREAMS.candidates.labels))


@EVERY_MODE
@pytest.mark.parametrize("name", M)
def test_priors_are_the_views_labels(mode, name):
    labels, size = STREAMS.candidates.labels, M[name]
    priors, marginals = (x[mode, name] for x in all_priors())
    if mode in ("da", "mt"):
        np.testing.assert_array_equal(priors, [y for y in labels for _ in range(size)])
        return
    np.testing.assert_array_equal(priors, np.float32(joint_by_hand(labels, size)))
    cube = priors.reshape(SIZE, size, CLASSES, size)
    assert_close(cube.sum((2, 3)), np.ones((SIZE, size)), 1e-6)
    # Its marginals are the label, and the transformation that was made.
    assert_close(marginals, labels.repeat(size, 0), 1e-6)
    for j in range(size):
        assert_close(cube[:, j].sum(1), np.eye(size)[[j] * SIZE], 1e-6)


def test_the_marginal_of_a_joint_softmax_is_the_sum_over_transformations():
    joint = softmax(np.random.default_rng(0).normal(size=(6, CLASSES * 4)))
    expected = [joint[:, [y * 4 + j for j in range(4)]].sum(1) for y in range(CLASSES)]
    assert_close(sla.class_labels(np.float32(joint), 4), np.stack(expected, 1), 1e-6)


def test_a_run_is_seen_as_one_of_views():
    labels = STREAMS.candidates.labels
    run = RunInfo(SIZE, CLASSES, num_trusted=2, counts=labels.sum(0), labels=lambda: labels)
    for mode in sla.MODES:
        options = sla.Options(mode, "rotation2")
        of_views, priors = sla.seen(run, options), all_priors()[0][mode, "rotation2"]
        classes = CLASSES * (2 if options.joint else 1)
        assert of_views[:3] == (2 * SIZE, classes, 4)
        np.testing.assert_array_equal(of_views.labels(), priors)
        np.testing.assert_allclose(of_views.counts, priors.sum(0), rtol=1e-6)
        # A view tells no more about how often labels are wrong than its sample does.
        sums = Agreement(jnp.array([0.9, 1, 0.9]), jnp.array([0.3, 1, 0.3]), 1e6)
        rule = Posterior(of_views)

        @jax.jit
        def rates(sums, candidates, rule=rule, options=options, classes=classes):
            _, metrics = rule.targets(
                rule.init()._replace(agreement=sums), None,
                sla.expand(candidates, options), reduce=identity,
            )  # fmt: skip
            wanted = estimate_noise_rate(sums, classes, num_trusted=run.num_trusted)
            return metrics["noise_rate"][0], wanted

        found, wanted = rates(sums, STREAMS.candidates)
        assert found == wanted > 0


PREDICTED = ("rotation", "color_perm3")


@functools.cache
def predictions():
    """(mode, prediction, transformations) -> logits, in one compilation."""
    methods = {
        (mode, predict, name): make(Case(mode, name, given=False), predict=predict)
        for mode in sla.MODES
        for predict in sla.PREDICTIONS
        for name in PREDICTED
    }
    inputs = STREAMS.candidates.inputs
    states = {key: method.init(jax.random.key(0), inputs) for key, method in methods.items()}

    @jax.jit
    def run(states, inputs):
        return {key: method.predict(states[key], inputs) for key, method in methods.items()}

    return jax.device_get(run(states, inputs))


@EVERY_MODE
@pytest.mark.parametrize("predict", sla.PREDICTIONS)
@pytest.mark.parametrize("name", PREDICTED)
def test_predictions_are_the_papers(mode, predict, name):
    case, size = Case(mode, name, given=False), M[name]
    logits = predictions()[mode, predict, name]
    out = outputs_by_hand(linear_params(case), flat_views(case, STREAMS.candidates.inputs))
    out = {head: GAIN * z for head, z in out.items()}
    if predict == "single" and mode != "sla":
        expected = out["class"][::size]
    elif predict == "single":
        expected = out["joint"][::size, ::size]
    elif mode in ("da", "mt"):
        expected = np.log(sum(softmax(out["class"][j::size]) for j in range(size)) / size)
    else:
        expected = sum(out["joint"][j::size, j::size] for j in range(size)) / size
    assert_close(logits, expected)
    if mode == "sla":
        # Of the joint distribution: P(y | x_0, 0), or the geometric mean of all P(y | x_j, j).
        cube = softmax(out["joint"]).reshape(SIZE, size, CLASSES, size)
        given_view = [cube[:, j, :, j] / cube[:, j, :, j].sum(1)[:, None] for j in range(size)]
        mean = given_view[0] if predict == "single" else np.prod(given_view, 0) ** (1 / size)
        assert_close(softmax(logits), mean / mean.sum(1)[:, None])


def test_distillation_is_finite_where_both_are_certain():
    logits = np.float32([[1e4, 0, -1e4], [0, 1e4, 0]])

    @jax.jit
    @jax.value_and_grad
    def value(student):
        return jnp.sum(sla.divergence(logits, student, 0.5))

    loss, slope = value(logits[::-1])
    assert 1e3 < loss < np.inf and np.isfinite(slope).all()
    assert value(logits)[0] == 0


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
    step = jax.jit(method.step)
    for _ in range(4):
        state, metrics = step(state, Streams(STREAMS.candidates))
    return state, metrics["loss"]


def predicted(state, *methods):
    """The logits by each method, in one compilation."""
    inputs = STREAMS.candidates.inputs
    return jax.jit(lambda state: [method.predict(state, inputs) for method in methods])(state)


@functools.cache
def plainly_trained():
    method = supervised.make(PLAIN, TX)
    state, loss = trained(method, initial()[0])
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), *map(jax.device_get, (state.params, initial()[0]))
    )
    assert min(jax.tree.leaves(moved)) > 1e-3
    return state, loss, *predicted(state, method)


@EVERY_MODE
def test_one_view_is_plain_training_exactly(mode):
    (params, _), (plain, plain_loss, logits) = initial(), plainly_trained()
    main = "joint" if mode in ("sla", "sd") else "class"
    # A softmax over one transformation has nothing to learn, nor to teach the backbone.
    idle = {"kernel": np.ones((4, 1), np.float32), "bias": np.ones(1, np.float32)}
    others = {"transformation": idle} if mode == "mt" else {}
    options = sla.Options(mode, "none", temperature=2.0, beta=3.0, sum_views=True)
    model = from_linen(sla.network(BACKBONE, CLASSES, options))
    single, aggregated = (
        sla.make(model, TX, dataclasses.replace(options, predict=p)) for p in sla.PREDICTIONS
    )
    state, loss = trained(single, params | {"head": {main: params["head"], **others}})

    heads = {main: plain.params["head"], **others}
    assert_close(state.params, plain.params | {"head": heads}, 0)
    assert_close((state.model_state, loss), (plain.model_state, plain_loss), 0)
    of_single, of_aggregated = predicted(state, single, aggregated)
    assert_close(of_single, logits, 0)
    if main == "joint":
        assert_close(of_aggregated, logits, 0)
    else:  # logarithms of probabilities
        assert_close(of_aggregated, log_softmax(logits), 1e-6)


# --- padding and runners, with SAFLEX on the views -------------------------------------------


ROWS, PADDING, STEPS = 16, 3, 3
LINEAR = Case("sd")


@functools.cache
def learning():
    """SLA by SAFLEX with a memory, and its state at step 0: of small logits."""
    options = sla.Options(LINEAR.mode, temperature=2.0)
    run = sla.seen(RunInfo(ROWS, CLASSES), options)
    # Well conditioned, so that rounding is not amplified.
    simplex = Simplex(temperature=0.5, tolerance=0.0, run=run, memory=VisitMean(0.9))
    rule = Refinement(Scoring("identity", "head/joint"), simplex)
    method = sla.make(linear_model(LINEAR), optax.sgd(0.02, momentum=0.9), options, rule=rule)
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    return method, state._replace(params=jax.tree.map(lambda x: x / 3, state.params))


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
    state = runner.put_state(learning()[1])
    for number in range(STEPS):
        streams = Streams(padded(2 * number, garbage), padded(2 * number + 1, garbage))
        state, metrics = runner.step(state, runner.put_batch(streams))
    averages = {f"metrics/{name}": np.divide(*pair) for name, pair in metrics.items()}
    return setup_.flatten((state, averages))


@functools.cache
def on_one_device():
    return jit_runner(learning()[0].step, devices=jax.devices()[:1])


def test_padding_changes_nothing():
    expected, after = (run(on_one_device(), garbage) for garbage in (False, True))
    assert 0 < expected["1/metrics/kept"] < 1 and expected["1/metrics/relabelled"] > 0
    assert expected.keys() == after.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    visits = expected["0/extra/rule/visits"][: ROWS * 4]
    np.testing.assert_array_equal(visits, STEPS * np.repeat(np.arange(ROWS) < ROWS - PADDING, 4))


@pytest.mark.slow
def test_saflex_shares_the_forward_pass_of_all_views():
    # Beside it, the validation samples' own and products with features.
    model = from_linen(sla.network(SmallCNN((16, 32)), cost_test.CLASSES))
    rule = Refinement(Scoring("identity"), Posterior())
    plain, refined = (cost_test.step_flops(sla.make(model, TX, rule=r)) for r in (None, rule))
    method = sla.make(model, TX, sla.Options(predict="aggregated"))
    inputs = cost_test.STREAMS.val.inputs
    forward = cost_test.flops(method.predict, method.init(jax.random.key(0), inputs), inputs)
    assert refined <= plain + forward + 0.03 * plain


@pytest.mark.parametrize("make_runner", [jit_runner, pmap_runner])
def test_eight_devices_agree_with_one(make_runner):
    assert jax.device_count() == 8
    expected, on_eight = (run(r) for r in (on_one_device(), make_runner(learning()[0].step)))
    assert expected.keys() == on_eight.keys()
    for name, value in expected.items():
        tol = 1e-6 if np.issubdtype(value.dtype, np.floating) else 0
        np.testing.assert_allclose(on_eight[name], value, rtol=0, atol=tol, err_msg=name)


# --- what is refused, and the network --------------------------------------------------------


@EVERY_MODE
@pytest.mark.parametrize("name", M)
def test_the_network_has_the_heads_of_its_mode(mode, name):
    model = from_linen(sla.network(SmallCNN((4,)), CLASSES, sla.Options(mode, name)))
    params, _ = jax.eval_shape(model.init, jax.random.key(0), STREAMS.candidates.inputs)
    widths = {"class": CLASSES, "transformation": M[name], "joint": CLASSES * M[name]}
    heads = HEADS["sla" if mode == "sd" and name == "none" else mode]
    given = {head: x["kernel"].shape[1] for head, x in params["head"].items()}
    assert given == {head: widths[head] for head in heads}


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
        sla.Options(**options)


def test_clean_samples_are_refused():
    method = make(Case("sd"))
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    streams = STREAMS._replace(clean=STREAMS.candidates)
    for call in (method.step, method.targets):
        with pytest.raises(ValueError, match="sla trains on candidates alone"):
            call(state, streams)
