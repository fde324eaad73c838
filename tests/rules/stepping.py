"""A rule over several steps on moving parameters, and the algebra that tests keep books by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.types import Streams
from tests import problems
from tests.problems import CLASSES, softmax

SIZE, MASKED, POOL = 6, 1, 10
REAL = SIZE - MASKED
PROBLEM = problems.problem("mlp", size=SIZE, masked=MASKED)
PRIOR_STRENGTH, TEMPERATURE, DECAY = 2.0, 0.8, 0.6


def streams_of(step):
    """New samples; the candidates are in turn the first and the last six of a pool of ten."""
    rng = np.random.default_rng(step)
    first = (POOL - SIZE) * (step % 2)
    candidates = problems.batch(rng, "mlp", SIZE, masked=MASKED, first=first, soft=True)
    return Streams(candidates, problems.batch(rng, "mlp", 4, masked=MASKED))


def params_of(step):
    """Parameters that move from step to step."""
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(
        lambda x: x + 0.5 * rng.normal(size=x.shape).astype(x.dtype), PROBLEM.params
    )


def right_streams_of(step, trusted):
    """`streams_of`, but trusted samples have the label that the network finds likeliest, half of
    the other candidates the unlikeliest."""
    candidates, val, _ = streams_of(step)

    def labels(batch, place):
        logits = np.asarray(PROBLEM.logits_fn(params_of(step), batch.inputs))
        return np.eye(CLASSES, dtype=np.float32)[np.argsort(logits)[:, place]]

    given = np.where(candidates.index[:, None] % 2, candidates.labels, labels(candidates, 0))
    rows = candidates.index >= POOL - trusted
    given = np.where(rows[:, None], labels(candidates, -1), given)
    return Streams(candidates._replace(labels=given), val._replace(labels=labels(val, -1)))


def runner(rule, *, logits_fn=PROBLEM.logits_fn, streams=streams_of):
    """(first arrays, (arrays, step) -> what `apply` returns), compiled once."""
    start = rule.init(PROBLEM.params)
    state = init_state(
        jax.random.key(0), PROBLEM.params, PROBLEM.model_state, optax.identity(), start
    )

    @jax.jit
    def apply(arrays, step, params, streams):
        moved = state._replace(step=step, params=params)
        return rule.apply(arrays, moved, logits_fn, streams, reduce=identity)

    return start, lambda arrays, step: apply(arrays, np.int32(step), params_of(step), streams(step))


@jax.jit
def _pieces(params, inputs, val_inputs, val_labels):
    def log_probs(params, inputs):
        return jax.nn.log_softmax(PROBLEM.logits_fn(params, inputs))

    def val_loss(params):
        return -jnp.mean(jnp.sum(val_labels * log_probs(params, val_inputs), 1))

    return jax.grad(val_loss)(params), jax.jacobian(log_probs)(params, inputs)


def pieces(step, streams=streams_of):
    """Gradient of the validation loss, and the Jacobian of the real candidates' log p."""
    candidates, val, _ = streams(step)
    real = candidates.inputs[candidates.mask], val.inputs[val.mask], val.labels[val.mask]
    return jax.device_get(_pieces(params_of(step), *real))


def scores_along(jacobian, gradient):
    """S_ik = -(d log p_ik / d theta) v with v = the gradient, f64[REAL, K]."""
    parts = zip(jax.tree.leaves(jacobian), jax.tree.leaves(gradient))
    return -sum(np.tensordot(j.astype(np.float64), g, np.ndim(g)) for j, g in parts)


def rms(scores):
    return np.sqrt(np.mean(np.square(scores, dtype=np.float64)))


def solved(scores, prior):
    """Weights and labels of the real rows."""
    scores = scores / rms(scores)
    labels = softmax((scores + PRIOR_STRENGTH * prior) / TEMPERATURE)
    keep = (labels * scores).sum(1) >= 0
    return keep / keep.mean(), labels


def assert_trained_on(found, weights, labels, tol=1e-5):
    np.testing.assert_allclose(found.weights[:REAL], weights, rtol=0, atol=tol)
    np.testing.assert_allclose(found.labels[:REAL], labels, rtol=0, atol=tol)
    np.testing.assert_array_equal(found.weights[REAL:], 0)
