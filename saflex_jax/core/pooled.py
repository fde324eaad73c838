"""Utilities pooled over groups of samples: which operation, magnitude or prompt helps, and harms?

One sample's utility is noisy, thousands of one operation's are not. Sums of G x K numbers say the
mean of each group, overall and by class, and how far it can be trusted.
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

    Attributes:
      weight: sum of w; a row counts 1 when it is added, and less as it is forgotten.
      weight_squared: sum of w^2.
      total: sum of w u.
      squared: sum of w u^2.
    """

    weight: jax.Array
    weight_squared: jax.Array
    total: jax.Array
    squared: jax.Array


class Pooled(NamedTuple):
    """What is known of each group, each f32[G, K] or f32[G].

    Attributes:
      count: n, rows that the mean is as good as.
      mean: of the utilities; 0 where n = 0.
      error: standard error of the mean; infinite where n < 2.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of this name
    mean: jax.Array
    error: jax.Array

    def interval(self, z: float = 1.96) -> tuple[jax.Array, jax.Array]:
        """(low, high): mean -+ z errors."""
        return self.mean - z * self.error, self.mean + z * self.error


def no_pools(num_groups: int, num_classes: int = 1) -> Pools:
    """The sums before the first row.

    >>> pooled(no_pools(2)).count.tolist()
    [[0.0], [0.0]]
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
    """Forgets a little of the sums and adds the rows of a batch.

        W_gk <- d W_gk + sum_i 1[g in g_i, k = k_i]              (likewise w^2 with d^2, u and u^2)

    >>> groups = jnp.array([[0, 1], [0, -1]])  # a row of both groups, and one of the first
    >>> found = pooled(add_utilities(no_pools(2), jnp.array([1.0, 3.0]), groups))
    >>> found.mean[:, 0].tolist(), found.count[:, 0].tolist()
    ([2.0, 1.0], [2.0, 1.0])

    Args:
      sums: so far, of G groups and K classes.
      utility: u, f32[B], in a scale that stays alike from batch to batch.
      groups: i32[B] or i32[B, L], the groups of each row, see `cells`; one that it has twice
        counts once, one outside [0, G) is none.
      classes: i32[B] in [0, K); None = all rows are of the first.
      mask: bool[B]; False rows are not added. None = all are.
      decay: d in [0, 1] of the sums; 1 forgets nothing.
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
    """
    return jax.tree.map(lambda x: jnp.sum(x, axis=1, keepdims=True), sums)


def pooled(sums: Pools) -> Pooled:
    """Mean and standard error of each group.

        n = W^2 / sum w^2 ,   m = sum w u / W ,   e^2 = (sum w u^2 / W - m^2) / (n - 1)

    Rows count as independent: of samples that come again and again, the error is that of their
    visits. The spread is taken to be at least 1e-3 of the root mean square, so that equal
    utilities are not without error.

    >>> sums = add_utilities(no_pools(1), jnp.array([1.0, 3.0, 1.0, 3.0]), jnp.zeros(4, int))
    >>> found = pooled(sums)
    >>> round(float(found.mean[0, 0]), 3), round(float(found.error[0, 0]), 3)
    (2.0, 0.577)

    Args:
      sums: see `add_utilities`; their `over_classes` for a group as a whole.

    Source: Kish, "Survey Sampling", 1965, for n.
    """
    weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
    count = sums.weight**2 / jnp.where(sums.weight_squared > 0, sums.weight_squared, 1.0)
    mean, square = sums.total / weight, sums.squared / weight
    variance = jnp.maximum(square - mean**2, 1e-6 * square)
    many = count >= 2
    error = jnp.sqrt(variance / jnp.where(many, count - 1, 1.0))
    return Pooled(count, mean, jnp.where(many, error, jnp.inf))


def shrunk(found: Pooled) -> jax.Array:
    """Means drawn towards the mean of all groups, the more the less is known of them, f32[G, K].

        s_g = M + t / (t + e_g^2) (m_g - M) ,   t = variance of the true means between the groups

    A guess for samples of a group that were seen rarely. M is the mean weighted by 1 / (t + e^2),
    t the moment estimator; without a spread beyond chance all groups are alike.

    >>> seen = Pooled(jnp.array([99.0, 99.0, 1.0]), jnp.array([1.0, -1.0, 9.0]),
    ...               jnp.array([0.1, 0.1, jnp.inf]))
    >>> [round(float(m), 2) for m in shrunk(seen)]  # of the last nothing is known
    [1.0, -1.0, 0.0]

    Args:
      found: of `pooled`, f32[G, K] or f32[G]; all its groups are drawn to one mean.

    Source: DerSimonian and Laird, "Meta-analysis in clinical trials", 1986, for t.
    """
    known = jnp.isfinite(found.error)
    precision = jnp.where(known, 1 / jnp.where(known, found.error, 1.0) ** 2, 0.0)
    total = jnp.sum(precision)
    safe = jnp.where(total > 0, total, 1.0)
    first = jnp.sum(precision * found.mean) / safe
    chi = jnp.sum(precision * (found.mean - first) ** 2) - (jnp.sum(known) - 1)
    spread = total - jnp.sum(precision**2) / safe
    between = jnp.maximum(chi / jnp.where(spread > 0, spread, 1.0), 0.0)
    weights = jnp.where(known, 1 / (between + jnp.where(known, found.error, 1.0) ** 2), 0.0)
    centre = jnp.sum(weights * found.mean) / jnp.maximum(jnp.sum(weights), 1e-30)
    return centre + between * weights * (found.mean - centre)


# --- groups --------------------------------------------------------------------------------------


def cells(operation: jax.Array, magnitude: jax.Array, edges: jax.Array) -> jax.Array:
    """The group of each operation at its magnitude, i32[B, L]: groups for `add_utilities`.

        g = (E + 1) o + number of edges of o below the magnitude

    >>> edges = jnp.array([[0.5], [10.0]])
    >>> cells(jnp.array([[0, 1], [0, 1]]), jnp.array([[0.2, 7.0], [0.9, 30.0]]), edges).tolist()
    [[0, 2], [1, 3]]

    Args:
      operation: i32[B, L] in [0, O), of a `types.Trace`; or places of prompts.
      magnitude: f32[B, L], in the operation's units; or strengths.
      edges: f32[O, E], ascending, of each operation's magnitudes, see `quantile_edges`.
    """
    above = magnitude[..., None] > edges[operation]
    return (operation * (edges.shape[1] + 1) + jnp.sum(above, axis=-1)).astype(jnp.int32)


def quantile_edges(
    operation: np.ndarray, magnitude: np.ndarray, num_operations: int, bins: int = 4
) -> np.ndarray:
    """Edges between `bins` parts of each operation's magnitudes, f32[O, bins - 1], on the host.

    Parts hold equally many rows. An edge that would split nothing off, as where a magnitude is
    always the same, is infinite; so is every edge of an operation that does not occur.

    >>> quantile_edges(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, 5.0]), 2, bins=2).tolist()
    [[1.0], [inf]]

    Args:
      operation: i[...] in [0, num_operations).
      magnitude: f[...], finite.
      num_operations: O.
      bins: >= 1.
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
