import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.train import evaluate, make_evaluator, probabilities
from saflex_jax.types import Method
from tests.train.setup_ import CLASSES, FEATURES, make_method, pool


def reference(kernel, data):
    """Accuracy and mean cross-entropy in double precision."""
    logits = data.inputs.astype(np.float64) @ np.asarray(kernel, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = logits.argmax(-1) == data.labels.argmax(-1)
    return {"accuracy": right.mean(), "loss": -(data.labels * log_probs).sum(-1).mean()}


@pytest.mark.parametrize("size, batch_size", [(23, 5), (20, 5), (3, 8), (1, 512), (23, 1)])
def test_exact_for_every_size_with_one_compilation(size, batch_size):
    traced = []
    method = make_method()

    def predict(state, inputs):
        traced.append(inputs.shape)
        return method.predict(state, inputs)

    data = pool(size, seed=5)
    evaluate = make_evaluator(
        method._replace(predict=predict), data.inputs, data.labels, batch_size=batch_size
    )
    for seed in (0, 1):
        state = method.init(jax.random.key(seed), data.inputs[:1])
        scores, expected = evaluate(state), reference(state.params["head"], data)
        assert scores["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
        assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert len(traced) == 1


def test_soft_labels():
    data = pool(17)
    soft = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 17).astype(np.float32)
    data, method = data._replace(labels=soft), make_method()
    state = method.init(jax.random.key(0), data.inputs[:1])
    scores = make_evaluator(method, data.inputs, data.labels, batch_size=4)(state)
    assert scores == pytest.approx(reference(state.params["head"], data), rel=1e-5)


def counted(method):
    """(The method, the shapes that its `predict` was traced with)."""
    traced = []

    def predict(state, inputs):
        traced.append(inputs.shape)
        return method.predict(state, inputs)

    return method._replace(predict=predict), traced


def test_sets_of_one_method_share_a_compilation():
    method, traced = counted(make_method())
    for seed in (0, 1):
        data = pool(9, seed=seed)
        state = method.init(jax.random.key(seed), data.inputs[:1])
        make_evaluator(method, data.inputs, data.labels, batch_size=4)(state)
    assert traced == [(4, FEATURES)]


def test_a_method_is_let_go_after_many_others():
    def other():
        return lambda state, inputs: inputs

    predict = other()
    make_evaluator(Method(None, None, predict), np.eye(2), np.eye(2))(None)
    probabilities(Method(None, None, predict), None, np.eye(2))
    held = weakref.ref(predict)
    del predict
    gc.collect()
    assert held() is not None  # another set of the method compiles nothing
    for compiled in (evaluate._compiled, evaluate._softmax):
        for _ in range(32):
            compiled(other())
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("size, batch_size", [(23, 5), (20, 5), (3, 8)])
def test_probabilities_of_every_row_with_one_compilation(size, batch_size):
    (method, traced), data = counted(make_method()), pool(size, seed=5)
    state = method.init(jax.random.key(0), data.inputs[:1])
    odds = np.exp(data.inputs.astype(np.float64) @ np.float64(state.params["head"]))
    found = probabilities(method, state, data.inputs, batch_size=batch_size)
    assert found.shape == (size, CLASSES)
    np.testing.assert_allclose(found, odds / odds.sum(1, keepdims=True), atol=1e-6)
    assert len(traced) == 1


def test_probabilities_of_logits_in_bfloat16_are_those_in_full():
    logits = np.float32([[3.0, 0.5, -1.0], [0.25, 0.0, 0.0]])
    method = Method(None, None, lambda state, inputs: inputs.astype(jnp.bfloat16))
    found = probabilities(method, None, logits)
    np.testing.assert_array_equal(found, np.asarray(jax.nn.softmax(logits)))


def test_8_bit_inputs_are_scored_as_floats():
    levels = np.random.default_rng(0).integers(0, 256, (9, FEATURES), dtype=np.uint8)
    data, method = pool(9)._replace(inputs=levels / np.float32(255)), make_method()
    state = method.init(jax.random.key(0), data.inputs[:1])
    scores = make_evaluator(method, levels, data.labels, batch_size=4)(state)
    assert scores == pytest.approx(reference(state.params["head"], data), rel=1e-5)


def test_labels_of_masked_rows_are_not_read():
    data, method, mask = pool(9), make_method(), np.arange(9) < 7
    state = method.init(jax.random.key(0), data.inputs[:1])
    unlabelled = np.where(mask[:, None], data.labels, 0)
    found = make_evaluator(method, data.inputs, unlabelled, mask=mask, batch_size=4)(state)
    alone = make_evaluator(method, data.inputs[:7], data.labels[:7], batch_size=4)(state)
    assert found == pytest.approx(alone, rel=1e-6)
    with pytest.raises(ValueError, match=r"labels must have rows .* row 0 is .* \(sum 2\)"):
        make_evaluator(method, data.inputs, 2 * unlabelled, mask=mask)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:0], y[:0]), "at least one sample to evaluate on; given 0"),
        (lambda x, y: (x, 2 * y), "labels must have rows .* sum to one"),
        (lambda x, y: (np.where(x > 0, np.inf, x), y), "inputs must be finite; given inf"),
        (lambda x, y: (x[:4], y), "inputs must have 9 rows, as labels have; given 4"),
    ],
)
def test_bad_input(change, message):
    data = pool(9)
    with pytest.raises(ValueError, match=message):
        make_evaluator(make_method(), *change(data.inputs, data.labels))
