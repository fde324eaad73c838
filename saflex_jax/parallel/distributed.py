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

    Call it before any other use of JAX. Without arguments it detects the cluster (Cloud TPU, Slurm,
    Kubernetes, Open MPI).

    >>> initialize("10.0.0.1:1234", num_processes=4, process_id=0)  # doctest: +SKIP

    Args:
      coordinator_address: "host:port" of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      heartbeat_seconds: JAX's service ends all processes if one has been dead for this long.
        `Watch` notices earlier, and also notices a process that hangs.
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
    """Whether all processes should save and stop at this step; call it on all of them.

    With one process it is always False: there the loop's own signal handler decides.

    >>> preempted(step=7)
    False

    Args:
      step: number of steps taken.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
