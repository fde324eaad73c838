"""Clear errors for bad input: each names the argument, the given value and the accepted ones.

Shapes and options are checked while tracing, so before compilation: `checks.positive(alpha=alpha)`
raises "alpha must be positive and finite; given -1". Values of arrays are checked only if they are
concrete: on the host, where data enter the program. Traced arrays pass; the loop's metrics stop a
run that is not finite.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from saflex_jax.types import Array, Batch, PyTree, Streams, T

MOST_LEVEL = 32.0  # of a float image, standardised by whatever mean and sd

# --- options: keyword = value, any number of them


def _each(values: dict[str, Any], holds: Callable[[Any], bool], accepted: str) -> None:
    """Raises unless every value is a number for which `holds`; a traced value passes."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        number = isinstance(value, numbers.Real | np.ndarray | jax.Array) and np.ndim(value) == 0  # type: ignore[arg-type]
        if not number or not holds(value):
            raise ValueError(f"{name} must {accepted}; given {value!r}")


def positive(**values: float) -> None:
    """Raises unless 0 < value < infinity."""
    _each(values, lambda x: 0 < x < math.inf, "be positive and finite")


def at_most(most: float, /, **values: float) -> None:
    """Raises unless 0 < value <= most."""
    _each(values, lambda x: 0 < x <= most, f"lie in (0, {most:g}]")


def at_least_zero(**values: float) -> None:
    """Raises unless value >= 0; infinity passes."""
    _each(values, lambda x: x >= 0, "be >= 0")


def amount(**values: float) -> None:
    """Raises unless 0 <= value < infinity."""
    _each(values, lambda x: 0 <= x < math.inf, "be >= 0 and finite")


def decay(**values: float) -> None:
    """Raises unless 0 <= value < 1."""
    _each(values, lambda x: 0 <= x < 1, "lie in [0, 1)")


def fraction(**values: float | Array) -> None:
    """Raises unless 0 <= value <= 1."""
    _each(values, lambda x: 0 <= x <= 1, "lie in [0, 1]")


def within(low: float, high: float, /, **values: float) -> None:
    """Raises unless low <= value <= high."""
    _each(values, lambda x: low <= x <= high, f"lie in [{low:g}, {high:g}]")


def whole(least: int = 0, /, **values: int) -> None:
    """Raises unless value is an integer >= `least`."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}; given {value!r}")


def choice(accepted: Iterable[str], /, **values: str) -> None:
    """Raises unless value is one of `accepted`; suggests the nearest."""
    accepted = sorted(accepted)
    for name, value in values.items():
        if value not in accepted:
            near = nearest(value, accepted)
            raise ValueError(f"{name} must be one of {accepted}; given {value!r}{near}")


def nearest(value: str, accepted: Iterable[str]) -> str:
    """'; did you mean X?' for the closest accepted name, '' when nothing is close."""
    close = difflib.get_close_matches(str(value), list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def known(section: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Raises on an unknown name in `given`; suggests the nearest accepted one."""
    accepted = sorted(accepted)
    for name in given:
        if name not in accepted:
            near = nearest(name, accepted)
            raise ValueError(f"{section} has no field {name!r}{near}; known fields: {accepted}")


def function(accepted: str, arguments: int, /, **values: Callable) -> None:
    """Raises unless each is a function that takes so many arguments; `accepted` says of what."""
    for name, value in values.items():
        try:
            inspect.signature(value).bind(*range(arguments))
        except TypeError as error:
            kind = repr(value) if isinstance(value, str) else type(value).__name__
            given = getattr(value, "__name__", kind)
            raise ValueError(f"{name} must be a function {accepted}; given {given}") from error
        except ValueError:  # built in: it has no signature
            pass


# --- shapes


def arrays(**values: Array) -> None:
    """Raises unless each is an array."""
    for name, value in values.items():
        if not isinstance(value, jax.Array | np.ndarray):
            fields = ", ".join(getattr(value, "_fields", ()))
            given = f"{type(value).__name__}({fields})" if fields else type(value).__name__
            raise ValueError(f"{name} must be an array; given {given}")


def soft(**labels: Array) -> None:
    """Raises unless each is floats [B, K]: class numbers have no mean."""
    for name, y in labels.items():
        if np.ndim(y) != 2 or not jax.numpy.issubdtype(y.dtype, jax.numpy.floating):
            raise ValueError(
                f"{name} must be floats [B, K], a distribution over the classes; given "
                f"{y.dtype}{list(y.shape)}: jax.nn.one_hot makes them of classes"
            )


def same_shape(**arrays: Array) -> None:
    """Raises unless all arrays have one shape [B, K]."""
    shapes = {name: np.shape(a) for name, a in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(s) != 2 for s in shapes.values()):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(arrays)} must share one shape [B, K]; given {given}")


def rows(num_rows: int, /, **arrays: Array | None) -> None:
    """Raises unless every array (None passes) has shape [num_rows]."""
    for name, a in arrays.items():
        if a is not None and np.shape(a) != (num_rows,):
            raise ValueError(f"{name} must have shape [{num_rows}]; given {np.shape(a)}")


def floating(**trees: PyTree) -> None:
    """Raises unless every leaf has a floating-point or complex dtype; names the first other."""
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            dtype = jax.numpy.result_type(leaf)
            if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise ValueError(f"{where} must be floating-point to be trained; given {dtype}")


def images(**inputs: PyTree) -> None:
    """Raises unless each is one floating-point array [B, H, W, C]."""
    for name, x in inputs.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise ValueError(f"{name} must be one array of images; given {type(x).__name__}")
        if x.ndim != 4 or not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            raise ValueError(
                f"{name} must be images of floats [B, H, W, C]; given {x.dtype}{x.shape}"
            )


# --- values of concrete arrays


def concrete(tree: PyTree) -> bool:
    """Whether the values can be read here (no tracer, no array spread over other hosts)."""
    return not any(
        isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in jax.tree.leaves(tree)
    )


def finite(**trees: PyTree) -> None:
    """Raises if a concrete floating-point leaf holds NaN or infinity; names its first row.

    Leaves that read on access (`data.images.Rows`) stay unread.
    """
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree if concrete(tree) else ())[0]:
            if not isinstance(leaf, np.ndarray | np.generic | jax.Array | float | int):
                continue
            a = np.asarray(leaf)
            # NumPy's own issubdtype does not know bfloat16.
            if jax.numpy.issubdtype(a.dtype, jax.numpy.floating) and not np.isfinite(a).all():
                where = np.argwhere(~np.isfinite(a))[0].tolist()
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} must be finite; "
                    f"given {a[tuple(where)]} at {where}"
                )


def given(**values: T | None) -> T:
    """The one value; raises if it is None."""
    ((name, value),) = values.items()
    if value is None:
        raise ValueError(f"{name} must be given; this reads it")
    return value


def not_negative(**arrays: float | Array | None) -> None:
    """Raises if a concrete array holds a number < 0; NaN passes and shows in the loss."""
    for name, given in arrays.items():
        if given is not None and concrete(given) and np.any(np.asarray(given) < 0):
            raise ValueError(f"{name} must be >= 0; given {np.min(np.asarray(given)):.6g}")


def keeps_some(**masks: Array | None) -> None:
    """Raises if a concrete mask bool[B] is False everywhere."""
    for name, mask in masks.items():
        if mask is not None and concrete(mask) and not np.any(np.asarray(mask)):
            raise ValueError(
                f"{name} must be True for at least one row; given {np.size(mask)} False"
            )


def pixels(**images: np.ndarray) -> None:
    """Raises if floats [..., H, W, C] hold 8-bit levels instead of values in [0, 1]."""
    for name, x in images.items():
        if np.size(x) and np.max(x) > MOST_LEVEL:
            raise ValueError(
                f"{name} must be images in [0, 1], or near it; given {np.max(x):g}: divide 8-bit "
                "levels by 255"
            )


def simplex(mask: Array | None = None, /, **labels: Array) -> None:
    """Raises unless each unmasked row of f32[B, K] is >= 0 and sums to one (to 1e-4)."""
    for name, given in labels.items():
        if np.ndim(given) != 2:
            raise ValueError(f"{name} must have shape [B, K]; given {np.shape(given)}")
        if not concrete((given, mask)):
            continue
        a = np.asarray(given, np.float64)
        bad = (a < -1e-6).any(1) | ~(np.abs(a.sum(1) - 1) <= 1e-4)
        bad &= True if mask is None else np.asarray(mask)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{name} must have rows >= 0 that sum to one; row {i} is "
                f"{np.round(a[i], 4).tolist()} (sum {a[i].sum():.6g})"
            )


def integers(bound: int, /, **arrays: np.ndarray) -> None:
    """Raises unless i[N] lies in [0, bound): classes, or row numbers of a data set."""
    for name, given in arrays.items():
        a = np.asarray(given)
        if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer):
            raise ValueError(
                f"{name} must be integers of shape [N]; given {a.dtype}{list(a.shape)}"
            )
        bad = (a < 0) | (a >= bound)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise ValueError(f"{name} must lie in [0, {bound}); row {i} is {a[i]}")


# --- batches


def streams(s: Streams) -> None:
    """Raises unless every stream is well-formed and all agree on the number of classes."""
    given = {name: b for name, b in s._asdict().items() if b is not None}
    for name, b in given.items():
        _batch(name, b)
    classes = {name: b.labels.shape[1] for name, b in given.items()}
    if len(set(classes.values())) != 1:
        raise ValueError(f"all streams must have the same number of classes; given {classes}")


def _batch(name: str, b: Batch) -> None:
    size = np.shape(b.labels)[0]
    if size == 0:
        raise ValueError(f"{name} must hold at least one sample; given 0")
    for leaf in jax.tree.leaves(b.inputs):
        if np.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"{name}.inputs must have {size} rows, as its labels have; given {np.shape(leaf)}"
            )
    rows(size, **{f"{name}.mask": b.mask, f"{name}.index": b.index})
    finite(**{f"{name}.inputs": b.inputs})
    simplex(b.mask, **{f"{name}.labels": b.labels})
