"""Cleaning: planted errors are found, the package cleanlab agrees, right labels are not read."""

import functools

import numpy as np
import pytest

from experiments import build, cleaning, task
from experiments.configs import digits, sources
from saflex_jax import parallel
from saflex_jax.audit import Head
from tests.experiments.task_test import config, forget, images, medmnist, prepared
from tests.problems import softmax

DROPPING = tuple(cleaning.CLEANINGS)


def blobs(size=400, classes=4, noise=0.3, seed=0):
    """(features, true classes, given ones)."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=size)
    x = 4 * np.eye(classes, 8)[truth] + rng.normal(size=(size, 8))
    wrong = rng.permutation(size) < noise * size
    given = np.where(wrong, (truth + rng.integers(1, classes, size)) % classes, truth)
    return x.astype(np.float32), truth, given


# --- what is found ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DROPPING)
def test_planted_errors_are_found(kind):
    x, truth, given = blobs()
    stay = cleaning.kept(kind, x, given, trusted=0, seed=0)
    assert (given != truth)[~stay].mean() > 0.9  # precision
    assert (~stay)[given != truth].mean() > 0.85  # recall


@pytest.mark.parametrize("kind", DROPPING)
def test_of_separate_classes_with_right_labels_nothing_goes(kind):
    x, truth, _ = blobs()
    x += 20 * np.eye(4, 8, dtype=np.float32)[truth]
    assert cleaning.kept(kind, x, truth, trusted=0, seed=0).all()


@pytest.mark.parametrize("kind", DROPPING)
def test_the_scale_of_inputs_and_the_numbers_of_classes_do_not_matter(kind):
    x, _, given = blobs()
    stay = cleaning.kept(kind, x, given, trusted=0, seed=0)
    again = cleaning.kept(kind, 5 * x + 3, 3 * given + 2, trusted=0, seed=0)
    assert (stay != again).mean() < 0.01  # a margin may come to lie on the other side


@pytest.mark.parametrize("kind", DROPPING)
def test_trusted_samples_stay_and_help(kind):
    # Two groups; nearly all labels of the second are wrong, but for those of the trusted samples.
    rng, size, trusted = np.random.default_rng(0), 100, 300
    group = np.arange(size + trusted) % 2
    x = (4 * group[:, None] + rng.normal(size=(size + trusted, 3))).astype(np.float32)
    given = group.copy()
    given[:size] *= rng.random(size) < 0.2
    alone = cleaning.kept(kind, x[:size], given[:size], trusted=0, seed=0)
    helped = cleaning.kept(kind, x, given, trusted=trusted, seed=0)
    wrong = given[:size] != group[:size]
    assert helped[size:].all()
    assert (~alone)[wrong].mean() < 0.2 and (~helped[:size])[wrong].mean() > 0.7
    assert helped[:size][~wrong].mean() > 0.95
    lies = given.copy()
    lies[size:] = 1 - lies[size:]
    assert cleaning.kept(kind, x, lies, trusted=trusted, seed=0)[size:].all()


@pytest.mark.parametrize("kind", DROPPING)
def test_no_class_is_lost(kind):
    x, _, given = blobs(size=120)
    given[:3] = 4  # a fifth class, whose samples are of others
    stay = cleaning.kept(kind, x, given, trusted=0, seed=0)
    assert set(given[stay]) == set(range(5)) and not stay.all()
    assert cleaning.kept(kind, x, np.full(120, 2), trusted=0, seed=0).all()


@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("per_class", [1, 3])
def test_few_samples_are_no_error(kind, per_class):
    x, truth, _ = blobs(size=4 * per_class)
    truth = np.arange(4 * per_class) % 4
    assert cleaning.kept(kind, x, truth, trusted=0, seed=0).any()


# --- its parts -------------------------------------------------------------------------------


def test_issues_of_a_small_case_by_hand():
    #   given 0: means of p_0 .6; given 1: mean of p_1 .7
    probs_of_1 = np.array([0.1, 0.2, 0.1, 0.9, 0.7, 0.9, 0.9, 0.8, 0.1, 0.8])
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    probs = np.stack([1 - probs_of_1, probs_of_1], 1)
    # Sure are, given 0: three of 0 and two of 1 (.9, .7); given 1: four of 1 and one of 0. So two
    # given 0 are of 1, those with the largest margins, and one given 1 is of 0.
    expected = np.isin(np.arange(10), [3, 4, 8])
    np.testing.assert_array_equal(cleaning.label_issues(labels, probs), expected)
    # A seventh part of those that are not sure counts as the others do.
    probs[1] = [0.55, 0.45]  # of neither: of the four that are sure half are of 1; 5 / 2 is even 2
    np.testing.assert_array_equal(cleaning.label_issues(labels, probs), expected)


@pytest.mark.parametrize(
    "size, classes, noise, skill", [(300, 3, 0.3, 2), (4000, 10, 0.4, 2), (1000, 5, 0.1, 3)]
)
def test_issues_are_those_of_the_package_cleanlab(size, classes, noise, skill):
    filters = pytest.importorskip("cleanlab.filter")
    rng = np.random.default_rng(size)
    truth = rng.integers(classes, size=size)
    wrong = rng.random(size) < noise
    given = np.where(wrong, (truth + rng.integers(1, classes, size)) % classes, truth)
    probs = softmax(rng.normal(size=(size, classes)) + skill * np.eye(classes)[truth])
    ours = cleaning.label_issues(given, probs)
    theirs = filters.find_label_issues(given, probs, filter_by="prune_by_noise_rate", n_jobs=1)
    assert theirs.mean() > noise / 2
    assert (ours != theirs).mean() < 0.005  # it rounds the joint so that rows keep their sums


def test_folds_have_equal_shares_of_every_class_and_go_by_the_seed():
    labels = np.repeat([0, 1, 2], [50, 25, 8])
    fold = cleaning.folds(labels, 0)
    for k, least in ((0, 10), (1, 5), (2, 1)):
        counts = np.bincount(fold[labels == k], minlength=cleaning.FOLDS)
        assert counts.min() == least and counts.max() <= least + 1
    np.testing.assert_array_equal(fold, cleaning.folds(labels, 0))
    assert (fold != cleaning.folds(labels, 1)).any()


def test_what_inputs_are_read():
    rng = np.random.default_rng(0)
    views, pixels = rng.normal(size=(5, 3, 2)), rng.integers(0, 256, (5, 2, 2, 1), np.uint8)
    np.testing.assert_array_equal(cleaning.matrix(views), np.float32(views[:, 0]))
    expected = np.float32(pixels.reshape(5, 4)) / 255
    np.testing.assert_allclose(cleaning.matrix(pixels), expected, rtol=1e-6)
    codes = np.array([[0], [2], [-1], [1], [0]], np.int32)  # one is missing
    table = {"numeric": views[:, 0], "categorical": codes}
    indicators = [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(cleaning.matrix(table)[:, :3], indicators)
    np.testing.assert_array_equal(cleaning.matrix(table)[:, 3:], np.float32(views[:, 0]))


# --- learned labels --------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Audits of one kind of head, of few steps."""
    head = Head(widths=(), steps=80, batch_size=64, learning_rate=0.05, weight_decay=0.1, folds=2)
    monkeypatch.setattr(cleaning, "audit", functools.partial(cleaning.audit, head=head))


@pytest.mark.usefixtures("quick")
def test_an_audit_keeps_samples_with_learned_labels():
    x, truth, given = blobs()
    trusted = 80
    given[-trusted:] = truth[-trusted:]
    stay, labels, start = cleaning.cleaned("audit", x, given, 5, trusted=trusted, seed=0)
    assert stay.all() and labels.shape == (400, 5)  # one class has no sample
    assert (given != truth).mean() > 0.2 and (labels.argmax(1) == truth).mean() > 0.97
    np.testing.assert_array_equal(labels[-trusted:], np.eye(5)[truth[-trusted:]])
    assert start is None
    # One audit for all arms.
    assert cleaning.cleaned("audit", x, given, 5, trusted=trusted, seed=0)[1] is labels
    first = cleaning.cleaned("audit_first", x, given, 5, trusted=trusted, seed=0)
    assert first.stay is stay and first.labels is given
    assert (first.start.beliefs.argmax(1) == truth).mean() > 0.97
    np.testing.assert_allclose(first.start.beliefs.sum(1), 1, atol=1e-5)
    assert first.start.noise_rate == pytest.approx((given != truth)[:-trusted].mean(), abs=0.05)


@pytest.mark.usefixtures("quick")
def test_a_run_that_goes_on_reads_what_its_audit_learned(tmp_path, monkeypatch):
    x, truth, given = blobs()
    audited = functools.partial(cleaning.audited, x, trusted=80, seed=0, folder=tmp_path)
    monkeypatch.setattr(cleaning, "_CLEANED", {})
    stay, labels, start = audited(given, 5)

    def learns(*_, **__):
        raise RuntimeError("it learns")

    monkeypatch.setattr(cleaning, "audit", learns)
    cleaning._CLEANED.clear()  # as after a kill
    again = audited(given, 5)
    np.testing.assert_array_equal(again[0], stay)
    np.testing.assert_array_equal(again[1], labels)
    assert again[1].dtype == labels.dtype
    np.testing.assert_array_equal(again.start.beliefs, start.beliefs)
    assert again.start.noise_rate == start.noise_rate
    # A file from before beliefs were kept.
    with np.load(tmp_path / cleaning.FILE) as kept:
        older = {name: kept[name] for name in ("of", "stay", "labels")}
    np.savez(tmp_path / cleaning.FILE, **older)
    cleaning._CLEANED.clear()
    assert audited(given, 5).start is None
    with pytest.raises(RuntimeError, match="it learns"):  # of other labels
        audited(truth, 5)


@pytest.mark.usefixtures("quick")
def test_what_is_unlike_trusted_samples_goes():
    x, truth, _ = blobs()
    x[:80] -= 30
    stay, labels, _ = cleaning.cleaned("audit", x, truth, 4, trusted=150, seed=0)
    assert not stay[:80].any() and stay[80:].mean() > 0.9 and stay[-150:].all()
    assert labels is truth  # without evidence of wrong ones
    first = cleaning.cleaned("audit_first", x, truth, 4, trusted=150, seed=0)
    assert first.labels is truth and first.start is None


@pytest.mark.usefixtures("quick")
def test_a_label_that_nobody_gives_so_is_learned_as_believed():
    x, truth, _ = blobs()
    x[:80] -= 30
    found = cleaning.audit(x, truth, trusted=np.arange(400) >= 250, num_classes=4)
    np.testing.assert_allclose(found.labels.sum(1), 1, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_a_run_trains_on_what_an_audit_learned():
    found = digits.get_config()
    found.data = sources.section(
        "digits", val=150, test=400, train=600, noise=0.4, train_on_val=True, cleaning="audit"
    )
    made = task.make_data(found)
    found.data.cleaning = ""
    plain = task.make_data(found)
    assert plain.wrong.mean() == 0.32
    labels = made.pools.candidates.labels
    assert made.wrong.mean() < 0.08 and 0.5 < labels[:600].max(1).mean() < 0.999  # soft
    for name in ("held_out", "test"):
        np.testing.assert_array_equal(getattr(made, name).labels, getattr(plain, name).labels)
    trusted = build.run_info(found, made.pools).num_trusted
    assert trusted == 150
    np.testing.assert_array_equal(labels[-150:], plain.pools.candidates.labels[-150:])


@pytest.mark.usefixtures("quick")
def test_a_rule_starts_from_what_an_audit_believes():
    found = digits.get_config()
    found.data = sources.section(
        "digits", val=150, test=400, train=600, noise=0.4, train_on_val=True, cleaning="audit_first"
    )
    found.augment, found.model = "identity", {"name": "mlp"}
    found.train.update(steps=4, log_every=2, checkpoint_every=4)
    made = task.make_data(found)
    found.data.cleaning = ""
    plain = task.make_data(found)
    found.data.cleaning = "audit_first"
    np.testing.assert_array_equal(made.pools.candidates.labels, plain.pools.candidates.labels)
    assert (made.start.beliefs.argmax(1) == made.clean_labels).mean() > 0.9
    method = build.make_method(found, made.pools)
    before = build.init_state(found, method, made.pools, made.start).extra.rule
    np.testing.assert_array_equal(before.memory.mean[:750], made.start.beliefs)
    # Over a run, the share stays as the audit told it.
    runner = parallel.jit_runner(build.with_upstream(found, method).step)
    result = build.fit(found, made, method, runner, progress=False)
    assert result.state.extra.rule.agreement == np.float32(made.start.noise_rate)
    assert result.history[-1]["noise_rate"] == pytest.approx(made.start.noise_rate)
    assert (
        np.asarray(result.state.extra.rule.memory.visits)[:750] >= before.memory.visits[0]
    ).all()


# --- in a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("train_on_val", [False, True])
def test_the_rest_of_the_data_is_as_without_it(kind, train_on_val):
    found = digits.get_config()
    found.data = sources.section(
        "digits", val=150, test=400, train=600, noise=0.4, train_on_val=train_on_val, cleaning=kind
    )
    made = task.make_data(found)
    found.data.cleaning = ""
    plain = task.make_data(found)
    assert plain.wrong.sum() == 240
    assert made.wrong.mean() < 0.08 and (~made.wrong).sum() > 0.85 * (~plain.wrong).sum()
    # Every row that is left is one of before, in the same order, with all that belongs to it.
    where = {x.tobytes(): row for row, x in enumerate(np.asarray(plain.pools.candidates.inputs))}
    rows = [where[x.tobytes()] for x in np.asarray(made.pools.candidates.inputs)]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(made.pools.candidates.labels, plain.pools.candidates.labels[rows])
    np.testing.assert_array_equal(made.pools.candidates.index, np.arange(len(rows)))
    for name in ("wrong", "clean_labels"):
        np.testing.assert_array_equal(getattr(made, name), getattr(plain, name)[rows])
    np.testing.assert_array_equal(made.held_out.inputs, plain.held_out.inputs)
    np.testing.assert_array_equal(made.test.inputs, plain.test.inputs)
    trusted = build.run_info(found, made.pools).num_trusted
    assert trusted == (150 if train_on_val else 0)
    if trusted:
        assert rows[-150:] == list(range(600, 750))
    assert build.run_info(found, made.pools).num_samples == len(rows)


@pytest.mark.parametrize("kind", DROPPING)
def test_right_labels_are_not_read(tmp_path, kind):
    # Given labels are another set's; the right ones of training samples are changed on the disk.
    _, labels = images(tmp_path / "mnist")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "mnist" / "extra_worst.npy", rng.permutation(labels))
    splits = {"train": [0, 36], "val": [36, 45], "test": [45, 60]}
    prepared(tmp_path / "mnist", name="mnist", num_classes=3, splits=splits)
    left = []
    for right in (labels, np.append(rng.permutation(labels[:36]), labels[36:])):
        np.save(tmp_path / "mnist" / "labels.npy", right)
        forget()
        found = config("mnist", dir=str(tmp_path), labels="worst", cleaning=kind)
        left.append(task.make_data(found).pools.candidates)
    assert 0 < len(left[0].labels) < 36
    np.testing.assert_array_equal(left[0].inputs, left[1].inputs)
    np.testing.assert_array_equal(left[0].labels, left[1].labels)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, message",
    [
        ({"cleaning": "neighbors"}, "cleaning must be one of .*did you mean 'neighbours'"),
        ({"unlabelled": True}, r"cleaning must be '' with unlabelled=True.*given 'confident'"),
        ({"trusted_only": True}, r"cleaning must be '' with trusted_only=True"),
        ({"pool": "tests", "on_device": False}, r"cleaning must be '' with pool='tests'"),
    ],
)
def test_what_it_cannot_go_with(section, message):
    found = config("digits", **{"cleaning": "confident"} | section)
    with pytest.raises(ValueError, match=message):
        task.check(found.data)


@pytest.mark.parametrize("rule", ["as_given", "saflex_paper"])
def test_an_audit_starts_no_other_rule(rule):
    found = digits.get_config()
    found.method.rule = rule
    found.data.cleaning = "audit_first"
    with pytest.raises(ValueError, match=f"rule must be 'saflex' with data.cleaning=.*'{rule}'"):
        build.check(found)


def test_what_an_audit_cannot_read_names_the_option(monkeypatch):
    x, _, given = blobs()
    name = "the audit of config.data.cleaning"
    with pytest.raises(ValueError, match=f"{name}: there must be at least 10 samples"):
        cleaning.cleaned("audit", x[:8], given[:8], 4, trusted=0, seed=0)
    with pytest.raises(ValueError, match=f"{name} takes inputs of at most 16384 numbers"):
        cleaning.cleaned("audit", np.zeros((9, 2**14 + 1)), given[:9], 4, trusted=0, seed=0)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match=f"{name} runs in one process; given 2"):
        cleaning.cleaned("audit", x, given, 4, trusted=0, seed=0)


def test_labels_must_be_classes(tmp_path):
    medmnist(tmp_path / "x.npz", "multilabel", 1)
    found = config(tmp_path / "x.npz", cleaning="confident")
    with pytest.raises(ValueError, match="cleaning must be '' where labels are no classes"):
        task.make_data(found)
