"""One process of the two-process run: `python -m tests.parallel.worker_ PORT PROCESS COUNT FOLDER`.

Every process writes what it holds at the end to FOLDER; `two_process_test.py` compares.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np

from saflex_jax import Streams
from saflex_jax.data import ArrayStream, IndexStream, sizes
from saflex_jax.parallel import initialize, jit_runner, pmap_runner
from saflex_jax.train import Checkpoints, fit, make_evaluator
from tests.parallel import setup_


class SignalledStream(ArrayStream):
    """Sends SIGTERM to its own process before batch `at`, then goes slowly while word spreads."""

    at: int | None = None

    def __next__(self) -> Streams:
        step = self.get_state()["step"]
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.at is not None and step >= self.at:
            time.sleep(0.5)
        return super().__next__()


POOLS = Streams(setup_.POOL, setup_.POOL)


def options() -> dict[str, int]:
    return {
        "batch_size": setup_.ROWS,
        "val_batch_size": setup_.ROWS,
        "seed": 0,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def make_stream() -> SignalledStream:
    return SignalledStream(POOLS, **options())


def interrupted_fit(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A run, and the same run with process 1 told to stop, then resumed by both.

    The resumed one holds the data on the devices, which must make no difference.
    """
    method = setup_.make_method("posterior_memory_padding")
    runner = jit_runner(method.step)
    evaluate = make_evaluator(method, setup_.POOL.inputs, setup_.POOL.labels, batch_size=10)
    state = setup_.make_state("posterior_memory_padding")
    common = {"num_steps": 30, "log_every": 10, "progress": False}
    whole = fit(runner, state, make_stream(), evaluate=evaluate, eval_every=30, **common)

    stream = make_stream()
    stream.at = 3 if jax.process_index() == 1 else None
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


def main() -> None:
    port, process, count, folder = *map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4])
    for _ in range(2):  # the second call must do nothing
        initialize(f"localhost:{port}", count, process)
    found = {}
    for variant in setup_.VARIANTS:
        state = setup_.run(jit_runner, variant)
        found |= {f"{variant}/{name}": value for name, value in state.items()}
    try:
        pmap_runner(setup_.make_method("cg_head").step)
    except ValueError as error:
        found["pmap_error"] = np.array(str(error))
    found |= {f"fit/{name}": value for name, value in interrupted_fit(folder).items()}
    np.savez(folder / f"process{process}.npz", **found)


if __name__ == "__main__":
    main()
