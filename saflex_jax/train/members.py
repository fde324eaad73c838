"""Records and evaluation of the single members of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from saflex_jax.parallel.sweep import member
from saflex_jax.types import TrainState

Values = dict[str, float]


def of_members(history: list[dict]) -> list[list[dict]]:
    """The history of each member of a sweep, as if it had run alone.

    "seconds_per_step" is the time of the sweep's step divided by the number of members.

    >>> of_members([{"step": 3, "loss": [0.5, 0.25], "rare": [None, 1.0], "seconds_per_step": 8.0}])
    ... # doctest: +NORMALIZE_WHITESPACE
    [[{'step': 3, 'loss': 0.5, 'seconds_per_step': 4.0}],
     [{'step': 3, 'loss': 0.25, 'rare': 1.0, 'seconds_per_step': 4.0}]]

    Args:
      history: of `fit` with a `parallel.sweep_runner`: lists with one value per member, except for
        "step" and the time.

    Raises:
      ValueError: no record, or none of a sweep: nothing tells the number of members.
    """
    number = max(
        (len(v) for r in history[:1] for v in r.values() if isinstance(v, list)), default=0
    )
    if not number:
        raise ValueError(
            "history must hold records with one value per member, or their number is unknown; "
            f"given {history[:1]}"
        )
    shared = ("step", "seconds_per_step")

    def of_member(record, m):
        own = {k: record[k] if k in shared else record[k][m] for k in record}
        own["seconds_per_step"] /= number
        return {name: value for name, value in own.items() if value is not None}

    return [[of_member(record, m) for record in history] for m in range(number)]


def evaluate_each(
    evaluates: Sequence[Callable[[TrainState], Values]],
) -> Callable[[TrainState], dict[str, list[float | None]]]:
    """The `evaluate` of a sweep, from one for each member: name -> one value per member.

    None stands for a value that a member does not have.

    >>> def accuracy(state):
    ...     return {"accuracy": float(state.params)}
    >>> def loss(state):
    ...     return {"loss": float(state.params)}
    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0))
    >>> states = TrainState(jax.numpy.int32(3), jax.numpy.array([0.5, 0.25]), {}, (), keys)
    >>> evaluate_each([accuracy, loss])(states)
    {'accuracy': [0.5, None], 'loss': [None, 0.25]}

    Args:
      evaluates: state of a single run -> values, one for each member.
    """

    def evaluate(state):
        found = [each(member(state, m)) for m, each in enumerate(evaluates)]
        names = dict.fromkeys(name for values in found for name in values)
        return {name: [values.get(name) for values in found] for name in names}

    return evaluate
