"""The same small grid of options for every arm, chosen on trusted samples of other seeds.

A grid is a dict, point -> nested changes of a config. In tuning, training samples with right labels
stand in for the test split (`config.data.select`), which is not read; the seeds are none of those
that are reported. Where a data set has no test split of its own each seed draws one, so that some
of these samples are test samples of reported seeds, for all arms alike. What was chosen is kept in
a file of the project, task -> arm -> point.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.configs.methods import merged
from experiments.suite_tasks import Task
from saflex_jax import checks
from saflex_jax.files import write_whole

Changes = Mapping[str, Any]
Choices = dict[str, dict[str, str]]  # task -> arm -> point

CHOICES = pathlib.Path(__file__).parent.parent / "docs" / "tuned.json"
COMMAND = "python -m experiments.suite --suite={} --tune"
FIRST_SEED, SEEDS = 100, 2
AT = "@"  # between the names of an arm and of a point


def chosen_arms(
    arms: Mapping[str, Changes], grid: Callable[[str], Mapping], chosen: Mapping[str, str]
) -> dict[str, Changes]:
    """The arms of a task that were tuned, each at its chosen point.

    Args:
      arms: arm -> changes.
      grid: arm -> its grid.
      chosen: arm -> point, of the task's `Choices`.

    Raises:
      ValueError: a point that the arm's grid does not have.
    """
    for arm in arms.keys() & chosen.keys():
        checks.choice(grid(arm), **{f"{CHOICES.name}: {arm}": chosen[arm]})
    return {
        arm: merged(changes, grid(arm)[chosen[arm]])
        for arm, changes in arms.items()
        if arm in chosen
    }


def tuned(suite: str, tasks: dict[str, Task]) -> dict[str, Task]:
    """The tasks that have arms, of a suite whose arms are `chosen_arms`.

    Raises:
      ValueError: there is none; says how to choose.
    """
    found = {name: task for name, task in tasks.items() if task.config.arms}
    if not found:
        raise ValueError(
            f"{CHOICES.name} must have points of the grid for the arms of {suite}; given none; it "
            f"is made by {COMMAND.format(suite)}"
        )
    return found


def every_arm(arms: Mapping[str, Changes], grid: Callable[[str], Mapping]) -> dict[str, Changes]:
    """The arms at every point of their grids, by the name ARM@POINT."""
    return {
        f"{arm}{AT}{point}": merged(changes, more)
        for arm, changes in arms.items()
        for point, more in grid(arm).items()
    }


def on_trusted_samples(task: Task, samples: int, seeds: int = SEEDS) -> Task:
    """The task with training samples in the place of the test split, and with other seeds.

    They are as the training samples are, without a corruption of the test split.

    Args:
      task: as it is reported.
      samples: to choose on, of each seed.
      seeds: to choose on.
    """
    config = task.config.copy_and_resolve_references()
    config.seed = FIRST_SEED
    config.data.update({"select": samples, "corrupt": ""})
    return task._replace(config=config, seeds=seeds, other_seeds=None)


def choose(
    names: Mapping[str, list[str]],
    accuracies: Mapping[tuple[str, str], list[float]],
    seeds: Mapping[str, int],
) -> Choices:
    """Of each arm the point with the highest mean accuracy; the first of several that are level.

    An arm is left out while a run of its grid is missing.

    Args:
      names: task -> all its ARM@POINT, in the order of the grids.
      accuracies: (task, ARM@POINT) -> one a seed.
      seeds: task -> how many there are.

    >>> names = {"t": ["a@1", "a@2", "b@1", "b@2"]}
    >>> found = {("t", "a@1"): [0.5, 0.7], ("t", "a@2"): [0.6, 0.7], ("t", "b@1"): [1, 1]}
    >>> choose(names, found, {"t": 2})
    {'t': {'a': '2'}}
    """
    choices: Choices = {}
    for task, of_task in names.items():
        by_arm: dict[str, dict[str, float | None]] = {}
        for name in of_task:
            arm, _, point = name.partition(AT)
            values = accuracies.get((task, name), [])
            mean = round(float(np.mean(values)), 6) if len(values) == seeds[task] else None
            by_arm.setdefault(arm, {})[point] = mean
        for arm, means in by_arm.items():
            if None not in means.values():
                choices.setdefault(task, {})[arm] = max(means, key=means.get)
    return choices


def read(path: pathlib.Path | None = None) -> Choices:
    """What was chosen, of CHOICES if no file is given; nothing where there is no file."""
    path = path or CHOICES
    return json.loads(path.read_text()) if path.exists() else {}


def write(choices: Choices, path: pathlib.Path | None = None) -> None:
    """Adds to the file, or replaces in it, what was chosen; in one piece, by a rename."""
    path = path or CHOICES
    write_whole(path, json.dumps(merged(read(path), choices), indent=1) + "\n")
