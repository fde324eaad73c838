"""Start and pre-emption of multi-host runs."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a multi-host run; does nothing if they have joined already.

    Call it before any other use of JAX. Without arguments the cluster is detected (Cloud TPU,
    Slurm, Kubernetes, Open MPI).

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this one, from 0.
    """
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def preempted(step: int) -> bool:
    """Whether all processes should save and stop at this step; must be called on all of them.

    Always False with one process, where the loop's own signal handler decides.

    >>> preempted(step=7)
    False
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
