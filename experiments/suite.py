"""Many tasks, arms and seeds: one line of JSON for each run; a finished run is never repeated.

    python -m experiments.suite --suite=small --jobs=2 [--half=development] [--tasks=REGEX]
        [--arms=REGEX] [--seeds=K] [--workdir=runs/suite] [--data=data] [--dry_run]

The lines go to WORKDIR/SUITE.jsonl, for `experiments.report`. After Ctrl-C, SIGTERM or SIGKILL the
same command continues. A run that fails is reported in WORKDIR/errors.jsonl, the others go on, and
the exit code is 1; the next call tries it again. Seed 0 of all tasks runs first, then seeds 1 and
2, then the rest, so that an interrupted suite has results on every task. Runs that one program
trains at once (`arms.sweeps`) have all their seeds in the first pass, and finish together.

The test split is read once a run, with the last parameters (with `train.keep_best` the best ones).
Choose by `val_accuracy`, except among arms that train on the validation samples, where it means
nothing.

    python -m experiments.suite --suite=pretrained --tune [--jobs=2] [--half=report] ...

trains every arm at every point of the suite's grid, on other seeds. Right-labelled training samples
stand in for the test split, which is not read. The lines go to WORKDIR/SUITE_tuning.jsonl, and the
best point of each task and arm to docs/tuned.json, from which the suite takes it.

    python -m experiments.suite --rehash=docs/results.jsonl [--suite=small]

gives the records of each arm's last settings today's settings hash, so that they count as finished
again. Use it only after a change in the form of configs: fields that moved or were renamed. If the
meaning of an arm changed, in a config or in the code, its records belong to another experiment: run
the arm again instead.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import arms, json_lines, pretrained_tasks, suite_tasks, table_tasks, tuning
from experiments.configs import sources
from experiments.datasets import DATASETS
from experiments.suite_tasks import Task
from experiments.task import Data
from saflex_jax import configure, train
from saflex_jax.files import renamed
from saflex_jax.types import Method, TrainState

# Suite -> (folder of prepared data) -> its tasks.
SUITES = {name: functools.partial(suite_tasks.make, name) for name in suite_tasks.SUITES} | {
    "pretrained": pretrained_tasks.make,
    "tables": table_tasks.make,
}
# Suites of which --tune chooses options.
TUNED = {"pretrained": pretrained_tasks.grid, "tables": table_tasks.grid}
PASSES = (1, 3)  # this many seeds run first, then so many, ...
BINS = 15  # of the calibration error
LEARNED = ("step", "kept", "relabelled", "noise_rate")  # the metrics of a history that are kept
PACKAGES = ("saflex_jax", "jax", "flax", "optax", "numpy")


# --- What is measured


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, loss in nats, and expected calibration error.

        ece = sum_b n_b / N |accuracy_b - confidence_b|

    over BINS bins of equal width (0, 1/BINS], ..., of the largest probability.

    Args:
      probabilities: f32[N, K].
      labels: f32[N, K], one-hot.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    p = np.asarray(probabilities, np.float64)
    confidence, right = p.max(1), p.argmax(1) == labels.argmax(1)
    of_label = np.maximum((p * labels).sum(1), np.finfo(np.float32).tiny)  # finite where it is 0
    bins = np.ceil(confidence * BINS).astype(int)
    gaps = np.bincount(bins, right - confidence)  # n_b (accuracy_b - confidence_b)
    values = {
        "accuracy": right.mean(),
        "loss": -np.log(of_label).mean(),
        "ece": np.abs(gaps).sum() / len(p),
    }
    return {name: round(float(value), 6) for name, value in values.items()}


def measured(method: Method, state: TrainState, data: Data) -> dict[str, float]:
    """`scores` of the validation and the test split; reads the test split."""
    values = {}
    for split, batch in (("val", data.held_out), ("test", data.test)):
        probabilities = train.probabilities(method, state, batch.inputs)
        values |= {f"{split}_{k}": v for k, v in scores(probabilities, batch.labels).items()}
    return values


def settings_hash(config: ConfigDict) -> str:
    """12 hexadecimal digits of what fixes an arm's runs except the seed.

    Left out are the options of methods and rules that do not take part, options and fields of the
    data that are at their defaults, and the data's folder: a new method, option or field leaves old
    results valid.
    """
    settings = arms.settings(config)
    method, defaults = settings["method"], configure.all_options()
    settings["method"] = {name: method[name] for name in configure.KEYS} | {
        name: _changes(method[name], defaults[name])
        for name in (method["name"], method["rule"])
        if name in defaults
    }
    data = settings["data"]
    settings["data"] = _changes(data, sources.DEFAULTS | {"dir": data["dir"]})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _changes(section: dict, defaults: dict) -> dict:
    """The fields of a section that are not at their defaults; None is the default of a type."""
    changes = {}
    for name, value in section.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _changes(value, default), {}
        if value != (None if isinstance(default, type) else default):
            changes[name] = value
    return changes


# --- Jobs


class Job(NamedTuple):
    """Runs that share a compilation (`arms.programs`): in one sweep, or one seed after another."""

    task: str
    arms: dict[str, ConfigDict]
    seeds: tuple[int, ...]

    @property
    def runs(self) -> int:
        """One an arm and seed."""
        return len(self.arms) * len(self.seeds)

    @property
    def parts(self) -> list[tuple[int, tuple[str, ...]]]:
        """(seed, arms) of its trainings, in order."""
        groups = [tuple(group) for group in arms.trainings(self.arms)]
        return [(seed, names) for seed in self.seeds for names in groups]

    def of(self, names: Iterable[str]) -> Job:
        """The job of some of its arms."""
        return self._replace(arms={arm: self.arms[arm] for arm in names})


def select(
    tasks: dict[str, Task], *, half: str | None, names: str, seeds: int | None
) -> dict[str, Task]:
    """The tasks of a half whose name matches (`re.search`), with at most so many seeds."""
    return {
        name: task._replace(seeds=min(task.seeds, seeds or task.seeds))
        for name, task in tasks.items()
        if half in (None, task.half) and re.search(names, name)
    }


def configs(task: Task, names: str) -> dict[str, ConfigDict]:
    """The task's arms whose name matches, checked."""
    every = arms.configs(task.config)
    return {arm: config for arm, config in every.items() if re.search(names, arm)}


def in_passes(seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """The seeds in groups, an empty one for a pass that has none."""
    bounds = (0, *PASSES, len(seeds))
    return [tuple(seeds[begin:end]) for begin, end in itertools.pairwise(bounds)]


def jobs(
    tasks: dict[str, Task], by_task: dict[str, dict[str, ConfigDict]], done: set[tuple]
) -> list[Job]:
    """The jobs that are left, by pass, task and program; what sweeps is in the first pass.

    Args:
      tasks: name -> task.
      by_task: name -> its `configs`.
      done: (task, arm, seed, settings hash) of the finished runs.
    """
    hashes = {
        (name, arm): settings_hash(config)
        for name, by_arm in by_task.items()
        for arm, config in by_arm.items()
    }
    groups = {name: arms.programs(by_arm) for name, by_arm in by_task.items()}
    result = []
    for number in range(len(PASSES) + 1):
        for name, task in tasks.items():
            for group in groups[name]:
                left = collections.defaultdict(list)  # arms that are to be run -> seeds
                first = task.config.seed
                passes = in_passes(range(first, first + task.seeds))
                if arms.sweeps_anywhere(next(iter(group.values()))):
                    passes = [sum(passes, ()), *(() for _ in PASSES)]
                for seed in passes[number]:
                    which = [
                        arm
                        for arm in group
                        if seed < first + task.seeds_of(arm)
                        and (name, arm, seed, hashes[name, arm]) not in done
                    ]
                    left[tuple(which)].append(seed)
                result += [
                    Job(name, {arm: group[arm] for arm in which}, tuple(seeds))
                    for which, seeds in left.items()
                    if which
                ]
    return result


def missing(tasks: dict[str, Task]) -> list[str]:
    """The data sets that `experiments.prepare` has not made."""
    names = set()
    for task in tasks.values():
        section = task.config.data
        if section.features:  # `pretrained_tasks.missing`
            continue
        needed = {section.name, section.outside_from, section.test_on} & DATASETS.keys()
        folder = pathlib.Path(section.dir)
        names |= {name for name in needed if not (folder / name / "dataset.json").exists()}
    return sorted(names)


def estimate(tasks: dict[str, Task], todo: list[Job]) -> float | None:
    """Seconds of one CPU core; None where a task was not measured."""
    total = 0.0
    for job in todo:
        own = [suite_tasks.seconds(tasks[job.task], arm) for arm in job.arms]
        if None in own:
            return None
        # Later passes find the compiled programs on the disk.
        total += suite_tasks.COMPILATION if 0 in job.seeds else suite_tasks.LOADING
        trainings = 1 if len(own) == 1 else len(arms.trainings(job.arms))
        total += own[0] * trainings * len(job.seeds)
    return total


# --- Workers


def _work(connection: multiprocessing.connection.Connection, cores: set[int]) -> None:
    """Runs the jobs it receives; sends ((seed, arms), arm -> record, error) for each, then None."""
    os.setsid()  # Ctrl-C in a terminal is for the parent, which ends its workers
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts, which then makes as many threads
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):  # the parent has ended
            return
        for part, found in _run(job):
            if found is None:
                connection.send((part, None, "a signal ended the run"))
            elif isinstance(found, Exception):
                connection.send((part, None, "".join(traceback.format_exception(found))))
            else:
                short = {a: r | {"history": course(r["history"])} for a, r in found.items()}
                connection.send((part, short, None))
        connection.send(None)
        jax.clear_caches()  # a process may hold 65,530 memory maps, and a program takes hundreds


def _run(job: Job) -> Iterator[tuple[tuple[int, tuple[str, ...]], dict | Exception | None]]:
    """(part of the job, what `arms.run_each` gives of it), as they finish."""
    parts = job.parts
    members = [{a: arms.of_seed(job.arms[a], seed) for a in names} for seed, names in parts]
    for place, found in arms.run_each(members, {}, progress=False, look=False, measure=measured):
        yield parts[place], found


def course(history: list[dict]) -> list[dict]:
    """What a rule learned through a run; empty for an arm without a rule."""
    return [{k: round(h[k], 4) for k in LEARNED if k in h} for h in history]


class _Worker:
    """A process and its job."""

    def __init__(self, cores: set[int]):
        context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, cores))
        self.process.start()
        theirs.close()  # so that its end is an end of file here
        self.cores, self.job, self.left = cores, None, []

    def give(self, job: Job) -> None:
        self.job, self.left = job, job.parts
        with contextlib.suppress(OSError):  # `receive` notices that the process has ended
            self.connection.send(job)

    def end(self) -> None:
        if self.job is not None:
            self.process.kill()
        self.connection.close()  # ends a process that waits for a job
        self.process.join()


def share(cores: Iterable[int], workers: int) -> list[set[int]]:
    """The CPU cores of each worker; all cores for every worker if there are too few."""
    cores = sorted(cores)
    if len(cores) < workers:
        return [set(cores)] * workers
    return [set(cores[n::workers]) for n in range(workers)]


def run(
    todo: list[Job],
    *,
    workers: int,
    stop: train.StopRequest,
    record: Callable[[Job, int, dict[str, dict]], None],
    fail: Callable[[Job, int, str], None],
) -> None:
    """Runs jobs in `workers` processes, in order; returns early after a stop request.

    Args:
      todo: the jobs.
      workers: number of processes.
      stop: checked once a second.
      record: called in this process with the job, the seed and the records of its arms.
      fail: called with the job, the seed and the error. The job's other seeds still run, unless the
        process died.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    queue = collections.deque(todo)
    team = [_Worker(cores) for cores in share(affinity, min(workers, len(todo)))]

    def receive(worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # the process has ended
            worker.process.join()
            lost, worker.job = worker.job, None
            worker.end()
            if stop.signal is None:  # else the same signal ended it
                for seed, names in worker.left:
                    error = f"the process ended with {worker.process.exitcode}"
                    fail(lost.of(names), seed, error)
                team[team.index(worker)] = _Worker(worker.cores)
            return
        if message is None:
            worker.job = None
            return
        part, records, error = message
        worker.left.remove(part)
        seed, names = part
        if error is None:
            record(worker.job.of(names), seed, records)
        elif stop.signal is None:
            fail(worker.job.of(names), seed, error)

    try:
        while stop.signal is None:
            for worker in team:
                if worker.job is None and queue:
                    worker.give(queue.popleft())
            busy = {w.connection: w for w in team if w.job is not None}
            if not busy:
                return
            for connection in multiprocessing.connection.wait(list(busy), timeout=1):
                receive(busy[connection])
        for worker in list(team):  # what finished before the signal
            while worker.job is not None and worker.connection.poll():
                receive(worker)
    finally:
        for worker in team:
            worker.end()


# --- The command


def described(suite: str, name: str, task: Task) -> dict[str, Any]:
    """The fields of a record that describe its task."""
    return {
        "suite": suite,
        "regime": "pretrained" if task.config.data.features else "scratch",
        "task": name,
        "half": task.half,
        "upstream": task.config.augment,
        "noise": task.noise,
        "val": task.config.data.val,
        "steps": task.config.train.steps,
    }


def rehash(path: pathlib.Path, suite: str, configs: dict[str, dict[str, ConfigDict]]) -> int:
    """Gives the records of each arm's last settings today's hash; no other byte changes.

    Only right where the meaning of the settings is what it was (see the module's docstring).

    Args:
      path: file of records; replaced whole, by a rename.
      suite: whose records may change.
      configs: task -> arm -> its config.

    Returns:
      How many records changed; 0 the second time.
    """
    *lines, half_a_line = path.read_bytes().split(b"\n")
    records = [json.loads(line) for line in lines]
    last = {(r["suite"], r["task"], r["arm"]): r["settings"] for r in records}
    today = {
        (suite, task, arm): settings_hash(config)
        for task, by_arm in configs.items()
        for arm, config in by_arm.items()
    }
    changed = 0
    for number, record in enumerate(records):
        arm, given = (record["suite"], record["task"], record["arm"]), record["settings"]
        if arm in today and given == last[arm] != today[arm]:
            before, after = (f'"settings": "{h}"'.encode() for h in (given, today[arm]))
            lines[number] = lines[number].replace(before, after)
            changed += 1
    if changed:
        with renamed(path, sync=True) as part:
            part.write_bytes(b"\n".join([*lines, half_a_line]))
    return changed


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _plan(tasks: dict[str, Task], todo: list[Job], workers: int) -> str:
    """One line per task, and the total."""
    lines = [f"{'task':26} {'half':12} {'noise':>6} {'val':>4} {'steps':>6} {'runs':>5}  upstream"]
    for name, task in tasks.items():
        runs, data = sum(job.runs for job in todo if job.task == name), task.config.data
        lines.append(f"{name:26} {task.half:12} {task.noise:6.2f} {data.val:4d} "
                     f"{task.config.train.steps:6d} {runs:5d}  {task.config.augment}")  # fmt: skip
    total = estimate(tasks, todo)
    hours = "not measured" if total is None else f"{total / 3600 / workers:.1f} h"
    lines.append(f"{len(tasks)} tasks, {sum(job.runs for job in todo)} runs left, estimated time "
                 f"with {workers} CPU core(s): {hours}")  # fmt: skip
    return "\n".join(lines)


def _tuned(tasks, by_task, records) -> tuple[dict, dict]:
    """What `tuning.choose` takes: all names of a task, and the accuracies of finished runs."""
    names = {task: [*json.loads(tasks[task].config.to_json())["arms"]] for task in by_task}
    accuracies = collections.defaultdict(list)
    for r in records:
        config = by_task.get(r["task"], {}).get(r["arm"])
        if config is not None and settings_hash(config) == r["settings"]:
            accuracies[r["task"], r["arm"]].append(r["select_accuracy"])
    return names, accuracies


def main(arguments: list[str] | None = None) -> int:
    """Runs what is left; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--suite", default="small", choices=SUITES)
    add("--jobs", type=int, default=1, help="processes; each gets its share of the CPU cores")
    add("--tasks", default="", help="of the tasks those whose name matches, as re.search")
    add("--arms", default="", help="likewise")
    add("--half", choices=suite_tasks.HALVES, help="both, if not given")
    add("--seeds", type=int, help="at most so many for each task")
    add("--workdir", type=pathlib.Path, default="runs/suite", help="results and errors go here")
    add("--data", default="data", help="where experiments.prepare put data sets")
    add("--dry_run", action="store_true", help="say what would be run, and stop")
    add("--tune", action="store_true", help=f"choose options; of {', '.join(TUNED)}")
    add(
        "--rehash",
        type=pathlib.Path,
        metavar="FILE",
        help="give the records of each arm's last settings today's hash, and stop; only where the "
        "meaning of the settings did not change",
    )
    given = parser.parse_args(arguments)
    if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error(f"--jobs and --seeds must be >= 1; given {given.jobs} and {given.seeds}")
    for option, text in (("--tasks", given.tasks), ("--arms", given.arms)):
        try:
            re.compile(text)
        except re.error as error:
            parser.error(f"{option} must be a regular expression; given {text!r}: {error}")

    if given.tune and given.suite not in TUNED:
        parser.error(f"--tune is of {', '.join(TUNED)}; given --suite={given.suite}")
    try:
        tasks = (TUNED if given.tune else SUITES)[given.suite](given.data)
    except ValueError as error:
        parser.error(str(error))
    name = f"{given.suite}_tuning" if given.tune else given.suite
    all_seeds = {name: task.seeds for name, task in tasks.items()}  # a choice needs them all
    tasks = select(tasks, half=given.half, names=given.tasks, seeds=given.seeds)
    by_task = {name: configs(task, given.arms) for name, task in tasks.items()}
    if not any(by_task.values()):
        parser.error(f"nothing matches --tasks={given.tasks!r} --arms={given.arms!r}")
    if given.rehash is not None:
        if not given.rehash.is_file():
            parser.error(f"--rehash must be a file of records; given {given.rehash}")
        changed = rehash(given.rehash, given.suite, by_task)
        print(f"{changed} records with a new hash: {given.rehash}", file=sys.stderr)
        return 0
    results, errors = given.workdir / f"{name}.jsonl", given.workdir / "errors.jsonl"
    done = {(r["task"], r["arm"], r["seed"], r["settings"]) for r in json_lines.read(results)}
    todo = jobs(tasks, by_task, done)
    if given.dry_run:
        print(_plan(tasks, todo, given.jobs))
        return 0
    if lacking := missing(tasks):
        parser.error(f"first: python -m experiments.prepare --out={given.data} "
                     f"{' '.join(lacking)}")  # fmt: skip
    if lacking := pretrained_tasks.missing(tasks):
        parser.error("first:\n" + "\n".join(lacking))

    given.workdir.mkdir(parents=True, exist_ok=True)
    errors.unlink(missing_ok=True)
    # For the workers, which inherit it. Compiled programs are kept: the next pass needs them again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((given.workdir / "compiled").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share a GPU
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    failed = 0

    with (
        train.StopRequest(second_interrupts=False) as stop,  # ending the workers takes a moment
        tqdm(total=sum(job.runs for job in todo), desc=name, file=sys.stderr) as bar,
    ):

        def record(job, seed, by_arm):
            task = tasks[job.task]
            for arm, values in by_arm.items():
                fixed = {"arm": arm, "seed": seed, "settings": settings_hash(job.arms[arm])}
                about = described(name, job.task, task)
                if given.tune:  # no test split was read
                    values = {k.replace("test_", "select_"): v for k, v in values.items()}
                more = {"versions": versions, "date": _now()}
                json_lines.append(results, about | fixed | values | more)
            bar.update(len(by_arm))

        def fail(job, seed, error):
            nonlocal failed
            failed += len(job.arms)
            json_lines.append(errors, {"task": job.task, "arms": [*job.arms], "seed": seed,
                                       "error": error, "date": _now()})  # fmt: skip
            bar.update(len(job.arms))
            bar.write(f"failed: {job.task}, {', '.join(job.arms)}, seed {seed}", file=sys.stderr)

        run(todo, workers=given.jobs, stop=stop, record=record, fail=fail)

    if stop.signal is not None:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + stop.signal
    print(f"results: {results}", file=sys.stderr)
    if given.tune:
        choices = tuning.choose(*_tuned(tasks, by_task, json_lines.read(results)), all_seeds)
        if choices:
            tuning.write(choices)
        print(f"{sum(map(len, choices.values()))} choices: {tuning.CHOICES}", file=sys.stderr)
    if failed:
        print(f"{failed} runs failed: {errors}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
