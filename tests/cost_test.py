"""What a step costs in floating-point operations, as XLA counts them: exact, unlike a clock."""

import jax
import numpy as np
import optax
import pytest

from saflex_jax import Batch, Streams
from saflex_jax.core.tree import identity
from saflex_jax.methods import erm, saflex
from saflex_jax.models import Classifier, SmallCNN, from_linen

BATCH, VAL, CLASSES = 64, 16, 10


def batch(size):
    rng = np.random.default_rng(size)
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, size)]
    inputs = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))


STREAMS = Streams(batch(BATCH), batch(VAL))
MODEL, TX = from_linen(Classifier(SmallCNN((16, 32)), CLASSES)), optax.sgd(0.1)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def step_flops(method):
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    return flops(lambda s, x: method.step(s, x, reduce=identity), state, STREAMS)


@pytest.fixture(scope="module")
def plain():
    """(operations of a plain step, of a forward pass on its batch)."""
    method = erm.make(MODEL, TX)
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    return step_flops(method), flops(method.predict, state, STREAMS.candidates.inputs)


def test_head_scores_cost_the_validation_forward_pass(plain):
    # The candidates' forward pass is the training step's own: XLA must see that they are the same.
    step, forward = plain
    found = step_flops(saflex.make(MODEL, TX, direction="identity"))
    assert found <= step + forward * VAL / BATCH + 0.03 * step


def test_full_scores_cost_the_validation_gradient_and_one_forward_product(plain):
    step, forward = plain
    found = step_flops(saflex.make(MODEL, TX, direction="identity", predicate=None))
    assert found <= step + step * VAL / BATCH + 2 * forward + 0.03 * step


def test_erm_does_not_compute_with_the_validation_samples(plain):
    method = erm.make(MODEL, TX)
    state = method.init(jax.random.key(0), STREAMS.candidates.inputs)
    without = flops(
        lambda s, x: method.step(s, Streams(x), reduce=identity), state, STREAMS.candidates
    )
    assert plain[0] == without
