"""Faults, counted: what kills, full disks, damaged files and odd clocks leave of a run.

    python -m benchmarks.faults --kills=50              # everything; about 20 minutes of 2 cores
    python -m benchmarks.faults --parts=flips,life      # some of it

Each trial is a small main job (`experiments.main`, 120 steps on a table, a checkpoint every 4), in
a process of its own or in several. It survived if, after the same command was given again, it ended
with exit status 0; bits are equal if all arrays of its last checkpoints, its result, and its
records but for their times are those of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import logging as standard_logging
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from absl import logging
from ml_collections import ConfigDict

from benchmarks import reporting
from experiments import build, main, task
from experiments.configs import wdbc
from saflex_jax import TrainState, checks
from saflex_jax.train import Checkpoints, DamagedCheckpoint
from saflex_jax.train.digest import digests

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 120
OVERRIDES = {
    "train.steps": STEPS,
    "train.log_every": 3,
    "train.checkpoint_every": 4,
    "train.batch_size": 32,
    "model.widths": (8,),
    "augment": "feature_noise(0.1) | mixup(0.4, probability=0.5)",
}
KILLS_IN_A_RUN = 5  # each is followed by the same command
LIMIT = 180  # seconds, for a process that does not end
LOST_AFTER, HUNG_AFTER = 6, 120  # seconds, as the trials set them; a busy machine compiles slowly
FLIPS, SAVES = 60, 200
DISK = "160k"  # of a file system that holds two checkpoints and no third
JUMPS = """
import random, time
_time, _time_ns, _draw = time.time, time.time_ns, random.Random(0)
def _jump():  # up to ten years, back or forth, at every look
    return _draw.randint(-3 * 10**8, 3 * 10**8)
time.time = lambda: _time() + _jump()
time.time_ns = lambda: _time_ns() + 10**9 * _jump()
"""
DELAYS = """
import os, time
def _slow(call):
    def slow(*args, **kwargs):
        time.sleep(0.05)
        return call(*args, **kwargs)
    return slow
for _name in ("mkdir", "rename", "replace", "rmdir", "scandir", "fsync", "unlink"):
    setattr(os, _name, _slow(getattr(os, _name)))
"""


def config() -> ConfigDict:
    """What all jobs run."""
    result = wdbc.get_config()
    result.update_from_flattened_dict(OVERRIDES)
    return result


# --- Jobs


def _run(arguments: list[str], log: pathlib.Path, site: str) -> None:
    """The main job, in a process that is forked when all is imported and nothing is started."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    exec(site, {})
    sys.argv = ["experiments.main", *arguments]  # where the flags of a config are looked for
    try:
        main.command()
    finally:
        atexit._run_exitfuncs()  # a forked process has none; JAX leaves the others by one


class Job(NamedTuple):
    """The processes of one run, as started once, and what they say."""

    processes: list[multiprocessing.process.BaseProcess]
    logs: list[pathlib.Path]

    def wait(self) -> list[int]:
        """Exit statuses; whoever does not end in time is killed."""
        end = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def signal(self, place: int, number: signal.Signals) -> None:
        """Sends it to one that may have ended."""
        if self.processes[place].is_alive():
            os.kill(self.processes[place].pid, number)

    def said(self) -> list[str]:
        """What each wrote."""
        return [log.read_text() for log in self.logs]


class Jobs:
    """Starts main jobs, whose programs are compiled once."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self._number = folder, 0
        os.environ |= {  # of the jobs; here JAX has read them already
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["experiments.main", "benchmarks.faults"])
        self._starting = threading.Lock()

    def start(self, workdir: pathlib.Path, count: int = 1, site: str = "") -> Job:
        """`site`: Python that the processes run first."""
        arguments = ["--noprogress", "--config=experiments/configs/wdbc.py"]
        arguments += [f"--workdir={workdir}"]
        arguments += [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
        if count > 1:
            with socket.socket() as s:
                s.bind(("localhost", 0))
                port = s.getsockname()[1]
            arguments += ["--distributed", f"--coordinator=localhost:{port}"]
            arguments += [f"--processes={count}", f"--lost_after={LOST_AFTER}"]
            arguments += [f"--hung_after={HUNG_AFTER}"]
        job = Job([], [])
        with self._starting:
            self._number += 1
            for i in range(count):
                own = [*arguments, *([f"--process={i}"] if count > 1 else [])]
                job.logs.append(self.folder / f"log{self._number}.{i}")
                job.logs[-1].touch()
                options = (own, job.logs[-1], site)
                job.processes.append(self._context.Process(target=_run, args=options))
                job.processes[-1].start()
        return job


def come_to(workdir: pathlib.Path) -> int:
    """The step of the last whole record; 0 before any."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):  # it is being replaced
        return 0


def records(workdir: pathlib.Path) -> list[dict]:
    """What metrics.jsonl holds, but for the times."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds_per_step"} for record in found]


def wait_until(holds: Callable[[], bool], job: Job) -> bool:
    """Whether it came to hold while all processes ran."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and all(p.is_alive() for p in job.processes):
        if holds():
            return True
        time.sleep(0.002)
    return False


# --- Faults


class Tally:
    """Rows of the table: fault -> tried, survived, bits equal, and more."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def add(self, fault: str, tried: int, survived: int, equal: int, **more: float) -> None:
        row = self.rows.setdefault(fault, {"tried": 0, "survived": 0, "bits equal": 0})
        for name, number in zip(row, (tried, survived, equal)):
            row[name] += number
        for name, value in more.items():
            row[name] = max(value, row.get(name, value))


class Faults(reporting.Benchmark):
    """Every part is a method `part_NAME`; `--parts` chooses."""

    packages = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore")
    rounds = None

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--kills", type=int, default=50, help="of one process")
        parser.add_argument("--seed", type=int, default=0, help="of all random moments")
        parser.add_argument("--parts", default=",".join(PARTS), help="some of the default")

    def __init__(self, options: argparse.Namespace):
        checks.whole(1, kills=options.kills)
        self.parts = options.parts.split(",")
        for part in self.parts:
            checks.choice(PARTS, parts=part)
        self.kills = {1: options.kills, 2: -(-options.kills * 2 // 5), 4: -(-options.kills // 5)}
        self.random, self.tally, self.examples = random.Random(options.seed), Tally(), {}
        self.seconds: dict[str, float] = {}

    @property
    def length(self) -> int:
        return len(self.parts)

    def measure(self, bar: tqdm.tqdm) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax and asyncio report damaged files many times
        standard_logging.getLogger("asyncio").setLevel("CRITICAL")
        with tempfile.TemporaryDirectory() as folder:
            self.folder, self.wholes = pathlib.Path(folder), {}
            self.jobs = Jobs(self.folder)
            for part in self.parts:
                bar.set_description(part)
                began = time.perf_counter()
                getattr(self, f"part_{part}")()
                self.seconds[part] = time.perf_counter() - began
                print(f"{part}: {self.seconds[part]:.0f} s; {self.tally.rows}", file=sys.stderr)
                bar.update()

    def report(self) -> dict:
        report = {"faults": self.tally.rows, "said": self.examples, "seconds": self.seconds}
        return report | {"machine": {"kills": self.kills}}

    @staticmethod
    def table(report: dict) -> Iterator[str]:
        yield from reporting.columns(report["faults"])
        for fault, text in report["said"].items():
            yield f"{fault}: {text}"

    # -- what is compared

    def like(self) -> TrainState:
        """A state of the jobs."""
        pools = task.make_data(config()).pools
        method = build.with_upstream(config(), build.make_method(config(), pools))
        return build.init_state(config(), method, pools)

    def outcome(self, workdir: pathlib.Path) -> tuple:
        """All that two runs have in common if no bit differs."""
        checkpoints = Checkpoints(workdir / "checkpoints", config=build.settings(config()))
        if not hasattr(self, "_like"):
            self._like = self.like()
        steps = (STEPS - 4, STEPS)
        states = [checkpoints.load(self._like, step) for step in steps]
        checkpoints.close()
        arrays = [(digests(state), position) for state, position in states]
        return arrays, records(workdir), (workdir / "result.json").read_text()

    def whole(self, count: int = 1) -> tuple:
        """The outcome of a run that nothing disturbs."""
        if count not in self.wholes:
            workdir = self.folder / f"whole{count}"
            job = self.jobs.start(workdir, count)
            if any(job.wait()):
                raise RuntimeError("the undisturbed run failed:\n" + "\n".join(job.said()))
            self.wholes[count] = self.outcome(workdir)
        return self.wholes[count]

    def finish(self, workdir: pathlib.Path, count: int = 1, site: str = "") -> tuple[bool, bool]:
        """Gives the command again; whether it ended well, and with the bits of a whole run."""
        job = self.jobs.start(workdir, count, site)
        if any(job.wait()):
            print(*job.said(), sep="\n", file=sys.stderr)
            return False, False
        equal = self.outcome(workdir) == self.whole(count)
        shutil.rmtree(workdir)
        return True, equal

    # -- SIGKILL

    def killed(self, fault: str, kills: int, count: int, site: str = "") -> None:
        """One run with so many kills, of which every other one hits a checkpoint in writing."""
        workdir = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        done, longest = 0, 0.0
        while done < kills:
            target = self.random.randint(done * STEPS // kills, (done + 1) * STEPS // kills - 2)
            in_writing, pause = done % 2 == 0, self.random.uniform(0, 0.02)
            job = self.jobs.start(workdir, count, site)
            reached = wait_until(lambda t=target: come_to(workdir) >= t, job)
            if reached and in_writing:
                folder = workdir / "checkpoints"
                reached = wait_until(lambda f=folder: any(f.glob("*.orbax-checkpoint-tmp")), job)
            elif reached:
                time.sleep(pause)
            victim = self.random.randrange(count)
            job.signal(victim, signal.SIGKILL)
            began = time.monotonic()
            status = job.wait()
            longest = max(longest, time.monotonic() - began)
            if status[victim] != -signal.SIGKILL:
                if not any(status):  # it was over: nothing was left to kill
                    break
                self.tally.add(fault, kills - done, 0, 0)
                print(*job.said(), sep="\n", file=sys.stderr)
                return
            if count > 1:
                time.sleep(LOST_AFTER + 1)  # witnesses may take as long
                self.note_who(fault, job, victim)
            done += 1
        survived, equal = self.finish(workdir, count, site)
        more = {"others end within s": round(longest, 1)} if count > 1 else {}
        self.tally.add(fault, done, done * survived, done * equal, **more)

    def note_who(self, fault: str, job: Job, victim: int) -> None:
        """Counts the times that one that was left named the one that was lost; keeps an example."""
        others = [text for i, text in enumerate(job.said()) if i != victim]
        named = [line for text in others for line in text.splitlines()
                 if f"process {victim} (pid" in line]  # fmt: skip
        if named:
            self.examples[fault] = named[0][:300]
        row = self.tally.rows.setdefault(fault, {"tried": 0, "survived": 0, "bits equal": 0})
        row["named"] = row.get("named", 0) + bool(named)

    def part_kills1(self) -> None:
        self.whole()
        runs = [min(KILLS_IN_A_RUN, self.kills[1] - n)
                for n in range(0, self.kills[1], KILLS_IN_A_RUN)]  # fmt: skip
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: self.killed("SIGKILL, 1 process", n, 1), runs))

    def part_kills2(self) -> None:
        for n in range(0, self.kills[2], KILLS_IN_A_RUN):
            self.killed("SIGKILL, one of 2", min(KILLS_IN_A_RUN, self.kills[2] - n), 2)

    def part_kills4(self) -> None:
        for n in range(0, self.kills[4], KILLS_IN_A_RUN):
            self.killed("SIGKILL, one of 4", min(KILLS_IN_A_RUN, self.kills[4] - n), 4)

    def part_hang(self) -> None:
        """One of two processes is stopped (SIGSTOP), as one whose machine hangs."""
        for victim in (0, 1):
            fault, workdir = "one of 2 hangs", self.folder / f"hang{victim}"
            job = self.jobs.start(workdir, 2)
            reached = wait_until(lambda w=workdir: come_to(w) >= 30, job)
            job.signal(victim, signal.SIGSTOP)
            began = time.monotonic()
            job.processes[1 - victim].join(LIMIT)
            took = time.monotonic() - began
            job.signal(victim, signal.SIGKILL)
            status = job.wait()[1 - victim]
            survived, equal = self.finish(workdir, 2)
            survived = survived and reached and status != 0
            more = {"others end within s": round(took, 1)}
            self.tally.add(fault, 1, int(survived), int(equal), **more)
            self.note_who(fault, job, victim)

    def part_clock(self) -> None:
        self.whole()
        self.killed("a clock that jumps by years", 3, 1, JUMPS)

    def part_slow(self) -> None:
        self.whole()
        self.killed("a disk 50 ms slower", 4, 1, DELAYS)

    # -- the disk

    def part_disk(self) -> None:
        """A file system of 200 KB fills up, and has room later."""
        self.whole()
        for number in range(2):
            mount, fault = self.folder / f"disk{number}", "a full disk"
            mount.mkdir()
            made = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(mount)]
            if subprocess.run(made, capture_output=True).returncode:
                return self.limited_files()
            try:
                job = self.jobs.start(mount / "run")
                (status,), (text,) = job.wait(), job.said()
                left = [p.name for p in (mount / "run" / "checkpoints").iterdir()
                        if p.name.isdigit()]  # fmt: skip
                clear = status == 1 and self.advises(text)
                subprocess.run(["mount", "-o", "remount,size=20m", str(mount)], check=True)
                survived, equal = self.finish(mount / "run")
                self.tally.add(fault, 1, int(survived and clear and len(left) > 0), int(equal))
                self.examples[fault] = text.strip()
            finally:
                subprocess.run(["umount", "-l", str(mount)], check=True)

    @staticmethod
    def advises(text: str) -> bool:
        """Whether a job said one line after the first, which is about its data: to make room."""
        return len(text.splitlines()) == 2 and "make room" in text

    def limited_files(self) -> None:
        """Without the right to mount: no file may be longer than 2 KB for a while."""
        fault, workdir = "a full disk (ulimit -f)", self.folder / "limited"
        limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2000, r.RLIM_INFINITY))"
        job = self.jobs.start(workdir, site=limit)
        (status,), (text,) = job.wait(), job.said()
        clear = status == 1 and self.advises(text)
        survived, equal = self.finish(workdir)
        self.tally.add(fault, 1, int(survived and clear), int(equal))
        self.examples[fault] = text.strip()

    def saved(self, folder: pathlib.Path) -> TrainState:
        """Checkpoints of steps 1 and 2 of a state whose numbers fill a file."""
        params = {"w": jax.random.normal(jax.random.key(1), (300, 300))}
        state = TrainState(jax.numpy.int32(2), params, {}, (), jax.random.key(0))
        checkpoints = Checkpoints(folder, every=1)
        for step in (1, 2):
            checkpoints.save(step, state, {"step": step})
        checkpoints.close()
        return state

    def damaged(self, fault: str, folder: pathlib.Path, state: TrainState) -> None:
        """Tries to load what was damaged: refused by name, or exact; then skips it."""
        refused = exact = False
        try:
            checkpoints = Checkpoints(folder, every=1)
            try:
                loaded, position = checkpoints.load(state)
                exact = digests(loaded) == digests(state) and position == {"step": 2}
            finally:
                checkpoints.close()
        except DamagedCheckpoint as error:
            refused = "2" in str(error)
            self.examples[fault] = str(error).replace(str(folder), "FOLDER")[:300]
        skipping = Checkpoints(folder, every=1, skip_damaged=True)
        loaded, _ = skipping.load(state)
        skipping.close()
        equal = digests(loaded) == digests(state)
        self.tally.add(fault, 1, int(refused or exact), int(equal), caught=0)
        self.tally.rows[fault]["caught"] += refused

    def part_flips(self) -> None:
        """One bit of the file that holds the numbers."""
        state = self.saved(self.folder / "flips")
        for _ in range(FLIPS):
            folder = shutil.copytree(self.folder / "flips", self.folder / "flip")
            file = max((folder / "2").rglob("*"), key=lambda p: p.stat().st_size)
            content = bytearray(file.read_bytes())
            place = self.random.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
            file.write_bytes(content)
            self.damaged("a flipped bit", folder, state)
            shutil.rmtree(folder)
        gc.collect()

    def part_files(self) -> None:
        """Every file of the newest checkpoint in turn is deleted, emptied, halved."""
        state = self.saved(self.folder / "files")
        whole = self.folder / "files"
        for name in [p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file()]:
            for share in (None, 0, 0.5):
                folder = shutil.copytree(whole, self.folder / "file")
                file = folder / name
                if share is None:
                    file.unlink()
                else:
                    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
                self.damaged("a file deleted, emptied or halved", folder, state)
                shutil.rmtree(folder)
        gc.collect()

    # -- a long life

    def part_life(self) -> None:
        """Descriptors and threads over many checkpoints."""
        state = self.saved(self.folder / "life")
        checkpoints, counted = Checkpoints(self.folder / "life", every=1), []
        for step in range(3, SAVES + 23):
            checkpoints.save(step, state, {"step": step})
            kinds = (os.listdir(f"/proc/self/{kind}") for kind in ("fd", "task"))
            counted.append([len(kind) for kind in kinds])
        checkpoints.close()
        files, threads = np.array(counted[20:]).T
        same = files[-1] <= files[0] and threads[-20:].max() <= threads[:20].max()
        self.tally.add(
            "200 checkpoints in a process", SAVES, SAVES * int(same), SAVES,
            **{"descriptors more": int(files[-1] - files[0]),
               "threads more": int(threads[-20:].max() - threads[:20].max())},
        )  # fmt: skip

    def part_second(self) -> None:
        """A second run is started in the folder of the first."""
        self.whole()
        fault, workdir = "a second run in the folder", self.folder / "second"
        first = self.jobs.start(workdir)
        wait_until(lambda: come_to(workdir) >= 3, first)
        first.signal(0, signal.SIGSTOP)  # so that it does not end before
        second = self.jobs.start(workdir)
        (status,), (text,) = second.wait(), second.said()
        first.signal(0, signal.SIGCONT)
        refused = status == 1 and f"in use by process {first.processes[0].pid} on" in text
        ended = first.wait() == [0]
        equal = ended and self.outcome(workdir) == self.whole()
        self.tally.add(fault, 1, int(refused and ended), int(equal))
        self.examples[fault] = text.strip().replace(str(workdir), "FOLDER")


PARTS = ("life", "flips", "files", "second", "disk", "clock", "slow", "kills1", "hang", "kills2",
         "kills4")  # fmt: skip

if __name__ == "__main__":
    sys.exit(reporting.command(Faults))
