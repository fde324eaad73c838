"""Augmentations that mix the samples of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.augment.base import Augment


def mixup(alpha: float, *, probability: float = 1.0) -> Augment:
    """Convex combination with a random partner, in inputs and in labels.

        x_i <- l_i x_i + (1 - l_i) x_p(i) ,  q_i likewise ,  l_i ~ Beta(alpha, alpha), l_i >= 1/2

    l is drawn per sample and the larger share is the sample's own, so that `index` names the parent
    that dominates. Under pmap partners are found within a device's share.

    Args:
      alpha: > 0.
      probability: share of the samples that are mixed at all.

    Source: Zhang et al., "mixup", ICLR 2018.
    """
    checks.positive("alpha", alpha)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1]; given {probability}")

    def augment(key, batch):
        of_share, of_partner, of_use = jax.random.split(key, 3)
        size = batch.labels.shape[0]
        partner = jax.random.permutation(of_partner, size)
        share = jax.random.beta(of_share, alpha, alpha, (size,))
        share = jnp.maximum(share, 1 - share)
        share = jnp.where(jax.random.bernoulli(of_use, probability, (size,)), share, 1.0)
        share = jnp.where(batch.mask[partner], share, 1.0)  # padding is nobody's partner

        def mix(x):
            part = share.reshape(-1, *[1] * (x.ndim - 1))
            return part * x + (1 - part) * x[partner]

        return batch._replace(inputs=jax.tree.map(mix, batch.inputs), labels=mix(batch.labels))

    return augment
