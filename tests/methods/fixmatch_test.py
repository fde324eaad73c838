"""FixMatch against its equations, what its rule sees, its data, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build, task
from experiments.configs import fixmatch as config_of_fixmatch
from saflex_jax import Batch, Model, RunInfo, Streams, Targets, configure
from saflex_jax.augment import sample_keys
from saflex_jax.methods import fixmatch
from saflex_jax.parallel import RUNNERS, jit_runner
from saflex_jax.rules import Posterior, Refinement, Scoring, Simplex, VisitMean
from tests import problems
from tests.experiments.task_test import forget, images
from tests.parallel import setup_
from tests.problems import assert_close, log_softmax, softmax

FEATURES, CLASSES, LABELLED, SIZE = 4, 3, 5, 12


def rows(rng, size, *, masked, labels=None):
    """A Batch whose last rows are padding of large garbage."""
    mask = np.arange(size) < size - masked
    inputs = np.where(mask[:, None], rng.normal(size=(size, FEATURES)), 1e3).astype(np.float32)
    labels = problems.hard_labels(rng, size, CLASSES) if labels is None else labels
    return Batch(inputs, labels, mask, np.arange(size, dtype=np.int32))


@functools.cache
def streams():
    """The candidates' labels are NaN: one that is read reaches the parameters."""
    rng = np.random.default_rng(0)
    hidden = np.full((SIZE, CLASSES), np.nan, np.float32)
    return Streams(
        rows(rng, SIZE, masked=3, labels=hidden),
        rows(rng, 4, masked=1),
        rows(rng, LABELLED, masked=2),
    )


START = 2 * np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
# Softmax regression; training mode doubles the logits, and counts its passes in the model's state.
LINEAR = Model(
    lambda key, x: ({"kernel": jnp.asarray(START)}, {"passes": jnp.zeros(())}),
    lambda params, stats, x, key: (2 * x @ params["kernel"], {"passes": stats["passes"] + 1}),
    lambda params, stats, x: x @ params["kernel"],
)


def weak(key, batch):
    return batch._replace(inputs=batch.inputs + 1)


def strong(key, batch):
    return batch._replace(inputs=0.5 - batch.inputs)


class Stub:
    """Weights by the strong view, softer labels; counts its calls, reports what it was shown."""

    def init(self, params):
        return jnp.zeros(())

    def apply(self, calls, state, logits_fn, streams, *, reduce):
        views = streams.candidates
        weights = jnp.where(views.mask, 0.5 + jnp.abs(views.inputs[:, 0]), 0.0)
        targets = Targets(weights, 0.8 * views.labels + 0.2 / CLASSES, jnp.zeros_like(weights))
        shown = logits_fn(state.params, streams.val.inputs)[0, 0], jnp.ones(())
        return targets, calls + 1, {"shown": shown}


# --- the step --------------------------------------------------------------------------------

RATE, WEIGHT, THRESHOLD, EMA = 0.1, 0.7, 0.6, 0.75


def make(rule=None, tx=optax.sgd(RATE), **changes):
    options = {"weak": weak, "strong": strong, "threshold": THRESHOLD} | changes
    return fixmatch.make(LINEAR, tx, fixmatch.Options(**options), rule=rule)


def initial(method):
    return method.init(jax.random.key(0), streams().candidates.inputs)


def reference(kernel, refined=False, weight=WEIGHT):
    """The gradient, and the loss, its parts and the confident share, float64."""
    batch, val, clean = streams()
    labelled, y = clean.inputs[clean.mask] + 1.0, clean.labels[clean.mask]
    x = batch.inputs[batch.mask].astype(np.float64)
    p = softmax(x @ kernel)
    confident, pseudo, view = p.max(1) >= THRESHOLD, np.eye(CLASSES)[p.argmax(1)], 0.5 - x
    weights = confident * (0.5 + np.abs(view[:, 0]) if refined else 1.0)
    targets = 0.8 * pseudo + 0.2 / CLASSES if refined else pseudo
    of_labelled = -(y * log_softmax(2 * labelled @ kernel)).sum(1).mean()
    of_views = (weights * -(targets * log_softmax(2 * view @ kernel)).sum(1)).mean()
    residual = weights[:, None] * (softmax(2 * view @ kernel) - targets) / len(x)
    gradient = 2 * labelled.T @ (softmax(2 * labelled @ kernel) - y) / len(y)
    gradient += weight * 2 * view.T @ residual
    shown = val.inputs[0].astype(np.float64) @ kernel[:, 0]
    return gradient, {
        "clean_loss": of_labelled,
        "candidate_loss": of_views,
        "loss": of_labelled + weight * of_views,
        "confident": confident.mean(),
        **({"shown": shown} if refined else {}),
    }


@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_parameters_and_their_average_follow_the_equations(refined):
    method = make(Stub() if refined else None, unlabelled_weight=WEIGHT, ema=EMA)
    inputs = streams().val.inputs

    @jax.jit
    def run(state):
        state, metrics = method.step(state, streams())
        return state, metrics, method.predict(state, inputs)

    state = initial(method)
    kernel = average = START.astype(np.float64)
    shares = []
    for _ in range(6):
        gradient, expected = reference(kernel, refined)
        state, metrics, logits = run(state)
        for name, value in expected.items():
            np.testing.assert_allclose(np.divide(*metrics[name]), value, rtol=2e-5, err_msg=name)
        kernel = kernel - RATE * gradient
        average = EMA * average + (1 - EMA) * kernel
        shares.append(expected["confident"])
        np.testing.assert_allclose(state.params["kernel"], kernel, atol=2e-5)
        np.testing.assert_allclose(logits[:3], inputs[:3] @ average, atol=1e-4)
    assert 0 < min(shares) < max(shares) < 1  # the mask matters, and changes
    assert state.model_state["passes"] == 6
    assert not refined or state.extra.rule == 6
    assert np.abs(kernel - average).max() > 0.05


def test_without_an_average_the_last_parameters_predict():
    method, inputs, other = make(), streams().val.inputs, START[::-1]
    state = initial(method)
    assert state.extra.average is None
    found = method.predict(state._replace(params={"kernel": other}), inputs)
    np.testing.assert_allclose(found, inputs @ other, 1e-5)


def test_a_pseudo_label_is_the_most_probable_class_from_the_threshold_on():
    # Of two equally likely classes each is as likely as 1/2, exactly: that is enough.
    p = [[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.04, 0.01, 0.95], [0.5, 0.5, 0]]
    with np.errstate(divide="ignore"):
        logits = np.log(p).astype(np.float32)
    logits[4] -= logits[4, 0]
    labels, confident = jax.jit(fixmatch.pseudo_labels)(logits, 0.5)
    np.testing.assert_array_equal(labels, np.eye(3)[[1, 0, 2, 2, 0]])
    np.testing.assert_array_equal(confident, [True, True, False, True, True])


def test_weight_zero_is_plain_training_on_the_weak_labelled_samples():
    method, kernel = make(threshold=0.1, unlabelled_weight=0.0), START.astype(np.float64)
    step, state = jax.jit(method.step), initial(method)
    for _ in range(3):
        state, metrics = step(state, streams())
        kernel = kernel - RATE * reference(kernel, weight=0.0)[0]
    assert_close(state.params["kernel"], kernel, 1e-6)
    assert metrics["candidate_loss"][0] > 0


def test_draws_are_of_the_step_and_of_the_kind_of_view():
    noted = {}

    def noting(name):
        def augment(key, batch):
            noted[name] = jax.random.key_data(key)
            return batch

        return augment

    method = make(weak=noting("weak"), strong=noting("strong"))

    @jax.jit
    def keys(state):
        """Of this step and the next, and those that the two augmentations are given."""
        method.step(state, streams())
        both = state, state._replace(step=state.step + 1)
        return [jax.random.key_data(fixmatch.view_keys(s)) for s in both], dict(noted)

    drawn, given = keys(initial(method))
    assert len({tuple(key) for of_step in np.asarray(drawn) for key in of_step}) == 4
    np.testing.assert_array_equal([given["weak"], given["strong"]], drawn[0])


def test_labelled_samples_meet_the_upstream_pipeline_unless_told_otherwise():
    run = RunInfo(SIZE, CLASSES, upstream="feature_mask(1.0)")

    def trained_on(options, run):
        """The labelled rows of the training pass."""
        noted = []

        def train(params, stats, x, key):
            noted.append(x[:LABELLED])
            return LINEAR.train(params, stats, x, key)

        method = fixmatch.make(LINEAR._replace(train=train), optax.sgd(RATE), options, run=run)
        state = initial(method)

        def rows(state):
            method.step(state, streams())
            return noted[0]

        return jax.jit(rows)(state)

    clean, options = streams().clean.inputs, functools.partial(fixmatch.Options, strong=strong)
    np.testing.assert_array_equal(trained_on(options(), run)[:3], 0 * clean[:3])
    np.testing.assert_array_equal(trained_on(options(), None), clean)
    np.testing.assert_array_equal(trained_on(options(weak="identity"), run), clean)


# --- with SAFLEX -----------------------------------------------------------------------------


def saflex(noise_rate=None, run=None):
    scoring = Scoring(direction="identity", predicate="")
    memory = VisitMean() if run is None else VisitMean(0.9)
    return Refinement(scoring, Posterior(run, noise_rate=noise_rate, memory=memory))


def test_saflex_that_keeps_the_prior_is_fixmatch():
    plain, learned = make(), make(saflex(noise_rate=0.0))

    @jax.jit
    def both(state, other):
        return plain.step(state, streams()), learned.step(other, streams())

    state, other = initial(plain), initial(learned)
    for _ in range(3):
        (state, _), (other, metrics) = both(state, other)
    assert_close(other.params, state.params, 1e-6)
    assert metrics["kept"][0] == metrics["kept"][1] == metrics["confident"][0] > 0


def test_saflex_sees_confident_views_alone():
    method = make(saflex(run=RunInfo(SIZE, CLASSES)))

    @jax.jit
    def run(state):
        return *method.step(state, streams()), method.targets(state, streams())

    start = initial(method)
    state, _, targets = run(start)
    batch = streams().candidates
    confident = (softmax(batch.inputs @ START).max(1) >= THRESHOLD) & batch.mask
    assert 0 < confident[batch.mask].mean() < 1
    visits = np.asarray(state.extra.rule.rule.memory.visits)[:SIZE]
    np.testing.assert_array_equal(visits > 0, confident)
    np.testing.assert_array_equal(targets.weights[~confident], 0)
    np.testing.assert_allclose(np.mean(targets.weights[confident]), 1, rtol=1e-6)
    # And where nothing is confident, the labelled samples alone are trained on.
    kernel = 0.01 * START
    state, metrics, _ = run(start._replace(params={"kernel": kernel}))
    assert metrics["kept"] == (0, 0) and metrics["confident"][0] == 0
    expected = kernel - RATE * reference(kernel.astype(np.float64), weight=0.0)[0]
    assert_close(state.params["kernel"], expected, 1e-6)
    assert np.isfinite(jax.device_get(list(metrics.values()))).all()


# --- runners ---------------------------------------------------------------------------------


def noise(key, batch):
    """Of a sample's own draw."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (FEATURES,)))(sample_keys(key, batch))
    return batch._replace(inputs=batch.inputs + 0.5 - drawn)


def on_devices(make_runner):
    """The state after some steps, and the metrics of all of them; padding among the rows."""
    # Well conditioned, so that rounding is not amplified.
    rule = Refinement(Scoring("identity", ""), Simplex(temperature=0.5, tolerance=0.0))
    method = make(rule, optax.sgd(RATE, 0.9), weak=noise, strong=noise, ema=0.5)
    runner = make_runner(method.step)
    state, all_metrics = runner.put_state(initial(method)), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        sizes = (16, 3), (8, 1), (8, 2)
        batch = Streams(*(rows(rng, size, masked=masked) for size, masked in sizes))
        state, metrics = runner.step(state, runner.put_batch(batch))
        all_metrics.append(jax.device_get(metrics))
    averages = {name: np.divide(*np.sum([m[name] for m in all_metrics], 0)) for name in metrics}
    return setup_.flatten(state), averages


def test_eight_devices_agree_with_one():
    expected, metrics = on_devices(functools.partial(jit_runner, devices=jax.devices()[:1]))
    assert 0 < metrics["confident"] < 1 and 0 < metrics["kept"]
    for make_runner in RUNNERS.values():
        state, averages = on_devices(make_runner)
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=2e-6, err_msg=key)
        for key, value in metrics.items():
            np.testing.assert_allclose(averages[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


# --- by config -------------------------------------------------------------------------------


def config(folder, **changes):
    config = config_of_fixmatch.get_config()
    small = {"model.widths": (4,), "train.steps": 4, "train.log_every": 2, "train.batch_size": 16}
    section = {"data.name": "mnist", "data.dir": str(folder), "data.val": 9, "data.train": 30}
    config.update_from_flattened_dict(
        {**small, **section, "augment": "shift(1)", "method.fixmatch.threshold": 0.4, **changes}
    )
    return config


def test_no_training_label_is_seen_and_the_validation_samples_train(tmp_path):
    images(tmp_path / "mnist")
    forget()
    data = task.make_data(config(tmp_path))
    candidates, val, clean = data.pools
    np.testing.assert_array_equal(candidates.labels, np.full((30, 3), np.float32(1 / 3)))
    for one, two in zip(val[:4], clean[:4]):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(val.labels.sum(0), [3, 3, 3])  # 9 of 3 classes
    assert not data.wrong.any()
    of_candidates, of_val = (
        {row.tobytes() for row in np.asarray(x.inputs)} for x in (candidates, val)
    )
    assert not of_candidates & of_val
    # Of the same seed with labels: the same samples.
    seen = task.make_data(config(tmp_path, **{"data.unlabelled": False})).pools
    np.testing.assert_array_equal(seen.candidates.inputs, candidates.inputs)
    assert seen.clean is None and seen.candidates.labels.max() == 1


def test_the_configs_pipeline_is_the_weak_augmentation(tmp_path, monkeypatch):
    images(tmp_path / "mnist")
    forget()
    section = config(tmp_path, **{"method.fixmatch.strong": "shift(2)"})
    given = {}

    def make(model, tx, options, **keywords):
        given.update(keywords, options=options)

    spec = configure.METHODS["fixmatch"]._replace(make=make)
    monkeypatch.setitem(configure.METHODS, "fixmatch", spec)
    build.make_method(section, task.make_data(section).pools)
    assert given["run"].upstream == "shift(1)"
    assert given["options"] == fixmatch.Options(strong="shift(2)", threshold=0.4)
    assert isinstance(given["rule"].rule, Posterior)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\]; given 1.5"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight must be >= 0 and finite; given -1.0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\); given 1.0"),
        ({"strong": "randaugmnt(2, 9)"}, "did you mean 'randaugment'"),
        ({"weak": "shft(2)"}, "did you mean 'shift'"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fixmatch.Options(**options)


def test_rows_must_stay_and_labelled_samples_must_be_there():
    def twice(key, batch):
        return jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)

    method = make(strong=twice)
    state = initial(method)
    with pytest.raises(ValueError, match="strong must keep the number of rows; it made 24 of 12"):
        jax.eval_shape(method.step, state, streams())
    with pytest.raises(ValueError, match="needs labelled samples; given streams"):
        method.step(state, streams()._replace(clean=None))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.unlabelled": False}, "config.data.unlabelled must be True with fixmatch; given F"),
        ({"data.train_on_val": True}, "config.data.train_on_val must be False with unlabelled=Tr"),
        ({"data.val_from": "train"}, "config.data.val_from must be '' with unlabelled=True"),
        ({"data.noise": 0.1}, "config.data.noise must be 0.0 with unlabelled=True.*given 0.1"),
        ({"data.labels": "worst"}, "config.data.labels must be '' with unlabelled=True"),
        (
            {"method.name": "protonet", "method.rule": "as_given"},
            "config.data.unlabelled must be False",
        ),
    ],
)
def test_a_config_that_would_show_labels_is_refused(tmp_path, changes, message):
    changes = {"train.batch_size": 80, "method.protonet.queries": 15, **changes}
    with pytest.raises(ValueError, match=message):
        build.check(config(tmp_path, **{"data.name": "digits", **changes}))
