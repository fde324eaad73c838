"""A researcher's own training loop, without SAFLEX and with it; the README shows these two."""

import difflib
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import saflex_jax


def plain_loop(apply_fn, params, tx, batches, x_val, y_val):
    @jax.jit
    def step(params, opt_state, x, y):
        def loss_fn(params):
            logits = apply_fn(params, x)
            return optax.softmax_cross_entropy(logits, y).mean()

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for x, y in batches:
        params, opt_state = step(params, opt_state, x, y)
    return params, optax.softmax_cross_entropy(apply_fn(params, x_val), y_val).mean()


def saflex_loop(apply_fn, params, tx, batches, x_val, y_val):
    @jax.jit
    def step(params, opt_state, x, y, x_val, y_val):
        scores = saflex_jax.score(apply_fn, params, x, x_val, y_val).scores
        targets = saflex_jax.solve_targets(scores, y)

        def loss_fn(params):
            logits = apply_fn(params, x)
            return saflex_jax.weighted_cross_entropy(logits, targets.labels, targets.weights).mean()

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for x, y in batches:
        params, opt_state = step(params, opt_state, x, y, x_val, y_val)
    return params, optax.softmax_cross_entropy(apply_fn(params, x_val), y_val).mean()


CLASSES, FEATURES, HIDDEN = 4, 8, 32
KEY = jax.random.key(0)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.relu(nn.Dense(HIDDEN)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.inside = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.inside(x)))


def linen():
    net = LinenNet()
    return net.apply, net.init(KEY, jnp.zeros((1, FEATURES)))


def nnx_split():
    graphdef, params = nnx.split(NnxNet(nnx.Rngs(0)))
    return lambda params, x: nnx.merge(graphdef, params)(x), params


def bare():
    first, second = jax.random.split(KEY)
    params = [
        0.3 * jax.random.normal(first, (FEATURES, HIDDEN)),
        0.2 * jax.random.normal(second, (HIDDEN, CLASSES)),
    ]
    return lambda params, x: jnp.maximum(x @ params[0], 0) @ params[1], params


def blobs(size, seed, *, wrong=0.0):
    """Gaussian blobs that a line separates to 99 %, with this share of wrong labels."""
    rng = np.random.default_rng(seed)
    centres = 2.5 * np.linalg.qr(np.random.default_rng(9).normal(size=(FEATURES, CLASSES)))[0].T
    labels = rng.integers(CLASSES, size=size)
    inputs = (centres[labels] + 0.6 * rng.normal(size=(size, FEATURES))).astype(np.float32)
    lies = rng.permutation(size) < wrong * size
    labels = np.where(lies, labels + rng.integers(1, CLASSES, size=size), labels) % CLASSES
    return inputs, np.eye(CLASSES, dtype=np.float32)[labels]


@pytest.mark.parametrize("network", [linen, nnx_split, bare])
@pytest.mark.parametrize(
    "tx", [optax.adam(1e-2), optax.sgd(0.2, momentum=0.9)], ids=["adam", "momentum"]
)
def test_saflex_loop_learns_what_wrong_labels_hide(network, tx):
    apply_fn, start = network()
    x, y = blobs(400, 0, wrong=0.4)
    rng = np.random.default_rng(3)
    batches = [(x[rows], y[rows]) for rows in (rng.permutation(400)[:100] for _ in range(120))]
    clean_x, clean_y = blobs(2000, 2)

    def clean_loss(loop):
        params, _ = loop(apply_fn, start, tx, batches, *blobs(40, 1))
        return float(optax.softmax_cross_entropy(apply_fn(params, clean_x), clean_y).mean())

    assert clean_loss(saflex_loop) < 0.5 * clean_loss(plain_loop)


def test_the_loops_differ_in_at_most_six_lines():
    plain, saflex = (
        inspect.getsource(f).replace(f.__name__, "loop").splitlines()
        for f in (plain_loop, saflex_loop)
    )
    matcher = difflib.SequenceMatcher(a=[*plain, ""], b=["import saflex_jax", *saflex, ""])
    changed = [
        line
        for tag, i, j, k, l in matcher.get_opcodes()
        if tag != "equal"
        for line in (matcher.b[k:l] if l - k >= j - i else matcher.a[i:j])
        if line.strip()
    ]
    assert 0 < len(changed) <= 6, changed


def test_the_readme_shows_these_loops():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)[1].splitlines()
    for signs, loop in (("- ", plain_loop), ("+ ", saflex_loop)):
        shown = [line[1:].strip() for line in block if line[:1] in signs and line[1:].strip()]
        shown = [line for line in shown if not line.startswith("import ")]
        source = [line.strip() for line in inspect.getsource(loop).splitlines() if line.strip()]
        begin = source.index(shown[0])
        assert source[begin : begin + len(shown)] == shown


@pytest.mark.parametrize("network", [linen, nnx_split])
def test_head_scores_need_no_change_of_the_model(network):
    # Differentiating the head alone is the full score with every other gradient set to zero.
    apply_fn, params = network()
    x, _ = blobs(12, 0)
    x_val, y_val = blobs(10, 1)

    @jax.jit
    def of_head(params):
        under_head = saflex_jax.under("head")
        return saflex_jax.score(apply_fn, params, x, x_val, y_val, predicate=under_head)

    @jax.jit
    def of_all(params):
        _, gradient = saflex_jax.validation_gradient(apply_fn, params, x_val, y_val)
        masked = jax.tree_util.tree_map_with_path(
            lambda path, g: g if "head" in jax.tree_util.keystr(path) else jnp.zeros_like(g),
            gradient,
        )
        return saflex_jax.label_scores(apply_fn, params, x, masked)[1]

    head, expected = of_head(params), of_all(params)
    np.testing.assert_allclose(head.scores, expected, atol=1e-6)
    assert float(jnp.abs(head.scores).max()) > 1e-3
