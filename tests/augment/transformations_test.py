"""Sets of transformations against NumPy: turns by np.rot90, channels by their letters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.augment.transformations import TRANSFORMATIONS, transformed

ORDERS = ["RGB", "RBG", "GRB", "GBR", "BRG", "BGR"]
CYCLIC = ["RGB", "GBR", "BRG"]
# name -> degrees, orders; the views are all pairs, degrees outside
SETS = {
    "none": ([0], ["RGB"]),
    "rotation": ([0, 90, 180, 270], ["RGB"]),
    "rotation2": ([0, 180], ["RGB"]),
    "color_perm": ([0], ORDERS),
    "color_perm3": ([0], CYCLIC),
    "rot_color_perm6": ([0, 180], CYCLIC),
    "rot_color_perm12": ([0, 90, 180, 270], CYCLIC),
    "rot_color_perm24": ([0, 90, 180, 270], ORDERS),
}
SIZES = dict(zip(SETS, (1, 4, 2, 6, 3, 6, 12, 24), strict=True))
IMAGES = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)


def views(image, name):
    """All views of one image, by hand."""
    degrees, orders = SETS[name]
    return [
        np.rot90(image, angle // 90)[..., ["RGB".index(channel) for channel in order]]
        for angle in degrees
        for order in orders
    ]


def test_these_are_all_sets():
    assert {name: len(found) for name, found in TRANSFORMATIONS.items()} == SIZES


@pytest.mark.parametrize("name", SETS)
def test_row_i_m_plus_j_is_view_j_of_image_i(name):
    found = np.asarray(transformed(IMAGES, name))
    size = SIZES[name]
    np.testing.assert_array_equal(found, np.concatenate([views(x, name) for x in IMAGES]))
    np.testing.assert_array_equal(found[::size], IMAGES)  # the identity comes first
    assert len(np.unique(found[:size].reshape(size, -1), axis=0)) == size  # no view twice


def test_turns_are_counter_clockwise():
    image = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    turned = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    np.testing.assert_array_equal(transformed(image[None, ..., None], "rotation")[..., 0], turned)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compiled_it_moves_pixels_and_nothing_else(dtype):
    images = jnp.asarray(IMAGES, dtype)
    found = jax.jit(transformed, static_argnums=1)(images, "rot_color_perm24")
    assert found.dtype == dtype
    expected = np.concatenate([views(x, "rot_color_perm24") for x in np.float32(images)])
    np.testing.assert_array_equal(np.float32(found), expected)


def test_what_needs_no_square_and_no_colours_takes_any_image():
    wide, grey = IMAGES[:, :2], IMAGES[..., :1]
    for name in ("none", "rotation2", "color_perm", "color_perm3", "rot_color_perm6"):
        expected = np.concatenate([views(x, name) for x in wide])
        np.testing.assert_array_equal(transformed(wide, name), expected)
    expected = [np.rot90(x, turns) for x in grey for turns in range(4)]
    np.testing.assert_array_equal(transformed(grey, "rotation"), expected)


QUARTERS = ("rotation", "rot_color_perm12", "rot_color_perm24")
COLOURS = tuple(name for name in SETS if "color" in name)


@pytest.mark.parametrize(
    "images, name, message",
    [
        *((IMAGES[:, :2], n, rf"inputs must be square for '{n}'; given 2x4") for n in QUARTERS),
        *(
            (IMAGES[..., :1], n, rf"inputs must have 3 channels for '{n}'; given 1")
            for n in COLOURS
        ),
        (IMAGES, "rotations", r"transformations must be one of .* 'rotations'; did you mean 'rot"),
        (np.uint8(IMAGES), "none", r"inputs must be images of floats \[B, H, W, C\]; given uint8"),
        (IMAGES[0], "rotation", r"inputs must be images of floats .* given float32\(4, 4, 3\)"),
        ({"image": IMAGES}, "rotation", "inputs must be one array of images; given dict"),
    ],
)
def test_what_cannot_be_transformed_is_refused(images, name, message):
    with pytest.raises(ValueError, match=message):
        transformed(images, name)
