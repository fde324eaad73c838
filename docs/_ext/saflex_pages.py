"""Sphinx extension: the reference's pages and the table of fields, made from the code.

```{public-names} augment         the public names of that page (`public_names.pages`)
```{config-fields} data           the fields of that section (`experiments.fields.tables`)
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

import public_names
from docstrings import as_rest
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from experiments import fields

SUMMARY = 60  # characters of a value that is shown


class PublicNames(SphinxDirective):
    """A table of a page's public names, and below it each of them in full."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """See Directive."""
        sections = public_names.pages()[self.arguments[0]]
        paths = [f"{module}.{name}" for module, own in sections.items() for name in own]
        text = ["```{eval-rst}", *_summary(paths), "```", ""]
        for module, own in sections.items():
            if len(sections) > 1:
                text += [f"## {module.removeprefix('saflex_jax.')}", "", *_doc(module), ""]
            for name in own:
                text += ["```{eval-rst}", *_entry(module, name), "```", ""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


class ConfigFields(SphinxDirective):
    """A table of the fields of a config's section: name, default, meaning."""

    optional_arguments = 2
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """See Directive."""
        section = " ".join(self.arguments)
        prefix = section.partition(":")[0]
        rows = [
            (f"`{field.path.removeprefix(f'{prefix}.')}`", _value(field.default), field.meaning)
            for field in fields.tables()[section]
        ]
        text = [":::{list-table}", ":header-rows: 1", ":class: fields", ":widths: 22 18 60", ""]
        for row in (("field", "default", "meaning"), *rows):
            text += [f"{'*' if first else ' '} - {cell}" for first, cell in _cells(row)]
        return self.parse_text_to_nodes("\n".join([*text, ":::"]))


def _cells(row: tuple[str, ...]) -> list[tuple[bool, str]]:
    return [(place == 0, cell) for place, cell in enumerate(row)]


def _value(default: Any) -> str:
    return "" if default is None else f"`{default!r}`"


def _summary(paths: list[str]) -> list[str]:
    return [".. autosummary::", "   :nosignatures:", "", *(f"   {path}" for path in paths), ""]


def _doc(module: str) -> list[str]:
    """A module's docstring, up to what is for its readers alone."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return ["```{eval-rst}", *as_rest(text.split("\n"), module), "```"]


def _entry(module: str, name: str) -> list[str]:
    """The autodoc directive of a public name."""
    value = getattr(importlib.import_module(module), name)
    path = f"{module}.{name}"
    if inspect.isclass(value):
        members = [
            member
            for member, own in vars(value).items()
            if not member.startswith("_")
            and isinstance(own, property | classmethod | staticmethod | type(_entry))
            and getattr(own, "__doc__", None)
            and not own.__doc__.startswith("See ")
        ]
        options = [f"   :members: {', '.join(members)}"] if members else []
        return [f".. autoclass:: {path}", *options]
    if inspect.isfunction(value):
        return [f".. autofunction:: {path}"]
    shown = ", ".join(map(str, value)) if isinstance(value, dict | tuple) else f"{value}"
    return [f".. py:data:: {path}", "", f"   {textwrap.shorten(shown, 400)}"]


def _docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list) -> None:
    module = getattr(value, "__module__", None) or name.rpartition(".")[0]
    lines[:] = as_rest(lines, module)


def _signature(app, what, name, value, options, signature, returns):
    """Without what Flax adds to every module's fields."""
    if signature:
        signature = re.sub(r",? parent: .*(?=\))|,? parent=<.*(?=\))", "", signature)
    return signature, returns


def setup(app: Sphinx) -> dict[str, Any]:
    """See Sphinx."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("config-fields", ConfigFields)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
