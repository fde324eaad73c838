"""Bootstrapping: a share of every label is what the network itself predicts.

Source: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015
workshop, section 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from saflex_jax import checks
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.targets import prior_targets
from saflex_jax.methods.base import supervised
from saflex_jax.types import Method, Model, Refiner


def make(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    **options,
) -> Method:
    """Bootstrapping as a method of the loop; `options` are those of `refiner`."""
    return supervised(model, tx, refiner(**options), loss=loss)


def refiner(*, beta: float = 0.95, hard: bool = False, start: int = 0) -> Refiner:
    """The rule of bootstrapping; it reads no validation samples.

        y_i = beta q_i + (1 - beta) p_i   from step `start` on, before it q_i ;  w_i = 1
        p_i = softmax(f(x_i))             or, hard, one-hot at its largest entry

    f is the current network in evaluation mode: one forward pass more where training mode computes
    otherwise (batch statistics, dropout), else the training step's own. p is a target and has no
    gradient. In the paper soft p has one, and so lowers its own entropy. As a target it asks the
    network for what it says already: the gradient of CE(f(x), y) in the logits is beta (p - q),
    that of plain training times beta, unless the two modes differ. Hard p pulls of itself.

    Args:
      beta: in [0, 1]; 1 = the prior q. The paper has .95 for soft and .8 for hard p.
      hard: whether p is one-hot.
      start: first step on which the network's predictions count.

    Raises:
      ValueError: a value out of range.
    """
    checks.fraction(beta=beta)
    checks.whole(start=start)

    def apply(arrays, state, logits_fn, streams, *, reduce):
        del reduce
        prior, mask = streams.candidates.labels, streams.candidates.mask
        logits = jax.lax.stop_gradient(logits_fn(state.params, streams.candidates.inputs))
        checks.same_shape(logits=logits, labels=prior)
        # As it is where logits are not finite, so that they reach the loss: argmax would hide them.
        predicted = jax.nn.softmax(logits)
        if hard:
            one_hot = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[1])
            predicted = one_hot + 0.0 * predicted
        mixed = beta * prior + (1 - beta) * predicted
        labels = jnp.where((state.step >= start) & mask[:, None], mixed, prior)
        return prior_targets(labels, mask), arrays, {}

    return Refiner(lambda params: (), apply)
