"""An augmentation pipeline in front of any method, inside the compiled step."""

from __future__ import annotations

from saflex_jax.augment import Augment
from saflex_jax.core.steps import pipeline_key
from saflex_jax.core.tree import identity
from saflex_jax.types import Batch, Method, TrainState


def upstream(method: Method, augment: Augment) -> Method:
    """The method, with candidates augmented anew in every step.

    Validation and clean samples are not augmented. Give one pipeline: a second one around it would
    draw with the same key; `augment.chain` joins them.

    >>> import optax
    >>> from saflex_jax import augment, models
    >>> from saflex_jax.methods import saflex
    >>> network = models.Classifier(models.SmallCNN((8,)), num_classes=10)
    >>> method = saflex.make(models.from_linen(network), optax.adamw(1e-3))
    >>> method = upstream(method, augment.parse("shift(4) | flip"))

    Args:
      method: any Method; its `init` and `predict` do not change.
      augment: (key, batch) -> batch; the key of step t comes from (`state.key`, t).
    """

    def augmented(state, streams):
        return streams._replace(candidates=drawn(augment, state, streams.candidates))

    def step(state, streams, *, reduce=identity):
        return method.step(state, augmented(state, streams), reduce=reduce)

    def targets(state, streams):
        return method.targets(state, augmented(state, streams))

    return method._replace(step=step, targets=targets if method.targets else None)


def drawn(augment: Augment, state: TrainState, candidates: Batch) -> Batch:
    """The candidates, with traces, that a step of `upstream(method, augment)` trains on.

    >>> import jax, jax.numpy as jnp
    >>> from saflex_jax import augment
    >>> rows = jnp.arange(2)
    >>> batch = Batch(jnp.ones((2, 3)), jnp.eye(2), rows >= 0, rows)
    >>> state = TrainState(jnp.zeros((), jnp.int32), (), (), (), jax.random.key(0), ())
    >>> drawn(augment.parse("feature_noise(0.1)"), state, batch).inputs.shape
    (2, 3)

    Args:
      augment: the pipeline.
      state: before the step.
      candidates: before augmentation.
    """
    return augment(pipeline_key(state), candidates)
