"""Eight fake devices, and JAX's strictest settings; set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most programs here are compiled to run once: machine code is made quickly, not well.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", False)  # the package must report NaN itself


@pytest.fixture(autouse=True, scope="module")
def _fresh_caches():
    """Compiled programs of one file do not pile up: a process may hold 65,530 memory maps."""
    yield
    jax.clear_caches()
