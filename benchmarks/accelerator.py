"""What a step costs on an accelerator, as a ratio to the plain step; RandAugment's throughput.

    python -m benchmarks.accelerator [--json] [--out FILE] [--minutes=5] [--rounds=5] [--tiny]

`step_cost` counts operations and times on a CPU; here only time counts, of the same rules and
methods, in f32 and with bf16 compute. Parts come in the order of their value; none begins after
`--minutes`, and the JSON is written anew after each, so that a run that is cut off has lost
nothing. `--tiny` runs every part at a size for a CPU.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from functools import partial

import jax
import numpy as np

from benchmarks import reporting, step_cost, timing
from saflex_jax import augment
from saflex_jax.core.tree import cast_floats, identity
from saflex_jax.types import Model

MAIN = ("plain", "saflex", "saflex_full", "saflex_head")
OTHERS = (
    "saflex_full_scores_every4", "saflex_full_cg", "l2rw", "meta_weight_net", "implicit",
    "sla_rotation", "automix",
)  # fmt: skip
# (network, candidates in a step, compute dtype, variants), by value; a quarter as many validation
# samples.
PARTS = (
    ("resnet18", 256, "float32", MAIN),
    ("resnet18", 256, "bfloat16", MAIN),
    ("vit_s", 256, "bfloat16", MAIN),
    ("resnet18", 256, "float32", ("plain", *OTHERS)),
    ("vit_s", 256, "float32", MAIN),
    ("resnet18", 1024, "bfloat16", MAIN),
)
TINY = (("small_cnn", 8, "float32", (*MAIN, *OTHERS)), ("mlp", 8, "bfloat16", MAIN))
IMAGES = {(2048, 32): "randaugment(2, 9)", (256, 224): "randaugment(2, 9)"}
STEPS = 20  # timed together, as the loop dispatches them; a multiple of every variant's period


def in_compute_dtype(model: Model, dtype: str) -> Model:
    """The network computed in `dtype`; parameters, statistics and logits stay f32."""
    if dtype == "float32":
        return model

    def train(params, model_state, inputs, key):
        half = cast_floats((params, model_state, inputs), dtype)
        return cast_floats(model.train(*half, key), "float32")

    def logits(params, model_state, inputs):
        half = cast_floats((params, model_state, inputs), dtype)
        return cast_floats(model.logits(*half), "float32")

    return Model(model.init, train, logits)


def step_series(
    name: str, batch: int, dtype: str, variants: tuple[str, ...], *, rounds: int, steps: int
) -> timing.Series:
    """Times the steps of some variants."""
    model = step_cost.MODELS[name]._replace(batch=batch)
    more = "" if set(MAIN) <= set(variants) else ", other rules and methods"
    streams = step_cost.data(model)

    def job(variant):
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

    return timing.Series(
        f"{name}, batch {batch}, {dtype}{more}", variants, setups, rounds, seconds=0.0
    )


def augment_series(size: tuple[int, int], text: str, *, rounds: int) -> timing.Series:
    """Times one pipeline on (images, pixels a side)."""
    count, side = size

    def job():
        images = np.random.default_rng(0).random((count, side, side, 3), np.float32)
        batch, apply = jax.device_put(timing.labelled(images)), jax.jit(augment.parse(text))
        keys = itertools.count()
        return lambda: jax.block_until_ready(apply(jax.random.key(next(keys)), batch))

    return timing.Series(
        f"{text}, {count} of {side}x{side}", (text,), lambda: {text: job}, rounds, 0.2
    )


class Accelerator(reporting.Benchmark):
    """The benchmark: a series a part."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")

    @staticmethod
    def add_options(parser):
        """--minutes and --tiny."""
        parser.add_argument("--minutes", type=float, default=5.0, help="no part begins after them")
        parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")

    def __init__(self, options):
        self.seconds, self.out, rounds = 60 * options.minutes, options.out, options.rounds
        parts, steps = (TINY, 4) if options.tiny else (PARTS, STEPS)
        images = {(8, 16): "randaugment(2, 9)"} if options.tiny else IMAGES
        self.steps = steps
        self.of_steps = [step_series(*part, rounds=rounds, steps=steps) for part in parts]
        self.of_images = {size: augment_series(size, text, rounds=rounds)
                          for size, text in images.items()}  # fmt: skip
        first, *rest = self.of_steps
        self.series = [first, *self.of_images.values(), *rest]

    def measure(self, bar):
        """Part after part, as long as there is time."""
        start = time.monotonic()
        for series in self.series:
            if time.monotonic() - start > self.seconds:
                series.failed |= dict.fromkeys(series.names, "no time was left")
                continue
            series.measure(bar)
            if self.out is not None:
                self.out.write_text(json.dumps(self.report(), indent=1) + "\n")

    def report(self):
        """Milliseconds a step, and its ratio to the plain one; images a second."""
        steps = {series.title: self.rows(series) for series in self.of_steps}
        speed = {
            series.title: reporting.ratio(size[0], timing.median(series.times(series.names[0])))
            for size, series in self.of_images.items()
        }
        why = {series.title: series.why_null() for series in self.series if series.why_null()}
        return {"steps": steps, "images_per_second": speed, "why_null": why}

    def rows(self, series: timing.Series) -> dict[str, dict]:
        """variant -> its numbers."""
        return {
            name: {
                "ms": reporting.ratio(timing.median(series.times(name)), self.steps / 1e3),
                "ratio": timing.median(series.ratios(name, "plain")),
                "ratio_spread": timing.spread(series.ratios(name, "plain")),
            }
            for name in series.names
        }


main = partial(reporting.command, Accelerator)

if __name__ == "__main__":
    sys.exit(main())
