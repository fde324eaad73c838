from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from saflex_jax import Batch
from saflex_jax.augment.base import OPERATIONS
from saflex_jax.augment.mixing import mixup
from saflex_jax.augment.tabular import (
    classmates,
    feature_mask,
    feature_noise,
    smote,
    tabular_cutmix,
)
from saflex_jax.data import Column, fit_encoder

KEY = jax.random.key(11)
SIZE, NUMERIC, CATEGORICAL = 300, 5, 4
ALL = {
    "feature_noise": partial(feature_noise, 0.5),
    "feature_mask": partial(feature_mask, 0.3, -7.0, category=99),
    "tabular_cutmix": partial(tabular_cutmix, 1.0),
    "smote": smote,
    "mixup": partial(mixup, 1.0),
}


def run_both(make, key, batch):
    """Of the table with categories, and of its numeric columns alone in bf16."""
    array = batch._replace(inputs=batch.inputs["numeric"].astype(jnp.bfloat16))
    return make()(key, batch), make()(key, array)


# One compilation for each, shared by the tests.
JITTED = {name: jax.jit(partial(run_both, make)) for name, make in ALL.items()}


def run(name, batch, part=0):
    return jax.device_get(JITTED[name](KEY, batch)[part])


def coded(padding=0):
    """Row i holds i + 1 in every column, and label i."""
    rows = np.arange(1, SIZE + 1, dtype=np.int32)[:, None]
    inputs = {
        "numeric": np.tile(rows.astype(np.float32), NUMERIC),
        "categorical": np.tile(rows, CATEGORICAL),
    }
    index = np.random.default_rng(0).permutation(10 * SIZE)[:SIZE].astype(np.int32)
    labels = np.eye(SIZE, dtype=np.float32)
    return Batch(inputs, labels, np.arange(SIZE) < SIZE - padding, index)


def classed(padding=0):
    """The coded table with labels of three classes; the last real row is alone in a fourth."""
    label = np.arange(SIZE) % 3
    label[SIZE - 1 - padding] = 3
    return coded(padding)._replace(labels=np.eye(SIZE, dtype=np.float32)[label])


def parents(augmented):
    """(own share, partner row or -1) by the labels."""
    labels = np.asarray(augmented.labels, np.float64)
    own = np.diag(labels)
    rest = labels - np.diag(own)
    assert ((rest > 0).sum(1) <= 1).all()
    return own, np.where(rest.any(1), rest.argmax(1), -1)


@pytest.mark.parametrize("name", ALL)
def test_a_sample_depends_on_its_index_and_padding_gets_in_nowhere(name):
    batch = classed(padding=100)
    poisoned = jax.tree.map(np.copy, batch.inputs)
    for x in poisoned.values():
        x[-100:] = np.nan if x.dtype == np.float32 else -1
    augmented = run(name, batch._replace(inputs=poisoned))
    again = run(name, batch)
    for part, again_part in zip(*map(jax.tree.leaves, (augmented.inputs, again.inputs))):
        np.testing.assert_array_equal(part[:-100], again_part[:-100])
    assert augmented.trace.operation.shape == (SIZE, 1)
    assert (augmented.trace.operation == OPERATIONS.index(name)).all()
    assert jax.tree.map(jnp.result_type, augmented.inputs) == jax.tree.map(
        jnp.result_type, batch.inputs
    )
    order = np.random.default_rng(1).permutation(SIZE)
    moved = run(name, batch._replace(index=batch.index[order]))
    if name.startswith("feature"):  # no partner: what is added or masked moves with the index

        def changed(b):
            return np.float64(b.inputs["numeric"]) - batch.inputs["numeric"]

        if name == "feature_mask":

            def changed(b):
                return np.asarray(b.inputs["numeric"] == -7)

        np.testing.assert_allclose(changed(moved), changed(again)[order], atol=1e-4)
        np.testing.assert_array_equal(again.labels, batch.labels)
    else:
        own, other = (np.asarray(b.trace.magnitude[:, 0]) for b in (again, moved))
        both = (own < 1)[order] & (other < 1)
        assert both.sum() > 50
        np.testing.assert_array_equal(own[order][both], other[both])


@pytest.mark.parametrize("name", ALL)
def test_an_array_is_a_table_without_categories(name):
    table, array = (run(name, classed(), part) for part in (0, 1))
    assert array.inputs.dtype == jnp.bfloat16
    assert array.inputs.shape == table.inputs["numeric"].shape
    if name in ("smote", "mixup"):  # what is drawn does not depend on the number of columns
        np.testing.assert_array_equal(array.trace.magnitude, table.trace.magnitude)
    changed = jnp.abs(array.inputs - classed().inputs["numeric"]) > 2
    assert bool(changed.any())


# --- one sample at a time


def test_noise_is_normal_and_on_numeric_columns_alone():
    batch = coded()
    augmented = run("feature_noise", batch)
    noise = np.float64(augmented.inputs["numeric"] - batch.inputs["numeric"]).ravel()
    assert stats.kstest(noise / 0.5, "norm").pvalue > 1e-3
    assert stats.pearsonr(noise[:-1], noise[1:]).pvalue > 1e-3
    np.testing.assert_array_equal(augmented.inputs["categorical"], batch.inputs["categorical"])
    np.testing.assert_array_equal(augmented.trace.magnitude, np.full((SIZE, 1), 0.5))


def test_a_masked_category_is_one_that_was_not_measured():
    columns = [Column("age", None), Column("job", ("clerk", "nurse"))]
    encode = fit_encoder(np.array([[30.0, 0], [40, 1]]), columns)
    table, unmeasured = (encode(np.array([[30.0, job], [40, job]])) for job in (0, np.nan))
    batch = Batch(table, np.eye(2), np.ones(2, bool), np.arange(2))
    masked = feature_mask(1.0)(KEY, batch).inputs
    np.testing.assert_array_equal(masked["categorical"], unmeasured["categorical"])


def test_mask_overwrites_its_share_of_columns():
    batch = coded()
    augmented = run("feature_mask", batch)
    numeric, categorical = augmented.inputs["numeric"], augmented.inputs["categorical"]
    masked = [np.asarray(numeric == -7), np.array(categorical == 99)]
    np.testing.assert_array_equal(numeric, np.where(masked[0], -7, batch.inputs["numeric"]))
    kept = np.where(masked[1], 99, batch.inputs["categorical"])
    np.testing.assert_array_equal(categorical, kept)
    masked[1][98] = False  # that row's code is 99
    for m in masked:
        assert stats.binomtest(int(m.sum()), m.size, 0.3).pvalue > 1e-3
    counts = np.concatenate(masked, 1).sum(1)
    np.testing.assert_allclose(
        np.delete(augmented.trace.magnitude[:, 0], 98), np.delete(counts, 98) / 9, rtol=1e-6
    )
    # Independent columns: the number masked in a row is binomial.
    expected = stats.binom(9, 0.3).pmf(range(10)) * SIZE
    observed = np.bincount(counts, minlength=10)

    def tail(x):
        return [*x[:6], x[6:].sum()]

    assert stats.chisquare(tail(observed), tail(expected)).pvalue > 1e-3


# --- pairs


def test_cutmix_swaps_whole_columns_and_the_label_has_their_share():
    batch = coded()
    augmented = run("tabular_cutmix", batch)
    own, partner = parents(augmented)
    rows = np.arange(SIZE)
    columns = np.concatenate([augmented.inputs["numeric"], augmented.inputs["categorical"]], 1)
    kept = columns == rows[:, None] + 1
    np.testing.assert_array_equal(columns, np.where(kept, rows[:, None] + 1, partner[:, None] + 1))
    np.testing.assert_allclose(own, kept.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(own, augmented.trace.magnitude[:, 0])
    assert own.min() > 0.5  # of nine columns
    # With l ~ U(0, 1) every number of kept columns is as likely; 4 kept are 5 of the partner.
    counts = np.bincount(kept.sum(1)[partner >= 0], minlength=10)[5:9]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.chisquare(kept[partner >= 0].sum(0)).pvalue > 1e-3  # no column is favoured


def test_mixup_averages_numbers_and_chooses_categories():
    batch = coded()
    augmented = run("mixup", batch)
    own, partner = parents(augmented)
    mixed = partner >= 0
    rows = np.arange(SIZE)
    share, other = own[:, None], partner[:, None] + 1
    numeric = np.where(mixed[:, None], share * (rows[:, None] + 1) + (1 - share) * other, 0)
    expected = numeric[mixed].repeat(5, 1)
    np.testing.assert_allclose(augmented.inputs["numeric"][mixed], expected, 1e-5)
    categorical = np.asarray(augmented.inputs["categorical"])
    kept = categorical == rows[:, None] + 1
    np.testing.assert_array_equal(categorical[mixed], np.where(kept, categorical, other)[mixed])
    # As often one's own as the share says, in all and where the share is small.
    for among in (mixed, mixed & (own < 0.65)):
        count, expected = kept[among].sum(), 4 * own[among].sum()
        deviation = np.sqrt(4 * (own * (1 - own))[among].sum())
        assert abs(count - expected) < 4 * deviation


def test_smote_interpolates_within_the_class():
    batch = classed()
    augmented = run("smote", batch)
    rows = np.arange(SIZE)
    own = np.float64(augmented.trace.magnitude[:, 0])
    partner = np.argsort(batch.index)[
        np.searchsorted(np.sort(batch.index), augmented.trace.partner[:, 0])
    ]
    alone = rows == SIZE - 1
    np.testing.assert_array_equal(partner == rows, alone)
    assert (partner[~alone] % 3 == rows[~alone] % 3).all() and SIZE - 1 not in partner[~alone]
    numeric = own * (rows + 1) + (1 - own) * (partner + 1)
    np.testing.assert_allclose(augmented.inputs["numeric"][:, 0], numeric, rtol=1e-5)
    np.testing.assert_allclose(augmented.labels, batch.labels, atol=1e-6)
    assert own[-1] == 1
    assert stats.kstest(own[:-1], "uniform").pvalue > 1e-3
    categorical = np.asarray(augmented.inputs["categorical"])
    kept = categorical == rows[:, None] + 1
    np.testing.assert_array_equal(categorical, np.where(kept, categorical, partner[:, None] + 1))
    deviation = np.sqrt(4 * (own * (1 - own)).sum())
    assert abs(kept.sum() - 4 * own.sum()) < 4 * deviation


def test_smote_interpolates_soft_labels():
    soft = jnp.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    batch = Batch(jnp.zeros((3, 2)), soft, jnp.ones(3, bool), jnp.arange(3))
    augmented = jax.jit(smote())(KEY, batch)
    own = augmented.trace.magnitude[:, 0]
    np.testing.assert_allclose(augmented.labels[0], own[0] * soft[0] + (1 - own[0]) * soft[1], 1e-5)
    np.testing.assert_allclose(augmented.labels[1], own[1] * soft[1] + (1 - own[1]) * soft[0], 1e-5)
    np.testing.assert_array_equal(augmented.labels[2], soft[2])


def test_classmates_are_uniform_over_the_unmasked_others():
    label = np.array([2, 0, 1, 2, 0, 2, 2, 1, 3, 0, 0])
    mask = np.array([True] * 8 + [True, True, False])
    batch = Batch((), jax.nn.one_hot(label, 4), jnp.asarray(mask), jnp.arange(11))
    draw = jax.jit(jax.vmap(lambda key: classmates(key, batch)))
    augmented = np.asarray(draw(jax.random.split(KEY, 1200)))
    for row in np.flatnonzero(mask):
        others = np.flatnonzero((label == label[row]) & mask & (np.arange(11) != row))
        counts = np.bincount(augmented[:, row], minlength=11)
        if len(others):
            assert counts[others].sum() == 1200
            assert len(others) == 1 or stats.chisquare(counts[others]).pvalue > 1e-3
        else:
            assert counts[row] == 1200


# --- bad input


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(feature_noise, -0.5), "deviation"),
        (partial(feature_mask, 1.5), "probability"),
        (partial(feature_mask, 0.5, category=-2), "category"),
        (partial(tabular_cutmix, 0.0), "alpha"),
        (partial(tabular_cutmix, 1.0, probability=-0.1), "probability"),
        (partial(smote, probability=np.nan), "probability"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        make()


@pytest.mark.parametrize("name", ["feature_noise", "feature_mask", "tabular_cutmix", "smote"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"numeric": x["numeric"]}, r"^inputs must have the entries .*'categorical'"),
        (lambda x: {**x, "numeric": x["categorical"]}, r"^numeric columns must be .* given int32"),
        (lambda x: {**x, "categorical": x["numeric"]}, r"^categorical columns must be .* float32"),
        (lambda x: x["categorical"], r"^numeric columns must be of type floating"),
    ],
)
def test_tables_that_are_none(name, change, message):
    batch = coded()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ALL[name](), KEY, batch._replace(inputs=change(batch.inputs)))
