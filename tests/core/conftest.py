"""Fixtures of the core's tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision, where a finite difference or a converged optimum is the reference."""
    with jax.enable_x64(True):
        yield
