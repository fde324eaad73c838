"""Interleaved timing of jobs in one process, what they train on, and the machine."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from saflex_jax.types import Batch, PyTree

Job = Callable[[], object]  # returns when its work is done: asynchronous libraries block inside
Setup = Callable[[], Job]  # neither it nor the job's first calls are timed


def median(values: Iterable[float]) -> float | None:
    """None of no values."""
    values = list(values)
    return float(np.median(values)) if values else None


def spread(values: Iterable[float]) -> float | None:
    """The interquartile range; None of no values."""
    values = list(values)
    return float(np.subtract(*np.percentile(values, (75, 25)))) if values else None


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


def reason(error: Exception) -> str:
    """One line of it."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@dataclasses.dataclass
class Series:
    """Jobs that are timed in turn, A B C, C B A, ..., so that a slow moment hits all.

    There and back, so that what the one before leaves behind is not always the same job's.
    """

    title: str
    names: Sequence[str]  # of the jobs
    setups: Callable[[], Mapping[str, Setup]]  # called when the series' turn comes
    rounds: int  # times that each job comes up
    seconds: float  # length of one job's part of a round; a slower job is called once
    # Filled in place, so that an interruption loses nothing: seconds a call, one number a round,
    # and why a job has no numbers.
    measured: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        """By how much `measure` advances the bar."""
        return len(self.names) * (self.rounds + 1)

    def measure(self, bar: tqdm.tqdm) -> None:
        """Times all jobs; one that fails stops no other."""
        bar.set_description(self.title)
        setups, jobs, calls = self.setups(), {}, {}

        def attempt(name, work):
            if name not in self.failed:
                bar.set_postfix_str(name)
                try:
                    work(name)
                except Exception as error:  # whatever a peer raises is its result
                    self.failed[name] = reason(error)
            bar.update()

        def warm_up(name):
            jobs[name] = setups[name]()
            jobs[name]()
            calls[name] = calls_in(jobs[name], self.seconds)

        def time_it(name):
            jobs[name]()  # the threads of the job before may still spin
            times = self.measured.setdefault(name, [])
            times.append(seconds_a_call(jobs[name], calls[name]))

        for name in self.names:
            attempt(name, warm_up)
        for number in range(self.rounds):
            for name in reversed(self.names) if number % 2 else self.names:
                attempt(name, time_it)

    def times(self, name: str) -> list[float]:
        """Seconds a call, a number a round; none of a job that failed."""
        return [] if name in self.failed else self.measured.get(name, [])

    def ratios(self, name: str, base: str) -> list[float]:
        """To another job, round by round: a slow moment of the machine is in both of a pair."""
        return [a / b for a, b in zip(self.times(name), self.times(base))]

    def why_null(self) -> dict[str, str]:
        """name -> why it has no times, for those that have none."""
        missing = (name for name in self.names if not self.times(name))
        unknown = dict.fromkeys(missing, "interrupted before it was measured")
        return unknown | self.failed


# --- what is timed


def labelled(inputs: np.ndarray, num_classes: int = 10, *, seed: int = 0) -> Batch:
    """Samples with labels drawn at random."""
    size = len(inputs)
    labels = np.random.default_rng(seed).integers(num_classes, size=size)
    onehot = np.eye(num_classes, dtype=np.float32)[labels]
    return Batch(inputs, onehot, np.ones(size, bool), np.arange(size, dtype=np.int32))


def steps_of(
    step: Callable[[PyTree, Any], tuple[PyTree, dict]],
    state: PyTree,
    batches: Iterator[Any],
    *,
    steps: int = 1,
) -> Job:
    """So many training steps, dispatched one after the other, then waited for; gives the loss."""

    def job():
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, next(batches))
        jax.block_until_ready(state)
        if not np.isfinite(loss := metrics["loss"][0]).all():
            raise FloatingPointError("the loss is not finite")
        return loss

    return job


# --- the machine


def keep_memory() -> bool:
    """Lets malloc keep what is freed, where it is glibc's; whether it does from now on.

    By default it maps buffers above 32 MiB anew for every call, and the kernel fills them with
    zeros: a step whose buffers are a little larger than another's then takes half as long again.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def threads() -> int:
    """As many as JAX's CPU client starts: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def version(package: str) -> str | None:
    """The installed version; None when there is none."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def machine(packages: Iterable[str]) -> dict:
    """Processor, cores, device, date, and versions of the packages that are installed."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
