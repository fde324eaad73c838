"""The suite "tables": networks trained to convergence, and what users fit to tables instead.

The halves were named here before any run. Rules and options are chosen on the half "development",
the twelve tables of the suite "small" and, since 2026-11-28, three large ones. The half "report"
has five data sets that no task used before. Of large tables a sample of rows trains. A third of the
data sets has an FT-Transformer beside the MLP.

A network takes 2000 steps: the fewest of the numbers tried that are within .7 points of the best
one on each table. Validation accuracy of "upstream" with right labels, 2026-11-27, seeds from 100
on (the MLP three, the transformer two):

    steps            400    1000   2000   4000
    MLP  phoneme    .8442  .8752  .8764  .8760
    MLP  segment    .9555  .9607  .9659  .9685
    MLP  spambase   .9370  .9325  .9338  .9289
    FT   phoneme    .8573  .8711  .8793  .8862
    FT   segment    .9686  .9712  .9698  .9660

With 40 % wrong labels a network that has converged has learned many of them (MLP, the same tables:
.7461, .8350, .6270; with weight decay 1: .7637, .9160, .6529), so every arm has a small grid
(`grid_of`), from which `experiments.suite --suite=tables --tune` chooses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import arms, tuning
from experiments.configs import digits, methods, sources
from experiments.suite_tasks import CUTMIX, MIXUP, TABLES, Task, table_splits
from experiments.tuning import Changes, Choices


class _Table(NamedTuple):
    """A data set: half, upstream pipeline, splits, the shares of wrong labels."""

    half: str
    augment: str
    data: dict[str, int]
    noises: tuple[float, ...]
    batch_size: int = 64


def _development(name: str) -> _Table:
    """The table of the suite "small", with the same splits."""
    _, _, augment = TABLES[name]
    batch_size = 32 if name == "appendicitis" else 64  # in the grid 54 of its rows train
    return _Table("development", augment, table_splits(name), (0.0, 0.4), batch_size)


LARGE = {"val": 200, "test": 2000, "train": 4000}
DATA = {name: _development(name) for name in TABLES} | {
    # That the rule learns its sharpness was chosen on these three, and on white wine (docs/why.md).
    "letter": _Table("development", "identity", LARGE, (0.0, 0.2, 0.4, 0.6)),
    "magic": _Table("development", "identity", LARGE, (0.0, 0.2, 0.4)),
    # Many of its rows are equal; a run leaves those out that val or test have, too.
    "marketing": _Table("development", "identity", LARGE | {"train": 3000}, (0.0, 0.2, 0.4, 0.6)),
    # With their official test splits; that of electricity is later in time.
    "adult": _Table("report", CUTMIX, {"val": 200, "train": 4000}, (0.0, 0.2, 0.4)),
    "electricity": _Table("report", MIXUP, {"val": 200, "train": 4000}, (0.0, 0.2, 0.4)),
    "satimage": _Table("report", MIXUP, LARGE, (0.0, 0.2, 0.4, 0.6)),
    "covertype": _Table(
        "report", "identity", {"val": 200, "test": 5000, "train": 4000}, (0.0, 0.2, 0.4, 0.6)
    ),
    "heart": _Table("report", CUTMIX, {"val": 54, "test": 81}, (0.0, 0.2, 0.4)),
}


class _Network(NamedTuple):
    """A network: its section of a config, learning rate, steps, `Task.seconds`, seeds."""

    model: dict[str, Any]
    rate: float
    steps: int
    seconds: tuple[float, float]
    seeds: int


NETWORKS = {
    "mlp": _Network(
        {"name": "mlp", "widths": (64, 64), "norm": "none"}, 3e-3, 2000, (2.0, 0.1), seeds=10
    ),
    "ft": _Network(
        {"name": "ft_transformer", "width": 32, "depth": 2, "heads": 4, "mlp_width": 43},
        1e-3, 2000, (8.0, 0.5), seeds=5,
    ),
}  # fmt: skip
TRANSFORMED = ("wdbc", "cleveland", "australian", "phoneme", "adult", "electricity")

DECAYS = ("1e-4", "1")
STRENGTHS = ("1e-3", "1e-2", "1e-1", "1")  # of a logistic regression: 1 / regularisation
LEAVES = ("4", "31")  # of a tree
# To choose by where labels are right: arms hardly differ there but by what is chosen, and two seeds
# left it to chance. Those of a transformer take too long.
MORE_SEEDS = 5


def grid_of(arm: str) -> dict[str, Changes]:
    """Point -> changes of a config, in the order in which the first of level ones is chosen."""
    if arm == "logistic":
        return {f"C_{c}": {"model": {"C": float(c)}} for c in STRENGTHS}
    if arm.startswith("boosted_trees"):
        return {f"leaves_{leaves}": {"model": {"leaves": int(leaves)}} for leaves in LEAVES}
    return {f"decay_{decay}": {"optimizer": {"weight_decay": float(decay)}} for decay in DECAYS}


def make(folder: str = "data", choices: Choices | None = None) -> dict[str, Task]:
    """Name -> task, with the arms at their chosen points of the grid; only what was tuned.

    Args:
      folder: where `experiments.prepare` put data sets.
      choices: task -> arm -> point; None = those of the project, `tuning.read`.

    Raises:
      ValueError: nothing was tuned; says how.
    """
    choices = tuning.read() if choices is None else choices
    tasks = _tasks(folder)
    for name, task in tasks.items():
        chosen = choices.get(name, {})
        task.config.arms = tuning.chosen_arms(arms_of(task.noise), grid_of, chosen)
    return tuning.tuned("tables", tasks)


def grid(folder: str = "data") -> dict[str, Task]:
    """Name -> task, with every arm at every point, to choose by: on other seeds, without a test.

    Each seed has as many samples to choose on as the task trusts; so many fewer train.

    Args:
      folder: where `experiments.prepare` put data sets.
    """
    tasks = {}
    for name, task in _tasks(folder).items():
        right = task.config.model.name == "mlp" and not task.noise
        seeds = MORE_SEEDS if right else tuning.SEEDS
        task = tuning.on_trusted_samples(task, task.config.data.val, seeds)
        section = task.config.data
        section.train -= min(section.train, section.select)
        task.config.arms = tuning.every_arm(arms_of(task.noise), grid_of)
        tasks[name] = task
    return tasks


def arms_of(noise: float) -> dict[str, Changes]:
    """Arm -> changes of a task's config.

    The trees train on the trusted samples, too, or stop early on them. `small_loss` alone is told
    the share of wrong labels; without wrong ones it is plain training.
    """
    upstream = arms.STANDING["upstream"]

    def fitted(name: str, trains: bool) -> Changes:
        return {**upstream, "model": {"name": name}, "data": {"train_on_val": trains}}

    found = {
        **arms.STANDING,
        **arms.SQUARED,
        "early_stopping": {**upstream, "train": {"keep_best": True}},
        "logistic": fitted("logistic", True),
        "boosted_trees": fitted("boosted_trees", True),
        "boosted_trees_stopped": fitted("boosted_trees", False),
    }
    if noise:
        found["small_loss"] = {"method": {"rule": "small_loss"}, "data": {"train_on_val": True}}
        found |= arms.WITH_ELR  # as chosen on features, where no table is
    return found


def _tasks(folder: str) -> dict[str, Task]:
    """Name -> task without arms."""
    tasks = {}
    for name, table in DATA.items():
        for network in NETWORKS if name in TRANSFORMED else ("mlp",):
            of_network = NETWORKS[network]
            for noise in table.noises:
                config = _config(table, of_network, noise)
                config.data = sources.section(name, noise=noise, dir=folder, **table.data)
                task = Task(table.half, noise, of_network.seeds, of_network.seconds, config)
                tasks[f"{name}_{network}" + f"_{100 * noise:.0f}" * bool(noise)] = task
    return tasks


def _config(table: _Table, network: _Network, noise: float) -> ConfigDict:
    """What the arms of a task have in common but the data; SAFLEX's options are its defaults."""
    config, steps = digits.get_config(), network.steps
    config.augment = table.augment
    config.model = network.model
    config.optimizer.learning_rate = network.rate
    config.method = methods.all_methods(
        rule="saflex", small_loss={"forget": noise, "ramp": steps // 4}
    )
    config.train.update({
        "steps": steps, "batch_size": table.batch_size,
        "val_batch_size": min(table.data["val"], table.batch_size),
        "log_every": steps // 20, "checkpoint_every": steps,
    })  # fmt: skip
    return config
