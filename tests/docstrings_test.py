"""Docstrings: their examples run, every public name has one, and no argument lacks a meaning.

Public are the names that `saflex_jax` and its rooms export, all of `core`, `types`, `audit` and
`configure`, and every method and rule with its options.
"""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re

import flax.linen as nn
import jax
import pytest

import saflex_jax
from saflex_jax.methods import METHODS
from saflex_jax.rules import RULES, ScoreRule
from saflex_jax.types import Rule

MODULES = [
    "saflex_jax",
    *(m.name for m in pkgutil.walk_packages(saflex_jax.__path__, "saflex_jax.")),
]
NEEDED = {"saflex_jax.models.clip_text": "tokenizers"}  # by the examples of a module
ROOMS = ("augment", "data", "methods", "models", "parallel", "rules", "train")
# Modules of which every name is public.
WHOLE = ("core.", "types", "audit", "configure", "rules.saflex", "methods.saflex")
WHOLE += ("methods.upstream",)
ENTRY = re.compile(r"  (\*{0,2}\w+(?:, \*{0,2}\w+)*): \S")
EXAMPLE = re.compile(r"example is at `(\w+)`")


def _defined_in(module):
    """The public functions and classes of a module."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield thing


def _exported(module):
    things = (getattr(module, name) for name in module.__all__)
    return [t for t in things if inspect.isfunction(t) or inspect.isclass(t)]


def _sections(options):
    """The dataclass of options, and those of its sections."""
    if options is not None:
        yield type(options)
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                yield from _sections(value)


def _public():
    modules = [importlib.import_module(name) for name in MODULES]
    things = [saflex_jax, *(importlib.import_module(f"saflex_jax.{room}") for room in ROOMS)]
    things = [thing for module in things for thing in _exported(module)]
    for module in modules:
        if module.__name__.removeprefix("saflex_jax.").startswith(WHOLE):
            things += _defined_in(module)
    things += [spec.make for spec in METHODS.values()]
    things += [section for spec in METHODS.values() for section in _sections(spec.options)]
    things += [section for spec in RULES.values() for section in _sections(spec.make(None))]
    return {f"{thing.__module__}.{thing.__qualname__}": thing for thing in things}


PUBLIC = _public()
OPTIONS = {section for spec in METHODS.values() for section in _sections(spec.options)}


def _meanings(thing):
    """The names that have an entry under "Args:" or "Attributes:"."""
    names, inside = set(), False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside and (entry := ENTRY.match(line)):
            names.update(name.strip("* ") for name in entry[1].split(","))
    return names


def _arguments(thing):
    if not inspect.isclass(thing):
        names = list(inspect.signature(thing).parameters)
    elif hasattr(thing, "_fields"):
        names = thing._fields
    elif dataclasses.is_dataclass(thing):
        flax = ("parent", "name") if issubclass(thing, nn.Module) else ()
        names = [field.name for field in dataclasses.fields(thing) if field.name not in flax]
    elif "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
        names = list(inspect.signature(thing.__init__).parameters)
    else:
        names = []
    return [name for name in names if name != "self" and not name.startswith("_")]


def _methods(thing):
    """Its public methods; `setup` is Flax's."""
    return [
        value
        for name, value in vars(thing).items()
        if not name.startswith("_") and name != "setup" and inspect.isfunction(value)
    ]


def _has_example(thing):
    doc = inspect.getdoc(thing) or ""
    if ">>> " in doc:
        return True
    elsewhere = EXAMPLE.search(doc)
    module = importlib.import_module(thing.__module__)
    return bool(elsewhere) and _has_example(getattr(module, elsewhere[1]))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    # As a user has it: nothing is promoted in silence here, but no error either.
    with jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_name_has_one_line_that_says_what_it_is(name):
    module = importlib.import_module(name)
    things = [module, *_defined_in(module)]
    things += [method for thing in things if inspect.isclass(thing) for method in _methods(thing)]
    for thing in things:
        lines = (thing.__doc__ or "").strip().splitlines()
        # A NamedTuple or a dataclass without a docstring gets its signature for one.
        assert lines and not lines[0].startswith(f"{thing.__name__}("), thing
        assert len(lines) == 1 or not lines[1].strip(), (thing, "summary of two lines")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_has_a_meaning(name):
    thing = PUBLIC[name]
    assert not set(_arguments(thing)) - _meanings(thing)
    for method in _methods(thing) if inspect.isclass(thing) else ():
        # What a rule's own methods are given, the protocol says.
        inherited = {
            argument
            for protocol in (Rule, ScoreRule)
            if hasattr(protocol, method.__name__)
            for argument in _meanings(getattr(protocol, method.__name__))
        }
        assert not set(_arguments(method)) - _meanings(method) - inherited, method


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    """Options have theirs at the method's `make`, an error at what raises it."""
    thing = PUBLIC[name]
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    assert is_error or thing in OPTIONS or _has_example(thing)
