"""How fast samples come, and what waiting for them adds to a training step.

    python -m benchmarks.input_pipeline [--json] [--out FILE] [--rounds=5]

8-bit images of 32x32x3, 50,000 of them, and a small CNN trained on them without augmentation.
`demand` is what the step takes when its batch is on the device already: the samples per second that
an input path must give. The paths alone, then in front of the step, as the training loop runs it:
steps are dispatched one after the other, and waited for after some.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import grain
import jax
import numpy as np
from PIL import Image

from benchmarks import reporting, timing
from benchmarks.reporting import ratio
from experiments import build
from experiments.configs import digits
from saflex_jax import data, parallel
from saflex_jax.batches import floats, take
from saflex_jax.data.images import image_rows
from saflex_jax.types import Batch, PyTree, Streams

SIZE, FILES = 50_000, 2_000  # samples in memory, and as files
BATCH_SIZES = (128, 256)
STEPS = 10  # dispatched before they are waited for
SECONDS = 0.5  # of one path alone, in one round
PATHS = {
    "on_device": "the whole set on the device; rows of it are sent and gathered in compiled code",
    "ahead": "arrays on the host, batches made and sent ahead by two threads",
    "host": "arrays on the host, a batch made and sent when it is asked for",
    "grain": "grain's usual pipeline: a sample at a time, shuffled, batched, read ahead",
    "files": "PNG files of one image each, decoded and sent ahead by two threads",
}


def images() -> np.ndarray:
    """uint8[SIZE, 32, 32, 3] of noise."""
    return np.random.default_rng(0).integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8)


def write_files(folder: pathlib.Path, pixels: np.ndarray) -> list[pathlib.Path]:
    """An image a file."""
    files = [folder / f"{number}.png" for number in range(len(pixels))]
    for file, image in zip(files, pixels):
        Image.fromarray(image).save(file)
    return files


class Samples:
    """One sample at a time, as grain asks for."""

    def __init__(self, samples: Batch):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, i: int) -> Batch:
        sample = jax.tree.map(lambda x: x[i], self.samples)
        return sample._replace(inputs=floats(sample.inputs))


def paths(
    pixels: np.ndarray, files: list[pathlib.Path], batch_size: int, runner: parallel.Runner
) -> dict[str, Callable[[], tuple[parallel.Runner, Iterator[Streams]]]]:
    """path -> setup of (the runner, batches that its step takes)."""
    whole, options = Streams(timing.labelled(pixels)), {"batch_size": batch_size, "seed": 0}

    def host():
        return runner, map(runner.put_batch, data.ArrayStream(whole, **options))

    def ahead(pools=whole):
        stream = data.ArrayStream(pools, **options)
        return runner, data.Prefetched(stream, place=runner.put_batch)

    def on_device():
        rows = data.IndexStream(data.sizes(whole), **options)
        return runner.hold(whole), map(runner.put_batch, rows)

    def grain_samples():
        source = grain.MapDataset.source(Samples(whole.candidates)).seed(0).shuffle().repeat()
        batches = source.batch(batch_size).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * batch_size)
        )
        return runner, (runner.put_batch(Streams(batch)) for batch in batches)

    def from_files():
        return ahead(Streams(timing.labelled(image_rows(files))))

    return dict(zip(PATHS, (on_device, ahead, host, grain_samples, from_files)))


def training(pools: Streams) -> tuple[parallel.Runner, Callable[[], PyTree]]:
    """(runner, what makes a state) of plain training as the digits config has it."""
    config = digits.get_config()
    config.method.rule, config.train.batch_size = "as_given", len(pools.candidates.labels)
    method = build.make_method(config, pools)
    runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])
    return runner, lambda: runner.put_state(build.init_state(config, method, pools))


def alone(pixels: np.ndarray, make: Callable) -> timing.Job:
    """A job that takes one batch of a path and nothing else."""
    _, batches = make()
    if make.__name__ == "on_device":
        held = jax.device_put(Streams(timing.labelled(pixels)))
        gather = jax.jit(take)
        return lambda: jax.block_until_ready(gather(held, next(batches)))
    return lambda: jax.block_until_ready(next(batches))


def fed(make: Callable, new_state: Callable) -> timing.Job:
    """A job of STEPS steps on the batches of a path."""
    runner, batches = make()
    return timing.steps_of(runner.step, new_state(), batches, steps=STEPS)


class InputPipeline(reporting.Benchmark):
    """The benchmark: batch size -> what the paths give alone, and the step behind them."""

    packages = ("jax", "jaxlib", "flax", "grain", "numpy", "pillow")

    def __init__(self, options):
        rounds = options.rounds
        self.alone = {
            str(n): timing.Series(f"batch {n}", tuple(PATHS), partial(self.alone_setups, n), rounds,
                                  SECONDS)
            for n in BATCH_SIZES
        }  # fmt: skip
        self.steps = {
            str(n): timing.Series(f"step of {n}", ("demand", *PATHS), partial(self.step_setups, n),
                                  2 * rounds, 0.0)
            for n in BATCH_SIZES
        }  # fmt: skip
        self.series = [*self.alone.values(), *self.steps.values()]

    def measure(self, bar):
        """With files that are there as long as it measures."""
        self.pixels = images()
        with tempfile.TemporaryDirectory() as folder:
            self.files = write_files(pathlib.Path(folder), self.pixels[:FILES])
            super().measure(bar)

    def training(self, size):
        """(path -> what makes it, runner, what makes a state, a batch) of a batch size."""
        noise = Streams(timing.labelled(floats(self.pixels[:size])))
        runner, new_state = training(noise)
        return paths(self.pixels, self.files, size, runner), runner, new_state, noise

    def alone_setups(self, size):
        """Of paths that give batches to nobody."""
        makers, *_ = self.training(size)
        return {name: partial(alone, self.pixels, make) for name, make in makers.items()}

    def step_setups(self, size):
        """Of the step on the batches of a path, or ("demand") on one that is there already."""
        makers, runner, new_state, noise = self.training(size)
        there = runner.put_batch(noise)
        makers["demand"] = lambda: (runner, itertools.repeat(there))
        return {name: partial(fed, make, new_state) for name, make in makers.items()}

    def report(self):
        """Samples per second, and the step's time as a ratio to the one without a path."""
        report = {"samples_per_second": {}, "step": {}, "paths": PATHS, "why_null": {}}
        for size, steps in self.steps.items():
            alone, speed = self.alone[size], {}
            speed["demand"] = ratio(int(size) * STEPS, timing.median(steps.times("demand")))
            for name in PATHS:
                speed[name] = ratio(int(size), timing.median(alone.times(name)))
            report["samples_per_second"][size] = speed
            report["step"][size] = {
                name: {
                    "ratio": timing.median(steps.ratios(name, "demand")),
                    "spread": timing.spread(steps.ratios(name, "demand")),
                    "share_alone": ratio(speed["demand"], speed[name]),
                }
                for name in PATHS
            }
            report["why_null"][size] = {"alone": alone.why_null(), "steps": steps.why_null()}
        return report


main = partial(reporting.command, InputPipeline)

if __name__ == "__main__":
    sys.exit(main())
