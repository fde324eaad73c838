from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from saflex_jax import Batch
from saflex_jax.augment import mixing
from saflex_jax.augment.base import OPERATIONS, sample_keys
from saflex_jax.augment.mixing import (
    cutmix,
    fmix,
    gridmix,
    manifold_mixup,
    mix,
    mixup,
    resizemix,
    smoothmix,
)

KEY = jax.random.key(5)
SIZE, HEIGHT, WIDTH = 48, 11, 14
MASKED = {
    "cutmix": partial(cutmix, 1.0),
    "fmix": partial(fmix, 0.7),
    "gridmix": partial(gridmix, 1.0, 3),
    "smoothmix": smoothmix,
    "resizemix": resizemix,
}
ALL = {"mixup": partial(mixup, 0.7), **MASKED}


def run_all(make, key, batch, probability):
    """channels -> what comes of that many of the batch's five; "half" -> of one in bf16."""
    kinds = {"1": batch.inputs[..., :1], "half": batch.inputs[..., :1].astype(jnp.bfloat16)}
    if make in (MASKED["cutmix"], MASKED["resizemix"]):  # the others share cutmix's code
        kinds["5"] = batch.inputs
    augment = make(probability=probability)
    return {kind: augment(key, batch._replace(inputs=x)) for kind, x in kinds.items()}


# One compilation for each, shared by the tests: drawing takes seconds to compile.
JITTED = {name: jax.jit(partial(run_all, make)) for name, make in ALL.items()}


def run(name, batch, *, key=KEY, kind=1, probability=1.0):
    return jax.device_get(JITTED[name](key, batch, np.float32(probability))[str(kind)])


def coded(padding=0):
    """Image i is i + 1 everywhere; label i is the unit vector i."""
    images = np.arange(1, SIZE + 1, dtype=np.float32).reshape(-1, 1, 1, 1)
    index = np.random.default_rng(0).permutation(10 * SIZE)[:SIZE].astype(np.int32)
    return Batch(
        np.broadcast_to(images, (SIZE, HEIGHT, WIDTH, 5)),
        np.eye(SIZE, dtype=np.float32),
        np.arange(SIZE) < SIZE - padding,
        index,
    )


def many(name, keys=20):
    """(images [N, H, W], own rows, own share f64[N], partner [N]) of mixed samples."""
    augmented = []
    for seed in range(keys):
        out = run(name, coded(), key=jax.random.key(seed))
        own, partner = parents(out)
        augmented.append(
            (np.asarray(out.inputs, np.float64)[..., 0], np.arange(SIZE), own, partner)
        )
    augmented = [np.concatenate(x) for x in zip(*augmented)]
    mixed = augmented[3] >= 0
    return [x[mixed] for x in augmented]


def masks(images, rows, partner):
    """Images of one value are linear in the mask, which is read off them."""
    rows, partner = rows[:, None, None], partner[:, None, None]
    return (images - (partner + 1)) / (rows - partner)


def parents(augmented):
    """(own share f64[B], partner row or -1 i64[B]) by the labels."""
    labels = np.asarray(augmented.labels, np.float64)
    own = np.diag(labels)
    rest = labels - np.diag(own)
    assert ((rest > 0).sum(1) <= 1).all()
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    return own, np.where(rest.any(1), rest.argmax(1), -1)


# --- the pure layer


def test_mix_by_shares_is_the_formula_on_every_leaf_and_keeps_dtypes():
    rng = np.random.default_rng(0)
    size = 6
    inputs = {
        "image": rng.normal(size=(size, 2, 3, 1)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=(size, 4)), jnp.bfloat16),
    }
    labels = rng.dirichlet(np.ones(3), size).astype(np.float32)
    share = rng.uniform(size=size).astype(np.float32)
    partner = np.array([1, 0, 3, 3, 5, 4])  # 3 with itself
    mask = np.array([True, True, True, True, True, False])  # 4's partner is padding
    index = np.array([9, 8, 7, 6, 5, 4], np.int32)
    batch = jax.tree.map(jnp.asarray, Batch(inputs, labels, mask, index))
    augmented = jax.jit(partial(mix, name="mixup"))(batch, jnp.asarray(partner), jnp.asarray(share))
    share[[3, 4]] = 1

    def blend(x):
        return (
            share.reshape(-1, *[1] * (x.ndim - 1)) * x
            + (1 - share.reshape(-1, *[1] * (x.ndim - 1))) * x[partner]
        )

    np.testing.assert_allclose(augmented.inputs["image"], blend(inputs["image"]), atol=1e-6)
    np.testing.assert_allclose(augmented.labels, blend(labels), atol=1e-6)
    half = np.asarray(inputs["half"], np.float32)
    assert augmented.inputs["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(  # rounded once, from single precision
        np.asarray(augmented.inputs["half"], np.float32),
        np.asarray(jnp.asarray(blend(half), jnp.bfloat16), np.float32),
    )
    trace = augmented.trace
    assert (trace.operation == OPERATIONS.index("mixup")).all()
    np.testing.assert_array_equal(trace.magnitude[:, 0], share)
    np.testing.assert_array_equal(trace.partner[:, 0], [8, 9, 6, 6, 5, 5])


@pytest.mark.parametrize("channels", [1, 5])
def test_mix_by_masks_takes_each_pixel_from_its_parent(channels):
    rng = np.random.default_rng(1)
    shape = (5, 11, 11)  # where a compiled mean of ones is not one
    images = rng.normal(size=(*shape, channels)).astype(np.float32)
    mask = (rng.random(shape) < 0.6).astype(np.float32)
    mask[2] = 1
    partner = np.array([2, 0, 1, 4, 3])
    batch = Batch(images, np.eye(5, dtype=np.float32), np.ones(5, bool), np.arange(5))
    augmented = jax.jit(partial(mix, name="fmix"))(batch, partner, mask)
    expected = np.where(mask[..., None] > 0, images, images[partner])
    np.testing.assert_array_equal(augmented.inputs, expected)
    share = mask.sum((1, 2)) / 121
    np.testing.assert_allclose(np.diag(augmented.labels), share, rtol=2e-7)
    np.testing.assert_array_equal(np.diag(augmented.labels), augmented.trace.magnitude[:, 0])
    np.testing.assert_array_equal(augmented.labels[2], np.eye(5)[2])


def test_codes_come_whole_from_a_parent_with_its_share():
    size, columns = 400, 6
    share = np.full(size, 0.8, np.float32)
    rows = np.arange(size, dtype=np.int32)
    codes = {
        name: np.broadcast_to(rows[:, None] + np.int32(first), (size, columns))
        for name, first in (("a", 0), ("b", 1000))
    }
    partner = np.roll(rows, 1)
    batch = Batch(codes, np.eye(size, dtype=np.float32), np.ones(size, bool), rows)

    @jax.jit
    def mixed(batch):
        return mix(batch, partner, share, "mixup", keys=sample_keys(KEY, batch))

    augmented = mixed(batch).inputs
    own = {name: np.asarray(augmented[name] == codes[name]) for name in codes}
    for name in codes:
        assert augmented[name].dtype == codes[name].dtype
        kept = np.where(own[name], codes[name], codes[name][partner])
        np.testing.assert_array_equal(augmented[name], kept)
        assert stats.binomtest(int(own[name].sum()), own[name].size, 0.8).pvalue > 1e-3
    # Columns and leaves are independent: as often equal as two coins of .8.
    same = int((own["a"] == own["b"]).sum())
    assert stats.binomtest(same, own["a"].size, 0.68).pvalue > 1e-3
    same = int((own["a"][:, 1:] == own["a"][:, :-1]).sum())
    assert stats.binomtest(same, size * (columns - 1), 0.68).pvalue > 1e-3


# --- every augmentation


@pytest.mark.parametrize(
    ("name", "channels"), [*((name, 1) for name in MASKED), ("cutmix", 5), ("resizemix", 5)]
)
def test_the_label_share_is_the_realised_share(name, channels):
    batch = coded()
    augmented = run(name, batch, kind=channels)
    own, partner = parents(augmented)
    mixed = partner >= 0
    assert mixed.sum() > 0.7 * SIZE
    if name != "resizemix":
        assert own.min() > 0.5 - 1e-6
    images = np.asarray(augmented.inputs, np.float64)
    np.testing.assert_array_equal(images, images[..., :1].repeat(channels, -1))
    images = images[..., 0]
    rows = np.arange(SIZE)
    if name == "smoothmix":
        realised = masks(images[mixed], rows[mixed], partner[mixed]).mean((1, 2))
        np.testing.assert_allclose(own[mixed], realised, atol=1e-5)
    else:
        mine = images == rows[:, None, None] + 1
        assert (mine | (images == partner[:, None, None] + 1)).all()
        np.testing.assert_allclose(own, mine.sum((1, 2)) / (HEIGHT * WIDTH), rtol=2e-7, atol=6e-8)
    # Nobody is two samples' partner; the trace names the parent.
    assert len(set(partner[mixed])) == mixed.sum()
    expected = np.where(mixed, np.asarray(batch.index)[partner], batch.index)
    np.testing.assert_array_equal(augmented.trace.partner[:, 0], expected)
    np.testing.assert_array_equal(augmented.trace.magnitude[:, 0], np.diag(augmented.labels))
    assert (augmented.trace.operation == OPERATIONS.index(name)).all()


@pytest.mark.parametrize("name", ALL)
def test_padding_is_nobodys_partner_and_nothing_else_of_it_gets_in(name):
    real = slice(0, SIZE - 20)
    batch = coded(padding=20)
    poisoned = np.array(batch.inputs)
    poisoned[real.stop :] = np.nan
    augmented = run(name, batch._replace(inputs=poisoned))
    own, partner = (x[real] for x in parents(augmented))
    assert (partner < real.stop).all()
    assert np.isfinite(np.asarray(augmented.inputs)[real]).all()
    alone = partner < 0
    assert 0 < alone.sum() < real.stop
    np.testing.assert_array_equal(own[alone], 1)
    np.testing.assert_array_equal(augmented.inputs[real][alone], batch.inputs[real][alone][..., :1])


@pytest.mark.parametrize("name", ALL)
def test_what_is_drawn_depends_on_the_index_and_not_on_the_place(name):
    batch = coded()
    whole, _ = parents(run(name, batch))
    order = np.random.default_rng(2).permutation(SIZE)
    other, _ = parents(run(name, batch._replace(index=batch.index[order])))
    both = (whole < 1)[order] & (other < 1)  # neither with itself nor by an empty box
    assert both.sum() > 0.6 * SIZE
    np.testing.assert_array_equal(whole[order][both], other[both])
    assert len(np.unique(whole)) > 5
    anew, _ = parents(run(name, batch, key=jax.random.key(6)))
    assert (anew != whole).mean() > 0.5


@pytest.mark.parametrize("name", ["mixup", "cutmix", "resizemix"])
def test_one_draw_for_the_whole_batch(name):
    augmented = jax.jit(ALL[name](per_sample=False))(KEY, coded())
    own, partner = parents(augmented)
    assert 0.8 * SIZE < (partner >= 0).sum()
    assert len(set(own[partner >= 0])) == 1
    masks_ = masks(np.float64(augmented.inputs[..., 0]), np.arange(SIZE), partner)[partner >= 0]
    np.testing.assert_allclose(masks_, masks_[:1].repeat(len(masks_), 0), atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_stays_half(name):
    half, full = (run(name, coded(), kind=kind) for kind in ("half", 1))
    assert half.inputs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.inputs, full.inputs.astype(jnp.bfloat16))
    np.testing.assert_array_equal(half.labels, full.labels)


@pytest.mark.parametrize("name", ALL)
def test_probability(name):
    never = run(name, coded(), probability=0.0)
    np.testing.assert_array_equal(never.inputs, coded().inputs[..., :1])
    np.testing.assert_array_equal(never.labels, np.eye(SIZE))
    np.testing.assert_array_equal(never.trace.magnitude, np.ones((SIZE, 1)))
    np.testing.assert_array_equal(never.trace.partner[:, 0], coded().index)
    keys = [jax.random.key(seed) for seed in range(8)]
    always, seldom = (
        sum(int((parents(run(name, coded(), key=k, probability=p))[1] >= 0).sum()) for k in keys)
        for p in (1.0, 0.3)
    )
    assert stats.binomtest(seldom, always, 0.3).pvalue > 1e-3


# --- their distributions


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.7, 1.0, 8.0])
def test_beta_has_its_distribution(alpha):
    draw = jax.jit(jax.vmap(partial(mixing.beta, alpha=alpha)))
    augmented = np.asarray(draw(jax.random.split(KEY, 20_000)), np.float64)
    assert ((augmented >= 0) & (augmented <= 1)).all()
    # Not to the last digit before 1, where single precision ends.
    for bound in (1e-3, 0.03, 0.2, 0.4, 0.5, 0.7, 0.9, 0.999):
        expected = stats.beta(alpha, alpha).cdf(bound)
        assert stats.binomtest(int((augmented < bound).sum()), 20_000, expected).pvalue > 1e-3


def test_mixup_keeps_the_larger_share():
    images, rows, own, partner = many("mixup")
    expected = own * (rows + 1) + (1 - own) * (partner + 1)
    for r in (0, HEIGHT - 1):
        np.testing.assert_allclose(images[:, r, WIDTH - 1], expected, rtol=1e-6)
    assert own.min() >= 0.5
    assert stats.kstest(own, lambda s: 2 * stats.beta(0.7, 0.7).cdf(s) - 1).pvalue > 1e-3


def test_cutmix_boxes_are_those_of_the_paper():
    shape, ratio = (9, 13), 0.6
    drawn = jax.jit(jax.vmap(lambda key: mixing.box(key, jnp.float32(ratio), shape)))
    boxes = np.asarray(drawn(jax.random.split(KEY, 2000)))
    for axis, side in enumerate(shape):
        length = round(ratio * side)
        first = np.arange(side) - length // 2
        expected = np.stack([first.clip(0, side), (first + length).clip(0, side)], 1)
        places = [int(np.flatnonzero((expected == b).all(1))[0]) for b in boxes[:, axis]]
        assert stats.chisquare(np.bincount(places, minlength=side)).pvalue > 1e-3
    # Height and width are placed independently.
    table = stats.contingency.crosstab(boxes[:, 0, 0], boxes[:, 1, 0]).count
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_cutmix_shares_are_those_of_a_plain_implementation():
    rng, reference = np.random.default_rng(0), []
    for _ in range(4000):
        cut = np.sqrt(1 - rng.uniform())
        area = 1
        for side in (HEIGHT, WIDTH):
            length = round(cut * side)
            first = rng.integers(side) - length // 2
            area *= max(min(first + length, side) - max(first, 0), 0)
        area /= HEIGHT * WIDTH
        if 0 < area < 1:
            reference.append(max(area, 1 - area))
    assert stats.ks_2samp(many("cutmix")[2], reference).pvalue > 1e-3


def test_fmix_masks_have_the_exact_count_and_ties_do_not_matter():
    largest = jax.jit(mixing.largest)
    noise = np.random.default_rng(0).normal(size=(9, 14)).astype(np.float32)
    for values in (noise, np.zeros((9, 14), np.float32), np.round(noise)):
        for share in (0.0, 0.004, 0.3, 0.5, 0.77, 1.0):
            mask = np.asarray(largest(values, jnp.float32(share)))
            assert set(np.unique(mask)) <= {0, 1}
            assert mask.sum() == round(share * 126)
            if 0 < mask.sum() < mask.size:
                assert values[mask > 0].min() >= values[mask == 0].max()


@pytest.mark.parametrize("shape", [(12, 9), (8, 16)])
def test_fmix_noise_has_the_spectrum_that_it_names(shape):
    decay, draws = 1.5, 4000
    draw = jax.jit(jax.vmap(lambda key: mixing.low_frequency(key, shape, decay)))
    power = (np.abs(np.fft.fft2(draw(jax.random.split(KEY, draws)))) ** 2).mean(0)
    y, x = (np.fft.fftfreq(side) for side in shape)
    frequency = np.sqrt(y[:, None] ** 2 + x[None, :] ** 2)
    expected = np.maximum(frequency, 1 / max(shape)) ** (-2 * decay)
    ratio = power / expected
    # Columns that are their own mirror image: the real part alone survives there.
    inner = [c for c in range(1, shape[1]) if 2 * c != shape[1]]
    ratio = ratio[:, inner] / ratio[:, inner].mean()
    assert np.abs(ratio - 1).max() < 5 / draws**0.5  # 5 standard deviations of an exponential mean


def test_gridmix_is_a_grid_of_independent_cells():
    images, row, _, _ = many("gridmix", keys=30)
    own = images == row[:, None, None] + 1
    rows, columns = np.arange(HEIGHT) * 3 // HEIGHT, np.arange(WIDTH) * 3 // WIDTH
    assert set(np.bincount(rows)) == {3, 4} and set(np.bincount(columns)) == {4, 5}
    cells = own[:, np.searchsorted(rows, range(3))][:, :, np.searchsorted(columns, range(3))]
    np.testing.assert_array_equal(own, cells[:, rows][:, :, columns])
    # l ~ U(0, 1) makes every number of own cells as likely. A complement exchanges k and 9 - k, so
    # the pairs stay as likely; nine (none) of its cells is an unmixed image.
    counts = np.bincount(cells.sum((1, 2)), minlength=10)
    assert stats.chisquare((counts + counts[::-1])[1:5]).pvalue > 1e-3
    assert counts[[0, 1, 2, 3]].sum() == 0  # three cells are at most 60 of 154 pixels
    assert stats.chisquare((~cells).sum(0).ravel()).pvalue > 1e-3  # no cell is favoured


def test_smoothmix_is_a_gaussian_whose_width_and_centre_are_uniform():
    shape, sigma = (10, 16), 0.3
    draw = jax.jit(jax.vmap(lambda key: mixing.bell(key, jnp.float32(sigma), shape)))
    centres = []
    for mask in np.asarray(draw(jax.random.split(KEY, 1500)), np.float64):
        centre = np.unravel_index(mask.argmax(), shape)
        y, x = np.ogrid[: shape[0], : shape[1]]
        exponent = ((y - centre[0]) / (sigma * 10)) ** 2 + ((x - centre[1]) / (sigma * 16)) ** 2
        np.testing.assert_allclose(mask, np.exp(-exponent / 2), atol=1e-6)
        centres.append(np.ravel_multi_index(centre, shape))
    assert stats.chisquare(np.bincount(centres, minlength=160)).pvalue > 1e-3
    images, rows, _, partner = many("smoothmix")
    widths, y, x = [], *np.ogrid[:HEIGHT, :WIDTH]
    for mask in masks(images, rows, partner):
        bell = 1 - mask if mask.min() < 1e-3 else mask  # the partner's, or the complement
        centre = np.unravel_index(bell.argmax(), bell.shape)
        square = ((y - centre[0]) / HEIGHT) ** 2 + ((x - centre[1]) / WIDTH) ** 2
        some = (bell > 0.2) & (bell < 0.8)
        widths.append(np.median(np.sqrt(-square[some] / (2 * np.log(bell[some])))))
    assert stats.kstest(widths, stats.uniform(0.25, 0.25).cdf).pvalue > 1e-3


def between(length, side):
    return (2 * np.arange(length) + 1) * side % (2 * length) == 0


@pytest.mark.parametrize("channels", [1, 5])
def test_resizemix_pastes_the_whole_partner_shrunk_to_the_nearest_pixel(channels):
    levels = np.random.default_rng(0).integers(1, 256, (SIZE, HEIGHT, WIDTH, 5))
    batch = coded()._replace(inputs=levels.astype(np.float32))
    boxes = np.asarray(run("resizemix", coded()).inputs)[..., 0]
    augmented = run("resizemix", batch, kind=channels)
    _, partner = parents(augmented)
    for i in range(SIZE):
        inside = boxes[i] != i + 1
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        expected, compared = levels[i, ..., :channels].copy(), np.ones_like(inside)
        if inside.any():
            assert inside[np.ix_(rows, columns)].all()
            for channel in range(channels):
                image = Image.fromarray(levels[partner[i], ..., channel].astype(np.uint8))
                shrunk = image.resize((len(columns), len(rows)), Image.Resampling.NEAREST)
                expected[np.ix_(rows, columns, [channel])] = np.asarray(shrunk)[..., None]
            # Where a pixel's centre falls between two, Pillow's rounding errors decide.
            compared[rows[between(len(rows), HEIGHT)]] = False
            compared[:, columns[between(len(columns), WIDTH)]] = False
        np.testing.assert_array_equal(augmented.inputs[i][compared], expected[compared])


def test_resizemix_shares_may_be_below_one_half():
    assert 0.36 - 0.05 < many("resizemix")[2].min() < 0.5  # 1 - .8^2, and rounding


def test_manifold_mixup_mixes_labels_and_hands_the_rest_to_the_network():
    batch = coded(padding=10)
    batch = batch._replace(inputs=batch.inputs[..., :1])
    augment = jax.jit(manifold_mixup(0.7, layers=3))
    layers = []
    for seed in range(12):
        augmented = jax.device_get(augment(jax.random.key(seed), batch))
        inputs = augmented.inputs
        np.testing.assert_array_equal(inputs["inputs"], batch.inputs)
        own, partner = parents(augmented)
        rows = np.where(partner < 0, np.arange(SIZE), partner)
        np.testing.assert_array_equal(inputs["partner"], rows)
        np.testing.assert_array_equal(inputs["share"], np.diag(augmented.labels))
        assert (partner[:-10] < SIZE - 10).all() and (own >= 0.5).all() and (own < 1).any()
        assert len(set(inputs["layer"].tolist())) == 1 and inputs["layer"].shape == (SIZE,)
        layers.append(int(inputs["layer"][0]))
    assert set(layers) == {0, 1, 2}
    assert (augmented.trace.operation == OPERATIONS.index("mixup")).all()


# --- bad input


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *[(partial(f, a), "alpha") for f in (mixup, cutmix, fmix, gridmix) for a in (0.0, np.nan)],
        *[(partial(f, probability=1.5), "probability") for f in ALL.values()],
        (partial(manifold_mixup, 0.0), "alpha"),
        (partial(manifold_mixup, 1.0, layers=0), "layers"),
        (partial(fmix, 1.0, -1.0), "decay"),
        (partial(gridmix, 1.0, 0), "cells"),
        (partial(resizemix, 0.0), "low"),
        (partial(resizemix, 0.5, 0.4), "low and high"),
        (partial(resizemix, 0.5, 1.1), "low and high"),
        (partial(smoothmix, 0.5, 0.4), "low and high"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name} must "):
        make()


def test_inputs_that_do_not_fit_are_named():
    batch = coded()
    table, codes = batch.inputs[:, 0, :, 0], batch.inputs.astype(np.int32)

    def trace(augment, **changes):  # errors come before anything is compiled
        jax.eval_shape(augment, KEY, batch._replace(**changes))

    for make in MASKED.values():
        for inputs in (table, codes, {"image": batch.inputs}):
            with pytest.raises(ValueError, match=r"^inputs must be "):
                trace(make(), inputs=inputs)
    with pytest.raises(ValueError, match=r"^inputs must be floats, or integer codes"):
        trace(mixup(1.0), inputs=codes)
    with pytest.raises(ValueError, match=r"^cells must be at most 11"):
        trace(gridmix(1.0, 12))
    with pytest.raises(ValueError, match=r"^own must have shape"):
        trace(lambda key, b: mix(b, jnp.arange(SIZE), jnp.ones((SIZE, 3, 3)), "fmix"))
    with pytest.raises(ValueError, match=r"^operation must be one of"):
        trace(lambda key, b: mix(b, jnp.arange(SIZE), jnp.ones(SIZE), "mixap"))
