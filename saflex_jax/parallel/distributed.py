"""Start and pre-emption of multi-host runs."""

from __future__ import annotations

import jax
from jax.experimental import multihost_utils

from saflex_jax import checks


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of a multi-host run; does nothing if they have joined already.

    Call it before any other use of JAX. Without arguments the cluster is detected (Cloud TPU,
    Slurm, Kubernetes, Open MPI).

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this one, from 0.
      heartbeat_seconds: after which JAX's service ends all processes when one is dead. `Watch` sees
        it earlier, and also a process that hangs.
    """
    checks.whole(1, heartbeat_seconds=heartbeat_seconds)
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )


def preempted(step: int) -> bool:
    """Whether all processes should save and stop at this step; must be called on all of them.

    Always False with one process, where the loop's own signal handler decides.

    >>> preempted(step=7)
    False
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
