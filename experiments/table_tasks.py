"""The suite "tables": networks trained to convergence, and what users fit to tables instead.

The halves were named here before any run. Rules and options are chosen on the half "development",
the twelve tables of the suite "small". The half "report" has five data sets that no task used
before; of the large ones a sample of rows trains. A third of the data sets has an FT-Transformer
beside the MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import arms
from experiments.configs import digits, methods, sources
from experiments.suite_tasks import ALWAYS_THERE, TABLES, WITH_COPIES, Task

CUTMIX, MIXUP = "tabular_cutmix(1.0, probability=0.5)", "mixup(0.4, probability=0.5)"


class _Table(NamedTuple):
    """A data set: half, upstream pipeline, splits, the shares of wrong labels."""

    half: str
    augment: str
    data: dict[str, int]
    noises: tuple[float, ...]


def _development(name: str) -> _Table:
    """The table of the suite "small", with the same splits."""
    rows, _, augment = TABLES[name]
    data = {"val": min(rows // 5, 200), "test": min(3 * rows // 10, 2000)}
    if name in WITH_COPIES:
        data["train"] = int(ALWAYS_THERE * (rows - sum(data.values())))
    return _Table("development", augment, data, (0.0, 0.4))


DATA = {name: _development(name) for name in TABLES} | {
    # With their official test splits; that of electricity is later in time.
    "adult": _Table("report", CUTMIX, {"val": 200, "train": 4000}, (0.0, 0.2, 0.4)),
    "electricity": _Table("report", MIXUP, {"val": 200, "train": 4000}, (0.0, 0.2, 0.4)),
    "satimage": _Table(
        "report", MIXUP, {"val": 200, "test": 2000, "train": 4000}, (0.0, 0.2, 0.4, 0.6)
    ),
    "covertype": _Table(
        "report", "identity", {"val": 200, "test": 5000, "train": 4000}, (0.0, 0.2, 0.4, 0.6)
    ),
    "heart": _Table("report", CUTMIX, {"val": 54, "test": 81}, (0.0, 0.2, 0.4)),
}
TRANSFORMED = ("wdbc", "cleveland", "australian", "phoneme", "adult", "electricity")
MODELS = {
    "mlp": {"name": "mlp", "widths": (64, 64), "norm": "none"},
    "ft": {"name": "ft_transformer", "width": 32, "depth": 2, "heads": 4, "mlp_width": 43},
}
RATES = {"mlp": 3e-3, "ft": 1e-3}
STEPS = {"mlp": 2000, "ft": 2000}
SECONDS = {"mlp": (2.0, 0.1), "ft": (10.0, 0.5)}  # as `Task.seconds`
SEEDS = {"mlp": 10, "ft": 5}


def make(folder: str = "data") -> dict[str, Task]:
    """Name -> task.

    Args:
      folder: where `experiments.prepare` put data sets.
    """
    tasks = {}
    for name, table in DATA.items():
        for network in MODELS if name in TRANSFORMED else ("mlp",):
            for noise in table.noises:
                config = _config(name, table, network, noise, folder)
                task = Task(table.half, noise, SEEDS[network], SECONDS[network], config)
                tasks[f"{name}_{network}" + f"_{100 * noise:.0f}" * bool(noise)] = task
    return tasks


def _config(name: str, table: _Table, network: str, noise: float, folder: str) -> ConfigDict:
    """What the arms of a task have in common; SAFLEX's options are its defaults."""
    config, steps = digits.get_config(), STEPS[network]
    config.data = sources.section(name, noise=noise, dir=folder, **table.data)
    config.augment = table.augment
    config.model = MODELS[network]
    config.optimizer.learning_rate = RATES[network]
    config.method = methods.all_methods(
        rule="saflex", small_loss={"forget": noise, "ramp": steps // 4}
    )
    config.train = {
        "steps": steps, "batch_size": 64, "val_batch_size": min(table.data["val"], 64),
        "log_every": steps // 10, "checkpoint_every": steps,
    }  # fmt: skip
    config.arms = _arms(noise)
    return config


def _arms(noise: float) -> dict[str, dict[str, Any]]:
    """Arm -> changes of a task's config.

    The trees stop early on the trusted samples, or train on them, too. `small_loss` alone is told
    the share of wrong labels; without wrong ones it is plain training.
    """
    plain = {"name": "supervised", "rule": "as_given"}

    def fitted(name: str, trains: bool) -> dict[str, Any]:
        return {"model": {"name": name}, "method": plain, "data": {"train_on_val": trains}}

    found = {
        **arms.STANDING,
        "logistic": fitted("logistic", True),
        "boosted_trees": fitted("boosted_trees", True),
        "boosted_trees_stopped": fitted("boosted_trees", False),
    }
    if noise:
        found["small_loss"] = {"method": {"rule": "small_loss"}, "data": {"train_on_val": True}}
    return found
