"""Early stopping: the state of the best evaluation of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.parallel.sweep import member
from saflex_jax.train.checkpoint import Checkpoints
from saflex_jax.types import TrainState


class Best:
    """An `evaluate` for `fit` that keeps a copy of the state with the largest score.

        state_t ,   t the first of the steps with the largest score_t

    The run continues to its end, and `FitResult.state` is its last state. In a sweep, each member
    has its own best state.

    >>> scores = {10: 0.5, 20: 0.75, 30: 0.75}
    >>> best = Best(lambda state: {"accuracy": scores[int(state.step)]})
    >>> for step in scores:
    ...     values = best(TrainState(np.int32(step), {"w": np.ones(2)}, {}, (), jax.random.key(0)))
    >>> int(best.state.step), values
    (20, {'accuracy': 0.75})

    Args:
      evaluate: state -> values, as for `fit`.
      score: name of the value to maximise.
      checkpoints: also write the best state here, so that a killed run can continue with it; use a
        separate folder, `every=1` and `keep=1`. None = write nothing.

    Attributes:
      state: the best state so far; None before any. For the step of a sweep's member use
        `of_member`.
    """

    def __init__(
        self,
        evaluate: Callable[[TrainState], dict[str, Any]],
        *,
        score: str = "accuracy",
        checkpoints: Checkpoints | None = None,
    ):
        self._evaluate, self._name, self._checkpoints = evaluate, score, checkpoints
        self._score, self._step = np.array(-np.inf), np.array(0)  # of a sweep f[S] and i[S]
        self.state: TrainState | None = None

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """The values of this state; keeps the state if it is the best so far."""
        self.restore(state)
        values = self._evaluate(state)
        score, step = np.array(values[self._name], np.float64), int(state.step)
        if self.state is None:
            better = np.ones_like(score, bool)
            self.state, self._score, self._step = _copy(state), score, np.full_like(score, step)
        else:
            better = score > self._score  # of equal ones the first
            if better.any():
                self.state = _chosen(better, state, self.state)
            self._score = np.where(better, score, self._score)
            self._step = np.where(better, step, self._step)
        if self._checkpoints is not None and better.any():
            kept = {"score": self._score.tolist(), "step": self._step.tolist()}
            with self._checkpoints.settled():  # on the disk before a later state of the run is
                self._checkpoints.save(step, self.state, kept, force=True)
        return values

    def restore(self, like: TrainState) -> None:
        """Reads the best state of an earlier call of the run, unless one is already kept.

        Args:
          like: a state of the same shapes.

        Raises:
          CheckpointError: as `Checkpoints.load`.
        """
        if self.state is None and self._checkpoints is not None and self._checkpoints.latest:
            # A copy, since Orbax gives the key of what it loads the sharding of the key's data.
            self.state, kept = self._checkpoints.load(_copy(like))
            self._score, self._step = np.array(kept["score"]), np.array(kept["step"])

    def of_member(self, number: int) -> TrainState:
        """The best state of a member of a sweep, with its step.

        Args:
          number: of the member, from 0.
        """
        return member(self.state, number)._replace(step=jnp.int32(self._step[number]))


_copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))


@jax.jit
def _chosen(better: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state where it is better, bool[] or, of a sweep, bool[S]."""

    def chosen(a, b):
        if a.ndim < better.ndim:  # the step counter, which the members share
            return a
        return jnp.where(better.reshape(better.shape + (1,) * (a.ndim - better.ndim)), a, b)

    return jax.tree.map(chosen, new, old)
