"""What the comparisons of contrastive fine-tuning share: several test sets, and a table of them."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import arms, task
from saflex_jax import checks, train
from saflex_jax.types import Method, TrainState

SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=1, allow_override=True)
FIRST = flags.DEFINE_integer("first", 0, "The first seed.", lower_bound=0, allow_override=True)
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Runs go here; empty = runs/ and the command's name.", allow_override=True
)
RESUME = flags.DEFINE_bool("resume", False, "Keep the finished runs.", allow_override=True)
ARMS = flags.DEFINE_list("arms", [], "These arms alone; none = all.", allow_override=True)
SET = flags.DEFINE_string("set", "{}", "JSON: nested changes of each config.", allow_override=True)

Tests = Mapping[str, Mapping[str, object]]  # test set -> changes of `config.data` that give it


def run(command: str, settings: Mapping[str, ConfigDict], tests: Tests) -> None:
    """Every arm of every setting on every seed; prints accuracies in % on all test sets.

    Args:
      command: its name, of the folder of runs.
      settings: name -> config with arms.
      tests: each is read once an arm and seed.

    Raises:
      ValueError: --arms that a config does not have; --set that is no changes of one.
    """
    workdir = pathlib.Path(WORKDIR.value or f"runs/{command}")
    chosen = {name: _chosen(config) for name, config in settings.items()}
    for name, configs in chosen.items():
        seeds = range(FIRST.value, FIRST.value + SEEDS.value)
        records = arms.run_all(
            configs, seeds, workdir / f"{name}.jsonl", resume=RESUME.value,
            progress=False, look=False, measure=measured(tests, settings[name]),
        )  # fmt: skip
        if len(records) < len(configs) * len(seeds):
            sys.exit(f"interrupted; {len(records)} runs are kept, --resume goes on")
        print(table(name, records, list(configs), seeds, list(tests)), flush=True)


def _chosen(config: ConfigDict) -> dict[str, ConfigDict]:
    """The arms of --arms of the config, which --set changes in place."""
    config.unlock()
    try:
        config.update(json.loads(SET.value))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--set must be JSON, nested changes of the config; given {SET.value!r}; {error}"
        ) from error
    configs = arms.configs(config)
    for arm in ARMS.value:
        checks.choice(configs, **{"--arms": arm})
    return {arm: c for arm, c in configs.items() if arm in (ARMS.value or configs)}


def measured(tests: Tests, config: ConfigDict) -> Callable[..., dict[str, float]]:
    """(method, state, data) -> "test_accuracy" of the first test set and "NAME_accuracy" of all."""

    @functools.cache
    def test_set(name, seed):
        changed = arms.of_seed(config, seed)
        changed.data.update(tests[name])
        test = task.make_data(changed).test
        return test.inputs, test.labels

    def measure(method: Method, state: TrainState, data: task.Data) -> dict[str, float]:
        values = {}
        for name in tests:
            inputs, labels = test_set(name, data.seed)
            values[name] = train.make_evaluator(method, inputs, labels)(state)["accuracy"]
        first = {"test_accuracy": values[next(iter(tests))]}
        return first | {f"{name}_accuracy": value for name, value in values.items()}

    return measure


def table(
    title: str, records: Mapping, names: Sequence[str], seeds: Sequence[int], tests: Sequence[str]
) -> str:
    """Mean +- standard deviation over seeds in %, a row an arm, a column a test set.

    The last column is what an arm has more than the first one on the first test set, in points.
    """
    lines = [f"{title:24}" + "".join(f"{test:>22}" for test in tests) + f"   {tests[0]}: more"]

    def scores(arm, test):
        return 100 * np.array([records[arm, s][f"{test}_accuracy"] for s in seeds])

    base = scores(names[0], tests[0])
    for arm in names:
        line = f"{arm:24}"
        for test in tests:
            own = scores(arm, test)
            spread = f" +- {own.std(ddof=1):.2f}" if len(own) > 1 else ""
            line += f"{own.mean():.2f}{spread}".rjust(22)
        apart = arms.paired_difference(scores(arm, tests[0]), base) if arm != names[0] else None
        lines.append(f"{line}   {arms.difference_text(apart, digits=2)}".rstrip())
    return "\n".join(lines)
