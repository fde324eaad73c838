from functools import partial

import jax
import numpy as np
import pytest
from scipy import stats

from saflex_jax import _compat
from saflex_jax.augment.base import (
    OPERATIONS,
    by_operation,
    chain,
    choice,
    identity,
    on,
    per_example,
    record,
    register_operation,
    sample_keys,
    views,
)
from saflex_jax.augment.parse import FACTORIES, parse, register
from saflex_jax.augment.spatial import affine, cutout, flip, shift
from saflex_jax.types import Batch, Trace

KEY = jax.random.key(3)
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
equal = np.testing.assert_array_equal


def table(size, columns=6, seed=0):
    """Rows whose indices are not their places, one of four masked."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, columns)).astype(np.float32)
    labels = np.eye(3, dtype=np.float32)[rng.integers(3, size=size)]
    index = rng.permutation(10 * size)[:size].astype(np.int32)
    return Batch(inputs, labels, np.arange(size) % 4 > 0, index)


def images(size, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(size=(size, 6, 8, 2)).astype(np.float32)
    return table(size, seed=seed)._replace(inputs=inputs)


def noise(name):
    """Adds U(0, 1) to every entry; the magnitude is what the first one got."""

    def op(key, x):
        drawn = jax.random.uniform(key, x.shape, x.dtype)
        return x + drawn, drawn.ravel()[0]

    return per_example(name, op)


def run(augment, batch, key=KEY):
    """What the compiled augmentation makes, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(augment)(key, batch))


def run_with_branches(compose, augments):
    """batch -> (what the composition makes, what each part made in it, the parts' keys)."""

    def noting(key, batch):
        keys, alone = [], []

        def noted(augment):
            def noting_augment(key, batch):
                keys.append(jax.random.key_data(key))
                alone.append(augment(key, batch))
                return alone[-1]

            return noting_augment

        return compose(*map(noted, augments))(key, batch), alone, keys

    program = jax.jit(noting)
    return lambda batch: jax.tree.map(np.asarray, program(KEY, batch))


def columns_of(batch):
    return 0 if batch.trace is None else batch.trace.operation.shape[1]


def assert_is(augmented, alone, index):
    """`augmented` is what `alone` is, its trace filled up with the identity."""
    assert_batches_equal(augmented._replace(trace=None), alone._replace(trace=None))
    columns = columns_of(alone)
    for number in range(columns_of(augmented)):
        column = [x[:, number] for x in augmented.trace]
        if number < columns:
            assert_batches_equal(column, [x[:, number] for x in alone.trace])
        else:
            assert (column[0] == NUMBER["identity"]).all() and (column[1] == 0).all()
            equal(column[2], index)


def rows_of(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def assert_batches_equal(augmented, expected):
    jax.tree.map(equal, augmented, expected)

    def dtypes(batch):
        return [x.dtype for x in jax.tree.leaves(batch)]

    assert dtypes(augmented) == dtypes(expected)


# --- the trace


def test_places_of_the_packages_operations_are_fixed():
    # Traces that are kept anywhere hold these places: add names at the end only.
    assert OPERATIONS[:36] == [
        "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize",
        "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
        "invert", "flip", "shift", "soft_crop", "resized_crop", "cutout", "random_erasing", "blur",
        "affine", "random_field", "augmix", "mixup", "cutmix", "resizemix", "fmix", "gridmix",
        "smoothmix", "feature_noise", "feature_mask", "tabular_cutmix", "smote", "automix",
    ]  # fmt: skip


@pytest.fixture
def restored():
    """Undoes registrations."""
    number, names = len(OPERATIONS), set(FACTORIES)
    yield
    del OPERATIONS[number:]
    for name in set(FACTORIES) - names:
        del FACTORIES[name]


def test_an_operation_of_ones_own_has_a_name_in_traces(restored):
    batch, number = table(6), len(OPERATIONS)
    assert register_operation("my_grain") == number
    assert register_operation("my_grain") == number  # again: the same
    assert register_operation("flip") == NUMBER["flip"]  # a name that is known: its place
    augment = chain(per_example("flip", lambda key, x: (-x, 1.0)), noise("my_grain"))
    augmented = run(augment, batch)
    equal(augmented.trace.operation, np.tile([NUMBER["flip"], number], (6, 1)))
    by_name = by_operation(np.ones(6, np.float32), augmented)
    assert list(by_name) == ["flip", "my_grain"]
    assert by_name["my_grain"] == (batch.mask.sum(), batch.mask.sum())
    for name in ("my grain", "", 3):
        with pytest.raises(ValueError, match=r"^name must be an identifier"):
            register_operation(name)


def test_an_augmentation_of_ones_own_can_be_written_in_a_config(restored):
    @register
    def my_grain(scale=1.0, *, name="my_grain"):
        return per_example(name, lambda key, x: (scale * x, scale))

    batch = table(6)
    augmented = run(parse("my_grain(3.0) | my_grain"), batch)
    np.testing.assert_allclose(augmented.inputs, 3 * batch.inputs)
    assert [OPERATIONS[n] for n in augmented.trace.operation[0]] == ["my_grain"] * 2
    assert register(my_grain) is my_grain  # as when a module is loaded again
    with pytest.raises(ValueError, match=r"did you mean 'my_grain'"):
        parse("my_grian")

    def flip():
        return identity

    for name in ("flip", "identity", "views", "my_grain"):
        flip.__name__ = name
        with pytest.raises(ValueError, match=f"^factory must have a name of its own; '{name}'"):
            register(flip)


def test_record_appends_a_column():
    batch = table(4)
    once = record(batch, "shift", 2)
    twice = record(once, np.array([3, 1, 4, 1]), np.arange(4.0), np.array([9, 8, 7, 6]))
    expected = Trace(
        np.stack([np.full(4, NUMBER["shift"]), [3, 1, 4, 1]], 1),
        np.stack([np.full(4, 2.0), np.arange(4)], 1),
        np.stack([batch.index, [9, 8, 7, 6]], 1),
    )
    dtypes = Trace(np.int32, np.float32, np.int32)
    assert_batches_equal(twice, batch._replace(trace=jax.tree.map(np.asarray, expected, dtypes)))
    message = r"^operation must be one of .* `augment.register_operation` .* did you mean 'rotate'"
    with pytest.raises(ValueError, match=message):
        record(batch, "rotat", 1.0)
    with pytest.raises(ValueError, match=r"^name must be .*given 'blurr'; did you .*'blur'"):
        per_example("blurr", lambda key, x: (x, 0.0))


def test_by_operation_sums_over_the_rows_that_an_operation_touched():
    rng = np.random.default_rng(4)
    size = 40
    operation = rng.integers(3, size=(size, 4))  # most rows meet an operation twice
    batch = table(size)
    operation[~batch.mask] = NUMBER["smote"]  # met by padding alone
    batch = batch._replace(trace=Trace(operation, *2 * [np.zeros((size, 4))]))
    values = rng.normal(size=size).astype(np.float32)
    values[~batch.mask] = np.nan  # padding may hold anything
    by_name = by_operation(values, batch)
    assert list(by_name) == list(OPERATIONS[:3])
    for number, (total, count) in enumerate(by_name.values()):
        rows = batch.mask & (operation == number).any(1)
        assert count == rows.sum() > 0
        np.testing.assert_allclose(total, values[rows].sum(), atol=1e-5)
    # Where the trace cannot be read all names are there, those that do not occur with a zero.
    traced = jax.jit(by_operation)(values, batch)
    assert set(traced) == set(OPERATIONS)
    for name, pair in traced.items():
        np.testing.assert_allclose(pair, by_name.get(name, (0, 0)), atol=1e-5)
    with pytest.raises(ValueError, match=r"^batch must have a trace"):
        by_operation(values, batch._replace(trace=None))


# --- composition


def test_per_example_draws_by_index():
    batch = table(60)
    augmented = run(noise("shift"), batch)
    added = augmented.inputs - batch.inputs
    np.testing.assert_allclose(augmented.trace.magnitude[:, 0], added[:, 0], atol=1e-6)
    equal(augmented.trace.operation, np.full((60, 1), NUMBER["shift"]))
    assert len(np.unique(added[:, 0])) == 60
    rows = np.array([5, 59, 5, 0])
    assert_batches_equal(run(noise("shift"), rows_of(batch, rows)), rows_of(augmented, rows))
    keys = sample_keys(KEY, rows_of(batch, rows))
    for key, row in zip(keys, rows):
        assert key == jax.random.fold_in(KEY, batch.index[row])


def test_chain_goes_from_left_to_right_with_independent_keys():
    batch = table(400)
    plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    times = per_example("flip", lambda key, x: (2 * x, 2.0))
    augmented = run(chain(plus, times), batch)
    np.testing.assert_allclose(augmented.inputs, 2 * (batch.inputs + 1), rtol=1e-6)
    equal(augmented.trace.operation, np.tile([NUMBER["shift"], NUMBER["flip"]], (400, 1)))
    equal(augmented.trace.magnitude, np.tile([1.0, 2.0], (400, 1)))
    assert chain()(KEY, batch) is batch
    # Two of a kind: each uniform, and not related to the other.
    pair = run(chain(noise("shift"), noise("shift")), batch)
    first, second = pair.trace.magnitude.astype(np.float64).T
    for values in (first, second):
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 20
    np.testing.assert_allclose(pair.inputs[:, 0] - batch.inputs[:, 0], first + second, atol=1e-5)


def test_choice_keeps_one_branch_whole_for_each_row():
    size, p = 900, (0.2, 0.5, 0.3)
    batch = table(size)

    def relabel(key, b):
        return record(b._replace(labels=1 - b.labels), "mixup", 0.5, b.index + 1)

    branches = (noise("flip"), chain(noise("shift"), relabel), identity)
    program = run_with_branches(partial(choice, p=p), branches)
    chosen, alone, keys = program(batch)
    assert len(np.unique(keys, axis=0)) == 3
    assert columns_of(chosen) == 2
    first = [NUMBER["flip"], NUMBER["shift"], NUMBER["identity"]]
    which = (chosen.trace.operation[:, :1] == first).argmax(1)
    assert stats.chisquare(np.bincount(which), size * np.array(p)).pvalue > 1e-4
    for number, branch in enumerate(alone):
        rows = np.flatnonzero(which == number)
        assert_is(rows_of(chosen, rows), rows_of(branch, rows), batch.index[rows])
    # By index: other places and neighbours, the same branches.
    rows = np.random.default_rng(0).integers(size, size=size)
    assert_batches_equal(program(rows_of(batch, rows))[0], rows_of(chosen, rows))
    # Which branch a row got says nothing about what the branch draws.
    assert stats.kstest(chosen.trace.magnitude[which == 1, 0], "uniform").pvalue > 1e-3
    # Equal by default.
    even = jax.jit(lambda key, b: choice(noise("flip"), identity)(key, b).trace.operation)
    flipped = np.asarray(even(KEY, batch))[:, 0] == NUMBER["flip"]
    assert stats.binomtest(int(flipped.sum()), size, 0.5).pvalue > 1e-4


@pytest.mark.parametrize(
    ("augments", "p"),
    [
        ((identity, identity), (1.0,)),
        ((identity, identity), (0.5, 0.6)),
        ((identity, identity), (-0.5, 1.5)),
        ((identity, identity), (np.nan, 1.0)),
        ((), None),
    ],
)
def test_choice_needs_a_distribution(augments, p):
    with pytest.raises(ValueError, match=r"^p must be .* sum to one over the .*; given "):
        choice(*augments, p=p)


def test_views_are_neighbouring_rows():
    size, noisy = 30, noise("flip")
    batch = table(size)
    augments = (identity, noisy, noisy, chain(noise("shift"), noise("shift")))
    viewed, alone, keys = run_with_branches(views, augments)(batch)
    assert len(np.unique(keys, axis=0)) == 4
    for name in ("labels", "mask", "index"):
        equal(getattr(viewed, name), np.repeat(getattr(batch, name), 4, 0))
    for number, view in enumerate(alone):
        assert_is(rows_of(viewed, slice(number, None, 4)), view, batch.index)
    # Two draws of one augmentation are two draws.
    first, second = ((a.inputs - batch.inputs).ravel() for a in alone[1:3])
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / first.size**0.5
    with pytest.raises(ValueError, match=r"^views must have at least one augmentation; given 0"):
        views()


def test_on_augments_one_entry():
    batch = images(5)
    tokens = np.arange(10, dtype=np.int32).reshape(5, 2)
    both = batch._replace(inputs={"image": batch.inputs, "tokens": tokens})
    augment = chain(noise("shift"), noise("flip"))
    augmented, alone = run(on("image", augment), both), run(augment, batch)
    assert_batches_equal(
        augmented, alone._replace(inputs={"image": alone.inputs, "tokens": tokens})
    )
    assert both.inputs["image"] is batch.inputs  # the caller's dictionary is left as it was
    for name, given, shown in [
        ("images", both, r"'images'; given \['image', 'tokens'\]"),
        ("image", batch, "'image'; given .*ndarray"),
    ]:
        with pytest.raises(ValueError, match=f"^inputs must be a dict with the entry {shown}"):
            on(name, augment)(KEY, given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(choice, identity, views(identity, identity)), "number 1 made 10 of 5"),
        (partial(on, "image", views(identity, identity)), "on needs .* keeps the number of rows"),
    ],
)
def test_a_changed_number_of_rows_is_refused(make, message):
    batch = images(5)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make(), KEY, batch._replace(inputs={"image": batch.inputs}))


def test_sharding_changes_nothing_and_sends_nothing():
    assert jax.device_count() == 8
    augment = jax.jit(
        chain(shift(2), flip(), affine(degrees=20.0, scale=0.1, shear=0.1), cutout(3))
    )
    batch = images(16)
    split = jax.NamedSharding(_compat.auto_mesh(jax.devices(), "data"), jax.P("data"))
    spread = jax.device_put(batch, split)
    compiled = augment.lower(KEY, spread).compile()
    augmented, one = compiled(KEY, spread), jax.device_get(augment(KEY, batch))
    assert augmented.inputs.sharding.is_equivalent_to(split, 4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), augmented, one)
    assert np.abs(one.inputs - batch.inputs).max((1, 2, 3)).min() > 1e-2
    sent = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [op for op in sent if op in compiled.as_text()]
