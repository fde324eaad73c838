"""The vision transformer against the paper's equations, and what SAFLEX adds to a step of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build
from experiments.configs import digits
from saflex_jax import Batch, Streams
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import Classifier, ViT, from_linen
from saflex_jax.rules import Posterior, Refinement, Scoring

BATCH, VAL, CLASSES = 16, 4, 10
SMALL = ViT(patch=4, width=48, depth=2, heads=3, mlp_width=96)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def by_hand(params, images, patch, heads):
    """The network in f64 NumPy, a token and a head at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attention(x, p):
        out = p["out"]["bias"]
        for head in range(heads):
            q, k, v = (
                x @ p[n]["kernel"][:, head] + p[n]["bias"][head] for n in ("query", "key", "value")
            )
            share = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            out = out + share / share.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][head]
        return out

    features = []
    for image in images:
        rows, columns = (side // patch for side in image.shape[:2])
        kernel = params["patches"]["kernel"].reshape(-1, params["patches"]["kernel"].shape[-1])
        x = np.stack(
            [
                image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel() @ kernel
                for r in range(rows)
                for c in range(columns)
            ]
        )
        x = x + params["patches"]["bias"] + params["positions"]
        for number in range(sum(name.startswith("block_") for name in params)):
            p = params[f"block_{number}"]
            x = x + attention(norm(x, p["attention_norm"]), p["attention"])
            hidden = gelu(norm(x, p["mlp_norm"]) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"])
            x = x + hidden @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
        features.append(norm(x, params["norm"]).mean(0))
    return np.stack(features)


def test_it_computes_the_papers_equations_on_images_that_need_not_be_square():
    images = noise(3, 8, 12, 2)
    module = from_linen(SMALL)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)[0]
    params = jax.tree.map(lambda x: 0.3 * noise(*x.shape), shapes)  # none at zero or one
    features = jax.jit(module.logits)(params, {}, images)
    np.testing.assert_allclose(features, by_hand(params, images, 4, 3), atol=2e-4)


def test_computed_again_it_is_the_same_network():
    images = noise(2, 8, 8, 3)
    params = jax.jit(lambda: SMALL.init(jax.random.key(0), images, train=False))()
    again = SMALL.clone(remat=True)

    def gradient(network):
        of_sum = jax.grad(lambda p: jnp.sum(network.apply(p, images, train=True) ** 2))
        return jax.jit(of_sum).trace(params)

    kept, computed = gradient(SMALL), gradient(again)
    found = (jax.tree.leaves(g.lower().compile()(params)) for g in (kept, computed))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
    kept, computed = str(kept.jaxpr), str(computed.jaxpr)
    assert "remat" in computed and "remat" not in kept


def test_the_defaults_are_vit_s():
    shapes = jax.eval_shape(
        lambda x: ViT().init(jax.random.key(0), x, train=False), jnp.zeros((1, 32, 32, 3))
    )["params"]
    attention, mlp, norms = 4 * (384 * 384 + 384), 2 * 384 * 1536 + 1536 + 384, 2 * 2 * 384
    tokens = 4 * 4 * 3 * 384 + 384 + 64 * 384
    expected = tokens + 12 * (attention + mlp + norms) + 2 * 384
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected == 21_337_728


@pytest.mark.parametrize(
    ("module", "side", "message"),
    [
        (ViT(patch=5), 32, "inputs must .*multiples of patch = 5; given 32x32"),
        (ViT(width=100), 32, "width must be a multiple of 6 heads; given 100"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(module, side, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda x: module.init(jax.random.key(0), x, train=False), jnp.zeros((1, side, side, 3))
        )


@pytest.mark.parametrize("runner", ["jit", "pmap"])
def test_a_config_can_name_it(runner):
    config = digits.get_config()
    config.runner, config.train.steps = runner, 1
    del config["model"]
    config.model = {"name": "vit", "patch": 2, "width": 12, "depth": 1, "heads": 3, "mlp_width": 8}
    samples = Batch(noise(4, 8, 8, 1), np.eye(10, dtype=np.float32)[:4], np.ones(4, bool), None)
    method = build.make_method(config, Streams(samples))
    params = jax.eval_shape(method.init, jax.random.key(0), samples.inputs).params
    assert params["backbone"]["positions"].shape == (16, 12)
    assert params["head"]["kernel"].shape == (12, 10)


# --- the forward pass is shared between the scores and the training gradient


def batch(size):
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(size) % CLASSES]
    return Batch(
        noise(size, 16, 16, 3), labels, np.ones(size, bool), np.arange(size, dtype=np.int32)
    )


STREAMS = Streams(batch(BATCH), batch(VAL))
MODEL = from_linen(Classifier(SMALL.clone(depth=1), CLASSES))


def step_flops(rule):
    method = supervised.make(MODEL, optax.sgd(0.1), rule)
    state = jax.eval_shape(method.init, jax.random.key(0), STREAMS.candidates.inputs)
    step = jax.jit(lambda s, x: method.step(s, x, reduce=identity))
    return step.lower(state, STREAMS).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_scores_share_the_training_steps_forward_pass():
    # In plain steps: a forward pass is 1/3, a validation gradient VAL / BATCH, a JVP 2/3.
    plain = step_flops(None)
    for predicate, floor in [("head", 1 + VAL / BATCH / 3), ("", 1 + VAL / BATCH + 2 / 3)]:
        scored = step_flops(Refinement(Scoring("identity", predicate), Posterior()))
        assert plain < scored <= 1.02 * floor * plain
