"""Plain training of one network on a rule's targets or, without one, on the given labels."""

from __future__ import annotations

from functools import partial

import optax

from saflex_jax import checks
from saflex_jax.core import steps
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.tree import identity
from saflex_jax.methods.base import MethodSpec
from saflex_jax.rules import AsGiven
from saflex_jax.types import Method, Model, Rule


def make(
    model: Model,
    tx: optax.GradientTransformation,
    rule: Rule | None = None,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    microbatches: int = 1,
) -> Method:
    """Plain training of one network on the candidates, with a rule's targets.

        theta <- theta + tx(grad mean_i w_i CE(f(x_i), y_i)) ,   w, y by the rule

    >>> from saflex_jax.models import MLP, Classifier, from_linen
    >>> from saflex_jax.rules import RULES
    >>> model = from_linen(Classifier(MLP(), 10))
    >>> method = make(model, optax.sgd(0.1), RULES["label_smoothing"].make(None))

    Args:
      model: see `types.Model`.
      tx: optax transformation.
      rule: what to train on (see `saflex_jax.rules`); None = as given: the upstream pipeline alone,
        the baseline of every comparison.
      loss: of the candidates (see `core.losses`), instead of the weighted cross-entropy.
      microbatches: number of parts of the batch, for less memory; see `core.steps.inner_step`.
    """
    checks.whole(1, microbatches=microbatches)
    rule = AsGiven() if rule is None else rule

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        return steps.init_state(key, params, model_state, tx, rule.init(params))

    def targets(state, streams):
        def logits_fn(params, inputs):
            return model.logits(params, state.model_state, inputs)

        return rule.apply(state.extra, state, logits_fn, streams, reduce=identity)[0]

    return Method(
        init=init,
        step=partial(
            steps.bilevel_step,
            logits_fn=model.logits,
            train_fn=model.train,
            tx=tx,
            rule=rule,
            loss=loss,
            microbatches=microbatches,
        ),
        predict=lambda state, inputs: model.logits(state.params, state.model_state, inputs),
        targets=targets,
    )


SPEC = MethodSpec(make, takes=("rule", "loss"))
