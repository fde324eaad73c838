"""Prototypes over joint labels against their equations in NumPy, and the episodes they need."""

import functools

import jax
import numpy as np
import optax
import pytest

from experiments import build, task
from experiments.configs import digits
from saflex_jax import Batch, Model, Streams, parallel
from saflex_jax.data import EpisodeStream, Split, novel_classes
from saflex_jax.methods import protonet, sla
from saflex_jax.parallel import jit_runner, pmap_runner
from saflex_jax.train import make_evaluator
from tests.parallel import setup_
from tests.problems import assert_close, log_softmax

WAYS, SHOTS, QUERIES, FEATURES, SIDE = 3, 2, 3, 4, 2
OF_CLASS = SHOTS + QUERIES
ROWS = WAYS * OF_CLASS
SHAPE = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}
M = {"none": 1, "rotation": 4}
GAIN = 0.5  # of the network's features in evaluation mode
EVERY_SET = pytest.mark.parametrize("transformations", M)
EVERY_PREDICTION = pytest.mark.parametrize("predict", sla.PREDICTIONS)


# --- episodes --------------------------------------------------------------------------------

LABELS = np.random.default_rng(0).permutation(np.repeat([1, 2, 4, 7, 8], [5, 6, 7, 6, 9]))


def stream(episodes=2, seed=0, **options):
    return EpisodeStream(LABELS, **SHAPE, episodes=episodes, seed=seed, **options)


def drawn(count, **options):
    """Rows i[count, ways, shots + queries] of the first episodes."""
    rows = stream(count, **options).rows(0).candidates
    assert rows.shape == (count * ROWS,) and rows.dtype == np.int64
    return rows.reshape(count, WAYS, OF_CLASS)


def test_an_episode_is_different_rows_of_different_classes_in_order():
    for rows in drawn(100):
        assert len(np.unique(rows)) == ROWS
        of_row = LABELS[rows]
        assert (of_row == of_row[:, :1]).all() and len(np.unique(of_row[:, 0])) == WAYS


def test_every_class_and_every_row_is_drawn_alike():
    rows = drawn(4000)
    for place in range(WAYS):  # in any place of an episode
        counts = np.bincount(LABELS[rows[:, place, 0]], minlength=9)[np.unique(LABELS)]
        assert np.abs(counts / 4000 - 1 / 5).max() < 5 * np.sqrt(0.2 * 0.8 / 4000)
    size = np.bincount(LABELS)[LABELS]
    for place in range(OF_CLASS):  # as support and as query
        counts = np.bincount(rows[:, :, place].ravel(), minlength=len(LABELS))
        p = WAYS / 5 / size
        assert (np.abs(counts / 4000 - p) < 5 * np.sqrt(p * (1 - p) / 4000)).all()


def test_batch_t_is_a_function_of_the_seed_and_t():
    one, same = stream(), stream()
    expected = [next(one).candidates for _ in range(4)]
    for t in (2, 0, 3, 1):
        np.testing.assert_array_equal(same.batch(t).candidates, expected[t])
    assert len({rows.tobytes() for rows in expected}) == 4
    assert one.rows(0).val is None and one.rows(0).clean is None
    for other in (stream(seed=1), stream(purpose="test episodes")):
        assert (other.rows(0).candidates != expected[0]).any()
    # However many episodes a batch has, they are the same ones.
    singles = [stream(episodes=1).rows(g).candidates for g in range(8)]
    np.testing.assert_array_equal(np.concatenate(singles), np.concatenate(expected))


def test_a_stream_goes_on_from_its_position():
    one, other = stream(), stream()
    for _ in range(3):
        next(one)
    other.set_state(one.get_state())
    for _ in range(2):
        np.testing.assert_array_equal(next(one).candidates, next(other).candidates)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_see_the_batches_of_one(count):
    shares = [stream(4, process_index=i, process_count=count) for i in range(count)]
    for t in (0, 3):
        rows = np.concatenate([share.rows(t).candidates for share in shares])
        np.testing.assert_array_equal(rows, stream(4).rows(t).candidates)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ways": 6}, "labels must be of at least 6 classes; given 5"),
        ({"ways": 1}, "ways must be a whole number >= 2; given 1"),
        ({"shots": 0}, "shots must be a whole number >= 1; given 0"),
        ({"queries": 0}, "queries must be a whole number >= 1; given 0"),
        ({"episodes": 0}, "episodes must be a whole number >= 1; given 0"),
        ({"queries": 4}, r"labels must have 2 \+ 4 samples of every class; class 1 has 5"),
        ({"labels": LABELS / 2}, "labels must be integers"),
        ({"labels": LABELS[:0]}, "labels must be of at least 3 classes; given 0"),
        # 30 rows divide, 2 episodes do not.
        ({"process_count": 3}, "episodes must be a multiple of 3 processes; given 2"),
        ({"process_index": 1}, r"process_index must lie in \[0, 1\); given 1"),
    ],
)
def test_episodes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        EpisodeStream(**{"labels": LABELS, **SHAPE, "episodes": 2, "seed": 0, **changes})


def test_novel_classes_are_tested_on_and_nothing_else():
    places = np.random.default_rng(1).permutation(len(LABELS))
    split = Split(*np.split(places, [15, 22]))
    parts = novel_classes(split, LABELS, novel=3, num_classes=9)  # 6, 7 and 8
    for name, index in parts._asdict().items():
        wanted = [i for i in getattr(split, name) if (LABELS[i] >= 6) == (name == "test")]
        assert len(wanted) and index.tolist() == wanted
    for novel, message in (
        (1, "novel must leave at least two classes in test; 1 of 9 leave 1"),
        (7, "novel must leave at least two classes in train; 7 of 9 leave 1"),
    ):
        with pytest.raises(ValueError, match=message):
            novel_classes(split, LABELS, novel=novel, num_classes=9)


# --- a network of one linear map, and all that the equations say about it --------------------


def linear_model(pixels=SIDE * SIDE * 3) -> Model:
    kernel = np.random.default_rng(2).normal(size=(pixels, FEATURES)) / 3

    def features(params, inputs):
        return inputs.reshape(len(inputs), -1) @ params["kernel"]

    def train(params, model_state, inputs, key):
        return features(params, inputs), {"gain": model_state["gain"] + 1}

    def evaluate(params, model_state, inputs):
        return model_state["gain"] * features(params, inputs)

    def init(key, inputs):
        return {"kernel": kernel.astype(np.float32)}, {"gain": np.float32(GAIN)}

    return Model(init, train, evaluate)


def make(transformations, predict="single", model=None):
    model = linear_model() if model is None else model
    options = protonet.Options(**SHAPE, transformations=transformations, predict=predict)
    return protonet.make(model, optax.sgd(1.0), options)


def batch(episodes, seed=0):
    """Labels are not read: they are anything."""
    rng, size = np.random.default_rng(seed), episodes * ROWS
    inputs = rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32)
    labels = rng.dirichlet(np.ones(7), size).astype(np.float32)
    return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))


def by_hand(inputs, kernel, transformations):
    """-|f - p|^2 of [episode, class, row, view] and the prototypes of [class, view]."""
    count = M[transformations]
    flat = np.float64([np.rot90(image, turns) for image in inputs for turns in range(count)])
    shape = (-1, WAYS, OF_CLASS, count, FEATURES)
    f = (flat.reshape(len(flat), -1) @ kernel).reshape(shape)
    p = sum(f[:, :, s] for s in range(SHOTS)) / SHOTS
    apart = f[:, :, :, :, None, None] - p[:, None, None, None]
    return -(apart**2).sum(-1)


def loss_by_hand(inputs, kernel, transformations):
    logits = by_hand(inputs, kernel, transformations)
    log_p = log_softmax(logits.reshape(*logits.shape[:4], -1)).reshape(logits.shape)
    losses = [
        -log_p[e, w, i, j, w, j]
        for e in range(len(log_p))
        for w in range(WAYS)
        for i in range(SHOTS, OF_CLASS)
        for j in range(M[transformations])
    ]
    return sum(losses) / len(losses)


def predicted_by_hand(inputs, kernel, transformations, predict):
    logits = by_hand(inputs, kernel, transformations)
    js = [0] if predict == "single" else range(M[transformations])
    return sum(logits[:, :, :, j, :, j] for j in js).reshape(-1, WAYS) / len(js)


EPISODES = 2


def padded(garbage):
    """Batch of EPISODES and one of padding."""
    more = batch(EPISODES + 1)
    mask = more.index < EPISODES * ROWS
    inputs = np.where(mask[:, None, None, None], more.inputs, np.float32(garbage))
    return more._replace(inputs=inputs, mask=mask)


@functools.cache
def compiled(transformations):
    """The state at step 0, and a step."""
    method = make(transformations)
    return method.init(jax.random.key(0), batch(1).inputs), jax.jit(method.step)


@EVERY_SET
def test_a_step_descends_the_mean_over_all_views_of_queries(transformations):
    candidates = padded(1e3)
    state, step = compiled(transformations)
    new, metrics = step(state, Streams(candidates))
    kernel = np.float64(state.params["kernel"])
    inputs = candidates.inputs[candidates.mask]
    value = functools.partial(loss_by_hand, inputs, transformations=transformations)
    assert_close(metrics["loss"][0], value(kernel))
    count = EPISODES * WAYS * QUERIES * M[transformations]
    assert_close(metrics["candidate_loss"], (count * value(kernel), np.float64(count)))
    # By central differences: so through the prototypes, and thus of the support samples, too.
    slope = np.zeros_like(kernel)
    for place in np.ndindex(kernel.shape):
        shift = np.zeros_like(kernel)
        shift[place] = 1e-5
        slope[place] = (value(kernel + shift) - value(kernel - shift)) / 2e-5
    assert_close(new.params["kernel"], kernel - slope)
    assert new.model_state["gain"] == GAIN + 1 and new.step == 1


def test_padding_is_whole_episodes_and_changes_nothing():
    state, step = compiled("rotation")
    (expected, of_zeros), (new, metrics) = (step(state, Streams(padded(x))) for x in (0, -1e3))
    np.testing.assert_array_equal(new.params["kernel"], expected.params["kernel"])
    for name in ("loss", "candidate_loss"):
        assert metrics[name] == of_zeros[name]


INPUTS = batch(3).inputs


@functools.cache
def predictions(transformations):
    """Of INPUTS at step 0, by name, and the kernel there."""
    methods = {p: make(transformations, p) for p in sla.PREDICTIONS}
    state = methods["single"].init(jax.random.key(0), INPUTS[:1])
    predict = jax.jit(lambda state: {p: m.predict(state, INPUTS) for p, m in methods.items()})
    return predict(state), state.params["kernel"]


@EVERY_SET
@EVERY_PREDICTION
def test_predictions_are_of_all_rows_and_their_own_episode(transformations, predict):
    logits, kernel = predictions(transformations)
    expected = predicted_by_hand(INPUTS, GAIN * np.float64(kernel), transformations, predict)
    assert_close(logits[predict], expected)


def test_one_view_is_both_predictions_exactly():
    logits, _ = predictions("none")
    np.testing.assert_array_equal(*logits.values())


def test_a_view_passes_the_network_once():
    calls, model = [], linear_model()

    def counted(function):
        def run(params, model_state, inputs, *key):
            calls.append(len(inputs))
            return function(params, model_state, inputs, *key)

        return run

    model = model._replace(train=counted(model.train), logits=counted(model.logits))
    candidates = batch(2)
    for predict, rows in ("single", 2 * ROWS), ("aggregated", 8 * ROWS):
        method = make("rotation", predict, model)
        state = method.init(jax.random.key(0), candidates.inputs[:1])
        jax.eval_shape(method.step, state, Streams(candidates))
        jax.eval_shape(method.predict, state, candidates.inputs)
        assert calls == [8 * ROWS, rows]
        calls.clear()


# --- runners ---------------------------------------------------------------------------------


@functools.cache
def method_and_state():
    options = protonet.Options(**SHAPE, transformations="rotation")
    method = protonet.make(linear_model(), optax.sgd(0.01, momentum=0.9), options)
    return method, method.init(jax.random.key(0), batch(1).inputs)


def run(make_runner, devices):
    method, state = method_and_state()
    runner = make_runner(method.step, devices=jax.devices()[:devices])
    state = runner.put_state(state)
    for seed in range(3):
        candidates = batch(8, seed)  # the last device has padding alone
        candidates = candidates._replace(mask=candidates.index < 7 * ROWS)
        state, metrics = runner.step(state, runner.put_batch(Streams(candidates)))
    averages = {f"metrics/{name}": np.divide(*pair) for name, pair in metrics.items()}
    return setup_.flatten((state, averages))


@functools.cache
def on_one_device():
    return run(jit_runner, 1)


@pytest.mark.parametrize("make_runner", [jit_runner, pmap_runner])
def test_eight_devices_agree_with_one(make_runner):
    assert jax.device_count() == 8
    expected, on_eight = on_one_device(), run(make_runner, 8)
    assert expected.keys() == on_eight.keys()
    for name, value in expected.items():
        tol = setup_.ROUNDING if np.issubdtype(value.dtype, np.floating) else 0
        np.testing.assert_allclose(on_eight[name], value, rtol=0, atol=tol, err_msg=name)


def test_devices_hold_whole_episodes():
    method, state = method_and_state()
    runner = pmap_runner(method.step, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"whole episodes .*, on every device; given 7"):
        half = jax.tree.map(lambda x: x[:14], batch(1))
        runner.step(runner.put_state(state), runner.put_batch(Streams(half)))


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ways": 1}, "ways must be a whole number >= 2; given 1"),
        ({"shots": 0}, "shots must be a whole number >= 1; given 0"),
        ({"queries": 0}, "queries must be a whole number >= 1; given 0"),
        ({"transformations": "rotate"}, "transformations must be .*; did you mean 'rotation'"),
        ({"predict": "aggregate"}, "predict must be one of .*; did you mean 'aggregated'"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        protonet.Options(**options)


def test_malformed_batches_are_refused():
    method, candidates = make("none"), batch(2)
    state = method.init(jax.random.key(0), candidates.inputs[:1])
    part = jax.tree.map(lambda x: x[:-1], candidates)
    message = r"rows must be whole episodes of 3 x \(2 \+ 3\), on every device; given 29"
    for function, *args in (
        (method.step, state, Streams(part)),
        (method.predict, state, part.inputs),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(function, *args)
    with pytest.raises(ValueError, match="protonet trains on candidates alone"):
        method.step(state, Streams(candidates, clean=candidates))
    wrong = linear_model()._replace(logits=lambda *_: {"class": np.ones((30, 4))})
    with pytest.raises(ValueError, match=r"model must give features f32\[B, D\]; given {'class'"):
        make("none", model=wrong).predict(state, candidates.inputs)


# --- by config -------------------------------------------------------------------------------


def config(**changes):
    config = digits.get_config()
    config.method.name, config.method.rule = "protonet", "as_given"
    shape = {f"method.protonet.{name}": value for name, value in SHAPE.items()}
    data = {"data.noise": 0.0, "data.novel": 4, "data.test": 400, "data.val": 50}
    config.update_from_flattened_dict({**shape, **data, "train.batch_size": 4 * ROWS, **changes})
    return config


@functools.cache
def task_data():
    build.check(config())
    return task.make_data(config())


def classes_of(inputs):
    """The right classes, by the pixels."""
    source = task_data().source
    known = {x.tobytes(): y for x, y in zip(source.inputs, source.labels)}
    return np.array([known[x.tobytes()] for x in inputs])


def test_training_and_validation_see_no_novel_class_and_testing_no_other():
    data = task_data()
    for pool in data.pools[:2]:
        classes = classes_of(pool.inputs)
        assert set(classes) == {0, 1, 2, 3, 4, 5}
        np.testing.assert_array_equal(pool.labels, np.eye(10)[classes])
    assert set(classes_of(data.test.inputs)) == {6, 7, 8, 9}


def test_what_is_tested_on_are_episodes_of_queries():
    test, together = task_data().test, task_data().together
    assert together == ROWS and len(test.mask) == task.TEST_EPISODES * ROWS
    episodes = classes_of(test.inputs).reshape(-1, WAYS, OF_CLASS)
    for labels in episodes:
        assert (labels == labels[:, :1]).all() and len(set(labels[:, 0])) == WAYS
    assert len({labels.tobytes() for labels in episodes}) == 4 * 3 * 2  # all there are
    local = np.broadcast_to(np.arange(WAYS)[:, None], episodes.shape)
    np.testing.assert_array_equal(test.labels, np.eye(WAYS)[local.ravel()])
    mask = test.mask.reshape(-1, OF_CLASS)
    assert not mask[:, :SHOTS].any() and mask[:, SHOTS:].all()
    for seed, same in ((0, True), (1, False)):  # of another split, and other classes in turn
        again = task.make_data(config(seed=seed)).test.inputs
        assert np.array_equal(again, test.inputs) == same
        assert np.array_equal(classes_of(again), episodes.ravel()) == same


@EVERY_PREDICTION
def test_scores_are_of_the_queries_in_their_episodes(predict, monkeypatch):
    monkeypatch.setattr(task, "EVALUATED", 3 * ROWS - 1)  # so the last of 7 batches is padded
    few = jax.tree.map(lambda x: x[: 13 * ROWS], task_data().test)
    method = make("rotation", predict, linear_model(64))
    state = method.init(jax.random.key(0), few.inputs[:1])
    scores = task.test_scores(method, state, task_data()._replace(test=few))
    kernel = GAIN * np.float64(state.params["kernel"])
    logits = predicted_by_hand(few.inputs, kernel, "rotation", predict)
    logits = logits.reshape(-1, OF_CLASS, WAYS)
    queries = logits[:, SHOTS:].reshape(-1, WAYS)
    truth = np.tile(np.repeat(np.arange(WAYS), QUERIES), 13)
    assert scores["accuracy"] == pytest.approx((queries.argmax(1) == truth).mean(), abs=1e-12)
    assert 0.4 < scores["accuracy"] < 1
    expected = -log_softmax(queries)[np.arange(len(truth)), truth].mean()
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_masks_everything_is_refused():
    method, test = make("none", model=linear_model(64)), task_data().test
    for mask, message in (
        (np.zeros(len(test.mask), bool), "at least one sample to evaluate on; given 0"),
        (test.mask[:-1], r"mask must have shape \[6000\]; given \(5999,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make_evaluator(method, test.inputs, test.labels, mask=mask)


def test_batches_are_episodes_on_the_device_and_from_the_host():
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    held, rows = build.make_input(config(), task_data(), runner)
    plain, samples = build.make_input(config(**{"data.on_device": False}), task_data(), runner)
    assert held is not runner and plain is runner
    for _ in range(2):
        index, sample = next(rows), next(samples)
        assert index.val is None and sample.val is None
        np.testing.assert_array_equal(sample.candidates.index, index.candidates)
        of_row = classes_of(np.asarray(sample.candidates.inputs)).reshape(4, WAYS, OF_CLASS)
        assert (of_row == of_row[:, :, :1]).all()


def test_testing_and_training_draw_independently_of_one_seed():
    rows = np.arange(len(LABELS), dtype=np.int32)
    pool = Batch(rows, np.eye(9, dtype=np.float32)[LABELS], rows >= 0, rows)
    tested, together = task.in_episodes(pool, **SHAPE, seed=0)
    assert together == ROWS
    trained = drawn(task.TEST_EPISODES).ravel()
    assert (tested.index == tested.inputs).all() and (tested.index == trained).mean() < 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method.name": "supervised"}, "config.data.novel must be 0 with supervised, .*given 4"),
        (
            {"train.batch_size": 64},
            r"batch_size must be a multiple of .*, 3 x \(2 \+ 3\); given 64",
        ),
        ({"method.protonet.shots": 0}, "config.method.protonet: shots must be a whole number >= 1"),
        ({"model.cosine": True}, "config.model.cosine must be False with protonet"),
        ({"method.loss": "ldam"}, "config.method.loss must be 'cross_entropy' with protonet"),
        ({"method.rule": "saflex"}, "config.method.rule must be 'as_given' with protonet"),
        ({"data.pool": "tests", "data.on_device": False}, "config.data.pool must be '' with proto"),
        ({"data.noise": 0.1}, "config.data.novel must be 0 with other labels"),
        ({"data.novel": -1}, "config.data.novel must be a whole number >= 0; given -1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build.check(config(**changes))


def test_data_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least two classes in train; 9 of 10 leave 1"):
        task.make_data(config(**{"data.novel": 9}))
    with pytest.raises(ValueError, match="classes without order for protonet; digits is ordinal"):
        task.make_data(config(**{"data.task": "ordinal"}))
