"""Thin runners around one step: jit on a mesh of devices (the main path), pmap, and sweeps."""

from saflex_jax.parallel.distributed import initialize
from saflex_jax.parallel.runners import Runner, jit_runner, pmap_runner
from saflex_jax.parallel.sweep import member, stack_states, sweep_runner
from saflex_jax.parallel.watch import Watch

RUNNERS = {"jit": jit_runner, "pmap": pmap_runner}

__all__ = [
    "RUNNERS",
    "Runner",
    "Watch",
    "initialize",
    "jit_runner",
    "member",
    "pmap_runner",
    "stack_states",
    "sweep_runner",
]
