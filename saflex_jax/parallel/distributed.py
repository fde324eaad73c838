"""Start-up and pre-emption of multi-host runs."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a multi-host run; does nothing when they have joined already.

    Call it before any other use of JAX. Without arguments the cluster is detected (Cloud TPU,
    Slurm, Kubernetes, Open MPI).

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: how many there are.
      process_id: this one's number.
    """
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def preempted(step: int) -> bool:
    """Whether all processes should save and stop at this step; must be called on all of them.

    With one process always False: there the loop's own signal handler decides.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
