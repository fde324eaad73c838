"""Fixtures of the core's tests."""

import pytest

from saflex_jax._compat import enable_x64


@pytest.fixture
def x64():
    """Double precision, where a finite difference or a converged optimum is the reference."""
    with enable_x64(True):
        yield
