from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from saflex_jax import _compat
from saflex_jax.augment.base import (
    OPERATIONS,
    by_operation,
    chain,
    choice,
    drawn,
    identity,
    on,
    per_example,
    record,
    sample_keys,
    upstream,
    views,
)
from saflex_jax.augment.spatial import affine, cutout, flip, shift
from saflex_jax.core import tree
from saflex_jax.methods import erm, saflex
from saflex_jax.models import from_function
from saflex_jax.types import Batch, Method, Streams, Trace

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


def run_with_branches(compose, augments, batch):
    """What the composition makes, what each part makes alone with its key, and these keys."""

    def noting(key, batch):
        keys = []

        def spied(augment):
            return lambda key, batch: (keys.append(key), augment(key, batch))[1]

        return compose(*map(spied, augments))(key, batch), keys

    found, keys = jax.jit(noting)(KEY, batch)
    alone = [run(augment, batch, key) for augment, key in zip(augments, keys)]
    return jax.tree.map(np.asarray, found), alone, [jax.random.key_data(k).tolist() for k in keys]


def columns_of(batch):
    return 0 if batch.trace is None else batch.trace.operation.shape[1]


def assert_is(found, alone, index):
    """`found` is what `alone` is, its trace filled up with the identity."""
    assert_batches_equal(found._replace(trace=None), alone._replace(trace=None))
    columns = columns_of(alone)
    for number in range(columns_of(found)):
        column = [x[:, number] for x in found.trace]
        if number < columns:
            assert_batches_equal(column, [x[:, number] for x in alone.trace])
        else:
            assert (column[0] == NUMBER["identity"]).all() and (column[1] == 0).all()
            equal(column[2], index)


def rows_of(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def assert_batches_equal(found, expected):
    jax.tree.map(equal, found, expected)
    dtypes = lambda batch: [x.dtype for x in jax.tree.leaves(batch)]
    assert dtypes(found) == dtypes(expected)


# --- the trace


def test_record_appends_a_column():
    batch = table(4)
    once = record(batch, "shift", 2)
    twice = record(once, jnp.array([3, 1, 4, 1]), jnp.arange(4.0), jnp.array([9, 8, 7, 6]))
    expected = Trace(
        np.stack([np.full(4, NUMBER["shift"]), [3, 1, 4, 1]], 1),
        np.stack([np.full(4, 2.0), np.arange(4)], 1),
        np.stack([batch.index, [9, 8, 7, 6]], 1),
    )
    dtypes = Trace(np.int32, np.float32, np.int32)
    assert_batches_equal(twice, batch._replace(trace=jax.tree.map(np.asarray, expected, dtypes)))
    with pytest.raises(ValueError, match=r"^operation must be one of .* did you mean 'rotate'"):
        record(batch, "rotat", 1.0)
    with pytest.raises(ValueError, match=r"^name must be .*given 'blurr'; did you .*'blur'"):
        per_example("blurr", lambda key, x: (x, 0.0))


def test_by_operation_sums_over_the_rows_that_an_operation_touched():
    rng = np.random.default_rng(4)
    size = 40
    operation = rng.integers(3, size=(size, 4))  # most rows meet an operation twice
    batch = table(size)
    batch = batch._replace(trace=Trace(jnp.asarray(operation), *2 * [jnp.zeros((size, 4))]))
    values = rng.normal(size=size).astype(np.float32)
    values[~np.asarray(batch.mask)] = np.nan  # padding may hold anything
    found = by_operation(jnp.asarray(values), batch)
    assert list(found) == list(OPERATIONS)
    for number, name in enumerate(OPERATIONS):
        total, count = 0.0, 0
        for row in range(size):
            if batch.mask[row] and number in operation[row]:
                total, count = total + values[row], count + 1
        assert count == found[name][1]
        assert (count > 0) == (number < 3)
        np.testing.assert_allclose(found[name][0], total, atol=1e-5)
    with pytest.raises(ValueError, match=r"^batch must have a trace"):
        by_operation(jnp.asarray(values), batch._replace(trace=None))


# --- composition


def test_per_example_draws_by_index():
    batch = table(60)
    found = run(noise("shift"), batch)
    added = found.inputs - batch.inputs
    np.testing.assert_allclose(found.trace.magnitude[:, 0], added[:, 0], atol=1e-6)
    equal(found.trace.operation, np.full((60, 1), NUMBER["shift"]))
    assert len(np.unique(added[:, 0])) == 60
    rows = np.array([5, 59, 5, 0])
    assert_batches_equal(run(noise("shift"), rows_of(batch, rows)), rows_of(found, rows))
    keys = sample_keys(KEY, rows_of(batch, rows))
    for key, row in zip(keys, rows):
        assert key == jax.random.fold_in(KEY, batch.index[row])


def test_chain_goes_from_left_to_right_with_independent_keys():
    batch = table(400)
    plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    times = per_example("flip", lambda key, x: (2 * x, 2.0))
    found = run(chain(plus, times), batch)
    np.testing.assert_allclose(found.inputs, 2 * (batch.inputs + 1), rtol=1e-6)
    equal(found.trace.operation, np.tile([NUMBER["shift"], NUMBER["flip"]], (400, 1)))
    equal(found.trace.magnitude, np.tile([1.0, 2.0], (400, 1)))
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
    relabel = lambda key, b: record(b._replace(labels=1 - b.labels), "mixup", 0.5, b.index + 1)
    branches = (noise("flip"), chain(noise("shift"), relabel), identity)
    pick = partial(choice, p=p)
    found, alone, keys = run_with_branches(pick, branches, batch)
    assert len(np.unique(keys, axis=0)) == 3
    assert columns_of(found) == 2
    first = [NUMBER["flip"], NUMBER["shift"], NUMBER["identity"]]
    which = (found.trace.operation[:, :1] == first).argmax(1)
    assert stats.chisquare(np.bincount(which), size * np.array(p)).pvalue > 1e-4
    for branch, made in enumerate(alone):
        rows = np.flatnonzero(which == branch)
        assert_is(rows_of(found, rows), rows_of(made, rows), batch.index[rows])
    # By index: other places and neighbours, the same branches.
    rows = np.random.default_rng(0).integers(size, size=50)
    assert_batches_equal(run(pick(*branches), rows_of(batch, rows)), rows_of(found, rows))
    # What was picked says nothing about what a branch draws.
    assert stats.kstest(found.trace.magnitude[which == 1, 0], "uniform").pvalue > 1e-3
    # Equal by default.
    even = run(choice(noise("flip"), identity), batch).trace.operation[:, 0] == NUMBER["flip"]
    assert stats.binomtest(int(even.sum()), size, 0.5).pvalue > 1e-4


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
    found, alone, keys = run_with_branches(views, augments, batch)
    assert len(np.unique(keys, axis=0)) == 4
    for name in ("labels", "mask", "index"):
        equal(getattr(found, name), np.repeat(getattr(batch, name), 4, 0))
    for view, made in enumerate(alone):
        assert_is(rows_of(found, slice(view, None, 4)), made, batch.index)
    # Two draws of one augmentation are two draws.
    first, second = ((a.inputs - batch.inputs).ravel() for a in alone[1:3])
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / first.size**0.5
    with pytest.raises(ValueError, match=r"^views must have at least one augmentation; given 0"):
        views()


def test_on_augments_one_entry():
    batch = images(5)
    tokens = np.arange(10, dtype=np.int32).reshape(5, 2)
    both = batch._replace(inputs={"image": batch.inputs, "tokens": tokens})
    augment = chain(shift(2), flip())
    found, alone = run(on("image", augment), both), run(augment, batch)
    assert_batches_equal(found, alone._replace(inputs={"image": alone.inputs, "tokens": tokens}))
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
        make()(KEY, batch._replace(inputs={"image": batch.inputs}))


def test_sharding_changes_nothing_and_sends_nothing():
    assert jax.device_count() == 8
    augment = jax.jit(
        chain(shift(2), flip(), affine(degrees=20.0, scale=0.1, shear=0.1), cutout(3))
    )
    batch = images(16)
    split = jax.NamedSharding(_compat.auto_mesh(jax.devices(), "data"), jax.P("data"))
    spread = jax.device_put(batch, split)
    found, one = augment(KEY, spread), augment(KEY, batch)
    assert found.inputs.sharding.is_equivalent_to(split, 4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, one)
    assert np.abs(one.inputs - batch.inputs).max((1, 2, 3)).min() > 1e-2
    text = augment.lower(KEY, spread).compile().as_text()
    sent = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [op for op in sent if op in text]


# --- in front of a method

LINEAR = from_function(
    lambda key, x: 0.1 * jax.random.normal(key, (6 * 8 * 2, 3)),
    lambda p, x: x.reshape(len(x), -1) @ p,
)
TX = optax.sgd(0.1)
reduce_nothing = lambda x: x


def test_upstream_augments_the_candidates_and_nothing_else():
    plain = erm.make(LINEAR, TX)
    augment = chain(shift(1), noise("feature_noise"))
    look = Method(
        plain.init,
        lambda state, streams, *, reduce: (streams, {}),
        plain.predict,
        lambda state, streams: streams,
    )
    spy = upstream(look, augment)
    step = jax.jit(partial(spy.step, reduce=reduce_nothing))
    streams = Streams(images(8), images(8, seed=1), images(8, seed=2))
    state = plain.init(KEY, streams.candidates.inputs)
    later, elsewhere = state._replace(step=state.step + 1), state._replace(key=jax.random.key(4))
    seen = [step(s, streams)[0] for s in (state, later, elsewhere)]
    for s in seen:
        jax.tree.map(equal, s[1:], streams[1:])
        assert np.abs(s.candidates.inputs - streams.candidates.inputs).max() > 0.1
        # Anew in every step and run.
        others = [o for o in seen if o is not s]
        assert all(np.abs(s.candidates.inputs - o.candidates.inputs).max() > 0.1 for o in others)
    close = partial(np.testing.assert_allclose, atol=1e-6)
    # What `targets` and `drawn` show is what the step trains on.
    jax.tree.map(close, jax.jit(spy.targets)(state, streams), seen[0])
    look_at = jax.jit(partial(drawn, augment))
    jax.tree.map(close, look_at(state, streams.candidates), seen[0].candidates)
    jax.tree.map(close, look_at(later, streams.candidates), seen[1].candidates)
    # Around a real method it is that method on the augmented candidates.
    method = saflex.make(LINEAR, TX, rule="simplex", direction="identity", predicate=None)
    step = jax.jit(partial(method.step, reduce=reduce_nothing))
    whole = jax.jit(partial(upstream(method, augment).step, reduce=reduce_nothing))
    whole = whole(state, streams)[0]
    parts, without = step(state, seen[0])[0], step(state, streams)[0]
    np.testing.assert_allclose(whole.params, parts.params, atol=1e-6)
    assert float(jnp.abs(whole.params - without.params).max()) > 1e-3
    assert upstream(plain._replace(targets=None), augment).targets is None


def test_saflex_remembers_a_sample_by_all_its_views():
    size, samples = 6, 60
    augment = views(identity, shift(2))
    options = {"rule": "simplex", "memory_decay": 0.9, "num_samples": samples, "num_classes": 3}
    method = saflex.make(LINEAR, TX, direction="identity", predicate=None, **options)
    method = upstream(method, augment)
    streams = Streams(images(size), images(8, seed=1))
    state = method.init(KEY, streams.candidates.inputs)
    after, metrics = jax.jit(partial(method.step, reduce=tree.identity))(state, streams)
    assert metrics["kept"][1] == 2 * streams.candidates.mask.sum()
    memory = after.extra.memory
    seen = np.asarray(streams.candidates.index[streams.candidates.mask])
    visits = np.zeros(samples)
    visits[seen] = 1
    equal(memory.visits[:samples], visits)

    # S_ik = <g, x_i (p_i - e_k)'> of a linear model, then the mean of the two rows, by hand.
    made = drawn(augment, state, streams.candidates)
    params = np.asarray(state.params, np.float64)
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)
    x, x_val = flat(made.inputs), flat(streams.val.inputs)
    residual = special.softmax(x_val @ params, 1) - streams.val.labels
    mask = np.asarray(streams.val.mask)
    along = x @ (x_val[mask].T @ residual[mask] / mask.sum())
    scores = (special.softmax(x @ params, 1) * along).sum(1, keepdims=True) - along
    own, shifted = scores[0::2], scores[1::2]
    assert np.abs(own - shifted).max() > 0.1 * np.abs(own).max()
    expected = ((own + shifted) / 2)[np.asarray(streams.candidates.mask)]
    found = np.asarray(memory.mean[:samples], np.float64)[seen]
    scale = (found * expected).sum() / (expected**2).sum()  # the memory holds its own units
    assert scale > 0
    np.testing.assert_allclose(found, scale * expected, atol=1e-4 * np.abs(found).max())
