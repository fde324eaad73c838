"""Part "agreement": cheap scores against brute-force truths, over the course of training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import fidelity_figures as figures
from benchmarks import fidelity_problems as problems
from benchmarks import truths
from benchmarks.fidelity_problems import Problem
from saflex_jax.core import memory, targets
from saflex_jax.core.linear_solve import (
    adam_inverse_diagonal,
    cg_solve,
    identity_solve,
    neumann_solve,
    preconditioned_solve,
)
from saflex_jax.core.scores import score, validation_gradient
from saflex_jax.core.tree import restrict, under
from saflex_jax.data.seeds import generator
from saflex_jax.types import Batch, Params

MOMENTS = (0, 20, 100, 400)  # steps of plain training
CONVEX, OPTIMUM = "logistic", "optimum"  # its optimum, where the implicit truth is exact
BATCH = 32  # of training, and samples whose scores are looked at
L2 = 1e-3
RATES, MOMENTUM = {"sgd": 0.1, "momentum": 0.02, "adam": 5e-3, "retrain": 0.1}, 0.9
TX = {
    "sgd": optax.sgd(RATES["sgd"]),
    "momentum": optax.sgd(RATES["momentum"], momentum=MOMENTUM),
    "adam": optax.adam(RATES["adam"]),
}
# Of `unrolled`, and of `leave_one_out` on networks.
RETRAIN = {"tx": optax.sgd(RATES["retrain"]), "steps": 10}
NEUMANN = range(1, 9)
DAMPINGS = {"implicit": L2, "implicit .1": 0.1}  # of the implicit truths
NEUMANN_OPTIONS = {"scale": 0.1, "damping": 0.01}
VAL = 16  # rows of a small validation batch
PAST, BETWEEN, AVERAGED = 80, 10, 16  # steps looked back on, between two visits, in an average
DECAY = 0.9
RANDOM = 8  # directions that stand for chance, at each moment
TRUTHS = {
    "exact sgd": "one optimiser step, taken and measured: SGD",
    "exact momentum": "the same, momentum, with the run's own buffer",
    "exact adam": "the same, Adam, with the run's own moments",
    "implicit": "-N dL_val/dy through the Gauss-Newton matrix of the training set plus L2, solved",
    "implicit .1": "the same with damping .1 instead of L2",
    "unrolled": "-dL_val/dy through 10 full-batch SGD steps",
    "leave one out": "retraining without the sample: to the optimum (logistic), or 10 steps",
    "relabelling": "retraining to the optimum with every label (logistic)",
}
MEASURES = {
    "cosine": "of all entries; chance 0",
    "sign": "share of entries with the truth's sign; chance 1/2",
    "rank": "Spearman's correlation of all entries; chance 0",
    "best": "share of samples whose best label is the truth's; chance 1/K",
    "utility_rank": "Spearman's correlation of the prior labels' utilities; chance 0",
    "utility_sign": "share of prior labels whose utility has the truth's sign; chance 1/2",
}


class View(NamedTuple):
    """What a direction may read at one moment of a run.

    Attributes:
      params: now.
      past: params of the steps before, at most PAST of them, the newest last.
      inverse_diagonal: of the run's Adam; ones for other optimisers.
      batch, val: samples that are looked at, and the whole validation set.
      small: the small validation batch of each past step, and of this one; VAL rows each.
      key: of the random direction.
    """

    params: Params
    past: list[Params]
    inverse_diagonal: Params
    batch: Batch
    val: Batch
    small: list[Batch]
    key: jax.Array


def some(batch: Batch, rows) -> Batch:
    """These rows of a batch."""
    return jax.tree.map(lambda x: x[rows], batch)


def view_of(
    problem: Problem, params: Params, past: list[Params], batch: Batch, *, seed: int, diagonal=None
) -> View:
    """The view of a run; small validation batches are drawn by (seed, number of past steps)."""
    val, rng = problem.pools.val, generator("fidelity: val", seed, len(past))
    past = past[-PAST:]
    draws = [rng.choice(len(val.labels), VAL, replace=False) for _ in range(len(past) + 1)]
    small = [some(val, rows) for rows in draws]
    if diagonal is None:
        diagonal = jax.tree.map(jnp.ones_like, params)
    return View(params, past, diagonal, batch, val, small, jax.random.key(rng.integers(2**31)))


def along(gradient: Params, solve=identity_solve()):
    """A solver that is given another gradient, a stale one for instance, than that of now."""
    return lambda matvec, rhs: solve(matvec, restrict(gradient, rhs))


def random_gradient(key: jax.Array, params: Params) -> Params:
    """N(0, I) in the shape of params: what chance gives."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


class Scorers:
    """Compiled scores of one problem; what differs in numbers alone shares the compiled code."""

    def __init__(self, problem: Problem):
        logits = problem.logits
        parts = {"all": None, "head": under("head"), "last stage": problem.last_stage}

        @functools.partial(jax.jit, static_argnames=("kind", "part", "options"))
        def scores(params, inputs, val, gradient, number, *, kind, part, options):
            solve = {
                "identity": lambda: identity_solve(),
                "diagonal": lambda: preconditioned_solve(number),
                "neumann": lambda: neumann_solve(steps=number, **NEUMANN_OPTIONS),
                "cg": lambda: cg_solve(maxiter=10, damping=number),
            }[kind]()
            solve = along(gradient, solve) if gradient is not None else solve
            return score(
                logits, params, inputs, val.inputs, val.labels, predicate=parts[part], solve=solve,
                **dict(options),
            ).scores  # fmt: skip

        def run(view, kind="identity", number=None, *, part="all", params=None, val=None,
                gradient=None, **options):  # fmt: skip
            return scores(
                view.params if params is None else params, view.batch.inputs, val or view.val,
                gradient, number, kind=kind, part=part, options=tuple(options.items()),
            )  # fmt: skip

        self.run = run
        self.gradient = jax.jit(
            lambda params, val: validation_gradient(logits, params, val.inputs, val.labels)[1]
        )

    def stale(self, view: View, steps: int) -> jax.Array:
        """The whole validation set's gradient of some steps ago."""
        return self.run(view, gradient=self.gradient(view.past[-steps], view.val))

    def averaged(self, view: View) -> jax.Array:
        """The exponential average of the last gradients of small batches, this one among them."""
        steps = zip([*view.past, view.params][-AVERAGED:], view.small[-AVERAGED:])
        found = [self.gradient(*step) for step in steps]
        share = DECAY ** np.arange(len(found) - 1.0, -1.0, -1.0)
        mean = lambda *g: sum(float(s) * x for s, x in zip(share / share.sum(), g))
        return self.run(view, gradient=jax.tree.map(mean, *found))

    def remembered(self, view: View, *kind, **options) -> jax.Array:
        """The score memory after visits every BETWEEN steps, each with its own small val batch."""
        size, classes = view.batch.labels.shape
        kept, found = memory.init(size, classes), None
        visits = list(zip([*view.past, view.params], view.small))[::-BETWEEN][::-1]
        for params, val in visits:
            found = self.run(view, *kind, params=params, val=val, **options)
            kept, found = memory.update(
                kept, np.arange(size), found / targets.score_scale(found), np.ones(size, bool),
                decay=DECAY,
            )  # fmt: skip
        return found


def directions(problem: Problem) -> dict[str, Callable[[View], jax.Array]]:
    """Name -> scores f32[B, K] of the view's batch."""
    made = Scorers(problem)
    run, head = made.run, {"part": "head"}
    found = {
        "identity": run,
        "adam": lambda v: run(v, "diagonal", v.inverse_diagonal),
        **{f"neumann {n}": lambda v, n=n: run(v, "neumann", n) for n in NEUMANN},
        "cg .01": lambda v: run(v, "cg", 0.01),
        "cg .1": lambda v: run(v, "cg", 0.1),
        "last stage": lambda v: run(v, part="last stage"),
        "last stage cg .01": lambda v: run(v, "cg", 0.01, part="last stage"),
        "head": lambda v: run(v, **head),
        "head cg .01": lambda v: run(v, "cg", 0.01, **head),
        "head cg .1": lambda v: run(v, "cg", 0.1, **head),
        "finite difference": lambda v: run(v, mode="finite_difference"),
        "bf16": lambda v: run(v, compute_dtype="bfloat16"),
        "val 16": lambda v: run(v, val=v.small[-1]),
        "val 8": lambda v: run(v, val=some(v.small[-1], slice(8))),
        "head cg .01, val 16": lambda v: run(v, "cg", 0.01, val=v.small[-1], **head),
        "stale 4": lambda v: made.stale(v, 4),
        "stale 16": lambda v: made.stale(v, 16),
        "average of val 16": made.averaged,
        "memory of val 16": made.remembered,
        "head cg .01, memory of val 16": lambda v: made.remembered(v, "cg", 0.01, **head),
        "random": lambda v: run(v, gradient=random_gradient(v.key, v.params)),
    }
    if problem.last_stage is None:
        found = {name: f for name, f in found.items() if not name.startswith("last stage")}
    return found


READS_PAST = ("stale", "average", "memory", "head cg .01, memory")


def defined(name: str, optimiser: str, moment: int | str) -> bool:
    """Whether a direction exists in such a run: Adam's wants its moments, others want a past."""
    at_start = moment in (0, OPTIMUM)
    if name == "adam":
        return optimiser == "adam" and not at_start
    return not (at_start and name.startswith(READS_PAST))


@functools.cache
def compiled(name: str) -> dict[str, Callable]:
    """The truths of a problem that compile, once for all its seeds, and its directions."""
    problem = problems.make(name, 0)  # for its network
    logits = problem.logits
    exact = {
        f"exact {o}": jax.jit(functools.partial(truths.exact_change, logits, tx=tx, l2=L2))
        for o, tx in TX.items()
    }
    return exact | {
        **{
            truth: jax.jit(functools.partial(truths.implicit, logits, damping=damping))
            for truth, damping in DAMPINGS.items()
        },
        "unrolled": jax.jit(functools.partial(truths.unrolled, logits, l2=L2, **RETRAIN)),
        "directions": directions(problem),
    }


def retrained(
    problem: Problem, params: Params, train: Batch, val: Batch, rows: np.ndarray
) -> dict[str, jax.Array]:
    """Truths by retraining: "leave one out" f[B], and of the convex problem "relabelling" f[B, K].

    For the latter `params` is the optimum, and retraining starts there.
    """
    loss = truths.training_loss(problem.logits, train.inputs, l2=L2)
    outer = jax.jit(truths.validation_loss(problem.logits, val))
    if problem.name != CONVEX:
        retrain = truths.some_steps(loss, params, **RETRAIN)
        return {"leave one out": truths.leave_one_out(retrain, outer, train.labels, rows)}
    given = truths.to_optimum(loss, params, steps=6), outer, train.labels, rows
    return {
        "leave one out": truths.leave_one_out(*given),
        "relabelling": truths.relabelling(*given),
    }


def optimum(problem: Problem, params: Params, train: Batch) -> Params:
    """Where the training loss of the convex problem is least; in double precision."""
    loss = truths.training_loss(problem.logits, train.inputs, l2=L2)
    return truths.to_optimum(loss, params, steps=30)(jnp.ones(len(train.labels)), train.labels)


def compare(scores: np.ndarray, truth: np.ndarray, prior: np.ndarray) -> dict[str, float]:
    """All measures; those of all labels only where the truth has all, [B, K]."""
    useful = truth if truth.ndim == 1 else truths.utility(truth, prior)
    found = truths.agreement(truths.utility(scores, prior), useful)
    found = {"utility_rank": found["rank"], "utility_sign": found["sign"]}
    return found | (truths.agreement(scores, truth) if truth.ndim == 2 else {})


class Comparison(NamedTuple):
    """One direction against one truth, at one moment of one run."""

    problem: str
    seed: int
    moment: int | str
    truth: str
    direction: str
    measures: dict[str, float]


def against(found: dict, scores: list, prior: np.ndarray, where: tuple) -> Iterator[Comparison]:
    """Named scores beside every truth found; a truth itself may be among the scores."""
    for (direction, values), (truth, true) in itertools.product(scores, found.items()):
        if direction != truth:
            yield Comparison(*where, truth, direction, compare(values, true, prior))


def compare_run(name: str, seed: int, optimiser: str, residuals: list) -> Iterator[Comparison]:
    """All comparisons of one run; the truths that no optimiser is part of, in Adam's run alone.

    `residuals` receives the relative residuals of the implicit truth's linear systems.
    """
    problem, call, adam = problems.make(name, seed), compiled(name), optimiser == "adam"
    history = problems.train(
        problem, TX[optimiser], steps=max(MOMENTS), batch_size=BATCH, l2=L2, seed=seed
    )
    pools = problem.pools
    rows = generator("fidelity: rows", seed).choice(len(pools.candidates.labels), BATCH, False)
    batch = some(pools.candidates, rows)
    with jax.enable_x64(True):
        train, val, double_batch = map(problems.double, (pools.candidates, pools.val, batch))
        if adam and name == CONVEX:
            best = optimum(problem, problems.double(history.params[-1]), train)
            by_retraining = retrained(problem, best, train, val, rows)

    for moment in (*MOMENTS, *([OPTIMUM] if adam and name == CONVEX else [])):
        with jax.enable_x64(True):
            if moment == OPTIMUM:
                params, past, diagonal, found = best, [], None, {}
            else:
                params, past = problems.double(history.params[moment]), history.params[:moment]
                opt_state = history.opt_state[moment]
                diagonal = adam_inverse_diagonal(opt_state) if adam else None
                exact = f"exact {optimiser}"
                opt_state = problems.double(opt_state)
                found = {exact: call[exact](params, opt_state, double_batch, val)}
            if adam:
                for truth in DAMPINGS:
                    found[truth], residual = call[truth](
                        params, train.inputs, double_batch.inputs, val
                    )
                    residuals.append(float(residual))
                found["unrolled"] = call["unrolled"](params, train, val, rows)
                if name != CONVEX:
                    by_retraining = retrained(problem, params, train, val, rows)
                found |= by_retraining
            found = jax.tree.map(np.asarray, found)
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        view = view_of(problem, params, past, batch, seed=seed, diagonal=diagonal)
        for direction, scores in call["directions"].items():
            if not defined(direction, optimiser, moment):
                continue
            keys = jax.random.split(view.key, RANDOM if direction == "random" else 1)
            made = [(direction, np.asarray(scores(view._replace(key=key)))) for key in keys]
            yield from against(found, made, batch.labels, (name, seed, moment))
        solved = [(truth, found[truth]) for truth in DAMPINGS if truth in found]
        yield from against(found, solved, batch.labels, (name, seed, moment))


class Found(NamedTuple):
    """What was measured so far; filled in place.

    Attributes:
      comparisons: of directions with truths.
      residuals: problem -> relative residuals of the implicit truth's linear systems.
    """

    comparisons: list[Comparison]
    residuals: dict[str, list[float]]


def jobs(seeds: int) -> list[tuple[str, int, str]]:
    """(problem, seed, optimiser) of every run."""
    return list(itertools.product(problems.SETTINGS, range(seeds), TX))


def measure(into: Found, *, seeds: int, bar: tqdm.tqdm) -> None:
    """Fills `into`; the bar advances once a run."""
    for name, seed, optimiser in jobs(seeds):
        bar.set_description(f"agreement, {name}, {optimiser}, seed {seed}")
        residuals = into.residuals.setdefault(name, [])
        into.comparisons.extend(compare_run(name, seed, optimiser, residuals))
        bar.update()


def shared_moments(comparisons: list[Comparison]) -> dict[str, list[int | str]]:
    """problem -> the moments at which each of its directions was read, whatever the truth."""
    found = {}
    for c in comparisons:
        found.setdefault(c.problem, {}).setdefault(c.direction, {})[c.moment] = None
    moments = (*MOMENTS, OPTIMUM)
    return {
        problem: [m for m in moments if all(m in read for read in by_direction.values())]
        for problem, by_direction in found.items()
    }


def summary(found: Found) -> dict:
    """problem -> truth -> direction -> measure -> mean and sd over seeds and shared moments."""
    groups, courses, shared = {}, {}, shared_moments(found.comparisons)
    for c in found.comparisons:
        for measure, value in c.measures.items():
            key = c.problem, c.truth, c.direction
            if c.moment in shared[c.problem]:
                groups.setdefault((*key, measure), []).append(value)
            if measure in ("rank", "utility_rank") and c.direction in figures.COURSE:
                courses.setdefault((*key, measure), {}).setdefault(c.moment, []).append(value)
    nested, course = {}, {}
    for (problem, truth, direction, measure), values in groups.items():
        at = nested.setdefault(problem, {}).setdefault(truth, {}).setdefault(direction, {})
        at[measure] = problems.mean_sd(values)
    for (problem, truth, direction, measure), moments in courses.items():
        at = course.setdefault(problem, {}).setdefault(truth, {}).setdefault(direction, {})
        at[measure] = {str(m): problems.mean_sd(v)["mean"] for m, v in moments.items()}
    return {
        "over_all": nested,
        "over_all_moments": shared,
        "by_moment": course,
        "implicit_residual_max": {name: max(r) for name, r in found.residuals.items() if r},
        "settings": {
            "moments": MOMENTS, "batch": BATCH, "l2": L2, "truths": TRUTHS, "measures": MEASURES,
            "learning_rates": RATES, "momentum": MOMENTUM,
            "retrain": f"SGD, {RETRAIN['steps']} steps", "neumann": NEUMANN_OPTIONS,
        },
    }  # fmt: skip
