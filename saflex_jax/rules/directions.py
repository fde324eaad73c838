"""Directions: from the validation gradient to the direction of the scores.

    TrainState -> LinearSolve                                   (see `core.linear_solve`)

`identity` is the paper's greedy step, `adam` the optimiser's own step; `neumann` and `cg` are
implicit differentiation with the Gauss-Newton matrix. To add one, write such a function; to name it
in configs, add it to DIRECTIONS.
"""

from __future__ import annotations

from collections.abc import Callable

from saflex_jax import calls, checks
from saflex_jax.core import linear_solve
from saflex_jax.types import LinearSolve, SolveInfo, TrainState

Direction = Callable[[TrainState], LinearSolve]


def identity() -> Direction:
    """v = g: the greedy direction."""
    return lambda state: _one_step(linear_solve.identity_solve())


def adam(b2: float = 0.999, eps: float = 1e-8) -> Direction:
    """v = g / (sqrt(nu) + eps): Adam's preconditioner.

    Args:
      b2, eps: the training optimiser's own; optax does not keep them in its state.

    Raises:
      ValueError: a value out of range; at the first step, an optimiser without a second moment.
    """
    checks.decay(b2=b2)
    checks.positive(eps=eps)

    def direction(state):
        diagonal = linear_solve.adam_inverse_diagonal(state.opt_state, b2=b2, eps=eps)
        return _one_step(linear_solve.preconditioned_solve(diagonal))

    return direction


def neumann(steps: int = 10, scale: float = 0.1, damping: float = 0.1) -> Direction:
    """v = (G + damping I)^-1 g by a truncated Neumann series.

    Args:
      steps, scale, damping: see `linear_solve.neumann_solve`.
    """
    solve = linear_solve.neumann_solve(steps=steps, scale=scale, damping=damping)
    return lambda state: solve


def cg(maxiter: int = 10, damping: float = 0.1) -> Direction:
    """v = (G + damping I)^-1 g by conjugate gradients.

    On the problems of docs/cost.md a damping of .1 agrees with retraining better than .01.

    Args:
      maxiter, damping: see `linear_solve.cg_solve`.
    """
    solve = linear_solve.cg_solve(maxiter=maxiter, damping=damping)
    return lambda state: solve


DIRECTIONS = {"identity": identity, "adam": adam, "neumann": neumann, "cg": cg}


def parse(text: str) -> Direction:
    """A direction from its text: a name of DIRECTIONS, with or without options.

    >>> solve = parse("cg(20, damping=0.03)")

    Args:
      text: for instance "identity" or "cg(20, damping=0.03)".

    Raises:
      ValueError: another form, or an unknown name (suggests the nearest) or option.
    """
    return calls.parse(DIRECTIONS, direction=text)


def _one_step(solve: LinearSolve) -> LinearSolve:
    """A solver that solves no system: to read its residual would cost a curvature product."""
    return lambda matvec, rhs: (solve(matvec, rhs)[0], SolveInfo(None))
