import numpy as np
import pytest
from scipy import stats
from sklearn.model_selection import train_test_split

from saflex_jax.data.splits import (
    Split,
    check_split,
    few_shot,
    fingerprints,
    hold_out,
    stratified_split,
    without_copies,
)

# Classes 0 to 2 in shares 1/2, 3/10, 1/5, shuffled.
LABELS = np.repeat([0, 1, 2], [150, 90, 60])[np.random.default_rng(0).permutation(300)]
SHARES = np.array([0.5, 0.3, 0.2])


class Slices:
    """Rows that can only be read by slices; notes how many at once."""

    def __init__(self, rows):
        self.rows, self.size, self.read = rows, len(rows), []

    def __len__(self):
        return self.size

    def __getitem__(self, where):
        assert isinstance(where, slice) and where.step is None
        self.read.append(where.stop - where.start)
        return self.rows[where]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- random splits


@pytest.mark.parametrize("val, test, seed", [(30, 60, 0), (7, 3, 1), (150, 100, 2)])
def test_a_seed_gives_the_split_it_always_gave(val, test, seed):
    rest, test_index = train_test_split(
        np.arange(300), test_size=test, random_state=seed, stratify=LABELS
    )
    train_index, val_index = train_test_split(
        rest, test_size=val, random_state=seed, stratify=LABELS[rest]
    )
    split = stratified_split(LABELS, val=val, test=test, seed=seed)
    assert isinstance(split, Split) and split._fields == ("train", "val", "test")
    assert same(split, map(np.sort, (train_index, val_index, test_index)))


@pytest.mark.parametrize("val, test", [(30, 60), (7, 3), (150, 100)])
def test_splits_are_disjoint_complete_and_in_proportion(val, test):
    parts = stratified_split(LABELS, val=val, test=test, seed=0)
    assert [len(p) for p in parts] == [300 - val - test, val, test]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(300))
    for part in parts:
        counts = np.bincount(LABELS[part], minlength=3)
        # Two draws, each of which rounds a class up or down.
        assert (np.abs(counts - len(part) * SHARES) <= 2).all()
    again = stratified_split(LABELS, val=val, test=test, seed=0)
    assert all((a == b).all() for a, b in zip(parts, again))
    other = stratified_split(LABELS, val=val, test=test, seed=1)
    assert any((a != b).any() for a, b in zip(parts, other))


@pytest.mark.parametrize("size", [3, 41, 120])
def test_hold_out_parts_the_given_samples_in_proportion(size):
    index = np.random.default_rng(1).permutation(300)[:200]
    rest, held = hold_out(index, LABELS, size=size, seed=0)
    assert len(held) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.sort(index))
    for part in (rest, held):
        assert (np.diff(part) > 0).all()
        expected = len(part) * np.bincount(LABELS[index]) / 200
        assert (np.abs(np.bincount(LABELS[part], minlength=3) - expected) < 1).all()
    assert same((rest, held), hold_out(index, LABELS, size=size, seed=0))
    assert not same((held,), hold_out(index, LABELS, size=size, seed=1)[1:])


def test_few_shot_draws_the_same_number_of_every_class():
    labels = np.array([4, 7, 9])[LABELS]  # the classes that occur, whatever they are
    for per_class in (1, 17, 60):
        drawn = few_shot(labels, per_class=per_class, seed=3)
        assert (np.diff(drawn) > 0).all()
        classes, counts = np.unique(labels[drawn], return_counts=True)
        assert classes.tolist() == [4, 7, 9] and counts.tolist() == [per_class] * 3
        np.testing.assert_array_equal(drawn, few_shot(labels, per_class=per_class, seed=3))


def test_few_shot_draws_are_uniform_and_independent_from_seed_to_seed():
    draws, size, per_class = 400, 60, 15
    chosen = np.zeros((draws, 300), bool)
    for seed in range(draws):
        chosen[seed, few_shot(LABELS, per_class=per_class, seed=seed)] = True
    chosen = chosen[:, LABELS == 2]
    p = per_class / size
    z = (chosen.sum(0) - draws * p) / np.sqrt(draws * p * (1 - p))
    # Draws without replacement: the z are exchangeable with sum zero.
    assert 1e-4 < stats.chi2.sf((z**2).sum() * (size - 1) / size, size - 1) < 1 - 1e-4
    both = (chosen[::2] & chosen[1::2]).sum(1)
    overlap = stats.hypergeom(size, per_class, per_class)
    assert abs(both.mean() - overlap.mean()) < 5 * overlap.std() / np.sqrt(len(both))
    assert abs(both.var() / overlap.var() - 1) < 5 * np.sqrt(2 / len(both))


# --- copies


def rows_with_copies(kind):
    rng = np.random.default_rng(4)
    return {
        "images": rng.integers(2, size=(90, 2, 3, 1)).astype(np.uint8),
        "table": rng.integers(7, size=(90, 2)) / np.float32(3),
        "numbers": rng.integers(40, size=90),
        "strided": np.asfortranarray(rng.integers(2, size=(90, 6)))[:, ::2],
    }[kind]


@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
@pytest.mark.parametrize("kind", ["images", "table", "numbers", "strided"])
def test_fingerprints_are_equal_where_rows_are(kind, chunk):
    rows = rows_with_copies(kind)
    lazy = Slices(rows)
    prints = fingerprints(lazy, chunk=chunk)
    assert prints.shape == (90,) and prints.dtype.itemsize == 16
    assert sum(lazy.read) == 90 and max(lazy.read) <= chunk
    equal = (rows[:, None] == rows[None]).reshape(90, 90, -1).all(-1)
    assert 90 < equal.sum() < 90**2
    np.testing.assert_array_equal(prints[:, None] == prints[None], equal)
    np.testing.assert_array_equal(prints, fingerprints(rows.copy(), chunk=90))


def test_all_sixteen_bytes_of_a_fingerprint_count():
    prints = fingerprints(np.arange(20_000), chunk=4096)
    found = np.frombuffer(prints.tobytes(), np.uint8).reshape(-1, 16)
    assert [len(p) for p in prints[found[:, -1] == 0].tolist()] == [16] * (found[:, -1] == 0).sum()
    # Every byte is uniform, the last one too: none is cut off or padded.
    for column in found.T:
        assert stats.chisquare(np.bincount(column, minlength=256)).pvalue > 1e-5
    assert fingerprints(np.zeros((0, 3)), chunk=4).shape == (0,)


def test_copies_of_held_out_samples_are_taken_out():
    rows = np.array([*"abcade", *"bfgf", *"chhi"])
    #        train 0..5: a b c a d e   val 6..9: b f g f   test 10..13: c h h i
    split = Split(np.arange(6), np.arange(6, 10), np.arange(10, 14))
    kept, lost = without_copies(split, fingerprints(rows, chunk=5))
    assert [part.tolist() for part in kept] == [[0, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert lost == {"train": 2, "val": 0}
    rows[8] = "i"  # in val and test
    rows[0] = "i"
    kept, lost = without_copies(split, fingerprints(rows, chunk=5))
    assert [part.tolist() for part in kept] == [[3, 4, 5], [6, 7, 9], [10, 11, 12, 13]]
    assert lost == {"train": 3, "val": 1}


def test_copies_are_those_of_a_search_by_hand():
    rows = np.random.default_rng(5).integers(60, size=300)
    split = stratified_split(LABELS, val=40, test=30, seed=0)
    before = [part.copy() for part in split]
    kept, lost = without_copies(split, fingerprints(rows, chunk=64))
    train, val, test = ([(int(i), int(rows[i])) for i in part] for part in split)

    def held(*parts):
        return {x for part in parts for _, x in part}

    assert kept.train.tolist() == [i for i, x in train if x not in held(val, test)]
    assert kept.val.tolist() == [i for i, x in val if x not in held(test)]
    assert kept.test.tolist() == [i for i, _ in test]
    assert lost == {"train": 230 - len(kept.train), "val": 40 - len(kept.val)}
    assert min(lost.values()) > 0 and same(split, before)


def test_fingerprints_that_differ_in_their_last_zeros_are_no_copies():
    prints = np.frombuffer(b"a" * 15 + b"\0" + b"a" * 14 + b"\0\0" + b"a" * 15 + b"\0", "V16")
    split = Split(np.array([0]), np.array([1]), np.array([], int))
    assert without_copies(split, prints)[1] == {"train": 0, "val": 0}
    assert without_copies(split._replace(val=np.array([2])), prints)[1] == {"train": 1, "val": 0}


# --- errors

GOOD = Split(np.arange(0, 200), np.arange(200, 250), np.arange(250, 300))


def test_a_good_split_passes():
    check_split(GOOD, LABELS, 3)
    check_split(GOOD, LABELS, 4)  # a class that nobody has is lacking nowhere
    check_split(GOOD, np.zeros((300, 3)), 3)
    rare = np.where(np.arange(300) == 5, 3, LABELS)  # in train alone
    check_split(GOOD, rare, 4)


@pytest.mark.parametrize("labels", [LABELS, np.eye(3)[LABELS]], ids=["classes", "soft"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": []}, "the train split must hold at least one sample; given 0"),
        ({"val": []}, "the val split must hold at least one sample; given 0"),
        ({"test": []}, "the test split must hold at least one sample; given 0"),
        ({"val": [200, 7, 8]}, r"train and val must be disjoint; both hold sample 7 \(2 in all\)"),
        ({"test": [299, 0]}, r"train and test must be disjoint; both hold sample 0 \(1 in all\)"),
        ({"test": [299, 249]}, "val and test must be disjoint; both hold sample 249"),
        ({"train": [4, 300]}, r"train must lie in \[0, 300\); row 1 is 300"),
        ({"val": [-1]}, r"val must lie in \[0, 300\); row 0 is -1"),
        ({"test": [2.0]}, "test must be integers"),
    ],
)
def test_a_split_that_cannot_be_used_is_refused(changes, message, labels):
    split = GOOD._replace(**{k: np.array(v, None if v else int) for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        check_split(split, labels, 3)


def test_a_class_that_train_lacks_is_named():
    labels = np.zeros(300, int)
    labels[[260, 261, 270]] = 2
    with pytest.raises(ValueError, match="class of test; class 2 has 3 samples in test and none"):
        check_split(GOOD, labels, 3)
    labels[220] = 1
    with pytest.raises(ValueError, match="class of val; class 1 has 1 samples in val and none in"):
        check_split(GOOD, labels, 3)
    check_split(GOOD, np.eye(3)[labels], 3)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\); row 260 is 2"):
        check_split(GOOD, labels, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: hold_out(np.arange(30), LABELS, size=2, seed=0),
            "the held split must hold at least one sample for each of 3 classes; given 2 of 30",
        ),
        (lambda: hold_out(np.arange(30), LABELS, size=28, seed=0), "the rest split .*given 2 of"),
        (lambda: hold_out(np.array([3, 300]), LABELS, size=3, seed=0), "index must .*row 1 is 300"),
        (
            lambda: hold_out(np.arange(9), np.array([5] * 8 + [6]), size=4, seed=0),
            "labels must have two samples of every class .*class 6 has 1",
        ),
        (
            lambda: stratified_split(np.array([5] * 8 + [6]), val=3, test=3, seed=0),
            "labels must have two samples of every class .*class 6 has 1",
        ),
        (
            lambda: stratified_split(np.eye(3)[LABELS], val=9, test=9, seed=0),
            r"labels must have shape \[300\]; given \(300, 3\)",
        ),
        (
            lambda: few_shot(LABELS, per_class=61, seed=0),
            "labels must have 61 samples of every class; class 2 has 60",
        ),
        (lambda: few_shot(LABELS, per_class=0, seed=0), "per_class must be a whole number >= 1"),
        (lambda: few_shot(np.eye(3), per_class=1, seed=0), r"labels must have shape \[3\]"),
        (lambda: fingerprints(LABELS, chunk=0), "chunk must be a whole number >= 1; given 0"),
        (
            lambda: fingerprints(np.array([{}, None]), chunk=4),
            r"inputs\[0:2\] must be an array of 2 rows; given object\[2\]",
        ),
        (
            lambda: without_copies(GOOD, fingerprints(LABELS[:299], chunk=99)),
            r"test must lie in \[0, 299\); row 49 is 299",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_whose_slices_are_too_short_are_refused():
    inputs = Slices(LABELS[:10])
    inputs.size = 300
    with pytest.raises(ValueError, match=r"inputs\[8:16\] must be an array of 8 rows; .*\[2\]"):
        fingerprints(inputs, chunk=8)


@pytest.mark.parametrize(
    "val, test, message",
    [
        (0, 10, "the val split must hold at least one sample for each of 3 classes; given 0 of 30"),
        (10, 2, "the test split .*given 2 of 30"),
        (14, 14, "the train split .*given 2 of 30"),
        (20, 20, "the train split .*given -10 of 30"),
    ],
)
def test_split_errors(val, test, message):
    with pytest.raises(ValueError, match=message):
        stratified_split(np.arange(30) % 3, val=val, test=test, seed=0)
