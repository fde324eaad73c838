"""What an augmentation is, and how one goes in front of any method."""

from __future__ import annotations

from collections.abc import Callable

import jax

from saflex_jax.types import Batch, Method

# (key, batch) -> batch whose inputs are augmented and whose labels are the prior of the new samples
Augment = Callable[[jax.Array, Batch], Batch]


def per_example(op: Callable[[jax.Array, jax.Array], jax.Array]) -> Augment:
    """Lifts (key, one input) -> input to batches; sample i's key is fold_in(key, index i).

    The result for a sample depends on its index alone, not on its place or on the devices.
    """

    def augment(key, batch):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.index)
        return batch._replace(inputs=jax.vmap(op)(keys, batch.inputs))

    return augment


def chain(*augments: Augment) -> Augment:
    """One after the other, each with a key of its own."""

    def augment(key, batch):
        for number, a in enumerate(augments):
            batch = a(jax.random.fold_in(key, number), batch)
        return batch

    return augment


def upstream(method: Method, augment: Augment) -> Method:
    """The method, its candidates augmented by an upstream pipeline inside the compiled step."""

    def augmented(state, streams):
        # The method's own draws of this step fold a sample index in next, never this constant.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0x5AF1EC)
        return streams._replace(candidates=augment(key, streams.candidates))

    def step(state, streams, *, reduce):
        return method.step(state, augmented(state, streams), reduce=reduce)

    targets = method.targets
    if targets is not None:

        def targets(state, streams):
            return method.targets(state, augmented(state, streams))

    return method._replace(step=step, targets=targets)
