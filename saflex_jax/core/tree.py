"""Selecting part of a parameter tree: unselected leaves become None, which JAX sees as absent."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from saflex_jax.types import Params, PathPredicate, PyTree, Reduce


def identity(tree: PyTree) -> PyTree:
    """The `reduce` of single-device and jit code, where every array is already global."""
    return tree


class Mean:
    """The `reduce` of mapped code (pmap, vmap with an axis): the mean over that axis."""

    def __init__(self, axis_name: str):
        self.axis_name = axis_name

    def __call__(self, tree: PyTree) -> PyTree:
        return jax.lax.pmean(tree, self.axis_name)

    def gather(self, tree: PyTree) -> PyTree:
        """The rows [B, ...] of all devices, one after the other."""
        return jax.lax.all_gather(tree, self.axis_name, tiled=True)


def gather(tree: PyTree, reduce: Reduce) -> PyTree:
    """Rows of all devices; under jit they are all there already.

    Raises:
      ValueError: a reduce that can only average.
    """
    if reduce is identity:
        return tree
    if not hasattr(reduce, "gather"):
        raise ValueError(
            f"reduce must be `identity` or have `gather`, as `Mean` has; given {reduce}"
        )
    return reduce.gather(tree)


def under(*prefixes: str) -> PathPredicate:
    """Predicate that holds for parameters at or below any of the given paths.

    `under("head")` selects "head/kernel" and "head/bias"; the Flax collection name "params" in
    front of a path is ignored, so the same predicate fits `params` and `{"params": params}`.
    """

    def predicate(path: str) -> bool:
        path = path.removeprefix("params/")
        return any(path == p or path.startswith(p + "/") for p in prefixes)

    return predicate


def paths(params: Params) -> list[str]:
    """The paths of all leaves, joined by "/", in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def select(params: Params, predicate: PathPredicate | None) -> Params:
    """Keeps the leaves whose path satisfies `predicate`; the others become None.

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
    """Keeps the leaves of `tree` at the places where `like` has one (the rest become None)."""
    return jax.tree.map(
        lambda kept, leaf: None if kept is None else leaf, like, tree, is_leaf=lambda x: x is None
    )


def merge(selected: PyTree, full: PyTree) -> PyTree:
    """Puts the selected leaves back into the full tree; inverse of `select`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, selected, full, is_leaf=lambda x: x is None
    )


def axpy(scale: jax.Array | float, x: PyTree, y: PyTree) -> PyTree:
    """scale * x + y, leaf by leaf, in y's dtypes."""
    return jax.tree.map(lambda a, b: (scale * a + b).astype(b.dtype), x, y)


def cast_floats(tree: PyTree, dtype: str) -> PyTree:
    """The floating-point leaves in another precision; integers and keys as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def mean_floats(tree: PyTree, reduce) -> PyTree:
    """Applies `reduce` to the floating-point leaves only (counters are equal on every device)."""
    return jax.tree.map(lambda x: reduce(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
