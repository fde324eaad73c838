"""jit and pmap around the same step body; both give the same parameters.

The state is replicated (but for score memories, under jit), the batch is split along its leading
axis. jit sees global arrays, so its `reduce` is the identity; pmap sees a device's rows, so its
`reduce` is a `Mean`. Not compiled with
shard_map: its default gradient semantics give gradients too large by the number of devices when
combined with pmean, without an error (docs/sharp_edges.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from saflex_jax import _compat, checks
from saflex_jax.batches import take
from saflex_jax.core.memory import Memory
from saflex_jax.core.tree import Mean, identity
from saflex_jax.types import Batch, Metrics, PyTree, Streams, TrainState

AXIS = "data"


class Runner(NamedTuple):
    """How a step runs on the devices there are.

    Attributes:
      step: compiled (state, streams) -> (state, metrics); donates the state.
      put_state: places a state, the same on every device (under jit the rows of a score memory are
        split among them where they divide); always a copy, so donating it is safe.
      put_batch: places the rows that this process holds, if they are not placed already; raises
        ValueError unless they divide.
      hold: whole data sets -> a Runner that keeps a copy of them on every device, and whose batches
        are rows of them (`data.IndexStream`), gathered inside the compiled step. For data that
        fits. It trains as on the samples themselves, bit for bit.
    """

    step: Callable[[TrainState, Streams], tuple[TrainState, Metrics]]
    put_state: Callable[[TrainState], TrainState]
    put_batch: Callable[[PyTree], PyTree]
    hold: Callable[[Streams], Runner]


def check_divisible(batch: PyTree, devices: int) -> None:
    """Raises unless every leading axis divides by the number of devices; names the array."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        size = np.shape(leaf)[0]
        if size == 0 or size % devices:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must hold a positive multiple of {devices} "
                f"rows, one share for each local device; given {size}"
            )


def _shardings(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """On the 1-D mesh of the devices: (all of an array on each, a share of its rows on each)."""
    mesh = _compat.auto_mesh(devices, AXIS)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))


def _is_placed(x: np.ndarray | jax.Array, sharding: NamedSharding) -> bool:
    """Whether an array is where it should be, such as what was read ahead."""
    return isinstance(x, jax.Array) and x.sharding == sharding


def _put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Places host arrays; what is placed already stays."""

    def put(x):
        if _is_placed(x, sharding):
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, tree)


def _on_rows(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable:
    """The step, given rows of the data sets that are held; where none are, samples."""

    def run(state, streams, held, *, reduce):
        samples = not isinstance(streams, Streams) or isinstance(streams.candidates, Batch)
        if samples != (held is None):
            wanted, given = "rows of its data (data.IndexStream)", "samples (data.ArrayStream)"
            if held is None:
                wanted, given = given, wanted
            raise ValueError(f"this runner's batches must be {wanted}; given {given}")
        return step(state, streams if held is None else take(held, streams), reduce=reduce)

    return run


def _state_shardings(state: TrainState, replicated, split) -> PyTree:
    """A state is the same on every device, but for the rows of score memories."""

    def of(part):
        if isinstance(part, Memory) and len(part.visits) % split.mesh.size == 0:
            return jax.tree.map(lambda _: split, part)
        return jax.tree.map(lambda _: replicated, part)

    return jax.tree.map(of, state, is_leaf=lambda part: isinstance(part, Memory))


def _runner(
    compiled: Callable[..., tuple[TrainState, Metrics]],
    put_batch: Callable[[PyTree], PyTree],
    replicated: NamedSharding,
    shardings: Callable[[TrainState], PyTree],
) -> Runner:
    """The Runner of a compiled `_on_rows`; `shardings` says where the arrays of a state go."""

    def put_state(state):
        places = shardings(state)
        if replicated.is_fully_addressable:  # from other devices, which jit would refuse
            state = jax.device_put(state, places)  # may alias; jit's result never does
        return jax.jit(partial(jax.tree.map, jax.numpy.copy), out_shardings=places)(state)

    def holding(held, put):
        return Runner(lambda state, batch: compiled(state, batch, held), put_state, put, hold)

    def hold(pools):
        checks.streams(pools)

        def put_rows(rows):
            for name, pool, found in zip(Streams._fields, pools, rows):
                if isinstance(found, np.ndarray):
                    checks.integers(len(pool.labels), **{f"rows of {name}": found})
            return put_batch(rows)

        return holding(_put(pools, replicated), put_rows)

    return holding(None, put_batch)


def jit_runner(
    step: Callable[..., tuple[TrainState, Metrics]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Runner:
    """Global-view data parallelism: jit over a 1-D mesh of all devices (of all processes).

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      devices: default: jax.devices().
    """
    replicated, split = _shardings(jax.devices() if devices is None else devices)
    local = len(split.mesh.local_devices)

    def put_batch(batch):
        check_divisible(batch, local)
        return _put(batch, split)

    shardings = partial(_state_shardings, replicated=replicated, split=split)

    @functools.cache
    def compiled_for(structure, shapes):
        state = structure.unflatten([np.broadcast_to(0, shape) for shape in shapes])
        return jax.jit(
            partial(_on_rows(step), reduce=identity),
            in_shardings=(shardings(state), split, replicated),
            out_shardings=(shardings(state), replicated),
            donate_argnums=0,
        )

    def compiled(state, streams, held):
        leaves, structure = jax.tree.flatten(state)
        return compiled_for(structure, tuple(map(np.shape, leaves)))(state, streams, held)

    return _runner(compiled, put_batch, replicated, shardings)


def pmap_runner(
    step: Callable[..., tuple[TrainState, Metrics]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Runner:
    """Per-device data parallelism: pmap over the devices of a single process.

    pmap is in maintenance mode in JAX; use it where existing code does. A model with BatchNorm must
    be built with `axis_name="data"` so that its statistics are those of the global batch. Batch
    mixing inside the step (mixup) pairs samples within a device's share.

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      devices: default: jax.local_devices().

    Raises:
      ValueError: more than one process; use jit_runner.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"pmap_runner runs in one process; given {jax.process_count()}: use jit_runner"
        )
    devices = jax.local_devices() if devices is None else devices
    replicated, split = _shardings(devices)

    reduced = jax.pmap(
        partial(_on_rows(step), reduce=Mean(AXIS)),
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )

    def shares(x):
        if _is_placed(x, split):
            return x
        return np.asarray(x).reshape(len(devices), -1, *np.shape(x)[1:])

    def put_batch(batch):
        check_divisible(batch, len(devices))
        return _put(jax.tree.map(shares, batch), split)

    everywhere = lambda state: jax.tree.map(lambda _: replicated, state)
    return _runner(reduced, put_batch, replicated, everywhere)
