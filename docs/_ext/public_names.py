"""Which names of the package are public, and on which page of the API reference each stands.

Public are the names in `__all__` of saflex_jax and its packages; the functions and classes of each
module in `core`, and of `types`, `configure` and `audit`; of the file of every entry of RULES and
METHODS `make` and the dataclasses, which hold the options. All else without an underscore is
shared by the project's own modules and has no page. A name that is exported twice stands under its
shortest path.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import saflex_jax
from saflex_jax import core, methods, rules
from saflex_jax.methods import upstream

PACKAGES = ("rules", "methods", "augment", "data", "models", "parallel", "train")
MODULES = ("types", "audit", "configure")


@functools.cache
def pages() -> dict[str, dict[str, list[str]]]:
    """Page -> module -> its public names, in the order in which they are shown."""
    seen: set[int] = set()
    found = {"saflex_jax": {"saflex_jax": _new("saflex_jax", saflex_jax.__all__, seen)}}
    found["core"] = _sections(_modules(core), seen)
    for name in PACKAGES:
        package = importlib.import_module(f"saflex_jax.{name}")
        exported = [n for n in package.__all__ if not isinstance(getattr(package, n), ModuleType)]
        found[name] = {package.__name__: _new(package.__name__, exported, seen)}
    found["rules"] |= _sections([rules.saflex], seen)
    found["rules"] |= _sections(_files(rules.RULES), seen, _makes_or_holds)
    found["methods"] |= _sections([upstream, methods.saflex], seen)
    found["methods"] |= _sections(_files(methods.METHODS), seen, _makes_or_holds)
    for name in MODULES:
        found[name] = _sections([importlib.import_module(f"saflex_jax.{name}")], seen)
    return found


def names() -> dict[str, Any]:
    """Path of each public name -> the object."""
    return {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for sections in pages().values()
        for module, own in sections.items()
        for name in own
    }


def is_function(value: Any) -> bool:
    """Whether it is a function, or a compiled one."""
    return inspect.isfunction(inspect.unwrap(value))


def _modules(package: ModuleType) -> list[ModuleType]:
    prefix = f"{package.__name__}."
    found = pkgutil.iter_modules(package.__path__, prefix)
    return [importlib.import_module(module.name) for module in found]


def _files(registry: dict) -> list[ModuleType]:
    return [inspect.getmodule(spec.make) for spec in registry.values()]


def _makes_or_holds(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or value.__name__ == "make"


def _sections(
    modules: list[ModuleType], seen: set[int], wanted: Callable[[Any], bool] = callable
) -> dict[str, list[str]]:
    """Module -> the functions and classes that it defines and no page has yet."""
    found = {}
    for module in dict.fromkeys(modules):
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
            and wanted(value)
        ]
        if fresh := _new(module.__name__, own, seen):
            found[module.__name__] = fresh
    return found


def _new(module: str, own: list[str], seen: set[int]) -> list[str]:
    """The names of objects that were not seen; they are seen now."""
    values = vars(importlib.import_module(module))
    fresh = [name for name in own if id(values[name]) not in seen]
    seen |= {id(values[name]) for name in fresh}
    return fresh
