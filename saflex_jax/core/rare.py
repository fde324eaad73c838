"""Utilities of rarely seen samples, shrunk towards those of their group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.pooled import Pooled, shrunk


def with_prior(
    mean: jax.Array,
    visits: jax.Array,
    groups: jax.Array,
    stats: Pooled,
    *,
    strength: float = 5.0,
) -> jax.Array:
    """Utility of each sample, shrunk towards its group's mean, f32[N].

        u_i = (n_i m_i + a s_g(i)) / (n_i + a)

    s are the groups' means, `shrunk` themselves. A sample without visits gets its group's mean.
    This is the posterior mean if samples of a group vary by t and visits of a sample by a t.

    >>> stats = Pooled(jnp.array([90.0, 90.0]), jnp.array([1.0, -1.0]), jnp.array([0.01, 0.01]))
    >>> never, often = with_prior(jnp.array([0.0, 1.0]), jnp.array([0.0, 95.0]),
    ...                           jnp.array([1, 1]), stats)
    >>> round(float(never), 2), round(float(often), 2)
    (-1.0, 0.9)

    Args:
      mean: m, f32[N], over the visits of each sample; any value where there are none.
      visits: n, f32[N] >= 0.
      groups: i32[N] in [0, G), such as `augment.groups(batch, "prompt")`; a sample whose group is
        out of range is shrunk towards the mean of all rows.
      stats: what `core.pooled.pooled` returns, f32[G].
      strength: a > 0, the group mean's weight in visits.

    Raises:
      ValueError: shapes disagree; a strength that is not positive.

    Source: empirical Bayes for a normal mean, Efron and Morris, JASA 1973.
    """
    checks.positive(strength=strength)
    checks.rows(len(mean), visits=visits, groups=groups)
    prior = shrunk(stats)
    number = len(prior)
    inside = (groups >= 0) & (groups < number)
    weights = jnp.where(jnp.isfinite(stats.error), stats.count, 0.0)
    everyone = jnp.sum(weights * stats.mean) / jnp.maximum(jnp.sum(weights), 1.0)
    own = jnp.where(inside, prior[jnp.clip(groups, 0, number - 1)], everyone)
    seen = jnp.where(visits > 0, mean, 0.0)
    return (visits * seen + strength * own) / (visits + strength)
