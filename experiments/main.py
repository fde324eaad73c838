"""One run: trains the method of a config, reads the test split once, writes result.json.

    python -m experiments.main --config=experiments/configs/digits.py --workdir=runs/digits

Killed or interrupted, the same command resumes from the last checkpoint, bit for bit. With
--config.train.keep_best=True what is tested are the parameters of the record that was best on the
validation split (early stopping).
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import build, task
from saflex_jax import parallel, train

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/digits.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/digits", "Checkpoints, metrics and the result go here."
)
_TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard event files.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a multi-host run."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar on stderr.")


def main(argv: list[str]) -> None:
    """Builds, fits, evaluates."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if _DISTRIBUTED.value:
        parallel.initialize()
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    build.check(config)
    data = task.make_data(config)
    method = build.with_upstream(config, build.make_method(config, data.pools, data.source.columns))
    runner = parallel.RUNNERS[config.runner](method.step)
    checkpoints = train.Checkpoints(
        workdir / "checkpoints",
        config=build.settings(config),
        every=config.train.checkpoint_every,
    )
    writer = train.MetricsWriter(
        workdir, resume_from=checkpoints.latest, tensorboard=_TENSORBOARD.value
    )
    result = build.fit(
        config,
        data,
        method,
        runner,
        writer=writer,
        checkpoints=checkpoints,
        progress=_PROGRESS.value,
        description=f"{config.method.name} seed {config.seed}",
    )
    writer.close()
    checkpoints.close()
    if result.stopped_by is not None:
        step = int(result.state.step)
        print(f"stopped at step {step}; the same command resumes from there", file=sys.stderr)
        sys.exit(128 + result.stopped_by)
    scores = task.test_scores(method, result.state, data)
    summary = {f"test_{name}": value for name, value in scores.items()}
    if build.keeps_best(config):
        summary["best_step"] = int(result.state.step)
    summary |= {"steps": config.train.steps, "removed_copies": data.removed,
                "config": build.settings(config)}  # fmt: skip
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(summary, indent=1))
        print(json.dumps({k: v for k, v in summary.items() if k != "config"}))


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # else Orbax reports every file; --verbosity=0 shows it
    app.run(main)
