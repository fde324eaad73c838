"""Selecting part of a parameter tree: unselected leaves become None, which JAX sees as absent."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from saflex_jax.types import Params, PathPredicate, PyTree, Reduce


def identity(tree: PyTree) -> PyTree:
    """Returns its argument: the `reduce` of code under jit, where every array is global.

    The default of every `reduce`; under pmap take `Mean`.

    >>> identity(3.0)
    3.0
    """
    return tree


class Mean:
    """The `reduce` of mapped code (pmap, vmap with an axis): the mean over that axis.

    >>> jax.vmap(Mean("data"), axis_name="data")(jnp.array([1.0, 3.0])).tolist()
    [2.0, 2.0]
    """

    def __init__(self, axis_name: str):
        self.axis_name = axis_name

    def __call__(self, tree: PyTree) -> PyTree:
        return jax.lax.pmean(tree, self.axis_name)

    def gather(self, tree: PyTree) -> PyTree:
        """The rows [B, ...] of all devices, concatenated."""
        return jax.lax.all_gather(tree, self.axis_name, tiled=True)


class Everywhere:
    """The `reduce` of code under jit on several devices: arrays are global, so it returns them.

    Unlike `identity` it knows the devices, so that arrays can be laid on every one of them. What is
    made of such arrays is made on all devices alike, and sums over rows need no exchange.

    Args:
      sharding: of arrays that lie on all devices of a 1-D mesh.
    """

    def __init__(self, sharding: jax.sharding.NamedSharding):
        self.sharding = sharding

    def __call__(self, tree: PyTree) -> PyTree:
        return tree

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.sharding.mesh.size

    def gather(self, tree: PyTree) -> PyTree:
        """The same arrays, on every device."""
        return jax.lax.with_sharding_constraint(tree, self.sharding)

    def split(self, tree: PyTree) -> PyTree:
        """The same arrays, a share of their rows on each device."""
        mesh = self.sharding.mesh
        spec = jax.sharding.PartitionSpec(mesh.axis_names[0])
        return jax.lax.with_sharding_constraint(tree, jax.sharding.NamedSharding(mesh, spec))

    def gather_rows(self, tree: PyTree, sizes: set[int]) -> PyTree:
        """The same arrays, on every device; all that have as many rows as one of `sizes` in one go.

        XLA's compiler for TPUs would gather them one by one.
        """
        leaves, structure = jax.tree.flatten(tree)
        travels = [x.ndim > 0 and len(x) in sizes and len(x) % self.devices == 0 for x in leaves]
        bits = [_bits(x).reshape(self.devices, -1) for x, own in zip(leaves, travels) if own]
        ends = list(itertools.accumulate(x.shape[1] for x in bits))
        parts = iter(jnp.split(self.gather(jnp.concatenate(bits, axis=1)), ends[:-1], axis=1))
        everywhere = [_of_bits(next(parts), x) if own else x for x, own in zip(leaves, travels)]
        return self.gather(jax.tree.unflatten(structure, everywhere))


def _bits(x: jax.Array) -> jax.Array:
    """The numbers as they are in memory, 32 bits each."""
    return jax.lax.bitcast_convert_type(x.astype(_wide(x.dtype)), jnp.uint32)


def _of_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
    wide = _wide(like.dtype)
    bits = bits.reshape(*like.shape, *[2] * (wide.itemsize == 8))
    return jax.lax.bitcast_convert_type(bits, wide).astype(like.dtype)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """One of at least 32 bits that holds all its values."""
    if dtype.itemsize >= 4:
        return dtype
    return jnp.dtype(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32)


def gather(tree: PyTree, reduce: Reduce = identity) -> PyTree:
    """The rows of all devices; under jit the tree itself.

    Raises:
      ValueError: a reduce that cannot gather.
    """
    if reduce is identity:
        return tree
    own = getattr(reduce, "gather", None)
    if own is None:
        raise ValueError(
            f"reduce must be `saflex_jax.identity` or have `gather`, as `Mean` has; given {reduce}"
        )
    return own(tree)


def on_all(tree: PyTree, reduce: Reduce) -> PyTree:
    """The same arrays; those of an `Everywhere` stay on every device, whatever is made of them."""
    return reduce.gather(tree) if isinstance(reduce, Everywhere) else tree


def on_own(tree: PyTree, reduce: Reduce) -> PyTree:
    """The same arrays; of an `Everywhere` each device goes on with its own rows."""
    return reduce.split(tree) if isinstance(reduce, Everywhere) else tree


def is_little(numbers: int, *, rows: int = 0, size: int = 0) -> bool:
    """Whether to lay arrays on all devices costs less than sums over devices.

    The numbers gathered, and the work that every device then repeats, against ten sums of `size`
    numbers, there and back, for each of which all devices wait (why so: docs/pods.md):

        numbers + rows size / 100 <= 2^23 + 20 size

    Args:
      numbers: in the arrays.
      rows, size: of a linear solver's products with them, and its unknowns.
    """
    return numbers + rows * size // 100 <= 2**23 + 20 * size


def under(*prefixes: str) -> PathPredicate:
    """Predicate that holds for parameters at or below any of the given paths.

    The Flax collection name "params" in front of a path is ignored, so that one predicate fits
    both `params` and `{"params": params}`.

    >>> head = under("head")
    >>> head("head/kernel"), head("params/head/bias"), head("header/kernel")
    (True, True, False)
    """

    def predicate(path: str) -> bool:
        path = path.removeprefix("params/")
        return any(path == p or path.startswith(p + "/") for p in prefixes)

    return predicate


def paths(params: Params) -> list[str]:
    """The paths of all leaves, joined by "/", in tree order.

    >>> paths({"head": {"kernel": 1.0, "bias": 0.0}})
    ['head/bias', 'head/kernel']
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def select(params: Params, predicate: PathPredicate | None) -> Params:
    """Keeps the leaves whose path satisfies `predicate`; the others become None.

    >>> select({"backbone": 1.0, "head": 2.0}, under("head"))
    {'backbone': None, 'head': 2.0}

    Args:
      params: pytree of arrays.
      predicate: path -> bool; None selects everything.

    Raises:
      ValueError: nothing is selected; the message lists the paths there are.
    """
    if predicate is None:
        return params
    chosen = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf if predicate(jax.tree_util.keystr(path, simple=True, separator="/")) else None
        ),
        params,
    )
    if not jax.tree.leaves(chosen):
        raise ValueError(f"predicate selects no parameter; the paths are {paths(params)}")
    return chosen


def restrict(tree: PyTree, like: PyTree) -> PyTree:
    """Keeps the leaves of `tree` where `like` has one; the others become None.

    >>> restrict({"backbone": 1.0, "head": 2.0}, like={"backbone": None, "head": 0.0})
    {'backbone': None, 'head': 2.0}
    """
    return jax.tree.map(
        lambda kept, leaf: None if kept is None else leaf, like, tree, is_leaf=lambda x: x is None
    )


def merge(selected: PyTree, full: PyTree) -> PyTree:
    """Puts selected leaves back into the full tree; inverse of `select`.

    >>> merge({"backbone": None, "head": 5.0}, {"backbone": 1.0, "head": 2.0})
    {'backbone': 1.0, 'head': 5.0}
    """
    return jax.tree.map(
        lambda new, old: old if new is None else new, selected, full, is_leaf=lambda x: x is None
    )


def axpy(scale: jax.Array | float, x: PyTree, y: PyTree) -> PyTree:
    """scale * x + y, leaf by leaf, in y's dtypes."""
    return jax.tree.map(lambda a, b: (scale * a + b).astype(b.dtype), x, y)


def cast_floats(tree: PyTree, dtype: str) -> PyTree:
    """Casts the floating-point leaves; integers and keys stay unchanged."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def mean_floats(tree: PyTree, reduce: Reduce = identity) -> PyTree:
    """Applies `reduce` to the floating-point leaves only; counters are equal on every device."""
    return jax.tree.map(lambda x: reduce(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
