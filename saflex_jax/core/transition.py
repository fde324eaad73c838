"""Which classes are confused with which: from beliefs and given labels.

People do not confuse all classes alike. Running sums of believed and given labels, K x K numbers,
say which; the trusted samples say how many labels are wrong and how frequent classes are.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.tree import above_zero, identity
from saflex_jax.types import Reduce


class Pairs(NamedTuple):
    """Running sums of labels, per row of a batch.

    >>> no_pairs(3).joint.shape
    (3, 3)

    Attributes:
      joint: f32[K, K], rows believed to be of class k and given as class j.
      trusted: f32[K], trusted samples of class k.
    """

    joint: jax.Array
    trusted: jax.Array


def no_pairs(num_classes: int) -> Pairs:
    """The sums before the first sample.

    >>> likelihood(no_pairs(2), 0.0, num_trusted=10).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    Args:
      num_classes: K.
    """
    checks.whole(2, num_classes=num_classes)
    return Pairs(jnp.zeros((num_classes, num_classes)), jnp.zeros(num_classes))


def add_pairs(
    sums: Pairs,
    probs: jax.Array,
    prior: jax.Array,
    rows: jax.Array,
    trusted: jax.Array,
    trusted_rows: jax.Array,
    *,
    mask: jax.Array | None = None,
    decay: float = 0.99,
    reduce: Reduce = identity,
) -> Pairs:
    """Decays the sums and adds a batch; all batches have the same weight.

        J_kj <- d J_kj + (1 - d) mean_i p_ik q_ij

    >>> one, two = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> sums = add_pairs(no_pairs(2), one, two, jnp.ones(1, bool), one, jnp.ones(1, bool), decay=0.)
    >>> sums.joint.tolist()  # believed to be of the first class, given as the second
    [[0.0, 1.0], [0.0, 0.0]]

    Args:
      sums: so far, of K classes.
      probs: p, f32[B, K M], beliefs; see `likelihood` for M.
      prior: q, f32[B, K M], the given labels.
      rows: bool[B], the rows that count: unmixed and not trusted.
      trusted: f32[A, K M], the labels of trusted samples.
      trusted_rows: bool[A], False on padding among the trusted samples.
      mask: bool[B], False on padding among the candidates; None = no padding.
      decay: d in [0, 1), of the sums.
      reduce: mean over the data-parallel axis.
    """
    checks.decay(decay=decay)
    checks.same_shape(probs=probs, prior=prior)
    num_classes = len(sums.trusted)

    def blocks(labels, counts):  # f32[..., K, M]
        labels = jnp.where(counts[:, None], labels, 0.0)
        return labels.reshape(len(labels), num_classes, -1)

    believed, given = blocks(probs, rows), blocks(prior, rows)
    joint = jnp.einsum("bkm,bjm->kj", believed, given, precision="highest")
    # Per row that is no padding, so that another number of devices goes on with the same sums.
    mask = jnp.ones(len(probs), bool) if mask is None else mask
    size, known = reduce(
        (jnp.sum(mask, dtype=joint.dtype), jnp.mean(trusted_rows, dtype=joint.dtype))
    )
    shares = jnp.mean(blocks(trusted, trusted_rows), (0, 2)) / jnp.where(known > 0, known, 1.0)
    added = reduce((joint / above_zero(size), shares))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, sums, Pairs(*added))


def likelihood(
    sums: Pairs, noise_rate: float | jax.Array, *, num_trusted: int, blocks: int = 1
) -> jax.Array:
    """How far a given label j speaks for each class k, f32[K M, K M].

        L_kj = C_kj (M pi_k + 1) / (M rho_k + 1)

    C_kj is the probability that k is given as j, pi_k the share of class k among the M trusted
    samples, and rho_k its share in the beliefs about the others. So a class that beliefs exaggerate
    counts for less, and no class absorbs a similar one. With J_k = sum_j J_kj and U the matrix of
    uniform noise, U_kk = 1 - eta and eta / (K - 1) elsewhere,

        C_kj = t D_kj  for j != k ,   D_k = (M rho_k J_kj / J_k + K U_kj) / (M rho_k + K)

    and C_kk = 1 - sum of the others. Beliefs are only as good as the trusted samples behind them:
    with few of these, D is close to U. t = min(1, eta / sum_kj rho_k D_kj), j != k, keeps the share
    of wrong labels at or below eta, so that without wrong labels L is diagonal.

    >>> sums = Pairs(jnp.array([[3.0, 2.0], [0.0, 5.0]]), jnp.ones(2))  # class 0 is given as both
    >>> matrix = likelihood(sums, 0.2, num_trusted=1000)
    >>> bool(matrix[0, 1] > 0.35), bool(matrix[1, 0] < 0.01)
    (True, True)

    Args:
      sums: see `add_pairs`.
      noise_rate: eta, f32[] in [0, 1], see `posterior.estimate_noise_rate`.
      num_trusted: M >= 0, number of different trusted samples.
      blocks: labels are k * blocks + m with m always right (SLA's views): only k can be wrong.

    Source: this project's (docs/results.md). Soft counts of believed and given labels as in
    Northcutt et al., "Confident Learning", JAIR 2021; the ratio of class shares as in ReMixMatch
    (Berthelot et al., ICLR 2020).
    """
    checks.fraction(noise_rate=noise_rate)
    checks.whole(num_trusted=num_trusted)
    checks.whole(1, blocks=blocks)
    size = len(sums.trusted)
    of_class = jnp.sum(sums.joint, axis=1, keepdims=True)
    believed = _shares(of_class[:, 0])
    elsewhere = 1 - jnp.eye(size)
    counts = num_trusted * believed[:, None]
    uniform = noise_rate / (size - 1)
    found = jnp.where(of_class > 0, sums.joint / jnp.where(of_class > 0, of_class, 1.0), uniform)
    wrong = elsewhere * (counts * found + size * uniform) / (counts + size)
    total = jnp.sum(believed[:, None] * wrong)
    wrong *= jnp.minimum(1.0, noise_rate / jnp.where(total > 0, total, 1.0))
    transition = wrong + jnp.diag(1 - jnp.sum(wrong, axis=1))
    ratio = (num_trusted * _shares(sums.trusted) + 1) / (num_trusted * believed + 1)
    return jnp.kron(ratio[:, None] * transition, jnp.eye(blocks))


def most_likely(
    beliefs: jax.Array, given: jax.Array, rows: jax.Array | None = None, *, steps: int = 50
) -> jax.Array:
    """The confusion matrix that makes the given labels most likely, f32[K, K], rows sum to one.

        C = argmax sum_i log sum_k b_ik C_k,g(i)

    by expectation-maximisation: r_ik = b_ik C_k,g(i) / sum_l b_il C_l,g(i) and
    C_kj = (sum_i 1[g(i) = j] r_ik + K U_kj) / (sum_i r_ik + K), with U the matrix of uniform noise
    at the share of wrong labels in r: a class with few samples stays close to U. The beliefs must
    be fair, from a network that did not train on the given labels.

    >>> beliefs = jnp.array([[0.95, 0.05]] * 20 + [[0.05, 0.95]] * 20)
    >>> given = jnp.array([0] * 10 + [1] * 30)  # half of class 0 is given as class 1
    >>> most_likely(beliefs, given).round(1).tolist()
    [[0.5, 0.5], [0.0, 1.0]]

    Args:
      beliefs: b, f32[N, K], rows in the simplex.
      given: g, i32[N] in [0, K).
      rows: bool[N], the rows that count; None = all.
      steps: number of expectation-maximisation steps.

    Source: Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
    Algorithm", 1979, with one observer and beliefs in the place of the class shares.
    """
    number, size = beliefs.shape
    checks.whole(2, num_classes=size)
    checks.whole(1, steps=steps)
    checks.rows(number, given=given, rows=rows)
    counts = jnp.ones(number) if rows is None else rows.astype(jnp.float32)
    eye = jnp.eye(size)

    def one_share(rate):
        return (1 - rate) * eye + rate / (size - 1) * (1 - eye)

    def step(_, found):
        odds = beliefs * found[:, given].T
        right = counts[:, None] * odds / jnp.maximum(jnp.sum(odds, 1, keepdims=True), 1e-30)
        joint = jax.ops.segment_sum(right, given, size).T
        total = jnp.maximum(jnp.sum(joint), 1e-30)
        uniform = one_share(1 - jnp.trace(joint) / total)
        return (joint + size * uniform) / (jnp.sum(joint, 1, keepdims=True) + size)

    return jax.lax.fori_loop(0, steps, step, one_share(jnp.float32(0.2)))


def _shares(sums: jax.Array) -> jax.Array:
    """f32[K] divided by their sum; all alike where there is nothing yet."""
    total = jnp.sum(sums)
    return jnp.where(total > 0, sums / jnp.where(total > 0, total, 1.0), 1 / len(sums))
