"""Runs small enough to check by hand, and what it takes to look at them."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import Batch, Method, Streams, TrainState
from saflex_jax.core.steps import total
from saflex_jax.data import ArrayStream
from saflex_jax.methods import supervised
from saflex_jax.models import from_function
from saflex_jax.parallel import jit_runner

CLASSES, FEATURES, ROWS = 3, 4, 8


def pool(size: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        inputs=rng.normal(size=(size, FEATURES)).astype(np.float32),
        labels=np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=size)],
        mask=np.ones(size, bool),
        index=np.arange(size, dtype=np.int32),
    )


POOLS = Streams(candidates=pool(21), val=pool(ROWS, seed=1))  # an epoch ends inside a batch


def make_stream() -> ArrayStream:
    return ArrayStream(POOLS, batch_size=ROWS, seed=0)


@functools.cache  # and so one compilation for all tests of a file
def make_method() -> Method:
    """Softmax regression, trained by Adam."""
    model = from_function(
        lambda key, inputs: {"head": jax.random.normal(key, (FEATURES, CLASSES))},
        lambda params, inputs: inputs @ params["head"],
    )
    return supervised.make(model, optax.adam(0.1))


@functools.cache
def make_run(devices: int = 1):
    """A runner and a first state of `make_method`."""
    method = make_method()
    runner = jit_runner(method.step, devices=jax.devices()[:devices])
    return runner, method.init(jax.random.key(0), POOLS.candidates.inputs[:1])


def summing_step(state: TrainState, streams: Streams, *, reduce):
    """params <- params + the batch's masked sum: a step whose every number is known beforehand.

    "rare" is a metric to which steps 3, 4 and 10 alone contribute.
    """
    batch = streams.candidates
    values = jnp.sum(batch.inputs, axis=-1)
    loss = total(values, batch.mask, reduce)
    rare = jnp.any(state.step + 1 == jnp.array([3, 4, 10])).astype(jnp.float32)
    state = state._replace(step=state.step + 1, params=state.params + loss[0])
    return state, {"loss": loss, "rare": (rare * 7.0, rare)}


def summing_state() -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros(()), {}, (), jax.random.key(0), ())


class Tampered:
    """A stream whose batch of some step is changed: step -> (Streams -> Streams).

    `seen` records the source samples of each batch that was asked for.
    """

    def __init__(self, stream, changes=()):
        self.stream, self.changes, self.seen = stream, dict(changes), []

    def __next__(self):
        batch = next(self.stream)
        self.seen.append(batch.candidates.index.tolist())
        step = self.get_state()["step"]
        return self.changes[step](batch) if step in self.changes else batch

    def get_state(self):
        return self.stream.get_state()

    def set_state(self, state):
        self.stream.set_state(state)


def arrays(tree) -> dict[str, np.ndarray]:
    """Path -> host copy; keys as their data."""

    def copy(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): copy(x) for path, x in leaves}


def assert_same_bits(actual, expected):
    """The same arrays, dtypes and bits; names the first that differs."""
    actual, expected = arrays(actual), arrays(expected)
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        b = expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), f"{name}:\n{a}\n{b}"


def read_records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
