"""One process of a run of several.

    python -m tests.parallel.worker_ PORT PROCESS COUNT FOLDER WHAT...

WHAT is a variant of `setup_`, "fit" or "elastic". Every process writes what it holds at the end to
FOLDER; `two_process_test.py` compares.
"""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from saflex_jax import Streams
from saflex_jax.data import ArrayStream, IndexStream, sizes
from saflex_jax.parallel import Runner, initialize, jit_runner, pmap_runner
from saflex_jax.train import Checkpoints, fit, make_evaluator
from tests.parallel import setup_

FITTED = "posterior_memory_padding"  # the variant of "fit"
STEPS, STOP = 14, 3  # SIGTERM comes before batch STOP
ELASTIC_BEGIN, ELASTIC_STEPS = 5, 25
VAL_ROWS = 6  # which neither 4 devices nor 8 divide
POOLS = Streams(setup_.POOL, setup_.POOL)


class SignalledStream(ArrayStream):
    """Sends SIGTERM to its own process before batch `at`, then goes slowly while word spreads."""

    at: int | None = None

    def __next__(self) -> Streams:
        step = self.get_state()["step"]
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.at is not None and step >= self.at:
            time.sleep(1)
        return super().__next__()


def options() -> dict[str, int]:
    return {
        "batch_size": setup_.ROWS,
        "val_batch_size": VAL_ROWS,
        "seed": 0,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


@functools.cache
def make_runner(variant: str):
    return jit_runner(setup_.make_method(variant).step)


def interrupted_fit(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A run, and the same run with process 1 told to stop, then resumed by both.

    The resumed one holds the data on the devices, which must make no difference.
    """
    method, runner = setup_.make_method(FITTED), make_runner(FITTED)
    evaluate = make_evaluator(method, setup_.POOL.inputs, setup_.POOL.labels, batch_size=10)
    state = setup_.make_state(FITTED)
    common = {"num_steps": STEPS, "log_every": STEPS // 2, "progress": False}
    stream = SignalledStream(POOLS, **options())
    whole = fit(runner, state, stream, evaluate=evaluate, eval_every=STEPS, **common)

    stream = SignalledStream(POOLS, **options())
    stream.at = STOP if jax.process_index() == 1 else None
    checkpoints = Checkpoints(folder / "checkpoints", every=1000)
    stopped = fit(runner, state, stream, checkpoints=checkpoints, **common)
    saved = checkpoints.latest
    checkpoints.close()
    checkpoints = Checkpoints(folder / "checkpoints", every=1000)
    rows = IndexStream(sizes(POOLS), **options())
    resumed = fit(runner.hold(POOLS), state, rows, checkpoints=checkpoints, **common)
    checkpoints.close()
    return {
        **setup_.flatten({"whole": whole.state, "resumed": resumed.state}),
        "stopped_by": np.array(stopped.stopped_by.name if stopped.stopped_by else ""),
        "stopped_at": np.array(int(stopped.state.step)),
        "saved": np.array(saved),
        "accuracy": np.array(whole.history[-1]["eval/accuracy"]),
    }


def elastic_fit(folder: pathlib.Path, runner: Runner, num_steps: int) -> dict[str, np.ndarray]:
    """A run of a folder goes on to a step, on whatever devices and processes there are."""
    checkpoints = Checkpoints(folder / "elastic", every=1000)
    rows = IndexStream(sizes(POOLS), **options())
    result = fit(
        runner.hold(POOLS), setup_.make_state(FITTED), rows, num_steps=num_steps,
        checkpoints=checkpoints, progress=False,
    )  # fmt: skip
    checkpoints.close()
    return setup_.flatten(result.state)


def main() -> None:
    port, process, count, folder = *map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4])
    for _ in range(2):  # the second call must do nothing
        initialize(f"localhost:{port}", count, process)
    found = {}
    for what in sys.argv[5:]:
        if what == "fit":
            result = interrupted_fit(folder)
        elif what == "elastic":
            result = elastic_fit(folder, make_runner(FITTED), ELASTIC_STEPS)
        else:
            result = setup_.run(lambda step, what=what: make_runner(what), what)
        found |= {f"{what}/{name}": value for name, value in result.items()}
    try:
        pmap_runner(setup_.make_method(FITTED).step)
    except ValueError as error:
        found["pmap_error"] = np.array(str(error))
    np.savez(folder / f"process{process}.npz", **found)


if __name__ == "__main__":
    main()
