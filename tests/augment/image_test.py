import functools

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from saflex_jax.augment import image as ops
from saflex_jax.augment import rows
from saflex_jax.augment.base import OPERATIONS
from saflex_jax.augment.policies import apply
from saflex_jax.augment.rows import map_rows
from tests.augment.photos import GEOMETRIC, assert_like_pillow, crops

VALUES = {
    "autocontrast": [None],
    "equalize": [None],
    "invert": [None],
    "solarize": [0.0, 100 / 255, 178.5 / 255, 1.0],
    "posterize": [1.0, 4.0, 7.0, 8.0],
    "brightness": [0.0, 0.4, 1.0, 1.9],
    "contrast": [0.0, 0.4, 1.0, 1.9],
    "color": [0.0, 0.4, 1.0, 1.9],
    "sharpness": [0.0, 0.4, 1.0, 1.9],
    "rotate": [0.0, 9.0, -30.0, 135.0],
    "shear_x": [0.09, -0.3, 0.99],
    "shear_y": [0.09, -0.3],
    "translate_x": [3.0, -10.35],
    "translate_y": [3.0, -10.35],
}


@functools.cache
def jitted(name, **options):
    if name in GEOMETRIC:
        place = np.array([OPERATIONS.index(name)])
        layer = functools.partial(apply, names=[name], **options)
        return jax.jit(lambda image, value: layer(image[None], place, value[None])[0])
    op = getattr(ops, name)
    if VALUES[name] == [None]:
        return jax.jit(lambda image, value: op(image))
    return jax.jit(op)


def as_floats(pixels):
    return pixels.astype(np.float32) / 255


@pytest.mark.parametrize("name", VALUES)
def test_operations_are_those_of_pillow(name):
    shapes = [crops((40, 23), 2), crops(32, 2, grey=True)]
    if name in ("equalize", "autocontrast"):  # these see how few pixels there are
        shapes.append(crops(8, 2))
    for pixels in shapes:
        for value in VALUES[name]:
            for image in pixels:
                actual = jitted(name)(as_floats(image), 0.0 if value is None else value)
                assert_like_pillow(name, value, actual, image)


@pytest.mark.parametrize("name", ["equalize", "rotate"])
def test_operations_are_those_of_pillow_at_224_pixels(name):
    image = crops(224, 1)[0]
    value = VALUES[name][1] if len(VALUES[name]) > 1 else None
    actual = jitted(name)(as_floats(image), 0.0 if value is None else value)
    assert_like_pillow(name, value, actual, image)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "translate_y"])
@pytest.mark.parametrize("interpolation", ops.INTERPOLATIONS)
def test_interpolation_and_fill_are_those_of_pillow(name, interpolation):
    resample = Image.Resampling[interpolation.upper()]
    warp = jitted(name, fill=128 / 255, interpolation=interpolation)
    for image in crops((40, 23), 2):
        for value in VALUES[name]:
            actual = warp(as_floats(image), value)
            assert_like_pillow(name, value, actual, image, fill=128, resample=resample)


def test_equalize_leaves_channels_of_one_value_and_maps_two_values_apart():
    image = np.zeros((40, 23, 3), np.uint8)
    image[..., 0] = 77
    image[:16, :, 1] = 200
    actual = jitted("equalize")(as_floats(image), 0.0)
    assert_like_pillow("equalize", None, actual, image)
    np.testing.assert_allclose(actual[..., 0], 77 / 255, atol=1e-6)


def test_nothing_is_clipped_and_no_operation_makes_nan():
    image = as_floats(crops((40, 23), 1)[0])
    assert float(jitted("brightness")(image, 1.9).max()) > 1.2
    wild = 3 * image - 1  # as a chain may hand it on
    wild[..., 1] = 0.3
    for name, values in VALUES.items():
        for value in values:
            assert np.isfinite(jitted(name)(wild, 0.0 if value is None else value)).all(), name


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "posterize", "sharpness", "rotate"])
def test_channels_are_independent_where_no_grey_is_involved(name):
    first, second = crops(32, 2)
    five = np.concatenate([first, second[..., :2]], -1)
    value = VALUES[name][-1] or 0.0
    actual = jitted(name)(as_floats(five), value)
    for channel in range(5):
        alone = jitted(name)(as_floats(five[..., channel : channel + 1]), value)
        np.testing.assert_allclose(actual[..., channel], alone[..., 0], atol=1e-6)


def test_color_and_contrast_of_other_channel_counts_take_the_mean_as_grey():
    image = np.concatenate([crops(16, 2)[0], crops(16, 2)[1][..., :2]], -1) / np.float32(255)
    mean = image.mean(-1, keepdims=True)
    grey = jitted("color")(image, 0.25)
    np.testing.assert_allclose(grey, mean + 0.25 * (image - mean), atol=1e-6)
    level, flat = np.floor(image.mean() * 255 + 0.5) / 255, jitted("contrast")(image, 0.25)
    np.testing.assert_allclose(flat, level + 0.25 * (image - level), atol=1e-5)


def test_blur_is_scipys():
    image = crops((17, 24), 1)[0] / np.float32(255)
    actual = jax.jit(ops.gaussian_blur, static_argnames="radius")(image, 1.3, radius=4)
    expected = ndimage.gaussian_filter(
        np.float64(image), 1.3, mode="nearest", radius=4, axes=(0, 1)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-6)


# --- work on some rows


@pytest.mark.parametrize("size", [1, 12, 16, 40])
@pytest.mark.parametrize("taken", [1, 3])
def test_map_rows_changes_the_selected_rows_and_no_other(size, taken, monkeypatch):
    assert jax.device_count() == 8  # 16 and 40 rows move in 8 groups, 12 in 4, one in 1
    monkeypatch.setitem(rows._PIXELS, "cpu", taken * 4 * 5)
    rng = np.random.default_rng(0)
    images = rng.random((size, 4, 5, 2), np.float32)
    factor = rng.random(size, np.float32)
    run = jax.jit(functools.partial(map_rows, lambda image, f: f * image))
    for select in (rng.random(size) < 0.4, np.zeros(size, bool), np.ones(size, bool)):
        actual = run(select, images, factor)
        expected = np.where(
            select[:, None, None, None], factor[:, None, None, None] * images, images
        )
        np.testing.assert_array_equal(actual, expected)


def test_map_rows_under_vmap():
    rng = np.random.default_rng(0)
    images, select = rng.random((3, 8, 4, 4, 1), np.float32), rng.random((3, 8)) < 0.5
    run = jax.jit(jax.vmap(functools.partial(map_rows, ops.invert)))
    actual = run(select, images)
    np.testing.assert_array_equal(
        actual, np.where(select[..., None, None, None], 1 - images, images)
    )
