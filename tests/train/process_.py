"""The main job in a process of its own, small enough for seconds, that can be killed midway."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from ml_collections import ConfigDict

from experiments.configs import wdbc
from tests.train.setup_ import read_records

LIMIT = 240  # seconds, for a machine that is busy with other things
ROOT = pathlib.Path(__file__).parents[2]
STEPS, LOG_EVERY, CHECKPOINT_EVERY = 100, 3, 4  # records and checkpoints fall on other steps
OVERRIDES = {
    "train.steps": STEPS,
    "train.log_every": LOG_EVERY,
    "train.checkpoint_every": CHECKPOINT_EVERY,
    "train.batch_size": 32,
    "model.widths": (8,),
    "augment": "feature_noise(0.1) | mixup(0.4, probability=0.5)",
}


def config(**overrides) -> ConfigDict:
    """What `start` runs."""
    result = wdbc.get_config()
    result.update_from_flattened_dict(OVERRIDES | overrides)
    return result


def environment(cache: pathlib.Path | None = None) -> dict[str, str]:
    """One CPU device; with a folder, compiled programs are shared between processes."""
    found = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    if cache is not None:
        found |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return found


def start(workdir: pathlib.Path, *flags: str, env: dict[str, str]) -> Job:
    """`python -m experiments.main` on `config()`, in the background."""
    command = [sys.executable, "-m", "experiments.main", f"--workdir={workdir}", "--noprogress",
               "--config=experiments/configs/wdbc.py"]  # fmt: skip
    command += [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    # Files and not pipes: a pipe that nobody reads yet fills up and holds the process.
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))
    process = subprocess.Popen([*command, *flags], cwd=ROOT, env=env, stdout=out, stderr=err)
    return Job(process, workdir, out, err)


class Job(NamedTuple):
    """A running main job."""

    process: subprocess.Popen
    workdir: pathlib.Path
    out: IO[str]
    err: IO[str]

    def finish(self) -> tuple[int, str, str]:
        """Waits; return code, stdout and stderr."""
        try:
            self.process.wait(timeout=LIMIT)
        finally:
            self.process.kill()
        self.out.seek(0)
        self.err.seek(0)
        return self.process.returncode, self.out.read(), self.err.read()

    def signal_at(self, step: int, number: signal.Signals) -> tuple[int, str, str]:
        """Sends a signal once the metrics show that the run has come to a step, then waits."""
        metrics, deadline = self.workdir / "metrics.jsonl", time.monotonic() + LIMIT
        while True:
            lines = metrics.read_text().split("\n") if metrics.exists() else []
            come_to = [json.loads(line)["step"] for line in lines[:-1][-1:]]  # the last whole line
            if come_to and come_to[0] >= step:
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"{come_to} is not yet {step}:\n{self.finish()[2][-3000:]}")
            time.sleep(0.005)
        self.process.send_signal(number)
        return self.finish()


def complete_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [p.name for p in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def records(workdir: pathlib.Path) -> dict[int, dict]:
    """Step -> record without its duration; every step once."""
    found = read_records(workdir / "metrics.jsonl")
    for record in found:
        del record["seconds_per_step"]
    result = {record.pop("step"): record for record in found}
    assert len(result) == len(found) and list(result) == sorted(result)
    return result
