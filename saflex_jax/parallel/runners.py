"""jit and pmap around the same step body; both give the same parameters.

The state is replicated, the batch is split along its leading axis. jit sees global arrays, so its
`reduce` is the identity; pmap sees a device's rows, so its `reduce` is a pmean. Not compiled with
shard_map: its default gradient semantics give gradients too large by the number of devices when
combined with pmean, without an error (docs/sharp_edges.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from saflex_jax import _compat
from saflex_jax.core.tree import identity
from saflex_jax.types import Metrics, PyTree, Streams, TrainState

AXIS = "data"


class Runner(NamedTuple):
    """How a step runs on the devices there are.

    Attributes:
      step: compiled (state, streams) -> (state, metrics); donates the state.
      put_state: places a state, the same on every device; always a copy, so donating it is safe.
      put_batch: places the rows that this process holds; raises ValueError unless they divide.
    """

    step: Callable[[TrainState, Streams], tuple[TrainState, Metrics]]
    put_state: Callable[[TrainState], TrainState]
    put_batch: Callable[[PyTree], PyTree]


def check_divisible(batch: PyTree, devices: int) -> None:
    """Raises unless every leading axis divides by the number of devices; names the array."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        size = np.shape(leaf)[0]
        if size == 0 or size % devices:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must hold a positive multiple of {devices} "
                f"rows, one share for each local device; given {size}"
            )


def jit_runner(
    step: Callable[..., tuple[TrainState, Metrics]], *, devices: Sequence[jax.Device] | None = None
) -> Runner:
    """Global-view data parallelism: jit over a 1-D mesh of all devices (of all processes).

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      devices: default: jax.devices().
    """
    mesh = _compat.auto_mesh(jax.devices() if devices is None else devices, AXIS)
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    local = len(mesh.local_devices)

    def put_state(state):
        if replicated.is_fully_addressable:  # from other devices, which jit would refuse
            state = jax.device_put(state, replicated)  # may alias; jit's result never does
        return jax.jit(partial(jax.tree.map, jax.numpy.copy), out_shardings=replicated)(state)

    def put_batch(batch):
        check_divisible(batch, local)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, np.asarray(x)), batch
        )

    compiled = jax.jit(
        partial(step, reduce=identity),
        in_shardings=(replicated, split),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )
    return Runner(compiled, put_state, put_batch)


def pmap_runner(
    step: Callable[..., tuple[TrainState, Metrics]], *, devices: Sequence[jax.Device] | None = None
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
    runner = jit_runner(step, devices=devices)  # placement is the same; only the step differs

    reduced = jax.pmap(
        partial(step, reduce=partial(jax.lax.pmean, axis_name=AXIS)),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=0,
    )

    def put_batch(batch):
        check_divisible(batch, len(devices))
        shards = jax.tree.map(
            lambda x: np.asarray(x).reshape(len(devices), -1, *np.shape(x)[1:]), batch
        )
        return runner.put_batch(shards)

    return Runner(reduced, runner.put_state, put_batch)
