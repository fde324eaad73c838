"""Labels as their posterior: is the given label right and, if not, which one is?

Trusted samples say how often given labels are wrong. The network's belief, after a step that lowers
the validation loss, says which label is likely. Bayes' rule joins the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.targets import rescale
from saflex_jax.core.tree import above_zero, gather, identity
from saflex_jax.types import Reduce, Targets

# The largest power of beliefs that is taken. Of K classes the largest p^a may be K^-a, and below
# 1e-38 it is 0 in f32: the belief would be lost.
SHARPEST = 8.0
# The power of beliefs where nothing tells a better one: networks trained on wrong labels, and
# averages over a network's past, are underconfident.
USUAL = 2.0
# The network must be better than chance by this much before it is asked who is wrong.
_LEAST = 0.05


class Agreement(NamedTuple):
    """How much probability the network gives to given labels, as running sums.

    >>> float(no_agreement().seen)
    0.0

    Attributes:
      trusted: f32[3], of trusted samples per row of a batch: sum, number, and sum of squares.
      others: f32[3], likewise of the other samples.
      seen: f32[], number of trusted samples so far, over all devices and visits.
    """

    trusted: jax.Array
    others: jax.Array
    seen: jax.Array


def no_agreement() -> Agreement:
    """The sums before the first sample.

    >>> float(estimate_noise_rate(no_agreement(), num_classes=10))
    0.0
    """
    return Agreement(jnp.zeros(3), jnp.zeros(3), jnp.zeros(()))


def agreement(probs: jax.Array, prior: jax.Array) -> jax.Array:
    """How much probability the network gives to each given label, f32[B].

        a_i = sum_k min(p_ik, q_ik)         the probability of a one-hot label, 1 where p = q

    >>> agreement(jnp.array([[0.75, 0.25]]), jnp.array([[0.0, 1.0]])).tolist()
    [0.25]

    Args:
      probs: p, f32[B, K].
      prior: q, f32[B, K].
    """
    return jnp.sum(jnp.minimum(probs, prior), axis=-1)


def add_agreement(
    sums: Agreement,
    trusted: tuple[jax.Array, jax.Array],
    others: tuple[jax.Array, jax.Array],
    *,
    decay: float = 0.99,
    reduce: Reduce = identity,
) -> Agreement:
    """Decays the sums and adds a batch; all batches have the same weight.

    >>> agrees, trusted = jnp.array([0.9, 0.5, 0.7]), jnp.array([True, False, False])
    >>> sums = add_agreement(no_agreement(), (agrees, trusted), (agrees, ~trusted))
    >>> round(float(sums.others[0] / sums.others[1]), 3)  # the mean agreement of the others
    0.6

    Args:
      sums: so far.
      trusted, others: (a, rows): the values f32[B] of `agreement`, and the rows that count,
        bool[B].
      decay: in [0, 1), of the sums.
      reduce: mean over the data-parallel axis.
    """

    checks.decay(decay=decay)
    of_trusted, of_others = reduce((_sums(*trusted), _sums(*others)))
    # Per row: a mean over devices is no sum over them.
    rows = above_zero(of_trusted[1] + of_others[1])

    def forget(old, new):
        return decay * old + (1 - decay) * new / rows

    seen = sums.seen + jnp.sum(gather(trusted[1], reduce), dtype=jnp.float32)
    return Agreement(forget(sums.trusted, of_trusted), forget(sums.others, of_others), seen)


def _sums(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Sum, number and sum of squares over the rows that count, f32[3]."""
    return jnp.sum(jnp.where(rows, jnp.stack([values, jnp.ones_like(values), values**2]), 0.0), 1)


def _means(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean, and that of squares."""
    number = jnp.where(sums[1] > 0, sums[1], 1.0)
    return sums[0] / number, sums[2] / number


def estimate_noise_rate(sums: Agreement, num_classes: int, *, num_trusted: int = 0) -> jax.Array:
    """The share of given labels that are wrong, f32[] in [0, 1].

        eta = (a - u) / (a - (1 - a) / (K - 1)) ,   a = trusted agreement, u = the others'

    solves u = (1 - eta) a + eta (1 - a) / (K - 1): a network that gives the right label probability
    a gives each wrong one, if all are alike, (1 - a) / (K - 1). Both kinds of samples must come
    from the same pipeline and be trained on alike, so that both are equally hard. eta is zero while
    no trusted sample was seen or the network is no better than chance.

    With few trusted samples eta stays above zero even if every label is right, which costs
    accuracy. So it is shrunk by its standard error e, and zero below it:

        eta (1 - (e / eta)^2)_+ ,   e = sqrt(v / (M - 1)) / (a - (1 - a) / (K - 1))

    with v the variance of the trusted samples' agreement, and M different ones, at most as many as
    were seen so far; eta is zero while M < 2. A network that gives all right labels about the same
    probability needs few of them to know it.

    >>> sums = Agreement(jnp.array([0.9, 1.0, 0.82]), jnp.array([0.5, 1.0, 0.3]), seen=1e6)
    >>> round(float(estimate_noise_rate(sums, num_classes=2)), 2)  # (.9 - .5) / (.9 - .1)
    0.5
    >>> round(float(estimate_noise_rate(sums, num_classes=2, num_trusted=5)), 3)  # v = .01
    0.492

    Args:
      sums: see `add_agreement`.
      num_classes: K >= 2.
      num_trusted: M; 0 = unknown, and every visit counts as another sample.

    Raises:
      ValueError: fewer than two classes; num_trusted < 0; sums of another shape.

    Source: this project's (docs/results.md); the shrinkage is the non-negative garrotte's, Breiman,
    "Better Subset Regression Using the Nonnegative Garrote", Technometrics 1995.
    """
    checks.whole(2, num_classes=num_classes)
    checks.whole(num_trusted=num_trusted)
    for name, of_rows in (("trusted", sums.trusted), ("others", sums.others)):
        if np.shape(of_rows) != (3,):
            raise ValueError(f"sums.{name} must be f32[3]; given shape {np.shape(of_rows)}")
    (right, square), (given, _) = _means(sums.trusted), _means(sums.others)
    above_chance = jnp.maximum(right - (1 - right) / (num_classes - 1), _LEAST)
    rate = jnp.where(sums.others[1] > 0, (right - given) / above_chance, 0.0)
    rate = jnp.clip(rate, 0.0, 1.0)
    number = jnp.minimum(sums.seen, num_trusted) if num_trusted else sums.seen
    error = jnp.sqrt(jnp.maximum(square - right**2, 0.0) / jnp.maximum(number - 1, 1.0))
    ratio = error / above_chance / jnp.where(rate > 0, rate, 1.0)
    return jnp.where(number < 2, 0.0, rate * jnp.maximum(1 - ratio**2, 0.0))


def sharpened(probs: jax.Array, sharpness: float) -> jax.Array:
    """b_ik = p_ik^a / sum_j p_ij^a, f32[B, K]; rows of zeros stay so.

    >>> sharpened(jnp.array([[0.5, 0.5], [0.0, 0.0]]), 2.0).tolist()
    [[0.5, 0.5], [0.0, 0.0]]

    Args:
      probs: p, f32[B, K], >= 0.
      sharpness: a in (0, SHARPEST]; 1 changes nothing.

    Raises:
      ValueError: a concrete sharpness out of range.
    """
    checks.at_most(SHARPEST, sharpness=sharpness)
    return _normalised(probs**sharpness)


def posterior_targets(
    prior: jax.Array,
    probs: jax.Array,
    noise: float | jax.Array,
    *,
    sharpness: float = USUAL,
    trusted: jax.Array | None = None,
    mask: jax.Array | None = None,
    reduce: Reduce = identity,
) -> Targets:
    """The given label with the probability that it is right, otherwise the network's belief.

        b_ik = p_ik^a / sum_j p_ij^a ,   s_ik = min(b_ik, q_ik) / q_ik
        o(p)_i = (p_i - q_i)_+ / sum_k (p_ik - q_ik)_+ ,   c_i = ||o(p)_i||^4
        m_ij = sum_k o(b)_ik C_kj ,   r_ij = C_jj s_ij / (C_jj s_ij + m_ij (1 - s_ij))
        l_ij = q_ij (1 - r_ij) ,   w_i = 1 - (1 - c_i) sum_j l_ij
        y_ik = (q_ik r_ik + c_i sum_j l_ij o(b)_ik C_kj / m_ij) / w_i

    with weights rescaled to global mean one. C_kj is the probability that class k is given as j; a
    share eta of wrong labels means C_kk = 1 - eta and eta / (K - 1) elsewhere. For a one-hot label
    s_i = <q_i, b_i> is the belief in the given label and o_i the rest of the belief; with c = 1,
    y_i is the posterior of the true label. A mixed label counts as several given ones, and s_ik is
    the belief in each (the coupling of b and q that moves least), so b_i = q_i changes nothing. The
    part that leaves the given label counts as far as the network is certain, c_i: a sample of no
    known class keeps little weight, however much its belief is sharpened. With a diagonal C the
    targets are the given labels, bit for bit.

    >>> prior, belief = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.9, 0.1], [0.1, 0.9]])
    >>> targets = posterior_targets(prior, belief, 0.4)
    >>> targets.labels.argmax(1).tolist()  # the network believes the first label, not the second
    [0, 1]
    >>> (targets.utility < 0).tolist()
    [False, True]
    >>> never = jnp.array([[0.6, 0.4], [0.0, 1.0]])  # class 1 is never given as class 0
    >>> posterior_targets(prior, belief, never).labels.tolist()
    [[1.0, 0.0], [1.0, 0.0]]

    Args:
      prior: q, f32[B, K].
      probs: p, f32[B, K], >= 0; a row of zeros = nothing is known, the label stays as given.
      noise: eta, f32[] in [0, 1], see `estimate_noise_rate`; or C, f32[K, K] >= 0, see
        `core.transition.likelihood`. Only the ratios within a column of C matter.
      sharpness: a in (0, SHARPEST], power of beliefs, see USUAL; 1 takes them as they are.
      trusted: bool[B]; True rows stay as given, weight one. None = no row.
      mask: bool[B]; False rows get weight 0.
      reduce: mean over the data-parallel axis.

    Returns:
      Targets, without gradient. The utility is 1 - 2 sum_j l_ij, negative where the given label is
      more likely wrong than right. Probabilities that are not finite, or traced noise outside
      [0, 1], give weights that are not finite.

    Raises:
      ValueError: shapes disagree; fewer than two classes; sharpness out of range; and, on concrete
        arrays, a share outside [0, 1] or a negative C, prior not in the simplex, or negative probs.

    Source: this project's (docs/results.md). The label's likelihood is that of Patrini et al.,
    "Making Deep Neural Networks Robust to Label Noise", CVPR 2017; beliefs are sharpened as in
    MixMatch (Berthelot et al., NeurIPS 2019), whose temperature is 1 / a = 1/2.
    """
    checks.same_shape(prior=prior, probs=probs)
    size, num_classes = prior.shape
    checks.rows(size, trusted=trusted, mask=mask)
    checks.whole(2, num_classes=num_classes)
    checks.at_most(SHARPEST, sharpness=sharpness)
    mask = jnp.ones(size, bool) if mask is None else mask
    checks.simplex(mask, prior=prior)
    _check_probs(probs, mask)
    noise, stays = checked_noise(noise, num_classes, jnp.result_type(prior, probs))

    def beyond(p):  # o
        return _normalised(p - jnp.minimum(p, prior))

    certain = jnp.sum(beyond(probs) ** 2, axis=-1) ** 2
    as_given = jnp.sum(probs, axis=-1) == 0
    if trusted is not None:
        as_given |= trusted
    believed = sharpened(probs, sharpness)
    others = beyond(believed)
    share = _divide(jnp.minimum(believed, prior), prior, 0.0)
    met = elsewhere(others, noise)
    right, wrong = stays * share, met * (1 - share)
    # Exactly one, and nothing is moved, where nothing speaks against the label: on a GPU x / x is
    # not always one.
    is_right = as_given[:, None] | (wrong == 0)
    right = jnp.where(is_right, 1.0, _divide(right, right + wrong, 1.0))
    moved = prior * (1 - right)
    lost = jnp.sum(moved, axis=-1)
    weights = 1 - lost + certain * lost
    arriving = others * elsewhere(_divide(moved, met, 0.0), noise.T)
    labels = prior - moved + certain[:, None] * arriving
    labels = jnp.where(lost[:, None] == 0, prior, _divide(labels, weights[:, None], prior))
    weights = rescale(jnp.where(mask, weights, 0.0), mask, reduce=reduce)
    labels = jnp.where(mask[:, None], labels, prior)
    return jax.lax.stop_gradient(Targets(weights, labels, jnp.where(mask, 1 - 2 * lost, 0.0)))


def _check_probs(probs: jax.Array, mask: jax.Array) -> None:
    """Raises on concrete rows that cannot be probabilities; averages of them may sum to less."""
    if not checks.concrete((probs, mask)):
        return
    rows = np.where(np.asarray(mask)[:, None], np.asarray(probs, np.float64), 0.0)
    if (rows < 0).any() or (rows.sum(1) > 1 + 1e-3).any():
        raise ValueError(
            "probs must be >= 0, in rows that sum to at most one: probabilities, not logits; given "
            f"numbers down to {rows.min():.4g} and sums up to {rows.sum(1).max():.4g}"
        )


def checked_noise(
    noise: float | jax.Array, num_classes: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The noise, checked, and C_kk; not finite where it is traced and no probability.

    >>> checked_noise(0.25, 3, jnp.float32)[1].item()
    0.75

    Args:
      noise: see `posterior_targets`.
      num_classes: K.
      dtype: of what comes back.

    Raises:
      ValueError: a share outside [0, 1]; another shape, or a negative number.
    """
    if np.ndim(noise) == 0:
        checks.fraction(noise=noise)
        noise = jnp.asarray(noise, dtype)
        noise = jnp.where((noise >= 0) & (noise <= 1), noise, jnp.nan)
        return noise, 1 - noise
    if np.shape(noise) != (num_classes, num_classes):
        raise ValueError(
            f"noise must be one share or a matrix [{num_classes}, {num_classes}]; "
            f"given {np.shape(noise)}"
        )
    checks.not_negative(noise=noise)
    noise = jnp.asarray(noise, dtype)
    return noise, jnp.diag(noise)[None]


def elsewhere(x: jax.Array, noise: jax.Array) -> jax.Array:
    """sum_k x_k C_kj over k other than j, f32[B, K]; without the matrix of one share.

    >>> elsewhere(jnp.array([[1.0, 0.0, 0.0]]), jnp.float32(0.5)).tolist()
    [[0.0, 0.25, 0.25]]

    Args:
      x: f32[B, K].
      noise: eta or C, of `checked_noise`.
    """
    if noise.ndim == 0:
        return noise / (x.shape[1] - 1) * (jnp.sum(x, axis=-1, keepdims=True) - x)
    return jnp.dot(x, noise * (1 - jnp.eye(len(noise), dtype=noise.dtype)), precision="highest")


def _divide(x: jax.Array, y: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """x / y, and `otherwise` where y is 0."""
    return jnp.where(y == 0, otherwise, x / jnp.where(y == 0, 1.0, y))


def _normalised(x: jax.Array) -> jax.Array:
    """Rows divided by their sums; rows of zeros stay so."""
    return _divide(x, jnp.sum(x, axis=-1, keepdims=True), 0.0)
