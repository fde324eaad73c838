"""What methods share: their record, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from saflex_jax.augment import Augment, parse
from saflex_jax.core.targets import prior_targets
from saflex_jax.models import Classifier
from saflex_jax.types import Batch, Method, PyTree, RunInfo, Streams, Targets, TrainState


class Episode(NamedTuple):
    """The make-up of an episode.

    >>> Episode(ways=5, shots=1, queries=15).ways
    5

    Attributes:
      ways: number of classes.
      shots: support samples of each class.
      queries: query samples of each class.
    """

    ways: int
    shots: int
    queries: int


def classifier(backbone: nn.Module, num_classes: int, options: Any) -> nn.Module:
    """The network of a method that needs one head on the backbone."""
    del options
    return Classifier(backbone, num_classes)


def samples(run: RunInfo, options: Any) -> RunInfo:
    """The run as the rule sees it, for methods that show it the samples themselves."""
    del options
    return run


def pipeline(augment: Augment | str) -> Augment:
    """An augmentation that is given as itself or as its text (`augment.parse`)."""
    return parse(augment) if isinstance(augment, str) else augment


class MethodSpec(NamedTuple):
    """What configs know of a method; every method's file has one, named SPEC.

    >>> from saflex_jax.methods import METHODS
    >>> METHODS["flyp"].takes
    ('options', 'rule', 'run')

    Attributes:
      make: (model, tx, **keywords of `takes`) -> Method.
      takes: keywords of `make`, of "options", "rule", "loss" and "run" (a `RunInfo`).
      options: a frozen dataclass with the method's options and their defaults; None for none.
      network: (backbone, num_classes, options) -> the module to train.
      seen: (run, options) -> the run as the method's rule and loss see it; its samples or classes
        may differ (views, joint labels).
      episode: options -> the make-up of an episode, if batches are whole episodes; else None.
      needs: streams that training requires: "val", "clean".
      posterior: whether the utility of its targets is 2 P(the given label is right) - 1, whatever
        the rule.
    """

    make: Callable[..., Method]
    takes: tuple[str, ...]
    options: Any = None
    network: Callable[[nn.Module, int, Any], nn.Module] = classifier
    seen: Callable[[RunInfo, Any], RunInfo] = samples
    episode: Callable[[Any], Episode] | None = None
    needs: tuple[str, ...] = ()
    posterior: bool = False


def as_given(state: TrainState, streams: Streams) -> Targets:
    """The targets of a method that learns none: prior labels, weight one."""
    del state
    return prior_targets(streams.candidates.labels, streams.candidates.mask)


def no_clean(who: str, clean: Batch | None) -> None:
    """Raises ValueError if streams.clean is set."""
    if clean is not None:
        raise ValueError(f"{who} trains on candidates alone; given streams.clean")


def check_outputs(outputs: PyTree, *wanted: str) -> None:
    """Raises ValueError unless a model's outputs are a dict with the wanted names."""
    given = set(outputs) if isinstance(outputs, dict) else {"logits"}
    if not {*wanted} <= given:
        *first, last = map(repr, wanted)
        raise ValueError(
            f"model must hand out {', '.join(first)} and {last}; given {sorted(given)}"
        )
