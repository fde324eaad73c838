"""What rules share: their record, the rule that learns nothing, and path predicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import identity, under
from saflex_jax.types import Batch, PathPredicate, Rule, RunInfo


class RuleSpec(NamedTuple):
    """What configs know of a rule; every rule's file has one, named SPEC.

    >>> spec = RuleSpec(lambda run: AsGiven())
    >>> spec.make(None)
    AsGiven()

    Attributes:
      make: run -> the rule with its defaults; run may be None. The rule's dataclass fields are its
        options; fields that are dataclasses are sections.
      of_labels: whether the rule holds the run's labels, so that a compiled step serves one seed
        only.
      posterior: whether the utility of its targets is 2 P(the given label is right) - 1.
    """

    make: Callable[[RunInfo | None], Rule]
    of_labels: bool = False
    posterior: bool = False


@dataclasses.dataclass(frozen=True)
class AsGiven:
    """The rule that learns nothing: prior labels, weight one.

    >>> AsGiven().init(params={})
    ()
    """

    def init(self, params):
        """No arrays."""
        del params
        return ()

    def apply(self, arrays, state, logits_fn, streams, *, reduce=identity):
        """See `types.Rule`."""
        del state, logits_fn, reduce
        candidates = streams.candidates
        return prior_targets(candidates.labels, candidates.mask), arrays, {}


SPEC = RuleSpec(lambda run: AsGiven())


def predicate_of(parameters: PathPredicate | str | None) -> PathPredicate | None:
    """A predicate on paths: a path selects all at or below it; "" or None selects all.

    >>> predicate_of("head")("head/kernel")
    True
    """
    return under(parameters) if isinstance(parameters, str) and parameters else parameters or None


def needs_val(who: str, val: Batch | None) -> None:
    """Raises ValueError if a rule that learns from validation samples has none."""
    if val is None:
        raise ValueError(f"{who} needs validation samples; given streams.val = None")
