"""Thin runners around one step: jit on a mesh of devices (the main path) and pmap."""

from saflex_jax.parallel.distributed import initialize
from saflex_jax.parallel.runners import Runner, jit_runner, pmap_runner

RUNNERS = {"jit": jit_runner, "pmap": pmap_runner}

__all__ = ["RUNNERS", "Runner", "initialize", "jit_runner", "pmap_runner"]
