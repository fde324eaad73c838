"""One run: trains the method of a config, reads the test split once, writes result.json.

    saflex train --data=PATH [--trusted=FILE]            your own data: a folder of images with a
                                                         sub-folder a class, an .npz file, a table
    saflex train --config=digits --workdir=runs/digits   a config by its name, or a file

--trusted names samples whose labels somebody checked, FILE or FILE,CLASS a line, FILE as it lies in
the folder (of a table or an .npz file ROW, from 0 on); a folder may hold train/CLASS, val/CLASS and
test/CLASS instead, of which val is trusted. `python -m experiments.main` is the same command.

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

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import build, command_line, opening, same_data, task
from saflex_jax import parallel, train

config_flags.DEFINE_config_file("config")
flags.DEFINE_string("data", None, command_line.DATA)
flags.DEFINE_string("trusted", None, command_line.TRUSTED)
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
    config = command_line.given_config(flags.FLAGS["config"])
    workdir = pathlib.Path(_WORKDIR.value)
    build.check(config)
    watch = parallel.Watch(workdir / "processes", lost_after=_LOST.value, hung_after=_HUNG.value)
    # The inner one makes of an error the end of the program that the watch knows.
    with train.one_run_in(workdir), watch, command_line.in_a_line():
        run(config, workdir, watch)


def run(config: ConfigDict, workdir: pathlib.Path, watch: parallel.Watch) -> None:
    """The run of a config in a folder that nobody else writes into."""
    data = task.make_data(config, workdir)
    if jax.process_index() == 0:
        print(opening.lines(config, data), file=sys.stderr)
    method = build.with_upstream(config, build.make_method(config, data.pools, data.source.columns))
    runner = parallel.RUNNERS[config.runner](method.step)
    with contextlib.ExitStack() as stack:
        checkpoints = train.Checkpoints(
            workdir / "checkpoints",
            config=build.settings(config),
            every=config.train.checkpoint_every,
            grows=("train.steps",),
            skip_damaged=_SKIP_DAMAGED.value,
        )
        stack.enter_context(contextlib.closing(checkpoints))
        if checkpoints.latest is not None:
            same_data.check(workdir, config)
        elif jax.process_index() == 0:
            same_data.keep(workdir, config)
        writer = train.MetricsWriter(
            workdir, resume_from=checkpoints.latest, tensorboard=_TENSORBOARD.value
        )
        stack.enter_context(contextlib.closing(writer))
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


def command() -> None:
    """The program, with the arguments of the process."""
    # Or a damaged or full disk is reported many times, with every read or write that Orbax left.
    standard_logging.getLogger("asyncio").setLevel("CRITICAL")
    # What goes wrong is raised as well; --verbosity=0 shows what Orbax reports of every file.
    logging.set_verbosity(logging.FATAL)
    command_line.run_absl(main, rewrite=command_line.arguments)


if __name__ == "__main__":
    command()
