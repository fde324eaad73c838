"""jit and pmap around the same step; both give the same parameters.

The batch is split along its leading axis. The state is replicated, but under jit the parts with
`by_rows = True` (`types.TrainState`) are split as well. jit sees global arrays, so its `reduce`
returns its argument (`identity`, or `Everywhere` on several devices); pmap sees the rows of one
device, so its `reduce` is a `Mean`. shard_map is not used: with pmean, its default semantics give
gradients that are too large by the number of devices, without an error (docs/sharp_edges.md).
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
from saflex_jax.batches import padded, take
from saflex_jax.core.tree import Everywhere, Mean, identity, on_all
from saflex_jax.types import Batch, Metrics, PyTree, Reduce, Streams, TrainState

AXIS = "data"
_LARGE = 2**16  # numbers, from which on an array is worth sharing


class Runner(NamedTuple):
    """How a step runs on the devices.

    >>> def step(state, batch, *, reduce):
    ...     return state + reduce(jax.numpy.mean(batch)), {}
    >>> runner = jit_runner(step, devices=jax.devices()[:1])
    >>> runner.put_batch(np.ones(4, "float32")).shape
    (4,)

    Attributes:
      step: compiled (state, streams) -> (state, metrics); donates the state.
      put_state: copies a state to the devices, so that donating it is safe. Every device gets all
        of it; under jit, parts with `by_rows` are split if their rows divide.
      put_batch: places this process's rows, unless they are already placed. Pads Streams that do
        not divide among the devices with masked rows; refuses other trees (ValueError).
      hold: whole data sets -> a Runner that keeps a copy of them on every device, for data that
        fit. Its batches are row numbers (`data.IndexStream`), gathered inside the compiled step.
        Training is bit for bit the same as on the samples themselves.
    """

    step: Callable[[TrainState, Streams], tuple[TrainState, Metrics]]
    put_state: Callable[[TrainState], TrainState]
    put_batch: Callable[[PyTree], PyTree]
    hold: Callable[[Streams], Runner]


def check_divisible(batch: PyTree, devices: int) -> None:
    """Raises unless every leading axis divides by the number of devices; names the array.

    >>> check_divisible({"x": np.zeros((8, 3))}, devices=4)
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        size = np.shape(leaf)[0]
        if size == 0 or size % devices:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} must hold a positive multiple of {devices} "
                f"rows, one share for each local device; given {size}"
            )


def divisible(batch: PyTree, devices: int) -> PyTree:
    """The batch, with Streams on the host padded to a multiple of the devices.

    Args:
      batch: pytree of arrays [B, ...].
      devices: number of devices.

    Raises:
      ValueError: another tree that does not divide, or an empty part.
    """
    leaves = jax.tree.leaves(batch)
    on_host = not any(isinstance(x, jax.Array) for x in leaves)
    if isinstance(batch, Streams) and on_host and all(np.size(x) for x in leaves):
        batch = padded(batch, devices)
    check_divisible(batch, devices)
    return batch


def shardings_over(
    devices: Sequence[jax.Device], axis: str = AXIS
) -> tuple[NamedSharding, NamedSharding]:
    """Shardings on the devices' 1-D mesh: (replicated, rows split)."""
    mesh = _compat.auto_mesh(devices, axis)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axis))


def _is_placed(x: np.ndarray | jax.Array, sharding: NamedSharding) -> bool:
    """Whether an array is on its devices already, as batches are that were read ahead."""
    return isinstance(x, jax.Array) and x.sharding == sharding


def _reduce_over(replicated: NamedSharding) -> Reduce:
    """The `reduce` of a step under jit on these devices."""
    return identity if replicated.mesh.size == 1 else Everywhere(replicated)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Places host arrays; arrays that are already placed stay."""

    def put_leaf(x):
        if _is_placed(x, sharding):
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put_leaf, tree)


def on_rows(step: Callable[..., tuple[TrainState, Metrics]]) -> Callable:
    """The step on row numbers of held data sets; without held data, on samples."""

    def run(state, streams, held, *, reduce):
        are_samples = not isinstance(streams, Streams) or isinstance(streams.candidates, Batch)
        if are_samples != (held is None):
            expected, given = "rows of its data (data.IndexStream)", "samples (data.ArrayStream)"
            if held is None:
                expected, given = given, expected
            raise ValueError(f"this runner's batches must be {expected}; given {given}")
        return step(state, streams if held is None else take(held, streams), reduce=reduce)

    return run


def _is_by_rows(part: PyTree) -> bool:
    """Whether a part of a state says that its leaves have a row for each source sample."""
    return bool(getattr(type(part), "by_rows", False))


def _state_shardings(state: TrainState, replicated, split, *, shard_params: bool) -> PyTree:
    """Where the arrays of a state go: a share of the rows of `by_rows` parts, all of the others.

    With `shard_params` also a share of each large array of parameters and optimiser, along its
    longest axis that divides.
    """
    (axis,), devices = split.mesh.axis_names, split.mesh.size

    def share(x):
        sides = [side if side % devices == 0 else 0 for side in x.shape]
        if not shard_params or not any(sides) or np.prod(x.shape) < _LARGE:
            return replicated
        spec = [None] * len(sides)
        spec[int(np.argmax(sides))] = axis
        return NamedSharding(split.mesh, PartitionSpec(*spec))

    def sharding_of(part):
        leaves = jax.tree.leaves(part)
        divides = _is_by_rows(part) and all(x.shape[0] % split.mesh.size == 0 for x in leaves)
        return jax.tree.map(lambda _: split if divides else replicated, part)

    places = jax.tree.map(sharding_of, state, is_leaf=_is_by_rows)
    if not isinstance(state, TrainState):
        return places
    own = jax.tree.map(share, (state.params, state.opt_state))
    return places._replace(params=own[0], opt_state=own[1])


def copied(state: PyTree, places: PyTree) -> PyTree:
    """A copy on its devices, with a sharding for each leaf or for whole parts."""
    if jax.tree.leaves(places)[0].is_fully_addressable:  # jit would refuse other devices' arrays
        state = jax.device_put(state, places)  # may alias; jit's result never does
    return jax.jit(partial(jax.tree.map, jax.numpy.copy), out_shardings=places)(state)


def check_rows(pools: Streams, rows: Streams) -> None:
    """Raises ValueError unless rows on the host are row numbers of these data."""
    for name, pool, indices in zip(Streams._fields, pools, rows):
        if isinstance(indices, np.ndarray):
            rows_or_first = np.where(indices == -1, 0, indices)  # -1 is padding
            checks.integers(len(pool.labels), **{f"rows of {name}": rows_or_first})


def _waited(f: Callable) -> Callable:
    """The function, returning once its results are there."""
    return lambda *args: jax.block_until_ready(f(*args))


def _runner(
    compiled: Callable[..., tuple[TrainState, Metrics]],
    put_batch: Callable[[PyTree], PyTree],
    replicated: NamedSharding,
    shardings: Callable[[TrainState], PyTree],
) -> Runner:
    """The Runner of a compiled `on_rows`; `shardings` says where the arrays of a state go."""

    mesh = replicated.mesh
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        # Devices of a CPU share one pool of threads: steps in flight can keep each other waiting.
        compiled = _waited(compiled)

    def put_state(state):
        return copied(state, shardings(state))

    def holding(held, put_rows):
        return Runner(lambda state, batch: compiled(state, batch, held), put_state, put_rows, hold)

    def hold(pools):
        checks.streams(pools)

        def put_rows(rows):
            check_rows(pools, rows)
            return put_batch(rows)

        return holding(put(pools, replicated), put_rows)

    return holding(None, put_batch)


def jit_runner(
    step: Callable[..., tuple[TrainState, Metrics]],
    *,
    devices: Sequence[jax.Device] | None = None,
    shard_params: bool = False,
) -> Runner:
    """Global-view data parallelism: jit over a 1-D mesh of all devices (of all processes).

    >>> def step(state, batch, *, reduce):
    ...     return state + reduce(jax.numpy.mean(batch)), {}
    >>> runner = jit_runner(step)
    >>> batch = runner.put_batch(np.ones(jax.device_count(), "float32"))
    >>> state, metrics = runner.step(runner.put_state(np.float32(2)), batch)
    >>> float(state)
    3.0

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      devices: None = jax.devices().
      shard_params: split parameters and optimiser state among the devices, and gather the
        parameters for each step (fully sharded data parallelism), for models that do not fit.
    """
    devices = jax.devices() if devices is None else devices
    replicated, split = shardings_over(devices)
    local = len(split.mesh.local_devices)

    def put_batch(batch):
        return put(divisible(batch, local), split)

    shardings = partial(
        _state_shardings, replicated=replicated, split=split, shard_params=shard_params
    )

    @functools.cache
    def compiled_for(structure, shapes):
        state = structure.unflatten([np.broadcast_to(0, shape) for shape in shapes])
        return jitted(step, state, devices, shard_params=shard_params)

    def compiled(state, streams, held):
        leaves, structure = jax.tree.flatten(state)
        return compiled_for(structure, tuple(map(np.shape, leaves)))(state, streams, held)

    return _runner(compiled, put_batch, replicated, shardings)


def jitted(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    devices: Sequence[jax.Device],
    *,
    shard_params: bool = False,
) -> Callable:
    """The jitted step of `jit_runner`; can also be lowered ahead of time.

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      state: arrays or their shapes.
      devices: may be the abstract devices of another machine.
      shard_params: see `jit_runner`.

    Returns:
      jitted (state, streams, held data sets or None) -> (state, metrics), which donates the state.
    """
    replicated, split = shardings_over(devices)
    places = _state_shardings(state, replicated, split, shard_params=shard_params)
    reduce, on_batch = _reduce_over(replicated), on_rows(step)

    def run(state, streams, held):
        if shard_params:
            state = state._replace(params=on_all(state.params, reduce))
        return on_batch(state, streams, held, reduce=reduce)

    return jax.jit(
        run,
        in_shardings=(places, split, replicated),
        out_shardings=(places, replicated),
        donate_argnums=0,
    )


def pmap_runner(
    step: Callable[..., tuple[TrainState, Metrics]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Runner:
    """Per-device data parallelism: pmap over the devices of a single process.

    pmap is in maintenance mode in JAX; use it where existing code does. Build a model with
    BatchNorm with `axis_name="data"`, so that its statistics are the global batch's. Mixing inside
    the step (mixup) pairs samples of one device.

    >>> def step(state, batch, *, reduce):
    ...     return state + reduce(jax.numpy.mean(batch)), {}
    >>> runner = pmap_runner(step)
    >>> batch = runner.put_batch(np.ones(jax.device_count(), "float32"))
    >>> state, metrics = runner.step(runner.put_state(np.float32(2)), batch)
    >>> float(state)
    3.0

    Args:
      step: (state, streams, *, reduce) -> (state, metrics).
      devices: None = jax.local_devices().

    Raises:
      ValueError: more than one process; use jit_runner.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"pmap_runner runs in one process; given {jax.process_count()}: use jit_runner"
        )
    devices = jax.local_devices() if devices is None else devices
    replicated, split = shardings_over(devices)

    reduced = jax.pmap(
        partial(on_rows(step), reduce=Mean(AXIS)),
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
        return put(jax.tree.map(shares, divisible(batch, len(devices))), split)

    def everywhere(state):
        return jax.tree.map(lambda _: replicated, state)

    return _runner(reduced, put_batch, replicated, everywhere)
