import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saflex_jax.train.digest import digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3, 2)])
def test_every_bit_counts_and_every_place(dtype, shape):
    x = np.asarray(jax.random.bits(jax.random.key(0), shape, "uint32") % 2, dtype)
    before = digests({"x": x})
    for bit in range(0, 8 * x.nbytes, 1 if x.nbytes < 32 else 7):
        changed = np.frombuffer(x.tobytes(), np.uint8).copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert digests({"x": changed.view(x.dtype).reshape(shape)}) != before, bit
    if x.ndim == 3 and dtype != "bool":
        for swapped in (x[::-1], x[:, ::-1], x[:, :, ::-1]):
            assert digests({"x": swapped}) != before or (swapped == x).all()


@pytest.mark.parametrize(
    "spec", [(), ("a",), ("b", "a"), (None, "a"), (None, None, "b"), (("a", "b"),)]
)
def test_placement_does_not_count(spec):
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests({"x": placed}) == digests({"x": np.asarray(x)})


def test_keys_are_their_data_and_blocks_are_joined():
    key = jax.random.key(3)
    assert digests([key]) == digests([jax.random.key_data(key)])
    long = jnp.arange(2**16 + 5)  # longer than a block
    assert digests([long.reshape(-1, 1)]) == digests([long]) == digests([long[None]])


def test_two_arrays_of_one_path_are_refused():
    x = np.zeros(3)
    with pytest.raises(ValueError, match="two have 'a/b'"):
        digests({"a": {"b": x}, "a/b": x})
