"""What is written as a feature set is read back."""

import json

import numpy as np
import pytest

from saflex_jax import data
from saflex_jax.data import features

N, V, D = 7, 3, 4
SEEN, TESTED = np.array([0, 2, 3, 6]), np.array([5, 1])
SOURCE = data.Source(
    np.zeros((N, 2, 2, 1), np.uint8),
    np.array([0, 1, 1, 0, 1, 0, 1]),
    2,
    "ordinal",
    splits={"train": np.array([0, 3, 6]), "val": np.array([2]), "test": np.array([5, 1])},
    extra={"cell": 10 * np.arange(N)},
    class_names=("no", "yes"),
)


@pytest.fixture
def folder(tmp_path):
    features.create(
        tmp_path / "set", SOURCE, seen=SEEN, tested=TESTED, shape=(V, D, 2),
        operations=("identity", "flip"), options={"size": 96},
    )  # fmt: skip
    arrays = features.writable(tmp_path / "set")
    rng = np.random.default_rng(0)
    arrays["views"][:] = rng.normal(size=(4, V, D))
    arrays["tested"][:] = rng.normal(size=(2, D))
    arrays["prints"][:] = data.fingerprints(np.arange(6), chunk=6)
    arrays["operation"][:, 1] = 1
    arrays["magnitude"][:, 1, 0] = 0.5
    return tmp_path / "set"


def test_every_row_keeps_what_belongs_to_it(folder):
    found, arrays = data.from_features(folder), features.writable(folder)
    source, rows = found.source, np.concatenate([SEEN, TESTED])
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(source.labels, SOURCE.labels[rows])
    np.testing.assert_array_equal(source.extra["cell"], SOURCE.extra["cell"][rows])
    for name, places in SOURCE.splits.items():  # in the order of the data set's split
        np.testing.assert_array_equal(found.rows[source.splits[name]], places)
    assert (source.num_classes, source.task, source.class_names) == (2, "ordinal", ("no", "yes"))
    np.testing.assert_array_equal(source.views, arrays["views"])
    everything = np.concatenate([arrays["views"][:, 0], arrays["tested"]])
    np.testing.assert_array_equal(source.inputs[:], everything)
    np.testing.assert_array_equal(source.inputs[[5, 0]], everything[[5, 0]])
    assert isinstance(source.views, np.memmap)
    assert found.operations[found.trace.operation[0, 1, 0]] == "flip"
    assert found.trace.magnitude[3, 1].tolist() == [0.5, 0]
    assert len(np.unique(found.prints)) == 6 and found.options == {"size": 96}


def test_a_set_without_an_official_test_split(tmp_path):
    source = SOURCE._replace(splits={})
    features.create(
        tmp_path, source, seen=np.arange(N), tested=np.arange(0), shape=(V, D, 1),
        operations=("identity",), options={},
    )  # fmt: skip
    found = data.from_features(tmp_path).source
    assert found.inputs[:].shape == (N, D) and found.splits == {}


def test_the_scale_is_that_of_the_training_rows(folder):
    source = data.from_features(folder).source
    train = np.array([0, 2, 3])
    own = np.float64(source.views[train, 0])
    scale = data.fit_scale(source.inputs[train])
    expected = (np.float64(source.views) - own.mean(0)) / own.std(0)
    np.testing.assert_allclose(scale(source.views)[:], expected, rtol=1e-4, atol=1e-5)
    scaled = scale(source.inputs)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[train].std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(data.fit_scale(np.ones((3, 2)))(np.zeros((1, 2)))[:], [[-1, -1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_scale_is_exact_whatever_the_mean_and_a_constant_is_shifted_only(dtype, monkeypatch):
    monkeypatch.setattr(features, "AT_A_TIME", 64)  # in many parts
    rng = np.random.default_rng(0)
    values = rng.normal([0, 100, 1e4], [1, 0.1, 1], (5000, 3)).astype(dtype)
    values = np.hstack([values, np.full((5000, 1), 0.1, dtype)])
    exact = values.astype(np.float64)
    expected = (exact - exact.mean(0)) / np.where([1, 1, 1, 0], exact.std(0), 1)
    expected[:, 3] = 0
    found = data.fit_scale(values)(values)[:]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[:, 3], 0)
    np.testing.assert_array_equal(data.fit_scale(values)(exact[None] + 1)[0][:, 3], 1)
    with pytest.raises(ValueError, match="values must have at least one row"):
        data.fit_scale(values[:0])


def test_what_is_no_feature_set_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"must be a feature set; .saflex features"):
        data.from_features(tmp_path / "other")
    about = folder / features.DESCRIPTION
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"format must be one of \['1'\]; given '2'"):
        data.from_features(folder)
