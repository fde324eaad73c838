"""Bootstrapping: mixes the network's own predictions into the labels.

Source: Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015
workshop, section 3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity
from saflex_jax.rules.base import RuleSpec


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Bootstrapping; a `types.Rule` that reads no validation samples.

        y_i = beta q_i + (1 - beta) p_i   from step `start` on, before it q_i ;  w_i = 1
        p_i = softmax(f(x_i))             or, hard, one-hot at its largest entry

    f is the current network in evaluation mode. This is the training step's own forward pass, or
    one more if training mode differs (batch statistics, dropout). p has no gradient. In the paper
    soft p has one and lowers its own entropy. Here the gradient of CE(f(x), y) in the logits is
    beta (p - q) for soft p: plain training's times beta, unless the two modes differ.

    >>> Bootstrap(beta=0.8, hard=True)
    Bootstrap(beta=0.8, hard=True, start=0)

    Attributes:
      beta: in [0, 1]; 1 = the prior q. The paper uses .95 for soft and .8 for hard p.
      hard: whether p is one-hot.
      start: first step that uses the network's predictions.

    Raises:
      ValueError: a value out of range.
    """

    beta: float = 0.95
    hard: bool = False
    start: int = 0

    def __post_init__(self):
        checks.fraction(beta=self.beta)
        checks.whole(start=self.start)

    def init(self, params):
        """No arrays."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        del reduce
        prior, mask = streams.candidates.labels, streams.candidates.mask
        logits = jax.lax.stop_gradient(logits_fn(state.params, streams.candidates.inputs))
        checks.same_shape(logits=logits, labels=prior)
        # As it is where logits are not finite, so that they reach the loss: argmax would hide them.
        predicted = jax.nn.softmax(logits)
        if self.hard:
            one_hot = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[1])
            predicted = one_hot + 0.0 * predicted
        mixed = self.beta * prior + (1 - self.beta) * predicted
        labels = jnp.where((state.step >= self.start) & mask[:, None], mixed, prior)
        return prior_targets(labels, mask), arrays, {}


SPEC = RuleSpec(lambda run: Bootstrap())
