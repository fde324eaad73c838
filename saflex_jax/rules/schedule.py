"""When a rule learns: from step `start` on, every `every` steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.core.targets import prior_targets
from saflex_jax.core.tree import zeros
from saflex_jax.types import Batch, Metrics, PyTree, Targets

# arrays -> (targets, arrays, metrics)
Branch = Callable[[PyTree], tuple[Targets, PyTree, Metrics]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps on which a rule learns.

    >>> Schedule(start=100, every=5)
    Schedule(start=100, every=5)

    Attributes:
      start: first step on which it learns; before it the prior, weight one.
      every: learn once every `every` steps.
    """

    start: int = 0
    every: int = 1

    def __post_init__(self):
        checks.whole(start=self.start)
        checks.whole(1, every=self.every)

    def turn(self, step: jax.Array) -> jax.Array:
        """How often the rule learned before this step, i32[]; negative before `start`.

        Args:
          step: i32[].
        """
        return (step - self.start) // self.every

    def run(
        self, step: jax.Array, candidates: Batch, learn: Branch, between: Branch, arrays: PyTree
    ) -> tuple[Targets, PyTree, Metrics]:
        """Runs the branch of this step.

        Keep the candidates' forward pass outside of the branches: only there can XLA share it with
        the training step.

        Args:
          step: i32[].
          candidates: Batch of B, whose prior is trained on before `start`.
          learn: branch on the steps that learn.
          between: branch on the other steps from `start` on.
          arrays: the rule's.

        Returns:
          What the branch returns. A metric that it does not report has the count 0.
        """

        def before(arrays):
            return prior_targets(candidates.labels, candidates.mask), arrays, {}

        branches = [learn]
        index = jnp.zeros((), jnp.int32)
        if self.every > 1:
            branches.append(between)
            index = jnp.where((step - self.start) % self.every == 0, 0, 1)
        if self.start > 0:
            branches.append(before)
            index = jnp.where(step >= self.start, index, len(branches) - 1)
        if len(branches) == 1:
            return learn(arrays)
        return jax.lax.switch(index, _with_equal_metrics(branches, arrays), arrays)


def _with_equal_metrics(branches: list[Branch], arrays: PyTree) -> list[Branch]:
    """The branches, each with the metrics of all; those that it lacks are (0, 0)."""
    like: Metrics = {}
    for branch in branches:
        like |= jax.eval_shape(branch, arrays)[2]

    def completed(branch):
        def run(arrays):
            targets, arrays, metrics = branch(arrays)
            return targets, arrays, zeros(like) | metrics

        return run

    return [completed(branch) for branch in branches]
