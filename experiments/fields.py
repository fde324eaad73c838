"""Every field of a config with its default and its meaning, for `--help` and the documentation.

A meaning stands in one place: for rules, methods and networks in their docstrings ("Attributes:"),
for `config.data` in `configs.sources.FIELDS`, for the rest in MEANINGS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import estimators
from experiments.configs import digits, sources
from saflex_jax import configure, models, parallel
from saflex_jax.methods import METHODS
from saflex_jax.rules import RULES
from saflex_jax.types import RunInfo


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in names)


MEANINGS = {
    "seed": "of all draws: samples, wrong labels, first parameters, batches, augmentation",
    "runner": f"how a step meets the devices, {_one_of(parallel.RUNNERS)}: a mesh, or a copy each",
    "augment": 'the upstream pipeline as text, "flip | shift(4)"; "identity" = none',
    "arms": "what a comparison trains: arm -> the fields that it changes; a single run ignores it",
    "model.name": f'the network, {_one_of(configure.BACKBONES)}; "clip", for flyp; or, '
    f"for a table without steps, {_one_of(estimators.ESTIMATORS)}",
    "model.cosine": "whether the last layer's logits are cosines, scaled",
    "model.weights": "file of a ResNet's pretrained weights, with torchvision's names; of \"clip\" "
    'a folder; "" = none',
    "model.tune": f"what of a pretrained network trains, {_one_of(models.TUNED)}",
    "optimizer.learning_rate": "of AdamW at the first step; it falls to 0 by a cosine",
    "optimizer.weight_decay": "of AdamW",
    "optimizer.warmup": "steps in which the learning rate rises from 0; 0 = none",
    "method.name": f"how a step is made, {_one_of(METHODS)}",
    "method.rule": f"what a step trains on, {_one_of(RULES)}",
    "method.loss": f"of the candidates, {_one_of(configure.LOSSES)}",
    "train.steps": "of the run; the only field that a finished run may continue with, larger",
    "train.batch_size": "candidates of a step, over all devices",
    "train.val_batch_size": "validation samples of a step; 0 = all",
    "train.log_every": "steps between two records of the metrics",
    "train.checkpoint_every": "steps between two checkpoints",
    "train.keep_best": "test the record that was best on the validation split (early stopping)",
}
# Where a config says nothing.
DEFAULTS = {"model.cosine": False, "model.weights": "", "model.tune": "all", "optimizer.warmup": 0}
OF_CLIP = ("dtype", "remat")  # fields of its towers that a config may set; the folder has the rest
_ANY_RUN = RunInfo(num_samples=1, num_classes=2)


class Field(NamedTuple):
    """A field that a config may set.

    Attributes:
      path: from the config, as "train.steps".
      default: its value; None where the code chooses, which the meaning says.
      meaning: what it does.
    """

    path: str
    default: Any
    meaning: str


def of_config(config: ConfigDict) -> list[Field]:
    """The fields that a config has, with the values that it gives them, in the order of `tables`.

    >>> field = of_config(digits.get_config())[0]
    >>> field.path, field.default, field.meaning[:12]
    ('seed', 0, 'of all draws')

    Raises:
      ValueError: a field without a meaning.
    """
    network = f"model: {config.model.name}"
    known = {
        field.path: field.meaning
        for section, fields in tables().items()
        if not section.startswith("model: ") or section == network
        for field in fields
    }
    settings = dict(_leaves({k: v for k, v in config.to_dict().items() if k != "arms"}))
    for path in settings:
        _meaning(known, path)
    return [Field(path, settings[path], known[path]) for path in known if path in settings]


def tables() -> dict[str, list[Field]]:
    """Section -> its fields, for all that any config may have.

    Sections are "" (of the config itself), "data", "model", "model: NETWORK", "optimizer", "train",
    "method" and "method.NAME" of each method and rule with options. Defaults are the code's; where
    it has none, those of `configs.digits`.

    Raises:
      ValueError: a field without a meaning.
    """
    default = digits.get_config().to_dict()
    given = DEFAULTS | dict(_leaves(default))
    sections: dict[str, list[Field]] = {"": [], "data": _of_data()}
    for path, meaning in MEANINGS.items():
        section = path.rpartition(".")[0]
        sections.setdefault(section, []).append(Field(path, given.get(path), meaning))
    for name, network in {**configure.BACKBONES, **estimators.ESTIMATORS}.items():
        sections[f"model: {name}"] = _of_network(network)
    towers = _of_network(models.ImageTower)
    sections["model: clip"] = [f for f in towers if f.path.removeprefix("model.") in OF_CLIP]
    parts = {name: spec.options for name, spec in METHODS.items()}
    parts |= {name: spec.make(_ANY_RUN) for name, spec in RULES.items()}
    for name, part in parts.items():
        if fields := list(_of_part(f"method.{name}", part)):
            sections[f"method.{name}"] = fields
    return sections


def attributes(kind: type) -> dict[str, str]:
    """Field -> meaning, of the "Attributes:" of a class and of those that it inherits from.

    Where an entry says "see `NAME`" it is what the docstring of NAME says of the same argument.

    >>> attributes(Field)["path"]
    'from the config, as "train.steps"'
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _entries(base)
    return {name: followed(name, text, kind.__module__) for name, text in found.items()}


def followed(name: str, text: str, module: str) -> str:
    """An argument's meaning; of "see `NAME`" what NAME, looked up in the module, says of it.

    Raises:
      ValueError: nothing is called NAME, or it does not say what the argument means.
    """
    seen = re.fullmatch(r"see `([\w.]+)`", text)
    if not seen:
        return text
    other = named(seen[1], module)
    known = attributes(other) if inspect.isclass(other) else _entries(other)
    return followed(name, _meaning(known, name, other), other.__module__)


def named(name: str, module: str) -> Any:
    """What a dotted name means in a module, or else in the packages around it; None = nothing.

    >>> named("core.targets.solve_targets", "saflex_jax.rules.simplex").__name__
    'solve_targets'
    """
    parts = module.split(".")
    whole = name.split(".")[0] == parts[0]
    for length in range(0 if whole else len(parts), -1 if whole else 0, -1):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            return pkgutil.resolve_name(".".join([*parts[:length], name]))
    return None


def _entries(documented: Any) -> dict[str, str]:
    """The entries of "Args:" or "Attributes:" of something's own docstring."""
    docstring = inspect.cleandoc(documented.__doc__ or "")
    rest = re.split(r"^(?:Args|Attributes):\n", docstring, maxsplit=1, flags=re.MULTILINE)
    body = re.split(r"\n(?=\S)", rest[-1])[0] if len(rest) > 1 else ""
    entries = re.findall(r"^  (\w[\w, ]*): (.+(?:\n    .+|\n$)*)", body, flags=re.MULTILINE)
    return {
        name: " ".join(text.split()).removesuffix(".")
        for names, text in entries
        for name in names.split(", ")
    }


def _of_data() -> list[Field]:
    fields = sources.FIELDS.items()
    return [Field(f"data.{name}", default, meaning) for name, (default, meaning) in fields]


def _of_network(kind: type) -> list[Field]:
    known = attributes(kind)
    return [
        Field(f"model.{field.name}", field.default, _meaning(known, field.name, kind))
        for field in dataclasses.fields(kind)
        if field.name not in configure.BY_RUN
    ]


def _of_part(path: str, part: Any) -> Iterator[Field]:
    """The fields of a frozen dataclass and of those in it."""
    known = attributes(type(part))
    for name, value in configure.options(part).items():
        meaning = _meaning(known, name, type(part))
        if isinstance(value, dict):
            yield from _of_part(f"{path}.{name}", getattr(part, name))
        else:
            yield Field(f"{path}.{name}", None if isinstance(value, type) else value, meaning)


def _leaves(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _meaning(known: Mapping[str, str], name: str, kind: Any = None) -> str:
    if name not in known:
        where = "experiments.fields.MEANINGS" if kind is None else f"the docstring of {kind}"
        raise ValueError(f"{name} must have a meaning in {where}")
    return known[name]
