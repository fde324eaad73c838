"""Interleaved timing of jobs in one process, and the machine that it was done on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import tqdm

Job = Callable[[], object]  # returns when its work is done: asynchronous libraries block inside


class Run(NamedTuple):
    """What was measured so far; filled in place, so that an interruption loses nothing.

    Attributes:
      seconds: name -> seconds a call, one number a round.
      failed: name -> why it has no numbers.
    """

    seconds: dict[str, list[float]]
    failed: dict[str, str]


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
    setups: Mapping[str, Callable[[], Job]],
    into: Run,
    *,
    rounds: int,
    seconds: float,
    bar: tqdm.tqdm,
) -> None:
    """Times every job in turn, A B C A B C ..., so that a slow moment of the machine hits all.

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
        times.append(seconds_a_call(jobs[name], calls[name]))

    for name in setups:
        attempt(name, warm_up)
    for _ in range(rounds):
        for name in setups:
            attempt(name, measure)


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
