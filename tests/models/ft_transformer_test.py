"""The FT-Transformer against the paper's equations, and what SAFLEX adds to a step of it."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build
from experiments.configs import wdbc
from saflex_jax import Batch, Streams
from saflex_jax.core.tree import identity
from saflex_jax.data import Column
from saflex_jax.methods import supervised
from saflex_jax.models import Classifier, FTTransformer, from_linen
from saflex_jax.models.ft_transformer import Tokens
from saflex_jax.rules import Posterior, Refinement, Scoring

KEY = jax.random.key(0)
HEADS, SIZES = 3, (4, 2)
SMALL = FTTransformer(width=12, depth=1, heads=HEADS, mlp_width=10)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CODES = np.array([[2, 0], [-1, 1], [0, -1], [4, 2], [3, 1]], np.int32)  # some out of range
TABLE = {"numeric": noise(5, 3), "categorical": CODES}
CASES = {  # of columns: blocks, categories, inputs
    "both": (2, SIZES, TABLE),
    "numbers": (1, (), TABLE["numeric"]),
    "codes": (1, SIZES, {"numeric": noise(5, 0), "categorical": CODES}),
}


@functools.cache
def drawn(columns):
    """Parameters, none of them at zero or one, and the function of them and inputs."""
    depth, categories, inputs = CASES[columns]
    module = SMALL.clone(depth=depth, categories=categories)
    shapes = jax.eval_shape(partial(module.init, train=False), KEY, inputs)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    params = [0.5 * noise(*x.shape, seed=n) for n, x in enumerate(leaves)]
    apply = jax.jit(partial(module.apply, train=False))

    def features(params, inputs):
        return np.asarray(apply({"params": params}, inputs))

    return jax.tree.unflatten(structure, params), features


def norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def attention(tokens, p):
    def part(name):
        return np.einsum("td,dhf->htf", tokens, p[name]["kernel"])

    def biased(name):
        return part(name) + p[name]["bias"][:, None]

    out = np.zeros_like(tokens) + p["out"]["bias"]
    for head, (q, k, v) in enumerate(zip(*map(biased, ("query", "key", "value")))):
        for i in range(len(tokens)):
            share = np.exp(k @ q[i] / np.sqrt(len(q[i])))
            out[i] += share / share.sum() @ v @ p["out"]["kernel"][head]
    return out


def perceptron(tokens, p):
    both = tokens @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
    half = both.shape[1] // 2
    hidden = both[:, :half] * np.maximum(both[:, half:], 0)
    return hidden @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]


def by_hand(params, numeric, codes):
    """The features in f64 NumPy, a row and a column at a time, all tokens to the end."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    read, depth = params["tokens"], len(params) - 2
    features = []
    for numbers, row_codes in zip(numeric, codes):
        columns = [x * read["numeric"][j] for j, x in enumerate(numbers)]
        for n, code in enumerate(row_codes):
            known = 0 <= code < SIZES[n]
            columns.append(read[f"category_{n}"][code] if known else np.zeros(12))
        x = np.stack([read["cls"][0], *(c + b for c, b in zip(columns, read["bias"]))])
        for layer in range(depth):
            p = params[f"block_{layer}"]
            x = x + attention(norm(x, p["attention_norm"]) if layer else x, p["attention"])
            x = x + perceptron(norm(x, p["mlp_norm"]), p)
        features.append(np.maximum(norm(x[0], params["norm"]), 0))
    return np.stack(features)


@pytest.mark.parametrize("columns", CASES)
def test_it_computes_the_papers_equations(columns):
    _, _, inputs = CASES[columns]
    table = inputs if isinstance(inputs, dict) else {"numeric": inputs, "categorical": CODES[:, :0]}
    params, features = drawn(columns)
    expected = by_hand(params, table["numeric"], table["categorical"])
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(features(params, inputs), expected, atol=1e-4)


def test_columns_have_no_order_and_rows_know_nothing_of_each_other():
    params, features = drawn("both")
    before = features(params, TABLE)
    order = np.array([2, 0, 1])
    moved = {**TABLE, "numeric": TABLE["numeric"][:, order]}
    tokens = params["tokens"]
    bias = np.concatenate([tokens["bias"][order], tokens["bias"][3:]])
    tokens = {**tokens, "numeric": tokens["numeric"][order], "bias": bias}
    np.testing.assert_allclose(features({**params, "tokens": tokens}, moved), before, atol=1e-5)
    assert np.abs(features(params, moved) - before).max() > 0.1
    changed = {name: np.concatenate([x[:1], x[:0:-1]]) for name, x in TABLE.items()}
    np.testing.assert_allclose(features(params, changed)[0], before[0], atol=1e-5)


def size(module, columns):
    inputs = jnp.zeros((1, columns))
    shapes = jax.eval_shape(partial(module.init, train=False), KEY, inputs)["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_the_defaults_have_the_papers_size():
    # Its table of default sizes: 929 K with 100 numeric columns and one output. int(192 * 1.3333)
    # in its configuration is 255, where 4/3 of 192 is 256.
    assert size(Classifier(FTTransformer(mlp_width=255), 1), 100) == 928_507
    tokens, attention, norms = 192 * (100 + 100 + 1), 4 * (192 * 192 + 192), 2 * 192
    mlp = 192 * 512 + 512 + 256 * 192 + 192
    assert size(FTTransformer(), 100) == tokens + 3 * (attention + mlp) + (2 * 3 - 1 + 1) * norms


def test_tokens_start_uniform():
    tokens = Tokens(width=100, categories=(50,))
    params = jax.jit(tokens.init)(KEY, noise(1, 60), CODES[:1, :1])["params"]
    shapes = {"numeric": (60, 100), "category_0": (50, 100), "bias": (61, 100), "cls": (1, 100)}
    assert {name: x.shape for name, x in params.items()} == shapes
    for x in (np.ravel(x) for x in params.values()):
        # Quantiles of uniform(-.1, .1) to 5 standard deviations of the median, which has the most.
        assert np.abs(x).max() <= 0.1
        expected = np.linspace(-0.1, 0.1, x.size)
        np.testing.assert_allclose(np.sort(x), expected, atol=5 * 0.1 / np.sqrt(x.size))
    assert len({float(x[0, 0]) for x in params.values()}) == 4  # each drawn for itself


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({"heads": 5}, TABLE["numeric"], "width must be a multiple of 5 heads; given 12"),
        ({"heads": 0}, TABLE["numeric"], "heads must be a whole number >= 1; given 0"),
        ({"depth": 0}, TABLE["numeric"], "depth must be a whole number >= 1; given 0"),
        ({}, noise(5, 0), "inputs must have at least one column; given 0"),
        ({}, noise(5, 4, 4, 1), r"inputs must be a table \[B, D\]; given shape \[5, 4, 4, 1\]"),
        ({}, TABLE, "categories must name 2 columns; given 0"),
        ({"categories": (4,)}, TABLE, "categories must name 2 columns; given 1"),
        ({"categories": SIZES}, TABLE["numeric"], "categories must name 0 columns; given 2"),
    ],
)
def test_bad_input_is_refused(changes, inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(SMALL.clone(**changes).init, train=False), KEY, inputs)


@pytest.mark.parametrize("runner", ["jit", "pmap"])
def test_a_config_can_name_it(runner):
    config = wdbc.get_config()
    config.runner = runner
    del config["model"]
    config.model = {"name": "ft_transformer", "width": 12, "depth": 2, "heads": 3, "mlp_width": 8}
    samples = Batch(TABLE, np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0]], np.ones(5, bool), None)
    columns = [Column(n, None) for n in "abc"] + [
        Column("d", tuple("pqrs")),
        Column("e", ("x", "y")),
    ]
    method = build.make_method(config, Streams(samples), tuple(columns))
    params = jax.eval_shape(method.init, KEY, samples.inputs).params
    assert params["backbone"]["tokens"]["category_0"].shape == (4, 12)
    assert params["backbone"]["tokens"]["bias"].shape == (5, 12)
    assert params["head"]["kernel"].shape == (12, 2)


# --- what a step costs

BATCH, VAL, CLASSES = 16, 4, 10


def batch(rows):
    inputs = {"numeric": noise(rows, 12), "categorical": np.zeros((rows, 1), np.int32)}
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(rows) % CLASSES]
    return Batch(inputs, labels, np.ones(rows, bool), np.arange(rows, dtype=np.int32))


STREAMS = Streams(batch(BATCH), batch(VAL))


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scores_share_the_training_steps_forward_pass(depth):
    backbone = FTTransformer(width=48, depth=depth, heads=3, mlp_width=64, categories=(3,))
    model = from_linen(Classifier(backbone, CLASSES))

    def step_flops(rule):
        method = supervised.make(model, optax.sgd(0.1), rule)
        state = jax.eval_shape(method.init, KEY, STREAMS.candidates.inputs)
        return flops(lambda s, x: method.step(s, x, reduce=identity), state, STREAMS)

    # In plain steps: a forward pass is 1/3, so the head's validation gradient VAL / BATCH / 3.
    plain, scored = step_flops(None), step_flops(Refinement(Scoring("identity"), Posterior()))
    assert plain < scored <= 1.02 * (1 + VAL / BATCH / 3) * plain


def test_the_last_block_computes_the_class_token_alone():
    # In multiply-adds of width^2 a token: keys and values 2, queries and output 2, perceptron 4.
    def forward(depth):
        module = FTTransformer(width=48, depth=depth, heads=3, mlp_width=64)
        inputs = jax.ShapeDtypeStruct((BATCH, 12), jnp.float32)
        variables = jax.eval_shape(partial(module.init, train=False), KEY, inputs)
        return flops(partial(module.apply, train=False), variables, inputs)

    one, two = forward(1), forward(2)
    np.testing.assert_allclose(one / (two - one), (13 * 2 + 6) / (13 * 8), rtol=0.1)
