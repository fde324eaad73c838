"""Several runs in one program (a sweep) beside the same runs one after another.

    python -m benchmarks.sweep [--json] [--out FILE] [--rounds=3] [--seeds=10] [--steps=0]

"table" are whole runs, from the data to the test score, of the config wdbc and two of its arms, in
seconds with all compilation. "alone": each run compiles its own program, as one call of
`experiments.main` a seed does (starting Python is not counted); one of them is timed and multiplied
by the number of seeds. "in_turn": one after another in one process, which compiles once. "sweep":
all seeds at once, as `experiments.compare` and `experiments.suite` run them.

"features" are steps of a small network on 512 random numbers a sample, in milliseconds for all
seeds, without compilation; the two programs are timed in turn, and compilation apart.

Compiled programs that JAX keeps on the disk are not used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import optax
import tqdm

from benchmarks import reporting, timing
from benchmarks.reporting import ratio
from experiments import arms
from experiments.configs import wdbc
from saflex_jax import data, parallel
from saflex_jax.methods import saflex, supervised
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.types import Method, RunInfo, Streams

ARMS = ("upstream_train_val", "saflex_train_val")
WAYS = ("alone", "in_turn", "sweep")
ROWS, TRUSTED, FEATURES, CLASSES, BATCH = 8_000, 500, 512, 10, 256  # of the feature task
WIDTHS, STEPS = (256,), 50  # its network; steps of a seed in one timing


# --- whole runs on a table


def table_runs(arm: str, seeds: int, steps: int) -> dict[str, Callable[[], object]]:
    """Way -> all runs of an arm that way; of "alone" one run."""
    config = wdbc.get_config()
    config.train.steps = steps or config.train.steps
    chosen = arms.configs(config)[arm]
    members = [{arm: arms.of_seed(chosen, seed)} for seed in range(seeds)]

    def alone():
        return reporting.whole(arms.run(members[0], {}, progress=False))

    def in_turn():
        compiled = {}
        return [reporting.whole(arms.run(member, compiled, progress=False)) for member in members]

    def sweep():
        return [reporting.whole(found) for _, found in arms.run_each(members, {}, progress=False)]

    return dict(zip(WAYS, (alone, in_turn, sweep)))


def seconds(job: Callable[[], object]) -> float:
    """Of one call that finds nothing compiled."""
    jax.clear_caches()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


# --- steps on features


def feature_pools(seed: int) -> Streams:
    """Random features and labels; the last TRUSTED candidates are the validation samples."""
    x = np.random.default_rng(seed).normal(size=(ROWS, FEATURES)).astype(np.float32)
    batch = timing.labelled(x, CLASSES, seed=seed)
    return Streams(batch, jax.tree.map(lambda x: x[-TRUSTED:], batch))


def feature_methods() -> dict[str, Method]:
    """Plain training and SAFLEX's default rule."""
    model, tx = from_linen(Classifier(MLP(WIDTHS), CLASSES)), optax.adamw(1e-3, weight_decay=1e-2)
    run = RunInfo(ROWS, CLASSES, num_trusted=TRUSTED, num_val=TRUSTED)
    return {"plain": supervised.make(model, tx), "saflex": saflex.make(model, tx, run)}


def feature_jobs(method: Method, pools: list[Streams]) -> dict[str, timing.Setup]:
    """Way -> setup of STEPS steps of all seeds, each seed with a state and data of its own."""
    one = jax.devices()[:1]
    rows = [
        partial(data.IndexStream, data.sizes(p), batch_size=BATCH, val_batch_size=BATCH, seed=seed)
        for seed, p in enumerate(pools)
    ]
    first = pools[0].candidates.inputs[:1]
    states = [method.init(jax.random.key(seed), first) for seed in range(len(pools))]

    def steps(runner, state, stream):
        batches = map(runner.put_batch, stream)
        return timing.steps_of(runner.step, runner.put_state(state), batches, steps=STEPS)

    def in_turn():
        runner = parallel.jit_runner(method.step, devices=one)
        jobs = [steps(runner.hold(p), states[m], rows[m]()) for m, p in enumerate(pools)]
        return lambda: [job() for job in jobs]

    def sweep():
        runner = parallel.sweep_runner(method.step, devices=one).hold(pools)
        return steps(
            runner, parallel.stack_states(states), data.StackedStream([make() for make in rows])
        )

    return {"in_turn": in_turn, "sweep": sweep}


# --- the benchmark


class Sweep(reporting.Benchmark):
    """The benchmark: whole runs of a table, steps of a feature task."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    rounds = 3

    @staticmethod
    def add_options(parser):
        parser.add_argument("--seeds", type=int, default=10, help="of a table")
        parser.add_argument("--steps", type=int, default=0, help="of a table's run; 0 = config's")
        parser.add_argument("--members", type=int, default=5, help="seeds of the feature task")

    def __init__(self, options):
        self.options, methods = options, feature_methods()
        self.table = {arm: {way: [] for way in WAYS} for arm in ARMS}
        self.compilation = {name: {} for name in methods}
        self.features = {
            name: timing.Series(
                f"features, {name}",
                WAYS[1:],
                partial(self.timed_setups, name, method),
                3 * options.rounds,
                0.5,
            )
            for name, method in methods.items()
        }
        self.series = list(self.features.values())

    @property
    def length(self):
        return super().length + len(ARMS) * len(WAYS) * self.options.rounds

    def measure(self, bar):
        jax.config.update("jax_enable_compilation_cache", False)
        super().measure(bar)
        for number in range(self.options.rounds):
            for arm in ARMS:
                self.measure_table(bar, arm, number % 2 == 1)

    def measure_table(self, bar: tqdm.tqdm, arm: str, backwards: bool) -> None:
        """All ways of an arm once, there or back, so that a slow moment hits all alike."""
        jobs = table_runs(arm, self.options.seeds, self.options.steps)
        for way in reversed(WAYS) if backwards else WAYS:
            bar.set_description(f"table, {arm}, {way}")
            self.table[arm][way].append(seconds(jobs[way]))
            bar.update()

    def timed_setups(self, name: str, method: Method) -> dict[str, timing.Setup]:
        """`feature_jobs`, whose first call is timed as their compilation."""
        pools = [feature_pools(seed) for seed in range(self.options.members)]

        def timed(way, setup):
            def first():
                start = time.perf_counter()
                job = setup()
                job()
                self.compilation[name][way] = time.perf_counter() - start
                return job

            return first

        jobs = feature_jobs(method, pools)
        return {way: timed(way, setup) for way, setup in jobs.items()}

    def report(self):
        """Seconds of a table, milliseconds of a step on features, and the ratios to a sweep's."""
        table, features, seeds = {}, {}, self.options.seeds
        for arm, times in self.table.items():
            alone = [seeds * t for t in times["alone"]]
            table[arm] = {
                "alone": timing.median(alone),
                "in_turn": timing.median(times["in_turn"]),
                "sweep": timing.median(times["sweep"]),
                "alone / sweep": timing.median(map(ratio, alone, times["sweep"])),
                "in_turn / sweep": timing.median(map(ratio, times["in_turn"], times["sweep"])),
            }
        for name, series in self.features.items():
            of_way = {way: timing.median(series.times(way)) for way in WAYS[1:]}
            features[name] = {way: t and 1e3 * t / STEPS for way, t in of_way.items()}
            ratios = series.ratios("in_turn", "sweep")
            features[name] |= {
                "in_turn / sweep": timing.median(ratios),
                "spread": timing.spread(ratios),
                **{f"compilation s, {way}": s for way, s in self.compilation[name].items()},
            }
        return {
            "seeds": {"table": seeds, "features": self.options.members},
            "table": table,
            "features": features,
            "why_null": {name: series.why_null() for name, series in self.features.items()},
        }


main = partial(reporting.command, Sweep)

if __name__ == "__main__":
    sys.exit(main())
