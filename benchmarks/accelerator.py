"""What steps, augmentation and trainings cost and give on an accelerator.

    python -m benchmarks.accelerator [--json] [--out DIR] [--minutes=12] [--parts PART ...]
                                     [--data=data] [--rounds=5] [--tiny]

Parts in the order of their value, each with a share of the minutes; what one leaves is the next
one's. DIR/PART.json is written anew whenever a part has found something, so that a run that is cut
off has lost nothing:

    costs         "steps": series -> variant -> "ms" a step, its "ratio" to the plain step, and the
                  interquartile range of that. Variants are those of `step_cost`, in f32 and with
                  bf16 compute; only time counts here.
    augment       "images_per_second": pipeline and size -> rate.
    noisy_labels  "noisy_labels": "labels: arm" -> test accuracy of each "seed", "seconds" of a
                  training, "compile_seconds" (of all programs at once). Arms: the upstream
                  pipeline, on training + trusted samples, on the trusted ones alone, ELR, SAFLEX,
                  SAFLEX inside ELR. Labels: CIFAR-10N's worst, and right ones.
    automix       "automix": "epochs" that fitted; "arms" -> "accuracy" and seconds of AutoMix,
                  mixup, and the control; "masks": epoch -> mean distance of the masks from 1/2 and
                  from the share .3 (.2 where they are 1/2), and their deviation within an image.

Each has "why_null", why something is missing, and "machine"; --json prints all parts as one. The
last two want `python -m experiments.prepare cifar10n`. `--tiny` runs every part at a size for a
CPU, those two on digits. The trainings: `accelerator_training`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from benchmarks import reporting, step_cost, timing
from benchmarks.accelerator_training import AutoMix, Clock, NoisyLabels, in_compute_dtype
from saflex_jax import augment
from saflex_jax.core.tree import identity
from saflex_jax.files import write_whole

MAIN = ("plain", "saflex", "saflex_full", "saflex_head")
ALL = ("plain", *(name for name in step_cost.VARIANTS if name not in MAIN))
# (network, candidates in a step, compute dtype, variants), by value; a quarter as many validation
# samples.
STEPS = (
    ("resnet18", 256, "float32", MAIN),
    ("resnet18", 256, "bfloat16", MAIN),
    ("vit_s", 256, "bfloat16", MAIN),
    ("vit_s", 256, "float32", MAIN),
    ("resnet18", 256, "bfloat16", ALL),
    ("vit_s", 256, "bfloat16", ALL),
    ("resnet18", 256, "float32", ALL),
    ("vit_s", 256, "float32", ALL),
    ("resnet18", 1024, "bfloat16", MAIN),
)
TINY = (("mlp", 8, "float32", MAIN), ("mlp", 8, "bfloat16", ("plain", "l2rw")))
IMAGES, TINY_IMAGES = ((2048, 32), (256, 224)), ((8, 16),)
PIPELINE = "randaugment(2, 9)"
TOGETHER = 20  # steps timed together, as the loop dispatches them; of every variant's period


class Timed:
    """A part that times series, each reported as `row(series)`."""

    def __init__(self, key: str, series: list[timing.Series], row: Callable):
        self.key, self.series, self.row = key, series, row
        self.length = sum(s.length for s in series)

    def measure(self, bar, save):
        """Series after series."""
        for series in self.series:
            series.measure(bar)
            save()

    @property
    def found(self):
        return {series.title: self.row(series) for series in self.series}

    @property
    def failed(self):
        return {series.title: why for series in self.series if (why := series.why_null())}


def step_costs(clock: Clock, tiny: bool, rounds: int) -> Timed:
    """Steps of variants on networks."""
    parts, steps = (TINY, 4) if tiny else (STEPS, TOGETHER)

    def row(series):
        return {
            name: {
                "ms": reporting.ratio(timing.median(series.times(name)), steps / 1e3),
                "ratio": timing.median(series.ratios(name, "plain")),
                "ratio_spread": timing.spread(series.ratios(name, "plain")),
            }
            for name in series.names
        }

    series = [step_series(*part, clock=clock, rounds=rounds, steps=steps) for part in parts]
    return Timed("steps", series, row)


def step_series(
    name: str, batch: int, dtype: str, variants: tuple[str, ...], *, clock: Clock, rounds: int,
    steps: int,
) -> timing.Series:  # fmt: skip
    """Times the steps of some variants; one whose turn comes too late is not compiled."""
    model = step_cost.MODELS[name]._replace(batch=batch)
    more = "" if set(MAIN) <= set(variants) else ", other rules and methods"
    streams = step_cost.data(model)

    def job(variant):
        clock.check()
        method = step_cost.make_method(
            model, step_cost.VARIANTS[variant], wrap=partial(in_compute_dtype, dtype=dtype)
        )
        placed = jax.device_put(streams)
        state = jax.jit(method.init)(jax.random.key(0), placed.candidates.inputs[:1])
        step = jax.jit(partial(method.step, reduce=identity), donate_argnums=0)
        state = jax.tree.map(jax.numpy.copy, state)  # what is donated is nobody else's
        return timing.steps_of(step, state, itertools.repeat(placed), steps=steps)

    def setups():
        jax.clear_caches()
        return {variant: partial(job, variant) for variant in variants}

    title = f"{name}, batch {batch}, {dtype}{more}"
    return timing.Series(title, variants, setups, rounds, seconds=0.0)


def augmentation(clock: Clock, tiny: bool, rounds: int) -> Timed:
    """Images that a pipeline makes in a second."""

    def series(count, side):
        def job():
            clock.check()
            images = np.random.default_rng(0).random((count, side, side, 3), np.float32)
            batch, apply = jax.device_put(timing.labelled(images)), jax.jit(augment.parse(PIPELINE))
            keys = itertools.count()
            return lambda: jax.block_until_ready(apply(jax.random.key(next(keys)), batch))

        title = f"{PIPELINE}, {count} of {side}x{side}"
        return timing.Series(title, (str(count),), lambda: {str(count): job}, rounds, 0.2)

    def rate(series):
        (count,) = series.names
        return reporting.ratio(int(count), timing.median(series.times(count)))

    sizes = TINY_IMAGES if tiny else IMAGES
    return Timed("images_per_second", [series(*size) for size in sizes], rate)


# part -> (its share of the time, (clock, options) -> the part)
PARTS = {
    "costs": (4, lambda clock, o: step_costs(clock, o.tiny, o.rounds)),
    "augment": (1, lambda clock, o: augmentation(clock, o.tiny, o.rounds)),
    "noisy_labels": (4, lambda clock, o: NoisyLabels(clock, o.data, o.tiny)),
    "automix": (3, lambda clock, o: AutoMix(clock, o.data, o.tiny)),
}


class Accelerator(reporting.Benchmark):
    """The benchmark."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")

    @staticmethod
    def add_options(parser):
        """--minutes, --parts, --data and --tiny."""
        parser.add_argument("--minutes", type=float, default=12.0, help="of all parts together")
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
        parser.add_argument("--data", type=pathlib.Path, default="data", help="prepared data sets")
        parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")

    def __init__(self, options):
        self.options, self.clock = options, Clock()
        self.parts = {
            n: make(self.clock, options) for n, (_, make) in PARTS.items() if n in options.parts
        }

    @property
    def length(self):
        return sum(part.length for part in self.parts.values())

    def measure(self, bar):
        """Part after part; each ends when its share and those before it are used up."""
        start, used = time.monotonic(), 0
        total = sum(PARTS[name][0] for name in self.parts)
        for name, part in self.parts.items():
            used += PARTS[name][0]
            self.clock.deadline = start + 60 * self.options.minutes * used / total
            part.measure(bar, partial(self.save, name))
            self.save(name)

    def save(self, name):
        """DIR/NAME.json, at no moment half of it."""
        if self.options.out is None:
            return
        file, part = self.options.out / f"{name}.json", self.parts[name]
        text = json.dumps(self.reported({name: part}), indent=1)
        write_whole(file, text + "\n")

    def report(self):
        return self.reported(self.parts)

    def reported(self, parts):
        """What parts have found, and on what."""
        why = {name: part.failed for name, part in parts.items() if part.failed}
        used = {name: getattr(self.options, name) for name in ("minutes", "rounds", "tiny")}
        machine = timing.machine(self.packages) | used
        return {p.key: p.found for p in parts.values()} | {"why_null": why, "machine": machine}

    def prepare(self, out):
        """A folder."""
        out.mkdir(parents=True, exist_ok=True)

    def write(self, report, out):
        """Every part is written already."""


main = partial(reporting.command, Accelerator)

if __name__ == "__main__":
    sys.exit(main())
