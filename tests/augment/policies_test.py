import re
from collections import Counter

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
JITTED = {name: jax.jit(make()) for name, make in MAKE.items()}


def photographs(count, size=32, dtype=np.float32, **options):
    pixels = crops(size, count, **options)
    inputs = jnp.asarray(pixels.astype(np.float32) / 255, dtype)
    labels = jnp.eye(3)[jnp.arange(count) % 3]
    return pixels, Batch(inputs, labels, labels[:, 0] >= 0, jnp.arange(count, dtype=jnp.int32))


def names_of(found):
    return np.array(OPERATIONS)[np.asarray(found.trace.operation)]


# --- values


def test_values_are_those_of_the_published_tables():
    """torchvision 0.29, `_augmentation_space` at 31 bins, typed in by its formulas."""
    level = np.arange(31)
    linear = lambda high: high * level / 30
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
        for place, name in enumerate(space):
            if name not in table:
                continue
            drawn = jnp.full(31, place)
            for sign in (1.0, -1.0):
                found = values(space, drawn, level / 30, jnp.full(31, sign), (height, width))
                expected = table[name]
                if sign < 0 and name not in ("solarize", "posterize"):
                    expected = 2 - expected if name in mirrored else -expected
                np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


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


def test_apply_is_the_single_operation_on_every_row_and_leaves_unnamed_ones_alone():
    _, batch = photographs(16)
    table = {
        "autocontrast": (lambda x, v: ops.autocontrast(x), 0.0),
        "equalize": (lambda x, v: ops.equalize(x), 0.0),
        "invert": (lambda x, v: ops.invert(x), 0.0),
        "identity": (lambda x, v: x, 0.0),
    } | {
        name: (getattr(ops, name), value)
        for name, value in {
            "rotate": 20.0, "shear_x": 0.2, "shear_y": -0.2, "translate_x": 4.3,
            "translate_y": -6.0, "solarize": 0.4, "posterize": 3.0, "brightness": 1.4,
            "color": 0.2, "contrast": 0.3, "sharpness": 1.8,
        }.items()
    }  # fmt: skip
    names = [*table, "equalize"]
    operation = jnp.array([OPERATIONS.index(n) for n in names])
    value = jnp.array([table[n][1] for n in names])
    found = apply(batch.inputs, operation, value, names=OPERATIONS)
    for row, name in enumerate(names):
        expected = table[name][0](batch.inputs[row], value[row])
        np.testing.assert_allclose(found[row], expected, atol=1e-5, err_msg=name)
    only = apply(batch.inputs, operation, value, names=["invert"])
    for row, name in enumerate(names):
        changed = float(jnp.abs(only[row] - batch.inputs[row]).max()) > 0
        assert changed == (name == "invert")


@pytest.mark.parametrize("grey", [False, True])
def test_one_layer_is_what_pillow_makes_of_the_operation_in_the_trace(grey):
    pixels, batch = photographs(96, grey=grey)
    found = jax.jit(randaugment(1, 17))(KEY, batch)
    names = names_of(found)[:, 0]
    assert set(names) == set(STANDARD)  # every operation was met
    for row, name in enumerate(names):
        value = float(found.trace.magnitude[row, 0])
        assert_like_pillow(name, value, found.inputs[row], pixels[row])
    np.testing.assert_array_equal(found.trace.partner[:, 0], batch.index)


def test_two_layers_are_one_after_the_other_without_clipping_between_them():
    _, batch = photographs(48)
    found = JITTED["randaugment"](KEY, batch)
    once = {n: i for i, n in enumerate(OPERATIONS)}
    met = Counter()
    for row, pair in enumerate(names_of(found)):
        if set(pair) & set(GEOMETRIC):
            continue  # parity of these is counted in shares of pixels, above
        image = batch.inputs[row]
        for name, value in zip(pair, found.trace.magnitude[row]):
            op = getattr(ops, name, None)
            if name in ("autocontrast", "equalize"):
                image = op(image)
            elif name != "identity":
                image = op(image, value)
            met[name] += 1
        assert once[pair[0]] == found.trace.operation[row, 0]
        np.testing.assert_allclose(found.inputs[row], jnp.clip(image, 0, 1), atol=2e-5)
    assert len(met) >= 8


def test_augmix_is_the_mixture_of_the_image_and_its_chains():
    _, batch = photographs(256)
    found = jax.jit(augmix(10.0, width=1, depth=1))(KEY, batch)
    share = np.asarray(found.trace.magnitude[:, 0], np.float64)
    assert stats.kstest(share, "uniform").pvalue > 1e-3
    assert set(names_of(found).ravel()) == {"augmix"}
    # With one chain of one operation the mixture gives that operation's image back. The two that
    # take no value must turn up once in nine each.
    seen = share > 0.2
    chain = np.asarray(found.inputs, np.float64) - (1 - share)[:, None, None, None] * batch.inputs
    chain = chain / share[:, None, None, None]
    for op in (ops.equalize, ops.autocontrast):
        alone = np.asarray(jax.vmap(op)(batch.inputs))
        hit = (np.abs(chain - alone).max((1, 2, 3)) < 1e-4)[seen]
        assert stats.binomtest(int(hit.sum()), int(seen.sum()), 1 / 9).pvalue > 1e-3
    _, batch = photographs(48)
    full = JITTED["augmix"](KEY, batch).inputs
    assert float(full.min()) >= 0 and float(full.max()) <= 1
    change = np.abs(full - batch.inputs).mean((1, 2, 3))
    assert np.median(change) > 0.01


# --- the draws


def drawn(name, count=2048):
    """Traces of a policy on many tiny images: what is drawn does not depend on the pixels."""
    batch = Batch(
        jnp.full((count, 8, 8, 1), 0.5), jnp.ones((count, 1)), jnp.ones(count, bool),
        jnp.arange(count),
    )  # fmt: skip
    return JITTED[name](KEY, batch)


def test_randaugment_draws_operations_and_signs_uniformly_with_replacement():
    found = drawn("randaugment")
    names, value = names_of(found), np.asarray(found.trace.magnitude)
    pairs = Counter(map(tuple, names))
    counts = [pairs[a, b] for a in STANDARD for b in STANDARD]
    assert stats.chisquare(counts).pvalue > 1e-3
    turned = value[names == "rotate"]
    np.testing.assert_allclose(np.abs(turned), 9.0, rtol=1e-6)
    assert stats.binomtest(int((turned > 0).sum()), len(turned), 0.5).pvalue > 1e-3


def test_trivialaugment_draws_one_operation_at_a_uniform_strength():
    found = drawn("trivialaugment")
    names, value = names_of(found), np.asarray(found.trace.magnitude)
    assert names.shape[1] == 1
    assert stats.chisquare([Counter(names[:, 0])[n] for n in STANDARD]).pvalue > 1e-3
    level = np.round(np.abs(value[names == "rotate"]) / 135 * 30)
    assert stats.chisquare(np.bincount(level.astype(int), minlength=31)).pvalue > 1e-3
    assert np.abs(value[names == "shear_x"]).max() == pytest.approx(0.99)


@pytest.mark.parametrize("policy", POLICIES)
def test_autoaugment_draws_its_pairs_and_uses_each_half_with_its_probability(policy):
    count = 2048
    batch = Batch(
        jnp.full((count, 8, 8, 1), 0.5), jnp.ones((count, 1)), jnp.ones(count, bool),
        jnp.arange(count),
    )  # fmt: skip
    found = jax.jit(autoaugment(policy))(KEY, batch)
    names = names_of(found)
    expected = Counter()
    for (a, p, _), (b, q, _) in POLICIES[policy]:
        for first, second, chance in (
            (a, b, p * q), (a, "identity", p * (1 - q)), ("identity", b, (1 - p) * q),
            ("identity", "identity", (1 - p) * (1 - q)),
        ):  # fmt: skip
            expected[first, second] += chance / 25
    got = Counter(map(tuple, names))
    assert set(got) <= {pair for pair, chance in expected.items() if chance > 0}
    chances = np.array([chance for chance in expected.values() if chance > 0])
    counts = [got[pair] for pair, chance in expected.items() if chance > 0]
    assert stats.chisquare(counts, count * chances).pvalue > 1e-3
    levels = {(name, level) for pair in POLICIES[policy] for name, _, level in pair}
    for name, column in zip(names.ravel(), np.asarray(found.trace.magnitude).ravel()):
        if name == "rotate":
            assert any(abs(abs(column) - 30 * level / 9) < 1e-4 for n, level in levels if n == name)


# --- where it runs


@pytest.mark.parametrize("name", MAKE)
def test_a_key_decides_everything_and_a_sample_depends_on_its_index_alone(name):
    _, batch = photographs(48)
    whole, again = JITTED[name](KEY, batch), JITTED[name](KEY, batch)
    np.testing.assert_array_equal(whole.inputs, again.inputs)
    other = JITTED[name](jax.random.key(4), batch)
    assert float(jnp.abs(whole.inputs - other.inputs).max()) > 0.1
    rows = np.random.default_rng(1).integers(48, size=48)  # other places, other neighbours
    part = JITTED[name](KEY, jax.tree.map(lambda x: x[rows], batch))
    np.testing.assert_allclose(part.inputs, whole.inputs[rows], atol=1e-6)
    np.testing.assert_array_equal(part.trace.operation, whole.trace.operation[rows])
    np.testing.assert_array_equal(whole.labels, batch.labels)
    np.testing.assert_array_equal(whole.index, batch.index)


def test_eager_vmapped_and_on_eight_devices_it_is_the_same():
    _, batch = photographs(48)
    whole = JITTED["randaugment"](KEY, batch)
    eager = MAKE["randaugment"]()(KEY, jax.tree.map(lambda x: x[:12], batch))
    np.testing.assert_allclose(eager.inputs, whole.inputs[:12], atol=1e-6)
    stacked = jax.tree.map(lambda x: x.reshape(4, 12, *x.shape[1:]), batch)
    mapped = jax.jit(jax.vmap(MAKE["randaugment"](), in_axes=(None, 0)))(KEY, stacked)
    flat = mapped.inputs.reshape(whole.inputs.shape)
    np.testing.assert_allclose(flat, whole.inputs, atol=1e-6)

    mesh = auto_mesh(jax.devices(), "data")
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    compiled = JITTED["randaugment"].lower(KEY, spread).compile()
    found = compiled(KEY, spread)
    np.testing.assert_allclose(found.inputs, whole.inputs, atol=1e-6)
    assert len(found.inputs.sharding.device_set) == 8
    # No image leaves its device: what is communicated are the loops' lengths.
    communicated = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(",
        compiled.as_text(),
    )
    assert communicated  # the devices agree on something
    sizes = [
        int(np.prod([int(n) for n in s.split(",") if n]))
        for made in communicated
        for s in re.findall(r"\[([\d,]*)\]", made)
    ]
    assert max(sizes) == 1


@pytest.mark.parametrize(
    ("name", "size", "channels", "dtype"),
    [
        ("randaugment", 8, 1, jnp.float32),
        ("randaugment", (24, 40), 5, jnp.float32),
        ("randaugment", 32, 3, jnp.bfloat16),
        ("augmix", (24, 40), 5, jnp.bfloat16),
    ],
)
def test_any_image_keeps_its_shape_and_dtype(name, size, channels, dtype):
    pixels = crops(size, 16)
    inputs = np.concatenate([pixels, pixels[::-1]], -1)[..., :channels] / np.float32(255)
    _, batch = photographs(16)
    batch = batch._replace(inputs=jnp.asarray(inputs, dtype))
    found = jax.jit(MAKE[name]())(KEY, batch).inputs
    assert found.dtype == dtype and found.shape == inputs.shape
    wide = np.asarray(found, np.float32)
    assert np.isfinite(wide).all() and wide.min() >= 0 and wide.max() <= 1
    if dtype == jnp.bfloat16:  # levels of equalize and posterize may move by the input's rounding
        exact = jax.jit(MAKE[name]())(KEY, batch._replace(inputs=jnp.asarray(inputs))).inputs
        assert np.median(np.abs(wide - exact)) < 0.005


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
    _, batch = photographs(4)
    for inputs in (batch.inputs[..., 0], (255 * batch.inputs).astype(jnp.uint8), {"image": 1}):
        with pytest.raises(ValueError, match=r"^inputs must be "):
            MAKE[name]()(KEY, batch._replace(inputs=inputs))
