"""The options of every method as config fields, read off the signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from ml_collections import config_dict

from saflex_jax.methods import METHODS, NETWORKS, REFINERS

# What takes the options of a method.
TAKERS = {
    name: [found for found in (REFINERS.get(name, make), NETWORKS.get(name)) if found is not None]
    for name, make in METHODS.items()
}
# Given by the run, not by a config.
BY_RUN = {
    *("model", "tx", "backbone", "refiner", "loss", "parent", "name", "axis_name"),
    *("num_samples", "num_classes", "num_trusted", "num_val", "prior", "counts", "weak"),
    *("num_steps", "steps_per_epoch"),
}


def parameters(taker: Callable) -> dict[str, inspect.Parameter]:
    """Keyword -> parameter."""
    return dict(inspect.signature(taker).parameters)


def option_names(name: str) -> set[str]:
    """The options that a config may give a method."""
    return {option for taker in TAKERS[name] for option in parameters(taker)} - BY_RUN


def taken(taker: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this function takes."""
    return {k: v for k, v in options.items() if k in parameters(taker)}


def options(takers: Iterable[Callable]) -> dict:
    """Keyword -> default, for every keyword that a command line can express.

    Parameters are selected by path: "head", or "" for all of them. None stays None and takes a
    number when one is given.
    """
    found = {}
    for taker in takers:
        hints = get_type_hints(taker)
        for name, parameter in parameters(taker).items():
            default = parameter.default
            if name in BY_RUN:
                continue
            if name == "predicate":
                found[name] = "" if default is None else "head"
            elif default is None:
                (kind,) = set(hints[name].__args__) - {type(None)}
                found[name] = config_dict.placeholder(kind)
            elif isinstance(default, bool | int | float | str):
                found[name] = default
    return found


def all_methods(name: str, refiner: str = "", **changes: dict) -> dict:
    """The `method` section: the chosen name, and the options of every method with the changes.

    Args:
      name: of METHODS.
      refiner: of REFINERS, for a method that takes one; "" = none.
      changes: method -> options.
    """
    section = {method: options(takers) for method, takers in TAKERS.items()}
    for method, values in changes.items():
        section[method] |= values
    return {"name": name, "refiner": refiner, "loss": "cross_entropy", **section}
