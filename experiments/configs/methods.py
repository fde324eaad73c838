"""The `method` section of a config: which method and rule, and the options of all of them."""

from __future__ import annotations

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
    return {"name": name, "rule": rule, "loss": "cross_entropy"} | _merged(sections, changes)


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Config fields; one without a default is None and takes a value of its type."""
    fields = {}
    for name, value in options.items():
        if isinstance(value, dict):
            fields[name] = _fields(value)
        else:
            fields[name] = config_dict.placeholder(value) if isinstance(value, type) else value
    return fields


def _merged(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = section | changes
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(section.get(name), dict):
            merged[name] = _merged(section[name], value)
    return merged
