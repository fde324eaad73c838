import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import memory

N, K, B = 6, 3, 5


class Loop:
    """The definition, one sample at a time."""

    def __init__(self, decay):
        self.decay = decay
        self.seen = {}  # sample -> (mean, visits)

    def update(self, index, scores, mask):
        for sample in {int(i) for i, m in zip(index, mask) if m}:
            rows = [s for i, s, m in zip(index, scores, mask) if m and i == sample]
            fresh = np.mean(rows, axis=0, dtype=np.float64)
            mean, visits = self.seen.get(sample, (np.zeros(K), 0))
            rate = max(1 - self.decay, 1 / (visits + 1))
            self.seen[sample] = (mean + rate * (fresh - mean), visits + 1)
        return np.array([self.seen[int(i)][0] if m else np.zeros(K) for i, m in zip(index, mask)])


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_equals_a_plain_loop(decay):
    rng = np.random.default_rng(0)
    update = jax.jit(lambda *args: memory.update(*args, decay=decay))
    found, reference = memory.init(N, K), Loop(decay)
    for _ in range(8):
        # Five draws of four samples: duplicates in every batch, and two samples never seen.
        index = rng.integers(4, size=B).astype(np.int32)
        scores = rng.normal(size=(B, K)).astype(np.float32)
        mask = rng.random(B) < 0.8
        scores[~mask] = np.nan  # padding is not read
        found, remembered = update(found, index, scores, mask)
        np.testing.assert_allclose(remembered, reference.update(index, scores, mask), atol=1e-5)
    for sample in range(N):
        mean, visits = reference.seen.get(sample, (np.zeros(K), 0))
        np.testing.assert_allclose(found.mean[sample], mean, atol=1e-5)
        assert found.visits[sample] == visits
    assert {sample for sample in range(N) if found.visits[sample]} == {0, 1, 2, 3}


def test_first_visits_are_a_plain_mean_then_the_decay_rules():
    found = memory.init(1, 1)
    means = []
    for score in (1.0, 3.0, 8.0, 8.0):
        row = np.full((1, 1), score, np.float32)
        found, remembered = memory.update(
            found, np.zeros(1, np.int32), row, np.ones(1, bool), decay=0.6
        )
        means.append(float(remembered[0, 0]))
    # 1; (1 + 3) / 2; then rate 0.4 > 1/3 and > 1/4
    np.testing.assert_allclose(means, [1.0, 2.0, 4.4, 5.84], rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, np.nan])
def test_decay_out_of_range(decay):
    arrays = memory.init(N, K)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\); given"):
        memory.update(
            arrays, np.zeros(B, np.int32), np.zeros((B, K)), np.ones(B, bool), decay=decay
        )


def test_half_precision_comes_to_rest_near_the_mean():
    rng = np.random.default_rng(0)
    update = jax.jit(lambda *args: memory.update(*args, decay=0.9)[0])
    exact, rounded = memory.init(N, K), memory.init(N, K, dtype="bfloat16")
    assert rounded.mean.nbytes * 2 == exact.mean.nbytes
    for visit in range(60):
        scores = rng.normal(1.0, 0.5 if visit < 30 else 0.0, size=(N, K)).astype(np.float32)
        rows = np.arange(N, dtype=np.int32), scores, np.ones(N, bool)
        exact, rounded = update(exact, *rows), update(rounded, *rows)
    found, expected = np.asarray(rounded.mean[:N], np.float32), np.asarray(exact.mean[:N])
    error = np.abs(found / expected - 1).max()
    assert 0 < error < 2**-8 / (1 - 0.9)
    np.testing.assert_array_equal(exact.visits, rounded.visits)


def test_rows_divide_among_devices_and_the_surplus_stays_empty():
    found = memory.init(1025, K)
    assert found.mean.shape == (2048, K)
    index = np.array([1024, 0], np.int32)
    update = jax.jit(memory.update)
    found, _ = update(found, index, np.ones((2, K), np.float32), np.ones(2, bool))
    assert np.flatnonzero(found.visits).tolist() == [0, 1024]
    np.testing.assert_array_equal(memory.recall(found, np.array([1024, 7])), [[1] * K, [0] * K])


@pytest.mark.parametrize(
    "sizes, dtype, message",
    [
        ((0, K), "float32", "num_samples must be a whole number >= 1"),
        ((N, 0), "float32", "num_classes must be a whole number >= 1"),
        ((N, K), "float16", "memory_dtype must be one of"),
    ],
)
def test_malformed_memories(sizes, dtype, message):
    with pytest.raises(ValueError, match=message):
        memory.init(*sizes, dtype=dtype)


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("visits", [1, 7])
def test_a_started_memory_is_as_after_so_many_equal_visits(visits, dtype):
    means = beliefs(np.random.default_rng(0), N, K)
    empty = visited = memory.init(N, K, dtype=dtype)
    rows = np.arange(N, dtype=np.int32), means, np.ones(N, bool)
    for _ in range(visits):
        visited, _ = memory.update(visited, *rows, decay=0.99)
    started = memory.started(empty, means, visits=visits)
    np.testing.assert_array_equal(started.visits, visited.visits)
    np.testing.assert_array_equal(started.mean[:N], jnp.asarray(means, dtype))
    np.testing.assert_allclose(*(np.float32(m.mean) for m in (visited, started)), atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: memory.started(m, np.ones((N, K + 1)), visits=1), r"3 classes; given \[6, 4\]"),
        (lambda m: memory.started(m, np.ones((1025, K)), visits=1), r"1 to 1024 samples"),
        (lambda m: memory.started(m, np.ones(N), visits=1), r"given \[6\]"),
        (lambda m: memory.started(m, np.ones((N, K)), visits=0), "visits .*>= 1; given 0"),
        (
            lambda m: memory.started(memory.init(N, K, top=1), np.ones((N, K)), visits=1),
            "memory must be one of all classes, top=None; given a TopMemory",
        ),
    ],
)
def test_a_memory_that_cannot_be_started(make, message):
    with pytest.raises(ValueError, match=message):
        make(memory.init(N, K))


def test_a_reduce_that_only_averages_cannot_see_the_rows_of_others():
    rows = np.zeros(B, np.int32), np.zeros((B, K)), np.ones(B, bool)
    with pytest.raises(ValueError, match=r"reduce must be `saflex_jax\.identity` or have `gather`"):
        memory.update(memory.init(N, K), *rows, reduce=lambda tree: tree)


def beliefs(rng, size, classes):
    return rng.dirichlet(np.full(classes, 0.1), size=size).astype(np.float32)


def test_all_but_one_kept_class_are_all_classes():
    """The rest of one class is that class."""
    rng = np.random.default_rng(0)
    dense, top = memory.init(N, K), memory.init(N, K, top=K - 1)
    update = jax.jit(memory.update)
    for _ in range(6):
        rows = rng.integers(4, size=B).astype(np.int32), beliefs(rng, B, K), rng.random(B) < 0.8
        (dense, expected), (top, found) = (update(m, *rows) for m in (dense, top))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    everyone = np.arange(N)[:, None]  # any shape of indices
    np.testing.assert_allclose(
        memory.recall(top, everyone, K), memory.recall(dense, everyone), atol=1e-6
    )
    assert not memory.recall(top, np.array([5]), K).any()  # never seen


def test_the_rest_is_one_number_and_nothing_is_lost():
    rng, classes = np.random.default_rng(0), 12
    found, index = memory.init(1, classes, top=2), np.zeros(1, np.int32)
    first = beliefs(rng, 1, classes)
    update = jax.jit(functools.partial(memory.update, decay=0.8))
    found, remembered = update(found, index, first, np.ones(1, bool))  # the first, at any decay
    largest = np.argsort(first[0])[-2:]
    others = np.delete(first[0], largest)
    np.testing.assert_allclose(np.delete(remembered[0], largest), others.mean(), rtol=1e-5)
    np.testing.assert_allclose(remembered[0][largest], first[0][largest], rtol=1e-6)
    for _ in range(20):
        found, remembered = update(found, index, beliefs(rng, 1, classes), np.ones(1, bool))
        np.testing.assert_allclose(remembered.sum(), 1, rtol=1e-5)


def test_the_given_label_is_kept_however_small_its_mean():
    classes, index = 50, np.array([3, 3, 0], np.int32)
    beliefs = np.random.default_rng(0).dirichlet(np.ones(classes), 3).astype(np.float32)
    beliefs[:2] = beliefs[0]
    given = np.array([beliefs[0].argmin()] * 2 + [beliefs[2].argmin()], np.int32)
    found, _ = jax.jit(memory.update)(
        memory.init(4, classes, top=3), index, beliefs, np.ones(3, bool), given=given
    )
    remembered = memory.recall(found, index, classes)
    rows = np.arange(3)
    np.testing.assert_allclose(remembered[rows, given], beliefs[rows, given], rtol=1e-6)
    largest = beliefs.argsort(axis=1)[:, -2:]  # the other two places
    for row in rows:
        np.testing.assert_allclose(remembered[row, largest[row]], beliefs[row, largest[row]])
    np.testing.assert_allclose(remembered.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("classes, top", [(1000, 8), (21_000, 8), (100_000, 7)])
def test_a_sample_takes_at_most_64_bytes_whatever_the_classes(classes, top):
    arrays = memory.init(1024, classes, top=top)
    assert sum(x.nbytes for x in arrays) <= 64 * 1024
    last = np.zeros((1, classes), np.float32)
    last[0, -1] = 1  # its number fits
    update = jax.jit(memory.update)
    arrays, found = update(arrays, np.zeros(1, np.int32), last, np.ones(1, bool))
    np.testing.assert_array_equal(found, last)


@pytest.mark.parametrize("top", [0, K, 2 * K])
def test_a_top_that_is_none(top):
    with pytest.raises(ValueError, match=f"top must be .*given {top}"):
        memory.init(N, K, top=top)
