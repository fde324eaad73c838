"""A digest of every array of a state, independent of how the array is placed.

    d = sum_i w(i) x_i  mod 2^64

over the array's numbers x_i as unsigned integers, with odd weights w(i), a hash of the position.
An odd weight has an inverse, so a change of one number always changes d; other changes go unnoticed
with probability about 2^-64. An integer sum does not depend on its order: each process adds what
lies on its devices, so any number of devices or processes gives the same digest. Computed on the
host, about 1 GB/s per core, because compiling it would take longer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from saflex_jax.core.tree import paths
from saflex_jax.types import PyTree

# Of SplitMix64, in its order. Weights that are linear in the place would let moved numbers escape.
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_BLOCK = 2**15  # numbers at a time, so that temporaries stay in the cache


def digests(tree: PyTree) -> dict[str, str]:
    """Path -> 16 hexadecimal digits, of the bits of each array.

    >>> digests({"w": np.zeros(3), "b": np.float32([1, 0, 0])})
    {'b': 'a35b6754b2800000', 'w': '0000000000000000'}

    Args:
      tree: arrays of any dtype and sharding, also spread over other hosts; PRNG keys are their
        data. All processes must call it.

    Raises:
      ValueError: two arrays of one path.
    """
    arrays = by_name(tree)
    with np.errstate(over="ignore"):  # it is modulo 2^64
        own = np.array([_of_array(x) for x in arrays.values()], np.uint64)
    if jax.process_count() > 1:
        halves = own.view(np.uint32)  # JAX keeps no 64 bits
        everyone = multihost_utils.process_allgather(halves).astype(np.uint32)
        own = np.sum(everyone.view(np.uint64).reshape(-1, len(own)), axis=0, dtype=np.uint64)
    return {name: f"{int(d):016x}" for name, d in zip(arrays, np.atleast_1d(own))}


def by_name(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf.

    >>> by_name({"head": {"bias": 1.0}, "memory": None})
    {'head/bias': 1.0}

    Args:
      tree: None is no leaf.

    Raises:
      ValueError: two leaves of one path, as in {"a": {"b": x}, "a/b": y}.
    """
    names = paths(tree)
    found = dict(zip(names, jax.tree.leaves(tree)))
    if len(found) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"leaves must have paths of their own; two have {twice!r}")
    return found


def _of_array(x: jax.Array | np.ndarray) -> np.uint64:
    """This process's part of the sum."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    shape, total = x.shape or (1,), np.uint64(0)
    # Row-major: what one more on an axis adds to the place in the whole array.
    strides = [np.uint64(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    for begins, part in _parts(x):
        numbers = _unsigned(part)
        axes = [_places(*axis) for axis in zip(begins[1:], numbers.shape[1:], strides[1:])]
        within = functools.reduce(lambda a, b: np.add.outer(a, b).ravel(), axes, np.zeros(1, "u8"))
        numbers = numbers.reshape(len(numbers), len(within))
        size = max(1, _BLOCK // max(1, len(within)))
        for first in range(0, len(numbers), size):
            block = numbers[first : first + size]
            rows = _places(begins[0] + first, len(block), strides[0])
            weights = _weights(np.add.outer(rows, within).ravel())
            total += np.dot(block.ravel().astype(np.uint64), weights)
    return total


def _parts(x: jax.Array | np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """(where it begins on each axis, its numbers) of what lies here; copies count once."""
    if not isinstance(x, jax.Array):
        yield [0] * max(np.ndim(x), 1), x
        return
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            yield [s.start or 0 for s in shard.index] or [0], np.asarray(shard.data)


def _unsigned(numbers: np.ndarray) -> np.ndarray:
    """The same bits as unsigned integers, one axis at least."""
    numbers = np.ascontiguousarray(np.atleast_1d(numbers))
    return numbers.view(f"u{numbers.dtype.itemsize}")


def _weights(places: np.ndarray) -> np.ndarray:
    """Odd numbers u64[n]; changes the places."""
    places += np.uint64(1)
    places *= _FIRST
    places ^= places >> np.uint64(30)
    places *= _SECOND
    places ^= places >> np.uint64(27)
    places |= np.uint64(1)
    return places


def _places(begin: int, size: int, stride: np.uint64) -> np.ndarray:
    """u64[size], along one axis."""
    return np.arange(begin, begin + size, dtype=np.uint64) * stride
