"""Mix blocks against NumPy, for every combination of their options."""

import functools
import itertools

import jax
import numpy as np
import pytest

from saflex_jax.models import (
    AdversarialMixBlock,
    AdversarialMixBlockOptions,
    MixBlock,
    MixBlockOptions,
)
from saflex_jax.models.mix_block import rescaled
from tests.problems import softmax

SIZE, GRID, FACTOR, CHANNELS = 3, (3, 2), 4, 6
PIXELS = tuple(FACTOR * side for side in GRID)
REDUCTION, WIDTH = 3, 2
UPSAMPLE = ("nearest", "bilinear")
SAMIX = {"lam_mul": 1.0, "lam_mul_k": 0.25, "qk_concat": True, "v_neck": True}
KEY = jax.random.key(0)


def combinations():
    """All that may go together, but for the upsampling."""
    of_lambda = [{"lam_concat": True}]
    scaled = ({}, {"lam_mul": 0.7}, {"lam_mul": 0.7, "lam_mul_k": 0.0},
              {"lam_mul": 1.0, "lam_mul_k": 0.25})  # fmt: skip
    for by_value, factor, both in itertools.product((False, True), scaled, (False, True)):
        of_lambda.append({"lam_concat_v": by_value, "qk_concat": both, **factor})
    for first, v_concat, v_neck in itertools.product(of_lambda, (False, True), (False, True)):
        if not (v_neck and first.get("lam_concat_v")):
            yield {**first, "v_concat": v_concat, "v_neck": v_neck}


def maps_of(images, *, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(images, size, *GRID, CHANNELS)).astype("f4")


def shares_of(*values):
    return np.array(values, np.float32)


def random_params(block, maps, seed=0):
    """Nothing zero, nothing small."""
    rng = np.random.default_rng(seed)
    shares = np.ones(len(maps), np.float32) / len(maps)
    shapes = jax.eval_shape(functools.partial(block.init, size=PIXELS), KEY, maps, shares)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes["params"])


def masks_of(blocks, params, maps, *draws):
    """Masks of each block for each of several draws of shares, all in one program."""

    @jax.jit
    def masks(params, maps, draws):
        def of_draw(shares):
            return [
                block.apply({"params": p}, maps, shares, size=PIXELS)
                for block, p in zip(blocks, params)
            ]

        return jax.vmap(of_draw)(draws)

    return jax.device_get(masks(params, maps, np.stack([shares_of(*shares) for shares in draws])))


# --- the equations, in double precision ------------------------------------------------------


def beside(x, value):
    return np.concatenate([x, np.full((*x.shape[:-1], 1), value)], -1)


def linear(layer, x):
    return x @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0.0))


def attended(query, key, value):
    """One sample's [h w, D] twice and [h w] -> [h, w]."""
    return (softmax(query @ key.T / np.sqrt(WIDTH)) @ value).reshape(GRID)


def enlarged(x, upsample):
    if upsample == "nearest":
        return x.repeat(FACTOR, -2).repeat(FACTOR, -1)
    for axis, side in ((-2, GRID[0]), (-1, GRID[1])):
        place = (np.arange(FACTOR * side) + 0.5) / FACTOR - 0.5  # of pixel centres
        place = np.clip(place, 0, side - 1)
        below = np.minimum(place.astype(int), side - 2)
        part = (place - below).reshape(-1, *[1] * (-1 - axis))
        x = (1 - part) * x.take(below, axis) + part * x.take(below + 1, axis)
    return x


def neck(params, x):
    hidden = linear(params["value_in"], x)
    mean, var = hidden.mean((0, 1, 2)), hidden.var((0, 1, 2))
    hidden = (hidden - mean) / np.sqrt(var + 1e-5)
    hidden = hidden * params["value_norm"]["scale"] + params["value_norm"]["bias"]
    return linear(params["value_out"], np.where(hidden > 0, hidden, np.expm1(hidden)))


def expected(
    params, maps, lam, upsample, *, lam_concat=False, lam_concat_v=False, lam_mul=0.0,
    lam_mul_k=None, qk_concat=False, v_concat=False, v_neck=False,
):  # fmt: skip
    own, partner = np.float64(maps)
    if lam_mul:
        curve = lam
        if lam_mul_k is not None:
            k = lam_mul_k + 1
            curve = (4 / 3 * lam**3 - 2 * lam**2 + k * lam) / (k - 2 / 3)
        own, partner = own * (1 + lam_mul * curve), partner * (1 + lam_mul * (1 - curve))
    if lam_concat:
        own, partner = beside(own, lam), beside(partner, 1 - lam)
    both = np.concatenate([own, partner], -1)
    value = both if v_concat else partner
    if lam_concat_v:
        value = beside(value, 1 - lam)
    value = neck(params, value) if v_neck else linear(params["value"], value)
    if qk_concat:
        q, k = linear(params["query"], both), linear(params["key"], both)
    else:
        q, k = linear(params["query"], own), linear(params["query"], partner)
    q, k = (x.reshape(SIZE, -1, WIDTH) for x in (q, k))
    logits = np.stack([attended(*sample) for sample in zip(q, k, value.reshape(SIZE, -1))])
    mask = 1 / (1 + np.exp(-enlarged(logits, upsample)))
    return np.stack([1 - mask, mask])


def expected_adversarial(params, maps, shares, upsample, *, lam_concat):
    maps = [beside(x, share) if lam_concat else x for x, share in zip(np.float64(maps), shares)]
    q, k = (
        [np.maximum(linear(params[name], x), 0).reshape(SIZE, -1, WIDTH) for x in maps]
        for name in ("query", "key")
    )
    v = [linear(params["value"], x).reshape(SIZE, -1) for x in maps]
    logits = np.empty((len(maps), SIZE, *GRID))
    for i, b in np.ndindex(len(maps), SIZE):
        others = sum(k[j][b] for j in range(len(maps)) if j != i)
        logits[i, b] = attended(q[i][b], others, v[i][b])
    return softmax(enlarged(logits, upsample).transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)


def assert_masks(masks, reference, what):
    np.testing.assert_allclose(masks, reference, rtol=0, atol=1e-5, err_msg=str(what))
    np.testing.assert_allclose(masks.sum(0), 1, rtol=0, atol=3e-7, err_msg=str(what))
    assert masks.min() >= 0 and masks.std() > 0.02, what


CASES = [
    *({"upsample": "nearest", **options} for options in combinations()),
    *({"upsample": "bilinear", **options} for options in ({}, SAMIX)),
]


def test_two_images():
    maps = maps_of(2)
    blocks = [MixBlock(MixBlockOptions(REDUCTION, **options)) for options in CASES]
    params = [random_params(block, maps) for block in blocks]
    for options, p, (masks, other) in zip(
        CASES, params, masks_of(blocks, params, maps, (0.3, 0.7), (0.7, 0.3))
    ):
        assert_masks(masks, expected(p, maps, 0.3, **options), options)
        change = np.abs(masks - other).max()
        if any(options.get(name) for name in ("lam_concat", "lam_concat_v", "lam_mul")):
            assert change > 1e-4, options
        else:
            assert change == 0, options


@pytest.mark.parametrize("shares", [(0.3, 0.7), (0.2, 0.5, 0.3)])
def test_several_images(shares):
    maps = maps_of(len(shares))
    cases = list(itertools.product(UPSAMPLE, (False, True)))
    blocks = [
        AdversarialMixBlock(AdversarialMixBlockOptions(REDUCTION, *options)) for options in cases
    ]
    params = [random_params(block, maps) for block in blocks]
    for (upsample, lam_concat), p, (masks, other) in zip(
        cases, params, masks_of(blocks, params, maps, shares, shares[::-1])
    ):
        reference = expected_adversarial(p, maps, shares, upsample, lam_concat=lam_concat)
        assert_masks(masks, reference, (upsample, lam_concat))
        assert lam_concat == (np.abs(masks - other).max() > 0)


# --- initial values and sizes ----------------------------------------------------------------


def test_masks_start_about_equal():
    blocks = {
        AdversarialMixBlock(): (2, 3),
        MixBlock(): (2,),
        MixBlock(MixBlockOptions(**SAMIX)): (2,),
    }
    maps, shares = np.abs(maps_of(3)), np.full(3, 1 / 3, np.float32)

    @jax.jit
    def first_masks():
        return {
            images: [
                block.init_with_output(KEY, maps[:images], shares[:images], size=PIXELS)[0]
                for block, numbers in blocks.items()
                if images in numbers
            ]
            for images in (2, 3)
        }

    masks = first_masks()
    assert {images: len(found) for images, found in masks.items()} == {2: 3, 3: 1}
    for images, found in masks.items():
        for of_block in found:
            assert 0 < np.abs(of_block - 1 / images).max() < 0.03


@pytest.mark.parametrize("options, expected", [({}, 33_153), (SAMIX, 164_480)])
def test_numbers_of_parameters(options, expected):
    maps = np.zeros((2, 1, 2, 2, 256), np.float32)
    block = MixBlock(MixBlockOptions(**options))
    init = functools.partial(block.init, size=(4, 4))
    params = jax.eval_shape(init, KEY, maps, shares_of(0.5, 0.5))
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_convolutions_start_small():
    maps = np.zeros((2, 1, 2, 2, 256), np.float32)
    init = jax.jit(functools.partial(MixBlock().init, size=(4, 4)))
    params = init(KEY, maps, shares_of(0.5, 0.5))["params"]
    np.testing.assert_allclose(np.std(params["query"]["kernel"]), 0.01, rtol=0.02)
    assert 0.005 < np.std(params["value"]["kernel"]) < 0.02
    assert not any(np.any(params[name]["bias"]) for name in ("query", "value"))


def test_batch_statistics_are_those_of_all_devices():
    maps, shares = maps_of(2, size=4), shares_of(0.3, 0.7)
    whole, split = (MixBlock(MixBlockOptions(v_neck=True), name) for name in (None, "data"))
    params = {"params": random_params(whole, maps)}
    shards = maps.reshape(2, 2, 2, *maps.shape[2:]).swapaxes(0, 1)

    @jax.jit
    def both(params, maps, shards):
        apply = functools.partial(split.apply, params, shares=shares, size=PIXELS)
        return whole.apply(params, maps, shares, size=PIXELS), jax.vmap(apply, axis_name="data")(
            shards
        )

    reference, masks = map(np.asarray, both(params, maps, shards))
    masks = masks.swapaxes(0, 1).reshape(reference.shape)
    np.testing.assert_allclose(masks, reference, rtol=0, atol=1e-6)


def test_the_rescaled_lambda_goes_through_both_ends_and_the_middle():
    for k in (0.0, 0.25, 3.0):
        ends_and_middle = rescaled(shares_of(0, 0.5, 1), k)
        np.testing.assert_allclose(ends_and_middle, [0, 0.5, 1], rtol=0, atol=1e-6)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block, images, message",
    [
        (MixBlock(), 3, "maps must be of 2 images; given 3"),
        (AdversarialMixBlock(), 1, "maps must be of at least 2 images; given 1"),
    ],
)
def test_a_number_of_images_is_refused(block, images, message):
    shares = np.full(images, 1 / images, np.float32)
    with pytest.raises(ValueError, match=message):
        block.init(KEY, maps_of(images), shares, size=PIXELS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"upsample": "cubic"}, "upsample must be one of"),
        ({"reduction": 0}, "reduction must be a whole number >= 1; given 0"),
        ({"lam_mul": -1.0}, "lam_mul must be >= 0 and finite; given -1.0"),
        ({"lam_mul_k": 0.25}, "lam_mul_k needs lam_mul > 0; given 0.25"),
        ({"lam_mul": 1.0, "lam_mul_k": -1.0}, "lam_mul_k must be >= 0 and finite; given -1.0"),
        ({"v_neck": True, "lam_concat_v": True}, "lam_concat_v must be off with v_neck"),
        *(
            ({"lam_concat": True, name: value}, f"{name} must be off .* given {value}")
            for name, value in {"lam_concat_v": True, "lam_mul": 0.5, "qk_concat": True}.items()
        ),
    ],
)
def test_an_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixBlockOptions(**options)


def test_an_option_of_the_adversarial_block_is_refused():
    with pytest.raises(ValueError, match=r"upsample must .* did you mean 'nearest'"):
        AdversarialMixBlockOptions(upsample="nearst")
    with pytest.raises(ValueError, match="reduction must be a whole number >= 1; given 0"):
        AdversarialMixBlockOptions(reduction=0)
