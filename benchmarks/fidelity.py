"""How true the first-order step is: scores against brute force, over the course of training.

    python -m benchmarks.fidelity [--json] [--out FILE] [--figure FILE.png] [--seeds=3]

Every direction beside every truth (`benchmarks.truths`), at moments of plain training with three
optimisers; the figures are FILE.png and, over the course of training, FILE_course.png.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import reporting, timing, truths
from experiments import task
from experiments.configs import digits, wdbc
from saflex_jax import checks, data, models
from saflex_jax._compat import enable_x64
from saflex_jax.data.seeds import generator
from saflex_jax.rules import Scoring
from saflex_jax.types import Batch, Model, Params, PyTree, Streams, TrainState

CONVEX, OPTIMUM = "logistic", "optimum"  # its optimum, where the implicit truth is exact
MOMENTS = (0, 20, 100, 400)  # steps of plain training
BATCH, VAL = 32, 16  # of training, and samples whose scores are looked at; a small val batch
L2 = 1e-3
RATES, MOMENTUM = {"sgd": 0.1, "momentum": 0.02, "adam": 5e-3, "retrain": 0.1}, 0.9
TX = {
    "sgd": optax.sgd(RATES["sgd"]),
    "momentum": optax.sgd(RATES["momentum"], momentum=MOMENTUM),
    "adam": optax.adam(RATES["adam"]),
}
# Of `unrolled`, and of `leave_one_out` on networks.
RETRAIN = {"tx": optax.sgd(RATES["retrain"]), "steps": 10}
DAMPINGS = {"implicit": L2, "implicit .1": 0.1}  # of the implicit truths
GREEDY, HEAD_CG = Scoring("identity", ""), Scoring("cg(10, damping=0.1)")
DIRECTIONS = {
    "identity": GREEDY,
    "adam": Scoring("adam", ""),
    **{f"neumann {n}": Scoring(f"neumann({n}, damping=0.01)", "") for n in (1, 2, 4, 8)},
    "cg .01": Scoring("cg(10, damping=0.01)", ""),
    "cg .1": Scoring("cg(10, damping=0.1)", ""),
    "head": Scoring("identity"),
    "head cg .01": Scoring("cg(10, damping=0.01)"),
    "head cg .1": HEAD_CG,
    "finite difference": Scoring("identity", "", mode="finite_difference"),
    "bf16": Scoring("identity", "", compute_dtype="bfloat16"),
    "val 16": GREEDY,  # by so many validation samples
    "head cg .1, val 16": HEAD_CG,
}
COURSE = ("identity", "adam", "neumann 8", "cg .01", "cg .1", "head", "head cg .01", "head cg .1",
          "implicit")  # fmt: skip
COURSE_TRUTHS = ("exact adam", "unrolled", "implicit .1", "leave one out")
TRUTHS = {
    "exact sgd": "one optimiser step, taken and measured: SGD",
    "exact momentum": "the same, momentum, with the run's own buffer",
    "exact adam": "the same, Adam, with the run's own moments",
    "implicit": "-N dL_val/dy through the Gauss-Newton matrix of the training set plus L2, solved",
    "implicit .1": "the same with damping .1 instead of L2",
    "unrolled": "-dL_val/dy through 10 full-batch SGD steps",
    "leave one out": "retraining without the sample: to the optimum (logistic), or 10 steps",
}


# --- the problems: small enough that what a sample does can be computed


class Problem(NamedTuple):
    """A task and a network without state."""

    about: str
    config: Any  # module of the task's config
    model: Model

    def logits(self, params: Params, inputs: PyTree) -> jax.Array:
        """f[B, K]."""
        return self.model.logits(params, {}, inputs)

    def pools(self, seed: int) -> Streams:
        """Candidates (labels partly wrong) and val (trusted); the seed draws both."""
        config = self.config.get_config()
        config.seed = seed
        if self.config is digits:
            config.data.test = 1047  # leaves 600 to train on, and 150 to validate
        return task.make_data(config).pools


def problem(about: str, config: Any, backbone: nn.Module, classes: int) -> Problem:
    """A classifier on the backbone."""
    return Problem(about, config, models.from_linen(models.Classifier(backbone, classes)))


PROBLEMS = {
    CONVEX: problem(
        "softmax regression on WDBC (30 columns, 2 classes), 30 % of 309 labels wrong",
        wdbc, models.MLP(()), 2,
    ),
    "mlp": problem("MLP of widths (16, 16) on the same table", wdbc, models.MLP((16, 16)), 2),
    "cnn": problem(
        "SmallCNN of widths (8, 16) on digits (8x8, 10 classes), 40 % of 600 labels wrong",
        digits, models.SmallCNN((8, 16)), 10,
    ),
}  # fmt: skip


def rows_of(batch: Batch, rows) -> Batch:
    """These rows of a batch."""
    return jax.tree.map(lambda x: x[rows], batch)


def drawn(what: str, pool: Batch, size: int, *seed: int) -> np.ndarray:
    """So many rows i[size] of a pool."""
    return generator(f"fidelity: {what}", *seed).choice(len(pool.labels), size, replace=False)


def double(tree: PyTree) -> PyTree:
    """Floating-point leaves in double precision; inside `jax.enable_x64`."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@functools.cache
def train_step(name: str, optimiser: str) -> Callable:
    """(params, opt_state, pool, rows i[B]) -> (params, opt_state), compiled once for all seeds."""

    @jax.jit
    def step(params, opt_state, pool, rows):
        batch = rows_of(pool, rows)
        loss = truths.training_loss(PROBLEMS[name].logits, batch.inputs, l2=L2)
        grads = jax.grad(loss)(params, (None, batch.labels))
        updates, opt_state = TX[optimiser].update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def history(name: str, pool: Batch, optimiser: str, seed: int) -> list[tuple[Params, PyTree]]:
    """(params, opt_state) before each step of plain training on prior labels, and at the end."""
    step, pool = train_step(name, optimiser), jax.device_put(pool)
    stream = data.IndexStream(data.sizes(Streams(pool)), batch_size=BATCH, seed=seed)
    params, _ = jax.jit(PROBLEMS[name].model.init)(jax.random.key(seed), pool.inputs[:1])
    states = [(params, TX[optimiser].init(params))]
    for _ in range(max(MOMENTS)):
        states.append(step(*states[-1], pool, next(stream).candidates))
    return states


# --- comparisons


@functools.cache
def compiled(name: str) -> dict[str, Callable]:
    """What compiles of a problem, once for all its seeds: truths, and "scores" of a direction."""
    logits = PROBLEMS[name].logits

    @partial(jax.jit, static_argnames="scoring")
    def scores(scoring, params, opt_state, batch, val):
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state, jax.random.key(0))
        return scoring.prepare(state, logits, Streams(batch, val))(None, 0).scored.scores

    functions = {
        f"exact {o}": partial(truths.exact_change, logits, tx=tx, l2=L2) for o, tx in TX.items()
    }
    for truth, damping in DAMPINGS.items():
        functions[truth] = partial(truths.implicit, logits, damping=damping)
    functions["unrolled"] = partial(truths.unrolled, logits, l2=L2, **RETRAIN)
    return {truth: jax.jit(function) for truth, function in functions.items()} | {"scores": scores}


def compare(scores: np.ndarray, truth: np.ndarray, prior: np.ndarray) -> dict[str, float]:
    """All measures; those of all labels only where the truth has all, [B, K]."""
    useful = truth if truth.ndim == 1 else truths.utility(truth, prior)
    of_prior = truths.agreement(truths.utility(scores, prior), useful)
    measures = {"utility_rank": of_prior["rank"], "utility_sign": of_prior["sign"]}
    return measures | (truths.agreement(scores, truth) if truth.ndim == 2 else {})


# (problem, moment, truth, direction, measure) -> a value a seed
Comparisons = dict[tuple[str, int | str, str, str, str], list[float]]


@dataclasses.dataclass
class Run:
    """Plain training, stopped at moments to compare every direction with every truth."""

    problem: str
    seed: int
    optimiser: str
    comparisons: Comparisons  # of all runs, filled in place
    residuals: list[float] = dataclasses.field(default_factory=list)  # of the implicit truths
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    length = 1  # on the progress bar

    def measure(self, bar: tqdm.tqdm) -> None:
        """Compares; a run that fails leaves its reason and stops no other."""
        bar.set_description(title := f"{self.problem}, {self.optimiser}, seed {self.seed}")
        try:
            self.compare()
        except Exception as error:
            self.failed[title] = timing.reason(error)
        bar.update()

    def compare(self) -> None:
        """Every direction with every truth."""
        pools = PROBLEMS[self.problem].pools(self.seed)
        states = history(self.problem, pools.candidates, self.optimiser, self.seed)
        rows = drawn("rows", pools.candidates, BATCH, self.seed)
        batch = rows_of(pools.candidates, rows)
        moments = {moment: states[moment] for moment in MOMENTS}
        with enable_x64(True):
            train, val = map(double, (pools.candidates, pools.val))
            if self.optimiser == "adam" and self.problem == CONVEX:
                moments[OPTIMUM] = self.optimum(double(states[-1][0]), train), states[0][1]
        for moment, (params, opt_state) in moments.items():
            with enable_x64(True):
                now = double(params), double(opt_state)
                by_truth = self.true_scores(moment, *now, train, val, rows)
            read = {truth: by_truth[truth] for truth in DAMPINGS if truth in by_truth}
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            small = drawn("val", pools.val, VAL, self.seed, 0 if moment == OPTIMUM else moment)
            few = rows_of(pools.val, small)
            for direction, scoring in DIRECTIONS.items():
                if direction != "adam" or (self.optimiser == "adam" and moment not in (0, OPTIMUM)):
                    seen = few if direction.endswith("val 16") else pools.val
                    scores = compiled(self.problem)["scores"]
                    read[direction] = scores(scoring, params, opt_state, batch, seen)
            self.add(moment, read, by_truth, batch.labels)

    def add(self, moment, read: dict, by_truth: dict, prior: np.ndarray) -> None:
        """Scores beside every truth; a truth itself may be among the scores."""
        for direction, truth in itertools.product(read, by_truth):
            if direction != truth:
                measures = compare(np.asarray(read[direction]), by_truth[truth], prior)
                for measure, value in measures.items():
                    at = self.problem, moment, truth, direction, measure
                    self.comparisons.setdefault(at, []).append(value)

    def loss(self, train: Batch) -> truths.TrainingLoss:
        """Of the whole training set."""
        return truths.training_loss(PROBLEMS[self.problem].logits, train.inputs, l2=L2)

    def optimum(self, params: Params, train: Batch) -> Params:
        """Where the convex problem's training loss is least."""
        retrain = truths.to_optimum(self.loss(train), params)
        return retrain(jnp.ones(len(train.labels)), train.labels)

    def true_scores(
        self, moment: int | str, params: Params, opt_state: PyTree, train: Batch, val: Batch, rows
    ) -> dict[str, np.ndarray]:
        """Truth -> f[B, K], or f[B]; those that no optimiser is part of, in Adam's run alone."""
        call, batch, found = compiled(self.problem), rows_of(train, rows), {}
        if moment != OPTIMUM:
            exact = f"exact {self.optimiser}"
            found[exact] = call[exact](params, opt_state, batch, val)
        if self.optimiser == "adam":
            for truth in DAMPINGS:
                found[truth], residual = call[truth](params, train.inputs, batch.inputs, val)
                self.residuals.append(float(residual))
            found["unrolled"] = call["unrolled"](params, train, val, rows)
            if self.problem == CONVEX:
                retrain = truths.to_optimum(self.loss(train), params)
            else:
                retrain = truths.some_steps(self.loss(train), params, **RETRAIN)
            val_loss = jax.jit(truths.validation_loss(PROBLEMS[self.problem].logits, val))
            found["leave one out"] = truths.leave_one_out(retrain, val_loss, train.labels, rows)
        return jax.tree.map(np.asarray, found)


# --- the report


def mean_sd(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation to four digits, and n, how many values count.

    Values that are not finite are left out; no mean of none, no deviation of fewer than two.
    """
    finite = [value for value in values if np.isfinite(value)]
    mean = round(float(np.mean(finite)), 4) if finite else None
    sd = round(float(np.std(finite, ddof=1)), 4) if len(finite) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(finite)}


def shared_moments(comparisons: Comparisons) -> dict[str, list[int | str]]:
    """problem -> the moments at which each of its directions was read, whatever the truth."""
    read = {(problem, direction, moment) for problem, moment, _, direction, _ in comparisons}
    names = {problem: {d for p, d, _ in read if p == problem} for problem, *_ in comparisons}
    return {
        p: [m for m in (*MOMENTS, OPTIMUM) if all((p, d, m) in read for d in directions)]
        for p, directions in names.items()
    }


def summary(comparisons: Comparisons) -> dict:
    """problem -> truth -> direction -> measure -> mean and sd over seeds and shared moments."""
    over_all, by_moment, shared = {}, {}, shared_moments(comparisons)
    for (problem, moment, truth, direction, measure), values in comparisons.items():
        at = problem, truth, direction, measure
        if moment in shared[problem]:
            over_all[at] = over_all.get(at, []) + values
        if "rank" in measure:
            by_moment[(*at, str(moment))] = mean_sd(values)["mean"]
    return {
        "over_all": reporting.nested({at: mean_sd(values) for at, values in over_all.items()}),
        "over_all_moments": shared,
        "by_moment": reporting.nested(by_moment),
    }


def ranks(by_truth: dict) -> dict[str, dict[str, float | None]]:
    """direction -> truth -> mean rank correlation, of prior labels where a truth has no other."""
    table = {}
    for truth, by_direction in by_truth.items():
        for direction, measures in by_direction.items():
            measure = measures.get("rank", measures["utility_rank"])
            table.setdefault(direction, {})[truth] = measure["mean"]
    return table


class Fidelity(reporting.Benchmark):
    """The benchmark: every problem, seed and optimiser."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn")
    rounds = None

    @staticmethod
    def add_options(parser):
        """--seeds."""
        parser.add_argument("--seeds", type=int, default=3)

    def __init__(self, options):
        checks.whole(1, seeds=options.seeds)
        self.seeds, self.comparisons = options.seeds, {}
        runs = itertools.product(PROBLEMS, range(self.seeds), TX)
        self.series = [Run(*run, self.comparisons) for run in runs]

    def report(self):
        """Agreement, and what was agreed on."""
        settings = {
            "moments": MOMENTS, "batch": BATCH, "l2": L2, "truths": TRUTHS,
            "learning_rates": RATES, "momentum": MOMENTUM,
            "retrain": f"SGD, {RETRAIN['steps']} steps",
        }  # fmt: skip
        residuals = {name: [] for name in PROBLEMS}
        for run in self.series:
            residuals[run.problem] += run.residuals
        return {
            "agreement": summary(self.comparisons)
            | {"implicit_residual_max": {name: max(r) for name, r in residuals.items() if r}}
            | {"settings": settings},
            "problems": {name: problem.about for name, problem in PROBLEMS.items()},
            "seeds": {"agreement": self.seeds},
            "failed": {key: why for run in self.series for key, why in run.failed.items()},
        }

    @staticmethod
    def table(report):
        """Spearman's correlation of each direction with each truth."""
        yield "rank correlation with each truth (leave one out: of prior labels), mean over seeds"
        for name, by_truth in report["agreement"]["over_all"].items():
            moments = ", ".join(map(str, report["agreement"]["over_all_moments"][name]))
            yield f"\n{name}, mean over the steps that all rows have: {moments}"
            yield from reporting.columns(ranks(by_truth))
        yield from reporting.tables({"failed": report["failed"]})

    @staticmethod
    def draw(report, file):
        """Every direction beside every truth, and some over the course of training."""
        from experiments import style

        agreement = report["agreement"]
        with style.look():
            style.save(draw_all(agreement), file)
            style.save(draw_course(agreement), file.with_stem(file.stem + "_course"))


def draw_all(agreement: dict):
    """Rank correlation of every direction with every truth, one panel a problem."""
    from experiments import style

    problems = {name: ranks(by_truth) for name, by_truth in agreement["over_all"].items()}
    names = list(dict.fromkeys(name for rows in problems.values() for name in rows))
    truths_of = {
        name: [truth for truth in TRUTHS if truth in agreement["over_all"][name]]
        for name in problems
    }
    figure = style.figure(
        1.4 + 0.175 * len(names),
        "How well do scores (rows) rank samples, by what really happens (columns)? Spearman's "
        "correlation, mean over moments of training",
    )
    widths = [len(found) for found in truths_of.values()]
    axes = figure.subplots(1, len(problems), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axis, (problem, rows) in zip(axes, problems.items()):
        columns = truths_of[problem]
        values = np.array([[rows.get(n, {}).get(t) for t in columns] for n in names], float)
        axis.imshow(values, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(column, row, f"{value:.2f}".replace("0.", "."), ha="center", va="center",
                          fontsize=style.SMALL,
                          color="white" if value > 0.7 else style.INK)  # fmt: skip
        axis.set_title(problem)
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def draw_course(agreement: dict):
    """Rank correlation over the course of training; some directions are named."""
    from experiments import style

    looks = {
        "head cg .1": {"color": style.OURS, "lw": 2.5},
        "identity": {"color": style.HELD_OUT, "lw": 2},
        "cg .1": {"color": style.ALL, "lw": 1.5},
        "implicit": {"color": style.ALL, "lw": 1.5, "ls": ":"},
    }
    problems = agreement["by_moment"]
    figure = style.figure(
        0.9 + 1.6 * len(problems),
        "How long in training do scores rank samples well? Spearman's correlation",
    )
    grid = figure.subplots(len(problems), len(COURSE_TRUTHS), squeeze=False, sharey=True)
    for line, (name, by_truth) in zip(grid, problems.items()):
        for axis, truth in zip(line, COURSE_TRUTHS):
            ends = []
            for direction in (d for d in COURSE if d in by_truth.get(truth, {})):
                course = by_truth[truth][direction]
                course = course.get("rank", course.get("utility_rank"))
                look = looks.get(direction, {"color": style.LINE, "lw": 1, "zorder": 1})
                steps = ["opt." if step == "optimum" else step for step in course]
                axis.plot(steps, list(course.values()), marker="o", ms=3, **look)
                if direction in looks:
                    ends.append((list(course.values())[-1], direction, look["color"]))
            axis.set(ylim=(-0.1, 1.05))
            axis.axhline(0, color=style.INK, lw=0.8)
            axis.set_title(f"{name}: {truth}", fontsize=style.SMALL)
        style.ends(axis, ends, least=0.14)
        line[0].set_ylabel("rank correlation")
    for axis in line:
        axis.set_xlabel("step of training")
    style.key(figure, {"other directions (the named: at the right)": {"color": style.LINE}})
    return figure


main = partial(reporting.command, Fidelity)

if __name__ == "__main__":
    sys.exit(main())
