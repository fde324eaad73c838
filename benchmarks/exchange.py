"""SAFLEX's default step on eight devices that share a CPU: gathered once, or summed in the solver.

    python -m benchmarks.exchange [--json] [--out FILE] [--rounds=5] [--model NAME ...]

"gathered" is what sizes choose here (`core.tree.is_little`), "reduced" the same step with every
product of conjugate gradients summed over the devices, as on larger slices. Ratios are to the plain
step, round by round. What a pod would take: docs/pods.md; here the devices wait for two cores.
"""

from __future__ import annotations

import sys
from functools import partial
from unittest import mock

import jax

from benchmarks import reporting, step_cost, timing
from benchmarks.pods import collectives
from saflex_jax.parallel import jit_runner, runners
from saflex_jax.rules import scoring

DEVICES = 8
WAYS = {"plain": "plain", "gathered": "saflex", "reduced": "saflex"}  # -> variant


def compiled(model: step_cost.Model, way: str):
    """(runner, its state, placed batch, collectives that a step runs)."""
    method = step_cost.make_method(model, step_cost.VARIANTS[WAYS[way]])
    streams = step_cost.data(model)
    new = jax.jit(method.init)(jax.random.key(0), streams.candidates.inputs[:1])
    runner = jit_runner(method.step)
    state, batch = runner.put_state(new), runner.put_batch(streams)
    little = _never_little if way == "reduced" else scoring.is_little
    with mock.patch.object(scoring, "is_little", little):
        lowered = runners.jitted(method.step, new, jax.devices()).lower(state, batch, None)
        found = collectives(lowered.compile().as_text())
        state, _ = runner.step(state, batch)  # compiles
    return runner, state, batch, sum(one.times for one in found)


def _never_little(numbers: int, **sizes: int) -> bool:
    del numbers, sizes
    return False


class Exchange(reporting.Benchmark):
    """The benchmark: models."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")

    @staticmethod
    def add_options(parser):
        """--model."""
        names = ("mlp", "small_cnn")
        parser.add_argument("--model", nargs="+", choices=tuple(step_cost.MODELS), default=names)

    def __init__(self, options):
        jax.config.update("jax_num_cpu_devices", DEVICES)  # raises once a backend has started
        self.run_in_a_step = {}
        self.series = [
            timing.Series(name, tuple(WAYS), partial(self.setups, name), options.rounds, 0.5)
            for name in options.model
        ]

    def setups(self, name: str) -> dict[str, timing.Setup]:
        """Way -> what makes its job."""
        return {way: partial(self.job, name, way) for way in WAYS}

    def job(self, name: str, way: str) -> timing.Job:
        """Steps of one way."""
        runner, state, batch, number = compiled(step_cost.MODELS[name], way)
        self.run_in_a_step[name, way] = number

        def batches():
            while True:
                yield batch

        return timing.steps_of(runner.step, state, batches(), steps=step_cost.STEPS)

    def report(self):
        """Rows of ratios."""
        rows = {}
        for series in self.series:
            for way in WAYS:
                ratios = series.ratios(way, "plain")
                rows.setdefault(series.title, {})[way] = {
                    "collectives": self.run_in_a_step.get((series.title, way)),
                    "ratio": timing.median(ratios),
                    "spread": timing.spread(ratios),
                    "gathered / reduced": timing.median(series.ratios("gathered", "reduced")),
                }
        return {"models": rows, "why_null": {s.title: s.why_null() for s in self.series}}


main = partial(reporting.command, Exchange)

if __name__ == "__main__":
    sys.exit(main())
