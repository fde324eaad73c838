"""Labels as their posterior: how likely is the given one right, and which is, if it is not?

trusted samples say how often given labels are wrong; the network, after a step that lowers the
validation loss, says which label it believes in; Bayes' rule joins the two
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.targets import rescale
from saflex_jax.core.tree import identity
from saflex_jax.types import Reduce, Targets

# The network must be better than chance by this much before it is asked who is wrong.
_LEAST = 0.05


class Agreement(NamedTuple):
    """How much probability the network gives to given labels, as running sums.

    Attributes:
      trusted: f32[2], sum and number of trusted samples, per row of a batch.
      others: f32[2], likewise.
    """

    trusted: jax.Array
    others: jax.Array


def no_agreement() -> Agreement:
    """Before the first sample."""
    return Agreement(jnp.zeros(2), jnp.zeros(2))


def agreement(probs: jax.Array, prior: jax.Array) -> jax.Array:
    """a_i = <p_i, q_i> / <q_i, q_i>, f32[B]: the probability of a one-hot label, 1 where p = q."""
    return jnp.sum(probs * prior, axis=-1) / jnp.sum(prior * prior, axis=-1)


def add_agreement(
    kept: Agreement,
    trusted: tuple[jax.Array, jax.Array],
    others: tuple[jax.Array, jax.Array],
    *,
    decay: float = 0.99,
    reduce: Reduce = identity,
) -> Agreement:
    """Forgets a little of the sums and adds a batch to them, all batches counting alike.

    Args:
      kept: sums so far.
      trusted, others: (a, rows), the values f32[B] of `agreement` and which of them count, bool[B].
      decay: in [0, 1), of the sums.
      reduce: mean over the data-parallel axis.
    """
    of = lambda a, rows: jnp.stack([jnp.sum(jnp.where(rows, a, 0.0)), jnp.sum(rows, dtype=a.dtype)])
    new = reduce(Agreement(of(*trusted), of(*others)))
    rows = jnp.maximum(new.trusted[1] + new.others[1], jnp.finfo(jnp.float32).tiny)
    # Per row: a mean over devices is no sum over them.
    return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x / rows, kept, new)


def noise_rate(kept: Agreement, num_classes: int) -> jax.Array:
    """The share of given labels that are wrong, f32[] in [0, 1].

        eta = (a - u) / (a - (1 - a) / (K - 1)) ,   a = trusted agreement, u = the others'

    solves u = (1 - eta) a + eta (1 - a) / (K - 1): a network that finds the right label with
    probability a finds a wrong one, if all are alike, with (1 - a) / (K - 1). Both kinds of samples
    must have come by the same pipeline and been trained on alike; what makes samples hard then
    makes both hard. Zero where no trusted sample was seen or the network is no better than chance.

    Args:
      kept: sums, see `add_agreement`.
      num_classes: K >= 2.
    """
    mean = lambda sums: sums[0] / jnp.where(sums[1] > 0, sums[1], 1.0)
    right, given = mean(kept.trusted), mean(kept.others)
    above_chance = right - (1 - right) / (num_classes - 1)
    return jnp.clip((right - given) / jnp.maximum(above_chance, _LEAST), 0.0, 1.0)


def posterior_targets(
    prior: jax.Array,
    probs: jax.Array,
    noise_rate: float | jax.Array,
    *,
    trusted: jax.Array | None = None,
    mask: jax.Array | None = None,
    reduce: Reduce = identity,
) -> Targets:
    """The given label with the probability that it is right, else what the network believes.

        r_i = (1 - eta) <q_i, p_i> / ((1 - eta) <q_i, p_i> + eta <1 - q_i, p_i> / (K - 1))
        o_i = (1 - q_i) p_i / <1 - q_i, p_i> ,   c_i = ||o_i||^4
        w_i = r_i + (1 - r_i) c_i ,   y_i = (r_i q_i + (1 - r_i) c_i o_i) / w_i

    and weights rescaled to global mean one. For one-hot labels, wrong ones being equally likely,
    r_i q_i + (1 - r_i) o_i is the posterior of the true label given q_i and the network's belief
    p_i. Of that the part o_i counts as far as the network is certain, c_i: a sample that is of no
    class it knows keeps little weight. Where eta is 0 all is as given, mixed labels too.

    Args:
      prior: q, f32[B, K].
      probs: p, f32[B, K], >= 0; a row of zeros = nothing is known, as given.
      noise_rate: eta, f32[] in [0, 1], see `noise_rate`.
      trusted: bool[B]; True rows stay as given, weight one. None = no row.
      mask: bool[B]; False rows get weight 0.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient; the utility is 2 r_i - 1, negative where the given label is more
      likely wrong than right. Probabilities that are not finite give weights that are not finite.

    Raises:
      ValueError: shapes disagree; noise_rate outside [0, 1]; and, on concrete arrays, prior not in
        the simplex.

    Source: this project's (docs/results.md). The label's likelihood is that of Patrini et al.,
    "Making Deep Neural Networks Robust to Label Noise", CVPR 2017, for symmetric noise.
    """
    checks.same_shape(prior=prior, probs=probs)
    size, num_classes = prior.shape
    checks.rows(size, trusted=trusted, mask=mask)
    if not isinstance(noise_rate, jax.Array):
        checks.fraction("noise_rate", noise_rate)
    mask = jnp.ones(size, bool) if mask is None else mask
    checks.simplex("prior", prior, mask)

    others = (1 - prior) * probs
    other = jnp.sum(others, axis=-1)
    right = (1 - noise_rate) * jnp.sum(prior * probs, axis=-1)
    wrong = noise_rate * other / (num_classes - 1)
    divide = lambda x, y, none: jnp.where(y == 0, none, x / jnp.where(y == 0, 1.0, y))
    right = divide(right, right + wrong, 1.0)
    if trusted is not None:
        right = jnp.where(trusted, 1.0, right)
    others = divide(others, other[:, None], 0.0)
    believed = (1 - right) * jnp.sum(others**2, axis=-1) ** 2
    weights = right + believed
    labels = right[:, None] * prior + believed[:, None] * others
    labels = divide(labels, weights[:, None], prior)
    weights = rescale(jnp.where(mask, weights, 0.0), mask, reduce=reduce)
    labels = jnp.where(mask[:, None], labels, prior)
    return jax.lax.stop_gradient(Targets(weights, labels, jnp.where(mask, 2 * right - 1, 0.0)))
