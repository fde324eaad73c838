"""From configs to rules and methods: nested dicts of options, as each file's records define them.

A method's `Options` and a rule are frozen dataclasses. A config may set their fields; a field that
is a dataclass is a section. Nothing here knows a rule or a method by name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import optax

from saflex_jax import checks, models
from saflex_jax.core import losses
from saflex_jax.core.losses import CandidateLoss
from saflex_jax.methods import METHODS, Episode
from saflex_jax.rules import RULES
from saflex_jax.types import Method, Model, Rule, RunInfo

SCALARS = (bool, int, float, str)
KEYS = ("name", "rule", "loss")  # of a method's section, beside the sections of METHODS and RULES


class LossSpec(NamedTuple):
    """A candidates' loss for configs.

    >>> LOSSES["ldam"].of_labels
    True

    Attributes:
      make: run -> loss.
      of_labels: whether the loss holds the run's labels, see `rules.RuleSpec`.
    """

    make: Callable[[RunInfo], CandidateLoss]
    of_labels: bool = False


LOSSES = {
    "cross_entropy": LossSpec(lambda run: losses.weighted_soft_cross_entropy),
    "augmix": LossSpec(lambda run: losses.augmix_loss()),
    "decoupled_mixup": LossSpec(lambda run: losses.decoupled_mixup_loss()),
    "ldam": LossSpec(lambda run: losses.ldam_loss(checks.given(counts=run.counts)), of_labels=True),
}
BACKBONES = {
    "mlp": models.MLP,
    "ft_transformer": models.FTTransformer,
    "small_cnn": models.SmallCNN,
    "resnet18": models.ResNet18,
    "resnet50": models.ResNet50,
    "vit": models.ViT,
    "clip_image": models.ImageTower,
}
# To check options, of which some need a run and trusted samples.
_ANY_RUN = RunInfo(num_samples=1, num_classes=2, num_val=1)
OF_IMAGES = ("small_cnn", "resnet18", "resnet50", "vit")  # backbones that take nothing else
BY_RUN = {"parent", "name", "axis_name", "categories"}  # of a backbone, and never in a config
BESIDE = ("name", "cosine", "weights", "tune")  # of a model's section, and no fields of a backbone
CLIP = "clip"  # no backbone, but both towers of a folder; of the method FLYP
OF_CLIP = ("name", "weights", "dtype", "remat")
PRETRAINED = {"stem": "imagenet", "norm": "frozen"}  # of a backbone with weights


# --- options


def options(part: Any) -> dict[str, Any]:
    """Field -> default of a frozen dataclass, for every field that a config can set.

    >>> from saflex_jax.rules import Schedule
    >>> options(Schedule())
    {'start': 0, 'every': 1}

    Args:
      part: a dataclass; None has no options.

    Returns:
      Scalars and nested dicts; for a field that is None by default, the type that it takes.
    """
    if part is None:
        return {}
    hints = typing.get_type_hints(type(part))
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            fields[field.name] = options(value)
        elif isinstance(value, SCALARS):
            fields[field.name] = value
        elif value is None and (kind := _scalar(hints[field.name])):
            fields[field.name] = kind
    return fields


def _scalar(hint: Any) -> type | None:
    """The scalar type of "kind | None"; None where there is none."""
    union = isinstance(hint, types.UnionType)
    kinds = [kind for kind in typing.get_args(hint) if kind in SCALARS] if union else []
    return kinds[0] if kinds else None


def changed(part: Any, section: Mapping[str, Any], name: str = "options") -> Any:
    """The dataclass with the fields that a config's section sets.

    >>> from saflex_jax.rules import Schedule
    >>> changed(Schedule(), {"every": 5})
    Schedule(start=0, every=5)

    Args:
      part: a frozen dataclass, or None.
      section: field -> value or section.
      name: of the section, for errors.

    Raises:
      ValueError: an unknown field (suggests the nearest), or a value that the dataclass refuses.
    """
    accepted = options(part)
    checks.known(name, section, accepted)
    changes = {}
    for field, value in section.items():
        if isinstance(accepted[field], dict):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{name}.{field} must be a section with fields of {sorted(accepted[field])}; "
                    f"given {value!r}"
                )
            value = changed(getattr(part, field), value, f"{name}.{field}")
        changes[field] = value
    try:
        return dataclasses.replace(part, **changes) if changes else part
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def all_options() -> dict[str, dict[str, Any]]:
    """Method or rule -> its `options`, for all that have some.

    >>> all_options()["label_smoothing"]
    {'epsilon': 0.1}
    """
    sections = {name: options(spec.options) for name, spec in METHODS.items()}
    sections |= {name: options(spec.make(None)) for name, spec in RULES.items()}
    return {name: section for name, section in sections.items() if section}


# --- networks


def model_fields(name: str) -> set[str]:
    """Fields that the section of a backbone may have.

    >>> "depth" in model_fields("vit"), "widths" in model_fields("vit")
    (True, False)

    Args:
      name: a key of BACKBONES.
    """
    return {field.name for field in dataclasses.fields(BACKBONES[name])} - BY_RUN | {*BESIDE}


def check_model(section: Mapping[str, Any], name: str = "config.model") -> None:
    """Raises ValueError unless a model's section can be built.

    >>> check_model({"name": "mlp", "widths": (64, 64)})

    Args:
      section: "name", a key of BACKBONES, and fields of that backbone; "cosine": logits of every
        head are cosines (`models.Classifier`); "weights": a file of a pretrained ResNet
        (`models.read_weights`); "tune": the parameters of that network that train
        (`models.tuned`). Or the name "clip", with "dtype" and "remat": both towers of the folder
        "weights" (`models.pretrained_towers`).
      name: of the section, for errors.
    """
    checks.choice({*BACKBONES, CLIP}, **{f"{name}.name": section["name"]})
    if section["name"] == CLIP:
        _check_clip(section, name)
        return
    backbone = BACKBONES[section["name"]]
    checks.known(name, section, model_fields(section["name"]))
    for field, value in section.items():
        if isinstance(value, tuple | list):
            for number in value:
                checks.whole(1, **{f"{name}.{field}": number})
        elif isinstance(value, int):
            checks.whole(**{f"{name}.{field}": value})
    if not section.get("weights"):
        checks.choice(("all",), **{f"{name}.tune without weights": section.get("tune", "all")})
        return
    if not issubclass(backbone, models.ResNet):
        raise ValueError(f"{name}.weights must be '' for {section['name']}, which is no ResNet")
    checks.choice(models.TUNED, **{f"{name}.tune": section.get("tune", "all")})
    for field, only in PRETRAINED.items():
        checks.choice((only,), **{f"{name}.{field} with weights": section.get(field, only)})


def _check_clip(section: Mapping[str, Any], name: str) -> None:
    """Refuses fields that the folder decides, and no folder."""
    checks.known(name, section, OF_CLIP)
    checks.choice(("float32", "bfloat16"), **{f"{name}.dtype": section.get("dtype", "float32")})
    if not section.get("weights"):
        raise ValueError(f"{name}.weights must be a folder as models.load_clip reads it; given ''")


def make_clip(section: Mapping[str, Any]) -> Model:
    """The two towers of a section "clip", with the weights of its folder.

    >>> section = {"name": "clip", "weights": "data/weights/clip-vit-base-patch32"}
    >>> model = make_clip(section)  # doctest: +SKIP

    Args:
      section: see `check_model`.

    Raises:
      ValueError: as `check_model` and `models.load_clip`.
    """
    check_model(section)
    options = {"dtype": section.get("dtype"), "remat": section.get("remat", False)}
    return models.pretrained_towers(section["weights"], **options)


def make_backbone(
    section: Mapping[str, Any],
    *,
    axis_name: str | None = None,
    categories: tuple[int, ...] | None = None,
) -> nn.Module:
    """The backbone of a model's section.

    >>> make_backbone({"name": "small_cnn"}).widths
    (16, 32)

    Args:
      section: see `check_model`.
      axis_name: mapped axis, for batch statistics under pmap.
      categories: number of values of each categorical column of a table; None = no such columns.
    """
    check_model(section)
    backbone = BACKBONES[section["name"]]
    fields = {k: v for k, v in section.items() if k not in BESIDE}
    if section.get("weights"):
        fields |= PRETRAINED
    if categories is not None:
        fields["categories"] = categories
    if axis_name is not None and "axis_name" in {f.name for f in dataclasses.fields(backbone)}:
        fields["axis_name"] = axis_name
    return backbone(**fields)


# --- methods


def check(section: Mapping[str, Any], name: str = "config.method") -> None:
    """Raises ValueError unless a method's section can be built, for any run.

    >>> section = {"name": "supervised", "rule": "saflex", "loss": "cross_entropy"}
    >>> check(section)

    Args:
      section: "name", a key of METHODS; "rule", of RULES; "loss", of LOSSES; and, for methods and
        rules, a section with their options.
      name: of the section, for errors.
    """
    for key, accepted in (("name", METHODS), ("rule", RULES), ("loss", LOSSES)):
        checks.choice(accepted, **{f"{name}.{key}": section[key]})
    checks.known(name, section, (*KEYS, *METHODS, *RULES))
    spec = METHODS[section["name"]]
    for key, only in (("rule", "as_given"), ("loss", "cross_entropy")):
        if section[key] != only and key not in spec.takes:
            raise ValueError(
                f"{name}.{key} must be {only!r} with {section['name']}; given {section[key]!r}"
            )
    for method, spec in METHODS.items():
        changed(spec.options, section.get(method, {}), f"{name}.{method}")
    for rule, rule_spec in RULES.items():
        changed(rule_spec.make(_ANY_RUN), section.get(rule, {}), f"{name}.{rule}")


def of_labels(section: Mapping[str, Any]) -> bool:
    """Whether the method holds the run's labels, so that its compiled step serves one seed only.

    >>> of_labels({"name": "supervised", "rule": "saflex", "loss": "cross_entropy"})
    False

    Args:
      section: see `check`.
    """
    return RULES[section["rule"]].of_labels or LOSSES[section["loss"]].of_labels


def learns_posterior(section: Mapping[str, Any]) -> bool:
    """Whether the utility of the method's targets is 2 P(the given label is right) - 1.

    >>> learns_posterior({"name": "elr", "rule": "saflex"})
    True

    Args:
      section: see `check`.
    """
    return METHODS[section["name"]].posterior or RULES[section["rule"]].posterior


def method_options(section: Mapping[str, Any]) -> Any:
    """The `Options` of the section's method; None if it has none.

    >>> method_options({"name": "sla", "sla": {"mode": "da"}}).mode
    'da'

    Args:
      section: see `check`.
    """
    name = section["name"]
    return changed(METHODS[name].options, section.get(name, {}), f"method.{name}")


def episode(section: Mapping[str, Any]) -> Episode | None:
    """The make-up of an episode, if the method's batches are whole episodes; else None.

    >>> episode({"name": "supervised"}) is None
    True

    Args:
      section: see `check`.
    """
    spec = METHODS[section["name"]]
    return None if spec.episode is None else spec.episode(method_options(section))


def make_network(section: Mapping[str, Any], backbone: nn.Module, num_classes: int) -> nn.Module:
    """The module that the section's method trains.

    >>> network = make_network({"name": "supervised"}, models.MLP(), num_classes=10)
    >>> network.num_classes
    10

    Args:
      section: see `check`.
      backbone: from `make_backbone`.
      num_classes: K.
    """
    spec = METHODS[section["name"]]
    return spec.network(backbone, num_classes, method_options(section))


def make_rule(section: Mapping[str, Any], run: RunInfo) -> Rule:
    """The section's rule.

    >>> make_rule({"name": "supervised", "rule": "label_smoothing"}, _ANY_RUN)
    LabelSmoothing(epsilon=0.1)

    Args:
      section: see `check`.
      run: as the method shows it to its rule (`MethodSpec.seen`).
    """
    name = section["rule"]
    return changed(RULES[name].make(run), section.get(name, {}), f"method.{name}")


def make_method(
    section: Mapping[str, Any], model: Model, tx: optax.GradientTransformation, run: RunInfo
) -> Method:
    """The method of a config's section.

    >>> section = {"name": "supervised", "rule": "saflex", "loss": "cross_entropy"}
    >>> network = make_network(section, models.MLP(), num_classes=2)
    >>> method = make_method(section, models.from_linen(network), optax.sgd(0.1), _ANY_RUN)

    Args:
      section: see `check`.
      model: of `make_network`.
      tx: optax transformation.
      run: what is known about the run's samples.

    Raises:
      ValueError: see `check`.
    """
    check(section, "method")
    spec, chosen = METHODS[section["name"]], method_options(section)
    seen = spec.seen(run, chosen)
    makers = {
        "options": lambda: chosen,
        "rule": lambda: make_rule(section, seen),
        "loss": lambda: LOSSES[section["loss"]].make(seen),
        "run": lambda: run,
    }
    return spec.make(model, tx, **{keyword: makers[keyword]() for keyword in spec.takes})
