"""What supervised methods share: a model, an optimiser and the rule that sets the targets."""

from __future__ import annotations

from functools import partial

import optax

from saflex_jax.core import steps
from saflex_jax.core.losses import CandidateLoss, weighted_soft_cross_entropy
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity
from saflex_jax.types import Batch, Method, Model, PyTree, Refiner, Streams, Targets, TrainState


def supervised(
    model: Model,
    tx: optax.GradientTransformation,
    refiner: Refiner,
    *,
    loss: CandidateLoss = weighted_soft_cross_entropy,
) -> Method:
    """A Method that refines the candidates' targets by `refiner` and trains on them by `loss`."""

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        return steps.init_state(key, params, model_state, tx, refiner.init(params))

    def targets(state, streams):
        def logits_fn(params, inputs):
            return model.logits(params, state.model_state, inputs)

        return refiner.apply(state.extra, state, logits_fn, streams, reduce=identity)[0]

    return Method(
        init=init,
        step=partial(
            steps.bilevel_step,
            logits_fn=model.logits,
            train_fn=model.train,
            tx=tx,
            refiner=refiner,
            loss=loss,
        ),
        predict=lambda state, inputs: model.logits(state.params, state.model_state, inputs),
        targets=targets,
    )


def as_given(state: TrainState, streams: Streams) -> Targets:
    """The targets of a method that learns none: prior labels, weight one."""
    del state
    return prior_targets(streams.candidates.labels, streams.candidates.mask)


def prior_refiner() -> Refiner:
    """The rule that learns nothing: prior labels, weight one."""

    def apply(arrays, state, logits_fn, streams, *, reduce):
        del logits_fn, reduce
        return as_given(state, streams), arrays, {}

    return Refiner(lambda params: (), apply)


def needs_val(who: str, val: Batch | None) -> None:
    """Raises ValueError if there are no validation samples, for what learns from them."""
    if val is None:
        raise ValueError(f"{who} needs validation samples; given streams.val = None")


def no_clean(who: str, clean: Batch | None) -> None:
    """Raises ValueError if streams.clean is set, for a method that would leave them out."""
    if clean is not None:
        raise ValueError(f"{who} trains on candidates alone; given streams.clean")


def check_outputs(outputs: PyTree, *wanted: str) -> None:
    """Raises ValueError unless a model's outputs are a dict that has these."""
    given = set(outputs) if isinstance(outputs, dict) else {"logits"}
    if not {*wanted} <= given:
        *first, last = map(repr, wanted)
        raise ValueError(
            f"model must hand out {', '.join(first)} and {last}; given {sorted(given)}"
        )
