"""How far beliefs may be trusted: the power that makes the given labels most likely.

A network that saw a sample twice, while labels were wrong, is underconfident: its beliefs must be
sharpened. One that has converged on classes that overlap is not. The given labels tell which,
through the transition matrix: temperature scaling that knows of wrong labels.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.posterior import USUAL, checked_noise, elsewhere, sharpened
from saflex_jax.core.tree import identity
from saflex_jax.types import Reduce

# Equally far apart, as logarithms. None flattens beliefs: flat ones make flat labels, those a flat
# network, and so on.
POWERS = (1.0, 2**0.5, 2.0, 2 * 2**0.5, 4.0)
WEIGHT = 5  # trusted samples of each class weigh as much as the usual power


def no_fits() -> jax.Array:
    """The fits before the first sample, f32[5].

    >>> float(best_power(no_fits(), 2, num_trusted=1000))
    2.0
    """
    return jnp.zeros(len(POWERS), jnp.float32)


def add_fits(
    fits: jax.Array,
    probs: jax.Array,
    prior: jax.Array,
    rows: jax.Array,
    noise: float | jax.Array,
    *,
    decay: float = 0.99,
    reduce: Reduce = identity,
) -> jax.Array:
    """Decays the fit of each power and adds a batch's log-likelihood of the given labels, f32[5].

        F_a <- d F_a + (1 - d) mean_i log( sum_kj b_ik q_ij C_kj / sum_kj b_ik C_kj ) ,
        b_ik = p_ik^a / sum_l p_il^a

    for the powers a in POWERS. While no label is wrong (C is diagonal) the fits stay as they are:
    the power then changes nothing, and wrong labels that nobody knows of would speak for flat ones.

    >>> belief, given = jnp.array([[0.6, 0.4]] * 8), jnp.array([[1.0, 0.0]] * 7 + [[0.0, 1.0]])
    >>> fits = add_fits(no_fits(), belief, given, jnp.ones(8, bool), 0.1)
    >>> bool(fits[2] > fits[0])  # 7 of 8 are of the first class: more than the beliefs say
    True

    Args:
      fits: so far.
      probs: p, f32[B, K], beliefs.
      prior: q, f32[B, K], the given labels.
      rows: bool[B], the rows that count: unmixed and not trusted.
      noise: eta or C, see `posterior.posterior_targets`.
      decay: d in [0, 1), of the fits.
      reduce: mean over the data-parallel axis.

    Raises:
      ValueError: shapes disagree; decay or a concrete eta out of range, or a negative C.
    """
    checks.decay(decay=decay)
    checks.same_shape(probs=probs, prior=prior)
    checks.rows(len(probs), rows=rows)
    noise, stays = checked_noise(noise, probs.shape[1], probs.dtype)
    wrong = elsewhere(jnp.ones((1, probs.shape[1]), probs.dtype), noise.T)  # sum_j C_kj, j not k
    met, total = stays * prior + elsewhere(prior, noise.T), stays + wrong
    least = jnp.finfo(probs.dtype).tiny
    rows = rows & (jnp.sum(probs, axis=-1) > 0)  # of the others nothing is known

    def log_likelihood(power):
        belief = sharpened(probs, power)
        likely = jnp.sum(belief * met, axis=-1) / jnp.maximum(
            jnp.sum(belief * total, axis=-1), least
        )
        return jnp.sum(jnp.where(rows, jnp.log(jnp.maximum(likely, least)), 0.0))

    fit = jax.vmap(log_likelihood)(jnp.asarray(POWERS, probs.dtype))
    fit, count = reduce((fit, jnp.sum(rows, dtype=probs.dtype)))
    added = fit / jnp.where(count > 0, count, 1.0)
    return jnp.where(jnp.any(wrong > 0), decay * fits + (1 - decay) * added, fits)


def best_power(fits: jax.Array, num_classes: int, *, num_trusted: int) -> jax.Array:
    """The power of beliefs that the given labels speak for, f32[].

        a = u (a* / u)^(M / (M + 5 K))

    u is `posterior.USUAL`. a* has the largest fit, on the parabola through the best of POWERS and
    its neighbours, in [1, 4]; where that has no maximum, it is the best of them. It is only as good
    as the share of wrong labels that M trusted samples gave. Without any fit, a = u.

    >>> round(float(best_power(-jnp.arange(5.0) ** 2, 2, num_trusted=10**6)), 3)
    1.0
    >>> round(float(best_power(-jnp.arange(5.0) ** 2, 2, num_trusted=10)), 3)  # 5 a class
    1.414

    Args:
      fits: see `add_fits`.
      num_classes: K >= 2.
      num_trusted: M >= 0, number of different trusted samples.

    Raises:
      ValueError: K or M out of range.

    Source: this project's (docs/results.md); one power of all beliefs is temperature scaling,
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    checks.whole(2, num_classes=num_classes)
    checks.whole(num_trusted=num_trusted)
    powers = jnp.log(jnp.asarray(POWERS, fits.dtype))
    most = jnp.argmax(fits)
    place = jnp.clip(most, 1, len(POWERS) - 2)
    below, here, above = (fits[place + i] for i in (-1, 0, 1))
    curve = below - 2 * here + above
    shift = jnp.where(curve < 0, (below - above) / (2 * jnp.where(curve < 0, curve, 1.0)), 0.0)
    best = powers[place] + jnp.clip(shift, -1, 1) * (powers[1] - powers[0])
    at_end = (curve >= 0) & (jnp.maximum(below, above) > here)  # else all three are level
    best = jnp.where(at_end, powers[most], best)
    start, weight = math.log(USUAL), num_trusted / (num_trusted + WEIGHT * num_classes)
    return jnp.where(jnp.all(fits == 0), USUAL, jnp.exp(start + weight * (best - start)))
