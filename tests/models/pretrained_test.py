"""PyTorch's files and torchvision's networks, against NumPy and, where it is installed, PyTorch."""

import io
import pathlib
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.features import forward, torch_ops
from saflex_jax.models import Classifier, ResNet18, ResNet50, from_linen, pretrained
from saflex_jax.models.pretrained import (
    from_torchvision,
    imagenet_inputs,
    read_weights,
    torchvision_names,
)
from tests.models.weights_ import safetensors, state_of

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
    with pytest.raises(ValueError, match="1 or 3 channels; given 2"):
        imagenet_inputs(jnp.asarray(x[..., :2]))


def test_group_norm_has_no_statistics_to_load():
    with pytest.raises(ValueError, match=r"backbone.norm must be one of .*given 'group'"):
        from_torchvision({}, ResNet18("imagenet"))


# --- files. What PyTorch writes is made here by modules that bear its names.

STATE = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(5),
    "empty": np.zeros((0, 3), np.float16),
    "brain": np.asarray([1.5, -2], jnp.bfloat16),
}
KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage",
         "bfloat16": "BFloat16Storage"}  # fmt: skip


class Reference(tuple):
    """Pickled as a persistent id."""


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Reference) else None


class Call:
    """Pickled as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def pickled(obj):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(obj)
    return file.getvalue()


@pytest.fixture
def torch_(monkeypatch):
    """PyTorch's names, for pickling alone."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "torch.storage")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def add(module, name, value):
        value.__module__, value.__qualname__ = module, name
        setattr(modules[module], name, value)
        return value

    return types.SimpleNamespace(
        rebuild=add("torch._utils", "_rebuild_tensor_v2", lambda *_: None),
        load=add("torch.storage", "_load_from_bytes", lambda _: None),
        kinds={k: add("torch", kind, type(kind, (), {})) for k, kind in KINDS.items()},
    )


def tensor(torch_, storage, x):
    strides = tuple(s // x.itemsize for s in x.strides)
    return Call(torch_.rebuild, storage, 0, x.shape, strides, False, OrderedDict())


def storage(torch_, key, x, *view):
    return Reference(("storage", torch_.kinds[x.dtype.name], key, "cpu", x.size, *view))


def old_file(torch_, obj, storages):
    """The five pickles and the numbers of each storage."""
    parts = [pretrained._MAGIC, 1001, {"little_endian": True}, obj, [*storages]]
    numbers = [np.int64(x.size).tobytes() + x.tobytes() for x in storages.values()]
    return b"".join([*map(pickled, parts), *numbers])


def as_zip(torch_):
    file = io.BytesIO()
    state = OrderedDict(
        (name, tensor(torch_, storage(torch_, str(n), x), x))
        for n, (name, x) in enumerate(STATE.items())
    )
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("archive/data.pkl", pickled(state))
        opened.writestr("archive/byteorder", b"little")
        for n, x in enumerate(STATE.values()):
            opened.writestr(f"archive/data/{n}", x.tobytes())
    return file.getvalue()


def as_old(torch_):
    state = {k: tensor(torch_, storage(torch_, k, x, None), x) for k, x in STATE.items()}
    return old_file(torch_, state, STATE)


def as_pickle(torch_):
    """Each storage is a file of its own inside."""

    def inside(x):
        return Call(torch_.load, old_file(torch_, storage(torch_, "0", x, None), {"0": x}))

    return pickled(OrderedDict((k, tensor(torch_, inside(x), x)) for k, x in STATE.items()))


def as_safetensors(torch_):
    return safetensors(STATE)


FORMATS = {f.__name__: f for f in (as_zip, as_old, as_pickle, as_safetensors)}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_tensors(tmp_path, torch_, form):
    path = tmp_path / "weights"
    path.write_bytes(FORMATS[form](torch_))
    state = read_weights(path)
    assert [*state] == [*STATE]
    for name, x in STATE.items():
        assert state[name].dtype == x.dtype
        np.testing.assert_array_equal(state[name], x)


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files_are_refused(tmp_path, torch_, form):
    path, content = tmp_path / "weights", FORMATS[form](torch_)
    for size in (0, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="must be a state dict of tensors"):
            read_weights(path)


def test_no_code_of_a_file_runs(tmp_path):
    path, mark = tmp_path / "weights.pt", tmp_path / "mark"
    bad = pickled({"a": Call(exec, f"open({str(mark)!r}, 'w')")})
    path.write_bytes(bad)
    with pytest.raises(
        ValueError, match=r"only tensors are read; given (__builtin__|builtins).exec"
    ):
        read_weights(path)
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("archive/data.pkl", bad)
    with pytest.raises(ValueError, match="only tensors are read"):
        read_weights(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("obj", "message"),
    [({"a": 1.0}, "'a' must be a tensor; given float"), ([1, 2], "a dictionary; given list")],
)
def test_what_is_no_state_dict_is_refused(tmp_path, obj, message):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(obj))
    with pytest.raises(ValueError, match=message):
        read_weights(path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"), [(1, (6,), (1,)), (0, (2, 4), (4, 1)), (0, (2,), (-1,))]
)
def test_a_view_outside_of_its_storage_is_refused(offset, shape, stride):
    storage_ = pretrained._Storage("f4", np.arange(6, dtype="f4").tobytes())
    with pytest.raises(ValueError, match="a tensor"):
        pretrained._Tensor(storage_, offset, shape, stride).array()
    assert pretrained._Tensor(storage_, 1, (2, 2), (1, 3)).array().tolist() == [[1, 4], [2, 5]]


def test_pytorchs_own_files(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "shared": torch.arange(6).reshape(2, 3).T,
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "weights"

    def old(file):
        torch.save(tensors, file, _use_new_zipfile_serialization=False)

    for save in (partial(torch.save, tensors), old, partial(pickle.dump, tensors)):
        with open(path, "wb") as file:
            save(file)
        state = read_weights(path)
        assert [*state] == [*tensors]
        for name, x in tensors.items():
            np.testing.assert_array_equal(np.float32(state[name]), x.detach().float().numpy())
