"""Training steps: pure maps (state, batch) -> (state, metrics), written once for every runner.

Static arguments are keyword-only; bind them with functools.partial. `reduce`, the mean over the
data-parallel axis, is all that differs between jit and pmap.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from saflex_jax.core import hypergrad
from saflex_jax.core.losses import (
    CandidateLoss,
    masked_mean,
    weighted_cross_entropy,
    weighted_soft_cross_entropy,
)
from saflex_jax.core.tree import Everywhere, above_zero, identity, mean_floats, zeros
from saflex_jax.types import (
    Batch,
    LinearSolve,
    Metrics,
    ModelState,
    Params,
    PyTree,
    Reduce,
    Rule,
    Streams,
    Targets,
    TrainFn,
    TrainState,
)

# params -> (loss f32[], (new model_state, metrics))
StepLoss = Callable[[Params], tuple[jax.Array, tuple[ModelState, Metrics]]]
# (params, part, model_state) -> the same, of a part of a batch
PartLoss = Callable[[Params, PyTree, ModelState], tuple[jax.Array, tuple[ModelState, Metrics]]]


def init_state(
    key: jax.Array,
    params: Params,
    model_state: ModelState,
    tx: optax.GradientTransformation,
    extra: PyTree = (),
) -> TrainState:
    """A TrainState at step 0.

    >>> state = init_state(jax.random.key(0), jnp.zeros(2), {}, optax.sgd(0.1))
    >>> int(state.step)
    0

    Args:
      key: typed PRNG key.
      params: initial parameters.
      model_state: non-trained variables; {} when none.
      tx: optax transformation.
      extra: arrays that the method owns.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), key, extra)


def step_key(state: TrainState, index: jax.Array) -> jax.Array:
    """The network's key at this step; differs between devices under pmap.

    >>> state = init_state(jax.random.key(0), jnp.zeros(2), {}, optax.sgd(0.1))
    >>> bool(step_key(state, jnp.array([3])) == step_key(state, jnp.array([4])))
    False

    Args:
      state: TrainState.
      index: i32[B], `Batch.index`; its first entry is folded in.
    """
    return _key_at(state, index[0])


def draws_key(state: TrainState) -> jax.Array:
    """The key of a method's draws per sample at this step; the same on every device.

    It differs from the network's key and from the upstream pipeline's.

    >>> state = init_state(jax.random.key(0), jnp.zeros(2), {}, optax.sgd(0.1))
    >>> bool(draws_key(state) == draws_key(state._replace(step=state.step + 1)))
    False

    Args:
      state: TrainState.
    """
    return _key_at(state, 0x7DA06A7C)


def pipeline_key(state: TrainState) -> jax.Array:
    """The key of the pipeline in front of a method at this step; the same on every device.

    It differs from the network's key, but for a sample of index 0x5AF1EC, and from the method's.

    >>> state = init_state(jax.random.key(0), jnp.zeros(2), {}, optax.sgd(0.1))
    >>> bool(pipeline_key(state) == draws_key(state))
    False

    Args:
      state: TrainState.
    """
    return _key_at(state, 0x5AF1EC)


def _key_at(state: TrainState, number: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), number)


def total(
    values: jax.Array, mask: jax.Array, reduce: Reduce = identity
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of values over the unmasked rows of all devices: one entry of `types.Metrics`.

    >>> [float(x) for x in total(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))]
    [4.0, 2.0]

    Args:
      values: f32[B].
      mask: bool[B]; False rows do not count.
      reduce: mean over the data-parallel axis.
    """
    values, mask = jnp.where(mask, values, 0.0), mask.astype(jnp.float32)
    return reduce((jnp.sum(values), jnp.sum(mask)))


def gradient_step(
    state: TrainState,
    loss_fn: StepLoss | PartLoss,
    *,
    tx: optax.GradientTransformation,
    parts: PyTree = None,
    reduce: Reduce = identity,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on any loss; every method ends in it.

        theta <- theta + tx(mean over devices of grad loss(theta))

    >>> def loss_fn(params):
    ...     return jnp.sum(params**2), ({}, {})
    >>> tx = optax.sgd(0.5)
    >>> state = init_state(jax.random.key(0), jnp.array([1.0]), {}, tx)
    >>> state, metrics = gradient_step(state, loss_fn, tx=tx)
    >>> state.params.tolist(), [float(x) for x in metrics["loss"]]
    ([0.0], [1.0, 1.0])

    Args:
      state: TrainState.
      loss_fn: params -> (loss, (model_state, metrics)). Under pmap `loss` is the device's share
        (`losses.masked_mean`) and metrics are already reduced.
      tx: optax transformation.
      parts: arrays [m, ...] over whose leading axis the loss is a sum. The loss is then called as
        (params, part, model_state), one part at a time; losses, gradients and metrics add up.
      reduce: mean over the data-parallel axis.

    Returns:
      (state at step + 1, metrics with "loss", "grad_norm" and "param_norm" added).
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if parts is None:
        (loss, (model_state, metrics)), grads = gradient(state.params)
    else:
        (loss, (model_state, metrics)), grads = _added_up(gradient, state, parts)
    loss, grads = reduce((loss, grads))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.ones(())
    metrics = {
        **metrics,
        "loss": (loss, one),
        "grad_norm": (optax.tree.norm(grads), one),
        # Of the new parameters: an update that overflows must not wait for the next step's loss.
        "param_norm": (optax.tree.norm(params), one),
    }
    new = state._replace(
        step=state.step + 1,
        params=params,
        model_state=mean_floats(model_state, reduce),
        opt_state=opt_state,
    )
    return new, metrics


def _added_up(gradient, state: TrainState, parts: PyTree):
    """((loss, (model_state, metrics)), gradient) over all parts, of whom one is in memory."""

    def add(carry, part):
        model_state, sums = carry
        (loss, (model_state, metrics)), grads = gradient(state.params, part, model_state)
        return (model_state, jax.tree.map(jnp.add, sums, (loss, metrics, grads))), None

    first = jax.tree.map(lambda x: x[0], parts)
    (loss, (_, metrics)), grads = jax.eval_shape(gradient, state.params, first, state.model_state)
    sums = zeros((loss, metrics, grads))
    carry, _ = jax.lax.scan(add, (state.model_state, sums), parts)
    model_state, (loss, metrics, grads) = carry
    return (loss, (model_state, metrics)), grads


def _microbatches(tree: PyTree, number: int, reduce: Reduce) -> PyTree:
    """Rows [B, ...] as [number, B / number, ...], each device's own in each; order is kept."""
    devices = reduce.devices if isinstance(reduce, Everywhere) else 1

    def divided(x):
        x = x.reshape(devices, number, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(number, -1, *x.shape[3:])

    return jax.tree.map(divided, tree)


def inner_step(
    state: TrainState,
    candidates: Batch,
    targets: Targets,
    *,
    train_fn: TrainFn,
    tx: optax.GradientTransformation,
    clean: Batch | None = None,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    microbatches: int = 1,
    reduce: Reduce = identity,
) -> tuple[TrainState, Metrics]:
    """One step on weighted soft-label candidates, plus clean samples if given.

        L = mean_i w_i CE(f(x_i), y_i)  [+ mean_j CE(f(x_j), q_j)]

    Candidates and clean samples share one forward pass (and its BatchNorm statistics).

    >>> def train_fn(params, model_state, inputs, key):
    ...     return inputs @ params, model_state
    >>> tx, batch = optax.sgd(1.0), Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> state = init_state(jax.random.key(0), jnp.zeros((2, 2)), {}, tx)
    >>> targets = Targets(jnp.array([2.0, 0.0]), batch.labels, jnp.zeros(2))
    >>> state, metrics = inner_step(state, batch, targets, train_fn=train_fn, tx=tx)
    >>> state.params.tolist()  # the second sample has weight zero
    [[0.5, -0.5], [0.0, 0.0]]

    Args:
      state: TrainState.
      candidates: Batch of B.
      targets: Targets of B.
      train_fn: (params, model_state, inputs, key) -> (logits, model_state), training mode.
      tx: optax transformation.
      clean: samples with prior labels q and weight one, or None.
      loss: of the candidates, instead of w_i CE(f(x_i), y_i); see `losses`.
      microbatches: number of parts of the batch. Their gradients add up, with one part in memory at
        a time. Weights and labels come from the whole batch, so the step is the same up to rounding
        (but BatchNorm's statistics are each part's own).
      reduce: mean over the data-parallel axis.

    Raises:
      ValueError: microbatches do not divide a device's rows (for a loss that compares rows, its
        groups of rows), or clean samples are given with them.
    """
    size = candidates.labels.shape[0]
    if microbatches > 1:
        _check_parts(size, microbatches, clean, reduce, getattr(loss, "rows_together", 1))
        count = reduce(jnp.sum(candidates.mask, dtype=jnp.float32))

        def part_loss(params, part, model_state):
            rows, of_rows = part
            logits, model_state = train_fn(
                params, model_state, rows.inputs, step_key(state, rows.index)
            )
            losses = loss(logits, of_rows, rows)
            metrics = {"candidate_loss": total(losses, rows.mask, reduce)}
            return jnp.sum(losses) / above_zero(count), (model_state, metrics)

        parts = _microbatches((candidates, targets), microbatches, reduce)
        return gradient_step(state, part_loss, tx=tx, parts=parts, reduce=reduce)
    inputs = candidates.inputs
    if clean is not None:
        inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), inputs, clean.inputs)

    def loss_fn(params):
        logits, model_state = train_fn(
            params, state.model_state, inputs, step_key(state, candidates.index)
        )
        losses = loss(logits[:size], targets, candidates)
        total_loss = masked_mean(losses, candidates.mask, reduce=reduce)
        metrics = {"candidate_loss": total(losses, candidates.mask, reduce)}
        if clean is not None:
            losses = weighted_cross_entropy(logits[size:], clean.labels, mask=clean.mask)
            total_loss += masked_mean(losses, clean.mask, reduce=reduce)
            metrics["clean_loss"] = total(losses, clean.mask, reduce)
        return total_loss, (model_state, metrics)

    return gradient_step(state, loss_fn, tx=tx, reduce=reduce)


def _check_parts(
    size: int, number: int, clean: Batch | None, reduce: Reduce, together: int
) -> None:
    devices = reduce.devices if isinstance(reduce, Everywhere) else 1
    if size % (devices * number * together):
        rows = f" in groups of {together} rows" * (together > 1)
        raise ValueError(
            f"microbatches must divide the {size // devices} candidates of a device{rows}; "
            f"given {number}"
        )
    if clean is not None:
        raise ValueError(f"microbatches must be 1 beside clean samples; given {number}")


def bilevel_step(
    state: TrainState,
    streams: Streams,
    *,
    logits_fn: Callable[[Params, ModelState, PyTree], jax.Array],
    train_fn: TrainFn,
    tx: optax.GradientTransformation,
    rule: Rule,
    loss: CandidateLoss = weighted_soft_cross_entropy,
    microbatches: int = 1,
    reduce: Reduce = identity,
) -> tuple[TrainState, Metrics]:
    """Refines the candidates' targets, then takes the inner step on them.

        scores -> targets -> theta <- theta + tx(grad of the weighted soft-label loss)

    `state.extra` holds the rule's arrays.

    >>> from saflex_jax.rules import AsGiven
    >>> def logits_fn(params, model_state, inputs):
    ...     return inputs @ params
    >>> def train_fn(params, model_state, inputs, key):
    ...     return inputs @ params, model_state
    >>> tx, batch = optax.sgd(1.0), Batch(jnp.eye(2), jnp.eye(2), jnp.ones(2, bool), jnp.arange(2))
    >>> state = init_state(jax.random.key(0), jnp.zeros((2, 2)), {}, tx)
    >>> networks = dict(logits_fn=logits_fn, train_fn=train_fn)
    >>> state, metrics = bilevel_step(state, Streams(batch), **networks, tx=tx, rule=AsGiven())
    >>> int(state.step), round(float(metrics["loss"][0]), 4)
    (1, 0.6931)

    Args:
      state: TrainState.
      streams: candidates, val and, optionally, clean samples.
      logits_fn: (params, model_state, inputs) -> logits, evaluation mode; for scores only.
      train_fn: (params, model_state, inputs, key) -> (logits, model_state), training mode; for the
        inner step only.
      tx: optax transformation.
      rule: what to train on (see `saflex_jax.rules`).
      loss: of the candidates (see `losses`).
      microbatches: see `inner_step`; scores use the whole batch.
      reduce: mean over the data-parallel axis.
    """

    def frozen(params, inputs):  # running statistics: rows stay independent
        return logits_fn(params, state.model_state, inputs)

    targets, extra, of_rule = rule.apply(state.extra, state, frozen, streams, reduce=reduce)
    state, metrics = inner_step(
        state,
        streams.candidates,
        targets,
        train_fn=train_fn,
        tx=tx,
        clean=streams.clean,
        loss=loss,
        microbatches=microbatches,
        reduce=reduce,
    )
    return state._replace(extra=extra), {**metrics, **of_rule}


def outer_step(
    meta: PyTree,
    meta_opt_state: PyTree,
    params: Params,
    *,
    inner_loss: hypergrad.Loss,
    outer_loss: hypergrad.Loss,
    meta_tx: optax.GradientTransformation,
    solve: LinearSolve,
    project: Callable[[PyTree], PyTree] = identity,
    reduce: Reduce = identity,
) -> tuple[PyTree, PyTree, Metrics]:
    """One projected optimiser step on meta-parameters along the implicit hypergradient.

        phi <- project(phi + meta_tx(d L_out / d phi))

    >>> from saflex_jax.core.linear_solve import cg_solve
    >>> meta_tx = optax.sgd(0.1)
    >>> meta, _, metrics = outer_step(
    ...     2.0, meta_tx.init(2.0), params=2.0, meta_tx=meta_tx, solve=cg_solve(damping=0.0),
    ...     inner_loss=lambda params, meta: (params - meta) ** 2,  # its optimum is meta
    ...     outer_loss=lambda params, meta: params**2,  # hence d/d meta = 2 meta
    ... )
    >>> round(float(meta), 4)
    1.6

    Args:
      meta: phi, pytree of floats, the same on every device.
      meta_opt_state: optax state of phi.
      params: an (approximate) inner minimiser.
      inner_loss, outer_loss: (params, meta) -> f32[].
      meta_tx: optax transformation for phi.
      solve: a LinearSolve for the inner Hessian.
      project: projection onto phi's feasible set.
      reduce: mean over the data-parallel axis.

    Returns:
      (meta, meta_opt_state, metrics).
    """
    value, grads, info = hypergrad.implicit_hypergradient(
        inner_loss, outer_loss, params, meta, solve=solve, reduce=reduce
    )
    updates, meta_opt_state = meta_tx.update(grads, meta_opt_state, meta)
    meta = project(optax.apply_updates(meta, updates))
    one = jnp.ones(())
    metrics = {"val_loss": (value, one)}
    if info.residual is not None:
        metrics["solve_residual"] = info.residual, one
    return meta, meta_opt_state, metrics
