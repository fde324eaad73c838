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
# An estimated share that is not above so many of its standard errors is none.
_ERRORS = 1.5


class Agreement(NamedTuple):
    """How far the network agrees with given labels, as running sums per row of a batch.

    Attributes:
      trusted: f32[3], number of trusted samples, sum and sum of squares of their `agreement`.
      others: f32[3], likewise.
    """

    trusted: jax.Array
    others: jax.Array


def no_agreement() -> Agreement:
    """Before the first sample."""
    return Agreement(jnp.zeros(3), jnp.zeros(3))


def agreement(probs: jax.Array, prior: jax.Array) -> jax.Array:
    """a_i = sum_k min(p_ik, q_ik), f32[B]: the probability of a one-hot label, 1 where p = q."""
    return jnp.sum(jnp.minimum(probs, prior), axis=-1)


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

    def sums(a, rows):
        a = jnp.where(rows, a, 0.0)
        return jnp.stack([jnp.sum(rows, dtype=a.dtype), jnp.sum(a), jnp.sum(a**2)])

    new = reduce(Agreement(sums(*trusted), sums(*others)))
    rows = jnp.maximum(new.trusted[0] + new.others[0], jnp.finfo(jnp.float32).tiny)
    # Per row: a mean over devices is no sum over them.
    return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x / rows, kept, new)


def noise_rate(kept: Agreement, num_classes: int, *, num_trusted: int = 0) -> jax.Array:
    """The share of given labels that are wrong, f32[] in [0, 1].

        eta = (a - u) / (a - (1 - a) / (K - 1)) ,   a = trusted agreement, u = the others'

    solves u = (1 - eta) a + eta (1 - a) / (K - 1): a network that finds the right label with
    probability a finds a wrong one, if all are alike, with (1 - a) / (K - 1). Both kinds of samples
    must have come by the same pipeline and been trained on alike; what makes samples hard then
    makes both hard. Zero where no trusted sample was seen or the network is no better than chance.

    Few trusted samples give an eta that is never quite zero where no label is wrong, and acting on
    it costs accuracy. Where their number M is known, eta is shrunk by its standard error e:

        eta (1 - (1.5 e / eta)^2)_+ ,   e = sd(a_i) / sqrt(M) / (a - (1 - a) / (K - 1))

    Args:
      kept: sums, see `add_agreement`.
      num_classes: K >= 2.
      num_trusted: M, different trusted samples, not their visits; 0 = unknown, nothing is shrunk.

    Source: this project's (docs/results.md); the shrinkage is the non-negative garrotte's, Breiman,
    "Better Subset Regression Using the Nonnegative Garrote", Technometrics 1995.
    """
    mean = lambda sums, power: sums[power] / jnp.where(sums[0] > 0, sums[0], 1.0)
    right, given = mean(kept.trusted, 1), mean(kept.others, 1)
    above_chance = jnp.maximum(right - (1 - right) / (num_classes - 1), _LEAST)
    found = jnp.clip((right - given) / above_chance, 0.0, 1.0)
    if not num_trusted:
        return found
    variance = jnp.maximum(mean(kept.trusted, 2) - right**2, 0.0)
    error = jnp.sqrt(variance / num_trusted) / above_chance
    signal = _ERRORS * error / jnp.where(found > 0, found, 1.0)
    return found * jnp.maximum(1 - signal**2, 0.0)


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

        s_ik = min(p_ik, q_ik) / q_ik
        r_ik = (1 - eta) s_ik / ((1 - eta) s_ik + eta (1 - s_ik) / (K - 1))
        o_i = (p_i - q_i)_+ / sum_k (p_ik - q_ik)_+ ,   c_i = ||o_i||^4 ,   l_i = <q_i, 1 - r_i>
        w_i = 1 - l_i + l_i c_i ,   y_i = (q_i r_i + l_i c_i o_i) / w_i

    and weights rescaled to global mean one. For one-hot labels s_i = <q_i, p_i> is what the network
    believes of the given label, o_i the rest of its belief, and, wrong labels being equally likely,
    q_i r_i + l_i o_i the posterior of the true label. A mixed label is several given ones: of each
    the network believes what of its belief lies there (s_ik, the coupling of p and q that moves
    least), so that p_i = q_i leaves it as it is. Of the posterior the part o_i counts as far as the
    network is certain, c_i: a sample that is of no class it knows keeps little weight. Where eta is
    0 all is as given.

    Args:
      prior: q, f32[B, K].
      probs: p, f32[B, K], >= 0; a row of zeros = nothing is known, as given.
      noise_rate: eta, f32[] in [0, 1], see `noise_rate`.
      trusted: bool[B]; True rows stay as given, weight one. None = no row.
      mask: bool[B]; False rows get weight 0.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient; the utility is 1 - 2 l_i, negative where the given label is more
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

    divide = lambda x, y, none: jnp.where(y == 0, none, x / jnp.where(y == 0, 1.0, y))
    hit = jnp.minimum(probs, prior)
    share = divide(hit, prior, 0.0)
    right, wrong = (1 - noise_rate) * share, noise_rate * (1 - share) / (num_classes - 1)
    as_given = jnp.sum(probs, axis=-1) == 0
    if trusted is not None:
        as_given |= trusted
    right = jnp.where(as_given[:, None], 1.0, divide(right, right + wrong, 1.0))
    others = probs - hit
    others = divide(others, jnp.sum(others, axis=-1, keepdims=True), 0.0)
    # Sums of what is moved, which are exactly zero where nothing is.
    lost = jnp.sum(prior * (1 - right), axis=-1)
    believed = lost * jnp.sum(others**2, axis=-1) ** 2
    weights = 1 - lost + believed
    labels = prior - prior * (1 - right) + believed[:, None] * others
    labels = divide(labels, weights[:, None], prior)
    weights = rescale(jnp.where(mask, weights, 0.0), mask, reduce=reduce)
    labels = jnp.where(mask[:, None], labels, prior)
    return jax.lax.stop_gradient(Targets(weights, labels, jnp.where(mask, 1 - 2 * lost, 0.0)))
