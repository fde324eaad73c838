"""Losses per sample, and the global mean that turns them into one number.

A candidate loss is what a step trains its candidates on: (logits f32[B, K], targets: Targets,
candidates: Batch) -> f32[B], weighted by `targets.weights` and exactly 0 on padding. One that
compares rows says in its attribute `rows_together` how many neighbours must not be parted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.core.tree import above_zero, identity
from saflex_jax.types import Batch, Reduce, Targets

CandidateLoss = Callable[[jax.Array, Targets, Batch], jax.Array]
Decoupled = Literal["both", "less", "more"]


def at_least_f32(logits: jax.Array) -> jax.Array:
    """Logits in f32, or in a wider dtype if they have it.

    The log-probability of a class that is nearly sure rounds to 0 in bfloat16, and its gradient
    with it.

    >>> at_least_f32(jnp.zeros((1, 2), jnp.bfloat16)).dtype.name
    'float32'

    Args:
      logits: f[...].

    Raises:
      ValueError: another thing, such as (logits, state).
    """
    checks.arrays(logits=logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def weighted_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy against soft labels, one value per sample.

        l_i = - w_i sum_k y_ik log softmax(z_i)_k

    >>> labels = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    >>> weighted_cross_entropy(jnp.zeros((2, 2)), labels, weights=jnp.array([0.0, 2.0])).round(4)
    Array([0.    , 1.3863], dtype=float32)

    Differentiable in logits, labels and weights, also where a label is exactly zero, so that a
    hypergradient can raise it.

    Args:
      logits: f32[B, K].
      labels: f32[B, K], rows in the simplex.
      weights: f32[B], >= 0; None = ones.
      mask: bool[B]; False rows (padding) give exactly 0 and no gradient.

    Returns:
      f32[B], nats. Not averaged: see `masked_mean`.

    Raises:
      ValueError: shapes disagree; a concrete weight < 0.
    """
    checks.same_shape(labels=labels, logits=logits)
    checks.rows(logits.shape[0], weights=weights, mask=mask)
    checks.not_negative(weights=weights)
    logits = at_least_f32(logits)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, 0.0)
    losses = -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
    if weights is not None:
        losses = weights * losses
    return losses if mask is None else jnp.where(mask, losses, 0.0)


def masked_mean(
    values: jax.Array, mask: jax.Array | None = None, *, reduce: Reduce = identity
) -> jax.Array:
    """Mean of `values` f32[B] over the unmasked rows of all devices; 0 when all are masked.

        sum_local(values) / reduce(count_local)

    Under jit this is the global mean. Under pmap it is the device's share of the global mean:
    `reduce` of the result, or of its gradient, is the global value. Uneven padding keeps its exact
    weight, which a mean of per-device means would lose.

    >>> float(masked_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])))
    2.0

    Args:
      values: f32[B].
      mask: bool[B]; None = all rows count.
      reduce: mean over the data-parallel axis.
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    # Counts carry no gradient, so this reduce is safe inside a differentiated function.
    count = reduce(jnp.sum(mask, dtype=values.dtype))
    return jnp.sum(jnp.where(mask, values, 0.0)) / above_zero(count)


def jensen_shannon(logits: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence of several predictions of one sample.

        JSD_i = 1/V sum_v KL(p_vi || m_i) ,  m_i = clip(1/V sum_v p_vi, 1e-7, 1)

    >>> float(jensen_shannon(jnp.zeros((3, 1, 2)))[0])  # three equal predictions
    0.0

    Args:
      logits: f32[V, B, K], of V views.

    Returns:
      f32[B], nats, at most log V.

    Raises:
      ValueError: logits are not of rank 3.

    Source: Hendrycks et al., "AugMix", ICLR 2020, equation 2; the clip is in its code.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape [V, B, K]; given {logits.shape}")
    log_probs = jax.nn.log_softmax(at_least_f32(logits))
    probs = jnp.exp(log_probs)
    mixture = jnp.clip(jnp.mean(probs, axis=0), 1e-7, 1.0)
    return jnp.mean(jnp.sum(probs * (log_probs - jnp.log(mixture)[None]), axis=-1), axis=0)


def decoupled_mixup(
    logits: jax.Array,
    own: jax.Array,
    partner: jax.Array,
    share: jax.Array,
    *,
    eta: float = 0.1,
    mode: Decoupled = "both",
    threshold: float = 0.5,
    power: float = 1.0,
) -> jax.Array:
    """Mixup's cross-entropy, plus that of each parent's class without the other's.

        s CE(z, a) + (1 - s) CE(z, b) + eta_a CE(z without b, a) + eta_b CE(z without a, b)
        eta_a = eta s^power ,  eta_b = eta (1 - s)^power

    With the other class left out, a confident prediction of one parent costs nothing at any s. The
    last two terms vanish where a = b, where s is within 1e-3 of 0 or 1, and where s is exactly 1/2.

    >>> classes = dict(own=jnp.array([0]), partner=jnp.array([1]))
    >>> z, half = jnp.array([[9.0, 9.0, 0.0]]), jnp.array([0.5])  # both parents' classes
    >>> round(float(decoupled_mixup(z, **classes, share=half)[0]), 3)  # cross-entropy alone
    0.693

    Args:
      logits: z, f32[B, K].
      own: a, i32[B], class of the row's own parent.
      partner: b, i32[B], class of the other parent.
      share: s, f32[B], share of a.
      eta: >= 0, weight of the decoupled terms.
      mode: "both" terms; "less": a's where s < threshold, else b's; "more": the opposite.
      threshold: in [0, 1], of `mode`.
      power: >= 0, of the shares in eta_a and eta_b; 0 = constant weights.

    Returns:
      f32[B], nats.

    Raises:
      ValueError: shapes disagree, or a number is out of range.

    Here eta_a always belongs to a. The released code orders the etas as (s, 1 - s) and the classes
    by number, which swaps the etas of the whole batch if the first row has a > b.

    Source: Liu et al., "Harnessing Hard Mixed Samples with Decoupled Regularizer", NeurIPS 2023.
    """
    checks.rows(logits.shape[0], own=own, partner=partner, share=share)
    logits = at_least_f32(logits)
    own_label, partner_label = (jax.nn.one_hot(c, logits.shape[1]) for c in (own, partner))
    soft = share[:, None] * own_label + (1 - share[:, None]) * partner_label
    return weighted_cross_entropy(logits, soft) + _decoupled(
        logits, own, partner, share, eta=eta, mode=mode, threshold=threshold, power=power
    )


def _check_decoupled(*, eta, mode, threshold, power):
    checks.choice(("both", "less", "more"), mode=mode)
    checks.at_least_zero(eta=eta, power=power)
    checks.fraction(threshold=threshold)


def _decoupled(logits, own, partner, share, *, eta, mode, threshold, power):
    """f32[B], the last two terms of `decoupled_mixup`."""
    _check_decoupled(eta=eta, mode=mode, threshold=threshold, power=power)
    used = (own != partner) & (share > 1e-3) & (share < 1 - 1e-3) & (share != 0.5)
    # Unused rows get a share inside (0, 1) and keep all classes, so that gradients are finite.
    share = jnp.where(used, share, 0.25)

    def without(other, kept):
        left_out = jax.nn.one_hot(other, logits.shape[1], dtype=bool) & used[:, None]
        log_probs = jax.nn.log_softmax(jnp.where(left_out, -jnp.inf, logits))
        return -jnp.take_along_axis(log_probs, kept[:, None], axis=1)[:, 0]

    first = {"both": True, "less": share < threshold, "more": share >= threshold}[mode]
    second = {"both": True, "less": share >= threshold, "more": share < threshold}[mode]
    terms = jnp.where(first, share**power * without(partner, own), 0.0)
    terms += jnp.where(second, (1 - share) ** power * without(own, partner), 0.0)
    return jnp.where(used, eta * terms, 0.0)


def weighted_soft_cross_entropy(
    logits: jax.Array, targets: Targets, candidates: Batch
) -> jax.Array:
    """The default candidate loss: weighted cross-entropy against the targets' soft labels.

    >>> from saflex_jax.core.targets import prior_targets
    >>> batch = Batch(jnp.eye(2), jnp.eye(2), jnp.array([True, False]), jnp.arange(2))
    >>> targets = prior_targets(batch.labels, batch.mask)
    >>> weighted_soft_cross_entropy(jnp.zeros((2, 2)), targets, batch).round(4)
    Array([0.6931, 0.    ], dtype=float32)

    Args:
      logits: f32[B, K].
      targets: Targets of B.
      candidates: Batch of B; only its mask is read.
    """
    return weighted_cross_entropy(logits, targets.labels, targets.weights, candidates.mask)


def augmix_loss(views: int = 3, strength: float = 12.0) -> CandidateLoss:
    """Candidate loss of AugMix: cross-entropy of the clean view plus the views' divergence.

        loss_iv = w_iv (1[v = 0] V CE(z_i0, y_i0) + strength JSD(z_i0, ..., z_i(V-1)))

    With weights of one, the mean over rows is the mean of CE(clean) + strength JSD over samples.
    Row i V + v is view v of sample i. View 0 is clean: `augment.views(identity, a, a)`. The labels
    of the other views are not read.

    >>> from saflex_jax.core.targets import prior_targets
    >>> batch = Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.zeros(2, int))  # two views
    >>> targets = prior_targets(batch.labels, batch.mask)
    >>> augmix_loss(views=2)(jnp.zeros((2, 2)), targets, batch).round(4)  # the views agree
    Array([1.3863, 0.    ], dtype=float32)

    Args:
      views: V >= 2, views of each sample.
      strength: >= 0, weight of the divergence.

    Raises:
      ValueError: the number of rows is not a multiple of V.

    Source: Hendrycks et al., "AugMix", ICLR 2020, equation 3.
    """
    if views < 2:
        raise ValueError(f"views must be at least 2; given {views}")
    checks.at_least_zero(strength=strength)

    def loss(logits, targets, candidates):
        rows, classes = logits.shape
        if rows % views:
            raise ValueError(f"logits must have a multiple of {views} rows; given {rows}")
        logits, mask = at_least_f32(logits), candidates.mask
        clean = weighted_soft_cross_entropy(logits, targets, candidates)
        clean = jnp.where(jnp.arange(rows) % views == 0, views * clean, 0.0)
        # Padding must be finite to have no gradient below.
        stacked = jnp.where(mask[:, None], logits, 0.0).reshape(-1, views, classes)
        alike = jnp.repeat(jensen_shannon(stacked.swapaxes(0, 1)), views)
        return clean + jnp.where(mask, targets.weights * strength * alike, 0.0)

    loss.rows_together = views  # type: ignore[attr-defined]
    return loss


def decoupled_mixup_loss(
    *, eta: float = 0.1, mode: Decoupled = "both", power: float = 1.0
) -> CandidateLoss:
    """Candidate loss of decoupled mixup: the targets' cross-entropy plus `decoupled_mixup`'s terms.

        loss_i = w_i (CE(z_i, y_i) + eta_a CE(z_i without b, a) + eta_b CE(z_i without a, b))

    The classes a, b and the share s come from the two largest entries of the prior label. Swapping
    the parents turns (a, b, s) into (b, a, 1 - s) and changes nothing. With the threshold 1/2 used
    here, "less" keeps the term of the parent with the smaller share, "more" that of the other.

    >>> from saflex_jax.core.targets import prior_targets
    >>> batch = Batch(jnp.eye(1), jnp.array([[0.75, 0.25]]), jnp.ones(1, bool), jnp.arange(1))
    >>> targets = prior_targets(batch.labels, batch.mask)
    >>> decoupled_mixup_loss()(jnp.zeros((1, 2)), targets, batch).round(3)  # log 2: no other class
    Array([0.693], dtype=float32)

    Args:
      eta: >= 0, weight of the decoupled terms.
      mode: "both", "less" or "more".
      power: >= 0, of the shares in eta_a and eta_b.

    Source: see `decoupled_mixup`.
    """
    options = dict(eta=eta, mode=mode, threshold=0.5, power=power)
    _check_decoupled(**options)

    def loss(logits, targets, candidates):
        logits, mask = at_least_f32(logits), candidates.mask
        finite = jnp.where(mask[:, None], logits, 0.0)
        (most, next_most), (own, partner) = (x.T for x in jax.lax.top_k(candidates.labels, 2))
        share = most / jnp.where(mask, most + next_most, 1.0)
        terms = _decoupled(finite, own, partner, share, **options)
        soft = weighted_soft_cross_entropy(logits, targets, candidates)
        return soft + jnp.where(mask, targets.weights * terms, 0.0)

    return loss


def check_counts(counts: np.ndarray) -> None:
    """Raises ValueError unless `counts` are positive, finite numbers of samples.

    >>> check_counts(np.array([90.0, 10.0]))

    Args:
      counts: f[K], samples of each class.
    """
    a = np.asarray(counts, np.float64)
    if a.ndim != 1:
        raise ValueError(f"counts must have shape [K]; given {list(a.shape)}")
    bad = ~((a > 0) & (a < np.inf))
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise ValueError(f"counts must be positive and finite; class {k} has {a[k]:g}")


def ldam_loss(counts: np.ndarray, *, max_margin: float = 0.5, scale: float = 30.0) -> CandidateLoss:
    """Candidate loss of LDAM: cross-entropy with larger margins for rarer classes.

        m_k = C / n_k^(1/4) ,  C such that max_k m_k = max_margin
        loss_i = w_i sum_k y_ik l_ik ,  l_ik = log(1 + sum_(j != k) exp(s z_ij - s (z_ik - m_k)))

    A one-hot label gives the paper's loss; a soft label averages its classes' losses. A joint label
    (class, transformation) has the margin of its class.

    The scale assumes that logits are cosines of features and the head's columns, as in the authors'
    code. `models.Classifier` and `Heads` give them with `cosine=True`.

    >>> from saflex_jax.core.targets import prior_targets
    >>> batch = Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> targets = prior_targets(batch.labels, batch.mask)
    >>> losses = ldam_loss(np.array([90.0, 10.0]))(jnp.zeros((2, 2)), targets, batch)
    >>> bool(losses[1] > losses[0])  # the rare class has the larger margin
    True

    Args:
      counts: n, f[K], > 0: training samples of each class, the sum of their prior labels.
      max_margin: > 0, margin of the rarest class.
      scale: s > 0, of the logits.

    Raises:
      ValueError: a value out of range, or logits of another number of classes.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019; for the scale, its repository kaidic/LDAM-DRW.
    """
    check_counts(counts)
    checks.positive(max_margin=max_margin, scale=scale)
    margins = np.asarray(counts, np.float64) ** -0.25
    margins = np.asarray(max_margin / margins.max() * margins, np.float32)

    def loss(logits, targets, candidates):
        classes = logits.shape[1]
        checks.rows(classes, counts=counts)
        mask = candidates.mask
        z = scale * jnp.where(mask[:, None], at_least_f32(logits), 0.0)
        # log sum_(j != k) exp z_j. For the largest k the difference to the sum of all would be
        # rounding alone, so it is summed directly; elsewhere at most half of the sum goes.
        largest = jax.nn.one_hot(jnp.argmax(z, -1), classes, dtype=bool)
        below = jax.nn.logsumexp(jnp.where(largest, -jnp.inf, z), axis=-1, keepdims=True)
        share = jnp.where(largest, 0.0, jax.nn.softmax(z))
        without = jax.nn.logsumexp(z, axis=-1, keepdims=True) + jnp.log1p(-share)
        others = jnp.where(largest, jnp.broadcast_to(below, z.shape), without)
        class_losses = jax.nn.softplus(others - z + scale * margins[None])
        losses = jnp.sum(targets.labels * class_losses, axis=-1)
        return jnp.where(mask, targets.weights * losses, 0.0)

    return loss
