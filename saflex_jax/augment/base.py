"""What an augmentation is, how to combine several, and the names in a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax import checks
from saflex_jax.types import Batch, Metrics, PyTree, Trace

# (key, batch) -> batch whose inputs are augmented, whose labels are the prior of the new samples
# and whose trace names what was done
Augment = Callable[[jax.Array, Batch], Batch]

# Every name that a trace can hold; `Trace.operation` counts places in this list. It only grows, at
# its end: the package's own names first, then those of `register_operation`.
OPERATIONS = [
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "invert",
    "flip", "shift", "soft_crop", "resized_crop", "cutout", "random_erasing", "blur", "affine",
    "random_field",
    "augmix", "mixup", "cutmix", "resizemix", "fmix", "gridmix", "smoothmix",
    "feature_noise", "feature_mask", "tabular_cutmix", "smote",
    "automix",
    "view",
    "wrong_captions", "swapped_classes",
    "candidate", "prompt", "strength", "generator", "flagged",
]  # fmt: skip


def register_operation(name: str) -> int:
    """The operation's index in OPERATIONS; adds the name if it is new.

    Call it where you define your augmentation, before any trace is recorded:

    >>> place = register_operation("film_grain")
    >>> OPERATIONS[place]
    'film_grain'

    New names get indices in the order of registration. With several processes, register in the same
    order everywhere; store names rather than indices.

    Args:
      name: a Python identifier.

    Raises:
      ValueError: the name is not a Python identifier.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name must be an identifier, as 'film_grain' is; given {name!r}")
    if name not in OPERATIONS:
        OPERATIONS.append(name)
    return OPERATIONS.index(name)


def _check_operation(**names: str) -> None:
    """Raises ValueError unless each is a name of OPERATIONS."""
    for argument, name in names.items():
        if name not in OPERATIONS:
            raise ValueError(
                f"{argument} must be one of {sorted(OPERATIONS)}, or a name that "
                f"`augment.register_operation` adds; given {name!r}"
                f"{checks.nearest(name, OPERATIONS)}"
            )


def check_interval(low: float, high: float, /, **bounds: tuple[float, float]) -> None:
    """Raises ValueError unless each is (a, b) with low <= a <= b <= high."""
    for name, given in bounds.items():
        if np.shape(given) != (2,) or not low <= given[0] <= given[1] <= high:
            raise ValueError(f"{name} must be (a, b) with {low} <= a <= b <= {high}; given {given}")


def record(
    batch: Batch,
    operation: str | jax.Array,
    magnitude: jax.Array | float,
    partner: jax.Array | None = None,
) -> Batch:
    """Adds one column to the batch's trace.

    >>> batch = Batch(jnp.zeros((2, 3)), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> trace = record(record(batch, "rotate", 30.0), "flip", 1.0).trace
    >>> [OPERATIONS[place] for place in trace.operation[0]], trace.magnitude[0].tolist()
    (['rotate', 'flip'], [30.0, 1.0])

    Args:
      batch: of B rows.
      operation: a name of OPERATIONS, or indices i32[B] into it.
      magnitude: f32[B] or f32[], in units of the operation.
      partner: i32[B], source sample of the second parent; None = no second parent.

    Raises:
      ValueError: a name that is not in OPERATIONS.
    """
    if isinstance(operation, str):
        _check_operation(operation=operation)
        operation = OPERATIONS.index(operation)
    shape = batch.index.shape
    column = Trace(
        jnp.broadcast_to(jnp.asarray(operation, jnp.int32), shape)[:, None],
        jnp.broadcast_to(jnp.asarray(magnitude, jnp.float32), shape)[:, None],
        (batch.index if partner is None else partner)[:, None],
    )
    if batch.trace is not None:
        column = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), batch.trace, column)
    return batch._replace(trace=column)


def sample_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """One key per row, key[B]: fold_in(key, index), independent of position and device.

    >>> batch = Batch(jnp.zeros((2, 3)), jnp.eye(2), jnp.ones(2, bool), jnp.array([7, 4]))
    >>> bool(sample_keys(jax.random.key(0), batch)[1] == jax.random.fold_in(jax.random.key(0), 4))
    True

    Args:
      key: PRNG key of the step.
      batch: B rows; `index` is read.
    """
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(batch.index)


def per_example(name: str, op: Callable[[jax.Array, PyTree], tuple[PyTree, jax.Array]]) -> Augment:
    """An augmentation of batches from an operation on one input.

    A sample's result depends on its index, not on its position or on the devices.

    >>> augment = per_example("shift", lambda key, x: (x + 1, 1.0))
    >>> batch = Batch(jnp.zeros((2, 3)), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> augment(jax.random.key(0), batch).inputs[0].tolist()
    [1.0, 1.0, 1.0]

    Args:
      name: of OPERATIONS, for the trace; add your own with `register_operation`.
      op: (key, one input) -> (input, magnitude f32[]).

    Raises:
      ValueError: a name that is not in OPERATIONS; (when called) an op that returns other things.
    """
    _check_operation(name=name)

    def augment(key, batch):
        made = jax.vmap(op)(sample_keys(key, batch), batch.inputs)
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise ValueError(
                f"op of augment.per_example({name!r}) must return (input, magnitude); given "
                f"{type(made).__name__ if isinstance(made, tuple | list) else 'one value'}"
            )
        inputs, magnitude = made
        return record(batch._replace(inputs=inputs), name, magnitude)

    return augment


def per_image(name: str, op: Callable[[jax.Array, jax.Array], tuple]) -> Augment:
    """`per_example` for images: computes in f32, keeps their dtype, refuses other inputs."""

    def in_float32(key, image):
        out, magnitude = op(key, image.astype(jnp.float32))
        return out.astype(image.dtype), magnitude

    unchecked = per_example(name, in_float32)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        checks.images(inputs=batch.inputs)
        return unchecked(key, batch)

    return augment


def chain(*augments: Augment) -> Augment:
    """Applies augmentations one after the other, each with its own key.

    >>> plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    >>> double = per_example("flip", lambda key, x: (2 * x, 2.0))
    >>> batch = Batch(jnp.zeros((1, 2)), jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> jax.jit(chain(plus, double))(jax.random.key(0), batch).inputs.tolist()
    [[2.0, 2.0]]

    Args:
      *augments: (key, batch) -> batch.
    """

    def augment(key, batch):
        for number, a in enumerate(augments):
            batch = a(jax.random.fold_in(key, number), batch)
        return batch

    return augment


def choice(*augments: Augment, p: Sequence[float] | None = None) -> Augment:
    """Draws one of several augmentations for each sample, by its index.

    All of them run on the whole batch; for operations, `policies.apply` is cheaper.

    >>> plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    >>> batch = Batch(jnp.zeros((1, 2)), jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> jax.jit(choice(identity, plus, p=(0, 1)))(jax.random.key(0), batch).inputs.tolist()
    [[1.0, 1.0]]

    Args:
      *augments: at least one; none may change the number of rows.
      p: their probabilities; None = equal.

    Raises:
      ValueError: `p` is not a distribution over the augmentations.
    """
    p = [1 / max(len(augments), 1)] * len(augments) if p is None else list(p)
    if len(p) != len(augments) or not p or not min(p) >= 0 or not abs(sum(p) - 1) <= 1e-6:
        raise ValueError(
            f"p must be >= 0 and sum to one over the {len(augments)} augmentations; given {p}"
        )

    def augment(key, batch):
        choice_key, *keys = jax.random.split(key, 1 + len(augments))
        draw = jax.vmap(lambda k: jax.random.choice(k, len(p), p=jnp.asarray(p)))
        drawn = draw(sample_keys(choice_key, batch))
        made = [a(k, batch) for a, k in zip(augments, keys)]
        return _picked(batch, drawn, {f"number {n}": branch for n, branch in enumerate(made)})

    return augment


def _picked(batch: Batch, drawn: jax.Array, branches: Mapping[str, Batch]) -> Batch:
    """Row b of branch drawn[b], i32[B]; the branches, by name, are made of `batch`."""
    for name, branch in branches.items():
        if branch.index.shape != batch.index.shape:
            raise ValueError(
                f"augmentations to draw from must keep the number of rows; {name} made "
                f"{len(branch.index)} of {len(batch.index)}"
            )

    def pick(*leaves):
        which = drawn.reshape(-1, *[1] * (leaves[0].ndim - 1))
        return jnp.select([which == n for n in range(len(leaves))], leaves, leaves[0])

    return jax.tree.map(pick, *_with_equal_traces(list(branches.values())))


def _with_equal_traces(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, with `identity` appended to all traces but the longest."""

    def length(batch):
        return 0 if batch.trace is None else batch.trace.operation.shape[1]

    longest, padded = max(map(length, batches)), []
    for batch in batches:
        while length(batch) < longest:
            batch = record(batch, "identity", 0.0)
        padded.append(batch)
    return padded


def views(*augments: Augment) -> Augment:
    """Makes several rows of each sample, one per augmentation: [B, ...] -> [B * V, ...].

    Row i * V + v is sample i under augmentation v, so a sample's rows stay on its device. For n
    draws of one pipeline pass it n times: `views(*[pipeline] * n)`; each gets its own key. Steps
    after `views` in a chain draw by sample, so all rows of a sample get the same draw.

    >>> plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    >>> batch = Batch(jnp.array([[0.0], [5.0]]), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> jax.jit(views(identity, plus))(jax.random.key(0), batch).inputs.ravel().tolist()
    [0.0, 1.0, 5.0, 6.0]

    Args:
      *augments: V augmentations, (key, batch) -> batch.

    Raises:
      ValueError: no augmentation.
    """
    if not augments:
        raise ValueError("views must have at least one augmentation; given 0")

    def augment(key, batch):
        made = [a(jax.random.fold_in(key, n), batch) for n, a in enumerate(augments)]

        def interleave(*leaves):
            return jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:])

        return jax.tree.map(interleave, *_with_equal_traces(made))

    return augment


def identity(key: jax.Array, batch: Batch) -> Batch:
    """Returns the batch unchanged: a clean view among augmented ones.

    >>> batch = Batch(jnp.zeros((1, 2)), jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> identity(jax.random.key(0), batch) is batch
    True

    Args:
      key: not used.
      batch: any batch.
    """
    del key
    return batch


def on(name: str, augment: Augment) -> Augment:
    """Augments one entry of dictionary inputs, such as "image" next to "tokens".

    >>> plus = per_example("shift", lambda key, x: (x + 1, 1.0))
    >>> inputs = {"image": jnp.zeros((1, 2)), "tokens": jnp.zeros((1, 3), int)}
    >>> batch = Batch(inputs, jnp.eye(1), jnp.ones(1, bool), jnp.arange(1))
    >>> on("image", plus)(jax.random.key(0), batch).inputs["image"].tolist()
    [[1.0, 1.0]]

    Args:
      name: of the entry.
      augment: (key, batch) -> batch with the same number of rows.

    Raises:
      ValueError: inputs without that entry, or an augmentation that changes the number of rows.
    """

    def augmented(key, batch):
        if not isinstance(batch.inputs, dict) or name not in batch.inputs:
            given = sorted(batch.inputs) if isinstance(batch.inputs, dict) else type(batch.inputs)
            raise ValueError(f"inputs must be a dict with the entry {name!r}; given {given}")
        entry = augment(key, batch._replace(inputs=batch.inputs[name]))
        if entry.index.shape != batch.index.shape:
            raise ValueError("on needs an augmentation that keeps the number of rows")
        return entry._replace(inputs={**batch.inputs, name: entry.inputs})

    return augmented


def by_operation(values: jax.Array, batch: Batch) -> Metrics:
    """Sums `values` over the unmasked rows of each operation: name -> (sum, count).

    With `batch` from `methods.upstream.drawn`, `by_operation(targets.weights, batch)` gives the
    learned weight of each operation of a pipeline. An operation applied twice to a row counts once.

    >>> batch = Batch(jnp.zeros((2, 3)), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> batch = record(batch, "cutout", 0.1)
    >>> {name: float(total / n) for name, (total, n) in by_operation(jnp.ones(2), batch).items()}
    {'cutout': 1.0}

    Args:
      values: f32[B].
      batch: of B rows, with a trace.

    Returns:
      The operations that occur in unmasked rows. Under jit, where the trace cannot be read, all of
      OPERATIONS; those that do not occur have count 0.

    Raises:
      ValueError: a batch without a trace.
    """
    if batch.trace is None:
        raise ValueError("batch must have a trace; it was not made by an augmentation")
    operation = batch.trace.operation
    places = range(len(OPERATIONS))
    if checks.concrete((operation, batch.mask)):
        places = np.unique(np.asarray(operation)[np.asarray(batch.mask)])
    sums = {}
    for place in places:
        rows = (operation == place).any(1) & batch.mask
        total, count = jnp.sum(jnp.where(rows, values, 0.0)), jnp.sum(rows, dtype=jnp.float32)
        sums[OPERATIONS[place]] = total, count
    return sums
