import jax
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


def test_memory_of_no_samples():
    with pytest.raises(ValueError, match="num_samples must be positive"):
        memory.init(0, K)
