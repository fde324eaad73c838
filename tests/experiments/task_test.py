"""What a config's `data` section makes, and that every kind of it trains."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn import metrics

from experiments import build, task
from experiments.configs import digits, sources
from saflex_jax import data, parallel
from saflex_jax.data import Rows, write_array_record
from tests.data.files_ import Tiny, prepared, save

SIDE = 12


def config(name, *, steps=60, **section):
    found = digits.get_config()
    found.data = sources.section(str(name), **section)
    found.update_from_flattened_dict(
        {
            "augment": "flip(0.5)",
            "method.saflex.scoring.direction": "identity",  # quicker to compile
            "optimizer.learning_rate": 0.04,
            "model.widths": (16,),
            "train.steps": steps,
            "train.log_every": steps // 2,
            "train.batch_size": 32,
        }
    )
    return found


def trained(config):
    """(the data, the last state's scores on the test split)."""
    build.check(config)
    made = task.make_data(config)
    method = build.make_method(config, made.pools, made.source.columns)
    step = build.with_upstream(config, method).step
    runner = parallel.RUNNERS[config.runner](step, devices=jax.devices()[:1])
    result = build.fit(config, made, method, runner, progress=False)
    return made, task.test_scores(method, result.state, made)


def forget():
    """Files were changed since they were read."""
    task.opened.cache_clear(), task.task_source.cache_clear()


# --- MedMNIST's format -----------------------------------------------------------------------

SIZES = {"train": 160, "val": 32, "test": 64}


def striped(where, rng, channels):
    """Noise, and in a quarter of its own one of four patterns for every entry of where: bool[n, 4].

    A network that averages over places tells the patterns apart, not the quarters.
    """
    images = rng.integers(0, 60, (len(where), SIDE, SIDE, channels))
    half = SIDE // 2
    row, column = np.indices((half, half))
    patterns = row % 2, column % 2, (row + column) % 2, np.ones((half, half), int)
    corners = (0, 0), (0, half), (half, 0), (half, half)
    for kind, ((top, left), pattern) in enumerate(zip(corners, patterns)):
        shown = 180 * pattern[..., None]
        images[where[:, kind], top : top + half, left : left + half] += shown
    return images.astype(np.uint8)


def medmnist(path, kind, channels):
    rng, arrays = np.random.default_rng(0), {}
    for split, size in SIZES.items():
        if kind == "multilabel":
            labels = rng.random((size, 4)) < 0.4
            where = labels
        elif kind == "multiclass":
            labels = rng.integers(0, 4, (size, 1))
            where = labels == np.arange(4)
        else:  # ordinal: the more patterns, the higher the grade
            labels = rng.integers(0, 5, (size, 1))
            where = np.arange(4) < labels
        images = striped(where, rng, channels)
        arrays[f"{split}_images"] = images[..., 0] if channels == 1 else images
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize(
    "kind, channels, on_device, rule",
    [
        ("multiclass", 3, True, "as_given"),
        ("multiclass", 1, False, "as_given"),
        ("multilabel", 1, True, "saflex"),
        ("ordinal", 3, False, "as_given"),
    ],
)
def test_every_kind_of_medmnist_file_trains_end_to_end(tmp_path, kind, channels, on_device, rule):
    arrays = medmnist(tmp_path / "x.npz", kind, channels)
    options = {"task": "ordinal" if kind == "ordinal" else "", "on_device": on_device}
    found = config(tmp_path / "x.npz", **options)
    found.method.rule = rule
    made, scores = trained(found)
    assert made.pools.candidates.inputs.shape == (160, SIDE, SIDE, channels)
    np.testing.assert_array_equal(
        made.test.inputs, arrays["test_images"].reshape(64, SIDE, SIDE, channels)
    )
    if kind == "multilabel":
        assert scores.keys() == {"auc", "loss"} and scores["auc"] > 0.8
        assert made.pools.val.labels.shape == (32, 5)
    elif kind == "ordinal":
        assert scores["kappa"] > 0.7
    else:
        assert scores.keys() == {"accuracy", "loss"} and scores["accuracy"] > 0.8


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    """Arrays of a file, its data, a method and its first state."""
    path = tmp_path_factory.mktemp("medmnist") / "x.npz"
    arrays, found = medmnist(path, "multilabel", 1), config(path, steps=2)
    made = task.make_data(found)
    method = build.make_method(found, made.pools)
    return arrays, made, method, build.init_state(found, method, made.pools)


def test_measures_are_those_of_the_raw_labels(multilabel):
    # The area under the curve and kappa, from probabilities worked out apart.
    arrays, made, method, state = multilabel
    logits = np.asarray(method.predict(state, made.test.inputs / np.float32(255)))
    truth = np.column_stack([arrays["test_labels"], ~arrays["test_labels"].any(1)])
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.mean([metrics.roc_auc_score(truth[:, k], odds[:, k]) for k in range(5)])
    assert task.test_scores(method, state, made)["auc"] == pytest.approx(expected, abs=1e-6)
    graded = made._replace(source=made.source._replace(task="ordinal"))
    kappa = metrics.cohen_kappa_score(
        made.test.labels.argmax(1), odds.argmax(1), weights="quadratic"
    )
    assert task.test_scores(method, state, graded)["kappa"] == pytest.approx(kappa)


def test_a_label_that_all_or_none_has_has_no_area_under_the_curve(multilabel):
    _, made, method, state = multilabel
    first = made.test.labels[:, 0] > 0
    for rows in (first, ~first):  # all have the first label, or nobody
        test = jax.tree.map(lambda x, rows=rows: x[rows], made.test)
        assert 0 <= task.test_scores(method, state, made._replace(test=test))["auc"] <= 1


# --- splits ----------------------------------------------------------------------------------


def images(folder, size=60, classes=3, side=4, seed=0, **arrays):
    """A prepared data set whose images name their row, the official test split at its end."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, side, side, 1), dtype=np.uint8)
    labels = np.arange(size) % classes
    about = {
        "num_classes": classes,
        "class_names": [],
        "splits": {"train": [0, 45], "test": [45, size]},
    }
    prepared(folder, name=folder.name, **about)
    arrays = {"inputs": pixels, "labels": labels} | {f"extra_{k}": v for k, v in arrays.items()}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return pixels, labels


def test_official_splits_and_what_is_held_out(tmp_path):
    pixels, labels = images(tmp_path / "mnist")
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    np.testing.assert_array_equal(made.test.inputs, pixels[45:])
    np.testing.assert_array_equal(made.test.labels.argmax(1), labels[45:])
    assert np.bincount(made.pools.val.labels.argmax(1)).tolist() == [3, 3, 3]
    both = np.concatenate([made.pools.candidates.inputs, made.pools.val.inputs])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in pixels[:45]}
    again = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    np.testing.assert_array_equal(again.pools.val.inputs, made.pools.val.inputs)
    own = task.make_data(config("mnist", dir=str(tmp_path), val=9, test=6))
    assert len(own.test.labels) == 6 and len(own.pools.candidates.labels) == 30


def test_a_set_that_tfds_prepared(tmp_path):
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    section = config("tfds:tiny", dir=str(tmp_path), val=4)
    task.check(section.data)
    made = task.make_data(section)
    assert len(made.test.labels) == 9 and len(made.pools.candidates.labels) == 16
    numbers = made.test.inputs[:, 0, 0, 0]
    np.testing.assert_array_equal(made.test.labels.argmax(1), numbers % 3)


def test_strata_of_labels_that_are_no_classes():
    several = data.Source(None, np.array([[0, 0], [1, 0], [1, 1]]), 3, "multilabel")
    assert task.strata(several).tolist() == [0, 1, 1]
    graded = data.Source(None, np.array([[0.2, 0.1, 0.7], [0.1, 0.6, 0.3]]), 3)
    assert task.strata(graded).tolist() == [2, 1]


def test_val_and_test_come_from_the_rows_that_would_train():
    labels = np.arange(60) % 3
    source = data.Source(None, labels, 3, splits={"train": np.arange(15, 60)})
    section = ConfigDict(sources.section("x", val=9, test=12))
    parts = task.make_split(section, source, seed=0)
    assert [len(rows) for rows in parts] == [24, 9, 12]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(15, 60))


def test_copies_of_test_samples_do_not_train(tmp_path):
    pixels, _ = images(tmp_path / "mnist")
    pixels[[3, 4, 5]] = pixels[[50, 50, 51]]
    np.save(tmp_path / "mnist" / "inputs.npy", pixels)
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    used = np.concatenate([made.pools.candidates.inputs, made.pools.val.inputs])
    assert len(used) == 42 and sum(made.removed.values()) == 3
    assert not {x.tobytes() for x in used} & {x.tobytes() for x in made.test.inputs}


def test_few_shot(tmp_path):
    images(tmp_path / "mnist")
    section = {"dir": str(tmp_path), "val": 9, "per_class": 4}
    made = task.make_data(config("mnist", **section))
    assert np.bincount(made.pools.candidates.labels.argmax(1)).tolist() == [4, 4, 4]
    assert made.pools.candidates.index.tolist() == list(range(12))


@pytest.mark.parametrize("per_class, sizes", [(0, [12, 6, 3]), (8, [8, 4, 2])])
def test_a_long_tail(tmp_path, per_class, sizes):
    images(tmp_path / "mnist")
    section = {"dir": str(tmp_path), "val": 9, "per_class": per_class, "imbalance": 4.0}
    made = task.make_data(config("mnist", **section))
    assert np.bincount(made.pools.candidates.labels.argmax(1)).tolist() == sizes
    plain = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    for found, expected in ((made.pools.val, plain.pools.val), (made.test, plain.test)):
        np.testing.assert_array_equal(found.inputs, expected.inputs)
    # Wrong labels and validation samples come on top of what is left.
    more = {**section, "noise": 0.5, "train_on_val": True}
    made = task.make_data(config("mnist", **more))
    assert np.bincount(made.clean_labels[: sum(sizes)]).tolist() == sizes
    assert np.bincount(made.clean_labels[sum(sizes) :]).tolist() == [3, 3, 3]
    assert made.wrong.sum() == round(0.5 * sum(sizes))
    said = task.title(config("mnist", **section).data)
    assert said.endswith("classes 4 : 1") and ":" not in task.title(config("mnist").data)


def test_another_data_set_as_test(tmp_path):
    pixels, _ = images(tmp_path / "mnist")
    others, labels = images(tmp_path / "usps", size=50, side=6, seed=1)
    section = {"dir": str(tmp_path), "val": 9, "test_on": "usps", "size": 4, "on_device": False}
    made = task.make_data(config("mnist", **section))
    assert isinstance(made.test.inputs, Rows)
    np.testing.assert_array_equal(made.test.inputs[:], data.resized(others, (4, 4))[:])
    np.testing.assert_array_equal(made.test.labels.argmax(1), labels)
    kept = {x.tobytes() for x in made.pools.candidates.inputs[:]}
    assert len(kept) == 36 and kept <= {x.tobytes() for x in pixels[:45]}
    message = r"inputs uint8\[4, 4, 1\], as the training set; given uint8\[6, 6"
    with pytest.raises(ValueError, match=message):
        task.make_data(config("mnist", **{**section, "size": 0}))
    prepared(tmp_path / "usps", name="usps", num_classes=3, class_names=["a", "b", "c"], splits={})
    prepared(
        tmp_path / "mnist", name="mnist", num_classes=3, class_names=["0", "1", "2"], splits={}
    )
    forget()
    with pytest.raises(ValueError, match=r"test_on must have classes \('0', '1', '2'\)"):
        task.make_data(config("mnist", **section))
    with pytest.raises(ValueError, match=r"inputs float32.*; given uint8"):
        both = {**section, "size": 8, "val": 150}
        prepared(tmp_path / "usps", name="usps", num_classes=10, class_names=[], splits={})
        forget()
        task.make_data(config("digits", **both))


def test_another_data_set_as_test_leaves_names_and_labels(tmp_path):
    labels = np.arange(60) % 3
    files, worst, seen = np.array([f"{n}.png" for n in range(60)]), (labels + 1) % 3, labels + 0.5
    images(tmp_path / "mnist", file=files, worst=worst, caption=files, place=seen[:, None])
    images(tmp_path / "usps", size=50, seed=1)
    (tmp_path / "trusted").write_text("7.png\n8.png\n9.png,2")
    section = {"dir": str(tmp_path), "test_on": "usps", "train_on_val": True}
    made = task.make_data(config("mnist", trusted=str(tmp_path / "trusted"), **section))
    assert set(made.source.extra) == {"file", "worst"}
    assert made.source.extra["file"].tolist() == files.tolist() + [""] * 50
    assert made.held_out.labels.argmax(1).tolist() == [1, 2, 2]
    assert files[made.rows[-3:]].tolist() == ["7.png", "8.png", "9.png"]
    made = task.make_data(config("mnist", labels="worst", val=6, **section))
    given = made.pools.candidates.labels.argmax(1)
    np.testing.assert_array_equal(given[:-6], worst[made.rows[:-6]])
    # The other's names are its own, and those of the training set come first.
    images(tmp_path / "usps", size=50, seed=1, file=files[:50], worst=worst[:50])
    forget()
    made = task.make_data(config("mnist", trusted=str(tmp_path / "trusted"), **section))
    assert made.source.extra["file"][60:].tolist() == files[:50].tolist()
    np.testing.assert_array_equal(made.source.extra["worst"][60:], worst[:50])
    assert files[made.rows[-3:]].tolist() == ["7.png", "8.png", "9.png"]


def test_a_group_as_test(tmp_path):
    group = np.arange(60) // 3 % 2
    pixels, _ = images(tmp_path / "mnist", cell=group)
    section = {"dir": str(tmp_path), "val": 6}
    made = task.make_data(config("mnist", test_on="cell=1", **section))
    np.testing.assert_array_equal(made.test.inputs, pixels[group == 1])
    used = np.concatenate([made.pools.candidates.inputs, made.pools.val.inputs])
    # Rows of the official test split do not train, whatever their group.
    assert {x.tobytes() for x in used} == {x.tobytes() for x in pixels[:45][group[:45] == 0]}
    for test_on, message in (
        ("cell=2", r"test_on: cell must be one of \['0', '1'\]; given '2'"),
        ("sell=1", r"test_on must be one of \['cell'\]; given 'sell'; did you mean 'cell'"),
    ):
        with pytest.raises(ValueError, match=message):
            task.make_data(config("mnist", test_on=test_on, **section))


def test_corrupted_test_images(tmp_path):
    pixels, _ = images(tmp_path / "mnist")
    clean = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9, corrupt="contrast:3"))
    assert (
        made.test.inputs.shape == clean.test.inputs.shape and made.test.inputs.dtype == np.float32
    )
    unit = pixels[45:].astype(np.float64) / 255
    mean = unit.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(made.test.inputs, (unit - mean) * 0.4 + mean, atol=1e-5)
    np.testing.assert_array_equal(made.pools.candidates.inputs, clean.pools.candidates.inputs)


def test_chunks_of_corrupted_images_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "CHUNK", 4)
    unit = np.random.default_rng(0).random((10, 4, 4, 1)).astype(np.float32)
    parts = task.corrupted(unit, "gaussian_noise:5", seed=0)
    monkeypatch.setattr(task, "CHUNK", 256)
    np.testing.assert_array_equal(parts, task.corrupted(unit, "gaussian_noise:5", seed=0))


# --- the trusted samples alone ---------------------------------------------------------------


@pytest.mark.parametrize("val, batch_size, copies", [(150, 128, 1), (10, 256, 26), (50, 100, 2)])
def test_trusted_samples_alone_train_with_their_right_labels(val, batch_size, copies):
    found = config("digits", val=val, test=697, noise=0.4, trusted_only=True)
    found.train.batch_size = batch_size
    made = task.make_data(found)
    candidates, trusted = made.pools.candidates, made.pools.val
    assert len(candidates.labels) == copies * val and not made.wrong.any()
    for mine, theirs in ((candidates.inputs, trusted.inputs), (candidates.labels, trusted.labels)):
        np.testing.assert_array_equal(mine.reshape(copies, *theirs.shape)[:], [theirs] * copies)
    # No row twice in a batch, since augmentations draw by the index; and all samples equally often.
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    _, stream = build.make_input(found, made, runner)
    rows = next(stream).candidates
    assert len(np.unique(rows)) == batch_size
    np.testing.assert_array_equal(candidates.index, np.arange(copies * val))
    assert np.bincount(rows % val, minlength=val).max() <= copies
    # The other arms of the comparison have the same trusted samples and the same test split.
    plain = task.make_data(config("digits", val=val, test=697, noise=0.4))
    for found, expected in ((made.held_out, plain.held_out), (made.test, plain.test)):
        np.testing.assert_array_equal(found.inputs, expected.inputs)


def test_trusted_samples_alone_whatever_the_kind_of_input(tmp_path):
    images(tmp_path / "mnist", size=60)
    images(tmp_path / "usps", seed=1)
    section = {"outside": 0.5, "outside_from": "usps", "on_device": False, "noise": 0.5}
    found = config("mnist", dir=str(tmp_path), val=9, trusted_only=True, **section)
    made = task.make_data(found)
    assert len(made.pools.candidates.labels) == 36 and not made.wrong.any()  # of a batch of 32
    assert build.run_info(found, made.pools).num_trusted == 36
    assert task.title(found.data).endswith("9 samples alone")


# --- labels ----------------------------------------------------------------------------------


def test_other_labels_are_given_and_the_clean_ones_kept_aside(tmp_path):
    worst = (np.arange(60) % 3 + (np.arange(60) % 5 == 0)) % 3
    images(tmp_path / "mnist", worst=worst)
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9, labels="worst"))
    clean = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    np.testing.assert_array_equal(made.clean_labels, clean.pools.candidates.labels.argmax(1))
    wrong = made.pools.candidates.labels.argmax(1) != made.clean_labels
    assert 0 < wrong.sum() < len(wrong)
    np.testing.assert_array_equal(made.pools.val.labels, clean.pools.val.labels)
    with pytest.raises(ValueError, match=r"config.data.labels must be one of \['worst'\]"):
        task.make_data(config("mnist", dir=str(tmp_path), val=9, labels="best"))


@pytest.mark.parametrize("kind", task.NOISE)
def test_every_kind_of_noise(tmp_path, kind):
    images(tmp_path / "mnist")
    section = {"dir": str(tmp_path), "val": 9, "noise": 0.5, "noise_kind": kind}
    made = task.make_data(config("mnist", **section))
    given = made.pools.candidates.labels.argmax(1)
    assert (given != made.clean_labels).sum() == 18  # of 36
    if kind == "pairwise":
        assert set((given - made.clean_labels) % 3) == {0, 1}


def test_candidates_from_outside(tmp_path):
    pixels, _ = images(tmp_path / "mnist")
    others, _ = images(tmp_path / "usps", seed=1)
    section = {"dir": str(tmp_path), "val": 9, "outside": 0.25, "outside_from": "usps"}
    for train_on_val in (False, True):
        made = task.make_data(config("mnist", train_on_val=train_on_val, **section))
        foreign = {x.tobytes() for x in others}
        found = [x.tobytes() in foreign for x in made.pools.candidates.inputs]
        assert sum(found[:36]) == 9 and not any(found[36:])
        np.testing.assert_array_equal(made.wrong, found)
    others[:30] = pixels[30:]  # nothing that is in the data set itself comes from outside
    np.save(tmp_path / "usps" / "inputs.npy", others)
    forget()
    made = task.make_data(config("mnist", **{**section, "outside": 0.5}))
    assert made.wrong.sum() == 18
    used = {x.tobytes() for x in made.pools.candidates.inputs}
    kept = [made.pools.val.inputs, made.test.inputs]
    assert not used & {x.tobytes() for part in kept for x in part}


def test_what_is_drawn_for_different_purposes_is_independent(tmp_path):
    # Equal shares of wrong labels and of outside inputs from one seed: half of each are both.
    size = 4000
    images(tmp_path / "mnist", size=size, side=2)
    images(tmp_path / "usps", size=size, side=2, seed=1)
    splits = {"train": [0, size - 100], "test": [size - 100, size]}
    prepared(tmp_path / "mnist", name="mnist", num_classes=3, splits=splits)
    section = {"dir": str(tmp_path), "val": 300, "noise": 0.5, "outside": 0.5}
    made = task.make_data(config("mnist", **section, outside_from="usps"))
    candidates = made.pools.candidates
    wrong = candidates.labels.argmax(1) != made.clean_labels
    others = {x.tobytes() for x in np.load(tmp_path / "usps" / "inputs.npy")}
    outside = np.array([x.tobytes() in others for x in candidates.inputs])
    first = np.empty(len(wrong), bool)  # the first half of the first epoch
    order = next(data.IndexStream(data.sizes(made.pools), batch_size=len(wrong), seed=0)).candidates
    first[order] = np.arange(len(wrong)) < len(wrong) // 2
    for a, b in ((wrong, outside), (wrong, first), (outside, first)):
        # Of n rows, half of which are a and half b: hypergeometric, sd = sqrt(n) / 4.
        n = len(wrong)
        assert abs((a & b).sum() - n / 4) < 5 * np.sqrt(n) / 4


def test_a_pool_of_candidates_by_config(tmp_path):
    pixels, labels = images(tmp_path / "mnist")
    floats = np.float32(pixels) / 255
    generated = 1 - floats[:45]  # of every official training row, by its place in the data set
    write_array_record(tmp_path / "pool", generated, labels[:45], np.arange(45))
    section = {"dir": str(tmp_path), "val": 9, "pool": str(tmp_path / "pool"), "on_device": False}
    made_config = config("mnist", **section)
    made = task.make_data(made_config)
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    _, stream = build.make_input(made_config, made, runner)
    batch = next(stream).candidates
    own = np.float32(made.pools.candidates.inputs[np.asarray(batch.index)]) / 255
    np.testing.assert_allclose(batch.inputs, 1 - own, atol=1e-6)


def test_what_is_drawn_goes_by_the_seed(tmp_path):
    images(tmp_path / "mnist")
    found = config("mnist", dir=str(tmp_path), val=9, corrupt="gaussian_noise:5")
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    drawn = []
    for seed in (0, 1, 0):
        found.seed = seed
        made = task.make_data(found)
        _, stream = build.make_input(found, made, runner)
        drawn.append((made.pools.val.inputs, made.test.inputs, next(stream).candidates))
    for first, other, again in zip(*drawn):
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_validation_rows_are_as_many_as_asked_for(tmp_path):
    images(tmp_path / "mnist")
    found = config("mnist", dir=str(tmp_path), val=9)
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    for given, size in ((0, 9), (5, 5)):
        found.train.val_batch_size = given
        _, stream = build.make_input(found, task.make_data(found), runner)
        assert len(next(stream).val) == size


def test_weight_decay_is_the_configs(tmp_path):
    images(tmp_path / "mnist")
    found = config("mnist", dir=str(tmp_path), val=9, steps=2)
    found.method.rule, found.augment = "as_given", ""
    found.model = {"name": "mlp", "widths": (4,)}
    made, after = task.make_data(found), []
    for decay in (0.0, 0.5):
        found.optimizer.weight_decay = decay
        method = build.make_method(found, made.pools)
        runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])
        before = build.init_state(found, method, made.pools)
        runner, stream = build.make_input(found, made, runner)
        state, _ = runner.step(runner.put_state(before), runner.put_batch(next(stream)))
        after.append(jax.device_get(state.params))
    rate = found.optimizer.learning_rate
    jax.tree.map(
        lambda p, plain, decayed: np.testing.assert_allclose(
            plain - decayed, rate * 0.5 * np.asarray(p), atol=1e-6
        ),
        before.params,
        *after,
    )


def test_a_pool_serves_the_validation_samples_that_train(tmp_path):
    pixels, labels = images(tmp_path / "mnist")
    floats = np.float32(pixels) / 255
    write_array_record(tmp_path / "pool", 1 - floats[:45], labels[:45], np.arange(45))
    section = {"dir": str(tmp_path), "val": 9, "pool": str(tmp_path / "pool"), "on_device": False}
    found = config("mnist", train_on_val=True, **section)
    made = task.make_data(found)
    runner = parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])
    _, stream = build.make_input(found, made, runner)
    for _ in range(2):  # an epoch of 45
        batch = next(stream).candidates
        own = np.float32(made.pools.candidates.inputs[np.asarray(batch.index)]) / 255
        np.testing.assert_allclose(batch.inputs, 1 - own, atol=1e-6)


# --- tables, folders, graded labels ----------------------------------------------------------


def test_a_table_with_categories_trains(tmp_path):
    rng = np.random.default_rng(0)
    kind, x = rng.integers(0, 3, 200), rng.normal(size=200)
    lines = [f"{a:.3f},{'abc'[k]},{'yes' if (k == 1) ^ (a > 1) else 'no'}" for a, k in zip(x, kind)]
    lines[7] = f"?,a,{lines[7].split(',')[2]}"
    (tmp_path / "x.csv").write_text("x,kind,label\n" + "\n".join(lines))
    section = config(tmp_path / "x.csv", val=30, test=50)
    section.augment = "feature_noise(0.05) | tabular_cutmix(0.2)"
    section.model = {"name": "mlp", "widths": (16,), "norm": "none"}
    made, scores = trained(section)
    assert set(made.pools.candidates.inputs) == {"numeric", "categorical"}
    assert scores["accuracy"] > 0.8
    noisy = {"noise": 0.25, "noise_kind": "instance"}  # which reads inputs, missing ones too
    made = task.make_data(config(tmp_path / "x.csv", val=30, test=50, **noisy))
    assert made.wrong.sum() == round(0.25 * len(made.wrong))


def test_graded_labels_and_folders(tmp_path):
    graded = np.linspace(0, 1, 60)
    images(tmp_path / "mnist", classes=2)
    np.save(tmp_path / "mnist" / "labels.npy", np.column_stack([1 - graded, graded]))
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9))
    assert made.pools.candidates.labels.shape == (36, 2)
    np.testing.assert_allclose(made.test.labels[:, 1], graded[45:], rtol=1e-6)
    np.testing.assert_array_equal(made.clean_labels, made.pools.candidates.labels.argmax(1))
    with pytest.raises(ValueError, match="noise must be 0 where labels are no classes"):
        task.make_data(config("mnist", dir=str(tmp_path), val=9, noise=0.1))

    for number in range(24):
        save(tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png", number)
    section = config(tmp_path / "pictures", val=4, test=4, on_device=False, size=4)
    made = task.make_data(section)
    assert isinstance(made.pools.candidates.inputs, Rows)
    assert made.pools.candidates.inputs.shape == (16, 4, 4, 1)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, message",
    [
        ({"nois": 0.1}, "config.data has no field 'nois'; did you mean 'noise'"),
        ({"name": "cifar"}, "config.data.name must be .*no 'cifar'; did you mean 'cifar10'"),
        ({"noise": 1.5}, r"config.data.noise must lie in \[0, 1\]; given 1.5"),
        ({"noise_kind": "pair"}, "config.data.noise_kind must be one of .*did you mean 'pairwise'"),
        ({"per_class": -1}, "config.data.per_class must be a whole number >= 0; given -1"),
        ({"imbalance": 0.5}, "config.data.imbalance must be >= 1 and finite, 1 being off; given 0"),
        ({"outside": 0.1}, "config.data.outside and outside_from must be given together"),
        ({"pool": "p"}, "config.data.on_device must be False with a pool; given True"),
        (
            {"pool": "p", "on_device": False},
            "config.data.pool must be a folder or a file; given 'p'",
        ),
        ({"name": ""}, "config.data.name must be .*there is no ''"),
        ({"task": "grades"}, "config.data.task must be one of .*given 'grades'"),
        ({"test_on": "usps", "test": 9}, "config.data.test must be 0 with test_on; given 9"),
        ({"labels": "worst", "noise": 0.1}, "config.data.noise must be 0 with labels='worst'"),
        *(
            (
                {"trusted_only": True, name: value},
                f"config.data.{name} must be {off!r} with trusted_only=True.*given {value!r}",
            )
            for name, value, off in (
                ("train_on_val", True, False),
                ("val_from", "train", ""),
                ("unlabelled", True, False),
            )
        ),
        ({"corrupt": "fogg:3"}, "config.data.corrupt must be one of .*did you mean 'fog'"),
        ({"corrupt": "fog:6"}, "config.data.corrupt must be KIND:1 to KIND:5; given 'fog:6'"),
        ({"corrupt": "fog"}, "config.data.corrupt must be KIND:1 to KIND:5; given 'fog'"),
    ],
)
def test_a_bad_section_is_refused_before_anything_is_read(section, message):
    found = config("digits")
    with found.unlocked():
        found.data.update(section)
    with pytest.raises(ValueError, match=message):
        build.check(found)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"size": 8}, "config.data.size must be 0 for wdbc, a table; given 8"),
        ({"corrupt": "fog:1"}, "config.data.corrupt and outside need images; wdbc is a table"),
    ],
)
def test_what_tables_cannot_do(section, message):
    with pytest.raises(ValueError, match=message):
        task.make_data(config("wdbc", val=50, test=50, **section))


def test_grades_of_any_source_can_be_in_order(tmp_path):
    images(tmp_path / "mnist")
    made = task.make_data(config("mnist", dir=str(tmp_path), val=9, task="ordinal"))
    assert made.source.task == "ordinal"
    medmnist(tmp_path / "x.npz", "multilabel", 1)
    with pytest.raises(ValueError, match=r"config.data.task must be '' for .*a multilabel one"):
        task.make_data(config(tmp_path / "x.npz", task="ordinal"))


def test_splits_that_cannot_be(tmp_path):
    _, labels = images(tmp_path / "mnist")
    with pytest.raises(ValueError, match="val must be a number of samples, since mnist has no"):
        task.make_data(config("mnist", dir=str(tmp_path)))
    np.save(tmp_path / "mnist" / "labels.npy", np.where(np.arange(60) == 50, 2, labels % 2))
    with pytest.raises(ValueError, match=r"test.*2.*train"):  # a class that only test has
        forget()
        task.make_data(config("mnist", dir=str(tmp_path), val=9))
    with pytest.raises(ValueError, match=r"python -m experiments\.prepare usps"):
        task.make_data(config("usps", dir=str(tmp_path), val=9))
