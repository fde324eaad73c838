"""How fast a pretrained network's features are computed, beside PyTorch.

    python -m benchmarks.features [--json] [--out FILE] [--rounds=5] [--size=96]

A ResNet-18 of torchvision with random weights, on 64 images at once. "command" is what
`python -m experiments.features` does with 16 images of 32x32x3: three augmented views of each,
resized, and all features. PyTorch, where it is installed, gets the resized images.
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import reporting, timing
from benchmarks.reporting import ratio
from experiments import features
from experiments.features import Options
from saflex_jax import models

BACKBONE = models.ResNet18("imagenet", norm="frozen")
BATCH, SOURCE = 64, 32  # images that the network sees at once, pixels before they are resized
SECONDS = 1.0  # of one job in one round
JOBS = {
    "command": "draws, resizing and network, as the command runs them",
    "network": "the network alone, compiled by JAX",
    "torch": "the network alone, torch.nn.functional without gradients",
    "torch_channels_last": "the same, images and kernels in channels-last order",
}


def random_state(backbone: models.ResNet) -> dict[str, np.ndarray]:
    """A state dict with torchvision's names, as the initial network has it."""
    init = partial(backbone.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    state = {}
    for module, name in models.pretrained.torchvision_names(backbone).items():
        own = variables["params"][module]
        if "kernel" in own:
            state[f"{name}.weight"] = np.asarray(own["kernel"]).transpose(3, 2, 0, 1)
            continue
        (norm,), (statistics,) = own.values(), variables["batch_stats"][module].values()
        leaves = {"weight": norm["scale"], "bias": norm["bias"]}
        leaves |= {f"running_{k}": x for k, x in statistics.items()}
        state |= {f"{name}.{leaf}": np.asarray(x) for leaf, x in leaves.items()}
    return state


def forward(state: Mapping[str, Any], images: Any, ops: Any) -> Any:
    """Features [B, D] of images [B, 3, H, W] by torchvision's network, in another library.

    Args:
      state: name -> tensor; what blocks there are is read from the names.
      images: normalised.
      ops: with conv(x, kernel, stride), norm(x, weight, bias, mean, var), pool(x) and relu(x).
    """

    def conv_norm(x, conv, norm, stride=1):
        x = ops.conv(x, state[f"{conv}.weight"], stride)
        leaves = ("weight", "bias", "running_mean", "running_var")
        return ops.norm(x, *(state[f"{norm}.{leaf}"] for leaf in leaves))

    x = ops.pool(ops.relu(conv_norm(images, "conv1", "bn1", 2)))
    blocks = dict.fromkeys(k.rsplit(".conv", 1)[0] for k in state if ".conv" in k)
    for block in blocks:
        stride = 2 if block.endswith(".0") and not block.startswith("layer1") else 1
        bottleneck = f"{block}.conv3.weight" in state
        y, path = x, [(1, 1), (2, stride), (3, 1)] if bottleneck else [(1, stride), (2, 1)]
        for n, its_stride in path:
            y = conv_norm(y, f"{block}.conv{n}", f"{block}.bn{n}", its_stride)
            y = ops.relu(y) if n < len(path) else y
        if f"{block}.downsample.0.weight" in state:
            x = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        x = ops.relu(x + y)
    return x.mean((2, 3))


def torch_ops() -> types.SimpleNamespace:
    """PyTorch's operations for `forward`."""
    import torch
    from torch.nn import functional

    def norm(x, weight, bias, mean, var):
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    return types.SimpleNamespace(
        conv=lambda x, k, stride: functional.conv2d(x, k, None, stride, k.shape[-1] // 2),
        norm=norm,
        pool=lambda x: functional.max_pool2d(x, 3, 2, 1),
        relu=torch.relu,
    )


def processor_seconds(job: timing.Job) -> float:
    """Of all threads of this process, for one call."""
    start = time.process_time()
    job()
    return time.process_time() - start


class Features(reporting.Benchmark):
    """The benchmark: images per second, and PyTorch's time as a ratio to the command's."""

    packages = ("jax", "jaxlib", "flax", "numpy", "torch")

    def __init__(self, options):
        self.size = options.size
        setups = partial(self.setups, timing.threads())
        self.timed = timing.Series("features", tuple(JOBS), setups, options.rounds, SECONDS)
        self.series, self.processor = [self.timed], {}

    @staticmethod
    def add_options(parser):
        """The images' size."""
        parser.add_argument("--size", type=int, default=96, help="pixels that the network sees")

    @property
    def length(self):
        """And the processor's time of every job."""
        return super().length + len(JOBS)

    def measure(self, bar):
        """Seconds of the processor, too: what else runs on the machine hardly changes them.

        PyTorch gets one thread for it, since threads of it that wait use the processor.
        """
        super().measure(bar)
        for name, setup in self.setups(1).items():
            if name not in self.timed.failed:
                job = setup()
                job()
                self.processor[name] = min(map(processor_seconds, [job] * self.timed.rounds))
            bar.update()

    def setups(self, threads):
        """All jobs on the same weights."""
        state = random_state(BACKBONE)
        variables = models.from_torchvision(state, BACKBONE)
        rng, shape = np.random.default_rng(0), (BATCH, self.size, self.size, 3)
        images = rng.normal(size=shape).astype(np.float32)

        def command():
            options = Options(size=self.size, views=4, augment="shift(4) | flip")
            extract = features.make_extractor(BACKBONE, variables, options, 4)
            pixels = rng.integers(0, 256, (BATCH // 4, SOURCE, SOURCE, 3), dtype=np.uint8)
            rows = np.arange(BATCH // 4, dtype=np.int32)
            return lambda: jax.block_until_ready(extract(pixels, rows))

        def network():
            apply = jax.jit(partial(BACKBONE.apply, train=False))
            return lambda: jax.block_until_ready(apply(variables, images))

        def torch(channels_last):
            import torch

            torch.set_num_threads(threads)
            order = torch.channels_last if channels_last else torch.contiguous_format
            ops = torch_ops()

            def tensor(x):
                x = torch.from_numpy(np.array(x))
                return x.contiguous(memory_format=order) if x.ndim == 4 else x

            weights = {name: tensor(x) for name, x in state.items()}
            pixels = tensor(images.transpose(0, 3, 1, 2))

            def job():
                with torch.inference_mode():
                    forward(weights, pixels, ops)

            return job

        torches = (partial(torch, False), partial(torch, True))
        return dict(zip(JOBS, (command, network, *torches)))

    def report(self):
        """Images per second; `ratios` > 1 where the command is faster than PyTorch's network."""
        processor = {name: ratio(self.processor.get(name), BATCH / 1000) for name in JOBS}
        times = {name: timing.median(self.timed.times(name)) for name in JOBS}
        ratios = {
            name: {"ratio": timing.median(self.timed.ratios(name, "command")),
                   "spread": timing.spread(self.timed.ratios(name, "command"))}
            for name in JOBS
        }  # fmt: skip
        return {
            "size": self.size,
            "images_per_second": {name: ratio(BATCH, t) for name, t in times.items()},
            "time_over_commands": ratios,
            "processor_ms_per_image": processor,
            "jobs": JOBS,
            "why_null": self.timed.why_null(),
        }


main = partial(reporting.command, Features)

if __name__ == "__main__":
    sys.exit(main())
