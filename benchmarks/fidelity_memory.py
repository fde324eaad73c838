"""Part "memory": when averaging a sample's scores over its visits helps, and by how much."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
import tqdm
from sklearn.metrics import roc_auc_score

from benchmarks import fidelity_problems as problems
from benchmarks import truths
from benchmarks.fidelity_problems import Problem
from saflex_jax.core import memory, targets
from saflex_jax.core.linear_solve import cg_solve
from saflex_jax.core.scores import score
from saflex_jax.core.tree import under
from saflex_jax.data.seeds import generator
from saflex_jax.methods import erm, saflex
from saflex_jax.methods.upstream import upstream as with_upstream

NAMES = ("mlp", "cnn")
VISITS = (1, 2, 4, 8, 16, 32)  # epochs, of full batches alone, after which fidelity is read
BATCH, VAL, L2, LEARNING_RATE = 64, 16, 1e-3, 5e-3
TX = optax.adam(LEARNING_RATE)
STEP, DAMPING = optax.sgd(0.1), 0.1  # of the exact and of the implicit truth
ROWS, FRESH = 32, 2  # samples that have truths; fresh augmentations that these average over
CG = cg_solve(damping=0.01)
DIRECTIONS = {"identity": {}, "head cg .01": {"predicate": under("head"), "solve": CG}}
KINDS = {
    "none": (0.0, "float32"),
    ".5": (0.5, "float32"),
    ".9": (0.9, "float32"),
    ".99": (0.99, "float32"),
    ".9 bf16": (0.9, "bfloat16"),
    ".99 bf16": (0.99, "bfloat16"),
}
POOLS = {"pool": False, "augmented": True}
SETTINGS = ("pool", "pool, val 16", "augmented", "augmented, val 16")
MEASURES = {  # of the samples visited so far
    "auc": "area under the ROC curve: the prior label's remembered utility tells right from wrong",
    "exact": "Spearman's correlation with one SGD step, taken and measured, at present parameters",
    "implicit": "the same with the implicit truth, damping .1, at present parameters",
}
# Accuracy after training; chosen on digits, seeds 100 to 103.
RULE = {
    **{"rule": "simplex", "damping": 0.01, "anchor": "log"},
    **{"prior_strength": 0.5, "temperature": 0.5},
}
STEPS, TRAIN_RATE = 1000, 1e-2
TRAIN_TX = optax.adamw(optax.cosine_decay_schedule(TRAIN_RATE, STEPS), weight_decay=1e-4)
ACCURACY_ON = "cnn"
ACCURACY_SETTINGS = ("pool", "augmented", "augmented, val 16")
ARMS = {
    "upstream": None,
    **{f"head cg .01, {kind}": ("cg", kind) for kind in ("none", ".9", ".99", ".9 bf16")},
    **{f"identity, {kind}": ("identity", kind) for kind in ("none", ".9")},
}


class Found(NamedTuple):
    """What was measured so far; filled in place.

    Attributes:
      fidelity: (problem, setting, direction, kind, measure, visits) -> a value a seed.
      accuracy: (setting, arm) -> test accuracy, one a seed.
    """

    fidelity: dict[tuple, list[float]]
    accuracy: dict[tuple, list[float]]


@functools.cache
def step_of(name: str, augmented: bool) -> Callable:
    """A plain training step that also scores its batch and adds a visit to every memory."""
    model, upstream = problems.network(name)
    logits = lambda params, inputs: model.logits(params, {}, inputs)

    def loss(params, batch):
        return truths.training_loss(logits, batch.inputs, l2=L2)(params, (None, batch.labels))

    @jax.jit
    def step(params, opt_state, memories, pools, rows, small, key):
        batch = jax.tree.map(lambda x: x[rows], pools.candidates)
        batch = upstream(key, batch) if augmented else batch
        vals = {"": pools.val, ", val 16": jax.tree.map(lambda x: x[small], pools.val)}
        visited = dict(memories)
        for (suffix, val), (direction, options) in itertools.product(
            vals.items(), DIRECTIONS.items()
        ):
            given = params, batch.inputs, val.inputs, val.labels
            found = score(logits, *given, **options).scores
            found /= targets.score_scale(found)
            for kind, (decay, _) in KINDS.items():
                at = suffix, direction, kind
                visited[at], _ = memory.update(
                    memories[at], batch.index, found, batch.mask, decay=decay
                )
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, visited

    return step


@functools.cache
def truths_of(name: str) -> dict[str, Callable]:
    """Compiled truths of a problem."""
    model, _ = problems.network(name)
    logits = lambda params, inputs: model.logits(params, {}, inputs)
    return {
        "exact": jax.jit(functools.partial(truths.exact_change, logits, tx=STEP, l2=L2)),
        "implicit": jax.jit(functools.partial(truths.implicit, logits, damping=DAMPING)),
    }


def true_scores(problem: Problem, params, rows: np.ndarray, augmented: bool) -> dict:
    """Truth -> f64[ROWS, K], of the rows, or the mean over fresh augmentations of them."""
    compiled = truths_of(problem.name)
    batch = jax.tree.map(lambda x: x[rows], problem.pools.candidates)
    keys = [jax.random.key(10**6 + number) for number in range(FRESH)]
    batches = [problem.upstream(key, batch) for key in keys] if augmented else [batch]
    found = {"exact": [], "implicit": []}
    with jax.enable_x64(True):
        params, train, val = map(problems.double, (params, *problem.pools[:2]))
        for batch in map(problems.double, batches):
            batch = batch._replace(trace=None)
            found["exact"].append(compiled["exact"](params, STEP.init(params), batch, val))
            implicit, _ = compiled["implicit"](params, train.inputs, batch.inputs, val)
            found["implicit"].append(implicit)
        return {name: np.mean(values, axis=0) for name, values in found.items()}


def follow(name: str, pool: str, seed: int, into: Found) -> None:
    """One training run whose memories are compared with what is true, as visits add up."""
    problem, augmented, step = problems.make(name, seed), POOLS[pool], step_of(name, POOLS[pool])
    pools = jax.device_put(problem.pools)
    size, classes = pools.candidates.labels.shape
    prior, wrong = np.asarray(pools.candidates.labels), problem.wrong
    rng = generator("fidelity: memory", seed)
    rows = rng.choice(size, ROWS, replace=False)
    params, _ = jax.jit(problem.model.init)(jax.random.key(seed), pools.val.inputs[:1])
    opt_state = TX.init(params)
    memories = {
        at: memory.init(size, classes, dtype=KINDS[at[2]][1])
        for at in itertools.product(("", ", val 16"), DIRECTIONS, KINDS)
    }
    batches = size // BATCH
    for visit in range(1, max(VISITS) + 1):
        for places in np.array_split(rng.permutation(size)[: batches * BATCH], batches):
            small = rng.choice(len(pools.val.labels), VAL, replace=False)
            key = jax.random.fold_in(jax.random.key(seed), rng.integers(2**31))
            params, opt_state, memories = step(
                params, opt_state, memories, pools, places, small, key
            )
        if visit not in VISITS:
            continue
        truth = true_scores(problem, params, rows, augmented)
        for (suffix, direction, kind), kept in memories.items():
            mean = np.asarray(memory.recall(kept, np.arange(size)))
            seen = np.asarray(kept.visits[:size]) > 0
            utility = truths.utility(mean, prior)
            known = seen[rows]
            values = {"auc": roc_auc_score(~wrong[seen], utility[seen])} | {
                which: truths.agreement(mean[rows[known]], scores[known])["rank"]
                for which, scores in truth.items()
            }
            for measure, value in values.items():
                at = name, pool + suffix, direction, kind, measure, visit
                into.fidelity.setdefault(at, []).append(float(value))


@functools.cache
def arm_of(arm: str, augmented: bool, size: int) -> tuple:
    """(method, runner) of an arm, compiled once for all seeds."""
    model, upstream = problems.network(ACCURACY_ON)
    if ARMS[arm] is None:
        method = erm.make(model, TRAIN_TX)
    else:
        direction, kind = ARMS[arm]
        decay, dtype = KINDS[kind]
        method = saflex.make(
            model,
            TRAIN_TX,
            direction=direction,
            predicate=under("head") if direction == "cg" else None,
            memory_decay=decay or None,
            memory_dtype=dtype,
            num_samples=size,
            num_classes=problems.CLASSES[ACCURACY_ON],
            **RULE,
        )
    method = with_upstream(method, upstream) if augmented else method
    return method, problems.on_one_device(method)


def accuracy(setting: str, arm: str, seed: int) -> float:
    """Test accuracy after STEPS steps."""
    problem = problems.make(ACCURACY_ON, seed)
    made = arm_of(arm, setting.startswith("augmented"), len(problem.wrong))
    val_batch_size = VAL if setting.endswith("val 16") else None
    training = problems.Training(
        problem, *made, batch_size=BATCH, val_batch_size=val_batch_size, seed=seed
    )
    for _ in range(STEPS):
        training.advance()
    return problems.evaluate(problem, training.params(), problem.test)[1]


def jobs(seeds: int, accuracy_seeds: int) -> tuple[list, list]:
    """(problem, pool, seed) of the runs that are followed, (setting, arm, seed) of the others."""
    return (
        list(itertools.product(NAMES, POOLS, range(seeds))),
        list(itertools.product(ACCURACY_SETTINGS, ARMS, range(accuracy_seeds))),
    )


def measure(into: Found, *, seeds: int, accuracy_seeds: int, bar: tqdm.tqdm) -> None:
    """Fills `into`; the bar advances once a run."""
    followed, trained = jobs(seeds, accuracy_seeds)
    for name, pool, seed in followed:
        bar.set_description(f"memory, {name}, {pool}, seed {seed}")
        follow(name, pool, seed, into)
        bar.update()
    for setting, arm, seed in trained:
        bar.set_description(f"memory, {setting}, {arm}, seed {seed}")
        into.accuracy.setdefault((setting, arm), []).append(accuracy(setting, arm, seed))
        bar.update()


def summary(found: Found) -> dict:
    """problem -> setting -> direction -> kind -> measure -> visits -> mean and sd over seeds."""
    fidelity, accuracies = {}, {}
    for (*path, visits), values in found.fidelity.items():
        at = functools.reduce(lambda tree, name: tree.setdefault(name, {}), path, fidelity)
        at[str(visits)] = problems.mean_sd(values)
    for (setting, arm), values in found.accuracy.items():
        at = accuracies.setdefault(setting, {})
        at[arm] = problems.mean_sd(values) | {"seeds": values}
    return {
        "fidelity": fidelity,
        "accuracy": accuracies,
        "settings": {
            "visits": VISITS, "batch": BATCH, "val_batch": VAL, "l2": L2, "rule": RULE,
            "optimiser": f"Adam, lr {LEARNING_RATE}", "samples_with_truth": ROWS,
            "fresh_augmentations": FRESH, "measures": MEASURES, "accuracy_on": ACCURACY_ON,
            "accuracy_steps": STEPS, "accuracy_optimiser": f"AdamW, lr {TRAIN_RATE}, cosine",
            "upstream": problems.UPSTREAM,
        },
    }  # fmt: skip
