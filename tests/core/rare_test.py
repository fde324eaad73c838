import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core.pooled import Pooled
from saflex_jax.core.rare import with_prior

FOUND = Pooled(jnp.array([50.0, 30.0, 0.0]), jnp.array([1.0, -1.0, 0.0]),
               jnp.array([0.01, 0.01, jnp.inf]))  # fmt: skip


def test_visits_outweigh_the_group():
    visits = jnp.array([0.0, 1.0, 5.0, 1e6])
    found = with_prior(jnp.full(4, 3.0), visits, jnp.zeros(4, int), FOUND, strength=5.0)
    np.testing.assert_allclose(found, [1, (3 + 5) / 6, 2, 3], rtol=2e-3)
    never = with_prior(jnp.full(4, jnp.nan), jnp.zeros(4), jnp.array([0, 1, 2, -1]), FOUND)
    np.testing.assert_allclose(never[:2], [1, -1], rtol=1e-2)
    assert -1 < never[2] < 1  # of its group nothing is known
    np.testing.assert_allclose(never[3], (50 - 30) / 80, rtol=1e-5)


def test_a_group_of_zeros_leaves_the_others_theirs():
    exact = FOUND._replace(mean=FOUND.mean.at[1].set(0.0), error=FOUND.error.at[1].set(0.0))
    found = with_prior(jnp.zeros(3), jnp.zeros(3), jnp.arange(3), exact)
    np.testing.assert_allclose(found[:2], [1, 0], atol=1e-3)
    assert 0 < found[2] < 1


def test_it_errs_less_than_either_alone():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(2), 500)
    truth = np.array([1.0, -1.0])[groups] + rng.normal(size=1000)
    visits = rng.integers(1, 6, size=1000)
    mean = truth + np.sqrt(5.0 / visits) * rng.normal(size=1000)  # 5 times the variance
    found = Pooled(jnp.full(2, 500.0), jnp.array([mean[groups == g].mean() for g in (0, 1)]),
                   jnp.full(2, 0.08))  # fmt: skip
    guess = with_prior(jnp.array(mean), jnp.array(visits, float), jnp.array(groups), found)

    def error(values):
        return float(np.mean((np.asarray(values) - truth) ** 2))

    assert error(guess) < 0.85 * min(error(mean), error(np.array(found.mean)[groups]))


def test_bad_input():
    with pytest.raises(ValueError, match="strength must be positive"):
        with_prior(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, int), FOUND, strength=0.0)
    with pytest.raises(ValueError, match=r"visits must have shape \[2\]"):
        with_prior(jnp.zeros(2), jnp.zeros(3), jnp.zeros(2, int), FOUND)
