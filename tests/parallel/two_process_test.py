import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.parallel import setup_

PROCESSES = 2


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process of one two-process run, four devices each, holds at its end."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-m", "tests.parallel.worker_", str(port)]
    logs = [(folder / f"log{i}").open("w+") for i in range(PROCESSES)]
    started = [
        subprocess.Popen(
            [*command, str(i), str(PROCESSES), str(folder)],
            cwd=pathlib.Path(__file__).parents[2],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for i, log in enumerate(logs)
    ]
    try:
        codes = [p.wait(timeout=300) for p in started]
    finally:
        for p, log in zip(started, logs):
            p.kill()
            log.seek(0)
            print(log.read())  # pytest shows it where something fails
            log.close()
    assert codes == [0] * PROCESSES
    return [dict(np.load(folder / f"process{i}.npz")) for i in range(PROCESSES)]


def below(found, prefix):
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def test_both_processes_hold_the_same(processes):
    first, second = processes
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.mark.parametrize("variant", setup_.VARIANTS)
def test_two_processes_agree_with_one_device(processes, variant):
    setup_.assert_agrees(below(processes[0], f"{variant}/"), variant)


def test_pmap_refuses_several_processes(processes):
    assert "one process; given 2: use jit_runner" in str(processes[0]["pmap_error"])


def test_a_signal_to_one_process_stops_both_and_the_run_resumes_bit_for_bit(processes):
    fit = below(processes[0], "fit/")
    assert fit["stopped_by"] == "SIGTERM"
    assert 3 < fit["stopped_at"] < 30
    assert fit["saved"] == fit["stopped_at"]
    whole, resumed = below(fit, "whole/"), below(fit, "resumed/")
    assert whole["step"] == 30
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_evaluation_is_exact_in_every_process(processes):
    # 24 samples in padded batches of 10: a share of 24, and better than guessing after training.
    right = processes[0]["fit/accuracy"] * setup_.SAMPLES
    np.testing.assert_allclose(right, np.round(right), atol=1e-9)
    assert right > setup_.SAMPLES / setup_.CLASSES
