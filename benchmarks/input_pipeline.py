"""How fast samples come, and what waiting for them adds to a training step.

    python -m benchmarks.input_pipeline [--json] [--out FILE] [--rounds=5]

8-bit images of 32x32x3, 50,000 of them, and a small CNN trained on them without augmentation.
`demand` is what the step takes when its batch is on the device already: the samples per second that
an input path must give. The paths alone, then in front of the step, as the training loop runs it:
steps are dispatched one after the other, and waited for after some.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import grain
import jax
import numpy as np
import tqdm
from PIL import Image

from benchmarks import timing
from experiments import build
from experiments.configs import digits
from saflex_jax import data, parallel
from saflex_jax.batches import floats, take
from saflex_jax.data.images import image_rows
from saflex_jax.types import Batch, Streams

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
PACKAGES = ("jax", "jaxlib", "flax", "grain", "numpy", "pillow")


def pool(inputs) -> Batch:
    """Images with random labels."""
    labels = np.random.default_rng(1).integers(10, size=len(inputs))
    rows = np.arange(len(inputs), dtype=np.int32)
    return Batch(inputs, np.eye(10, dtype=np.float32)[labels], np.ones(len(rows), bool), rows)


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
    whole, options = Streams(pool(pixels)), {"batch_size": batch_size, "seed": 0}

    def host():
        batches = data.ArrayStream(whole, **options)
        return runner, (runner.put_batch(batch) for batch in batches)

    def ahead(pools=whole):
        stream = data.ArrayStream(pools, **options)
        return runner, data.Prefetched(stream, place=runner.put_batch)

    def on_device():
        rows = data.IndexStream(data.sizes(whole), **options)
        return runner.hold(whole), (runner.put_batch(batch) for batch in rows)

    def grain_samples():
        source = grain.MapDataset.source(Samples(whole.candidates)).seed(0).shuffle().repeat()
        batches = source.batch(batch_size).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * batch_size)
        )
        return runner, (runner.put_batch(Streams(batch)) for batch in batches)

    return {
        "on_device": on_device,
        "ahead": ahead,
        "host": host,
        "grain": grain_samples,
        "files": lambda: ahead(Streams(pool(image_rows(files)))),
    }


def alone(pixels: np.ndarray, make: Callable) -> timing.Job:
    """A job that takes one batch of a path and nothing else."""
    _, batches = make()
    if make.__name__ == "on_device":
        held = jax.device_put(Streams(pool(pixels)))
        gather = jax.jit(take)
        return lambda: jax.block_until_ready(gather(held, next(batches)))
    return lambda: jax.block_until_ready(next(batches))


def small_cnn(batch_size: int):
    """(method, runner, a batch of noise) of plain training, as the digits config has it."""
    config = digits.get_config()
    config.method.name, config.train.batch_size = "erm", batch_size
    pools = Streams(pool(floats(images()[:batch_size])))
    method = build.make_method(config, pools)
    runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])
    return runner, lambda: runner.put_state(build.init_state(config, method, pools)), pools


def fed(make: Callable, new_state: Callable) -> timing.Job:
    """A job of STEPS steps on the batches of a path."""
    runner, batches = make()
    state = new_state()

    def job():
        nonlocal state
        for _ in range(STEPS):
            state, _ = runner.step(state, next(batches))
        jax.block_until_ready(state)

    return job


def measure(
    runs: dict[str, dict[str, timing.Run]],
    files: list[pathlib.Path],
    pixels: np.ndarray,
    *,
    rounds: int,
    bar: tqdm.tqdm,
) -> None:
    """Fills batch size -> {"alone", "steps"} -> path -> seconds."""
    for size, run in runs.items():
        runner, new_state, pools = small_cnn(int(size))
        made = paths(pixels, files, int(size), runner)
        bar.set_description(f"batch {size}, alone")
        setups = {name: partial(alone, pixels, make) for name, make in made.items()}
        timing.interleaved(setups, run["alone"], rounds=rounds, seconds=SECONDS, bar=bar)
        bar.set_description(f"batch {size}, step")
        there = runner.put_batch(pools)
        still = lambda: (runner, iter(lambda: there, None))  # noqa: B023
        fronted = {"demand": still, **made}
        setups = {name: partial(fed, make, new_state) for name, make in fronted.items()}
        timing.interleaved(setups, run["steps"], rounds=2 * rounds, seconds=0, bar=bar)


def report(runs: dict[str, dict[str, timing.Run]], *, rounds: int) -> dict:
    """The JSON: samples per second, and the step's time as a ratio to the one without a path."""
    made = {"samples_per_second": {}, "step": {}, "paths": PATHS, "why_null": {}}
    for size, run in runs.items():
        made["why_null"][size] = {kind: part.failed for kind, part in run.items()}
        speed, steps = made["samples_per_second"][size], made["step"][size] = {}, {}
        base = run["steps"].seconds.get("demand", [])
        if base:
            speed["demand"] = int(size) * STEPS / float(np.median(base))
        for name in PATHS:
            times = run["alone"].seconds.get(name, [])
            speed[name] = int(size) / float(np.median(times)) if times else None
            # Round by round: a slow moment of the machine is in both members of a pair.
            ratios = [a / b for a, b in zip(run["steps"].seconds.get(name, []), base)]
            steps[name] = {
                "ratio": float(np.median(ratios)) if ratios else None,
                "spread": timing.spread(ratios) if ratios else None,
                "share_alone": speed["demand"] / speed[name] if times and base else None,
            }
    made["machine"] = timing.machine(PACKAGES) | {"rounds": rounds}
    return made


def table(made: dict) -> str:
    """The report for people."""
    show = lambda value, digits: "null" if value is None else f"{value:,.{digits}f}"
    lines = timing.header(made["machine"])
    for size, speeds in made["samples_per_second"].items():
        demand = show(speeds.get("demand"), 0)
        lines += ["", f"32x32x3, batch {size}; the step alone takes {demand} samples/s"]
        heads = ("samples/s", 14), ("of the step", 14), ("step with it", 14), ("IQR", 8)
        lines += ["  path        " + "".join(f"{head:>{width}}" for head, width in heads)]
        for name, step in made["step"][size].items():
            share = step["share_alone"]
            lines.append(
                f"  {name:12}{show(speeds[name], 0):>14}"
                f"{show(share and 100 * share, 1):>13}%{show(step['ratio'], 3):>14}"
                f"{show(step['spread'], 3):>8}"
            )
    lines += ["", *(f"{name}: {what}" for name, what in made["paths"].items())]
    for size, kinds in made["why_null"].items():
        lines += [f"null: {size} {k} {n}: {why}" for k, f in kinds.items() for n, why in f.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    runs = {
        str(size): {kind: timing.Run({}, {}) for kind in ("alone", "steps")} for size in BATCH_SIZES
    }

    def start(options):
        total = len(runs) * (
            len(PATHS) * (options.rounds + 1) + (len(PATHS) + 1) * (2 * options.rounds + 1)
        )

        def run(bar):
            pixels = images()
            with tempfile.TemporaryDirectory() as folder:
                files = write_files(pathlib.Path(folder), pixels[:FILES])
                measure(runs, files, pixels, rounds=options.rounds, bar=bar)

        return total, run

    return timing.command(
        parser,
        argv,
        start=start,
        report=lambda options: report(runs, rounds=options.rounds),
        table=table,
    )


if __name__ == "__main__":
    sys.exit(main())
