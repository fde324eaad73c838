from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from saflex_jax import Batch
from saflex_jax.augment.base import OPERATIONS
from saflex_jax.augment.fields import bilinear, gaussian_field, random_field, recolour

KEY = jax.random.key(3)
LUMA = np.array([0.299, 0.587, 0.114])
EVERYTHING = dict(
    length=3.0, translate=1.0, rotate=8.0, scale=0.1, hue=0.05, saturation=0.3, brightness=0.2
)

AUGMENT = jax.jit(random_field(**EVERYTHING))


def batch_of(inputs, seed=0):
    size = len(inputs)
    index = np.random.default_rng(seed).permutation(10 * size)[:size].astype(np.int32)
    return Batch(inputs, np.ones((size, 1), np.float32), np.ones(size, bool), index)


def run(augment, batch):
    """What the compiled augmentation makes, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(augment)(KEY, batch))


def noise(size, shape, seed=0):
    return np.random.default_rng(seed).normal(size=(size, *shape)).astype(np.float32)


def ruler(height, width):
    """Channels: the coordinates, which bilinear interpolation reproduces, and one for inside."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows, columns, np.ones((height, width))], -1).astype(np.float32)


def assert_standard_normal(values):
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(np.var(values) - 1) < 4 * np.sqrt(2 / len(values))


# --- the field


def test_field_is_gaussian_where_it_averages_little():
    draw = jax.jit(jax.vmap(lambda key: gaussian_field(key, (5, 4), length=0.2)))
    fields = np.asarray(draw(jax.random.split(KEY, 4000)), np.float64)
    assert_standard_normal(fields[:, 2, 1])


@pytest.mark.parametrize("length", [1.5, 4.0])
def test_field_is_gaussian_of_unit_variance_and_correlates_by_the_distance(length):
    draws, height, width = 4000, 12, 9
    draw = jax.jit(jax.vmap(lambda key: gaussian_field(key, (height, width), length=length)))
    fields = np.asarray(draw(jax.random.split(KEY, draws)), np.float64)
    for r, c in [(0, 0), (5, 7)]:  # an edge and the inside: the field is stationary
        assert_standard_normal(fields[:, r, c])

    def correlation(lag, size):  # on the circle: summed over the images of the point
        images = size * np.arange(-9, 10)

        def gauss(d):
            return np.exp(-((d + images) ** 2) / (2 * length**2)).sum()

        return gauss(lag) / gauss(0)

    for origin in [(0, 0), (4, 6)]:
        products = fields[:, [[origin[0]]], [[origin[1]]]] * fields
        for row in range(height):
            for column in range(width):
                expected = correlation(row - origin[0], height)
                expected *= correlation(column - origin[1], width)
                sample = products[:, row, column]
                # The variance of a product of two standard normals is 1 + their correlation^2.
                error = (sample.mean() - expected) / np.sqrt((1 + expected**2) / draws)
                assert abs(error) < 4.5


# --- the warp


def test_bilinear_is_that_of_scipy_inside_across_the_edge_and_outside():
    height, width = 5, 8
    image = noise(1, (height, width, 2))[0]
    rng = np.random.default_rng(1)
    places = rng.uniform(-3, 11, size=(2, 20, 30))
    places[:, :5] = np.round(places[:, :5])  # exactly on pixels and on the edges
    places[:, 5] *= 1e6
    places = places.astype(np.float32)
    read = jax.jit(bilinear)(image, places)
    for channel in range(2):
        expected = ndimage.map_coordinates(
            np.float64(image[..., channel]), np.float64(places), order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(read[..., channel], expected, atol=2e-6)


def test_random_field_reads_the_image_at_the_places_that_a_ruler_shows():
    height, width, size = 15, 11, 8
    augment = jax.jit(random_field(length=3.0, translate=1.0, rotate=8.0, scale=0.1))
    batch = batch_of(noise(size, (height, width, 3)))
    places = augment(KEY, batch._replace(inputs=np.tile(ruler(height, width), (size, 1, 1, 1))))
    augmented = np.asarray(augment(KEY, batch).inputs)
    for i, shown in enumerate(np.asarray(places.inputs, np.float64)):
        inside = shown[..., 2] > 1 - 1e-5
        assert 0.5 < inside.mean() < 1
        for channel in range(3):
            expected = ndimage.map_coordinates(
                np.float64(batch.inputs[i, ..., channel]), shown[inside][:, :2].T, order=1
            )
            np.testing.assert_allclose(augmented[i, ..., channel][inside], expected, atol=1e-4)


def test_warp_has_its_amplitudes():
    size, side = 1500, 9
    rulers = batch_of(np.tile(ruler(side, side), (size, 1, 1, 1)))
    centre = (side - 1) / 2
    # Without translation a pixel keeps its direction from the centre up to the angle.
    turned = run(random_field(length=2.0, rotate=10.0, scale=0.1), rulers)
    place = np.float64(turned.inputs[:, 2, 3, :2]) - centre  # was (-2, -1)
    ratio = (place[:, 0] + 1j * place[:, 1]) / (-2 - 1j)
    factor, angle = np.abs(ratio) - 1, np.angle(ratio)
    # The centre only moves by the translation.
    moved = run(random_field(length=2.0, rotate=10.0, scale=0.1, translate=0.7), rulers)
    shift = np.float64(moved.inputs[:, 4, 4, :2]) - centre
    drawn = [factor / 0.1, angle / np.deg2rad(10), *(shift / 0.7).T]
    for values in drawn:
        assert_standard_normal(values)
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 4 / np.sqrt(size)  # independent fields


def test_magnitude_is_the_root_mean_square_displacement():
    size, side = 300, 9
    rulers = batch_of(np.tile(ruler(side, side), (size, 1, 1, 1)))
    constant = run(random_field(length=1e3, translate=0.8), rulers)
    shift = constant.inputs[:, 4, 4, :2] - 4
    np.testing.assert_allclose(constant.trace.magnitude[:, 0], np.hypot(*shift.T), atol=1e-5)
    assert (constant.trace.operation == OPERATIONS.index("random_field")).all()
    # Neither the mean nor the largest: of a varying field the squares average to 2 variances.
    varying = jax.jit(
        lambda key, b: random_field(length=1.0, translate=0.8)(key, b).trace.magnitude
    )
    squares = np.float64(varying(KEY, rulers)) ** 2
    assert abs(squares.mean() - 2 * 0.8**2) < 4 * squares.std() / np.sqrt(size)


# --- colour


def chroma(colours):
    """Luma, and the chroma as one complex number (NTSC's I and Q)."""
    luma = colours @ LUMA
    red, blue = colours[..., 0] - luma, colours[..., 2] - luma
    return luma, (0.74 * red - 0.27 * blue) + 1j * (0.48 * red + 0.41 * blue)


def test_recolour():
    image = noise(1, (6, 5, 3))[0]
    angles = np.random.default_rng(2).uniform(-1, 1, (6, 5)).astype(np.float32)
    compiled = jax.jit(recolour)

    def changed(image=image, hue=0.0, saturation=0.0, brightness=0.0):
        hue = np.broadcast_to(np.float32(hue), (6, 5))
        return np.asarray(compiled(image, hue=hue, saturation=saturation, brightness=brightness))

    # A hue turns the plane of the chroma, a saturation scales it, and both keep the luma.
    luma, plane = chroma(np.float64(changed(hue=angles, saturation=0.5)))
    before, old_plane = chroma(np.float64(image))
    np.testing.assert_allclose(luma, before, atol=1e-5)
    turned = 1.5 * old_plane * np.exp(2j * np.pi * angles)
    np.testing.assert_allclose(plane, turned, atol=0.06)  # the axes are known to two digits
    half = changed(hue=0.5)
    np.testing.assert_allclose(changed(half, hue=0.5), image, atol=2e-6)
    assert np.abs(half - image).max() > 0.5
    grey = np.repeat((image @ LUMA)[..., None], 3, -1)
    np.testing.assert_allclose(changed(saturation=-1.0), grey, atol=1e-6)
    np.testing.assert_allclose(changed(saturation=0.4), grey + 1.4 * (image - grey), atol=2e-6)
    np.testing.assert_allclose(changed(brightness=-0.3), 0.7 * image, atol=2e-6)
    np.testing.assert_array_equal(recolour(image), recolour(image, hue=0.0))  # the defaults


def test_colour_has_its_amplitudes():
    size = 600
    colour = np.float32([0.9, 0.4, 0.2])
    batch = batch_of(np.tile(colour, (size, 6, 6, 1)))
    augment = jax.jit(random_field(length=2.0, hue=0.05, saturation=0.2, brightness=0.1))
    luma, plane = chroma(np.asarray(augment(KEY, batch).inputs, np.float64)[:, 3, 1])
    luma_before, plane_before = chroma(np.float64(colour))
    factor = luma / luma_before
    drawn = [
        np.angle(plane / plane_before) / (2 * np.pi * 0.05),
        (np.abs(plane / plane_before) / factor - 1) / 0.2,
        (factor - 1) / 0.1,
    ]
    for values in drawn:
        assert_standard_normal(values)
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 4 / np.sqrt(size)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_take_brightness_alone(channels):
    batch = batch_of(noise(5, (8, 8, channels)))
    skipped = run(random_field(length=2.0, hue=0.3, saturation=0.5), batch)
    np.testing.assert_array_equal(skipped.inputs, batch.inputs)
    bright = run(random_field(length=2.0, hue=0.3, brightness=0.2), batch)
    ratio = bright.inputs / batch.inputs
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-5)
    assert 0.1 < ratio.std() < 0.3


# --- the contract


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_amplitudes_of_zero_are_the_identity(dtype):
    batch = batch_of(noise(4, (7, 6, 3)).astype(dtype))
    same = run(random_field(length=2.0), batch)
    assert same.inputs.dtype == dtype
    np.testing.assert_array_equal(same.inputs, batch.inputs)
    np.testing.assert_array_equal(same.trace.magnitude, np.zeros((4, 1)))


@pytest.mark.slow  # `per_image` rounds, which tests/augment/spatial_test.py proves
def test_bfloat16_is_float32_rounded_once():
    batch = batch_of(noise(16, (9, 12, 3)).astype(jnp.bfloat16))
    half = AUGMENT(KEY, batch).inputs
    exact = AUGMENT(KEY, batch._replace(inputs=batch.inputs.astype(np.float32))).inputs
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), exact, rtol=2**-8, atol=1e-5)


def test_a_sample_depends_on_its_index_alone():
    size = 16
    batch = batch_of(noise(size, (9, 12, 3)))
    whole = jax.device_get(AUGMENT(KEY, batch))
    rows = np.random.default_rng(1).integers(size, size=size)
    part = AUGMENT(KEY, jax.tree.map(lambda x: x[rows], batch))
    np.testing.assert_allclose(part.inputs, whole.inputs[rows], atol=1e-5)
    np.testing.assert_allclose(part.trace.magnitude, whole.trace.magnitude[rows], atol=1e-5)
    alike = batch._replace(inputs=np.tile(batch.inputs[:1], (size, 1, 1, 1)))
    images = np.asarray(AUGMENT(KEY, alike).inputs)
    gap = np.abs(images[:, None] - images[None]).max((2, 3, 4))
    assert gap[~np.eye(size, dtype=bool)].min() > 1e-2  # every index draws its own
    # Over devices: the same samples, and nothing is sent between them.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    compiled = AUGMENT.lower(KEY, split).compile()
    np.testing.assert_allclose(compiled(KEY, split).inputs, whole.inputs, atol=1e-5)
    sent = ("all-gather", "all-reduce", "all-to-all", "permute(")
    assert not [op for op in sent if op in compiled.as_text()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(random_field, length=0.0), "length must be positive and finite; given 0.0"),
        (partial(random_field, length=2.0, translate=-1.0), "translate must be >= 0 and finite"),
        (partial(random_field, length=2.0, rotate=np.inf), "rotate must be >= 0 .*; given inf"),
        (partial(random_field, length=2.0, hue=np.nan), "hue must be >= 0 .*; given nan"),
        (partial(gaussian_field, KEY, (4, 4), length=-1.0), "length must be positive"),
        (
            lambda: random_field(length=2.0)(KEY, batch_of(np.zeros((3, 4, 4), np.float32))),
            r"inputs must be images of floats \[B, H, W, C\]; given float32\(3, 4, 4\)",
        ),
        (
            lambda: random_field(length=2.0)(KEY, batch_of(np.zeros((3, 4, 4, 1), np.uint8))),
            "inputs must be images of floats .* given uint8",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
