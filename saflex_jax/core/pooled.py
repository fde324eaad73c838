"""Utilities pooled over groups of samples: which operation, magnitude or prompt helps or harms?

One sample's utility is noisy; the mean over thousands from one operation is not. Sums of G x K
numbers give the mean of each group, overall and by class, with its standard error.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.tree import gather, identity
from saflex_jax.types import Reduce


class Pools(NamedTuple):
    """Running sums over the rows of group g and class k, each f32[G, K].

    >>> no_pools(num_groups=3).total.shape
    (3, 1)

    Attributes:
      weight: sum of w; a row starts at w = 1 and decays.
      weight_squared: sum of w^2.
      total: sum of w u.
      squared: sum of w u^2.
    """

    weight: jax.Array
    weight_squared: jax.Array
    total: jax.Array
    squared: jax.Array


class Pooled(NamedTuple):
    """Mean utility of each group with its standard error, each f32[G, K] or f32[G].

    >>> low, high = Pooled(jnp.array([100.0]), jnp.array([0.5]), jnp.array([0.1])).interval()
    >>> round(float(low[0]), 3), round(float(high[0]), 3)
    (0.304, 0.696)

    Attributes:
      count: n, effective number of rows.
      mean: mean utility; 0 where n = 0.
      error: standard error of the mean; infinite where n < 2.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of this name
    mean: jax.Array
    error: jax.Array

    def interval(self, z: float = 1.96) -> tuple[jax.Array, jax.Array]:
        """(low, high): mean -+ z standard errors.

        Args:
          z: half-width in standard errors; 1.96 gives 95 %.
        """
        return self.mean - z * self.error, self.mean + z * self.error


def no_pools(num_groups: int, num_classes: int = 1) -> Pools:
    """The sums before the first row.

    >>> pooled(no_pools(2)).count.tolist()
    [[0.0], [0.0]]

    Args:
      num_groups, num_classes: G and K.
    """
    checks.whole(1, num_groups=num_groups, num_classes=num_classes)
    return Pools(*jnp.zeros((4, num_groups, num_classes)))


def add_utilities(
    sums: Pools,
    utility: jax.Array,
    groups: jax.Array,
    classes: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    decay: float = 1.0,
    reduce: Reduce = identity,
) -> Pools:
    """Decays the sums and adds the rows of a batch.

        W_gk <- d W_gk + sum_i 1[g in g_i, k = k_i]              (likewise w^2 with d^2, u and u^2)

    >>> groups = jnp.array([[0, 1], [0, -1]])  # a row of both groups, and one of the first
    >>> stats = pooled(add_utilities(no_pools(2), jnp.array([1.0, 3.0]), groups))
    >>> stats.mean[:, 0].tolist(), stats.count[:, 0].tolist()
    ([2.0, 1.0], [2.0, 1.0])

    Args:
      sums: so far, of G groups and K classes.
      utility: u, f32[B], on the same scale in every batch.
      groups: i32[B] or i32[B, L], the groups of each row, see `cells`. Duplicates count once;
        values outside [0, G) are ignored.
      classes: i32[B] in [0, K); None = class 0 for all rows.
      mask: bool[B]; False rows are not added. None = all are.
      decay: d in [0, 1], of the sums; 1 forgets nothing.
      reduce: `identity` or a `Mean`: every device adds the rows of all devices.

    Raises:
      ValueError: shapes disagree; decay outside [0, 1]; a reduce that can only average.
    """
    checks.fraction(decay=decay)
    size = len(utility)
    if np.ndim(groups) not in (1, 2) or np.shape(groups)[0] != size:
        raise ValueError(
            f"groups must have shape [{size}] or [{size}, L]; given {np.shape(groups)}"
        )
    classes = jnp.zeros(size, jnp.int32) if classes is None else classes
    mask = jnp.ones(size, bool) if mask is None else mask
    checks.rows(size, utility=utility, classes=classes, mask=mask)
    utility, groups, classes, mask = gather((utility, groups, classes, mask), reduce)
    num_groups, num_classes = sums.weight.shape
    utility = jnp.where(mask, utility, 0.0)
    places = groups.reshape(len(utility), -1, 1) == jnp.arange(num_groups)[None, None]
    member = (places.any(1) & mask[:, None]).astype(jnp.float32)
    of_class = jax.nn.one_hot(classes, num_classes)

    def added(values):
        return jnp.einsum("bg,bk,b->gk", member, of_class, values, precision="highest")

    count = added(jnp.ones_like(utility))
    return Pools(
        decay * sums.weight + count,
        decay**2 * sums.weight_squared + count,
        decay * sums.total + added(utility),
        decay * sums.squared + added(utility**2),
    )


def over_classes(sums: Pools) -> Pools:
    """The sums f32[G, 1] of all classes together.

    >>> over_classes(no_pools(5, 3)).weight.shape
    (5, 1)

    Args:
      sums: f32[G, K] each.
    """
    return jax.tree.map(lambda x: jnp.sum(x, axis=1, keepdims=True), sums)


def pooled(sums: Pools) -> Pooled:
    """Mean and standard error of each group.

        n = W^2 / sum w^2 ,   m = sum w u / W ,   e^2 = (sum w u^2 / W - m^2) / (n - 1)

    Rows count as independent: if samples recur, the error is that of their visits. The spread is
    at least 1e-3 of the root mean square, so that equal utilities still have an error.

    >>> sums = add_utilities(no_pools(1), jnp.array([1.0, 3.0, 1.0, 3.0]), jnp.zeros(4, int))
    >>> stats = pooled(sums)
    >>> round(float(stats.mean[0, 0]), 3), round(float(stats.error[0, 0]), 3)
    (2.0, 0.577)

    Args:
      sums: what `add_utilities` returns; `over_classes` of it for whole groups.

    Source: Kish, "Survey Sampling", 1965, for n.
    """
    weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
    count = sums.weight**2 / jnp.where(sums.weight_squared > 0, sums.weight_squared, 1.0)
    mean, square = sums.total / weight, sums.squared / weight
    variance = jnp.maximum(square - mean**2, 1e-6 * square)
    many = count >= 2
    error = jnp.sqrt(variance / jnp.where(many, count - 1, 1.0))
    return Pooled(count, mean, jnp.where(many, error, jnp.inf))


def shrunk(stats: Pooled) -> jax.Array:
    """Group means shrunk towards the mean of all groups, f32[G, K].

        s_g = M + t / (t + e_g^2) (m_g - M) ,   t = variance of the true means between the groups

    The less is known of a group, the more it is shrunk. M is the mean weighted by 1 / (t + e^2), t
    the moment estimator. If groups differ by no more than chance, t = 0 and all get M. An error of
    0, which `pooled` gives a group whose utilities are all 0, counts as 1 % of the root mean square
    of the others' means and errors.

    >>> stats = Pooled(jnp.array([99.0, 99.0, 1.0]), jnp.array([1.0, -1.0, 9.0]),
    ...                jnp.array([0.1, 0.1, jnp.inf]))
    >>> [round(float(m), 2) for m in shrunk(stats)]  # nothing is known of the last
    [1.0, -1.0, 0.0]

    Args:
      stats: what `pooled` returns, f32[G, K] or f32[G]; all groups and classes share one mean.

    Source: DerSimonian and Laird, "Meta-analysis in clinical trials", 1986, for t.
    """
    known = jnp.isfinite(stats.error)
    error = _positive(stats, known)
    precision = jnp.where(known, 1 / error**2, 0.0)
    total = jnp.sum(precision)
    safe = jnp.where(total > 0, total, 1.0)
    first = jnp.sum(precision * stats.mean) / safe
    chi = jnp.sum(precision * (stats.mean - first) ** 2) - (jnp.sum(known) - 1)
    spread = total - jnp.sum(precision**2) / safe
    between = jnp.maximum(chi / jnp.where(spread > 0, spread, 1.0), 0.0)
    weights = jnp.where(known, 1 / (between + error**2), 0.0)
    centre = jnp.sum(weights * stats.mean) / jnp.maximum(jnp.sum(weights), 1e-30)
    return centre + between * weights * (stats.mean - centre)


def _positive(stats: Pooled, known: jax.Array) -> jax.Array:
    """The errors of known groups, where they are 0 a small one; 1 of the others."""
    error = jnp.where(known, stats.error, 1.0)
    others = known & (error > 0)
    square = jnp.sum(jnp.where(others, stats.mean**2 + error**2, 0.0))
    least = jnp.where(square > 0, 0.01 * jnp.sqrt(square / jnp.maximum(jnp.sum(others), 1)), 1.0)
    return jnp.where(error > 0, error, least)


# --- groups --------------------------------------------------------------------------------------


def cells(operation: jax.Array, magnitude: jax.Array, edges: jax.Array) -> jax.Array:
    """The group of each operation at its magnitude, i32[B, L]: groups for `add_utilities`.

        g = (E + 1) o + number of edges of o below the magnitude

    >>> edges = jnp.array([[0.5], [10.0]])
    >>> cells(jnp.array([[0, 1], [0, 1]]), jnp.array([[0.2, 7.0], [0.9, 30.0]]), edges).tolist()
    [[0, 2], [1, 3]]

    Args:
      operation: i32[B, L] in [0, O), of a `types.Trace`; or indices of prompts.
      magnitude: f32[B, L], in the operation's units; or strengths.
      edges: f32[O, E], ascending edges of each operation's magnitudes, see `quantile_edges`.
    """
    above = magnitude[..., None] > edges[operation]
    return (operation * (edges.shape[1] + 1) + jnp.sum(above, axis=-1)).astype(jnp.int32)


def quantile_edges(
    operation: np.ndarray, magnitude: np.ndarray, num_operations: int, bins: int = 4
) -> np.ndarray:
    """Edges between `bins` parts of each operation's magnitudes, f32[O, bins - 1], on the host.

    Parts hold equally many rows. An edge that splits nothing off (a constant magnitude) is
    infinite, and so is every edge of an operation that does not occur.

    >>> quantile_edges(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, 5.0]), 2, bins=2).tolist()
    [[1.0], [inf]]

    Args:
      operation: i[...] in [0, num_operations), of each row.
      magnitude: f[...], finite, of each row.
      num_operations: O.
      bins: >= 1, parts per operation.
    """
    checks.whole(1, num_operations=num_operations, bins=bins)
    edges = np.full((num_operations, bins - 1), np.inf, np.float32)
    for place in np.unique(operation):
        values = np.sort(magnitude[operation == place])
        cuts = values[
            [(len(values) * b) // bins - 1 for b in range(1, bins) if len(values) >= bins]
        ]
        cuts = np.unique(cuts[cuts < values[-1]]) if len(cuts) else cuts
        edges[place, : len(cuts)] = cuts
    return edges
