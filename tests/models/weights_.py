"""State dicts of torchvision's ResNets with random numbers, and a file of them."""

import json

import numpy as np


def random_state(blocks, width, bottleneck):
    """torchvision's names and shapes, written down a second time."""
    rng, state = np.random.default_rng(1), {}

    def conv(name, size, inside, outside):
        shape = (outside, inside, size, size)
        state[f"{name}.weight"] = rng.normal(size=shape) * (2 / (size**2 * inside)) ** 0.5

    def norm(name, channels):
        for leaf in ("weight", "running_var"):
            state[f"{name}.{leaf}"] = rng.uniform(0.5, 1.5, channels)
        for leaf in ("bias", "running_mean"):
            state[f"{name}.{leaf}"] = rng.normal(size=channels) / 4
        state[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", 7, 3, width)
    norm("bn1", width)
    inside = width
    for stage, count in enumerate(blocks, 1):
        middle = width * 2 ** (stage - 1)
        outside = middle * (4 if bottleneck else 1)
        for block in range(count):
            prefix = f"layer{stage}.{block}."
            path = [(3, inside, middle), (3, middle, middle)]
            if bottleneck:
                path = [(1, inside, middle), (3, middle, middle), (1, middle, outside)]
            for n, shape in enumerate(path, 1):
                conv(f"{prefix}conv{n}", *shape)
                norm(f"{prefix}bn{n}", shape[2])
            if block == 0 and inside != outside:
                conv(f"{prefix}downsample.0", 1, inside, outside)
                norm(f"{prefix}downsample.1", outside)
            inside = outside
    state["fc.weight"], state["fc.bias"] = rng.normal(size=(5, inside)), rng.normal(size=5)
    return {name: x if name.endswith("tracked") else np.float32(x) for name, x in state.items()}


def state_of(backbone):
    return random_state(backbone.blocks, backbone.width, backbone.bottleneck)


KINDS = {"float32": "F32", "int64": "I64", "float16": "F16", "bfloat16": "BF16"}


def safetensors(state):
    """The bytes of a .safetensors file."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in state.items():
        offsets = [end, end := end + x.nbytes]
        header[name] = {"dtype": KINDS[x.dtype.name], "shape": x.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in state.values())
