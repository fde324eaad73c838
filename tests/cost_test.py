"""What a step costs in floating-point operations, as XLA counts them: exact, unlike a clock."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import Classifier, SmallCNN, from_linen
from saflex_jax.rules import Posterior, Refinement, Schedule, Scoring, VisitMean

BATCH, VAL, CLASSES = 64, 16, 10


def batch(size):
    rng = np.random.default_rng(size)
    labels = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, size)]
    inputs = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))


STREAMS = Streams(batch(BATCH), batch(VAL))
MODEL, TX = from_linen(Classifier(SmallCNN((16, 32)), CLASSES)), optax.sgd(0.1)


def saflex(scoring, rule=Posterior(), schedule=Schedule()):
    return supervised.make(MODEL, TX, Refinement(scoring, rule, schedule))


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def state_of(method):
    """Its shapes: nothing here is computed."""
    return jax.eval_shape(method.init, jax.random.key(0), STREAMS.candidates.inputs)


def step_flops(method, number=None):
    """Of the step with this number, known to the compiler; None: of the dearest branches."""
    state = state_of(method)

    def step(state, streams):
        known = state if number is None else state._replace(step=jnp.asarray(number))
        return method.step(known, streams, reduce=identity)

    return flops(step, state, STREAMS)


@pytest.fixture(scope="module")
def plain():
    """(operations of a plain step, of a forward pass on its batch)."""
    method = supervised.make(MODEL, TX)
    state = state_of(method)
    return step_flops(method), flops(method.predict, state, STREAMS.candidates.inputs)


def test_head_scores_cost_the_validation_forward_pass(plain):
    # The candidates' forward pass is the training step's own: XLA must see that they are the same.
    step, forward = plain
    found = step_flops(saflex(Scoring("identity")))
    assert found <= step + forward * VAL / BATCH + 0.03 * step


def test_full_scores_cost_the_validation_gradient_and_one_forward_product(plain):
    step, forward = plain
    found = step_flops(saflex(Scoring("identity", predicate="")))
    assert found <= step + step * VAL / BATCH + 2 * forward + 0.03 * step


def test_scores_that_nothing_reads_cost_nothing(plain):
    step, forward = plain
    found = step_flops(saflex(Scoring("identity", predicate=""), Posterior(lookahead=0.0)))
    assert found <= step + forward * VAL / BATCH + 0.03 * step  # the loss on them is logged


def test_a_validation_gradient_is_computed_in_its_turn_only(plain):
    method = saflex(Scoring("identity", val_every=4), schedule=Schedule(start=2))
    step, forward = plain
    cost = [step_flops(method, number) for number in range(1, 8)]
    fresh = step + forward * VAL / BATCH
    expected = np.array([step, fresh, step, step, step, fresh, step])
    np.testing.assert_array_less(np.abs(cost - expected), 0.03 * step)
    assert max(cost) > min(cost) + 0.9 * forward * VAL / BATCH


@pytest.mark.parametrize("mode, passes", [("jvp", 2), ("finite_difference", 1)])
def test_scores_in_a_branch_share_the_candidates_forward_pass(plain, mode, passes):
    rule = Posterior(RunInfo(BATCH, CLASSES), memory=VisitMean(0.9))
    method = saflex(Scoring("identity", predicate="", mode=mode), rule, Schedule(every=2))
    step, forward = plain
    found = step_flops(method)
    assert found <= step + step * VAL / BATCH + passes * forward + 0.03 * step
    assert step_flops(method, 1) <= 1.01 * step


def test_plain_training_does_not_compute_with_the_validation_samples(plain):
    method = supervised.make(MODEL, TX)
    state = state_of(method)
    without = flops(
        lambda s, x: method.step(s, Streams(x), reduce=identity), state, STREAMS.candidates
    )
    assert plain[0] == without
