"""The `method` section of a config: which method and rule, and the options of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from saflex_jax import configure


def all_methods(name: str = "supervised", rule: str = "as_given", **changes: dict) -> dict:
    """The chosen method and rule, and the options of every method and rule with the changes.

    Args:
      name: of `saflex_jax.methods.METHODS`.
      rule: of `saflex_jax.rules.RULES`, for a method that takes one.
      changes: method or rule -> options, nested as they are.
    """
    sections = _fields(configure.all_options())
    return {"name": name, "rule": rule, "loss": "cross_entropy"} | merged(sections, changes)


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Config fields; one without a default is None and takes a value of its type."""
    fields = {}
    for name, value in options.items():
        if isinstance(value, dict):
            fields[name] = _fields(value)
        else:
            fields[name] = config_dict.placeholder(value) if isinstance(value, type) else value
    return fields


def merged(changes: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested changes of a config, and more of them, which win.

    >>> merged({"data": {"val": 5}}, {"data": {"noise": 0.4}, "augment": "flip"})
    {'data': {'val': 5, 'noise': 0.4}, 'augment': 'flip'}
    """
    whole = dict(changes)
    for name, value in more.items():
        nested = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
        whole[name] = merged(whole[name], value) if nested else value
    return whole
