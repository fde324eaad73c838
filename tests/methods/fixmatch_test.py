"""FixMatch against its equations, what its refiner sees, its data, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build, task
from experiments.configs import fixmatch as config_of_fixmatch
from saflex_jax import Batch, Model, Refiner, Streams, Targets
from saflex_jax.core.tree import identity
from saflex_jax.methods import erm, fixmatch, saflex
from saflex_jax.parallel import RUNNERS, jit_runner
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


def rule():
    """Weights by the strong view, softer labels; it counts its calls and sums what it was shown."""

    def apply(calls, state, logits_fn, streams, *, reduce):
        seen = streams.candidates
        weights = jnp.where(seen.mask, 0.5 + jnp.abs(seen.inputs[:, 0]), 0.0)
        found = Targets(weights, 0.8 * seen.labels + 0.2 / CLASSES, jnp.zeros_like(weights))
        shown = logits_fn(state.params, streams.val.inputs)[0, 0], jnp.ones(())
        return found, calls + 1, {"shown": shown}

    return Refiner(lambda params: jnp.zeros(()), apply)


# --- the step --------------------------------------------------------------------------------

RATE, WEIGHT, THRESHOLD, EMA = 0.1, 0.7, 0.6, 0.75


def reference(kernel, refined):
    """Loss, its parts, the confident share and the gradient, float64."""
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
    gradient += WEIGHT * 2 * view.T @ residual
    shown = val.inputs[0].astype(np.float64) @ kernel[:, 0]
    return gradient, {
        "clean_loss": of_labelled,
        "candidate_loss": of_views,
        "loss": of_labelled + WEIGHT * of_views,
        "confident": confident.mean(),
        **({"shown": shown} if refined else {}),
    }


@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_parameters_and_their_average_follow_the_equations(refined):
    method = fixmatch.make(
        LINEAR, optax.sgd(RATE), refiner=rule() if refined else None, weak=weak, strong=strong,
        threshold=THRESHOLD, unlabelled_weight=WEIGHT, ema=EMA,
    )  # fmt: skip
    step = jax.jit(functools.partial(method.step, reduce=identity))
    state = method.init(jax.random.key(0), streams().candidates.inputs)
    kernel = average = START.astype(np.float64)
    shares = []
    for _ in range(6):
        gradient, expected = reference(kernel, refined)
        state, metrics = step(state, streams())
        for name, value in expected.items():
            np.testing.assert_allclose(np.divide(*metrics[name]), value, rtol=2e-5, err_msg=name)
        kernel = kernel - RATE * gradient
        average = EMA * average + (1 - EMA) * kernel
        shares.append(expected["confident"])
        np.testing.assert_allclose(state.params["kernel"], kernel, atol=2e-5)
        inputs = streams().val.inputs
        np.testing.assert_allclose(
            method.predict(state, inputs)[:3], inputs[:3] @ average, atol=1e-4
        )
    assert 0 < min(shares) < max(shares) < 1  # the mask matters, and changes
    assert state.model_state["passes"] == 6
    assert not refined or state.extra.refiner == 6
    assert np.abs(kernel - average).max() > 0.05


@functools.cache
def after(steps=3, refiner=None, threshold=THRESHOLD, unlabelled_weight=1.0):
    """Method, state and metrics of softmax regression after some steps."""
    method = fixmatch.make(
        LINEAR, optax.sgd(RATE), refiner=refiner, weak=weak, strong=strong,
        threshold=threshold, unlabelled_weight=unlabelled_weight,
    )  # fmt: skip
    step = jax.jit(functools.partial(method.step, reduce=identity))
    state = method.init(jax.random.key(0), streams().candidates.inputs)
    for _ in range(steps):
        state, metrics = step(state, streams())
    return method, state, metrics


def test_without_an_average_the_last_parameters_predict():
    method, state, _ = after()
    inputs = streams().val.inputs
    np.testing.assert_allclose(method.predict(state, inputs), inputs @ state.params["kernel"], 1e-5)
    assert np.abs(state.params["kernel"] - START).max() > 0.01


def test_a_pseudo_label_is_the_most_probable_class_from_the_threshold_on():
    logits = np.log([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4], [0.04, 0.01, 0.95]])
    labels, confident = fixmatch.pseudo_labels(jnp.asarray(logits, jnp.float32), 0.5 - 1e-6)
    np.testing.assert_array_equal(labels, np.eye(3)[[1, 0, 2, 2]])
    np.testing.assert_array_equal(confident, [True, True, False, True])
    # As likely as not is enough, exactly.
    assert fixmatch.pseudo_labels(jnp.zeros((1, 2)), 0.5)[1].all()


def test_weight_zero_is_plain_training_on_the_weak_labelled_samples():
    options = dict(weak=weak, strong=strong, threshold=0.1, unlabelled_weight=0.0)
    tx, clean = optax.adam(0.1), streams().clean
    method, plain = fixmatch.make(LINEAR, tx, **options), erm.make(LINEAR, tx)
    state = other = method.init(jax.random.key(0), clean.inputs)
    other = other._replace(extra=())
    step, plain_step = (
        jax.jit(functools.partial(m.step, reduce=identity)) for m in (method, plain)
    )
    for _ in range(3):
        state, metrics = step(state, streams())
        other, _ = plain_step(other, Streams(weak(None, clean)))
    assert_close(state.params, other.params, 1e-6)
    assert metrics["candidate_loss"][0] > 0


def test_draws_are_of_the_step_and_of_the_kind_of_view():
    state = fixmatch.make(LINEAR, optax.sgd(RATE)).init(jax.random.key(0), np.zeros((1, FEATURES)))
    drawn = [fixmatch.view_keys(s) for s in (state, state._replace(step=state.step + 1))]
    assert len({tuple(k) for keys in drawn for k in np.asarray(jax.random.key_data(keys))}) == 4
    # Either augmentation is given its own key.
    noted = {}

    def noting(name):
        def augment(key, batch):
            noted[name] = np.asarray(jax.random.key_data(key))
            return batch

        return augment

    method = fixmatch.make(LINEAR, optax.sgd(RATE), weak=noting("weak"), strong=noting("strong"))
    method.step(state, streams(), reduce=identity)
    keys = np.asarray(jax.random.key_data(drawn[0]))
    np.testing.assert_array_equal([noted["weak"], noted["strong"]], keys)


# --- with SAFLEX -----------------------------------------------------------------------------


def test_saflex_that_keeps_the_prior_is_fixmatch():
    _, plain, _ = after()
    _, found, metrics = after(refiner=saflex.refiner(noise_rate=0.0, predicate=None))
    assert_close(found.params, plain.params, 1e-6)
    assert metrics["kept"][0] == metrics["kept"][1] == metrics["confident"][0] > 0


def test_saflex_sees_confident_views_alone():
    memory = dict(memory_decay=0.9, num_samples=SIZE, num_classes=CLASSES)
    rule = saflex.refiner(direction="identity", predicate=None, **memory)
    method, state, _ = after(steps=1, refiner=rule)
    batch = streams().candidates
    confident = (softmax(batch.inputs @ START).max(1) >= THRESHOLD) & batch.mask
    assert 0 < confident[batch.mask].mean() < 1
    visits = np.asarray(state.extra.refiner.memory.visits)[:SIZE]
    np.testing.assert_array_equal(visits > 0, confident)
    found = jax.jit(method.targets)(state._replace(params={"kernel": START}), streams())
    np.testing.assert_array_equal(found.weights[~confident], 0)
    np.testing.assert_allclose(np.mean(found.weights[confident]), 1, rtol=1e-6)
    # And where nothing is confident, the labelled samples alone are trained on.
    _, labelled, _ = after(threshold=0.0, unlabelled_weight=0.0)
    _, found, metrics = after(threshold=1.0, refiner=saflex.refiner(predicate=None, **memory))
    assert_close(found.params, labelled.params, 1e-6)
    assert metrics["kept"] == (0, 0)
    assert np.isfinite(jax.device_get(list(metrics.values()))).all()


# --- runners ---------------------------------------------------------------------------------


def on_devices(make_runner, axis_name=None):
    """The state after some steps, and the metrics of all of them; padding among the rows."""
    method = fixmatch.make(
        setup_.make_model(axis_name), setup_.TX, weak="shift(1)", strong="shift(3) | flip",
        refiner=saflex.refiner(direction="identity"), threshold=0.4, ema=0.5,
    )  # fmt: skip
    runner = make_runner(method.step)
    state = runner.put_state(method.init(jax.random.key(0), setup_.POOL.inputs[:2]))
    found = []
    for batch in setup_.make_batches("identity_all_augmented_padding"):
        state, metrics = runner.step(state, runner.put_batch(batch))
        found.append(jax.device_get(metrics))
    averages = {name: np.divide(*np.sum([m[name] for m in found], 0)) for name in found[0]}
    return setup_.flatten(state), averages


def test_eight_devices_agree_with_one():
    expected, metrics = on_devices(functools.partial(jit_runner, devices=jax.devices()[:1]))
    assert 0 < metrics["confident"] < 1 and 0 < metrics["kept"]
    for name, axis in {"jit": None, "pmap": "data"}.items():
        state, found = on_devices(RUNNERS[name], axis)
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=2e-6, err_msg=key)
        for key, value in metrics.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


# --- by config -------------------------------------------------------------------------------


def config(folder, **changes):
    found = config_of_fixmatch.get_config()
    small = {"model.widths": (4,), "train.steps": 4, "train.log_every": 2, "train.batch_size": 16}
    section = {"data.name": "mnist", "data.dir": str(folder), "data.val": 9, "data.train": 30}
    found.update_from_flattened_dict(
        {**small, **section, "augment": "shift(1)", "method.fixmatch.threshold": 0.4, **changes}
    )
    return found


def test_no_training_label_is_seen_and_the_validation_samples_train(tmp_path):
    images(tmp_path / "mnist")
    forget()
    made = task.make_data(config(tmp_path))
    candidates, val, clean = made.pools
    np.testing.assert_array_equal(candidates.labels, np.full((30, 3), np.float32(1 / 3)))
    for one, two in zip(val[:4], clean[:4]):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(val.labels.sum(0), [3, 3, 3])  # 9 of 3 classes
    assert not made.wrong.any()
    rows_of = lambda x: {row.tobytes() for row in np.asarray(x)}
    assert not rows_of(candidates.inputs) & rows_of(val.inputs)
    # Of the same seed with labels: the same samples.
    seen = task.make_data(config(tmp_path, **{"data.unlabelled": False})).pools
    np.testing.assert_array_equal(seen.candidates.inputs, candidates.inputs)
    assert seen.clean is None and seen.candidates.labels.max() == 1


def test_the_upstream_pipeline_is_the_weak_augmentation(tmp_path, monkeypatch):
    images(tmp_path / "mnist")
    forget()
    given = {}

    @functools.wraps(fixmatch.make)
    def make(model, tx, **options):
        given.update(options)
        return fixmatch.make(model, tx, **options)

    monkeypatch.setitem(build.METHODS, "fixmatch", make)
    section = config(tmp_path, **{"method.fixmatch.strong": "shift(2)"})
    made = task.make_data(section)
    method = build.make_method(section, made.pools)
    assert given["weak"] == "shift(1)" and given["threshold"] == 0.4
    assert isinstance(given["refiner"], Refiner)
    runner = jit_runner(build.with_upstream(section, method).step, devices=jax.devices()[:1])
    result = build.fit(section, made, method, runner, progress=False)
    assert result.state.step == 4 and 0 < result.history[-1]["confident"] <= 1


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
        fixmatch.make(LINEAR, optax.sgd(RATE), **options)


def test_rows_must_stay_and_labelled_samples_must_be_there():
    twice = lambda key, batch: jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    method = fixmatch.make(LINEAR, optax.sgd(RATE), strong=twice)
    state = method.init(jax.random.key(0), streams().candidates.inputs)
    with pytest.raises(ValueError, match="strong must keep the number of rows; it made 24 of 12"):
        method.step(state, streams(), reduce=identity)
    with pytest.raises(ValueError, match="needs labelled samples; given streams"):
        method.step(state, streams()._replace(clean=None), reduce=identity)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.unlabelled": False}, "config.data.unlabelled must be True with fixmatch; given F"),
        ({"data.train_on_val": True}, "config.data.train_on_val must be False with unlabelled=Tr"),
        ({"data.val_from": "train"}, "config.data.val_from must be '' with unlabelled=True"),
        ({"data.noise": 0.1}, "config.data.noise must be 0.0 with unlabelled=True.*given 0.1"),
        ({"data.labels": "worst"}, "config.data.labels must be '' with unlabelled=True"),
        ({"method.name": "protonet", "method.refiner": ""}, "config.data.unlabelled must be False"),
    ],
)
def test_a_config_that_would_show_labels_is_refused(tmp_path, changes, message):
    changes = {"train.batch_size": 80, "method.protonet.queries": 15, **changes}
    with pytest.raises(ValueError, match=message):
        build.check(config(tmp_path, **{"data.name": "digits", **changes}))
