"""PyTorch's files and torchvision's networks, against NumPy and, where it is installed, PyTorch."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.features import forward, torch_ops
from saflex_jax.models import Classifier, ResNet18, ResNet50, from_linen
from saflex_jax.models.pretrained import (
    from_torchvision,
    imagenet_inputs,
    torchvision_names,
)
from saflex_jax.models.tensor_files import read_weights
from tests.models.weights_ import state_of

SMALL = {
    "basic": ResNet18("imagenet", (2, 1), 4, "frozen"),
    "bottleneck": ResNet50("imagenet", (2, 1), 4, "frozen"),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 19, 32, 3)).astype(np.float32)


# --- torchvision's forward pass, in NumPy and in PyTorch


class InNumpy:
    """f64, [B, C, H, W]."""

    @staticmethod
    def conv(x, kernel, stride):
        pad = kernel.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))
        return np.einsum("bihwkl,oikl->bohw", windows[:, :, ::stride, ::stride], kernel)

    @staticmethod
    def norm(x, weight, bias, mean, var):
        weight, bias, mean, var = (v[:, None, None] for v in (weight, bias, mean, var))
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    @staticmethod
    def pool(x):
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        return windows[:, :, ::2, ::2].max((4, 5))

    @staticmethod
    def relu(x):
        return np.maximum(x, 0)


@pytest.mark.parametrize("name", SMALL)
def test_features_are_those_of_torchvisions_network(name):
    backbone, state = SMALL[name], state_of(SMALL[name])
    variables = from_torchvision(state, backbone)
    features = jax.jit(partial(backbone.apply, train=False))(variables, IMAGES)
    wide = {k: np.float64(v) for k, v in state.items()}
    expected = forward(wide, np.float64(IMAGES).transpose(0, 3, 1, 2), InNumpy)
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.parametrize("backbone", [ResNet18("imagenet", norm="batch", width=16),
                                      ResNet50("imagenet", norm="batch", width=16)])  # fmt: skip
def test_features_are_pytorchs(backbone):
    torch = pytest.importorskip("torch")
    state = state_of(backbone)
    variables = from_torchvision(state, backbone)
    features = jax.jit(partial(backbone.apply, train=False))(variables, IMAGES)
    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in state.items()}
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    expected = forward(tensors, images, torch_ops()).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4 * max(1, np.abs(expected).max()))


WEIGHTS = pathlib.Path(__file__).parents[2] / "data" / "weights" / "resnet18.pkl"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="python -m experiments.prepare resnet18")
def test_features_of_the_real_weights_are_pytorchs():
    torch = pytest.importorskip("torch")
    backbone, state = ResNet18("imagenet", norm="frozen"), read_weights(WEIGHTS)
    variables = from_torchvision(state, backbone)
    images = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
    features = jax.jit(partial(backbone.apply, train=False))(variables, images)
    tensors = {k: torch.from_numpy(x) for k, x in state.items()}
    expected = forward(tensors, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch_ops())
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "features", "size"),
    [(ResNet18, 512, 11_176_512), (ResNet50, 2048, 23_508_032)],
)
def test_sizes_are_torchvisions_without_the_last_layer(backbone, features, size):
    # torchvision: 11,689,512 and 25,557,032 with the last layer, 513,000 and 2,049,000.
    backbone = backbone("imagenet", norm="batch")
    init = partial(backbone.init_with_output, train=False)
    out, variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert out.shape == (1, features)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == size
    assert {*torchvision_names(backbone)} == {*variables["params"]}


def test_frozen_statistics_are_used_and_kept_in_training_mode():
    for norm, kept in (("frozen", True), ("batch", False)):
        backbone = SMALL["basic"].clone(norm=norm)
        model = from_linen(Classifier(backbone, 3))
        variables = from_torchvision(state_of(backbone), backbone)
        params = {"backbone": variables["params"],
                  "head": {"kernel": jnp.eye(8, 3), "bias": jnp.zeros(3)}}  # fmt: skip
        state = {"batch_stats": {"backbone": variables["batch_stats"]}}
        train = jax.jit(model.train)
        trained, updated = train(params, state, IMAGES, jax.random.key(0))
        evaluated = jax.jit(model.logits)(params, state, IMAGES)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), state, updated)
        assert jax.tree.all(same) == kept
        assert np.allclose(trained, evaluated, atol=1e-5) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.1.bn2.running_mean"),
         r"'layer1.1.bn2.running_mean' f\[4\]; it is missing"),
        (lambda s: s.update({"layer3.0.conv1.weight": np.ones(2)}),
         "tensors of ResNet18; given 'layer3.0.conv1.weight' as well"),
        (lambda s: s.update({"conv1.weight": np.ones((4, 1, 7, 7))}),
         r"'conv1.weight'\] must have shape \[4, 3, 7, 7\]; given \[4, 1, 7, 7\]"),
    ],
)  # fmt: skip
def test_a_missing_surplus_or_misshapen_tensor_is_named(change, message):
    state = state_of(SMALL["basic"])
    change(state)
    with pytest.raises(ValueError, match=message):
        from_torchvision(state, SMALL["basic"])


def test_images_are_normalised_by_imagenets_colours():
    x = np.random.default_rng(0).uniform(size=(2, 3, 5, 3)).astype(np.float32)
    expected = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(imagenet_inputs(jnp.asarray(x)), expected, atol=1e-5)
    grey = imagenet_inputs(jnp.asarray(x[..., :1]))
    np.testing.assert_allclose(grey, imagenet_inputs(jnp.repeat(x[..., :1], 3, 3)), atol=1e-5)
    # Bilinear, as torchvision resizes tensors: doubled, a pixel is 3/4 of one and 1/4 of the next.
    line = imagenet_inputs(jnp.asarray(np.float32([[0, 1]] * 2).reshape(1, 2, 2, 1)), 4)
    values = np.asarray(line)[0, 0, :, 0] * 0.229 + 0.485
    np.testing.assert_allclose(values, [0, 0.25, 0.75, 1], atol=1e-5)
    half = imagenet_inputs(jnp.asarray(x, jnp.bfloat16))  # so that convolutions stay in it
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half), expected, atol=0.03)
    with pytest.raises(ValueError, match="1 or 3 channels; given 2"):
        imagenet_inputs(jnp.asarray(x[..., :2]))


def test_group_norm_has_no_statistics_to_load():
    with pytest.raises(ValueError, match=r"backbone.norm must be one of .*given 'group'"):
        from_torchvision({}, ResNet18("imagenet"))
