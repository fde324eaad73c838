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

GROUPS = {"networks": "model: ", "methods": "method."}  # of sections, by how they begin
SHOWN = 400  # characters of a value
DATA = {  # what is neither a function nor a class, and has no docstring
    "saflex_jax.rules.RULES": "Name in a config -> :py:obj:`~saflex_jax.rules.RuleSpec`.",
    "saflex_jax.methods.METHODS": "Name in a config -> :py:obj:`~saflex_jax.methods.MethodSpec`.",
    "saflex_jax.augment.OPERATIONS": "Names of operations; a trace holds places in this list.",
    "saflex_jax.augment.Augment": "An augmentation, (key, Batch) -> Batch.",
    "saflex_jax.data.SOURCES": "Name -> function that makes a data set which needs no files.",
    "saflex_jax.models.CLIPS": "Name of a published CLIP -> its configuration.",
    "saflex_jax.models.TUNED": "What of a pretrained network may train, for `tuned`.",
    "saflex_jax.parallel.RUNNERS": "Name in a config -> the function that makes a runner.",
}


class PublicNames(SphinxDirective):
    """A table of a page's public names, and below it each of them in full."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """See Directive."""
        text = []
        sections = public_names.pages()[self.arguments[0]]
        for module, own in sections.items():
            if len(sections) > 1:
                text += [f"## {module.removeprefix('saflex_jax.')}", ""]
            lines = [*_doc(module), "", *_summary(module, own)]
            for name in own:
                lines += _entry(module, name)
            text += ["```{eval-rst}", *lines, "```", ""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


class ConfigFields(SphinxDirective):
    """A table of the fields of a config's section, or a table each of a group of sections."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """See Directive."""
        [section] = self.arguments or [""]
        tables = fields.tables()
        if section in GROUPS:
            prefix = GROUPS[section]
            own = [name for name in tables if name.startswith(prefix)]
            parts = [[f"### `{n.removeprefix(prefix)}`", "", *_table(n, tables[n])] for n in own]
        else:
            parts = [_table(section, tables[section])]
        text = "\n".join(line for part in parts for line in part)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _table(section: str, own: list[fields.Field]) -> list[str]:
    """A table of fields as MyST."""
    prefix = section.partition(":")[0] + "."
    text = [":::{list-table}", ":header-rows: 1", ":class: fields", ":widths: 22 18 60", ""]
    rows = [
        (f"`{field.path.removeprefix(prefix)}`", _value(field.default), field.meaning)
        for field in own
    ]
    for name, default, meaning in (("field", "default", "meaning"), *rows):
        text += [f"* - {name}", f"  - {default}", f"  - {_plain(meaning)}"]
    return [*text, ":::", ""]


def _plain(meaning: str) -> str:
    """Text that begins with a mark of MyST's, such as "> 0: ...", as text."""
    return re.sub(r"^[>#*+-]", r"\\\g<0>", meaning)


def _value(default: Any) -> str:
    return "" if default is None else f"`{default!r}`"


def _summary(module: str, own: list[str]) -> list[str]:
    names = [f"   ~{module}.{name}" for name in own if f"{module}.{name}" not in DATA]
    return [".. autosummary::", "   :nosignatures:", "", *names, ""]


def _doc(module: str) -> list[str]:
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return as_rest(text.split("\n"), module)


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
        return [f".. autoclass:: {path}", *options, ""]
    if public_names.is_function(value):
        return [f".. autofunction:: {path}", ""]
    shown = ", ".join(map(str, value)) if isinstance(value, dict | tuple | list) else f"{value}"
    [meaning] = as_rest([DATA[path]], module) if ":py:" not in DATA[path] else [DATA[path]]
    value = textwrap.shorten(shown, SHOWN)
    return [f".. py:data:: {path}", "", f"   {meaning} ``{value}``", ""]


def _docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list) -> None:
    module = getattr(value, "__module__", None) or name.rpartition(".")[0]
    lines[:] = as_rest(lines, module)


def _signature(app, what, name, value, options, signature, returns):
    """Without what Flax adds to every module's fields."""
    if signature:
        signature = re.sub(r",? parent: .*(?=\))|,? parent=<.*(?=\))", "", signature)
    return signature, returns


def _links(app: Sphinx, page: str, source: list[str]) -> None:
    """Pages link to notebooks where these lie in the repository; here they are pages beside."""
    source[0] = source[0].replace("](../colabs/", "](colabs/")


def setup(app: Sphinx) -> dict[str, Any]:
    """See Sphinx."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("config-fields", ConfigFields)
    app.connect("source-read", _links)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
