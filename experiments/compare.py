"""Upstream alone, upstream on train + validation, and SAFLEX, over seeds; a table and a figure.

    python -m experiments.compare [--json] [--seeds=3] [--config=experiments/configs/wdbc.py]

SAFLEX reads validation labels, so both fair partners are shown: the upstream pipeline trained on
the training split and on training + validation, and SAFLEX with a validation split that is held
out and one that also trains. The test split is read once a run, with the last parameters.
Finished runs are kept; after Ctrl-C, --resume continues with the others.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import build, figures, task
from saflex_jax import parallel
from saflex_jax.batches import take
from saflex_jax.types import Streams, Targets, TrainState

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/digits.py")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds, from config.seed on.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "The figure and the runs go here.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars on stderr.")
_RESUME = flags.DEFINE_bool("resume", False, "Keep the finished runs of the last call.")

# arm -> (is the config's method replaced by plain training?, does the validation split also train?)
ARMS = {
    "upstream": (True, False),
    "upstream_train_val": (True, True),
    "saflex": (False, False),
    "saflex_train_val": (False, True),
}
PROBED = 256  # training samples whose learned weights are looked at


def arm_config(config: ConfigDict, arm: str, seed: int) -> ConfigDict:
    """The config of one run."""
    config = config.copy_and_resolve_references()
    plain, train_on_val = ARMS[arm]
    if plain:
        config.method.name = "erm"
    config.data.train_on_val = train_on_val
    config.seed = seed
    return config


def make_probe(targets: Callable[[TrainState, Streams], Targets], data: task.Data):
    """state -> learned targets of the first training samples, un-augmented; never trains."""
    pools = data.pools
    rows = Streams(*(np.arange(len(p.labels)) for p in (pools.candidates, pools.val)))
    shown = take(pools, rows._replace(candidates=rows.candidates[:PROBED]))
    wrong = data.wrong[:PROBED]

    def probe(state):
        learned = targets(state, shown)
        weights = np.asarray(learned.weights)
        means = {"right": weights[~wrong], "wrong": weights[wrong]}
        return learned, {f"weight_{k}": float(v.mean()) for k, v in means.items() if len(v)}

    return probe


def run(config: ConfigDict, compiled: dict, description: str) -> dict | None:
    """Trains one arm on one seed; None when interrupted.

    `compiled` keeps an arm's method and runner, so that further seeds do not compile again.
    """
    data = task.make_data(config)
    # Copies that are left out may differ by seed, and with them the size of a score memory.
    key = (config.method.name, config.data.train_on_val, len(data.pools.candidates.labels))
    if key not in compiled or config.method.name == "implicit":  # which holds the seed's labels
        method = build.make_method(config, data.pools, data.source.columns)
        step = build.with_upstream(config, method).step
        runner = parallel.RUNNERS[config.runner](step)
        compiled[key] = method, runner, jax.jit(method.targets)
    method, runner, targets = compiled[key]
    probe = make_probe(targets, data)
    result = build.fit(
        config,
        data,
        method,
        runner,
        evaluate=lambda state: probe(state)[1],
        eval_every=config.train.log_every,
        progress=_PROGRESS.value,
        description=description,
    )
    if result.stopped_by is not None:
        return None
    learned, _ = probe(result.state)
    shown = figures.pick(data, learned)
    test = task.test_scores(method, result.state, data)
    return {
        **{f"test_{name}": value for name, value in test.items()},
        # The first record holds the compilation.
        "seconds_per_step": float(np.median([r["seconds_per_step"] for r in result.history[1:]])),
        "history": result.history,
        "samples": shown,
    }


def main(argv: list[str]) -> None:
    """Runs every arm on every seed, interleaved, then prints and draws."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    build.check(config)
    if config.train.steps <= config.train.log_every:
        raise ValueError(
            f"config.train.steps must exceed config.train.log_every = {config.train.log_every}, "
            f"so that a record without the compilation is timed; given {config.train.steps}"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "runs.jsonl"
    settings = {k: v for k, v in json.loads(config.to_json()).items() if k != "seed"}
    done = {}
    if _RESUME.value and log.exists():
        # A killed process may have left half a last line: only what ends in a newline counts.
        for line in log.read_text().split("\n")[:-1]:
            record = json.loads(line)
            if record["settings"] == settings:
                done[record["arm"], record["seed"]] = record
    log.write_text("".join(json.dumps(r) + "\n" for r in done.values()))

    seeds = range(config.seed, config.seed + _SEEDS.value)
    jobs = [(arm, seed) for seed in seeds for arm in ARMS]
    compiled: dict = {}
    for number, (arm, seed) in enumerate(jobs):
        if (arm, seed) in done:
            continue
        description = f"[{number + 1}/{len(jobs)}] {arm}, seed {seed}"
        record = run(arm_config(config, arm, seed), compiled, description)
        if record is None:
            print(f"interrupted; {len(done)} of {len(jobs)} runs are kept in {log}; "
                  "--resume continues", file=sys.stderr)  # fmt: skip
            sys.exit(130)
        done[arm, seed] = {"arm": arm, "seed": seed, "settings": settings, **record}
        with log.open("a") as file:
            file.write(json.dumps(done[arm, seed]) + "\n")

    runs = {arm: [done[arm, seed] for seed in seeds] for arm in ARMS}
    figure = figures.compare(runs, title=task.title(config.data))
    figure.savefig(workdir / "compare.png", dpi=150)
    measure = figures.measure(runs)
    summary = {
        arm: {
            measure: [r[measure] for r in records],
            "seconds_per_step": float(np.median([r["seconds_per_step"] for r in records])),
        }
        for arm, records in runs.items()
    }
    print(json.dumps(summary) if _JSON.value else table(summary, measure))
    print(f"figure: {workdir / 'compare.png'}", file=sys.stderr)


def table(summary: dict[str, dict], measure: str) -> str:
    """The summary as aligned text: mean, spread over seeds, and what a step costs."""
    base = summary["upstream"]["seconds_per_step"]
    name = measure.replace("_", " ")
    lines = [f"{'':20} {f'{name} (mean +- sd over seeds)':40} ms/step   step cost"]
    for arm, values in summary.items():
        scores = np.array(values[measure])
        spread = scores.std(ddof=1) if len(scores) > 1 else float("nan")
        seconds = values["seconds_per_step"]
        lines.append(
            f"{arm:20} {scores.mean():.4f} +- {spread:.4f}  (n = {len(scores)})"
            f"{'':13}{1e3 * seconds:8.2f} {seconds / base:9.2f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # else JAX reports every backend it does not find
    app.run(main)
