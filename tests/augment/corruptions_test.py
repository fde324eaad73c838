import colorsys
import functools
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from saflex_jax.augment import corruptions
from saflex_jax.augment.corruptions import CORRUPTIONS, NAMES, corrupt, plasma
from tests.augment.photos import crops

KEY = jax.random.key(7)
RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "fog", "snow",
}  # fmt: skip
SEVERITIES = range(1, 6)
# Kinds whose constants may be traced, so that all severities share one program.
TRACED = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog", "brightness",
    "contrast", "saturate",
}  # fmt: skip
SMALL, LARGE = "small", "large"  # the severities of CIFAR-10-C and of ImageNet-C
SIDE = 32
jitted = jax.jit(corrupt, static_argnames=("name", "severity"))


def photos(count=6, size=SIDE, **options):
    return crops(size, count, **options).astype(np.float32) / 255


@functools.partial(jax.jit, static_argnames="name")
def traced(key, images, constants, *, name):
    """What `corrupt` does, with constants that need not be known when it is compiled."""

    def one(index, image):
        return CORRUPTIONS[name].op(jax.random.fold_in(key, index), image, constants)

    return jnp.clip(jax.vmap(one)(jnp.arange(len(images)), images), 0, 1)


def eager(key, images, *, name, severity, severities):
    """`corrupt` with the severities of either size, whatever that of the images is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "LARGE", 0 if severities == LARGE else 10_000)
        return corrupt(key, images, name=name, severity=severity)


compiled = jax.jit(eager, static_argnames=("name", "severity", "severities"))


def corrupted(images, name, severity, severities=SMALL):
    if name in TRACED:
        constants = getattr(CORRUPTIONS[name], severities)[severity - 1]
        return np.asarray(traced(KEY, images, jax.tree.map(float, constants), name=name))
    # Eagerly severities share what is compiled, save where shapes go with the severity.
    apply = compiled if name in ("gaussian_blur", "defocus_blur") else eager
    return np.asarray(apply(KEY, images, name=name, severity=severity, severities=severities))


def each_severity(small, large):
    """(severities, severity, constants): the published constants, typed anew."""
    return [
        pytest.param(severities, severity, constants, id=f"{severities}-{severity}")
        for severities, row in ((SMALL, small), (LARGE, large))
        for severity, constants in enumerate(row, 1)
    ]


# --- what holds for every kind


@pytest.mark.parametrize("shape", [(63, 80), (80, 63), (64, 80)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_smaller_side_and_severity_choose_the_constants(shape, severity, monkeypatch):
    def shown(key, image, constants):
        assert key.shape == () and image.shape == (*shape, 3)
        return image + constants

    small, large = 0.1 * np.arange(5), -0.1 * np.arange(5)
    monkeypatch.setitem(CORRUPTIONS, "contrast", corruptions.Corruption(shown, small, large))
    images = np.full((2, *shape, 3), 0.5, np.float32)
    images[1] = 1.0005  # an interpolation's rounding
    expected = (small if min(shape) < 64 else large)[severity - 1]
    images_out = corrupt(KEY, images, name="contrast", severity=severity)
    np.testing.assert_allclose(images_out[0], 0.5 + expected, atol=1e-6)
    np.testing.assert_allclose(images_out[1], min(1 + expected, 1), atol=1e-6)  # clipped


@pytest.mark.slow  # the tests of each kind know its constants, save of motion_blur and snow
@pytest.mark.parametrize("severities", [SMALL, LARGE])
@pytest.mark.parametrize("name", NAMES)
def test_severity_is_monotone_in_the_distance_to_the_clean_image(name, severities):
    images = photos(size=SIDE if severities == SMALL else 64)
    worse = [corrupted(images, name, severity, severities) for severity in SEVERITIES]
    assert all(m.min() >= 0 and m.max() <= 1 for m in worse)
    steps = np.diff([np.sqrt(np.mean((m - images) ** 2)) for m in worse])
    if name == "saturate":  # less colour at 1 and 2, more from 3 on
        steps = steps[[0, 2, 3]]
    if name == "motion_blur" and severities == SMALL:  # radius 6 and 8 at sigma 2: alike to 1e-7
        np.testing.assert_allclose(worse[2], worse[3], atol=1e-6)
        steps = steps[[0, 1, 3]]
    if name == "fog" and severities == LARGE:  # of one strength at 3 and 4, with a rougher cloud
        steps = steps[[0, 1, 3]]
    assert (steps > 0).all(), steps
    assert np.abs(worse[0] - images).max() > 2 / 255


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_of_any_shape_each_by_its_index_and_itself_alone(name):
    images, index = photos(6, (9, 21), grey=True), np.arange(6)

    def apply(images, index, key=KEY):
        return np.asarray(jitted(key, images, name=name, severity=3, index=index))

    out = apply(images, index)
    assert out.dtype == np.float32 and out.shape == images.shape
    assert out.min() >= 0 and out.max() <= 1
    assert (np.abs(out - images).max() > 2 / 255) == (name != "saturate")
    np.testing.assert_array_equal(apply(images, index), out)
    # Another place, among other images and other indices.
    others = images[[2, 0, 3, 1, 5, 4]]
    others[2:] = 0.1
    moved = apply(others, np.array([2, 0, 11, 12, 13, 14]))
    np.testing.assert_array_equal(moved[:2], out[[2, 0]])
    # The draw is the index's and the key's, where there is one.
    same = apply(images[:1].repeat(6, 0), index)
    other_key = apply(images, index, jax.random.key(8))
    if name in RANDOM:
        assert all(np.abs(a - b).max() > 1e-3 for n, a in enumerate(same) for b in same[:n])
        assert np.abs(other_key - out).max() > 1e-2
    else:
        np.testing.assert_array_equal(same, same[:1].repeat(6, 0))
        np.testing.assert_array_equal(other_key, out)
    shape = jax.ShapeDtypeStruct((2, 1, 70, 2), jnp.bfloat16)
    abstract = jax.eval_shape(functools.partial(corrupt, name=name, severity=5), KEY, shape)
    assert (abstract.shape, abstract.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in RANDOM | {"saturate", "jpeg_compression"}]
)
def test_grey_is_as_the_same_in_three_channels(name):
    grey = photos(6, grey=True)
    images = np.concatenate([grey, grey, grey], -1)
    rgb = corrupted(images, name, 3)
    np.testing.assert_allclose(rgb, rgb[..., :1].repeat(3, -1), atol=1e-6)
    if name in ("gaussian_blur", "contrast"):
        np.testing.assert_allclose(rgb[..., :1], corrupted(grey, name, 3), atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_noise", "contrast"])
def test_half_precision_is_rounded_once_and_indices_are_places_by_default(name):
    half = photos().astype(jnp.bfloat16)
    out = jitted(KEY, half, name=name, severity=5)
    assert out.dtype == jnp.bfloat16
    exact = jitted(KEY, half.astype(np.float32), name=name, severity=5, index=np.arange(6))
    np.testing.assert_array_equal(out, np.asarray(exact).astype(jnp.bfloat16))


# --- noise


def flat(level):
    """Images of one value, enough for the tests of the distributions."""
    return np.full((6, SIDE, SIDE, 3), level, np.float32)


def assert_near(actual, expected, deviation):
    assert abs(actual - expected) < 5 * deviation, (actual, expected, deviation)


@pytest.mark.parametrize("name, level, shown", [
    ("gaussian_noise", 0.5, 1.0), ("speckle_noise", 0.5, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("severities, severity, deviations", each_severity(
    [(0.04, 0.06), (0.06, 0.1), (0.08, 0.12), (0.09, 0.16), (0.1, 0.2)],
    [(0.08, 0.15), (0.12, 0.2), (0.18, 0.35), (0.26, 0.45), (0.38, 0.6)],
))  # fmt: skip
def test_normal_noise(name, level, shown, severities, severity, deviations):
    sigma = shown * deviations[name == "speckle_noise"]
    off = corrupted(flat(level), name, severity, severities) - level
    off = off.astype(np.float64)
    inside = np.abs(off) < 0.5  # what was not clipped
    beyond = 2 * stats.norm.sf(0.5 / sigma)
    assert_near(1 - inside.mean(), beyond, np.sqrt(beyond / off.size) + 1e-9)
    normal = stats.truncnorm(-0.5 / sigma, 0.5 / sigma, scale=sigma)
    assert stats.kstest(off[inside], normal.cdf).pvalue > 1e-4
    pairs = [off[..., 0] * off[..., 1], off[:, 1:] * off[:, :-1], off[1:] * off[:-1]]
    for product in pairs:  # channels, pixels and rows are independent
        assert_near(product.mean(), 0.0, off.var() / np.sqrt(product.size))


@pytest.mark.parametrize(
    "severities, severity, photons", each_severity([500, 250, 100, 75, 50], [60, 25, 12, 5, 3])
)
def test_shot_noise_is_poisson(severities, severity, photons):
    level = 0.25
    counts = photons * corrupted(flat(level), "shot_noise", severity, severities).astype(np.float64)
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    law = stats.poisson(photons * level)
    edges = np.unique(law.ppf(np.linspace(0.1, 0.9, 9)))
    edges = edges[edges < photons]  # clipped from there on
    share = np.diff(np.concatenate([[0], law.cdf(edges), [1]]))
    hits = np.bincount(np.searchsorted(edges, np.round(counts).ravel()), minlength=len(share))
    assert stats.chisquare(hits, share * counts.size).pvalue > 1e-4


@pytest.mark.parametrize("severities, severity, share", each_severity(
    [0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]
))  # fmt: skip
def test_impulse_noise_is_salt_and_pepper(severities, severity, share):
    images = 0.2 + 0.6 * photos()
    noisy = corrupted(images, "impulse_noise", severity, severities)
    deviation = np.sqrt(share / 2 / noisy.size)
    assert_near((noisy == 0).mean(), share / 2, deviation)
    assert_near((noisy == 1).mean(), share / 2, deviation)
    hit = noisy != images
    assert set(np.unique(noisy[hit])) == {0.0, 1.0}
    both = (hit[..., 0] & hit[..., 1]).mean()  # channels are hit independently
    assert_near(both, share**2, np.sqrt(share**2 / hit[..., 0].size))


# --- blur, against SciPy


@pytest.mark.parametrize(
    "severities, severity, sigma", each_severity([0.4, 0.6, 0.7, 0.8, 1], [1, 2, 3, 4, 6])
)
def test_gaussian_blur_is_that_of_scipy(severities, severity, sigma):
    images = photos()
    expected = ndimage.gaussian_filter(
        np.float64(images), (0, sigma, sigma, 0), mode="nearest", truncate=4
    )
    np.testing.assert_allclose(
        corrupted(images, "gaussian_blur", severity, severities), expected, atol=1e-5
    )


@pytest.mark.parametrize("severities, severity, constants", each_severity(
    [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
))  # fmt: skip
def test_defocus_blur_is_a_softened_disk(severities, severity, constants):
    radius, sigma = constants
    y, x = np.mgrid[-10:11, -10:11] if radius > 8 else np.mgrid[-8:9, -8:9]
    disk = (np.hypot(y, x) <= radius).astype(float)
    kernel = ndimage.gaussian_filter(  # "mirror": the edge pixel is not doubled
        disk / disk.sum(), sigma, mode="mirror", radius=2 if radius > 8 else 1
    )
    images = photos()
    expected = ndimage.correlate(np.float64(images), kernel[None, :, :, None], mode="mirror")
    expected = np.clip(expected, 0, 1)
    np.testing.assert_allclose(
        corrupted(images, "defocus_blur", severity, severities), expected, atol=1e-5
    )


@pytest.mark.parametrize("severities, severity, factors", each_severity(
    [np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)],
    [np.arange(1, 1.11, 0.01), np.arange(1, 1.16, 0.01), np.arange(1, 1.21, 0.02),
     np.arange(1, 1.26, 0.02), np.arange(1, 1.31, 0.03)],
))  # fmt: skip
def test_zoom_blur_is_the_mean_of_scipys_zooms(severities, severity, factors):
    image = photos(1)[0]
    total = np.float64(image)
    for factor in factors:
        inner = int(np.ceil(SIDE / factor))
        first = (SIDE - inner) // 2
        middle = np.float64(image[first : first + inner, first : first + inner])
        zoomed = ndimage.zoom(middle, (factor, factor, 1), order=1)
        trim = (len(zoomed) - SIDE) // 2
        total += zoomed[trim : trim + SIDE, trim : trim + SIDE]
    blurred = corrupted(image[None], "zoom_blur", severity, severities)[0]
    np.testing.assert_allclose(blurred, total / (len(factors) + 1), atol=1e-5)


def streak(angle, radius, sigma, size):
    """The answer to a point at the centre: half a Gaussian, drawn pixel by pixel."""
    image, centre = np.zeros((size, size)), size // 2
    weights = [math.exp(-(n**2) / (2 * sigma**2)) for n in range(2 * radius + 1)]
    for n, weight in enumerate(weights):
        row = centre - math.ceil(n * math.sin(angle) - 0.5)
        image[row, centre - math.ceil(n * math.cos(angle) - 0.5)] += weight / sum(weights)
    return image


@pytest.mark.parametrize(
    "size, severity, radius, sigma",
    [(63, 5, 9, 2.5), pytest.param(99, 1, 10, 3, marks=pytest.mark.slow)],
)
def test_motion_blur_is_a_streak_at_a_uniform_angle(size, severity, radius, sigma):
    point = np.zeros((200, size, size, 1), np.float32)
    point[:, size // 2, size // 2] = 1
    apply = functools.partial(jitted, KEY, name="motion_blur", severity=severity)
    blurred = np.asarray(apply(point))[..., 0]
    np.testing.assert_allclose(blurred.sum((1, 2)), 1, atol=1e-5)
    grid = np.deg2rad(np.linspace(-45, 45, 1441))
    expected = np.stack([streak(angle, radius, sigma, size) for angle in grid])
    rows = slice(size // 2 - 2 * radius, size // 2 + 2 * radius + 1)
    columns = slice(size // 2 - 2 * radius, size // 2 + 1)
    blurred, expected = (
        np.float32(x[:, rows, columns]).reshape(len(x), -1) for x in (blurred, expected)
    )
    off = np.stack([np.abs(expected - b).max(1) for b in blurred])
    # A pixel may change sides between two angles of the grid: of the faint ones, and few.
    assert np.median(off.min(1)) < 1e-6 and off.min(1).max() < 0.02
    angles = grid[off.argmin(1)] / (math.pi / 2) + 0.5
    assert stats.kstest(angles, "uniform").pvalue > 1e-3
    # The border is repeated: one value stays one value.
    np.testing.assert_allclose(apply(np.full_like(point, 0.3)), 0.3, atol=1e-6)


# --- weather


@pytest.mark.parametrize("severities, severity, constants", each_severity(
    [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
))  # fmt: skip
def test_fog_adds_a_cloud_and_rescales(severities, severity, constants):
    strength, decay = constants
    images = photos()
    images[1:] *= 0.7
    foggy = corrupted(images, "fog", severity, severities)
    bright = images.max((1, 2, 3))[:, None, None, None]
    cloud = (foggy * (bright + strength) / bright - images) / strength
    np.testing.assert_allclose(cloud, cloud[..., :1].repeat(3, -1), atol=1e-4)
    np.testing.assert_allclose(cloud.min((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(cloud.max((1, 2, 3)), 1, atol=1e-4)
    for layer in cloud[..., 0]:
        residuals = displacements(layer.astype(np.float64))
        assert_decays(residuals[-3:], decay)  # the finest grids, with many points


def displacements(cloud):
    """Of every grid, coarse to fine: new points minus the mean of their four neighbours."""
    residuals, step = [], len(cloud)
    while step > 1:
        half = step // 2

        def around(offsets):
            return sum(np.roll(cloud, (-y, -x), (0, 1)) for y, x in offsets) / 4

        diagonal = cloud - around([(y, x) for y in (half, -half) for x in (half, -half)])
        straight = cloud - around([(half, 0), (-half, 0), (0, half), (0, -half)])
        residuals.append(np.concatenate([
            diagonal[half::step, half::step].ravel(), straight[::step, half::step].ravel(),
            straight[half::step, ::step].ravel(),
        ]))  # fmt: skip
        step = half
    return residuals


def assert_decays(residuals, decay):
    """Uniform, and smaller by decay^2 from grid to grid."""
    for coarse, fine in itertools.pairwise(residuals):
        error = np.sqrt(0.2 / coarse.size + 0.2 / fine.size)  # of the log of a ratio of deviations
        assert_near(np.log(coarse.std() / fine.std()), 2 * np.log(decay), error)


def test_plasma_is_diamond_square():
    cloud = np.asarray(jax.jit(lambda key: plasma(key, 100, 1.5))(KEY), np.float64)
    assert cloud.shape == (128, 128) and cloud.min() == 0 and cloud.max() == 1
    residuals = displacements(cloud)
    assert_decays(residuals[2:], 1.5)
    for residual in residuals[4:]:
        bound = np.sqrt(3) * residual.std()
        assert stats.kstest(residual, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4
        assert np.abs(residual).max() < 1.05 * bound
        between = np.corrcoef(residual.reshape(3, -1))[np.triu_indices(3, 1)]
        assert np.abs(between).max() < 5 / np.sqrt(residual.size / 3)


@pytest.mark.parametrize("severity, constants", [
    (1, (0.1, 0.2, 0.6, 0.95)), (2, (0.1, 0.2, 0.5, 0.9)),
])  # fmt: skip
def test_snow_whitens_and_falls_from_both_sides(severity, constants):
    mean, deviation, least, kept = constants  # at these two severities the flakes are not enlarged
    images = np.zeros((301, SIDE, SIDE, 1), np.float32)
    images[-1] = 0.2
    *fallen, bright = np.asarray(jitted(KEY, images, name="snow", severity=severity))[..., 0]
    np.testing.assert_allclose(bright.min(), kept * 0.2 + (1 - kept) * (0.2 * 1.5 + 0.5), atol=1e-5)
    snow = np.stack(fallen) - (1 - kept) * 0.5  # a black image is whitened to one half
    assert snow.min() > -1e-6
    np.testing.assert_allclose(snow.min((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(snow, snow[:, ::-1, ::-1], atol=1e-6)
    low, scaled = (least - mean) / deviation, (1 - mean) / deviation
    expected = mean * (stats.norm.cdf(scaled) - stats.norm.cdf(low)) + stats.norm.sf(scaled)
    expected += deviation * (stats.norm.pdf(low) - stats.norm.pdf(scaled))
    per_image = snow.mean((1, 2))
    assert_near(per_image.mean(), 2 * expected, per_image.std() / np.sqrt(len(snow)))
    off = snow - snow.mean()  # streaks run down, more than to the side
    assert (off[:, 1:] * off[:, :-1]).mean() > 1.5 * (off[..., 1:] * off[..., :-1]).mean()


def hsv(images, change):
    """The pixels with `change` applied to (hue, saturation, value), by the standard library."""
    pixels = np.float64(images).reshape(-1, 3)
    changed = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
    return np.reshape(changed, images.shape)


def palette():
    """Photographs with a black, a white and a grey corner."""
    images = photos()
    images[:, :4, :4], images[:, :4, -4:], images[:, -4:, :4] = 0, 1, 0.25
    return images


@pytest.mark.parametrize(
    "severities, severity, amount",
    each_severity([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
)
def test_brightness_adds_to_the_value_of_hsv(severities, severity, amount):
    images = palette()
    expected = hsv(images[:1], lambda h, s, v: (h, s, min(v + amount, 1)))
    np.testing.assert_allclose(
        corrupted(images, "brightness", severity, severities)[:1], expected, atol=1e-5
    )


# --- digital


@pytest.mark.parametrize("severities, severity, constants", each_severity(
    [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
))  # fmt: skip
def test_saturate_scales_the_saturation_of_hsv(severities, severity, constants):
    factor, offset = constants
    images = palette()
    expected = hsv(images[:1], lambda h, s, v: (h, min(factor * s + offset, 1), v))
    np.testing.assert_allclose(
        corrupted(images, "saturate", severity, severities)[:1], expected, atol=1e-4
    )


@pytest.mark.parametrize(
    "severities, severity, factor",
    each_severity([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
)
def test_contrast_draws_each_channel_to_its_mean(severities, severity, factor):
    images = photos()
    mean = np.float64(images).mean((1, 2))[:, None, None]
    expected = factor * images + (1 - factor) * mean
    np.testing.assert_allclose(
        corrupted(images, "contrast", severity, severities), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    "severities, severity, factor",
    each_severity([0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
)
def test_pixelate_is_pillows_box_filter(severities, severity, factor):
    pixels = crops((SIDE, SIDE + 9), 1)[0]
    image = Image.fromarray(pixels)
    small = [int(n * factor) for n in image.size]
    expected = np.asarray(
        image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)
    )
    pixelated = 255 * corrupted(np.float32(pixels[None] / 255), "pixelate", severity, severities)[0]
    # Pillow rounds each of the two axes once on the way down; on the way up pixels are copied.
    assert np.abs(pixelated - expected).max() <= 1 + 1e-3


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(
    "severities, severity, quality", each_severity([80, 65, 58, 50, 40], [25, 18, 15, 10, 7])
)
def test_jpeg_is_pillows(severities, severity, quality, grey):
    pixels = crops((SIDE, SIDE + 5) if grey else SIDE, 6, grey=grey)
    coded = corrupted(np.float32(pixels / 255), "jpeg_compression", severity, severities)
    coded, off = np.round(255 * coded), []
    for image, ours in zip(pixels, coded):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).reshape(image.shape).astype(int)
        off.append(np.abs(ours - expected))
    # libjpeg's transforms are in integers: a level here or there. A coefficient near the border of
    # two steps may fall to the other side, which moves one 8x8 block by a share of a step.
    assert np.mean(off) < 0.5 and (np.array(off) <= 2).mean() > 0.95
    assert np.mean(np.abs(coded - pixels)) > 3 * np.mean(off)


# --- errors


def test_the_registry_has_five_severities_of_every_kind():
    assert set(NAMES) == set(CORRUPTIONS) and len(NAMES) == 15
    assert all(len(kind.small) == len(kind.large) == 5 for kind in CORRUPTIONS.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "mist"}, "name must be one of .* given 'mist'"),
        ({"name": "zoom_blurr"}, "did you mean 'zoom_blur'"),
        ({"severity": 0}, "severity must be a whole number from 1 to 5; given 0"),
        ({"severity": 6}, "severity must be a whole number from 1 to 5; given 6"),
        ({"severity": 2.0}, "severity must be a whole number from 1 to 5; given 2.0"),
        ({"images": jnp.zeros((4, 4, 3))}, r"images must be images of floats \[B, H, W, C\]"),
        ({"images": jnp.zeros((2, 4, 4, 3), jnp.uint8)}, "images must be .* given uint8"),
        ({"images": jnp.full((2, 4, 4, 3), 255.0)}, r"images must lie in \[0, 1\]; given 255 to"),
        ({"images": jnp.full((2, 4, 4, 3), -0.5)}, r"images must lie in \[0, 1\]; given -0.5 to"),
        ({"images": jnp.full((2, 4, 4, 3), jnp.nan)}, "images must be finite"),
        ({"index": jnp.arange(3)}, r"index must have shape \[2\]; given \(3,\)"),
    ],
)
def test_errors_name_what_was_given(change, message):
    given = {"images": jnp.zeros((2, 4, 4, 3)), "name": "fog", "severity": 1} | change
    with pytest.raises(ValueError, match=message):
        corrupt(KEY, given.pop("images"), **given)
