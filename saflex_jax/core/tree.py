"""Parts of parameter trees, and means over devices.

Unselected leaves become None, which JAX treats as absent.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from saflex_jax.types import Params, PathPredicate, PyTree, Reduce


def identity(tree: PyTree) -> PyTree:
    """Returns its argument: the `reduce` of code under jit, where every array is global.

    It is the default of every `reduce`; under pmap use `Mean`.

    >>> identity(3.0)
    3.0

    Args:
      tree: any pytree.
    """
    return tree


class Mean:
    """The `reduce` of mapped code (pmap, or vmap with an axis): the mean over that axis.

    >>> jax.vmap(Mean("data"), axis_name="data")(jnp.array([1.0, 3.0])).tolist()
    [2.0, 2.0]

    Args:
      axis_name: the mapped axis.
    """

    def __init__(self, axis_name: str):
        self.axis_name = axis_name

    def __call__(self, tree: PyTree) -> PyTree:
        return jax.lax.pmean(tree, self.axis_name)

    def gather(self, tree: PyTree) -> PyTree:
        """The rows [B, ...] of all devices, concatenated.

        Args:
          tree: pytree of arrays.
        """
        return jax.lax.all_gather(tree, self.axis_name, tiled=True)


class Everywhere:
    """The `reduce` of code under jit on several devices: arrays are global, so it returns them.

    Unlike `identity` it knows the devices and can replicate arrays on all of them. Results of
    replicated arrays are computed on every device alike, and sums over their rows need no exchange.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    >>> Everywhere(replicated).devices
    1

    Args:
      sharding: replicated sharding on a 1-D mesh.
    """

    def __init__(self, sharding: jax.sharding.NamedSharding):
        self.sharding = sharding

    def __call__(self, tree: PyTree) -> PyTree:
        return tree

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.sharding.mesh.size

    def gather(self, tree: PyTree) -> PyTree:
        """The same arrays, replicated on every device.

        Args:
          tree: pytree of arrays.
        """
        return jax.lax.with_sharding_constraint(tree, self.sharding)

    def split(self, tree: PyTree) -> PyTree:
        """The same arrays, with their rows split among the devices.

        Args:
          tree: pytree of arrays [B, ...].
        """
        mesh = self.sharding.mesh
        spec = jax.sharding.PartitionSpec(mesh.axis_names[0])
        return jax.lax.with_sharding_constraint(tree, jax.sharding.NamedSharding(mesh, spec))

    def gather_rows(self, tree: PyTree, sizes: set[int]) -> PyTree:
        """The same arrays, replicated on every device, in one exchange.

        XLA's compiler for TPUs would gather them one by one.

        Args:
          tree: pytree of arrays.
          sizes: numbers of rows; arrays with one of them are gathered together.
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

    >>> gather(jnp.arange(2)).tolist()
    [0, 1]
    >>> rows = jax.vmap(lambda x: gather(x, Mean("data")), axis_name="data")(jnp.eye(2))
    >>> rows[0].tolist()
    [1.0, 0.0, 0.0, 1.0]

    Args:
      tree: pytree of arrays [B, ...].
      reduce: mean over the data-parallel axis.

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


def above_zero(count: jax.Array) -> jax.Array:
    """The count, to divide by; where it is 0 the least positive number, so that 0 / 0 is 0.

    A mean over devices of their counts may lie between 0 and 1.

    >>> (jnp.array([0.0, 3.0]) / above_zero(jnp.array([0.0, 0.5]))).tolist()
    [0.0, 6.0]

    Args:
      count: f32[...] >= 0.
    """
    return jnp.maximum(count, jnp.finfo(count.dtype).tiny)


def on_all(tree: PyTree, reduce: Reduce) -> PyTree:
    """The same arrays, replicated if `reduce` is an `Everywhere`.

    >>> on_all(jnp.arange(2), identity).tolist()
    [0, 1]

    Args:
      tree: pytree of arrays.
      reduce: mean over the data-parallel axis.
    """
    return reduce.gather(tree) if isinstance(reduce, Everywhere) else tree


def on_own(tree: PyTree, reduce: Reduce) -> PyTree:
    """The same arrays, with their rows split among the devices if `reduce` is an `Everywhere`.

    >>> on_own(jnp.arange(2), identity).tolist()
    [0, 1]

    Args:
      tree: pytree of arrays [B, ...].
      reduce: mean over the data-parallel axis.
    """
    return reduce.split(tree) if isinstance(reduce, Everywhere) else tree


def is_little(numbers: int, *, rows: int = 0, size: int = 0) -> bool:
    """Whether replicating arrays costs less than summing over devices (why: docs/pods.md).

    Compares the numbers gathered, and the work that every device then repeats, with ten sums of
    `size` numbers:

        numbers + rows size / 100 <= 2^23 + 20 size

    >>> is_little(1000), is_little(2**24)
    (True, False)

    Args:
      numbers: size of the arrays.
      rows: rows of a linear solver's products.
      size: the solver's unknowns; 0 = no solver.
    """
    return numbers + rows * size // 100 <= 2**23 + 20 * size


def under(*prefixes: str) -> PathPredicate:
    """Predicate that holds for parameters at or below any of the given paths.

    A leading Flax collection name "params" is ignored in both, so that one predicate fits both
    `params` and `{"params": params}`.

    >>> head = under("head")
    >>> head("head/kernel"), head("params/head/bias"), head("header/kernel")
    (True, True, False)

    Args:
      *prefixes: paths joined by "/".
    """

    wanted = [p.removeprefix("params/") for p in prefixes]

    def predicate(path: str) -> bool:
        path = path.removeprefix("params/")
        return any(path == p or path.startswith(p + "/") for p in wanted)

    return predicate


def paths(params: Params) -> list[str]:
    """The paths of all leaves, joined by "/", in tree order.

    >>> paths({"head": {"kernel": 1.0, "bias": 0.0}})
    ['head/bias', 'head/kernel']

    Args:
      params: pytree.
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
      ValueError: nothing is selected; the message lists all paths.
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

    Args:
      tree: pytree.
      like: the same structure, with None for leaves to drop.
    """
    return jax.tree.map(
        lambda kept, leaf: None if kept is None else leaf, like, tree, is_leaf=lambda x: x is None
    )


def merge(selected: PyTree, full: PyTree) -> PyTree:
    """Puts selected leaves back into the full tree; inverse of `select`.

    >>> merge({"backbone": None, "head": 5.0}, {"backbone": 1.0, "head": 2.0})
    {'backbone': 1.0, 'head': 5.0}

    Args:
      selected: the same structure as `full`, None where `full` keeps its leaf.
      full: pytree.
    """
    return jax.tree.map(
        lambda new, old: old if new is None else new, selected, full, is_leaf=lambda x: x is None
    )


def axpy(scale: jax.Array | float, x: PyTree, y: PyTree) -> PyTree:
    """scale * x + y, leaf by leaf, in y's dtypes.

    >>> axpy(2.0, {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])})["w"].tolist()
    [5.0]

    Args:
      scale: f32[].
      x, y: trees of the same structure and shapes.
    """
    return jax.tree.map(lambda a, b: (scale * a + b).astype(b.dtype), x, y)


def moving_average(old: PyTree, new: PyTree, decay: jax.Array | float) -> PyTree:
    """decay * old + (1 - decay) * new, leaf by leaf, in old's dtypes.

    >>> moving_average({"w": jnp.array([4.0])}, {"w": jnp.array([8.0])}, 0.75)["w"].tolist()
    [5.0]

    Args:
      old, new: trees of the same structure and shapes.
      decay: f32[], in [0, 1].
    """
    return jax.tree.map(lambda a, x: (decay * a + (1 - decay) * x).astype(a.dtype), old, new)


def cast_floats(tree: PyTree, dtype: str) -> PyTree:
    """Casts the floating-point leaves; integers and keys stay unchanged.

    >>> [x.dtype.name for x in cast_floats([jnp.zeros(1), jnp.zeros(1, int)], "bfloat16")]
    ['bfloat16', 'int32']

    Args:
      tree: pytree of arrays.
      dtype: of the floating-point leaves.
    """
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def mean_floats(tree: PyTree, reduce: Reduce = identity) -> PyTree:
    """Applies `reduce` to the floating-point leaves only; counters are equal on every device.

    >>> mean_floats({"mean": jnp.ones(1), "count": jnp.zeros((), int)})["mean"].tolist()
    [1.0]

    Args:
      tree: pytree of arrays.
      reduce: mean over the data-parallel axis.
    """
    return jax.tree.map(lambda x: reduce(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def zeros(shapes: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of a tree, for instance of what `jax.eval_shape` gives.

    >>> zeros([jax.ShapeDtypeStruct((2,), jnp.int32)])[0].tolist()
    [0, 0]

    Args:
      shapes: pytree of what has a shape and a dtype.
    """
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
