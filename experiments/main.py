"""One run: trains the method of a config, reads the test split once, writes result.json.

    python -m experiments.main --config=experiments/configs/digits.py --workdir=runs/digits

Killed or interrupted, the same command resumes from the last checkpoint, bit for bit, on any number
of devices and processes; with a larger --config.train.steps it goes on from there. With
--config.train.keep_best=True what is tested are the parameters of the record that was best on the
validation split (early stopping).
"""

from __future__ import annotations

import contextlib
import json
import logging as standard_logging
import pathlib
import sys
from collections.abc import Iterator

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import build, task
from saflex_jax import parallel, train

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/digits.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/digits", "Checkpoints, metrics and the result go here."
)
_TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard event files.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of a run: the cluster says which, or the next three flags.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
_LOST = flags.DEFINE_integer(
    "lost_after", 60, "Seconds after which a process that gives no sign of life ends the others."
)
_HUNG = flags.DEFINE_integer(
    "hung_after", 900, "Seconds after which a process that is behind the others ends them."
)
_SKIP_DAMAGED = flags.DEFINE_bool(
    "skip_damaged", False, "Resume from the checkpoint before where the newest is damaged."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar on stderr.")


def main(argv: list[str]) -> None:
    """Builds, fits, evaluates."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if _DISTRIBUTED.value:
        parallel.initialize(
            _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_seconds=2 * _LOST.value
        )
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    build.check(config)
    watch = parallel.Watch(workdir / "processes", lost_after=_LOST.value, hung_after=_HUNG.value)
    with _in_a_line(), train.one_run_in(workdir), watch, _in_a_line():
        run(config, workdir, watch)


@contextlib.contextmanager
def _in_a_line() -> Iterator[None]:
    """Errors that say all in a line end the program with that line; a traceback would hide it."""
    try:
        yield
    except (train.CheckpointError, train.FolderInUse, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(config: ConfigDict, workdir: pathlib.Path, watch: parallel.Watch) -> None:
    """The run of a config in a folder that nobody else writes into."""
    data = task.make_data(config)
    method = build.with_upstream(config, build.make_method(config, data.pools, data.source.columns))
    runner = parallel.RUNNERS[config.runner](method.step)
    checkpoints = train.Checkpoints(
        workdir / "checkpoints",
        config=build.settings(config),
        every=config.train.checkpoint_every,
        grows=("train.steps",),
        skip_damaged=_SKIP_DAMAGED.value,
    )
    writer = train.MetricsWriter(
        workdir, resume_from=checkpoints.latest, tensorboard=_TENSORBOARD.value
    )
    with contextlib.closing(writer), contextlib.closing(checkpoints):
        result = build.fit(
            config,
            data,
            method,
            runner,
            writer=writer,
            checkpoints=checkpoints,
            progress=_PROGRESS.value,
            description=f"{config.method.name} seed {config.seed}",
            on_step=watch.step,
        )
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
        train.write_whole(workdir / "result.json", json.dumps(summary, indent=1))
        print(json.dumps({k: v for k, v in summary.items() if k != "config"}))


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but with a clear word on a --config that is no config."""
    try:
        return app.parse_flags_with_usage(argv)
    except (SyntaxError, AttributeError, UnicodeDecodeError) as error:
        if isinstance(error, AttributeError) and "get_config" not in str(error):
            raise  # an unknown field; names the nearest
        return sys.exit(f"--config must be a Python file with a function get_config; {error}")


def command() -> None:
    """The program, with the arguments of the process."""
    # Or a damaged or full disk is reported many times, with every read or write that Orbax left.
    standard_logging.getLogger("asyncio").setLevel("CRITICAL")
    # What goes wrong is raised as well; --verbosity=0 shows what Orbax reports of every file.
    logging.set_verbosity(logging.FATAL)
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    command()
