"""Softmax regression on targets that are constants, by hand and under a runner; selection too."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import optax

from saflex_jax import Batch, Model, Streams, TrainState
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import from_function
from saflex_jax.parallel import jit_runner, pmap_runner
from tests import cost_test
from tests.problems import log_softmax, soft_labels, softmax

ROWS, MASKED, FEATURES, CLASSES, LR, NOW = 24, 5, 3, 4, 0.5, 5
GAIN = 1.7  # of the logits in evaluation mode
# Runner, devices, shares of the rows that are ranked by themselves.
RUNNERS = {"jit 1": (jit_runner, 1, 1), "jit 8": (jit_runner, 8, 1), "pmap 4": (pmap_runner, 4, 4)}


def candidates(size=ROWS, masked=MASKED, seed=0, labels=soft_labels):
    """Padding anywhere, of large numbers and with labels of its own."""
    rng = np.random.default_rng(seed)
    mask = np.ones(size, bool)
    mask[rng.choice(size, masked, replace=False)] = False
    inputs = rng.normal(size=(size, FEATURES)).astype(np.float32) * np.where(mask, 1, 30)[:, None]
    index = rng.permutation(size).astype(np.int32)
    return Batch(inputs.astype(np.float32), labels(rng, size, CLASSES), mask, index)


def logits_as_inputs(batch, seed=3):
    """Padding has no logits that are numbers."""
    logits = 2 * np.random.default_rng(seed).normal(size=batch.labels.shape).astype(np.float32)
    logits[~batch.mask] = np.nan
    return batch._replace(inputs=logits)


# --- targets ---------------------------------------------------------------------------------


def targets(rules, batch, step=NOW, reduce=identity):
    """Those of each rule for a network whose inputs are its logits."""
    return _targets(tuple(rules), reduce)(batch, np.int32(step))


@functools.cache
def _targets(rules, reduce):
    def logits_fn(params, inputs):
        return inputs

    @jax.jit
    def run(batch, step):
        state, streams = TrainState(step, None, None, None, None), Streams(batch)
        applied = [rule.apply((), state, logits_fn, streams, reduce=reduce) for rule in rules]
        assert all(arrays == () for _, arrays, _ in applied)
        return [of_batch for of_batch, _, _ in applied]

    return run


def picks(losses, mask, rate):
    """Rows of the smallest losses, the earlier of equal ones, by an exact rate."""
    rows = sorted(np.flatnonzero(mask), key=lambda i: (losses[i], i))
    return rows[: len(rows) - math.floor(rate * len(rows))]


def weights_of(logits, batch, rate, shares=1):
    """f64[B], where every share of the rows is ranked by itself."""
    losses = -np.sum(batch.labels * log_softmax(logits), 1)
    kept, size = np.zeros(len(losses)), len(losses) // shares
    for begin in range(0, len(losses), size):
        rows = slice(begin, begin + size)
        kept[begin + np.array(picks(losses[rows], batch.mask[rows], rate), int)] = 1
    return kept / kept[batch.mask].mean()


# --- a step ----------------------------------------------------------------------------------


def linear_init(key, inputs):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    kernel = rng.normal(size=(inputs.shape[1], CLASSES)).astype(np.float32)
    return {"kernel": kernel}, {"drawn": np.float32(0)}


def linear_train(params, model_state, inputs, key):
    return inputs @ params["kernel"], {"drawn": model_state["drawn"] + jax.random.uniform(key)}


# Training and evaluation mode differ, so that it shows which one a rule reads.
LINEAR, TX = (
    Model(linear_init, linear_train, lambda p, s, x: GAIN * (x @ p["kernel"])),
    optax.sgd(LR),
)


def start_state(method, step=NOW):
    state = method.init(jax.random.key(0), candidates().inputs)
    return state._replace(step=np.int32(step))


def step_under(runner, methods, states, batch):
    """Name -> (state without its key, metrics) after a step of each method, in one compilation."""
    make_runner, devices, _ = RUNNERS[runner]

    def step(states, streams, *, reduce):
        after = {
            name: method.step(states[name], streams, reduce=reduce)
            for name, method in methods.items()
        }
        states = {name: state for name, (state, _) in after.items()}
        return states, {name: metrics for name, (_, metrics) in after.items()}

    run = make_runner(step, devices=jax.devices()[:devices])
    states, metrics = run.step(run.put_state(states), run.put_batch(Streams(batch)))
    return {
        name: jax.device_get((states[name]._replace(key=()), metrics[name])) for name in methods
    }


def stepped(kernel, batch, labels, weights):
    """The kernel after gradient descent on targets that are constants, and the loss, f64."""
    x, labels, weights = (a[batch.mask] for a in (batch.inputs, labels, weights))
    logits = x.astype(np.float64) @ kernel
    pull = weights[:, None] * (softmax(logits) - labels)
    loss = -np.mean(weights * np.sum(labels * log_softmax(logits), 1))
    return {"kernel": kernel - LR * x.T @ pull / len(x)}, loss


def evaluated(kernel, batch):
    """Logits of evaluation mode, f64."""
    return GAIN * (np.asarray(batch.inputs, np.float64) @ np.asarray(kernel, np.float64))


# --- what selection costs, and what it is for -----------------------------------------------


def two_layers(hidden, classes):
    @jax.jit
    def init(key, inputs):
        first, second = jax.random.split(key)
        size = math.prod(inputs.shape[1:])
        drawn = jax.random.normal(first, (size, hidden)) / math.sqrt(size)
        return {"in": drawn, "out": jax.random.normal(second, (hidden, classes)) / hidden}

    def apply(params, inputs):
        return jax.nn.relu(inputs.reshape(len(inputs), -1) @ params["in"]) @ params["out"]

    return from_function(init, apply)


@functools.cache
def plain_flops():
    """Of a plain step of `two_layers(256, cost_test.CLASSES)`."""
    method = supervised.make(two_layers(256, cost_test.CLASSES), cost_test.TX)
    return cost_test.step_flops(method)


def assert_leaves_wrong_labels_out(method):
    """A method for `two_layers(16, 4)` that drops 40 % of the samples; 40 % of labels are wrong."""
    rng = np.random.default_rng(0)
    centres, truth = 2 * rng.normal(size=(4, 6)), rng.integers(4, size=160)
    given = np.where(np.arange(160) < 64, (truth + rng.integers(1, 4, 160)) % 4, truth)
    inputs = (centres[truth] + rng.normal(size=(160, 6))).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[given]
    streams = Streams(Batch(inputs, labels, np.ones(160, bool), np.arange(160, dtype=np.int32)))
    state = method.init(jax.random.key(0), inputs)
    step = jax.jit(method.step)
    for _ in range(100):
        state, _ = step(state, streams)
    kept = np.asarray(jax.jit(method.targets)(state, streams).weights > 0)
    assert kept.sum() == 96
    assert np.mean(np.arange(160)[kept] >= 64) > 0.9
