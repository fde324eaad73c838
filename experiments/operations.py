"""Do pooled utilities tell the truth about operations, and does adjusting by them pay?

    python -m experiments.operations [--seeds=5] [--first_seed=0] [--workdir=runs/operations]

For each task and seed one vmapped program trains a small network under: all operations; all but
one, for each of them; the harmless ones alone; the harmless ones and one that destroys, half of the
draws, each fixed and adjusted (`methods.adjusted`); and, beside these, the first-order rule alone.
Views are made once. Prints, for each task, the rank correlation over operations of pooled utility
with what the operation adds to test accuracy (figure: operations.png), and the adjusted pipelines
beside the fixed ones.
Finished seeds are kept; the same command goes on.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy import stats

from experiments import arms, json_lines, style, sweeps, task
from experiments.configs import digits, sources
from saflex_jax import augment, data, models, parallel, rules
from saflex_jax.augment import Alternatives, of_views
from saflex_jax.batches import floats
from saflex_jax.core import pooled
from saflex_jax.methods import adjusted, supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import MLP, Classifier
from saflex_jax.types import Batch, RunInfo, Streams

TASKS = ("mnist", "fashion_mnist", "usps")
SIDE = 14
PER_CLASS, TRUSTED = 30, 200  # training images a class; trusted ones, which do not train
DRAWS = 3  # views of each operation
REPEATS = 2  # of each member, by initialisation and order
STEPS, BATCH, WIDTH = 800, 64, 64


def blank_half(image: jax.Array) -> jax.Array:
    """The left half is blanked."""
    return image.at[:, : image.shape[1] // 2].set(0.0)


def swap_halves(image: jax.Array) -> jax.Array:
    """The upper half goes below the lower one."""
    return jnp.roll(image, image.shape[0] // 2, 0)


def half_turn(image: jax.Array) -> jax.Array:
    """Rotated by 180 degrees."""
    return image[::-1, ::-1]


def mirror(image: jax.Array) -> jax.Array:
    """Left and right exchanged."""
    return image[:, ::-1]


def transpose(image: jax.Array) -> jax.Array:
    """Rows and columns exchanged."""
    return jnp.swapaxes(image, 0, 1)


def another(key: jax.Array, batch: Batch) -> Batch:
    """The image of another sample, whatever its class: what a generator without control makes."""
    partner = jax.random.permutation(key, len(batch.index))
    return augment.record(batch._replace(inputs=batch.inputs[partner]), "another", 1.0)


augment.register_operation("another")


def _of_images(name, op) -> augment.Augment:
    augment.register_operation(name)
    return augment.per_example(name, lambda key, image: (op(image), 1.0))


HARMLESS = {
    "none": augment.identity,
    "shift": augment.parse("shift(1)"),
    "turn": augment.parse("affine(degrees=10)"),
    "scale": augment.parse("affine(scale=0.1)"),
    "shear": augment.parse("affine(shear=0.15)"),
    "blur": augment.parse("blur"),
    "cutout": augment.parse("cutout(4)"),
}
PLANTED = {op.__name__: _of_images(op.__name__, op)
           for op in (blank_half, swap_halves, half_turn, mirror, transpose)}  # fmt: skip
PLANTED["another"] = another
OPERATIONS = HARMLESS | PLANTED
NAMES = tuple(OPERATIONS)
DESTROYING = ("another", "transpose", "half_turn")  # whatever the task
SHARE = 0.5  # of a planted operation's draws


class Member(NamedTuple):
    """One pipeline: its shares at the start, how they are adjusted, and if utilities are kept."""

    name: str
    start: np.ndarray
    adjust: float = 0.0
    looked_at: bool = False


def settings() -> dict[str, Any]:
    """What fixes a record beside its task and seed; records of other settings are made again."""
    constants = (SIDE, PER_CLASS, TRUSTED, DRAWS, REPEATS, STEPS, BATCH, WIDTH, SHARE)
    return {"constants": list(constants), "operations": list(NAMES),
            "options": repr(adjusted.Options())}  # fmt: skip


def members() -> list[Member]:
    """All pipelines of a task."""

    def equal(names):
        found = np.array([name in names for name in NAMES], np.float32)
        return found / found.sum()

    starts, strength = {"harmless": equal(HARMLESS)}, float(adjusted.Options().strength)
    for name in DESTROYING:
        starts[name] = (1 - SHARE) * equal(HARMLESS) + SHARE * equal({name})
    return [
        Member("all", equal(NAMES), looked_at=True),
        *(Member(f"{name}, adjusted", start, strength, True) for name, start in starts.items()),
        *(Member(f"without {name}", equal({*NAMES} - {name})) for name in NAMES),
        *(Member(f"{name}, fixed", start) for name, start in starts.items()),
    ]


class Task(NamedTuple):
    """One task and seed: views f32[N, V, D] of the candidates, trusted and test samples."""

    pools: Streams
    test: Batch
    alternatives: Alternatives
    num_classes: int


def make_task(name: str, folder: str, seed: int) -> Task:
    """Reads, splits, and makes all views."""
    config = digits.get_config()
    config.seed = seed
    config.data = sources.section(name, dir=folder, size=SIDE, per_class=PER_CLASS, val=TRUSTED)
    found = task.make_data(config)
    candidates = found.pools.candidates
    images = floats(np.asarray(candidates.inputs))
    candidates = candidates._replace(inputs=images, trace=None)
    views, group = [], []
    for place, pipeline in enumerate(OPERATIONS.values()):
        apply = jax.jit(pipeline)
        for draw in range(DRAWS):
            key = jax.random.key(seed * 1000 + place * DRAWS + draw)
            views.append(np.asarray(apply(key, candidates).inputs).reshape(len(images), -1))
            group.append(place)

    def flat(batch):
        inputs = floats(np.asarray(batch.inputs))
        return batch._replace(inputs=inputs.reshape(len(inputs), -1))

    pools = Streams(candidates._replace(inputs=np.stack(views, 1)), flat(found.pools.val))
    classes = candidates.labels.shape[1]
    return Task(pools, flat(found.test), of_views(group, NAMES), classes)


def train_members(
    given: Task, pipelines: Sequence[Member], seed: int, *, rule: str = "as_given"
) -> list[dict[str, Any]]:
    """Trains all pipelines in one program; a record of each repeat.

    Args:
      given: of that seed.
      pipelines: all of them looked at ("utility"), or none.
      seed: of initialisations and orders.
      rule: of `rules.RULES`.
    """
    whole = [(m, repeat) for m in pipelines for repeat in range(REPEATS)]
    options = {"start": np.stack([m.start for m, _ in whole]),
               "adjust": np.array([m.adjust for m, _ in whole], np.float32)}  # fmt: skip
    make, network = _maker(given, rule, pipelines[0].looked_at)

    def step(state, streams, *, reduce, options):
        return make(options).step(state, streams, reduce=reduce)

    method = make({name: value[0] for name, value in options.items()})
    keys = [seed * REPEATS + repeat for _, repeat in whole]
    states = [method.init(jax.random.key(key), given.pools.val.inputs[:1]) for key in keys]
    size = data.sizes(given.pools)
    streams = [data.IndexStream(size, batch_size=BATCH, seed=key) for key in keys]
    runner = parallel.sweep_runner(step, options=options, devices=jax.devices()[:1])
    title = f"{rule}, {len(whole)} runs at once"
    state = sweeps.trained(runner.hold(given.pools), states, streams, steps=STEPS, title=title)
    records = []
    for place, (member, repeat) in enumerate(whole):
        own = parallel.member(state, place)
        record = {"member": member.name, "rule": rule, "repeat": repeat}
        records.append(record | _tested(network, own.params, given.test) | _seen(member, own))
    return records


def _maker(given: Task, rule: str, looked_at: bool):
    """(options of a member -> its method, the network)."""
    network = models.from_linen(Classifier(MLP((WIDTH,)), given.num_classes))
    size = len(given.pools.candidates.labels)
    run = RunInfo(size, given.num_classes, num_val=len(given.pools.val.labels), num_steps=STEPS)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-3)
    kinds = {} if rule == "as_given" else {"rule": rules.RULES[rule].make(run)}
    plain, alternatives = supervised.make(network, tx, **kinds), given.alternatives

    def make(options):
        if looked_at:
            how = adjusted.Options(strength=options["adjust"])
            return adjusted.adjusted(plain, alternatives, how, start=options["start"])
        log_p = jnp.log(options["start"])
        return upstream(plain, lambda key, batch: alternatives.draw(key, batch, log_p)[0])

    return make, network


def _tested(network, params, test: Batch) -> dict[str, Any]:
    """Accuracy on the test split, which this reads, overall and of each class."""
    truth, inputs = np.asarray(test.labels).argmax(1), jnp.asarray(test.inputs)
    right = np.asarray(network.logits(params, {}, inputs)).argmax(1) == truth
    by_class = [float(right[truth == k].mean()) for k in range(test.labels.shape[1])]
    return {"accuracy": float(right.mean()), "by_class": by_class}


def _seen(member: Member, state) -> dict[str, Any]:
    """Utilities, their errors (-1: unknown) and last shares by class, where they were looked at."""
    if not member.looked_at:
        return {}
    found = pooled.pooled(state.extra.pools)
    how = adjusted.Options()
    share = adjusted.shares(found, jnp.asarray(member.start), floor=how.floor, margin=how.margin,
                            strength=member.adjust)  # fmt: skip
    error = np.where(np.isfinite(found.error), found.error, -1.0)
    arrays = {"utility": found.mean, "error": error, "share": share}
    return {name: np.round(np.asarray(x), 5).tolist() for name, x in arrays.items()}


# --- What they say


def effects(records: list[dict], *, place: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(pooled utility, what it adds to test accuracy) of each operation of one task and seed.

    Args:
      records: of that task and seed.
      place: of a class; None = all of them.
    """

    def mean(name):
        own = [r for r in records if r["member"] == name and r["rule"] == "as_given"]
        of = [r["accuracy"] if place is None else r["by_class"][place] for r in own]
        return float(np.mean(of))

    whole = [r for r in records if r["member"] == "all" and r["rule"] == "as_given"]
    column = 0 if place is None else 1 + place
    utility = np.mean([[u[column] for u in r["utility"]] for r in whole], axis=0)
    return utility, np.array([mean("all") - mean(f"without {name}") for name in NAMES])


def intervals(records: list[dict], name: str, *, column: int = 0) -> tuple[float, float]:
    """The widest interval of 95 % of an operation's utility, over the repeats under "all".

    Args:
      records: of one task and seed.
      name: of the operation.
      column: 0 = all classes, 1 + k = class k.
    """
    place = NAMES.index(name)
    whole = [r for r in records if r["member"] == "all" and r["rule"] == "as_given"]
    ends = [(r["utility"][place][column], 1.96 * r["error"][place][column]) for r in whole]
    return min(u - e for u, e in ends), max(u + e for u, e in ends)


def report(records: list[dict]) -> str:
    """The tables."""
    lines, all_correlations = [], []
    for name in dict.fromkeys(r["task"] for r in records):
        own = [r for r in records if r["task"] == name]
        by_seed = [[r for r in own if r["seed"] == s] for s in sorted({r["seed"] for r in own})]
        pairs = [effects(seed) for seed in by_seed]
        found = [float(stats.spearmanr(*pair).statistic) for pair in pairs]
        all_correlations += found
        mean = [np.mean([p[k] for p in pairs], 0) for k in (0, 1)]
        together = float(stats.spearmanr(*mean).statistic)
        lines.append(f"{name}: rank correlation by seed {', '.join(f'{c:.2f}' for c in found)}; "
                     f"of means over seeds {together:.2f}")  # fmt: skip
        lines.append(
            f"  {'operation':14} {'utility':>8} {'interval, widest':>18} {'adds, points':>13}"
        )
        for place, op in enumerate(NAMES):
            low = min(intervals(seed, op)[0] for seed in by_seed)
            high = max(intervals(seed, op)[1] for seed in by_seed)
            lines.append(f"  {op:14} {mean[0][place]:8.3f} {f'{low:+.3f} {high:+.3f}':>18} "
                         f"{100 * mean[1][place]:8.2f}")  # fmt: skip
        lines += [_by_class(by_seed, op) for op in (*DESTROYING, "mirror")]
        lines += _adjusting(by_seed)
    lines.append(f"mean rank correlation: {np.mean(all_correlations):.3f} of "
                 f"{len(all_correlations)} tasks and seeds")  # fmt: skip
    return "\n".join(lines)


def _by_class(by_seed: list[list[dict]], name: str) -> str:
    """An operation's utility in each class, and the rank correlation with what it adds there.

    * marks classes of which the interval lies below zero in every run.
    """
    place, classes = NAMES.index(name), range(len(by_seed[0][0]["by_class"]))
    pairs = [[effects(seed, place=k) for seed in by_seed] for k in classes]
    utility, adds = (np.array([np.mean([p[c][place] for p in of]) for of in pairs]) for c in (0, 1))
    harms = [all(intervals(seed, name, column=1 + k)[1] < 0 for seed in by_seed) for k in classes]
    said = " ".join(f"{k}:{utility[k]:+.2f}{'*' if harms[k] else ''}" for k in classes)
    correlation = stats.spearmanr(utility, adds).statistic
    return f"  {name} by class {said}; rank correlation {correlation:.2f}"


def _adjusting(by_seed: list[list[dict]]) -> list[str]:
    """Each pipeline's accuracy, and its difference to the harmless one's, in points."""

    def scores(member, rule):
        values = [[r["accuracy"] for r in seed if (r["member"], r["rule"]) == (member, rule)]
                  for seed in by_seed]  # fmt: skip
        return [100 * float(np.mean(v)) for v in values]

    base, lines = scores("harmless, fixed", "as_given"), []
    wanted = [("harmless", "fixed", "as_given"), ("harmless", "adjusted", "as_given")]
    for op in DESTROYING:
        wanted += [(op, "fixed", "as_given"), (op, "adjusted", "as_given"), (op, "fixed", "saflex")]
    for op, how, rule in wanted:
        values = scores(f"{op}, {how}", rule)
        apart = arms.paired_difference(values, base)
        said = "first-order rule alone" if rule == "saflex" else how
        spread = f"{np.mean(values):6.2f} +- {np.std(values, ddof=min(1, len(values) - 1)):.2f}"
        lines.append(f"  {op:14} {said:24} {spread}   {arms.difference_text(apart)}")
    return lines


@style.look()
def draw(records: list[dict]) -> Figure:
    """Pooled utility against what an operation adds to test accuracy; a panel for each task."""
    names = list(dict.fromkeys(r["task"] for r in records))
    figure = style.figure(3.6, "Does the learned utility say what an operation is worth?")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names):
        own = [r for r in records if r["task"] == name]
        pairs = [effects([r for r in own if r["seed"] == s]) for s in {r["seed"] for r in own}]
        utility, adds = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
        x, y = utility.mean(0), 100 * adds.mean(0)
        shades = [style.OURS if op in HARMLESS else style.WRONG for op in NAMES]
        axis.axhline(0, color=style.LINE, lw=1, zorder=0)
        axis.axvline(0, color=style.LINE, lw=1, zorder=0)
        axis.scatter(x, y, c=shades, s=18)
        style.ends(axis, [(y[n], op.replace("_", " "), shades[n]) for n, op in enumerate(NAMES)],
                   points=x, least=0.07)  # fmt: skip
        axis.set_title(f"{name}, {len(pairs)} seeds")
        axis.set_xlabel("pooled utility\n(root mean square of scores = 1)")
    axes[0].set_ylabel("points of test accuracy that it adds")
    style.key(figure, {
        "harmless": {"color": style.OURS, "marker": "o", "ls": ""},
        "destroys what the label says": {"color": style.WRONG, "marker": "o", "ls": ""},
    })  # fmt: skip
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is left, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=5)
    add("--first_seed", type=int, default=0)
    add("--tasks", default=",".join(TASKS))
    add("--data", default="data", help="where experiments.prepare put data sets")
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/operations"))
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.first_seed < 0:
        parser.error(
            f"--seeds must be >= 1 and --first_seed >= 0; given {given.seeds} and "
            f"{given.first_seed}"
        )
    log = given.workdir / "runs.jsonl"
    records = [r for r in json_lines.read(log) if r["settings"] == settings()]
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for seed in seeds:
        for name in given.tasks.split(","):
            if any((r["task"], r["seed"]) == (name, seed) for r in records):
                continue
            made = make_task(name, given.data, seed)
            looked_at, blind = ([m for m in members() if m.looked_at == it] for it in (True, False))
            planted = [m for m in blind if m.name.endswith("fixed")]
            found = train_members(made, looked_at, seed) + train_members(made, blind, seed)
            found += train_members(made, planted, seed, rule="saflex")
            about = {"task": name, "seed": seed, "settings": settings()}
            own = [about | record for record in found]
            json_lines.append(log, *own)
            records += own
    wanted = [r for r in records if r["seed"] in seeds and r["task"] in given.tasks.split(",")]
    print(report(wanted))
    style.save(draw(wanted), given.workdir / "operations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
