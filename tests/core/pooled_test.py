"""Pooled utilities: sums that agree with NumPy, errors that cover, shrinkage to one mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import pooled
from saflex_jax.core.pooled import Pooled
from saflex_jax.core.tree import Mean

GROUPS, CLASSES, SIZE, OPERATIONS = 5, 3, 400, 2
_rng = np.random.default_rng(0)
UTILITY = _rng.normal(size=SIZE).astype(np.float32)
MEMBERS = _rng.integers(-1, GROUPS, size=(SIZE, OPERATIONS))  # -1: of no group
OF_CLASS = _rng.integers(CLASSES, size=SIZE)
MASK = _rng.random(SIZE) < 0.8


def added(rows=slice(None), sums=None, **options):
    sums = pooled.no_pools(GROUPS, CLASSES) if sums is None else sums
    given = (x[rows] for x in (UTILITY, MEMBERS, OF_CLASS, MASK))
    return pooled.add_utilities(sums, *map(jnp.asarray, given), **options)


def test_means_and_errors_are_those_of_the_rows():
    for found, classes in (
        (pooled.pooled(added()), range(CLASSES)),
        (pooled.pooled(pooled.over_classes(added())), [None]),
    ):
        for g in range(GROUPS):
            for place, k in enumerate(classes):
                rows = MASK & (MEMBERS == g).any(1) & ((OF_CLASS == k) if k is not None else True)
                u = UTILITY[rows]
                assert found.count[g, place] == len(u)
                np.testing.assert_allclose(found.mean[g, place], u.mean(), atol=1e-5)
                error = u.std(ddof=1) / np.sqrt(len(u))
                np.testing.assert_allclose(found.error[g, place], error, rtol=1e-3)


def test_batches_add_up_and_devices_agree():
    half = slice(0, SIZE // 2), slice(SIZE // 2, SIZE)
    of_both = added(half[1], added(half[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), of_both, added())
    split = [jnp.asarray(x).reshape(4, -1, *x.shape[1:])
             for x in (UTILITY, MEMBERS, OF_CLASS, MASK)]  # fmt: skip

    def of_device(*rows):
        empty = pooled.no_pools(GROUPS, CLASSES)
        return pooled.add_utilities(empty, *rows, reduce=Mean("data"))

    each = jax.vmap(of_device, axis_name="data")(*split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, [b] * 4, atol=1e-4), each, added())


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws = _rng.normal(0.3, 2.0, size=(500, 60)).astype(np.float32)
    groups = jnp.broadcast_to(jnp.arange(500)[:, None], draws.shape).ravel()
    sums = pooled.add_utilities(pooled.no_pools(500), jnp.asarray(draws.ravel()), groups)
    low, high = pooled.pooled(sums).interval()
    assert 0.92 < np.mean((low < 0.3) & (0.3 < high)) < 0.98


def test_what_is_forgotten_counts_for_less():
    sums = pooled.no_pools(1)
    for _ in range(200):
        sums = pooled.add_utilities(
            sums, jnp.asarray(_rng.normal(size=10), jnp.float32), jnp.zeros(10, int), decay=0.9
        )
    # sum w = 10 / (1 - d), sum w^2 = 10 / (1 - d^2)
    assert pooled.pooled(sums).count[0, 0] == pytest.approx(190.0, rel=1e-3)


def test_groups_that_differ_by_chance_alone_are_shrunk_to_one():
    errors = np.full(200, 0.5, np.float32)
    by_chance = Pooled(np.full(200, 9.0), 1 + 0.5 * _rng.normal(size=200).astype("f4"), errors)
    apart = by_chance._replace(mean=by_chance.mean + 10 * np.arange(200, dtype="f4"))
    assert np.std(pooled.shrunk(by_chance)) < 0.2 * np.std(by_chance.mean)
    np.testing.assert_allclose(pooled.shrunk(apart), apart.mean, atol=0.1)
    unknown = Pooled(np.zeros(3), np.zeros(3, "f4"), np.full(3, np.inf, "f4"))
    np.testing.assert_array_equal(pooled.shrunk(unknown), 0)


def test_a_group_of_zeros_is_known_well_and_spoils_no_other():
    utility = jnp.array([0.0, 0.0, 0.0, 0.5, 0.6, 0.7, -0.1, 0.2, 0.1])
    stats = pooled.pooled(
        pooled.add_utilities(pooled.no_pools(3), utility, jnp.repeat(jnp.arange(3), 3))
    )
    assert stats.error[0, 0] == 0
    found = pooled.shrunk(stats)
    known_well = stats._replace(error=stats.error.at[0].set(1e-3))
    np.testing.assert_allclose(found, pooled.shrunk(known_well), atol=1e-3)
    assert abs(found[0, 0]) < 1e-3 and 0.4 < found[1, 0] < 0.6
    # Where all are 0, so are they shrunk, and one that nothing is known of.
    zeros = Pooled(jnp.full(3, 9.0), jnp.zeros(3), jnp.array([0.0, 0.0, jnp.inf]))
    np.testing.assert_array_equal(pooled.shrunk(zeros), 0)


def test_cells_hold_equally_many_rows_of_an_operation():
    operation = _rng.integers(2, size=(SIZE, 1))
    magnitude = (_rng.random((SIZE, 1)) * (1 + 9 * operation)).astype(np.float32)
    edges = pooled.quantile_edges(operation, magnitude, 3, bins=4)
    assert np.isinf(edges[2]).all()
    counts = np.bincount(
        np.asarray(pooled.cells(operation, magnitude, edges)).ravel(), minlength=12
    )
    for place in range(2):
        of_operation = counts[4 * place : 4 * place + 4]
        assert of_operation.sum() == (operation == place).sum() and np.ptp(of_operation) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(decay=1.5), "decay"),
        (dict(groups=jnp.zeros(SIZE + 1, int)), "groups must have shape"),
        (dict(mask=jnp.ones(2, bool)), "mask must have shape"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"utility": jnp.asarray(UTILITY), "groups": jnp.zeros(SIZE, int)} | change
    with pytest.raises(ValueError, match=message):
        pooled.add_utilities(pooled.no_pools(2), **given)
