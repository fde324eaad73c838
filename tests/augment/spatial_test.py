import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from saflex_jax.augment.base import OPERATIONS
from saflex_jax.augment.spatial import (
    affine,
    blur,
    cutout,
    flip,
    random_erasing,
    resized_crop,
    shift,
    soft_crop,
)
from saflex_jax.types import Batch

KEY = jax.random.key(11)
AUGMENTS = {
    "flip": flip(),
    "shift": shift(3, padding="reflect"),
    "affine": affine(degrees=30.0, scale=0.2, shear=0.1, fill=0.5),
    "resized_crop": resized_crop((0.2, 0.9)),
    "cutout": cutout(5, fill=0.25),
    "random_erasing": random_erasing(0.9, fill=0.25),
    "blur": blur((0.4, 1.5), probability=0.9),
    "soft_crop": soft_crop(4.0, fill=0.25),
}


def batch_of(inputs, labels=None):
    """Rows whose indices are not their places."""
    size = len(inputs)
    labels = np.eye(4, dtype=np.float32)[np.arange(size) % 4] if labels is None else labels
    index = np.random.default_rng(5).permutation(10 * size)[:size].astype(np.int32)
    return Batch(inputs, labels, np.ones(size, bool), index)


def run(augment, batch, key=KEY):
    """What the compiled augmentation makes, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(augment)(key, batch))


def noise(size, height, width, channels=1, seed=0):
    """f32 in (0, 1), exact in bfloat16; no value occurs as a fill of these tests."""
    values = np.random.default_rng(seed).integers(1, 127, (size, height, width, channels))
    return (values / 128 + (values % 32 == 0) / 128).astype(np.float32)


def ruler(height, width):
    """f32[H, W, 3]: x and y of the pixels' centres, which bilinear interpolation keeps, and one."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([x, y, np.ones_like(x)], -1).astype(np.float32)


def unclamped(measured, height, width):
    """Where a warped ruler is neither outside nor in the half pixel that repeats the border."""
    x, y, one = np.moveaxis(measured, -1, 0)
    return (
        (one > 1 - 1e-5)
        & ((x > 0.5 + 1e-3) & (x < width - 0.5 - 1e-3))
        & ((y > 0.5 + 1e-3) & (y < height - 0.5 - 1e-3))
    )


def assert_independent(columns):
    limit = 4 / np.sqrt(len(columns[0]))
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < limit


def magnitude(augmented):
    return np.asarray(augmented.trace.magnitude[:, 0], np.float64)


# --- flip and shift


def test_flip_mirrors_its_share():
    batch = batch_of(noise(800, 3, 5))
    augmented = run(flip(0.3), batch)
    use = magnitude(augmented) == 1
    assert set(magnitude(augmented)) == {0, 1}
    mirror = np.flip(batch.inputs, 2)
    expected = np.where(use[:, None, None, None], mirror, batch.inputs)
    np.testing.assert_array_equal(augmented.inputs, expected)
    assert stats.binomtest(int(use.sum()), use.size, 0.3).pvalue > 1e-4


@pytest.mark.parametrize(("padding", "mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_shift_is_a_crop_of_the_padded_image_at_a_uniform_place(padding, mode):
    batch = batch_of(noise(500, 5, 7, 2))
    augmented = run(shift(2, padding=padding), batch)
    padded = np.pad(batch.inputs, ((0, 0), (2, 2), (2, 2), (0, 0)), mode=mode)
    hits, distance = np.zeros((5, 5)), []
    for image, around in zip(augmented.inputs, padded):
        here = [
            (r, c)
            for r in range(5)
            for c in range(5)
            if np.array_equal(image, around[r : r + 5, c : c + 7])
        ]
        assert len(here) == 1
        hits[here[0]] += 1
        distance.append(math.dist(here[0], (2, 2)))
    assert stats.chisquare(hits.ravel()).pvalue > 1e-4
    np.testing.assert_allclose(magnitude(augmented), distance, rtol=1e-6)


# --- affine


def test_affine_is_the_documented_map():
    size, height, width = 400, 11, 15
    options = {"degrees": 40.0, "scale": 0.3, "shear": 0.2, "fill": 0.125}
    augment = affine(**options)
    rulers = batch_of(np.tile(ruler(height, width), (size, 1, 1, 1)))
    batch = rulers._replace(inputs=noise(size, height, width, 3))
    measured = run(augment, rulers)
    augmented = run(augment, batch).inputs
    nearest = run(affine(interpolation="nearest", **options), batch).inputs
    centre = np.array([width, height]) / 2
    offset = ruler(height, width)[..., :2] - centre  # r = (x, y)

    drawn = []
    for row, image in enumerate(np.asarray(measured.inputs, np.float64)):
        inside = unclamped(image, height, width)
        matrix = np.linalg.lstsq(offset[inside], image[inside][:, :2] - centre, rcond=None)[0].T
        angle = np.arctan2(matrix[1, 0], matrix[0, 0])
        cos, sin = np.cos(angle), np.sin(angle)
        upper = np.array([[cos, sin], [-sin, cos]]) @ matrix
        np.testing.assert_allclose([upper[1, 0], upper[1, 1] - upper[0, 0]], 0, atol=1e-4)
        drawn.append([np.rad2deg(angle), upper[0, 0] - 1, upper[0, 1]])
        if row >= 25:
            continue
        where = offset @ matrix.T + centre
        # Two programs may disagree on which side of an edge a pixel is whose centre is on it.
        edge = (np.abs(where) < 1e-3) | (np.abs(where - [width, height]) < 1e-3)
        sure = ~edge.any(-1)
        coefficients = np.column_stack([matrix, centre - matrix @ centre]).ravel()
        pixel = np.array([height - 1, width - 1]) / 2
        for channel in range(3):
            original = batch.inputs[row, ..., channel]
            pillow = Image.fromarray(original).transform(
                (width, height),
                Image.Transform.AFFINE,
                coefficients,
                Image.Resampling.BILINEAR,
                fillcolor=options["fill"],
            )
            out = augmented[row, ..., channel]
            np.testing.assert_allclose(out[sure], np.asarray(pillow)[sure], atol=1e-4)
            swapped = matrix[::-1, ::-1]  # SciPy counts (rows, columns)
            scipy = ndimage.affine_transform(
                np.float64(original), swapped, pixel - swapped @ pixel, order=1
            )
            np.testing.assert_allclose(out[inside], scipy[inside], atol=1e-4)
        fraction = where % 1
        clear = sure & (np.minimum(fraction, 1 - fraction) > 1e-3).all(-1)
        x, y = np.moveaxis(np.floor(where).astype(int), -1, 0)
        visible = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        expected = batch.inputs[row][y.clip(0, height - 1), x.clip(0, width - 1)]
        expected = np.where(visible[..., None], expected, options["fill"])
        np.testing.assert_array_equal(nearest[row][clear], expected[clear])

    np.testing.assert_allclose(magnitude(measured), np.transpose(drawn)[0], atol=2e-3)
    columns = [v / options[n] for v, n in zip(np.transpose(drawn), ("degrees", "scale", "shear"))]
    for values in columns:
        assert np.abs(values).max() <= 1 + 1e-3
        assert stats.kstest(values, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert_independent(columns)


def test_a_positive_angle_turns_counter_clockwise():
    batch = batch_of(noise(8, 9, 9))
    augmented = run(affine(degrees=180.0), batch)
    inner = np.hypot(*(np.mgrid[:9, :9] - 4)) < 4  # the same pixels of both programs are inside
    for image, angle, out in zip(batch.inputs, magnitude(augmented), augmented.inputs):
        turned = Image.fromarray(image[..., 0]).rotate(angle, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(out[..., 0][inner], np.asarray(turned)[inner], atol=1e-4)


# --- crops


def boxes(augmented, height, width):
    """f64[B, 4] (top, left, rows, columns) of the box that each warped ruler shows."""

    def line(values, low, high):  # x_in = start + share of the box
        keep = (values > low + 1e-3) & (values < high - 1e-3)
        slope, start = np.polyfit((np.arange(len(values)) + 0.5)[keep], values[keep], 1)
        return start, slope * len(values)

    rows = []
    for image in np.asarray(augmented.inputs, np.float64):
        left, columns = line(image[0, :, 0], 0.5, width - 0.5)
        top, lines = line(image[:, 0, 1], 0.5, height - 0.5)
        rows.append([top, left, lines, columns])
    return np.array(rows)


def test_resized_crop_draws_its_box():
    size, height, width = 500, 16, 24
    augment = resized_crop((0.1, 0.4), (1.0, 1.6))
    rulers = batch_of(np.tile(ruler(height, width), (size, 1, 1, 1)))
    augmented = run(augment, rulers)
    top, left, rows, columns = boxes(augmented, height, width).T
    share = rows * columns / (height * width)
    np.testing.assert_allclose(magnitude(augmented), share, rtol=1e-3)
    places = top / (height - rows), left / (width - columns)
    units = [(share - 0.1) / 0.3, np.log(columns / rows) / np.log(1.6), *places]
    for values in units:
        assert values.min() > -1e-3 and values.max() < 1 + 1e-3
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert_independent(units)

    batch = rulers._replace(inputs=noise(size, height, width, 3))
    out = run(augment, batch).inputs
    for row in range(20):
        box = (left[row], top[row], left[row] + columns[row], top[row] + rows[row])
        pillow = Image.fromarray(batch.inputs[row, ..., 1]).resize(
            (width, height), Image.Resampling.BILINEAR, box=box
        )
        np.testing.assert_allclose(out[row, ..., 1], np.asarray(pillow), atol=1e-3)


def test_resized_crop_cuts_what_is_longer_than_the_image():
    height, width = 8, 30
    rulers = batch_of(np.tile(ruler(height, width), (300, 1, 1, 1)))
    augmented = run(resized_crop((0.2, 1.0)), rulers)
    top, left, rows, columns = boxes(augmented, height, width).T
    for start, side, limit in [(top, rows, height), (left, columns, width)]:
        assert start.min() > -1e-3 and (start + side).max() < limit + 1e-3
    cut = rows > height - 1e-3
    assert 0.2 < cut.mean() < 1
    share = rows * columns / (height * width)
    np.testing.assert_allclose(magnitude(augmented), share, rtol=1e-3)
    assert share[~cut].min() > 0.2 - 1e-3


def int_normal(k, deviation):
    """P(int(N(0, deviation)) = k): the C cast towards zero, so that 0 has two unit intervals."""
    low, high = (-1, 1) if k == 0 else (k, k + 1) if k > 0 else (k - 1, k)
    return stats.norm(0, deviation).cdf(high) - stats.norm(0, deviation).cdf(low)


@pytest.mark.parametrize(("power", "floor"), [(2.0, None), (3.5, 0.4)])
def test_soft_crop_softens_the_label_by_what_is_lost(power, floor):
    size, height, width, classes, deviation = 1500, 5, 7, 4, 3.0
    labels = np.random.default_rng(1).dirichlet(np.ones(classes), size).astype(np.float32)
    labels[::2] = np.eye(classes)[np.arange(size // 2) % classes]
    inputs = noise(size, height, width, 2)
    inputs[..., 0] = 1
    batch = batch_of(inputs, labels)
    augmented = run(soft_crop(deviation, power=power, floor=floor, fill=0.0), batch)
    out, visible = augmented.inputs, augmented.inputs[..., 0] == 1
    assert ((out[..., 0] == 0) | visible).all()
    np.testing.assert_array_equal(
        visible.sum((1, 2)), np.round(magnitude(augmented) * height * width)
    )

    # The source's formula, on each class that the prior mixes.
    chance = 1 / classes
    lost = 1 - visible.mean((1, 2))
    p = 1 - (1 - (chance if floor is None else floor)) * lost**power
    other = (1 - p) / (classes - 1)
    expected = labels * p[:, None] + (1 - labels) * other[:, None]
    np.testing.assert_allclose(augmented.labels, expected, atol=1e-6)

    # Offsets, from where the image still is.
    seen = visible.any((1, 2))
    offsets = []
    for axis, side in ((2, height), (1, width)):
        there = visible.any(axis)[seen]
        after, before = there.argmax(1), there[:, ::-1].argmax(1)  # empty lines before, after
        t = before - after
        np.testing.assert_array_equal(there.sum(1), side - np.abs(t))
        values = np.arange(1 - side, side)
        law = np.array([int_normal(k, deviation) for k in values])
        hits = np.array([(t == k).sum() for k in values])
        assert stats.chisquare(hits, hits.sum() * law / law.sum()).pvalue > 1e-4
        offsets.append(t)
    assert_independent(offsets)
    for row, down, right in list(zip(np.flatnonzero(seen), *offsets))[:30]:
        around = np.pad(inputs[row, ..., 1], ((height, height), (width, width)))
        at = around[height + down : 2 * height + down, width + right : 2 * width + right]
        np.testing.assert_array_equal(out[row, ..., 1], at)
    # |t| = side is drawn, on one axis or on both, and never more: the law ends there.
    inside = []
    for side in (height, width):
        law = {k: int_normal(k, deviation) for k in range(-side, side + 1)}
        inside.append(1 - (law[side] + law[-side]) / sum(law.values()))
    assert stats.binomtest(int((~seen).sum()), size, 1 - math.prod(inside)).pvalue > 1e-4


# --- erasing


def assert_shares(augmented, mask):
    """The magnitude is the share of the mask's pixels, to the rounding of one f32 division."""
    np.testing.assert_allclose(magnitude(augmented), mask.mean((1, 2)), rtol=2e-7)


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_is_a_square_about_a_uniform_pixel(side):
    height, width, size = 7, 9, 1300
    batch = batch_of(noise(size, height, width, 2))
    augmented = run(cutout(side, fill=0.25), batch)
    erased = (augmented.inputs == 0.25).all(-1)
    kept = np.where(erased[..., None], 0.25, batch.inputs)
    np.testing.assert_array_equal(augmented.inputs, kept)
    assert_shares(augmented, erased)
    y, x = np.mgrid[:height, :width]

    def near(place, centre):
        return (place - centre >= -(side // 2)) & (place - centre < side - side // 2)

    centre_of = {
        (near(y, row) & near(x, column)).tobytes(): (row, column)
        for row in range(height)
        for column in range(width)
    }
    assert len(centre_of) == height * width
    hits = np.zeros((height, width))
    for mask in erased:
        hits[centre_of[mask.tobytes()]] += 1
    assert stats.chisquare(hits.ravel()).pvalue > 1e-4


def erased_boxes(augmented, fill):
    """(mask bool[B, H, W], rows, columns) of erased pixels; checks that they fill a rectangle."""
    mask = (augmented.inputs == fill).all(-1)
    down, across = mask.any(2), mask.any(1)
    for line in (down, across):  # one run of pixels
        edges = np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int), axis=1)
        assert (np.abs(edges).sum(1) <= 2).all()
    np.testing.assert_array_equal(mask, down[:, :, None] & across[:, None])
    assert_shares(augmented, mask)
    return mask, down.sum(1), across.sum(1)


def test_random_erasing_draws_area_and_ratio():
    size, height, width, pixels = 400, 64, 60, 64 * 60
    batch = batch_of(noise(size, height, width))
    augment = random_erasing(0.6, (0.05, 0.3), (0.5, 1.5), fill=0.25)
    augmented = run(augment, batch)
    mask, rows, columns = erased_boxes(augmented, 0.25)
    np.testing.assert_array_equal(
        augmented.inputs, np.where(mask[..., None], np.float32(0.25), batch.inputs)
    )
    use = rows > 0
    assert stats.binomtest(int(use.sum()), size, 0.6).pvalue > 1e-4
    rows, columns = rows[use], columns[use]
    slack = (rows + columns) / 2 + 0.25  # both sides are rounded
    assert (rows * columns + slack >= 0.05 * pixels).all()
    assert (rows * columns - slack <= 0.3 * pixels).all()
    assert ((columns + 0.5) / (rows - 0.5) >= 0.5).all()
    assert ((columns - 0.5) / (rows + 0.5) <= 1.5).all()
    units = (
        (rows * columns / pixels - 0.05) / 0.25,
        np.log(columns / rows / 0.5) / np.log(3),
    )
    for values in units:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert_independent(units)


def test_random_erasing_places_its_box_uniformly():
    batch = batch_of(noise(900, 8, 10))
    augment = random_erasing(1.0, (0.25, 0.25), (1.0, 1.0), fill=0.25)
    mask, rows, columns = erased_boxes(run(augment, batch), 0.25)
    assert set(rows) == set(columns) == {4}  # the root of 20, rounded
    hits = np.zeros((5, 7))
    np.add.at(hits, (mask.any(2).argmax(1), mask.any(1).argmax(1)), 1)
    assert stats.chisquare(hits.ravel()).pvalue > 1e-4


# --- blur


def test_blur_is_gaussian():
    size, low, high = 400, 0.3, 1.5
    batch = batch_of(noise(size, 7, 9, 3))
    augmented = run(blur((low, high), probability=0.7), batch)
    sigma = magnitude(augmented)
    use = sigma > 0
    assert stats.binomtest(int(use.sum()), size, 0.7).pvalue > 1e-4
    np.testing.assert_array_equal(augmented.inputs[~use], batch.inputs[~use])
    assert stats.kstest(sigma[use], stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for row in np.flatnonzero(use)[:40]:
        expected = ndimage.gaussian_filter(
            np.float64(batch.inputs[row]), sigma[row], mode="nearest", radius=5, axes=(0, 1)
        )
        np.testing.assert_allclose(augmented.inputs[row], expected, atol=1e-5)


# --- the contract


def contract(name):
    """(augmentation compiled, batch, what it makes of the batch)."""
    augment, batch = jax.jit(AUGMENTS[name]), batch_of(noise(12, 9, 14, 3))
    return augment, batch, jax.device_get(augment(KEY, batch))


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_sample_depends_on_its_index_alone(name):
    augment, batch, whole = contract(name)
    size = len(batch.index)
    assert jax.tree.map(np.shape, whole._replace(trace=None)) == jax.tree.map(np.shape, batch)
    np.testing.assert_array_equal(whole.index, batch.index)
    np.testing.assert_array_equal(whole.mask, batch.mask)
    np.testing.assert_array_equal(whole.trace.operation, np.full((size, 1), OPERATIONS.index(name)))
    np.testing.assert_array_equal(whole.trace.partner[:, 0], batch.index)
    assert whole.trace.magnitude.dtype == jnp.float32
    other = augment(jax.random.key(12), batch)
    assert np.abs(np.asarray(other.inputs) - whole.inputs).max() > 1e-2
    # Other places.
    rows = np.random.default_rng(2).integers(size, size=size)
    there = augment(KEY, jax.tree.map(lambda x: x[rows], batch))
    close = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, there, jax.tree.map(lambda x: x[rows], whole))
    # Every index draws its own.
    alike = augment(KEY, batch._replace(inputs=np.tile(batch.inputs[:1], (size, 1, 1, 1))))
    assert len(np.unique(alike.inputs, axis=0)) > (1 if name == "flip" else 6)
    # Another number of rows, channels and another dtype.
    few = jax.tree.map(lambda x: x[:5], batch)
    five = jax.ShapeDtypeStruct((5, 9, 14, 5), jnp.bfloat16)
    abstract = jax.eval_shape(AUGMENTS[name], KEY, few._replace(inputs=five))
    assert abstract.inputs == five and abstract.labels.dtype == batch.labels.dtype


@pytest.mark.parametrize("name", ["affine", "soft_crop"])
def test_half_precision_is_rounded_once_and_channels_are_independent(name):
    # `affine` stands for all that `per_image` makes.
    augment, batch, whole = contract(name)
    few = jax.tree.map(lambda x: x[4:9], batch)  # another number of rows, too
    five = np.concatenate([few.inputs, few.inputs[..., :2]], -1).astype(jnp.bfloat16)
    half = jax.device_get(augment(KEY, few._replace(inputs=five)))
    assert half.inputs.dtype == jnp.bfloat16
    images = np.float32(half.inputs)
    np.testing.assert_allclose(images[..., :3], whole.inputs[4:9], rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(images[..., 3:], images[..., :2])
    np.testing.assert_allclose(half.labels, whole.labels[4:9], atol=1e-6)


def test_compiled_or_not_the_result_is_the_same():
    _, batch, whole = contract("flip")
    close = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, AUGMENTS["flip"](KEY, batch), whole)


@pytest.mark.parametrize(
    "augment",
    [
        flip(0),
        shift(0),
        affine(),
        resized_crop((1.0, 1.0), (1.0, 1.0)),
        cutout(0),
        random_erasing(0),
        blur(probability=0),
        soft_crop(0.0),
    ],
    ids=AUGMENTS,
)
def test_parameters_that_change_nothing_are_the_identity(augment):
    batch = batch_of(noise(4, 6, 6))
    augmented = run(augment, batch)
    np.testing.assert_allclose(augmented.inputs, batch.inputs, atol=1e-6)
    np.testing.assert_array_equal(augmented.labels, batch.labels)


@pytest.mark.parametrize(
    ("make", "name", "given"),
    [
        (partial(flip, 1.5), "probability", "1.5"),
        (partial(shift, -1), "pixels", "-1"),
        (partial(shift, 1.5), "pixels", "1.5"),
        (partial(shift, 1, padding="wrap"), "padding", "'wrap'"),
        (partial(affine, degrees=-1.0), "degrees", "-1.0"),
        (partial(affine, degrees=math.inf), "degrees", "inf"),
        (partial(affine, shear=-0.1), "shear", "-0.1"),
        (partial(affine, shear=math.nan), "shear", "nan"),
        (partial(affine, scale=1.0), "scale", "1.0"),
        (partial(affine, scale=-0.1), "scale", "-0.1"),
        (partial(affine, fill=2.0), "fill", "2.0"),
        (partial(affine, interpolation="cubic"), "interpolation", "'cubic'"),
        (partial(resized_crop, (0.5, 0.1)), "scale", r"\(0.5, 0.1\)"),
        (partial(resized_crop, (0.5, 1.1)), "scale", r"\(0.5, 1.1\)"),
        (partial(resized_crop, ratio=(0.0, 1.0)), "ratio", "0.0"),
        (partial(resized_crop, ratio=(1.0, math.inf)), "ratio", "inf"),
        (partial(resized_crop, interpolation="cubic"), "interpolation", "'cubic'"),
        (partial(cutout, -1), "side", "-1"),
        (partial(cutout, 2.5), "side", "2.5"),
        (partial(cutout, 2, fill=-0.1), "fill", "-0.1"),
        (partial(random_erasing, -0.1), "probability", "-0.1"),
        (partial(random_erasing, 0.5, (-0.1, 0.2)), "scale", r"\(-0.1, 0.2\)"),
        (partial(random_erasing, 0.5, (0.1, 0.2), (2.0, 1.0)), "ratio", r"\(2.0, 1.0\)"),
        (partial(random_erasing, fill=math.nan), "fill", "nan"),
        (partial(blur, (0.0, 1.0)), "sigma", "0.0"),
        (partial(blur, (0.1, math.inf)), "sigma", "inf"),
        (partial(blur, probability=1.1), "probability", "1.1"),
        (partial(soft_crop, -1.0), "deviation", "-1.0"),
        (partial(soft_crop, math.inf), "deviation", "inf"),
        (partial(soft_crop, 1.0, power=0.0), "power", "0.0"),
        (partial(soft_crop, 1.0, fill=1.5), "fill", "1.5"),
        (lambda: soft_crop(1.0, floor=0.2)(KEY, batch_of(noise(4, 6, 6))), "floor", "0.2"),
    ],
)
def test_bad_arguments_are_named(make, name, given):
    with pytest.raises(ValueError, match=f"^{name} must .*given {given}"):
        make()


@pytest.mark.parametrize("name", AUGMENTS)
def test_inputs_that_are_no_images_are_refused(name):
    images = batch_of(noise(4, 6, 6))
    for inputs, given in [
        ({"image": images.inputs}, "dict"),
        (images.inputs[..., 0], r"float32\(4, 6, 6\)"),
        (np.uint8(255 * images.inputs), r"uint8\(4, 6, 6, 1\)"),
    ]:
        with pytest.raises(ValueError, match=f"^inputs must be .*images.*; given {given}"):
            AUGMENTS[name](KEY, images._replace(inputs=inputs))
