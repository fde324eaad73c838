"""What methods share: their record, and checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from saflex_jax.core.targets import prior_targets
from saflex_jax.models import Classifier
from saflex_jax.types import Batch, Method, PyTree, RunInfo, Streams, Targets, TrainState


class Episode(NamedTuple):
    """What a batch of episodes is made of: `ways` classes, each of shots + queries samples."""

    ways: int
    shots: int
    queries: int


def classifier(backbone: nn.Module, num_classes: int, options: Any) -> nn.Module:
    """The network of a method that needs one head on the backbone."""
    del options
    return Classifier(backbone, num_classes)


def samples(run: RunInfo, options: Any) -> RunInfo:
    """What the rule of a method sees that shows it the samples themselves."""
    del options
    return run


class MethodSpec(NamedTuple):
    """What a method is, for configs; every method's file has one, named SPEC.

    Attributes:
      make: (model, tx, **what `takes` names) -> Method.
      takes: keywords of `make`, of "options", "rule", "loss" and "run" (a `RunInfo`).
      options: a frozen dataclass with the defaults, whose fields are the method's options; None
        where there are none.
      network: (backbone, num_classes, options) -> the module that the method trains.
      seen: (run, options) -> the run as the method's rule and loss see it, whose samples or classes
        may be others (views, joint labels).
      episode: options -> what an episode is, where batches are whole episodes; else None.
      needs: streams without which it cannot train: "val", "clean".
    """

    make: Callable[..., Method]
    takes: tuple[str, ...]
    options: Any = None
    network: Callable[[nn.Module, int, Any], nn.Module] = classifier
    seen: Callable[[RunInfo, Any], RunInfo] = samples
    episode: Callable[[Any], Episode] | None = None
    needs: tuple[str, ...] = ()


def as_given(state: TrainState, streams: Streams) -> Targets:
    """The targets of a method that learns none: prior labels, weight one."""
    del state
    return prior_targets(streams.candidates.labels, streams.candidates.mask)


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
