"""The site has every page and every public name; the build itself is .ci/run's."""

import importlib.util
import inspect
import pathlib
import re
import sys

import pytest

import saflex_jax
from experiments import fields
from tests.docstrings_test import PUBLIC

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def loaded(name: str):
    """A module of the site's extension."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


public_names = loaded("public_names")
docstrings = loaded("docstrings")


def test_every_public_name_is_on_one_page():
    names = public_names.names()
    for package in ("", *(f".{name}" for name in public_names.PACKAGES)):
        module = importlib.import_module(f"saflex_jax{package}")
        for name in module.__all__:
            value = getattr(module, name)
            found = [path for path, known in names.items() if known is value]
            assert inspect.ismodule(value) or len(found) == 1, (name, found)
    assert {"saflex_jax.score", "saflex_jax.core.memory.recall", "saflex_jax.audit.audit",
            "saflex_jax.methods.sla.Options", "saflex_jax.rules.drw.DeferredReweighting",
            "saflex_jax.methods.upstream.upstream"} <= names.keys()  # fmt: skip
    assert "saflex_jax.core.scores.score" not in names  # stands where it is exported


def test_pages_and_the_law_of_docstrings_know_the_same_names():
    """So what has a page has an example and meanings, and what has these has a page."""
    shown = {
        path: thing
        for path, thing in public_names.names().items()
        if inspect.isfunction(thing) or inspect.isclass(thing)
    }
    lawful = {id(thing) for thing in PUBLIC.values()}
    assert [path for path, thing in shown.items() if id(thing) not in lawful] == []
    paged = {id(thing) for thing in shown.values()}
    assert [path for path, thing in PUBLIC.items() if id(thing) not in paged] == []


def test_every_page_of_names_is_a_page_of_the_site():
    written = {}
    for file in (DOCS / "api").glob("*.md"):
        for page in re.findall(r"^```\{public-names\} (\w+)$", file.read_text(), flags=re.M):
            written[page] = file.stem
    assert written == {page: page for page in public_names.pages()}
    listed = (DOCS / "api" / "index.md").read_text().partition("{toctree}")[2]
    assert set(re.findall(r"^\w+$", listed, flags=re.M)) == set(written.values())


def test_every_section_of_fields_is_on_the_page():
    shown = re.findall(r"^```\{config-fields\} ?(.*)$", (DOCS / "fields.md").read_text(), re.M)
    groups = {"networks": "model: ", "methods": "method."}
    prefixes = tuple(groups[name] for name in shown if name in groups)
    missing = [s for s in fields.tables() if s not in shown and not s.startswith(prefixes)]
    assert not missing


def test_every_page_is_in_the_contents():
    """A page in no toctree is an error of the build, too."""
    index = (DOCS / "index.md").read_text()
    listed = set(re.findall(r"^(?:[\w ]+ <)?([\w/]+)>?$", index, flags=re.M))
    assert {file.stem for file in DOCS.glob("*.md")} - {"index"} == {
        name for name in listed if "/" not in name
    }


def test_data_has_a_meaning():
    """What has no docstring has its meaning in the extension."""
    data = re.findall(
        r'^    "(saflex_jax[\w.]+)": "', (DOCS / "_ext/saflex_pages.py").read_text(), re.M
    )
    values = public_names.names()
    assert set(data) == {
        name
        for name, v in values.items()
        if not (public_names.is_function(v) or inspect.isclass(v))
    }


SHOWN = """One line with *stars*, a trailing under_ and `score`.

    y_i = a_i * b_i   an equation

>>> f(*args)
1

Args:
  a, b: of both,
    on two lines.
  k: K.
"""


@pytest.mark.parametrize(
    "expected",
    [
        r"with \*stars\*, a trailing under\_ and :py:obj:`score <saflex_jax.score>`.",
        "::\n\n    y_i = a_i * b_i   an equation",
        ">>> f(*args)\n1",
        "  a: of both,\n    on two lines.\n  b: of both,\n    on two lines.\n",
        r"  k: K\.",
    ],
)
def test_docstrings_become_what_autodoc_reads(expected):
    lines = docstrings.as_rest(SHOWN.split("\n"), saflex_jax.__name__)
    assert expected in "\n".join(lines)
