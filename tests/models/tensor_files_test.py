"""PyTorch's files: made here by modules that bear its names, and by PyTorch where there is one."""

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.models import tensor_files
from saflex_jax.models.tensor_files import read_weights
from tests.models.weights_ import safetensors

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
    parts = [tensor_files._MAGIC, 1001, {"little_endian": True}, obj, [*storages]]
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


SET = (None, {"dtype": "f4", "__doc__": "changed"})  # attributes of the object under it


@pytest.mark.parametrize(
    "name", ["torch BFloat16Storage", "torch._utils _rebuild_tensor_v2", "_codecs encode"]
)
def test_no_file_changes_what_it_names(tmp_path, name):
    def held():
        return jnp.bfloat16.dtype, *(f.__doc__ for f in tensor_files._ADMITTED.values())

    before, path = held(), tmp_path / "weights"
    path.write_bytes(
        b"\x80\x02c" + "\n".join(name.split()).encode() + b"\n" + pickled(SET)[2:-1] + b"b."
    )
    with pytest.raises(ValueError, match="must be a state dict of tensors"):
        read_weights(path)
    assert held() == before


@pytest.mark.parametrize(
    "offsets",
    [
        {"a": [0, 16]},
        {"a": [-8, 0]},
        {"a": [8, 0]},
        {"a": [8, 16]},
        {"a": [0, 8], "b": [4, 12]},
        {"a": [0, 8], "b": [8, 16]},
    ],
    ids=["another size", "negative", "reversed", "hole", "overlap", "bytes are left"],
)
def test_offsets_that_contradict_the_tensors_are_refused(tmp_path, offsets):
    about = {"dtype": "F32", "shape": [2]}
    header = json.dumps({name: {**about, "data_offsets": o} for name, o in offsets.items()})
    content = len(header).to_bytes(8, "little") + header.encode() + b"\0" * 20
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ValueError, match=r"must begin at \d+ and have the bytes|must end with it"):
        read_weights(tmp_path / "weights")


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
    ("offset", "shape", "stride"),
    [(1, (6,), (1,)), (0, (2, 4), (4, 1)), (0, (2,), (-1,)), (0, (10**12,), (0,))],
)
def test_a_view_outside_of_its_storage_is_refused(offset, shape, stride):
    storage_ = tensor_files._Storage("f4", np.arange(6, dtype="f4").tobytes())
    with pytest.raises(ValueError, match="a tensor"):
        tensor_files._Tensor(storage_, offset, shape, stride).array()
    assert tensor_files._Tensor(storage_, 1, (2, 2), (1, 3)).array().tolist() == [[1, 4], [2, 5]]


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
