"""Label smoothing: spreads a share of every label evenly over all classes.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
section 7.
"""

from __future__ import annotations

import dataclasses

from saflex_jax import checks
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity
from saflex_jax.rules.base import RuleSpec


@dataclasses.dataclass(frozen=True)
class LabelSmoothing:
    """Label smoothing; a `types.Rule` that reads no validation samples.

        y_ik = (1 - epsilon) q_ik + epsilon / K ,  w_i = 1

    >>> LabelSmoothing(epsilon=0.2)
    LabelSmoothing(epsilon=0.2)

    Attributes:
      epsilon: in [0, 1]; 0 = the prior q. The paper uses .1.

    Raises:
      ValueError: a value out of range.
    """

    epsilon: float = 0.1

    def __post_init__(self):
        checks.fraction(epsilon=self.epsilon)

    def init(self, params):
        """No arrays."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        del state, logits_fn, reduce
        labels, mask = streams.candidates.labels, streams.candidates.mask
        smooth = (1 - self.epsilon) * labels + self.epsilon / labels.shape[1]
        return prior_targets(smooth, mask), arrays, {}


SPEC = RuleSpec(lambda run: LabelSmoothing())
