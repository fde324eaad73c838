"""Sweeps without a config: members of one step in one program, trained by the one loop."""

from __future__ import annotations

from collections.abc import Sequence

from saflex_jax import data, parallel, train
from saflex_jax.parallel import Runner
from saflex_jax.types import TrainState


def trained(
    runner: Runner,
    states: Sequence[TrainState],
    streams: Sequence[data.IndexStream | data.PartStream],
    *,
    steps: int,
    title: str,
) -> TrainState:
    """The members' state after so many steps; `parallel.member` takes one out.

    Args:
      runner: of `parallel.sweep_runner`, with the data held.
      states: one a member.
      streams: likewise.
      steps: of each.
      title: of the progress bar.

    Raises:
      KeyboardInterrupt: after Ctrl-C: members that are trained by half are no result.
    """
    result = train.fit(
        runner,
        parallel.stack_states(states),
        data.StackedStream(streams),
        num_steps=steps,
        log_every=steps,
        description=title,
    )
    return result.completed()
