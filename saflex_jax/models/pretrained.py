"""Weights of PyTorch's files as Flax variables; PyTorch is not needed, and no code of a file runs.

state = read_weights("resnet18.pt")
variables = from_torchvision(state, ResNet18("imagenet", norm="frozen"))
"""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saflex_jax import checks
from saflex_jax.models.resnet import ResNet
from saflex_jax.types import Model, PathPredicate, PyTree

# --- files of tensors

_SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "I64": "i8", "I32": "i4",
    "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2",
    "BFloat16Storage": jnp.bfloat16, "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2",
    "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # what PyTorch's files had first before they were zip archives


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict by their names.

    Reads .safetensors, and any file of `torch.save` or `pickle.dump`: a name in it that is not one
    of a few of PyTorch's is refused, so that none of its code runs.

    Args:
      path: the file.

    Returns:
      name -> array of the tensor's shape and dtype.

    Raises:
      ValueError: a file of another kind, a truncated one, or one that holds anything but tensors.

    Source: the formats as torch.serialization (2.x) writes them and as the safetensors
    documentation describes them.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            state = _read_zip(content)
        elif content[8:9] == b"{":
            state = _read_safetensors(content)
        else:
            state = _read_pickle(content)
        if not isinstance(state, Mapping):
            raise ValueError(f"it must hold a dictionary; given {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, _Tensor):
                raise ValueError(f"{name!r} must be a tensor; given {type(value).__name__}")
        return {name: tensor.array() for name, tensor in state.items()}
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError),
        *(AttributeError, TypeError, ValueError, UnicodeDecodeError),
    ) as error:
        raise ValueError(f"{path} must be a state dict of tensors: {error}") from error


class _Storage:
    """The numbers that tensors are views of; old files give them after the tensors."""

    def __init__(self, dtype: np.typing.DTypeLike, content: bytes = b""):
        self.dtype, self.content = np.dtype(dtype), content


class _Tensor:
    """A view of a storage: elements at offset + <place, stride>."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple, stride: tuple):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def array(self) -> np.ndarray:
        """A copy of its elements; the view is checked against the storage's size."""
        values = np.frombuffer(self.storage.content, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if len(self.shape) != len(self.stride) or min((self.offset, *self.shape, *self.stride)) < 0:
            raise ValueError(f"a tensor must have a shape and strides; given {vars(self)}")
        if 0 not in self.shape and last >= len(values):
            raise ValueError(f"a tensor ends at {last} of {len(values)} numbers; truncated?")
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        strides = [s * values.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Admits what a state dict consists of."""

    def __init__(self, file: io.BytesIO, storage: Callable[..., _Storage] | None = None):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _ADMITTED:
            raise ValueError(f"only tensors are read; given {module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, given: tuple) -> _Storage:
        if self._storage is None:
            raise ValueError("a storage must be in the file; given a reference")
        return self._storage(*given)


def _rebuild(storage, offset, shape, stride, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(tensor, *_):
    return tensor


def _bytes(text, encoding):  # as old pickles write them
    return text.encode("latin1")


def _read_pickle(content: bytes) -> Any:
    """A plain pickle, or what `torch.save` wrote before it wrote zip archives."""
    file = io.BytesIO(content)
    first = _Unpickler(file).load()
    if first != _MAGIC:
        return first
    storages: dict[str, _Storage] = {}

    def storage(kind, dtype, key, place, size, view=None):
        if view is not None:
            raise ValueError("views of storages are not read")
        return storages.setdefault(key, _Storage(dtype))

    for _ in ("version of the format", "sizes of integers"):
        _Unpickler(file).load()
    state = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        storages[key].content = file.read(size)
    return state


def _read_zip(content: bytes) -> Any:
    """What `torch.save` writes: a pickle, and a member for each storage."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        (pickled,) = (name for name in opened.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in opened.namelist() and opened.read(f"{root}byteorder") != b"little":
            raise ValueError("its bytes must be in little-endian order; given big")

        @functools.cache  # tensors may share one
        def read(key):
            return opened.read(f"{root}data/{key}")

        def storage(kind, dtype, key, place, size):
            return _Storage(dtype, read(key))

        return _Unpickler(io.BytesIO(opened.read(pickled)), storage).load()


def _read_safetensors(content: bytes) -> dict[str, _Tensor]:
    """The size of the header in 8 bytes, the header in JSON, and the bytes of all tensors."""
    start = 8 + int.from_bytes(content[:8], "little")
    state = {}
    for name, about in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        storage = _Storage(_SAFETENSORS[about["dtype"]], content[start + begin : start + end])
        shape = tuple(about["shape"])
        strides = [int(np.prod(shape[n + 1 :])) for n in range(len(shape))]
        state[name] = _Tensor(storage, 0, shape, tuple(strides))
    return state


_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _read_pickle,
}

# --- torchvision's networks

# Of ImageNet's colours, [1, 1, 1, 3].
MEAN = np.float32([[[[0.485, 0.456, 0.406]]]])
DEVIATION = np.float32([[[[0.229, 0.224, 0.225]]]])


def imagenet_inputs(images: jax.Array, size: int | None = None) -> jax.Array:
    """Images as networks that were trained on ImageNet expect them.

        x <- (x - m_c) / s_c ,   m and s of ImageNet's colours

    >>> imagenet_inputs(jnp.full((2, 8, 8, 1), 0.485), 16)[0, 0, 0, 0].item()
    0.0

    Args:
      images: f32[B, H, W, C] in [0, 1]; C is 3, or 1 for grey ones.
      size: height and width that they are resized to (bilinear, antialiased); None = as they are.

    Returns:
      f32[B, size, size, 3].

    Raises:
      ValueError: no images, or another number of channels.
    """
    checks.images(images=images)
    batch, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels; given {channels}")
    if size is not None and (size, size) != (height, width):
        images = jax.image.resize(images, (batch, size, size, channels), "bilinear")
    return (images - MEAN) / DEVIATION


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

    `fc.weight` and `fc.bias`, torchvision's last layer, are left out, and so are the counts of
    batches. Everything else must be there, and nothing else may be.

    >>> from saflex_jax.models import ResNet18
    >>> from_torchvision({}, ResNet18("imagenet", norm="frozen"))
    Traceback (most recent call last):
        ...
    ValueError: state must have 'bn1.bias' f[64]; it is missing

    Args:
      state: name -> array, as `read_weights` gives it.
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
    for name in sorted({*wanted, *given}):
        if name not in given:
            raise ValueError(f"state must have {name!r} f{list(wanted[name])}; it is missing")
        if name not in wanted:
            raise ValueError(
                f"state must have the tensors of {type(backbone).__name__}; given {name!r} as well"
            )
        if given[name].shape != wanted[name]:
            raise ValueError(
                f"state[{name!r}] must have shape {list(wanted[name])}; "
                f"given {list(given[name].shape)}"
            )

    def value(path, leaf):
        return given[key(path)].transpose(np.argsort(_TO_TORCH[leaf.ndim])).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


TUNED = ("all", "last_stage", "head")


def with_weights(model: Model, variables: PyTree) -> Model:
    """The model, its backbone started from these variables and fed with `imagenet_inputs`.

    Args:
      model: of images in [0, 1]; its parameters have an entry "backbone", as those of `Classifier`.
      variables: of the backbone, as `from_torchvision` gives them.

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
    """Which parameters of a model on this backbone train; those outside of it always do.

    >>> from saflex_jax.models import ResNet18
    >>> train = tuned(ResNet18(), "last_stage")
    >>> train("head/bias"), train("backbone/Conv_0/kernel"), train("backbone/Conv_18/kernel")
    (True, False, True)

    Args:
      backbone: at the entry "backbone" of the parameters.
      what: "head" (all but the backbone), "last_stage" (and the backbone's last stage), "all".

    Raises:
      ValueError: another word.
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
    """`tx` for the parameters that are selected; the others stay, and have no optimiser state.

    >>> from saflex_jax.core.tree import under
    >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
    >>> tx = only(optax.sgd(1.0), under("head"))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["backbone"].tolist(), updates["head"].tolist()
    ([0.0, 0.0], [-1.0, -1.0])
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
