"""Weight files of PyTorch and safetensors, read without PyTorch; no code in a file runs."""

from __future__ import annotations

import collections
import functools
import io
import json
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy  # noqa: F401 which names bfloat16 to NumPy
import numpy as np

from saflex_jax.files import renamed

_SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4",
    "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16", "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2",
    "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # what PyTorch's files had first before they were zip archives


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict by their names.

    Reads .safetensors, and any file of `torch.save` or `pickle.dump`. It admits only a few names of
    PyTorch in a pickle, so that none of the file's code runs. An example is at `write_weights`.

    Args:
      path: the file.

    Returns:
      name -> array of the tensor's shape and dtype.

    Raises:
      ValueError: a file of another kind, a truncated one, or one that holds more than tensors.

    Source: the formats of torch.serialization (2.x) and of the safetensors documentation.
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
        *(AttributeError, TypeError, ValueError, OverflowError),
    ) as error:
        raise ValueError(f"{path} must be a state dict of tensors: {error}") from error


def write_weights(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by their names as a .safetensors file, whole or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_weights(f"{folder}/x.safetensors", {"bias": np.float32([1, 2])})
    ...     read_weights(f"{folder}/x.safetensors")["bias"].tolist()
    [1.0, 2.0]

    Args:
      path: the file.
      state: name -> array.

    Raises:
      ValueError: a tensor of a dtype that the format does not have.
    """
    kinds = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
    arrays = {name: np.asarray(x, order="C") for name, x in state.items()}
    header, end = {}, 0
    for name, x in arrays.items():
        if x.dtype not in kinds:
            raise ValueError(f"{name!r} must be of one of {list(kinds.values())}; given {x.dtype}")
        offsets = [end, end := end + x.nbytes]
        header[name] = {"dtype": kinds[x.dtype], "shape": x.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with renamed(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in arrays.values():
            file.write(x.tobytes())


def check_tensors(
    given: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], network: str
) -> None:
    """Raises unless a state dict has exactly the wanted names and their shapes.

    >>> check_tensors({}, {"conv1.weight": (4,)}, "ResNet18")
    Traceback (most recent call last):
        ...
    ValueError: state must have 'conv1.weight' f[4]; it is missing
    """
    for name in sorted({*wanted, *given}):
        if name not in given:
            raise ValueError(f"state must have {name!r} f{list(wanted[name])}; it is missing")
        if name not in wanted:
            raise ValueError(f"state must have the tensors of {network}; given {name!r} as well")
        if given[name].shape != tuple(wanted[name]):
            raise ValueError(
                f"state[{name!r}] must have shape {list(wanted[name])}; "
                f"given {list(given[name].shape)}"
            )


class _Storage:
    """The numbers that tensors are views of; old files give them after the tensors."""

    __slots__ = ("content", "dtype")

    def __init__(self, dtype: np.typing.DTypeLike, content: bytes = b""):
        self.dtype, self.content = np.dtype(dtype), content


class _Tensor(NamedTuple):
    """A view of a storage: elements at offset + <place, stride>."""

    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple

    def array(self) -> np.ndarray:
        """A copy of its elements; the view is checked against the storage's size."""
        values = np.frombuffer(self.storage.content, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if len(self.shape) != len(self.stride) or min((self.offset, *self.shape, *self.stride)) < 0:
            raise ValueError(f"a tensor must have a shape and strides; given {self[1:]}")
        if math.prod(self.shape) > len(values):
            raise ValueError(f"a tensor of shape {self.shape} has only {len(values)} numbers")
        if 0 not in self.shape and last >= len(values):
            raise ValueError(f"a tensor ends at {last} of {len(values)} numbers; truncated?")
        if 0 in self.shape:
            return np.empty(self.shape, values.dtype)
        strides = [s * values.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy()


class _Call(NamedTuple):
    """A function that a pickle can call, and not change: a function's attributes can be set."""

    function: Callable

    def __call__(self, *arguments):
        return self.function(*arguments)


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
        return _Call(_ADMITTED[module, name])

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
    """The size of the header in 8 bytes, the header in JSON, and the bytes of all tensors.

    Tensors follow each other without overlap or hole, to the end of the file.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    state, last = dict.fromkeys(header), 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = about["data_offsets"]
        shape, dtype = tuple(about["shape"]), np.dtype(_SAFETENSORS[about["dtype"]])
        if begin != last or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{name!r} must begin at {last} and have the bytes of {dtype}{list(shape)}; "
                f"given offsets {[begin, end]}"
            )
        last = end
        strides = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
        state[name] = _Tensor(
            _Storage(dtype, content[start + begin : start + end]), 0, shape, strides
        )
    if start + last != len(content):
        raise ValueError(f"its tensors must end with it, at {len(content)}; given {start + last}")
    return state


_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _read_pickle,
}
