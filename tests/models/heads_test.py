"""Several heads on a backbone, and the feature maps that backbones hand out."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax import under
from saflex_jax.core.tree import paths, select
from saflex_jax.models import MLP, Classifier, Heads, ResNet18, SmallCNN, ViT, from_linen
from tests.problems import assert_close

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 4, 3)).astype(np.float32)  # not square
WIDTHS = {"joint": 6, "class": 3}
BACKBONES = {
    "small_cnn": SmallCNN((4, 6)),
    "resnet": ResNet18("cifar", (2, 1), 4),
    "vit": ViT(patch=2, width=6, depth=2, heads=2, mlp_width=8),
}
STAGES = 2


def relu(x):
    return np.maximum(x, 0)


def maps_of_small_cnn(inside):
    return [relu(inside[f"Norm_{number}"]) for number in range(STAGES)]


def maps_of_resnet(inside):
    """Two basic blocks, then one with a projection."""
    norm = [inside[f"Norm_{number}"] for number in range(8)]
    return [relu(relu(relu(norm[0]) + norm[2]) + norm[4]), relu(norm[7] + norm[6])]


def maps_of_vit(inside):
    """A token for each patch of 2x2 pixels, row by row."""
    tokens = [inside[f"block_{number}"] for number in range(STAGES)]
    return [np.stack([t[:, 2 * row : 2 * row + 2] for row in range(4)], 1) for t in tokens]


MAPS = {"small_cnn": maps_of_small_cnn, "resnet": maps_of_resnet, "vit": maps_of_vit}
SHAPES = {
    "small_cnn": [(2, 8, 4, 4), (2, 4, 2, 6)],
    "resnet": [(2, 8, 4, 4), (2, 4, 2, 8)],
    "vit": [(2, 4, 2, 6)] * 2,
}


def drawn(init):
    """Variables from NumPy, in the shapes that init gives: nothing to compile."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(init, KEY, IMAGES)
    return jax.tree.map(lambda x: np.float32(np.abs(rng.normal(size=x.shape)) + 0.1), shapes)


@cache
def outcome(name):
    """Features alone, outputs of every module inside, and features with the map of each stage."""
    backbone = BACKBONES[name]

    @jax.jit
    def run(variables, images):
        alone, inside = backbone.apply(
            variables, images, train=False, capture_intermediates=True, mutable="intermediates"
        )
        asked = {
            stage: backbone.apply(variables, images, train=False, stage=stage)
            for stage in range(-STAGES, STAGES)
        }
        return alone, inside["intermediates"], asked

    alone, inside, asked = jax.device_get(run(drawn(partial(backbone.init, train=False)), IMAGES))
    # The backbone's own output stands beside its modules'.
    inside = {n: outputs["__call__"][0] for n, outputs in inside.items() if n != "__call__"}
    return alone, inside, asked


@pytest.mark.parametrize("name", BACKBONES)
def test_the_map_of_a_stage_is_what_the_stage_computes(name):
    _, inside, asked = outcome(name)
    expected = MAPS[name](inside)
    assert [x.shape for x in expected] == SHAPES[name]
    for stage, (_, stage_map) in asked.items():
        assert_close(stage_map, expected[stage], 1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_asking_for_a_map_leaves_the_features_alone(name):
    alone, _, asked = outcome(name)
    for features, _ in asked.values():
        np.testing.assert_array_equal(features, alone)
    if name != "vit":  # whose last tokens are normalised first
        assert_close(asked[-1][1].mean((1, 2)), alone, 1e-6)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("stage", [STAGES, -STAGES - 1])
def test_a_stage_that_is_not_there_is_refused(name, stage):
    module = Heads(BACKBONES[name], WIDTHS, stage)
    message = rf"stage must be in \[-2, 1\], the backbone's; given {stage}\b"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(module.init, train=False), KEY, IMAGES)


def features_of(backbone, params):
    features = jax.jit(partial(backbone.apply, train=False))
    return np.float64(features({"params": params["backbone"]}, IMAGES))


def test_heads_are_linear_maps_of_the_same_features_by_name():
    model = from_linen(Heads(MLP((5,)), WIDTHS, features=True))
    params, model_state = drawn(model.init)
    assert model_state == {} and set(params) == {"backbone", "head"}
    features = features_of(MLP((5,)), params)
    outputs = jax.jit(model.logits)(params, model_state, IMAGES)
    assert set(outputs) == {*WIDTHS, "features"}
    assert_close(outputs["features"], features, 1e-6)
    for name, width in WIDTHS.items():
        head = {part: np.float64(x) for part, x in params["head"][name].items()}
        assert head["kernel"].shape == (5, width)
        assert_close(outputs[name], features @ head["kernel"] + head["bias"], 1e-6)


def test_cosine_heads_give_cosines_whatever_the_norms():
    backbone = MLP((5,))
    several = from_linen(Heads(backbone, WIDTHS, cosine=True))
    params, _ = drawn(several.init)
    features = features_of(backbone, params)
    for name, logits in jax.jit(several.logits)(params, {}, IMAGES).items():
        (kernel,) = params["head"][name].values()  # no bias
        norms = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)[None]
        assert_close(logits, features @ np.float64(kernel) / norms, 1e-6)
        one = from_linen(Classifier(backbone, WIDTHS[name], cosine=True))
        alone = {"backbone": params["backbone"], "head": {"kernel": 7 * kernel}}
        assert_close(jax.jit(one.logits)(alone, {}, IMAGES), logits, 1e-6)


def test_cosine_heads_are_differentiable_where_features_vanish():
    model = from_linen(Classifier(MLP((5,)), 3, cosine=True))
    params, _ = drawn(model.init)
    dead = jax.tree.map(lambda x: -np.abs(x), params["backbone"])  # every unit of the MLP is off

    def total(params):
        return jnp.sum(model.logits(params, {}, np.abs(IMAGES)))

    value, gradient = jax.jit(jax.value_and_grad(total))({**params, "backbone": dead})
    assert value == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_a_predicate_selects_all_heads_or_one():
    module = from_linen(Heads(SmallCNN((4,)), WIDTHS))
    params, _ = jax.eval_shape(module.init, KEY, IMAGES)
    heads = [f"head/{name}/{part}" for name in ("class", "joint") for part in ("bias", "kernel")]
    assert [p for p in paths(params) if not p.startswith("backbone/")] == heads
    assert paths(select(params, under("head"))) == heads
    assert paths(select(params, under("head/joint"))) == heads[2:]


@pytest.mark.parametrize("stage", [None, -2])
def test_a_backbone_is_the_same_under_one_head_and_under_several(stage):
    # So are its statistics in training mode, and what it computes; only the map comes on top.
    backbone = SmallCNN((4, 6), norm="batch")
    one, several = (
        from_linen(m) for m in (Classifier(backbone, 3), Heads(backbone, WIDTHS, stage))
    )

    @jax.jit
    def both(params, model_state, images):
        alone = params | {"head": params["head"]["class"]}
        return (
            several.train(params, model_state, images, KEY),
            one.train(alone, model_state, images, KEY),
            several.logits(params, model_state, images),
            one.logits(alone, model_state, images),
        )

    params, before = drawn(several.init)
    trained, expected_trained, logits, expected = both(params, before, IMAGES)
    assert set(logits) == set(trained[0]) == set(WIDTHS) | ({"map"} if stage else set())
    assert_close(trained[0]["class"], expected_trained[0], 1e-6)
    assert_close(trained[1], expected_trained[1], 1e-6)
    assert_close(logits["class"], expected, 1e-6)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, trained[1])))]
    assert min(moved) > 1e-3
    if stage:  # by batch statistics in training, by running ones otherwise
        assert trained[0]["map"].shape == logits["map"].shape == (2, 8, 4, 4)
        assert float(jnp.abs(trained[0]["map"] - logits["map"]).max()) > 1e-3
