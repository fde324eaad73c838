"""Interleaved timing of jobs in one process, the machine it was done on, and the command."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from saflex_jax import checks

Job = Callable[[], object]  # returns when its work is done: asynchronous libraries block inside


class Run(NamedTuple):
    """What was measured so far; filled in place, so that an interruption loses nothing.

    Attributes:
      seconds: name -> seconds a call, one number a round.
      failed: name -> why it has no numbers.
    """

    seconds: dict[str, list[float]]
    failed: dict[str, str]


def keep_memory() -> bool:
    """Lets malloc keep what is freed, where it is glibc's; whether it does from now on.

    By default it maps buffers above 32 MiB anew for every call, and the kernel fills them with
    zeros: a step whose buffers are a little larger than another's then takes half as long again.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def seconds_a_call(job: Job, calls: int = 1) -> float:
    """Mean over successive calls."""
    start = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - start) / calls


def calls_in(job: Job, seconds: float) -> int:
    """Calls that fit, at least one; they also warm up."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        job()
        calls += 1
    return calls


def fastest(*jobs: Job) -> Job:
    """The job whose next call takes least; each was called before."""
    return min(jobs, key=seconds_a_call)


def interleaved(
    setups: dict[str, Callable[[], Job]],
    into: Run,
    *,
    rounds: int,
    seconds: float,
    bar: tqdm.tqdm,
) -> None:
    """Times every job in turn, A B C, C B A, ..., so that a slow moment of the machine hits all.

    A job is called once before it is timed: the threads of the one before may still spin. There and
    back, so that what the one before leaves behind is not always the same job's.

    Args:
      setups: name -> function that makes the job; it and the job's first calls are not timed.
      into: receives the times, and the reason of a job that failed.
      rounds: times that each job comes up.
      seconds: length of one job's part of a round; a slower job is called once.
      bar: advances by `rounds + 1` for every job.
    """
    jobs, calls = {}, {}

    def attempt(name, work):
        if name not in into.failed:
            bar.set_postfix_str(name)
            try:
                work(name)
            except Exception as error:  # whatever a peer raises is its result
                into.failed[name] = f"{type(error).__name__}: {error}"
        bar.update()

    def warm_up(name):
        jobs[name] = setups[name]()
        jobs[name]()
        calls[name] = calls_in(jobs[name], seconds)

    def measure(name):
        times = into.seconds.setdefault(name, [])
        jobs[name]()
        times.append(seconds_a_call(jobs[name], calls[name]))

    for name in setups:
        attempt(name, warm_up)
    for number in range(rounds):
        for name in reversed(setups) if number % 2 else setups:
            attempt(name, measure)


def command(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    *,
    start: Callable[[argparse.Namespace], tuple[int, Callable[[tqdm.tqdm], None]]],
    report: Callable[[argparse.Namespace], dict],
    table: Callable[[dict], str],
) -> int:
    """Measures, prints a table or JSON, and gives the exit status: 0, or 130 after Ctrl-C.

    Args:
      parser: the benchmark's own options; --json, --out and --rounds are added.
      argv: None = the process's.
      start: options -> (length of the bar, what measures).
      report: options -> the JSON, of whatever was measured.
      table: the JSON for people.
    """
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--out", type=pathlib.Path, help="write the JSON to this file as well")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    checks.positive(rounds=options.rounds)
    total, measure = start(options)
    status = 0
    # Whatever a library prints goes to stderr, beside the progress bar.
    with contextlib.redirect_stdout(sys.stderr), tqdm.tqdm(total=total, leave=False) as bar:
        try:
            measure(bar)
        except KeyboardInterrupt:
            status = 130
    if status:
        print("interrupted; what was measured:", file=sys.stderr)
    made = report(options)
    text = json.dumps(made, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text if options.json else table(made))
    return status


def header(machine: dict) -> list[str]:
    """The first lines of a table."""
    return [
        f"{machine['cpu']}, {machine['cores']} cores; device {machine['device']}; "
        f"{machine['date']}; {machine['rounds']} rounds and their interquartile range",
        ", ".join(f"{p} {v}" for p, v in machine["versions"].items() if v is not None),
    ]


def spread(values: Iterable[float]) -> float:
    """The interquartile range."""
    low, high = np.percentile(list(values), (25, 75))
    return float(high - low)


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def version(package: str) -> str | None:
    """The installed version; None when there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(packages: Iterable[str]) -> dict:
    """Processor, cores, device, date and versions: the header of every table."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
