"""Torchvision's weights as Flax variables, and models that start from them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.models.resnet import ResNet
from saflex_jax.models.tensor_files import check_tensors
from saflex_jax.types import Model, PathPredicate, PyTree

# Of ImageNet's colours, [1, 1, 1, 3].
MEAN = np.float32([[[[0.485, 0.456, 0.406]]]])
DEVIATION = np.float32([[[[0.229, 0.224, 0.225]]]])


def imagenet_inputs(images: jax.Array, size: int | None = None) -> jax.Array:
    """Images normalised (and resized) as networks trained on ImageNet expect.

        x <- (x - m_c) / s_c ,   m and s of ImageNet's colours

    >>> imagenet_inputs(jnp.full((2, 8, 8, 1), 0.485), 16)[0, 0, 0, 0].item()
    0.0

    Args:
      images: f[B, H, W, C] in [0, 1]; C is 3, or 1 for grey images.
      size: height and width of the result (bilinear, antialiased); None = unchanged.

    Returns:
      f[B, size, size, 3], of the images' dtype.

    Raises:
      ValueError: inputs that are not images, or another number of channels.
    """
    checks.images(images=images)
    batch, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels; given {channels}")
    if size is not None and (size, size) != (height, width):
        images = jax.image.resize(images, (batch, size, size, channels), "bilinear")
    return ((images - MEAN) / DEVIATION).astype(images.dtype)


def torchvision_names(backbone: ResNet) -> dict[str, str]:
    """Name of a module in the backbone -> torchvision's: {"Conv_0": "layer1.0.conv1", ...}.

    >>> from saflex_jax.models import ResNet18
    >>> torchvision_names(ResNet18())["Norm_6"]
    'layer2.0.bn2'
    """
    names, number = {"stem": "conv1", "Norm_0": "bn1"}, 0
    for stage, count in enumerate(backbone.blocks):
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}."
            inside = [(f"conv{n}", f"bn{n}") for n in range(1, 4 if backbone.bottleneck else 3)]
            if block == 0 and (stage > 0 or backbone.bottleneck):
                inside.append(("downsample.0", "downsample.1"))
            for conv, norm in inside:
                names[f"Conv_{number}"] = prefix + conv
                names[f"Norm_{number + 1}"] = prefix + norm
                number += 1
    return names


def from_torchvision(state: Mapping[str, np.ndarray], backbone: ResNet) -> PyTree:
    """The variables of a ResNet from a state dict with torchvision's names, f32.

    torchvision's last layer (`fc.weight`, `fc.bias`) and the counts of batches are ignored. All
    other tensors must be present, and no others.

    >>> from saflex_jax.models import ResNet18
    >>> from_torchvision({}, ResNet18("imagenet", norm="frozen"))
    Traceback (most recent call last):
        ...
    ValueError: state must have 'bn1.bias' f[64]; it is missing

    Args:
      state: name -> array, from `read_weights`.
      backbone: with stem="imagenet" and norm="batch" or "frozen"; for three colours.

    Returns:
      {"params": ..., "batch_stats": ...}.

    Raises:
      ValueError: another norm; a tensor that is missing, left over, or of another shape.

    Source: torchvision.models.resnet, whose networks with weights are "v1.5": a bottleneck's stride
    is on its 3x3 convolution.
    """
    checks.choice(("batch", "frozen"), **{"backbone.norm": backbone.norm})
    init = functools.partial(backbone.init, train=False)
    shapes = dict(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    names, wanted = torchvision_names(backbone), {}

    def key(path):
        _, module, *_, leaf = (entry.key for entry in path)
        return f"{names[module]}.{_LEAVES[leaf]}"

    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        wanted[key(path)] = tuple(np.array(leaf.shape)[_TO_TORCH[leaf.ndim]].tolist())
    given = {
        name: np.asarray(value)
        for name, value in state.items()
        if name not in ("fc.weight", "fc.bias") and not name.endswith(".num_batches_tracked")
    }
    check_tensors(given, wanted, type(backbone).__name__)

    def value(path, leaf):
        return given[key(path)].transpose(np.argsort(_TO_TORCH[leaf.ndim])).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


TUNED = ("all", "last_stage", "head")


def with_weights(model: Model, variables: PyTree) -> Model:
    """The model with its backbone initialised from given variables, on `imagenet_inputs`.

    >>> from saflex_jax.models import Classifier, ResNet18, from_linen
    >>> backbone = ResNet18("imagenet", norm="frozen")
    >>> x = jnp.zeros((1, 8, 8, 3))
    >>> variables = jax.eval_shape(lambda: backbone.init(jax.random.key(0), x, train=False))
    >>> model = with_weights(from_linen(Classifier(backbone, 10)), variables)

    Args:
      model: of images in [0, 1]; its parameters have an entry "backbone", like `Classifier`'s.
      variables: of the backbone, from `from_torchvision`.

    Raises:
      ValueError: (from init) a model with another backbone.
    """

    def normalised(inputs):
        if isinstance(inputs, dict) and "inputs" in inputs:  # of `augment.manifold_mixup`
            return {**inputs, "inputs": imagenet_inputs(inputs["inputs"])}
        return imagenet_inputs(inputs)

    def init(key, inputs):
        params, model_state = model.init(key, normalised(inputs))
        given = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
        own = {"params": params, **model_state}
        own = {name: own.get(name, {}).get("backbone") for name in given}
        if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, given):
            raise ValueError("model must have the backbone that the weights are of")
        statistics = {**model_state["batch_stats"], "backbone": given["batch_stats"]}
        params = {**params, "backbone": given["params"]}
        return params, {**model_state, "batch_stats": statistics}

    def train(params, model_state, inputs, key):
        return model.train(params, model_state, normalised(inputs), key)

    def logits(params, model_state, inputs):
        return model.logits(params, model_state, normalised(inputs))

    return Model(init, train, logits)


def tuned(backbone: ResNet, what: str) -> PathPredicate:
    """Predicate for the parameters that train; those outside of the backbone always do.

    >>> from saflex_jax.models import ResNet18
    >>> train = tuned(ResNet18(), "last_stage")
    >>> train("head/bias"), train("backbone/Conv_0/kernel"), train("backbone/Conv_18/kernel")
    (True, False, True)

    Args:
      backbone: the module at the entry "backbone" of the parameters.
      what: "head" (all but the backbone), "last_stage" (also the backbone's last stage) or "all".

    Raises:
      ValueError: another name.
    """
    checks.choice(TUNED, tune=what)
    names, last = torchvision_names(backbone), f"layer{len(backbone.blocks)}."

    def predicate(path: str) -> bool:
        _, inside, module = path.partition("backbone/")
        if not inside or what == "all":
            return True
        return what == "last_stage" and names[module.partition("/")[0]].startswith(last)

    return predicate


def only(
    tx: optax.GradientTransformation, predicate: PathPredicate
) -> optax.GradientTransformation:
    """`tx` for the selected parameters; the others stay and have no optimiser state.

    >>> from saflex_jax.core.tree import under
    >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
    >>> tx = only(optax.sgd(1.0), under("head"))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["backbone"].tolist(), updates["head"].tolist()
    ([0.0, 0.0], [-1.0, -1.0])

    Args:
      tx: optax transformation.
      predicate: path -> bool, the parameters to train.
    """

    def labels(params):
        def label(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return "tuned" if predicate(name) else "frozen"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.multi_transform({"tuned": tx, "frozen": optax.set_to_zero()}, labels)


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
           "var": "running_var"}  # fmt: skip
_TO_TORCH = {1: [0], 4: [3, 2, 0, 1]}  # kernels: [H, W, in, out] -> [out, in, H, W]
