"""What scikit-learn fits: the laws of each estimator, what it is given, and the arm's record."""

import numpy as np
import pytest
from sklearn import linear_model, metrics, preprocessing

from experiments import arms, build, estimators, suite, task
from experiments.configs import digits, wdbc
from experiments.estimators import BoostedTrees, Logistic
from saflex_jax import data as sets
from saflex_jax.types import Batch, Streams


def config(model="logistic", base=wdbc, **changes):
    """A config whose model scikit-learn fits."""
    found = base.get_config()
    found.method.rule = "as_given"
    found.model = {"name": model}
    found.update_from_flattened_dict(changes)
    return found


def made_data(inputs, labels, held_out=None, columns=None, classes=None):
    """Data of these samples, which are the test split, too."""
    classes = classes or labels.max() + 1

    def pool(x, y):
        return Batch(
            x, np.eye(classes, dtype=np.float32)[y], np.ones(len(y), bool), np.arange(len(y))
        )

    candidates, held_out = pool(inputs, labels), pool(*(held_out or (inputs, labels)))
    source = sets.Source(None, labels, classes, columns=columns)
    return task.Data(
        Streams(candidates, held_out), held_out, candidates, 1, labels, labels < 0, source, {}, None
    )


def blobs(seed=0, size=240, classes=3, dims=4, spread=1.5):
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    centres = np.random.default_rng(9).normal(size=(classes, dims))
    return np.float32(centres[labels] + spread * rng.normal(size=(size, dims))), labels


NUMBERS = np.zeros(4, bool)


# --- logistic regression ---------------------------------------------------------------------


def test_logistic_regression_is_at_its_minimum():
    x, y = blobs()
    predict = Logistic(C=0.3).fit(x, y, None, NUMBERS, 0)
    # Of the intercepts, which nothing shrinks: expected counts are the classes' own.
    np.testing.assert_allclose(predict(x).sum(0), np.bincount(y), atol=0.05)
    # Of the weights: W = C sum_i (onehot_i - p_i) x_i, read off from the predictions themselves.
    z = (x - x.mean(0)) / x.std(0)
    weights = 0.3 * (np.eye(3)[y] - predict(x)).T @ z
    logits = np.log(predict(x))
    logits = logits - logits.mean(1, keepdims=True)
    found = np.linalg.lstsq(np.hstack([z, np.ones((len(z), 1))]), logits, rcond=None)[0][:-1].T
    np.testing.assert_allclose(found, weights, atol=2e-3)


def test_a_columns_scale_does_not_matter_and_shrinking_ends_at_the_classes_shares():
    x, y = blobs(size=200)
    y[:30] = 0
    scaled = x * np.float32([1, 100, 0.01, 7]) + np.float32([0, 5, -3, 1])
    one, other = (Logistic().fit(each, y, None, NUMBERS, 0)(each) for each in (x, scaled))
    np.testing.assert_allclose(one, other, atol=1e-3)
    shrunk = Logistic(C=1e-5).fit(x, y, None, NUMBERS, 0)(x)
    np.testing.assert_allclose(shrunk, np.tile(np.bincount(y) / len(y), (len(y), 1)), atol=1e-3)


def test_categories_are_indicators_and_a_missing_or_new_one_is_none_of_them():
    rng = np.random.default_rng(0)
    codes, number = rng.integers(-1, 3, (300, 1)), rng.normal(size=(300, 1))
    y = ((codes[:, 0] == 1) ^ (number[:, 0] > 1)).astype(int)
    x, kinds = np.float32(np.hstack([codes, number])), np.array([True, False])
    predict = Logistic().fit(x, y, None, kinds, 0)
    by_hand = np.hstack([number, codes == [[0, 1, 2]]]).astype(np.float32)
    scaler = preprocessing.StandardScaler().fit(by_hand)
    model = linear_model.LogisticRegression().fit(scaler.transform(by_hand), y)
    expected = model.predict_proba(scaler.transform(by_hand))
    np.testing.assert_allclose(predict(x), expected, atol=1e-3)
    np.testing.assert_array_equal(*(predict(np.float32([[code, 0.5]])) for code in (-1, 7)))


# --- boosted trees ---------------------------------------------------------------------------


def test_held_out_samples_choose_the_number_of_trees():
    x, y = blobs()
    held_out = blobs(seed=1)
    chosen = BoostedTrees(iterations=8, learning_rate=0.5).fit(x, y, held_out, NUMBERS, 0)

    def of(number):
        return BoostedTrees(iterations=number, learning_rate=0.5).fit(x, y, None, NUMBERS, 0)

    losses = [metrics.log_loss(held_out[1], of(n)(held_out[0])) for n in range(1, 9)]
    best = 1 + int(np.argmin(losses))
    assert 1 < best < 8
    np.testing.assert_allclose(chosen(x), of(best)(x), atol=1e-12)


def test_trees_split_categories_as_categories():
    # Of eight codes the odd ones are a class: one split of a category, seven of a number.
    codes = np.float32(np.arange(400) % 8)[:, None]
    y = (codes[:, 0] % 2).astype(int)
    found = {}
    for kinds in (True, False):
        trees = BoostedTrees(iterations=1, leaves=2)
        predict = trees.fit(codes, y, None, np.array([kinds]), 0)
        found[kinds] = (predict(codes).argmax(1) == y).mean()
    assert found[True] == 1 and found[False] < 0.7


# --- what is fitted --------------------------------------------------------------------------


def accuracy(config, data):
    (record,) = estimators.run({"x": config}, data, arms.tested).values()
    return record["test_accuracy"]


@pytest.mark.parametrize("model", estimators.ESTIMATORS)
def test_images_views_soft_labels_and_a_class_without_candidates(model):
    x, y = blobs(spread=0.1)
    found = config(model)
    assert accuracy(found, made_data(x, y)) == 1
    levels = np.uint8(np.clip(128 + 20 * x, 0, 255)).reshape(-1, 2, 2, 1)
    assert accuracy(found, made_data(levels, y)) == 1
    views = np.stack([x, np.roll(x, 1, 0)], 1)  # the second view has another class
    assert accuracy(found, made_data(views, y)) == 1
    data = made_data(x, y, classes=5)
    soft = 0.6 * data.pools.candidates.labels + 0.08
    pools = data.pools._replace(candidates=data.pools.candidates._replace(labels=soft))
    predict = estimators.fit(found, data._replace(pools=pools))
    p = predict(data.test)
    assert p.shape == (len(y), 5) and (p.argmax(1) == y).all()
    assert (p > 0).all() and (p[:, 3:] < 1e-30).all()


def test_a_table_with_categories():
    rng = np.random.default_rng(0)
    codes, number = rng.integers(0, 3, (200, 1)), rng.normal(size=(200, 1))
    inputs = {"numeric": np.float32(number), "categorical": codes.astype(np.int32)}
    columns = (sets.Column("x", None), sets.Column("kind", ("a", "b", "c")))
    data = made_data(inputs, (codes[:, 0] == 1).astype(int), columns=columns)
    for model in estimators.ESTIMATORS:
        assert accuracy(config(model), data) == 1


def test_what_trains_and_what_stops_goes_by_the_config(monkeypatch):
    seen = []

    def fit(self, x, y, held_out, categorical, seed):
        seen.append((x, y, None if held_out is None else held_out[0]))
        return Logistic().fit(x, y, None, categorical, seed)

    monkeypatch.setattr(BoostedTrees, "fit", fit)
    for section in ({}, {"train_on_val": True}, {"trusted_only": True}):
        found = config("boosted_trees")
        found.data.update(section)
        estimators.fit(found, task.make_data(found))
    (plain, _, stops), (both, _, none), (trusted, labels, nothing) = seen
    assert none is None and nothing is None
    np.testing.assert_array_equal(both, np.concatenate([plain, stops]))
    np.testing.assert_array_equal(trusted, stops)  # once, though a batch of 64 has more rows
    right = config("boosted_trees", **{"data.noise": 0.0})
    np.testing.assert_array_equal(labels, task.make_data(right).held_out.labels.argmax(1))


# --- the arm ---------------------------------------------------------------------------------


def test_an_arm_has_a_record_like_a_networks():
    found = config(base=digits, **{"data.train_on_val": True})
    found.arms = {
        "network": {},
        "fitted": {"model": {"name": "logistic", "C": 0.01}},
        "again": {"model": {"C": 0.01, "name": "logistic"}, "augment": "flip"},
    }
    configs = arms.configs(found)
    assert configs["fitted"].model.to_dict() == {"name": "logistic", "C": 0.01}
    hashes = {suite.settings_hash(c) for c in configs.values()}
    assert len(hashes) == 3
    (record,) = arms.run(
        {"fitted": configs["fitted"]}, {}, progress=False, measure=suite.measured
    ).values()
    data = task.make_data(configs["fitted"])
    x, y = (data.pools.candidates.inputs.reshape(-1, 64), data.pools.candidates.labels.argmax(1))
    scaler = preprocessing.StandardScaler().fit(x)
    model = linear_model.LogisticRegression(C=0.01, max_iter=1000).fit(scaler.transform(x), y)
    for split, batch in (("val", data.held_out), ("test", data.test)):
        p = model.predict_proba(scaler.transform(batch.inputs.reshape(-1, 64)))
        for name, value in suite.scores(p, batch.labels).items():
            assert record[f"{split}_{name}"] == pytest.approx(value, abs=2e-3)
    assert record["seconds_per_step"] is None and record["history"] == []
    assert record["seconds"] > 0
    # A pipeline never reaches it.
    again = arms.run({"again": configs["again"]}, {}, progress=False, measure=suite.measured)
    same = {"val_accuracy", "test_accuracy", "test_loss", "test_ece"}
    assert {k: again["again"][k] for k in same} == {k: record[k] for k in same}


def test_a_summary_of_what_takes_no_steps():
    steps = {"test_accuracy": 0.5, "seconds_per_step": 0.01}
    runs = {"network": [steps], "fitted": [steps | {"seconds_per_step": None}]}
    for base in runs:
        found = arms.summary({base: runs[base], **runs})
        assert found["fitted"]["step_cost"] is None is found["fitted"]["seconds_per_step"]
        assert found["network"]["step_cost"] == (1 if base == "network" else None)
        lines = arms.table(found, "test_accuracy").splitlines()
        (fitted,) = (line for line in lines if line.startswith("fitted"))
        assert fitted.count("0.5000") == 1 and "None" not in fitted and not fitted.endswith("x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": {"rule": "saflex"}}, "method.rule must be 'as_given' with logistic; given 's"),
        ({"method": {"name": "sla"}}, "method.name must be 'supervised' with logistic"),
        ({"data": {"train_on_val": True, "folds": 5}}, "data.folds must be 0 with logistic"),
        ({"data": {"unlabelled": True, "noise": 0.0}}, "data.unlabelled must be False"),
        ({"model": {"name": "logistic", "c": 1.0}}, "model has no field 'c'.*known fields: .'C'"),
        ({"model": {"name": "logistic", "C": 0.0}}, "model: C must be positive and finite; given"),
        *(
            ({"model": {"name": "boosted_trees", field: 0}}, f"model: {field} must .*; given 0")
            for field in ("iterations", "leaves", "learning_rate")
        ),
    ],
)
def test_what_an_estimator_cannot_do_is_refused(changes, message):
    found = config()
    with found.unlocked():
        found.update(changes)
    with pytest.raises(ValueError, match=f"config.{message}"):
        build.check(found)


def test_several_labels_at_once_are_refused():
    data = made_data(*blobs())
    data = data._replace(source=data.source._replace(task="multilabel"))
    with pytest.raises(ValueError, match="name must be of classes for logistic; wdbc has several"):
        estimators.run({"x": config()}, data, arms.tested)
