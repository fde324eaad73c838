"""Part "end_to_end": test accuracy of the methods at equal wall time, full bilevel among them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from benchmarks import fidelity_problems as problems
from benchmarks import truths
from benchmarks.fidelity_problems import Problem, Training
from saflex_jax import data, parallel
from saflex_jax.core import steps
from saflex_jax.core.linear_solve import cg_solve
from saflex_jax.methods import erm, implicit, l2rw, meta_weight_net, saflex
from saflex_jax.methods.upstream import upstream as with_upstream
from saflex_jax.types import Method, Params, Streams

SECONDS = {"mlp": 3.0, "cnn": 8.0}  # a run, compilation excluded
BATCH = 64
LEARNING_RATE = 2e-3  # constant: how many steps there will be is not known
TX = optax.adamw(LEARNING_RATE, weight_decay=1e-4)
TOGETHER = 5  # steps dispatched before they are waited for
GREEDY = {"rule": "simplex", "direction": "identity", "predicate": None}  # the paper's direction
PAPER = GREEDY | {
    "memory_decay": None,
    "anchor": "linear",
    "prior_strength": 3.0,
    "temperature": 0.3,
    "tolerance": 0.0,
}
# Chosen on digits, seeds 100 to 103; arms name their damping.
RULE = {
    "rule": "simplex",
    "memory_decay": 0.9,
    "anchor": "log",
    "prior_strength": 0.5,
    "temperature": 0.5,
    "tolerance": 0.25,
}
# Full bilevel: inner steps between two outer ones, conjugate gradients, and the outer optimiser.
INNER, CG, L2, META_RATE = 40, {"maxiter": 10, "damping": 0.1}, 1e-3, 0.2
OUTER_CG, META_TX = cg_solve(**CG), optax.adam(META_RATE)

ARMS = (
    "upstream",
    "saflex, the paper's rule",
    "saflex, identity, memory",
    "saflex, head cg .01, memory",
    "saflex, head cg .1, memory",
    "l2rw",
    "meta_weight_net",
    "implicit",
    "full bilevel",
)


@functools.cache
def method(name: str, arm: str, size: int) -> tuple[Method, parallel.Runner]:
    """An arm's method and runner, compiled once for all seeds."""
    (model, upstream), classes = problems.network(name), problems.CLASSES[name]
    memory = {"num_samples": size, "num_classes": classes, **RULE}
    made = {
        "upstream": lambda: erm.make(model, TX),
        "saflex, the paper's rule": lambda: saflex.make(model, TX, **PAPER),
        "saflex, identity, memory": lambda: saflex.make(model, TX, **GREEDY, **memory),
        "saflex, head cg .01, memory": lambda: saflex.make(model, TX, damping=0.01, **memory),
        "saflex, head cg .1, memory": lambda: saflex.make(model, TX, damping=0.1, **memory),
        "l2rw": lambda: l2rw.make(model, TX),
        "meta_weight_net": lambda: meta_weight_net.make(model, TX),
    }[arm]()
    made = with_upstream(made, upstream)
    return made, problems.on_one_device(made)


def implicit_method(problem: Problem) -> tuple[Method, parallel.Runner]:
    """`method` for the one that is made of a seed's labels."""
    made = implicit.make(problem.model, TX, prior=problem.pools.candidates.labels)
    made = with_upstream(made, problem.upstream)
    return made, problems.on_one_device(made)


@functools.cache
def bilevel(name: str) -> tuple[Callable, Callable]:
    """(inner step, outer step) of full bilevel optimisation, compiled once for all seeds."""
    model, upstream = problems.network(name)
    logits = lambda params, inputs: model.logits(params, {}, inputs)

    def loss(params, meta, batch):
        weights, soft = meta
        of_batch = truths.training_loss(logits, batch.inputs, l2=L2)
        return of_batch(params, (weights[batch.index], soft[batch.index]))

    @jax.jit
    def inner(params, opt_state, meta, pools, rows, key):
        batch = upstream(key, jax.tree.map(lambda x: x[rows], pools.candidates))
        updates, opt_state = TX.update(jax.grad(loss)(params, meta, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def project(meta):
        weights, soft = meta
        return jnp.clip(weights, 0.0, 2.0), jax.vmap(optax.projections.projection_simplex)(soft)

    @jax.jit
    def outer(meta, meta_opt_state, params, pools):
        val_loss = truths.validation_loss(logits, pools.val)
        return steps.outer_step(
            meta,
            meta_opt_state,
            params,
            inner_loss=lambda params, meta: loss(params, meta, pools.candidates),
            outer_loss=lambda params, _: val_loss(params),
            meta_tx=META_TX,
            solve=OUTER_CG,
            project=project,
        )

    return inner, outer


class FullBilevel:
    """The bilevel problem itself: (w, y) of the whole pool, the inner one minimised in between.

        phi = (w f32[N], y f32[N, K]) ,   theta <- INNER steps on L(theta; phi), warm start ,
        phi <- project(phi + META_TX(dL_val/dphi)) by CG with the inner Hessian, all parameters

    Inner steps see augmented samples, as all methods do; the hypergradient the pool as it is.

    Attributes:
      steps: inner steps taken so far.
      outer: outer steps taken so far.
    """

    def __init__(self, problem: Problem, *, seed: int):
        self.problem, self.key = problem, jax.random.key(seed)
        self.pools = jax.device_put(problem.pools)
        sizes = data.sizes(Streams(self.pools.candidates))
        self.stream = data.IndexStream(sizes, batch_size=BATCH, seed=seed)
        self.inner, self.outer_step = bilevel(problem.name)
        self.restart()

    def restart(self) -> None:
        """Back to the first step."""
        self.steps = self.outer = 0
        labels = self.pools.candidates.labels
        self.meta = jnp.ones(len(labels)), labels
        self.meta_opt = META_TX.init(self.meta)
        self.theta, _ = jax.jit(self.problem.model.init)(self.key, self.pools.val.inputs[:1])
        self.opt_state = TX.init(self.theta)
        self.stream.set_state({"step": 0})

    def advance(self) -> None:
        """One inner step; after every INNER of them one outer step."""
        key = jax.random.fold_in(self.key, self.steps)
        self.theta, self.opt_state = self.inner(
            self.theta, self.opt_state, self.meta, self.pools, next(self.stream).candidates, key
        )
        self.steps += 1
        if self.steps % INNER == 0:
            self.move()

    def move(self) -> None:
        """The outer step."""
        self.meta, self.meta_opt, _ = self.outer_step(
            self.meta, self.meta_opt, self.theta, self.pools
        )
        self.outer += 1

    def wait(self) -> None:
        """Until the steps dispatched are done."""
        jax.block_until_ready((self.theta, self.opt_state, self.meta, self.meta_opt))

    def params(self) -> Params:
        """The present parameters."""
        return self.theta


class Run(NamedTuple):
    """What came of an arm on one seed.

    Attributes:
      last: test accuracy of the last parameters.
      best: that of the parameters with the least validation loss, looked at after every round.
      steps: training steps in the time given.
      outer_steps: of full bilevel; None elsewhere.
      seconds: spent.
    """

    last: float
    best: float
    steps: int
    outer_steps: int | None
    seconds: float


Found = dict[tuple[str, str], list[Run]]  # (problem, arm) -> a run a seed


def started(problem: Problem, arm: str, seed: int) -> Training | FullBilevel:
    """An arm whose code is compiled, before its first step."""
    if arm == "full bilevel":
        training = FullBilevel(problem, seed=seed)
        training.move()
    else:
        made = (
            implicit_method(problem)
            if arm == "implicit"
            else method(problem.name, arm, len(problem.wrong))
        )
        training = Training(problem, *made, batch_size=BATCH, seed=seed)
    training.advance()
    problems.evaluate(problem, training.params(), problem.pools.val)
    training.restart()
    training.wait()
    return training


def train_for(training: Training | FullBilevel, seconds: float) -> float:
    """Steps, TOGETHER at a time, until the seconds are over; the seconds they took."""
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(TOGETHER):
            training.advance()
        training.wait()
    return elapsed


def compete(name: str, seed: int, into: Found, *, rounds: int, bar: tqdm.tqdm) -> None:
    """All arms on one seed, in turn, each for its share of the seconds in every round.

    What a turn takes too long is taken off the arm's next; copies and looks at the validation set
    are not in its time. The bar advances once an arm.
    """
    problem = problems.make(name, seed)
    trainings = {arm: started(problem, arm, seed) for arm in ARMS}
    spent, best = dict.fromkeys(ARMS, 0.0), dict.fromkeys(ARMS, (np.inf, None))
    for due in SECONDS[name] * np.arange(1, rounds + 1) / rounds:
        for arm, training in trainings.items():
            spent[arm] += train_for(training, due - spent[arm])
            params = training.params()
            val_loss, _ = problems.evaluate(problem, params, problem.pools.val)
            best[arm] = min(best[arm], (val_loss, params), key=lambda found: found[0])
    for arm, training in trainings.items():
        last, chosen = (
            problems.evaluate(problem, params, problem.test)[1]
            for params in (training.params(), best[arm][1])
        )
        outer = getattr(training, "outer", None)
        found = Run(last, chosen, training.steps, outer, spent[arm])
        into.setdefault((name, arm), []).append(found)
        bar.update()


def jobs(seeds: int) -> list[tuple[str, int]]:
    """(problem, seed) of every competition."""
    return list(itertools.product(SECONDS, range(seeds)))


def measure(into: Found, *, seeds: int, rounds: int, bar: tqdm.tqdm) -> None:
    """Fills `into`; the bar advances once a run."""
    for name, seed in jobs(seeds):
        bar.set_description(f"end_to_end, {name}, seed {seed}")
        compete(name, seed, into, rounds=rounds, bar=bar)


def summary(found: Found) -> dict:
    """problem -> arm -> accuracies, steps, seconds; one number a seed, and means."""
    made = {}
    for (name, arm), runs in found.items():
        columns = {field: [run[i] for run in runs] for i, field in enumerate(Run._fields)}
        means = {field: problems.mean_sd(columns[field]) for field in ("last", "best")}
        made.setdefault(name, {})[arm] = {"by_seed": columns} | means
    return {
        "accuracy": made,
        "settings": {
            "seconds": SECONDS, "batch": BATCH, "optimiser": f"AdamW, lr {LEARNING_RATE}",
            "saflex, the paper's rule": PAPER, "saflex, ..., memory": RULE,
            "upstream": problems.UPSTREAM,
            "full_bilevel": {
                "inner_steps": INNER, "l2": L2, "outer": f"Adam, lr {META_RATE}", "cg": CG,
            },
        },
    }  # fmt: skip
