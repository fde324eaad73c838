"""Several runs of one step in one compiled program: seeds, and values of continuous options.

    (state, batch, options), each with a leading axis of members -> vmap over members of the step

Every member gets the results of its single run, up to rounding. The step and the loop do not
change; metrics are arrays f[S]. Members share the step counter, so that a branch on it (a schedule)
stays a branch. They are split among the devices, which exchange nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from saflex_jax import checks
from saflex_jax.batches import stack
from saflex_jax.core.tree import identity
from saflex_jax.parallel.runners import Runner, check_rows, copied, on_rows, put, shardings_over
from saflex_jax.types import Metrics, PyTree, Streams, TrainState

AXIS = "members"


def _of_parts(shared: Any, own: Any) -> TrainState:
    """A thing for the step counter, which the members share, and one for every other part."""
    return TrainState(shared, *(own for _ in TrainState._fields[1:]))


def sweep_runner(
    step: Callable[..., tuple[TrainState, Metrics]],
    *,
    options: PyTree = None,
    devices: Sequence[jax.Device] | None = None,
) -> Runner:
    """S members of a sweep in one vmapped program, split among the devices.

        state'_m, metrics_m = step(state_m, batch_m, options_m) ,   m = 1..S

    `put_state` takes the result of `stack_states`, `put_batch` batches with a leading axis S
    (`data.StackedStream`), and `hold` data that all members share or a list of S data sets. A
    member's rows are never split.

    >>> def step(state, batch, *, reduce, options):
    ...     params = state.params + options["rate"] * jnp.mean(batch)
    ...     return state._replace(step=state.step + 1, params=params), {}
    >>> rates = np.float32([1, 10])
    >>> runner = sweep_runner(step, options={"rate": rates}, devices=jax.devices()[:1])
    >>> new = TrainState(np.int32(0), np.float32(2), {}, (), jax.random.key(0))
    >>> state = runner.put_state(stack_states([new, new]))
    >>> state, _ = runner.step(state, runner.put_batch(np.ones((2, 4), "float32")))
    >>> int(state.step), state.params.tolist()
    (1, [3.0, 12.0])

    Args:
      step: (state, streams, *, reduce) -> (state, metrics), of one member; with `options` it also
        takes the member's, traced, as the keyword `options`.
      options: pytree of arrays [S, ...]; None = the members differ in states and data alone.
      devices: their number must divide S; None = jax.devices().

    Raises:
      ValueError: several processes; members that do not divide among the devices, or whose arrays
        differ in shape.
    """
    if jax.process_count() > 1:
        raise ValueError(f"sweep_runner runs in one process; given {jax.process_count()}")
    shared, split = shardings_over(jax.devices() if devices is None else devices, AXIS)
    places = _of_parts(shared, split)
    _check_members(split, options=options)
    options = put(options, split)

    def of_member(state, batch, held, own):
        mine = step if own is None else partial(step, options=own)
        return on_rows(mine)(state, batch, held, reduce=identity)

    @functools.cache  # a program for data that members share, another for their own
    def program(held_axis):
        axes = _of_parts(None, 0)
        members = jax.vmap(of_member, (axes, 0, held_axis, 0), (axes, 0))
        specs = jax.tree.map(lambda sharding: sharding.spec, places)
        data = PartitionSpec() if held_axis is None else split.spec
        # Unlike jit it leaves each device's members to it alone, also where a loop ends on values.
        mapped = jax.shard_map(
            members,
            mesh=split.mesh,
            in_specs=(specs, split.spec, data, split.spec),
            out_specs=(specs, split.spec),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=0)

    def put_state(state):
        _check_members(split, state=state._replace(step=()))
        return copied(state, places)

    def put_batch(batch):
        return put(batch, split)

    def holding(held, held_axis, put_rows):
        compiled = program(held_axis)
        return Runner(lambda s, batch: compiled(s, batch, held, options), put_state, put_rows, hold)

    def hold(pools):
        own = not isinstance(pools, Streams)
        pools = pools if own else [pools]
        for pool in pools:
            checks.streams(pool)

        def put_rows(rows):
            check_rows(pools[0], jax.tree.map(np.ravel, rows))  # all pools are of one size
            return put_batch(rows)

        held = put(stack(pools), split) if own else put(pools[0], shared)
        return holding(held, 0 if own else None, put_rows)

    return holding(None, None, put_batch)


def _check_members(split: jax.sharding.NamedSharding, **trees: PyTree) -> None:
    """Raises unless every leading axis is one positive number that the devices divide."""
    devices = split.mesh.size
    for name, tree in trees.items():
        sizes = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(tree)}
        if len(sizes) > 1 or any(size == 0 or size % devices for size in sizes):
            raise ValueError(
                f"{name} must have a leading axis of members, a multiple of {devices} devices; "
                f"given {sorted(sizes)}"
            )


# --- states


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """The members' states as one: every array but the step counter gets a leading axis S.

    >>> new = TrainState(np.int32(3), {"w": np.ones(2)}, {}, (), jax.random.key(0))
    >>> stack_states([new, new]).params["w"].shape
    (2, 2)

    Args:
      states: S states at the same step.

    Raises:
      ValueError: states at different steps, or whose arrays differ in shape.
    """
    steps = {int(state.step) for state in states}
    if len(steps) > 1:
        raise ValueError(f"states must be at one step; given {sorted(steps)}")
    return stack([_stepless(s) for s in states])._replace(step=jnp.asarray(states[0].step))


def _stepless(state: Any) -> Any:
    """The state without its counter, which has no members."""
    return state._replace(step=())


@jax.jit
def member(state: TrainState, number: int | jax.Array) -> TrainState:
    """The state of one member, as if it had run alone.

    >>> new = TrainState(np.int32(3), {"w": np.ones(2)}, {}, (), jax.random.key(0))
    >>> member(stack_states([new, new]), 1).params["w"].shape
    (2,)

    Args:
      state: of a sweep.
      number: of the member, from 0.
    """
    parts = jax.tree.map(lambda x: x[number], _stepless(state))
    return parts._replace(step=state.step)
