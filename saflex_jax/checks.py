"""Clear errors for bad input: each names the argument, what was given and what is accepted.

Shape and hyper-parameter checks run while tracing, so before compilation. Value checks
(`finite`, `simplex`) need concrete arrays: they run on the host where data enter the program, and
are skipped on traced arrays, where the loop's metrics stop a run that is not finite.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable

import jax
import numpy as np

from saflex_jax.types import Batch, PyTree, Streams


def same_shape(**arrays: jax.Array) -> None:
    """Raises unless all named arrays have one shape [B, K]."""
    shapes = {name: np.shape(a) for name, a in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(s) != 2 for s in shapes.values()):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(arrays)} must share one shape [B, K]; given {given}")


def rows(num_rows: int, **arrays: jax.Array | None) -> None:
    """Raises unless every given array has shape [num_rows]."""
    for name, a in arrays.items():
        if a is not None and np.shape(a) != (num_rows,):
            raise ValueError(f"{name} must have shape [{num_rows}]; given {np.shape(a)}")


def choice(name: str, value: str, accepted: Iterable[str]) -> None:
    """Raises unless `value` is one of `accepted`; names the nearest."""
    accepted = sorted(accepted)
    if value not in accepted:
        raise ValueError(
            f"{name} must be one of {accepted}; given {value!r}{nearest(value, accepted)}"
        )


def nearest(value: str, accepted: Iterable[str]) -> str:
    """'; did you mean X?' for the closest accepted name, '' when nothing is close."""
    close = difflib.get_close_matches(str(value), list(accepted), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def positive(name: str, value: float) -> None:
    """Raises unless value > 0 and finite (a traced value passes)."""
    if not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; given {value}")


def at_least_zero(name: str, value: float) -> None:
    """Raises unless value >= 0; infinity passes (a traced value too)."""
    if not isinstance(value, jax.core.Tracer) and not value >= 0:
        raise ValueError(f"{name} must be >= 0; given {value}")


def amount(name: str, value: float) -> None:
    """Raises unless value >= 0 and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite; given {value}")


def whole(name: str, value: int, least: int = 0) -> None:
    """Raises unless value is an integer of at least `least`."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}; given {value}")


def decay(name: str, value: float) -> None:
    """Raises unless value lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1); given {value}")


def fraction(name: str, value: float) -> None:
    """Raises unless value lies in [0, 1] (a traced value passes)."""
    if not isinstance(value, jax.core.Tracer) and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; given {value}")


def interval(name: str, bounds: tuple[float, float], low: float, high: float) -> None:
    """Raises unless `bounds` = (a, b) with low <= a <= b <= high."""
    if np.shape(bounds) != (2,) or not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} must be (a, b) with {low} <= a <= b <= {high}; given {bounds}")


def counts(name: str, found: np.ndarray) -> None:
    """Raises unless `found` are numbers of samples f[K], each > 0 and finite."""
    a = np.asarray(found, np.float64)
    if a.ndim != 1:
        raise ValueError(f"{name} must have shape [K]; given {list(a.shape)}")
    bad = ~((a > 0) & (a < math.inf))
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name} must be positive and finite; class {k} has {a[k]:g}")


def images(name: str, inputs: PyTree) -> None:
    """Raises unless `inputs` is one floating-point array [B, H, W, C]."""
    if not isinstance(inputs, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be one array of images; given {type(inputs).__name__}")
    if inputs.ndim != 4 or not jax.numpy.issubdtype(inputs.dtype, jax.numpy.floating):
        raise ValueError(
            f"{name} must be images of floats [B, H, W, C]; given {inputs.dtype}{inputs.shape}"
        )


def concrete(tree: PyTree) -> bool:
    """Whether the values can be read here (no tracer, no array spread over other hosts)."""
    return not any(
        isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in jax.tree.leaves(tree)
    )


def finite(name: str, tree: PyTree) -> None:
    """Raises if a concrete floating-point leaf holds NaN or infinity; names its first row.

    Leaves that are read when they are asked for (`data.images.Rows`) are left unread.
    """
    if not concrete(tree):
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array | float | int):
            continue
        a = np.asarray(leaf)
        if np.issubdtype(a.dtype, np.floating) and not np.isfinite(a).all():
            where = np.argwhere(~np.isfinite(a))[0].tolist()
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be finite; "
                f"given {a[tuple(where)]} at {where}"
            )


def simplex(name: str, labels: jax.Array, mask: jax.Array | None = None) -> None:
    """Raises unless each unmasked row of f32[B, K] is >= 0 and sums to one (to 1e-4)."""
    if np.ndim(labels) != 2:
        raise ValueError(f"{name} must have shape [B, K]; given {np.shape(labels)}")
    if not concrete((labels, mask)):
        return
    a = np.asarray(labels, np.float64)
    bad = (a < -1e-6).any(1) | ~(np.abs(a.sum(1) - 1) <= 1e-4)
    if mask is not None:
        bad &= np.asarray(mask)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name} must have rows >= 0 that sum to one; row {i} is {np.round(a[i], 4).tolist()} "
            f"(sum {a[i].sum():.6g})"
        )


def class_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises unless integer labels lie in [0, num_classes)."""
    a = np.asarray(labels)
    if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape [N]; given {a.dtype}{list(a.shape)}")
    bad = (a < 0) | (a >= num_classes)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name} must lie in [0, {num_classes}); row {i} is {a[i]}")


def batch(name: str, b: Batch) -> None:
    """Raises unless a Batch is well-formed: shapes, finite inputs, labels in the simplex."""
    size = np.shape(b.labels)[0]
    if size == 0:
        raise ValueError(f"{name} must hold at least one sample; given 0")
    for leaf in jax.tree.leaves(b.inputs):
        if np.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"{name}.inputs must have {size} rows, as its labels have; given {np.shape(leaf)}"
            )
    rows(size, **{f"{name}.mask": b.mask, f"{name}.index": b.index})
    finite(f"{name}.inputs", b.inputs)
    simplex(f"{name}.labels", b.labels, b.mask)


def streams(s: Streams) -> None:
    """Raises unless every stream is well-formed and all agree on the number of classes."""
    given = {name: b for name, b in s._asdict().items() if b is not None}
    for name, b in given.items():
        batch(name, b)
    classes = {name: b.labels.shape[1] for name, b in given.items()}
    if len(set(classes.values())) != 1:
        raise ValueError(f"all streams must have the same number of classes; given {classes}")


def validation(method: str, val: Batch | None) -> None:
    """There are validation samples, for a method that learns from them."""
    if val is None:
        raise ValueError(f"{method} needs validation samples; given streams.val = None")


def no_clean(method: str, clean: Batch | None) -> None:
    """There are no clean samples, for a method that would leave them out."""
    if clean is not None:
        raise ValueError(f"{method} trains on candidates alone; given streams.clean")


def outputs(found: PyTree, *wanted: str) -> None:
    """A model's outputs are a dict that has these."""
    names = set(found) if isinstance(found, dict) else {"logits"}
    if not {*wanted} <= names:
        *first, last = map(repr, wanted)
        raise ValueError(
            f"model must hand out {', '.join(first)} and {last}; given {sorted(names)}"
        )


def fields(name: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Raises on a config field that nobody reads; names the nearest known one."""
    accepted = sorted(accepted)
    for field in given:
        if field not in accepted:
            raise ValueError(
                f"{name} has no field {field!r}{nearest(field, accepted)}; known fields: {accepted}"
            )
