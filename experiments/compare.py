"""The arms of a config over seeds: what each reaches, in pairs, and costs; a table and a figure.

    saflex compare [--json] [--seeds=3] [--config=wdbc]
    saflex compare --data=PATH [--trusted=FILE]          your own data, as `saflex train` takes them

`config.arms` names the arms (`experiments.arms`). Without it there are five: the upstream pipeline
trained on the training split, on training + validation, and on the validation samples alone; SAFLEX
with validation samples that are held out, and that also train. SAFLEX reads validation labels: its
fair partner is the best of the others that do.

The test split is read once for each arm and seed, with the last parameters. Finished runs are kept:
after Ctrl-C, --resume continues with the others, unless the data have changed since. With all of
them finished, --resume --base=ARM prints the same runs against another arm.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import arms, command_line, figures, style, task
from saflex_jax import checks

config_flags.DEFINE_config_file("config")
flags.DEFINE_string("data", None, command_line.DATA)
flags.DEFINE_string("trusted", None, command_line.TRUSTED)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds, from config.seed on.", lower_bound=1)
_BASE = flags.DEFINE_string("base", "", "Arm that the others are compared to; default: the first.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "The figure and the runs go here.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars on stderr.")
_RESUME = flags.DEFINE_bool("resume", False, "Keep the finished runs of the last call.")


def main(argv: list[str]) -> None:
    """Runs every arm on every seed, then prints and draws."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    config = command_line.given_config(flags.FLAGS["config"])
    workdir = pathlib.Path(_WORKDIR.value)
    configs = arms.configs(config)
    base = _BASE.value or next(iter(configs))
    checks.choice(configs, **{"--base": base})
    seeds = range(config.seed, config.seed + _SEEDS.value)
    log = workdir / "runs.jsonl"
    records = arms.run_all(configs, seeds, log, resume=_RESUME.value, progress=_PROGRESS.value)
    wanted = {(arm, seed) for arm in configs for seed in seeds}
    if left := wanted - records.keys():
        print(f"interrupted; {len(wanted - left)} of {len(wanted)} runs are kept in {log}; "
              "--resume continues", file=sys.stderr)  # fmt: skip
        sys.exit(130)

    runs = {arm: [records[arm, seed] for seed in seeds] for arm in {base: None, **configs}}
    summary = arms.summary(runs)
    differences = {arm: numbers["difference"] for arm, numbers in summary.items()}
    trusted = f", {config.data.val} trusted samples" if config.data.val else ""
    figure = figures.compare(
        runs,
        title=task.title(config.data) + trusted,
        differences=differences if config.get("arms") else None,
    )
    style.save(figure, workdir / "compare.png")
    print(json.dumps(summary) if _JSON.value else arms.table(summary, figures.measure(runs)))
    print(f"figure: {workdir / 'compare.png'}", file=sys.stderr)


def command() -> None:
    """The program, with the arguments of the process."""
    logging.set_verbosity(logging.WARNING)  # else JAX reports every backend it does not find
    command_line.run_absl(main, rewrite=command_line.arguments)


if __name__ == "__main__":
    command()
