from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from saflex_jax import under
from saflex_jax._compat import enable_x64
from saflex_jax.core.tree import paths, select
from saflex_jax.models import (
    MLP,
    Classifier,
    FTTransformer,
    ResNet18,
    SmallCNN,
    from_function,
    from_linen,
    from_nnx,
)

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(1).normal(size=(6, 8, 8, 2)).astype(np.float32)
BACKBONES = {
    "mlp": partial(MLP, (5, 7)),
    "small_cnn": partial(SmallCNN, (7,)),
    "resnet": partial(ResNet18, "cifar", (1,), 7),
}


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.all(np.asarray(x == y))), a, b))


def drawn(model, inputs):
    """(params, model_state) from NumPy in the shapes that `init` gives: nothing to compile."""
    rng, shapes = np.random.default_rng(2), jax.eval_shape(model.init, KEY, inputs)

    def draw(path, x):
        values = rng.normal(size=x.shape) / 2
        return np.float32(np.abs(values) + 0.5 if path[-1].key in ("var", "scale") else values)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# --- bundled networks


@pytest.mark.parametrize("name", BACKBONES)
def test_classifier_is_backbone_and_head(name):
    model = from_linen(Classifier(BACKBONES[name](), 3))
    params, _ = jax.eval_shape(model.init, KEY, IMAGES)
    assert set(params) == {"backbone", "head"}
    assert [p for p in paths(params) if not p.startswith("backbone/")] == [
        "head/bias",
        "head/kernel",
    ]
    head = select(params, under("head"))
    assert [x.shape for x in jax.tree.leaves(head)] == [(3,), (7, 3)]  # bias, kernel


def resnet18_size(stem_size, channels, classes, width=64):
    # He et al., table 1: a convolution has k^2 * in * out weights and no bias; each is followed by
    # a normalisation with scale and bias; the first block of a stage that widens has a projection.
    def conv(size, inside, outside):
        return size**2 * inside * outside + 2 * outside

    total, inside = conv(stem_size, channels, width), width
    for outside in (width, 2 * width, 4 * width, 8 * width):
        total += conv(3, inside, outside) + 3 * conv(3, outside, outside)
        total += conv(1, inside, outside) if inside != outside else 0
        inside = outside
    return total + inside * classes + classes


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("stem", "pixels", "classes", "size", "last"),
    [
        ("cifar", 32, 10, 11_173_962, 4),
        ("imagenet", 224, 1000, 11_689_512, 7),  # torchvision's number
    ],
)
def test_resnet18_has_the_known_size(stem, pixels, classes, size, last, norm):
    module = Classifier(ResNet18(stem, norm=norm), classes)
    images = jnp.zeros((2, pixels, pixels, 3))

    @jax.eval_shape
    def shapes():
        variables = module.init(KEY, images, train=False)
        logits, inside = module.apply(
            variables, images, train=False, capture_intermediates=True, mutable="intermediates"
        )
        return variables["params"], logits, inside

    params, logits, inside = shapes
    assert sum(x.size for x in jax.tree.leaves(params)) == size
    assert resnet18_size(3 if stem == "cifar" else 7, 3, classes) == size
    assert logits.shape == (2, classes)
    assert min(x.shape[1] for x in jax.tree.leaves(inside) if x.ndim == 4) == last


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", BACKBONES)
def test_only_batch_norm_in_training_mode_mixes_rows(name, norm):
    model = from_linen(Classifier(BACKBONES[name](norm=norm), 3))
    params, model_state = drawn(model, IMAGES)
    assert bool(model_state) == (norm == "batch")  # GroupNorm keeps nothing

    @jax.jit
    def both(images):
        trained, _ = model.train(params, model_state, images, KEY)
        return model.logits(params, model_state, images), trained

    changed = IMAGES.copy()
    changed[0] *= -3
    evaluated, trained = (
        np.abs(np.asarray(a) - b)[1:].max() > 1e-4 for a, b in zip(both(IMAGES), both(changed))
    )
    assert not evaluated
    assert trained == (norm == "batch")


def test_batch_norm_updates_its_running_statistics_in_training_mode_only():
    model = from_linen(Classifier(MLP((4,), norm="batch"), 3))
    x = IMAGES.reshape(6, -1)
    params, old = drawn(model, x)

    @jax.jit
    def run(params, old, x):
        _, new = model.train(params, old, x, KEY)
        return new, model.logits(params, old, x), model.logits(params, new, x)

    new, before, after = run(params, old, x)
    dense = params["backbone"]["Dense_0"]
    hidden = np.float64(x) @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    (old,), (new,) = (
        list(*(norm.values() for norm in state["batch_stats"]["backbone"].values()))
        for state in (old, new)
    )
    for name, of_batch in (("mean", hidden.mean(0)), ("var", hidden.var(0))):
        np.testing.assert_allclose(new[name], 0.9 * old[name] + 0.1 * of_batch, atol=1e-5)
    # Evaluation reads them: the same inputs under other statistics give other logits.
    assert np.abs(np.asarray(before) - after).max() > 1e-3


def test_mlp_of_a_table_is_the_formula():
    # Codes enter one-hot, each column by its own number of categories; a missing one as zeros.
    table = {"numeric": np.float32(TABLE), "categorical": np.array([2, 0, -1, 1, 2, 0])[:, None]}
    table["categorical"] = np.hstack([table["categorical"], np.array([[1, 0, 1, -1, 0, 1]]).T])
    module = MLP((5, 7), categories=(3, 2))
    params, _ = drawn(from_linen(module), table)
    coded = [table["categorical"][:, [n]] == np.arange(size) for n, size in enumerate((3, 2))]
    expected = np.hstack([table["numeric"], *coded]).astype(np.float64)
    for layer in ("Dense_0", "Dense_1"):
        kernel, bias = (np.float64(params[layer][name]) for name in ("kernel", "bias"))
        expected = np.maximum(expected @ kernel + bias, 0)
    features = jax.jit(partial(module.apply, train=False))({"params": params}, table)
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("categories", [(3,), (3, 2, 2)])
def test_mlp_needs_the_categories_of_every_column(categories):
    table = {"numeric": TABLE, "categorical": np.zeros((6, 2), np.int32)}
    with pytest.raises(ValueError, match=f"name 2 columns; given {len(categories)}"):
        MLP(categories=categories).init(KEY, table, train=False)


def test_batch_norm_of_an_mlp_is_that_of_all_shares_by_its_axis_name():
    whole, shared = (MLP((4,), norm="batch", axis_name=axis) for axis in (None, "data"))

    @jax.jit
    def both(x):
        variables = whole.init(KEY, x, train=False)

        def apply(module, x):
            return module.apply(variables, x, train=True, mutable="batch_stats")

        shares = jax.vmap(partial(apply, shared), axis_name="data")(x.reshape(2, 3, -1))
        return apply(whole, x)[0], shares[0].reshape(6, -1)

    np.testing.assert_allclose(*both(TABLE), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SmallCNN(norm="bacth"), r"norm must be one of .*'bacth'; did you mean 'batch'\?"),
        (MLP(norm="layer"), r"norm must be one of \['batch', 'frozen', 'group'.*'layer'"),
        (ResNet18(stem="cifar10"), r"stem must be one of .*; did you mean 'cifar'\?"),
    ],
)
def test_unknown_options_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(module.init, train=False), KEY, IMAGES)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("train", [False, True])
def test_classifier_mixes_where_manifold_mixup_says(layer, train):
    module = Classifier(SmallCNN((4, 7), norm="batch"), 3)
    model = from_linen(module)
    params, model_state = drawn(model, IMAGES)
    variables = {"params": params, **model_state}
    share = np.array([0.7, 1.0, 0.5, 0.9, 0.6, 0.8], np.float32)
    partner = np.array([3, 1, 0, 5, 2, 4])
    mix = {
        "inputs": IMAGES,
        "partner": partner,
        "share": share,
        "layer": np.full(6, layer, np.int32),
    }

    def mixed(h):
        s = share.reshape(-1, *[1] * (h.ndim - 1))
        return s * np.asarray(h) + (1 - s) * np.asarray(h)[partner]

    @jax.jit
    def backbone(x):
        variables_ = {c: v["backbone"] for c, v in variables.items()}
        out = module.backbone.apply(
            variables_, x, train=train, mutable=["batch_stats"] if train else False
        )
        return out[0] if train else out

    def features(x):
        return np.asarray(backbone(np.float32(x)))

    h = features(mixed(IMAGES)) if layer == 0 else mixed(features(IMAGES))
    expected = h @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])

    @jax.jit
    def logits(inputs):
        if train:
            return model.train(params, model_state, inputs, KEY)[0]
        return model.logits(params, model_state, inputs)

    np.testing.assert_allclose(logits(mix), expected, atol=1e-5)
    alone = {**mix, "share": np.ones(6, np.float32)}
    np.testing.assert_allclose(logits(alone), logits(IMAGES), atol=1e-5)
    if not train:  # a mixed row depends on its partner and on nobody else
        changed = IMAGES.copy()
        changed[3] *= -3
        moved = np.abs(np.asarray(logits({**mix, "inputs": changed})) - logits(mix)).max(1) > 1e-4
        np.testing.assert_array_equal(moved, (np.arange(6) == 3) | (partner == 3))


FLAT = np.zeros((2, 3), np.float32)
MIXED = {"numeric": FLAT, "categorical": np.zeros((2, 1), np.int32)}


@pytest.mark.parametrize(
    ("network", "inputs", "message"),
    [
        (MLP(), [[1.0]], r"numeric inputs must be a table \[B, D\]; given list"),
        (MLP(), MIXED, "categories must name 1 columns; given 0"),
        (MLP(categories=(3,)), FLAT, "categories must name 0 columns; given 1"),
        (MLP(categories=(3,)), {**MIXED, "codes": 1}, "inputs has no field 'codes'"),
        (FTTransformer(), {"categorical": FLAT}, "numeric inputs .* NoneType"),
        (FTTransformer(), [[1.0]], "numeric inputs must be a table .* given list"),
        (SmallCNN(), FLAT, r"inputs must be images .* given float32\(2, 3\)"),
        (ResNet18(), MIXED, "inputs must be one array of images; given dict"),
    ],
)
def test_bad_inputs_are_named(network, inputs, message):
    with pytest.raises(ValueError, match=message):
        network.init(KEY, inputs, train=False)


# --- adapters


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        self.inside = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.inside(x))))


class NnxDropouts(nnx.Module):
    """Shows its two masks."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Dropout(0.25, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.first(x), self.second(x)])


TABLE = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)


def test_from_linen_is_the_module():
    module, model = LinenNet(), from_linen(LinenNet())
    params, model_state = drawn(model, TABLE)
    variables = {"params": params, **model_state}

    @jax.jit
    def adapted(params, model_state):
        return (
            model.logits(params, model_state, TABLE),
            *model.train(params, model_state, TABLE, KEY),
        )

    @jax.jit
    def plain(variables):
        trained, updated = module.apply(
            variables, TABLE, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
        )
        return module.apply(variables, TABLE, train=False), trained, updated

    logits, trained, updated = adapted(params, model_state)
    assert equal((logits, trained, dict(updated)), plain(variables))
    assert not equal(updated, model_state)


def test_from_nnx_is_the_module():
    make = partial(NnxNet, rate=0.0)
    model = from_nnx(make)
    # Under jit first: the graph definition must not hold tracers.
    train, evaluate = jax.jit(model.train), jax.jit(model.logits)
    params, old = model.init(KEY, TABLE)
    logits, new = train(params, old, TABLE, jax.random.key(3))
    module = make(nnx.Rngs(KEY))
    module.train()
    np.testing.assert_allclose(logits, module(TABLE), atol=1e-6)
    statistics = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    assert jax.tree.structure(new) == jax.tree.structure(statistics)
    for updated, expected in zip(jax.tree.leaves(new), jax.tree.leaves(statistics)):
        np.testing.assert_allclose(updated, expected, atol=1e-6)
    assert not equal(new, old)
    module.eval()
    np.testing.assert_allclose(evaluate(params, new, TABLE), module(TABLE), atol=1e-6)
    # The same in eager mode.
    np.testing.assert_allclose(model.logits(params, new, TABLE), module(TABLE), atol=1e-6)


@pytest.mark.parametrize("make", [from_linen(LinenNet()), from_nnx(NnxNet)], ids=["linen", "nnx"])
def test_dropout_draws_from_the_key_it_is_given(make):
    params, model_state = drawn(make, TABLE)
    step = jax.jit(make.train)

    def train(seed, state=model_state):
        return step(params, state, TABLE, jax.random.key(seed))

    assert equal(train(1), train(1))
    assert not equal(train(1)[0], train(2)[0])
    # No hidden stream: what a step draws is a function of its key, not of the steps before.
    updated = train(1)[1]
    assert equal(train(3)[0], train(3, updated)[0])
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(updated))
    logits = jax.jit(make.logits)
    assert equal(logits(params, model_state, TABLE), logits(params, model_state, TABLE))


def test_nnx_dropout_has_its_rate_and_a_mask_per_layer():
    model = from_nnx(NnxDropouts)
    params, model_state = model.init(KEY, None)
    (first, second), _ = model.train(params, model_state, jnp.ones((40, 100)), KEY)
    for mask in (first, second):
        np.testing.assert_allclose(np.unique(mask), [0, 1 / 0.75], rtol=1e-6)
        assert abs(float((mask > 0).mean()) - 0.75) < 0.03  # 4 standard deviations
    assert float(((first > 0) == (second > 0)).mean()) < 0.7  # independent: 0.625
    kept = model.logits(params, model_state, jnp.ones((40, 100)))
    np.testing.assert_array_equal(kept, jnp.ones((2, 40, 100)))


def test_from_function_is_the_function():
    model = from_function(
        lambda key, x: {"w": jax.random.normal(key, (x.shape[1], 3))}, lambda p, x: x @ p["w"]
    )
    params, model_state = model.init(KEY, TABLE)
    expected = TABLE @ jax.random.normal(KEY, (4, 3))
    np.testing.assert_array_equal(model.logits(params, model_state, TABLE), expected)
    logits, after = model.train(params, model_state, TABLE, KEY)
    np.testing.assert_array_equal(logits, expected)
    assert model_state == after == {}


class LinenOf(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x, *, train):
        return {"class": nn.Dense(3, dtype=self.dtype)(x), "rows": jnp.arange(len(x))}


class NnxOf(nnx.Module):
    def __init__(self, rngs, dtype):
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return {"class": self.head(x), "rows": jnp.arange(len(x))}


def function_of(dtype):
    def apply(w, x):
        return {"class": x.astype(dtype) @ w.astype(dtype), "rows": jnp.arange(len(x))}

    return from_function(lambda key, x: jnp.ones((4, 3)), apply)


@pytest.mark.parametrize(
    "make",
    [lambda dtype: from_linen(LinenOf(dtype)),
     lambda dtype: from_nnx(partial(NnxOf, dtype=jnp.dtype(dtype))), function_of],
    ids=["linen", "nnx", "function"],
)  # fmt: skip
def test_outputs_are_in_f32_at_least(make):
    def outputs(dtype):
        model = make(dtype)
        params, model_state = jax.eval_shape(model.init, KEY, TABLE)
        trained, _ = jax.eval_shape(model.train, params, model_state, TABLE, KEY)
        return jax.eval_shape(model.logits, params, model_state, TABLE), trained

    def dtypes(of):
        with enable_x64(of == "float64"):
            return {(x["class"].dtype.name, x["rows"].dtype.kind) for x in outputs(of)}

    assert dtypes("bfloat16") == dtypes("float16") == dtypes("float32") == {("float32", "i")}
    assert dtypes("float64") == {("float64", "i")}


def test_outputs_in_f32_compile_to_the_same_and_those_in_bfloat16_have_its_values():
    def both(dtype):
        module, model = LinenOf(dtype), from_linen(LinenOf(dtype))

        def plain(params):
            return module.apply({"params": params}, TABLE, train=False)

        return plain, lambda params: model.logits(params, {}, TABLE)

    params, _ = drawn(from_linen(LinenOf("float32")), TABLE)
    plain, adapted = (str(jax.make_jaxpr(f)(params)) for f in both("float32"))
    assert plain == adapted
    plain, adapted = (f(params) for f in both("bfloat16"))
    assert equal(plain, adapted)
