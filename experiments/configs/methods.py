"""The options of every method as config fields, read off the signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_type_hints

from ml_collections import config_dict

from saflex_jax.methods import implicit, l2rw, meta_weight_net, saflex

# The rules that have options, by the name of their method.
REFINERS = {
    "saflex": saflex.refiner,
    "implicit": implicit.refiner,
    "l2rw": l2rw.refiner,
    "meta_weight_net": meta_weight_net.refiner,
}
BY_DATA = {"num_samples", "num_classes", "prior"}  # set by the data set, not by a config


def options(refiner: Callable) -> dict:
    """Keyword -> default, for every keyword that a command line can express.

    Parameters are selected by path: "head", or "" for all of them. None stays None and takes a
    number when one is given.
    """
    hints = get_type_hints(refiner)
    found = {}
    for name, parameter in inspect.signature(refiner).parameters.items():
        default = parameter.default
        if name in BY_DATA:
            continue
        if name == "predicate":
            found[name] = "" if default is None else "head"
        elif default is None:
            (kind,) = set(hints[name].__args__) - {type(None)}
            found[name] = config_dict.placeholder(kind)
        elif isinstance(default, bool | int | float | str):
            found[name] = default
    return found


def all_methods(name: str, **changes: dict) -> dict:
    """The `method` section: the chosen name, and the options of every method with the changes."""
    section = {method: options(refiner) for method, refiner in REFINERS.items()}
    for method, values in changes.items():
        section[method] |= values
    return {"name": name, "loss": "cross_entropy", **section}
