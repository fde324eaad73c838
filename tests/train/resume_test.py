"""A run that is killed or stopped, and resumed, ends as if nothing had happened: bit for bit."""

import json
import os
import random
import shutil
import signal
import socket

import pytest

from experiments import build, task
from saflex_jax.train import Checkpoints, one_run_in
from tests.train import process_
from tests.train.process_ import CHECKPOINT_EVERY, LOG_EVERY, STEPS
from tests.train.setup_ import assert_same_bits


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "compiled"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The folder of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, stdout, stderr = process_.start(workdir, env=process_.environment(cache)).finish()
    assert code == 0, stderr[-3000:]
    assert json.loads(stdout)["steps"] == STEPS
    return workdir


@pytest.fixture(scope="module")
def like():
    config = process_.config()
    pools = task.make_data(config).pools
    method = build.with_upstream(config, build.make_method(config, pools))
    return build.init_state(config, method, pools)


def assert_same_run(workdir, whole, like):
    """Checkpoints, positions in the data, metrics and results; names what differs."""
    config = build.settings(process_.config())
    kept = process_.complete_steps(whole)
    assert kept == [STEPS - CHECKPOINT_EVERY, STEPS]
    # Exactly these: no half-written folder is left.
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == sorted(map(str, kept))
    for step in kept:
        states = []
        for folder in (workdir, whole):
            checkpoints = Checkpoints(folder / "checkpoints", config=config)
            states.append(checkpoints.load(like, step))
            checkpoints.close()
        assert_same_bits(states[0][0], states[1][0])
        assert states[0][1] == states[1][1]
        assert states[0][1]["step"] == step
    memory = states[0][0].extra.rule.memory  # is part of what is compared
    assert memory.visits.sum() > 0

    # Records that an end cut through are those of a run without one, and stops add none.
    assert process_.records(workdir) == process_.records(whole)
    assert list(process_.records(whole)) == [*range(LOG_EVERY, STEPS, LOG_EVERY), STEPS]
    assert (workdir / "result.json").read_text() == (whole / "result.json").read_text()


def test_killed_and_stopped_at_random_steps(tmp_path, whole, like, cache):
    end_and_resume(tmp_path, whole, like, 0, cache)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_killed_and_stopped_at_more_random_steps(tmp_path, whole, like, cache, seed):
    end_and_resume(tmp_path, whole, like, seed, cache)


def end_and_resume(workdir, whole, like, seed, cache):
    """Kills and stops one run in turn, which ends as `whole`; each end hits a resumed run."""
    rng = random.Random(seed)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    rng.shuffle(numbers)
    for number, (first, last) in zip(numbers, ((1, 20), (26, 40), (46, 60))):
        job, step = (
            process_.start(workdir, env=process_.environment(cache)),
            rng.randint(first, last),
        )
        code, stdout, stderr = job.signal_at(step, number)
        complete = process_.complete_steps(workdir)
        print(f"seed {seed}: {number.name} after step {step}, checkpoints {complete}")
        assert stdout == "" and not (workdir / "result.json").exists()
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 128 + number and complete[-1] >= step
            assert f"stopped at step {complete[-1]}; the same command resumes from there" in stderr
            assert "Traceback" not in stderr
    # Without the cache: the program is compiled again, as on another day.
    code, _, stderr = process_.start(workdir, env=process_.environment()).finish()
    assert code == 0, stderr[-3000:]
    assert_same_run(workdir, whole, like)


def test_another_config_is_refused_and_changes_nothing(tmp_path, whole, cache):
    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    workdir = shutil.copytree(whole, tmp_path / "run")
    job = process_.start(workdir, "--config.data.noise=0.25", env=process_.environment(cache))
    code, stdout, stderr = job.finish()
    assert code != 0 and stdout == ""
    assert f"checkpoint of step {STEPS} in {workdir}" in stderr
    assert "was written by another config (data.noise: 0.3 -> 0.25)" in stderr
    assert content(workdir) == content(whole)

    with one_run_in(workdir):  # this process holds it
        code, stdout, stderr = process_.start(workdir, env=process_.environment(cache)).finish()
    assert code != 0 and stdout == ""
    assert f"{workdir} is in use by process {os.getpid()} on {socket.gethostname()}" in stderr
    assert len(stderr.splitlines()) == 1  # no traceback
    assert content(workdir) == content(whole)
