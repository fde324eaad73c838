"""Ground truths of label scores, by brute force, and how scores are measured against them.

In all of them zero means "sample i is not trained on", positive "training on (x_i, k) lowers the
validation loss". Scores have the same zero (sum_k p_ik S_ik = 0: the label p_i changes nothing), so
nothing is centred; scales differ, and no measure sees them. Every truth shares

    L(theta; w, y) = 1/N sum_i w_i CE(f_theta(x_i), y_i) + l2/2 |theta|^2     (training)
    L_val(theta)   = mean_j CE(f_theta(x_j), y_j)                             (validation)

and these arguments: logits_fn, (params, inputs) -> f[B, K]; params, where scores are taken; train
of N rows, val of M rows, and a batch of B rows or their places i[B]; tx, an optimiser; l2.

Meant for double precision (`jax.enable_x64`): most are differences of nearly equal losses.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy import stats

from saflex_jax.core.curvature import dot
from saflex_jax.core.hypergrad import unrolled_argmin
from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.types import Batch, LogitsFn, Params, PyTree

# (params, (weights f[N] or None, one each, labels f[N, K])) -> f[]
TrainingLoss = Callable[[Params, tuple[jax.Array | None, jax.Array]], jax.Array]
# (weights f[N], labels f[N, K]) -> params
Retrain = Callable[[jax.Array, jax.Array], Params]


def training_loss(logits_fn: LogitsFn, inputs: PyTree, *, l2: float = 0.0) -> TrainingLoss:
    """L(theta; w, y) of these inputs."""

    def loss(params, meta):
        weights, labels = meta
        losses = weighted_cross_entropy(logits_fn(params, inputs), labels, weights)
        return masked_mean(losses) + l2 / 2 * dot(params, params)

    return loss


def validation_loss(logits_fn: LogitsFn, val: Batch) -> Callable[[Params], jax.Array]:
    """L_val."""
    return lambda params: masked_mean(
        weighted_cross_entropy(logits_fn(params, val.inputs), val.labels)
    )


def exact_change(
    logits_fn: LogitsFn, params: Params, opt_state: PyTree, batch: Batch, val: Batch, *,
    tx: optax.GradientTransformation, l2: float = 0.0,
) -> jax.Array:  # fmt: skip
    """What one optimiser step on (x_i, k) does to the validation loss, taken and measured.

        T_ik = L_val(step with w_i = 0) - L_val(step with w_i = 1, y_i = k)

    the other rows of the batch having weight one and their prior labels in both, and momentum and
    moments being those of `opt_state`. f[B, K], nats.
    """
    loss, val_loss = training_loss(logits_fn, batch.inputs, l2=l2), validation_loss(logits_fn, val)
    (size, classes), labels = batch.labels.shape, jnp.asarray(batch.labels)
    ones = jnp.ones(size)

    def after(weights, labels):
        grads = jax.grad(loss)(params, (weights, labels))
        updates, _ = tx.update(grads, opt_state, params)
        return val_loss(optax.apply_updates(params, updates))

    def with_label(pair):
        i, k = pair
        return after(ones, labels.at[i].set(jax.nn.one_hot(k, classes)))

    without = jax.lax.map(lambda i: after(ones.at[i].set(0.0), labels), jnp.arange(size))
    taken = jax.lax.map(with_label, jnp.divmod(jnp.arange(size * classes), classes))
    return without[:, None] - taken.reshape(size, classes)


def curvature_matrix(
    logits_fn: LogitsFn, params: Params, inputs: PyTree, *, damping: float = 0.0
) -> jax.Array:
    """The damped Gauss-Newton matrix of the training loss, dense, in the order of `ravel_pytree`.

        H = 1/N sum_i J_i^T (diag p_i - p_i p_i^T) J_i + damping I ,   J_i = d logits_i / d theta

    With l2 as damping and linear logits it is the Hessian.
    """
    flat, unravel = ravel_pytree(params)

    def logits(flat, x):
        return logits_fn(unravel(flat), jax.tree.map(lambda a: a[None], x))[0]

    jacobians = jax.lax.map(lambda x: jax.jacrev(logits)(flat, x), inputs)  # [N, K, P]
    probs = jax.nn.softmax(logits_fn(params, inputs))
    centred = jacobians - jnp.einsum("nk,nkp->np", probs, jacobians)[:, None]
    factor = (jnp.sqrt(probs)[..., None] * centred).reshape(-1, len(flat))
    return factor.T @ factor / len(probs) + damping * jnp.eye(len(flat))


def implicit(
    logits_fn: LogitsFn, params: Params, train_inputs: PyTree, inputs: PyTree, val: Batch, *,
    damping: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The implicit-function hypergradient of soft labels, and its system's relative residual.

        T_ik = -N dL_val / dy_ik = <H^-1 grad L_val, grad CE(f(x_i), k)>

    with `curvature_matrix` of the whole training set as H, solved by Cholesky. At the optimum of a
    model with linear logits, and with l2 as damping, it is the exact hypergradient.

    Source: Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017.
    """
    gradient, unravel = ravel_pytree(jax.grad(validation_loss(logits_fn, val))(params))
    matrix = curvature_matrix(logits_fn, params, train_inputs, damping=damping)
    direction = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), gradient)
    residual = jnp.linalg.norm(matrix @ direction - gradient) / jnp.linalg.norm(gradient)

    def losses(params):  # CE(f(x_i), k)
        return -jax.nn.log_softmax(logits_fn(params, inputs))

    return jax.jvp(losses, (params,), (unravel(direction),))[1], residual


def unrolled(
    logits_fn: LogitsFn, params: Params, train: Batch, val: Batch, rows: jax.Array, *,
    tx: optax.GradientTransformation, steps: int, l2: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Soft labels differentiated through optimiser steps on the whole training set, f[B, K].

    T_ik = -dL_val(theta_steps) / dy_ik ,   theta_0 = params
    """
    loss = training_loss(logits_fn, train.inputs, l2=l2)
    weights = jnp.ones(len(train.labels))

    def outer(labels):
        there = unrolled_argmin(loss, params, (weights, labels), tx=tx, steps=steps)
        return validation_loss(logits_fn, val)(there)

    return -jax.grad(outer)(train.labels)[rows]


def some_steps(
    loss: TrainingLoss, params: Params, *, tx: optax.GradientTransformation, steps: int
) -> Retrain:
    """Retraining by the same deterministic steps from the same parameters."""

    @jax.jit
    def step(params, opt_state, meta):
        updates, opt_state = tx.update(jax.grad(loss)(params, meta), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def retrain(*meta):
        state = params, tx.init(params)
        for _ in range(steps):  # on a CPU convolutions are several times slower in compiled loops
            state = step(*state, meta)
        return state[0]

    return retrain


def to_optimum(loss: TrainingLoss, params: Params, *, steps: int = 20) -> Retrain:
    """Retraining of a strictly convex loss to its optimum, by Newton's method from `params`.

    A step is halved until it does not raise the loss, so that any start will do.
    """
    start, unravel = ravel_pytree(params)

    def retrain(weights, labels):
        def flat_loss(flat):
            return loss(unravel(flat), (weights, labels))

        def step(_, flat):
            move = jnp.linalg.solve(jax.hessian(flat_loss)(flat), jax.grad(flat_loss)(flat))
            lengths = 0.5 ** jnp.arange(10.0)
            losses = jax.vmap(lambda length: flat_loss(flat - length * move))(lengths)
            return flat - lengths[jnp.argmax(losses <= flat_loss(flat))] * move

        return unravel(jax.lax.fori_loop(0, steps, step, start))

    return jax.jit(retrain)


def leave_one_out(
    retrain: Retrain, val_loss: Callable[[Params], jax.Array], labels: jax.Array, rows: np.ndarray
) -> jax.Array:
    """What retraining without sample i does to the validation loss, f[B], nats.

        T_i = L_val(theta(w_i = 0)) - L_val(theta(w = 1))

    the utility of its prior label, to be compared with <q_i, S_i>.
    """
    ones = jnp.ones(len(labels))
    without = [val_loss(retrain(ones.at[i].set(0.0), labels)) for i in rows]
    return jnp.stack(without) - val_loss(retrain(ones, labels))


# --- measures: scores against a truth, neither's scale counts


def agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How alike two arrays f[B, K], or f[B], are.

    Returns:
      cosine: of all entries; 0 by chance.
      sign: share of entries with one sign; 1/2 by chance.
      rank: Spearman's correlation of all entries; 0 by chance.
      best: share of samples whose largest entry is the same label (not for f[B]); 1/K by chance.
    """
    a, b = (np.asarray(x, np.float64) for x in (scores, truth))
    measures = {
        "cosine": float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b))),
        "sign": float(np.mean(np.sign(a) == np.sign(b))),
        "rank": float(stats.spearmanr(a.ravel(), b.ravel()).statistic),
    }
    if a.ndim == 2:
        measures["best"] = float(np.mean(a.argmax(1) == b.argmax(1)))
    return measures


def utility(scores: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """<q_i, S_i>, f[B]: the prior label's share of f[B, K]."""
    return np.sum(np.asarray(prior, np.float64) * np.asarray(scores, np.float64), axis=1)
