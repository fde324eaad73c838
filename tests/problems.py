"""Small models, data and comparisons that several tests share."""

from __future__ import annotations

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saflex_jax.core.losses import masked_mean, weighted_cross_entropy
from saflex_jax.models import MLP, Classifier, SmallCNN, from_linen
from saflex_jax.types import Batch, Model, Streams

CLASSES = 5
SHAPES = {"mlp": (7,), "cnn": (5, 5, 2)}

# Every run tries the same examples, so that a failure on CI is a failure here.
PROPERTY = hypothesis.settings(derandomize=True, deadline=None, max_examples=40)


def assert_close(actual, expected, tol=1e-5):
    """Largest difference over all leaves, relative to the largest expected entry of the leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * max(np.abs(b).max(initial=0), 1e-30))


def log_softmax(logits):
    """NumPy reference, float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax(logits):
    """NumPy reference, float64."""
    return np.exp(log_softmax(logits))


def soft_labels(rng, size, classes=CLASSES):
    """f32[size, classes], uniform on the simplex."""
    return rng.dirichlet(np.ones(classes), size).astype(np.float32)


def hard_labels(rng, size, classes=CLASSES):
    """f32[size, classes], one-hot."""
    return np.eye(classes, dtype=np.float32)[rng.integers(classes, size=size)]


def batch(rng, name, size, *, masked=0, first=0, soft=False):
    """A Batch for the model `name`, its last `masked` rows being padding (of finite garbage)."""
    return Batch(
        inputs=rng.normal(size=(size, *SHAPES[name])).astype(np.float32),
        labels=(soft_labels if soft else hard_labels)(rng, size),
        mask=np.arange(size) < size - masked,
        index=np.arange(first, first + size, dtype=np.int32),
    )


class Problem(NamedTuple):
    """A network with candidates and validation samples."""

    model: Model
    params: dict
    model_state: dict
    streams: Streams

    def logits_fn(self, params, inputs):
        """Evaluation mode."""
        return self.model.logits(params, self.model_state, inputs)


def with_logits(model: Model, dtype: str) -> Model:
    """The same network with its logits cast."""

    def train(*args):
        logits, model_state = model.train(*args)
        return logits.astype(dtype), model_state

    return model._replace(train=train, logits=lambda *args: model.logits(*args).astype(dtype))


def _drawn(rng, path, shape):
    """Variables from NumPy: nothing to compile, and none is zero or one as after a common init."""
    if path[-1].key in ("scale", "var"):
        values = rng.uniform(0.5, 1.5, shape.shape)
    else:
        values = rng.normal(size=shape.shape) / np.sqrt(2 * np.prod(shape.shape[:-1]))
    return jnp.asarray(values, shape.dtype)


@functools.cache
def problem(name, *, size=6, val_size=4, masked=0, norm="group", seed=0) -> Problem:
    """An "mlp" or "cnn" with CLASSES outputs, by whose `init` it starts; not to be changed."""
    rng = np.random.default_rng(seed)
    backbone = {"mlp": lambda: MLP((8,)), "cnn": lambda: SmallCNN((4, 6), norm=norm)}[name]()
    model = from_linen(Classifier(backbone, CLASSES))
    streams = Streams(
        candidates=batch(rng, name, size, masked=masked, soft=True),
        val=batch(rng, name, val_size, masked=masked),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(seed), streams.candidates.inputs)
    variables = jax.tree_util.tree_map_with_path(functools.partial(_drawn, rng), shapes)
    return Problem(model._replace(init=lambda key, inputs: variables), *variables, streams)


def double(tree):
    """The floating-point leaves in double precision; call it under the fixture `x64`."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


class Convex:
    """Softmax regression with sample weights, soft labels and an L2 strength as meta-parameters.

    inner(theta, meta) = mean_i w_i CE(x_i theta, y_i) + exp(rho) / 2 |theta|^2, strongly convex;
    outer(theta, meta) = validation CE, plus terms in which meta appears directly.
    """

    size, val_size, features, classes = 4, 5, 3, 3

    def __init__(self, dtype=np.float64):
        rng = np.random.default_rng(3)

        def normal(*shape):
            return rng.normal(size=shape).astype(dtype)

        self.x, self.val_x = normal(self.size, self.features), normal(self.val_size, self.features)
        self.val_y = soft_labels(rng, self.val_size, self.classes).astype(dtype)
        self.params = {"kernel": normal(self.features, self.classes)}
        self.meta = {
            "weights": rng.uniform(0.5, 1.5, self.size).astype(dtype),
            "labels": soft_labels(rng, self.size, self.classes).astype(dtype),
            "log_l2": np.asarray(np.log(0.3), dtype),
        }

    def inner(self, params, meta):
        losses = weighted_cross_entropy(self.x @ params["kernel"], meta["labels"], meta["weights"])
        l2 = jnp.exp(meta["log_l2"]) / 2 * jnp.sum(params["kernel"] ** 2)
        return masked_mean(losses) + l2

    def outer(self, params, meta):
        fit = masked_mean(weighted_cross_entropy(self.val_x @ params["kernel"], self.val_y))
        return fit + 0.1 * jnp.sum(meta["weights"] ** 2) + 0.2 * jnp.sin(meta["log_l2"])

    def minimise(self, params, meta):
        """Newton's method from zero: the optimum to machine precision, whatever `params` hold."""
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def loss(p):
            return self.inner(unravel(p), meta)

        def step(_, p):
            return p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p))

        return unravel(jax.lax.fori_loop(0, 10, step, 0 * flat))


def primitives(jaxpr, *, inside=False, only_loops=False) -> list[str]:
    """Names of all primitives of a jaxpr and those within it; or only those within a loop."""
    found = []
    for eqn in jaxpr.eqns:
        if inside or not only_loops:
            found.append(eqn.primitive.name)
        within = inside or eqn.primitive.name in ("while", "scan")

        def is_jaxpr(x):
            return hasattr(x, "eqns") or hasattr(x, "jaxpr")

        for sub in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            sub = getattr(sub, "jaxpr", sub)  # closed or open
            if hasattr(sub, "eqns"):
                found += primitives(sub, inside=within, only_loops=only_loops)
    return found


def arrays(*shape, low=-5.0, high=5.0):
    """Hypothesis strategy: f32 arrays."""
    elements = st.floats(low, high, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=elements)


def simplices(size, classes):
    """Hypothesis strategy: f32[size, classes] with rows in the simplex, zeros among the entries."""

    def normalise(a):
        a[:, 0] += a.sum(1) < 0.1
        return (a / a.sum(1, keepdims=True)).astype(np.float32)

    elements = st.one_of(st.just(0.0), st.floats(0.015625, 1.0, width=32))
    return hnp.arrays(np.float32, (size, classes), elements=elements).map(normalise)
