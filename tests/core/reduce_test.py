"""The core under `reduce`: a mapped axis over shards gives the numbers of the whole batch.

vmap with a named axis stands in for the devices, so nothing but the algebra is tested here. The
shards hold unequal numbers of real rows, for which a mean of means would be wrong.
"""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from saflex_jax.core import curvature, linear_solve, memory, steps
from saflex_jax.core.hypergrad import implicit_hypergradient
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.core.scores import score
from saflex_jax.core.targets import solve_targets
from saflex_jax.core.tree import Mean, identity, select, under
from saflex_jax.types import Targets
from tests import problems
from tests.problems import assert_close

SHARDS, SIZE = 2, 6
MASK = np.array([True, True, True, True, False, False])  # three real rows, and one
MEAN = Mean("data")


def sharded(f):
    """f over shards of its arguments' leading axis."""

    def run(*args):
        split = jax.tree.map(lambda x: np.reshape(x, (SHARDS, -1, *x.shape[1:])), args)
        return jax.jit(jax.vmap(f, axis_name="data"))(*split)

    return run


def rows(x):
    """Per-row results of all shards, as one batch."""
    return np.reshape(np.asarray(x), (-1, *x.shape[2:]))


def same_everywhere(tree):
    """A global result, after checking that every shard holds it."""
    tree = jax.device_get(tree)
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    return jax.tree.map(lambda x: x[0], tree)


def test_mean_is_a_share_whose_reduction_is_exact():
    values = np.arange(6, dtype=np.float32)
    run = sharded(lambda v, m: MEAN(masked_mean(v, m, reduce=MEAN)))
    np.testing.assert_allclose(run(values, MASK), values[MASK].mean())
    np.testing.assert_array_equal(run(values, np.zeros(6, bool)), 0)


@pytest.mark.parametrize(
    "solve",
    [
        linear_solve.identity_solve(),
        pytest.param(linear_solve.neumann_solve(steps=2, scale=0.1), marks=pytest.mark.slow),
        linear_solve.cg_solve(maxiter=3),
    ],
)
def test_scores(solve):
    p = problems.problem("mlp", size=SIZE, val_size=SIZE)
    candidates, val = p.streams.candidates, p.streams.val

    def run(x, mask, vx, vy, vmask, *, reduce):
        options = dict(mask=mask, val_mask=vmask, predicate=under("head"))
        return score(p.logits_fn, p.params, x, vx, vy, solve=solve, reduce=reduce, **options)

    args = (candidates.inputs, MASK, val.inputs, val.labels, MASK[::-1])
    mapped = sharded(partial(run, reduce=MEAN))(*args)
    whole = jax.jit(partial(run, reduce=identity))(*args)
    assert_close(rows(mapped.scores), whole.scores)
    assert_close(same_everywhere((mapped.val_loss, mapped.info)), (whole.val_loss, whole.info))


@pytest.mark.parametrize("learn", ["both", "weights"])
def test_targets(learn):
    # The second shard keeps fewer rows than the first, so weights need the global count.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(SIZE, 4)).astype(np.float32)
    scores[3:] *= 5
    prior = problems.hard_labels(rng, SIZE, 4)

    def run(s, q, m, **o):
        return solve_targets(s, q, mask=m, learn=learn, tolerance=0.0, **o)

    mapped = sharded(partial(run, reduce=MEAN))(scores, prior, MASK)
    whole = jax.jit(run)(scores, prior, MASK)
    assert_close(jax.tree.map(rows, mapped), whole)


def test_memory():
    rng = np.random.default_rng(0)
    before = memory.init(4, 3)

    def run(i, s, m, **o):
        return memory.update(before, i, s, m, **o)

    # sample 1 is on both shards, sample 3 on padding rows only
    args = (
        np.array([0, 1, 1, 1, 3, 3], np.int32),
        rng.normal(size=(6, 3)).astype(np.float32),
        MASK,
    )
    after, remembered = sharded(partial(run, reduce=MEAN))(*args)
    expected, whole = jax.jit(run)(*args)
    after = same_everywhere(after)
    assert_close(after.mean, expected.mean, 1e-6)
    np.testing.assert_array_equal(after.visits, expected.visits)
    assert_close(rows(remembered), whole, 1e-6)


def test_hypergradient_and_hessian():
    p = problems.problem("mlp", size=SIZE, val_size=SIZE)
    head = select(p.params, under("head"))
    meta = np.array([0.5, 2.0], np.float32)  # the weight of either half of the classes' samples

    def losses(part, meta, x, y, mask):
        params = {**p.params, "head": part["head"]}
        weight = meta[0] * y[:, 0] + meta[1] * (1 - y[:, 0])
        return weighted_cross_entropy(p.logits_fn(params, x), y, weight, mask)

    def run(x, y, mask, vx, vy, *, reduce):
        def inner(t, m):
            return masked_mean(losses(t, m, x, y, mask), mask, reduce=reduce)

        def outer(t, m):
            return masked_mean(losses(t, m, vx, vy, mask), mask, reduce=reduce)

        solve = linear_solve.neumann_solve(steps=3, scale=0.1)
        value, grads, info = implicit_hypergradient(
            inner, outer, head, meta, solve=solve, reduce=reduce
        )
        hvp = curvature.hessian(lambda t: inner(t, meta), head, reduce=reduce)
        return value, grads, info, hvp(head)

    candidates, val = p.streams.candidates, p.streams.val
    args = (candidates.inputs, candidates.labels, MASK, val.inputs, val.labels)
    mapped = sharded(partial(run, reduce=MEAN))(*args)
    assert_close(same_everywhere(mapped), jax.jit(partial(run, reduce=identity))(*args))


def test_inner_step_and_its_metrics():
    p = problems.problem("mlp", size=SIZE, val_size=SIZE)
    tx = optax.sgd(0.1)
    state = steps.init_state(jax.random.key(0), p.params, p.model_state, tx)
    batch = p.streams.candidates._replace(mask=MASK)
    ones = np.ones(SIZE, np.float32)
    targets = Targets(ones, batch.labels, ones)
    clean = p.streams.val._replace(mask=MASK[::-1])

    def run(batch, targets, clean, *, reduce):
        after, metrics = steps.inner_step(
            state, batch, targets, train_fn=p.model.train, tx=tx, clean=clean, reduce=reduce
        )
        return after.params, metrics

    args = (batch, targets, clean)
    params, metrics = same_everywhere(sharded(partial(run, reduce=MEAN))(*args))
    expected, whole = jax.jit(partial(run, reduce=identity))(*args)
    assert_close(params, expected, 1e-6)
    for name, (total, count) in whole.items():
        np.testing.assert_allclose(np.divide(*metrics[name]), total / count, rtol=1e-5)


def test_microbatches_of_fewer_real_rows_than_shards():
    p = problems.problem("mlp", size=8, val_size=SIZE)
    tx = optax.sgd(0.1)
    state = steps.init_state(jax.random.key(0), p.params, p.model_state, tx)
    batch = p.streams.candidates._replace(mask=np.arange(8) == 0)  # one real row for two shards
    ones = np.ones(8, np.float32)

    def run(batch, targets, *, reduce):
        return steps.inner_step(
            state, batch, targets, train_fn=p.model.train, tx=tx, microbatches=2, reduce=reduce
        )[0].params

    args = batch, Targets(ones, batch.labels, ones)
    params = same_everywhere(sharded(partial(run, reduce=MEAN))(*args))
    assert_close(params, jax.jit(partial(run, reduce=identity))(*args), 1e-6)
