"""The examples in docstrings run, and what the package exports has one."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest

import saflex_jax

MODULES = [
    "saflex_jax",
    *(m.name for m in pkgutil.walk_packages(saflex_jax.__path__, "saflex_jax.")),
]
NEEDED = {"saflex_jax.models.clip_text": "tokenizers"}  # by the examples of a module
FUNCTIONS = [name for name in saflex_jax.__all__ if inspect.isfunction(getattr(saflex_jax, name))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    # As a user has it: nothing is promoted in silence here, but no error either.
    with jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_exported_has_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(saflex_jax, name))
