import functools
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from saflex_jax.parallel import jit_runner
from tests.parallel import setup_
from tests.parallel.worker_ import (
    ELASTIC_BEGIN,
    ELASTIC_STEPS,
    FITTED,
    STEPS,
    STOP,
    elastic_fit,
)

PROCESSES = 2
# With a memory split among the processes; and with clean samples, augmentation, padding.
VARIANTS = ("posterior_memory_padding", "identity_all_augmented_padding")


def run(folder, *what):
    """What each process of one two-process run, two devices each, holds at its end."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    command = [sys.executable, "-m", "tests.parallel.worker_", str(port)]
    logs = [(folder / f"log{i}").open("w+") for i in range(PROCESSES)]
    started = [
        subprocess.Popen(
            [*command, str(i), str(PROCESSES), str(folder), *what],
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


@functools.cache  # and so one compilation for all runs of a count
def on_devices(count):
    return jit_runner(setup_.make_method(FITTED).step, devices=jax.devices()[:count])


def begin_on_four_devices(folder):
    elastic_fit(folder, on_devices(4), ELASTIC_BEGIN)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    begin_on_four_devices(folder)
    # A process that was told to stop has a step at which JAX says so again: "fit" comes last.
    return run(folder, *VARIANTS, "elastic", "fit")


def below(found, prefix):
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_both_processes_hold_the_same(processes):
    assert_same(*processes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_agree_with_one_device(processes, variant):
    setup_.assert_agrees(below(processes[0], f"{variant}/"), variant)


@pytest.mark.slow
def test_two_processes_agree_with_one_device_on_every_other_variant(tmp_path):
    others = [variant for variant in setup_.VARIANTS if variant not in VARIANTS]
    first, second = run(tmp_path, *others)
    assert_same(first, second)
    for variant in others:
        setup_.assert_agrees(below(first, f"{variant}/"), variant)


def test_pmap_refuses_several_processes(processes):
    assert "one process; given 2: use jit_runner" in str(processes[0]["pmap_error"])


def test_a_signal_to_one_process_stops_both_and_the_run_resumes_bit_for_bit(processes):
    fit = below(processes[0], "fit/")
    assert fit["stopped_by"] == "SIGTERM"
    assert STOP < fit["stopped_at"] < STEPS
    assert fit["saved"] == fit["stopped_at"]
    whole, resumed = below(fit, "whole/"), below(fit, "resumed/")
    assert whole["step"] == STEPS
    assert_same(whole, resumed)


def test_a_run_goes_on_with_other_devices_and_processes(processes, tmp_path):
    begin_on_four_devices(tmp_path)
    folders = {count: shutil.copytree(tmp_path, tmp_path / str(count)) for count in (4, 1, 8)}
    found = {n: elastic_fit(f, on_devices(n), ELASTIC_STEPS) for n, f in folders.items()}
    found["two processes"] = below(processes[0], "elastic/")
    expected = found.pop(4)
    assert expected["step"] == ELASTIC_STEPS
    for where, state in found.items():
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            message = f"{where}: {name}"
            np.testing.assert_allclose(state[name], value, rtol=0, atol=1e-6, err_msg=message)


def test_evaluation_is_exact_in_every_process(processes):
    # 24 samples in padded batches of 10: a share of 24, and better than guessing after training.
    right = processes[0]["fit/accuracy"] * setup_.SAMPLES
    np.testing.assert_allclose(right, np.round(right), atol=1e-9)
    assert right > setup_.SAMPLES / setup_.CLASSES
