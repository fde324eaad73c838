"""What an augmentation is, how several make one, and how one goes in front of any method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from saflex_jax import checks
from saflex_jax.types import Batch, Method, Metrics, PyTree, Trace, TrainState

# (key, batch) -> batch whose inputs are augmented, whose labels are the prior of the new samples
# and whose trace names what was done
Augment = Callable[[jax.Array, Batch], Batch]

# Every name that a trace can hold; `Trace.operation` counts places in this tuple.
OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "invert",
    "flip", "shift", "soft_crop", "resized_crop", "cutout", "random_erasing", "blur", "affine",
    "random_field",
    "augmix", "mixup", "cutmix", "resizemix", "fmix", "gridmix", "smoothmix",
    "feature_noise", "feature_mask", "tabular_cutmix", "smote",
    "automix",
)  # fmt: skip


def check_interval(low: float, high: float, /, **bounds: tuple[float, float]) -> None:
    """Raises ValueError unless each is (a, b) with low <= a <= b <= high."""
    for name, given in bounds.items():
        if len(given) != 2 or not low <= given[0] <= given[1] <= high:
            raise ValueError(f"{name} must be (a, b) with {low} <= a <= b <= {high}; given {given}")


def record(
    batch: Batch,
    operation: str | jax.Array,
    magnitude: jax.Array | float,
    partner: jax.Array | None = None,
) -> Batch:
    """The batch with one more column in its trace.

    Args:
      batch: of B rows.
      operation: a name of OPERATIONS, or i32[B] places in it.
      magnitude: f32[B] or f32[].
      partner: i32[B], source sample of the second parent; None = there is none.

    Raises:
      ValueError: a name that is not in OPERATIONS.
    """
    if isinstance(operation, str):
        checks.choice(OPERATIONS, operation=operation)
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
    """key[B]: row i's is fold_in(key, index i), whatever its place and the number of devices."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(batch.index)


def per_example(name: str, op: Callable[[jax.Array, PyTree], tuple[PyTree, jax.Array]]) -> Augment:
    """Lifts (key, one input) -> (input, magnitude) to batches.

    The result for a sample depends on its index alone, not on its place or on the devices.
    """
    checks.choice(OPERATIONS, name=name)

    def augment(key, batch):
        inputs, magnitude = jax.vmap(op)(sample_keys(key, batch), batch.inputs)
        return record(batch._replace(inputs=inputs), name, magnitude)

    return augment


def per_image(name: str, op: Callable[[jax.Array, jax.Array], tuple]) -> Augment:
    """`per_example` for images: computed in f32, handed back in their own dtype; others refused."""

    def cast(key, image):
        made, magnitude = op(key, image.astype(jnp.float32))
        return made.astype(image.dtype), magnitude

    augment = per_example(name, cast)

    def checked(key: jax.Array, batch: Batch) -> Batch:
        checks.images(inputs=batch.inputs)
        return augment(key, batch)

    return checked


def chain(*augments: Augment) -> Augment:
    """One after the other, each with a key of its own."""

    def augment(key, batch):
        for number, a in enumerate(augments):
            batch = a(jax.random.fold_in(key, number), batch)
        return batch

    return augment


def choice(*augments: Augment, p: Sequence[float] | None = None) -> Augment:
    """One of several for every sample, drawn by its index; all run, and one is kept.

    Args:
      augments: at least one; none may change the number of rows.
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
        of_choice, *keys = jax.random.split(key, 1 + len(augments))
        draw = jax.vmap(lambda k: jax.random.choice(k, len(p), p=jnp.asarray(p)))
        drawn = draw(sample_keys(of_choice, batch))
        made = [a(k, batch) for a, k in zip(augments, keys)]
        for number, b in enumerate(made):
            if b.index.shape != batch.index.shape:
                raise ValueError(
                    f"choice needs augmentations that keep the number of rows; number {number} "
                    f"made {b.index.shape[0]} of {batch.index.shape[0]}"
                )
        made = _aligned(made)

        def keep(*leaves):
            which = drawn.reshape(-1, *[1] * (leaves[0].ndim - 1))
            return jnp.select([which == n for n in range(len(leaves))], leaves, leaves[0])

        return jax.tree.map(keep, *made)

    return augment


def _aligned(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, their traces filled up with `identity` to the longest of them."""
    length = lambda batch: 0 if batch.trace is None else batch.trace.operation.shape[1]
    longest, made = max(map(length, batches)), []
    for batch in batches:
        while length(batch) < longest:
            batch = record(batch, "identity", 0.0)
        made.append(batch)
    return made


def views(*augments: Augment) -> Augment:
    """Several rows for each sample, one by each augmentation: [B, ...] -> [B * V, ...].

    Row i * V + v is sample i under augmentation v, so a sample's rows stay on its device. For n
    draws of one pipeline give it n times: `views(*[pipeline] * n)`; each has a key of its own. What
    comes after `views` in a chain draws by the sample, hence alike for all of its rows.
    """
    if not augments:
        raise ValueError("views must have at least one augmentation; given 0")

    def augment(key, batch):
        made = [a(jax.random.fold_in(key, n), batch) for n, a in enumerate(augments)]
        made = _aligned(made)
        stack = lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:])
        return jax.tree.map(stack, *made)

    return augment


def identity(key: jax.Array, batch: Batch) -> Batch:
    """The augmentation that does nothing: the clean view beside augmented ones."""
    del key
    return batch


def on(name: str, augment: Augment) -> Augment:
    """Augments one entry of dictionary inputs, such as "image" beside "tokens"; keeps the rest."""

    def augmented(key, batch):
        if not isinstance(batch.inputs, dict) or name not in batch.inputs:
            given = sorted(batch.inputs) if isinstance(batch.inputs, dict) else type(batch.inputs)
            raise ValueError(f"inputs must be a dict with the entry {name!r}; given {given}")
        made = augment(key, batch._replace(inputs=batch.inputs[name]))
        if made.index.shape != batch.index.shape:
            raise ValueError("on needs an augmentation that keeps the number of rows")
        return made._replace(inputs={**batch.inputs, name: made.inputs})

    return augmented


def drawn(augment: Augment, state: TrainState, candidates: Batch) -> Batch:
    """The very candidates that a step at `state` trains on; to look at, with their traces."""
    # The method's own draws of this step fold a sample index in next, never this constant.
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x5AF1EC)
    return augment(key, candidates)


def upstream(method: Method, augment: Augment) -> Method:
    """The method, its candidates augmented by an upstream pipeline inside the compiled step."""

    def augmented(state, streams):
        return streams._replace(candidates=drawn(augment, state, streams.candidates))

    def step(state, streams, *, reduce):
        return method.step(state, augmented(state, streams), reduce=reduce)

    targets = method.targets
    if targets is not None:

        def targets(state, streams):
            return method.targets(state, augmented(state, streams))

    return method._replace(step=step, targets=targets)


def by_operation(values: jax.Array, batch: Batch) -> Metrics:
    """name -> (sum, count) of `values` f32[B], over the unmasked rows that an operation touched.

    What a pipeline's operations are worth: `by_operation(targets.weights, batch)` is the learned
    weight of each, with `batch` from `drawn`. An operation that a row met twice counts once.
    """
    if batch.trace is None:
        raise ValueError("batch must have a trace; it was not made by an augmentation")
    found = {}
    for number, name in enumerate(OPERATIONS):
        rows = (batch.trace.operation == number).any(1) & batch.mask
        found[name] = jnp.sum(jnp.where(rows, values, 0.0)), jnp.sum(rows, dtype=jnp.float32)
    return found
