import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from saflex_jax import Batch
from saflex_jax._compat import auto_mesh
from saflex_jax.augment import image as ops
from saflex_jax.augment.base import OPERATIONS
from saflex_jax.augment.policies import (
    POLICIES,
    STANDARD,
    TRIVIAL,
    TRIVIAL_WIDE,
    _dirichlet,
    apply,
    augmix,
    autoaugment,
    randaugment,
    trivialaugment,
    values,
)
from tests.augment.photos import GEOMETRIC, assert_like_pillow, crops

KEY = jax.random.key(3)
MAKE = {
    "randaugment": lambda **o: randaugment(2, 9, **o),
    "trivialaugment": trivialaugment,
    "autoaugment": autoaugment,
    "augmix": augmix,
}
# One compilation each, shared by the tests. Of traces alone XLA leaves the images out.
JITTED = {name: jax.jit(make()) for name, make in MAKE.items()}


def tracing(augment):
    return jax.jit(lambda key, batch: augment(key, batch).trace)


def photographs(count, size=32, **options):
    pixels = crops(size, count, **options)
    inputs = pixels.astype(np.float32) / 255
    labels = np.eye(3, dtype=np.float32)[np.arange(count) % 3]
    return pixels, Batch(inputs, labels, np.ones(count, bool), np.arange(count, dtype=np.int32))


def names_of(trace):
    return np.array(OPERATIONS)[np.asarray(trace.operation)]


# --- values


def test_values_are_those_of_the_published_tables():
    """torchvision 0.29, `_augmentation_space` at 31 bins, typed in by its formulas."""
    level = np.arange(31)

    def linear(high):
        return high * level / 30

    height, width = 50, 20
    standard = {
        "rotate": linear(30.0),
        "shear_x": linear(0.3),
        "shear_y": linear(0.3),
        "translate_x": linear(150 / 331 * width),
        "translate_y": linear(150 / 331 * height),
        "solarize": np.linspace(255, 0, 31) / 255,
        "posterize": 8 - np.round(level / (30 / 4)),
    } | {name: 1 + linear(0.9) for name in ("brightness", "color", "contrast", "sharpness")}
    wide = (
        standard
        | {
            "rotate": linear(135.0),
            "shear_x": linear(0.99),
            "shear_y": linear(0.99),
            "translate_x": linear(32.0),
            "translate_y": linear(32.0),
            "posterize": 8 - np.round(level / (30 / 6)),
        }
        | {name: 1 + linear(0.99) for name in ("brightness", "color", "contrast", "sharpness")}
    )
    trivial = standard | {"translate_x": linear(10.0), "translate_y": linear(10.0)}
    mirrored = {"brightness", "color", "contrast", "sharpness"}
    for space, table in ((STANDARD, standard), (TRIVIAL_WIDE, wide), (TRIVIAL, trivial)):
        place, sign, strength = np.ix_(np.arange(len(space)), [1.0, -1.0], level / 30)
        actual = values(space, place, jnp.float32(strength), sign, (height, width))
        for name, (positive, negative) in zip(space, actual):
            if name not in table:
                continue
            expected = mirror = table[name]
            if name not in ("solarize", "posterize"):
                mirror = 2 - expected if name in mirrored else -expected
            np.testing.assert_allclose(positive, expected, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(negative, mirror, atol=1e-5, err_msg=name)


def test_published_policies_hold_25_pairs_of_known_operations():
    for pairs in POLICIES.values():
        assert len(pairs) == 25
        for name, probability, level in (half for pair in pairs for half in pair):
            assert name in OPERATIONS and 0 <= probability <= 1 and 0 <= level <= 9
    # Spot checks against the paper's appendix, tables 7, 8 and 9.
    assert POLICIES["cifar10"][1] == (("rotate", 0.7, 2), ("translate_x", 0.3, 9))
    assert POLICIES["svhn"][24] == (("shear_x", 0.7, 2), ("invert", 0.1, 0))
    assert POLICIES["imagenet"][0] == (("posterize", 0.4, 8), ("rotate", 0.6, 9))


# --- the images


def geometric(name):
    """It alone on one image; tests/augment/image_test.py compares it with Pillow's."""
    place = jnp.array([OPERATIONS.index(name)])
    return lambda x, v: apply(x[None], place, v[None], names=[name])[0]


SINGLE = {
    "identity": (lambda x, v: x, 0.0),
    "autocontrast": (lambda x, v: ops.autocontrast(x), 0.0),
    "equalize": (lambda x, v: ops.equalize(x), 0.0),
    "invert": (lambda x, v: ops.invert(x), 0.0),
} | {
    name: (geometric(name) if name in GEOMETRIC else getattr(ops, name), value)
    for name, value in {
        "rotate": 20.0, "shear_x": 0.2, "shear_y": -0.2, "translate_x": 4.3, "translate_y": -6.0,
        "solarize": 0.4, "posterize": 3.0, "brightness": 1.4, "color": 0.2, "contrast": 0.3,
        "sharpness": 1.8,
    }.items()
}  # fmt: skip
APPLY = jax.jit(partial(apply, names=OPERATIONS))


def test_apply_is_the_single_operation_on_every_row():
    _, batch = photographs(48)
    names = np.resize([*SINGLE], 48)
    operation = np.array([OPERATIONS.index(n) for n in names], np.int32)
    value = np.float32([SINGLE[n][1] for n in names])

    @jax.jit
    def each(images):
        return {
            name: jax.vmap(op)(images[names == name], value[names == name])
            for name, (op, _) in SINGLE.items()
        }

    expected = each(batch.inputs)
    actual = APPLY(batch.inputs, operation, value)
    for name in SINGLE:
        rows = names == name
        np.testing.assert_allclose(actual[rows], expected[name], atol=1e-5, err_msg=name)


def test_apply_leaves_unnamed_operations_alone():
    _, batch = photographs(16)
    operation = np.resize([OPERATIONS.index(n) for n in ("invert", "equalize", "rotate")], 16)
    run = jax.jit(partial(apply, names=["invert"]))
    actual = run(batch.inputs, operation, np.full(16, 30.0, np.float32))
    inverted = operation == OPERATIONS.index("invert")
    np.testing.assert_array_equal(actual[~inverted], batch.inputs[~inverted])
    np.testing.assert_allclose(actual[inverted], 1 - batch.inputs[inverted], atol=1e-6)


@pytest.mark.parametrize("grey", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_layer_is_what_pillow_makes_of_the_operation_in_the_trace(grey):
    pixels, batch = photographs(96, grey=grey)
    augmented = jax.jit(randaugment(1, 17))(KEY, batch)
    names = names_of(augmented.trace)[:, 0]
    assert set(names) == set(STANDARD)  # every operation was met
    images, values = np.asarray(augmented.inputs), np.asarray(augmented.trace.magnitude)[:, 0]
    for name, value, image, original in zip(names, values, images, pixels):
        assert_like_pillow(name, float(value), image, original)
    np.testing.assert_array_equal(augmented.trace.partner[:, 0], batch.index)


def test_two_layers_are_one_after_the_other_without_clipping_between_them():
    _, batch = photographs(48)
    augmented = JITTED["randaugment"](KEY, batch)
    images = batch.inputs
    for operation, value in zip(augmented.trace.operation.T, augmented.trace.magnitude.T):
        images = APPLY(images, operation, value)
    assert float(images.max()) > 1 and float(images.min()) < 0
    np.testing.assert_allclose(augmented.inputs, np.clip(images, 0, 1), atol=2e-5)


def test_augmix_is_the_mixture_of_the_image_and_its_chains():
    _, batch = photographs(256, size=24)
    augmented = jax.jit(augmix(10.0, width=1, depth=1))(KEY, batch)
    share = np.asarray(augmented.trace.magnitude[:, 0], np.float64)
    assert stats.kstest(share, "uniform").pvalue > 1e-3
    assert set(names_of(augmented.trace).ravel()) == {"augmix"}
    # With one chain of one operation the mixture gives that operation's image back. The two that
    # take no value must turn up once in nine each.
    seen, images = share > 0.2, np.float64(batch.inputs)
    share = share[:, None, None, None]
    chain = (np.asarray(augmented.inputs, np.float64) - (1 - share) * images) / share
    alone = jax.jit(lambda x: [jax.vmap(op)(x) for op in (ops.equalize, ops.autocontrast)])
    for expected in alone(batch.inputs):
        hit = (np.abs(chain - expected).max((1, 2, 3)) < 1e-4)[seen]
        assert stats.binomtest(int(hit.sum()), int(seen.sum()), 1 / 9).pvalue > 1e-3


def test_augmix_with_its_defaults_changes_images_within_their_range():
    _, batch = photographs(48)
    images = np.asarray(JITTED["augmix"](KEY, batch).inputs)
    assert images.min() >= 0 and images.max() <= 1
    assert np.median(np.abs(images - batch.inputs).mean((1, 2, 3))) > 0.01


def test_weights_of_chains_are_a_distribution_for_any_alpha():
    keys = jax.random.split(KEY, 1000)
    draw = jax.vmap(partial(_dirichlet, alpha=0.01, size=3))
    weight = np.asarray(jax.jit(draw)(keys))
    np.testing.assert_allclose(weight.sum(1), 1, atol=1e-6)
    # sum_i E w_i^2 = (1 + alpha) / (1 + 3 alpha)
    assert (weight**2).sum(1).mean() == pytest.approx(1.01 / 1.03, abs=0.015)


# --- the draws


def tiny(count=2048):
    """Many tiny images: what is drawn does not depend on the pixels."""
    inputs, labels = np.full((count, 8, 8, 1), 0.5, np.float32), np.ones((count, 1), np.float32)
    return Batch(inputs, labels, np.ones(count, bool), np.arange(count, dtype=np.int32))


def traces(augment):
    """(names [B, L], values [B, L]) on `tiny` images; draws of a row follow its index alone."""
    run, batch = tracing(augment), tiny()
    trace = jax.tree.map(np.asarray, run(KEY, batch))
    rows = np.random.default_rng(1).integers(len(batch.index), size=len(batch.index))
    moved = run(KEY, jax.tree.map(lambda x: x[rows], batch))
    jax.tree.map(np.testing.assert_array_equal, moved, jax.tree.map(lambda x: x[rows], trace))
    anew = run(jax.random.key(4), batch)
    assert (anew.operation != trace.operation).mean() > 0.5
    return names_of(trace), trace.magnitude


def test_randaugment_draws_operations_and_signs_uniformly_with_replacement():
    names, value = traces(MAKE["randaugment"]())
    pairs = Counter(map(tuple, names))
    counts = [pairs[a, b] for a in STANDARD for b in STANDARD]
    assert stats.chisquare(counts).pvalue > 1e-3
    turned = value[names == "rotate"]
    np.testing.assert_allclose(np.abs(turned), 9.0, rtol=1e-6)
    assert stats.binomtest(int((turned > 0).sum()), len(turned), 0.5).pvalue > 1e-3


def test_trivialaugment_draws_one_operation_at_a_uniform_strength():
    names, value = traces(trivialaugment())
    assert names.shape[1] == 1
    assert stats.chisquare([Counter(names[:, 0])[n] for n in STANDARD]).pvalue > 1e-3
    level = np.round(np.abs(value[names == "rotate"]) / 135 * 30)
    assert stats.chisquare(np.bincount(level.astype(int), minlength=31)).pvalue > 1e-3
    assert np.abs(value[names == "shear_x"]).max() == pytest.approx(0.99)


@pytest.mark.parametrize("policy", POLICIES)
def test_autoaugment_draws_its_pairs_and_uses_each_half_with_its_probability(policy):
    names, value = traces(autoaugment(policy))
    expected = Counter()
    for (a, p, _), (b, q, _) in POLICIES[policy]:
        for first, second, chance in (
            (a, b, p * q), (a, "identity", p * (1 - q)), ("identity", b, (1 - p) * q),
            ("identity", "identity", (1 - p) * (1 - q)),
        ):  # fmt: skip
            expected[first, second] += chance / 25
    drawn = Counter(map(tuple, names))
    assert set(drawn) <= {pair for pair, chance in expected.items() if chance > 0}
    chances = np.array([chance for chance in expected.values() if chance > 0])
    counts = [drawn[pair] for pair, chance in expected.items() if chance > 0]
    assert stats.chisquare(counts, len(names) * chances).pvalue > 1e-3
    angles = [30 * level / 9 for pair in POLICIES[policy] for n, _, level in pair if n == "rotate"]
    turned = np.abs(value[names == "rotate"])
    assert (np.abs(turned[:, None] - angles).min(1) < 1e-4).all()


# --- where it runs


@pytest.mark.parametrize("name", ["randaugment", "augmix"])
def test_a_key_decides_everything_and_a_sample_depends_on_its_index_alone(name):
    _, batch = photographs(48)
    whole, again = JITTED[name](KEY, batch), JITTED[name](KEY, batch)
    np.testing.assert_array_equal(whole.inputs, again.inputs)
    other = JITTED[name](jax.random.key(4), batch)
    assert float(np.abs(np.asarray(whole.inputs) - other.inputs).max()) > 0.1
    rows = np.random.default_rng(1).integers(48, size=48)  # other places, other neighbours
    part = JITTED[name](KEY, jax.tree.map(lambda x: x[rows], batch))
    np.testing.assert_allclose(part.inputs, np.asarray(whole.inputs)[rows], atol=1e-6)
    np.testing.assert_array_equal(part.trace.operation, np.asarray(whole.trace.operation)[rows])
    np.testing.assert_array_equal(whole.labels, batch.labels)
    np.testing.assert_array_equal(whole.index, batch.index)


def test_on_eight_devices_it_is_the_same_and_no_image_leaves_its_device():
    _, batch = photographs(48)
    whole = JITTED["randaugment"](KEY, batch)
    mesh = auto_mesh(jax.devices(), "data")
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    compiled = JITTED["randaugment"].lower(KEY, spread).compile()
    augmented = compiled(KEY, spread)
    np.testing.assert_allclose(augmented.inputs, whole.inputs, atol=1e-6)
    assert len(augmented.inputs.sharding.device_set) == 8
    # What is communicated are the loops' lengths.
    communicated = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(",
        compiled.as_text(),
    )
    assert communicated  # the devices agree on something
    sizes = [
        int(np.prod([int(n) for n in s.split(",") if n]))
        for sent in communicated
        for s in re.findall(r"\[([\d,]*)\]", sent)
    ]
    assert max(sizes) == 1


@pytest.mark.parametrize("name", MAKE)
def test_any_image_keeps_its_shape_and_dtype(name):
    shape, dtype = (24, 40, 5), jnp.bfloat16
    _, batch = photographs(16)
    batch = batch._replace(inputs=jax.ShapeDtypeStruct((16, *shape), dtype))
    augmented = jax.eval_shape(MAKE[name](), KEY, batch).inputs
    assert (augmented.shape, augmented.dtype) == ((16, *shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["randaugment", "augmix"])
def test_half_precision_and_many_channels_are_near_single_precision(name):
    pixels = crops((24, 40), 16)
    inputs = np.concatenate([pixels, pixels[::-1]], -1)[..., :5] / np.float32(255)
    _, batch = photographs(16)

    @jax.jit
    def both(key, batch):
        half = batch._replace(inputs=batch.inputs.astype(jnp.bfloat16))
        return [MAKE[name]()(key, b).inputs for b in (half, batch)]

    half, exact = (np.float32(x) for x in both(KEY, batch._replace(inputs=inputs)))
    assert np.isfinite(half).all() and half.min() >= 0 and half.max() <= 1
    # Levels of equalize and posterize may move by the input's rounding.
    assert np.median(np.abs(half - exact)) < 0.005


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: randaugment(0, 9), "n"),
        (lambda: randaugment(2, 31), "m"),
        (lambda: randaugment(2, -1), "m"),
        (lambda: randaugment(2, 9, fill=128), "fill"),
        (lambda: randaugment(2, 9, interpolation="cubic"), "interpolation"),
        (lambda: trivialaugment(fill=-0.1), "fill"),
        (lambda: autoaugment("cifar100"), "policy"),
        (lambda: augmix(0.0), "severity"),
        (lambda: augmix(width=0), "width"),
        (lambda: augmix(depth=-1), "depth"),
        (lambda: augmix(alpha=0.0), "alpha"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{name} must "):
        make()


@pytest.mark.parametrize("name", MAKE)
def test_what_is_not_a_batch_of_images_is_refused(name):
    pixels, batch = photographs(4)
    for inputs in (np.asarray(batch.inputs)[..., 0], pixels, {"image": 1}):
        with pytest.raises(ValueError, match=r"^inputs must be "):
            MAKE[name]()(KEY, batch._replace(inputs=inputs))
