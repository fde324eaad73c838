"""What rules share: their record, the rule that learns nothing, options that select parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity, under
from saflex_jax.types import Batch, PathPredicate, Rule, RunInfo


class RuleSpec(NamedTuple):
    """What a rule is, for configs; every rule's file has one, named SPEC.

    Attributes:
      make: the rule with its defaults, for a run (None = a run that knows nothing). The fields of
        the dataclass that it returns are the rule's options, those that are dataclasses sections.
      of_labels: whether the rule holds the run's labels, so that a compiled step serves one seed.
    """

    make: Callable[[RunInfo | None], Rule]
    of_labels: bool = False


@dataclasses.dataclass(frozen=True)
class AsGiven:
    """The rule that learns nothing: prior labels, weight one."""

    def init(self, params):
        """Nothing to keep."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        del state, logits_fn, reduce
        candidates = streams.candidates
        return prior_targets(candidates.labels, candidates.mask), arrays, {}


SPEC = RuleSpec(lambda run: AsGiven())


def predicate_of(parameters: PathPredicate | str | None) -> PathPredicate | None:
    """A predicate on paths: a path selects what is at or below it; "" or None selects everything.

    >>> predicate_of("head")("head/kernel")
    True
    """
    return under(parameters) if isinstance(parameters, str) and parameters else parameters or None


def needs_val(who: str, val: Batch | None) -> None:
    """Raises ValueError if there are no validation samples, for a rule that learns from them."""
    if val is None:
        raise ValueError(f"{who} needs validation samples; given streams.val = None")
