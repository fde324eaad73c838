"""Configs become rules and methods by their records alone, also by those of another package."""

import dataclasses
import re

import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from experiments import arms, build, task
from experiments.configs import methods, wdbc
from saflex_jax import configure, parallel
from saflex_jax.methods import METHODS
from saflex_jax.models import MLP, from_linen
from saflex_jax.rules import RULES
from saflex_jax.types import RunInfo
from tests import design_test

LABELS = np.eye(3, dtype=np.float32)[np.arange(12) % 3]
RUN = RunInfo(
    12, 3, 4, 5, 60, 3.0, counts=LABELS.sum(0), labels=lambda: LABELS, captions=np.ones((3, 1, 2))
)
PARTS = {name: spec.options for name, spec in METHODS.items()}
PARTS |= {name: spec.make(RUN) for name, spec in RULES.items()}
PARTS = {name: part for name, part in PARTS.items() if configure.options(part)}
# Options that are free text; others take one of some words.
TEXTS = {"predicate": "body", "direction": "neumann(3, scale=0.2)", "mask_loss": "none",
         "weak": "flip", "strong": "flip", "augment": "shift(1)"}  # fmt: skip
NEEDS = {  # what an option needs beside it
    ("block", "lam_mul_k"): {"lam_mul": 1.0},
    ("memory", "dtype"): {"decay": 0.5},
    ("memory", "top"): {"decay": 0.5},
}


def flat(options, path=()):
    """((field, ...), value) of every option of nested sections."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, name))
        else:
            yield (*path, name), value


def nested(path, value):
    """The section that sets one option, and what this needs."""
    *sections, field = path
    section = {field: value} | NEEDS.get(path[-2:], {})
    for name in reversed(sections):
        section = {name: section}
    return section


OPTIONS = [
    pytest.param(name, path, value, id=".".join((name, *path)))
    for name, part in PARTS.items()
    for path, value in flat(configure.options(part))
]


def another(part, path, default):
    """A value of the option's type that is not its default."""
    if isinstance(default, type):
        default = default(0.5) if default is not str else "bfloat16"
        return default or 4
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2 or 0.5
    if path[-1] in TEXTS:
        return TEXTS[path[-1]]
    with pytest.raises(ValueError, match=r"must be one of .*given 'nonsense'") as error:
        configure.changed(part, nested(path, "nonsense"))
    accepted = re.search(r"must be one of \[(.*?)\]", str(error.value))[1].replace("'", "")
    return next(word for word in accepted.split(", ") if word != default)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, path, default", OPTIONS)
def test_a_config_sets_any_option_and_no_other(name, path, default):
    part = PARTS[name]
    value = another(part, path, default)
    section = nested(path, value)
    changed = configure.changed(part, section)
    before, after = (dict(flat(configure.options(x))) for x in (part, changed))
    assert after == before | dict(flat(section)) and after[path] == value != before[path]
    assert type(changed) is type(part)


@pytest.mark.parametrize("name", PARTS)
def test_the_defaults_of_a_config_are_those_of_the_package(name):
    section = ConfigDict(methods.all_methods())[name].to_dict()
    part = PARTS[name]
    again = configure.changed(part, section)
    assert configure.options(again) == configure.options(part)
    assert configure.changed(part, {}) is part


def test_of_an_option_without_a_default_the_type_is_known():
    @dataclasses.dataclass(frozen=True)
    class Part:
        share: float | None = None
        name: str | None = None
        function: object = len  # no config can express it
        inputs: tuple | None = None

    assert configure.options(Part()) == {"share": float, "name": str}
    assert configure.options(None) == {}
    config = ConfigDict(methods.all_methods(rule="saflex"))
    assert config.saflex.rule.noise_rate is None
    config.saflex.rule.noise_rate = 0.25
    assert configure.make_rule(config.to_dict(), RUN).rule.noise_rate == 0.25
    with pytest.raises(TypeError):
        config.saflex.rule.noise_rate = "a quarter"


SECTIONS = [
    pytest.param(name, path, id=".".join((name, *path)))
    for name, part in PARTS.items()
    for path in dict.fromkeys(path[:-1] for path, _ in flat(configure.options(part)))
]


@pytest.mark.parametrize("name, path", SECTIONS)
def test_an_unknown_option_is_refused_at_any_depth(name, path):
    config = methods.all_methods()
    section = config[name]
    for field in path:
        section = section[field]
    known = next(field for field, value in section.items() if not isinstance(value, dict))
    section[f"{known}x"] = 1
    where = re.escape(".".join(("config.method", name, *path)))
    message = rf"^{where} has no field '{known}x'; did you mean '{known}'\?; known fields: "
    with pytest.raises(ValueError, match=message):
        configure.check(ConfigDict(config).to_dict())
    if path:  # a value in the place of the section
        with pytest.raises(ValueError, match=rf"\.{path[-1]} must be a section .*; given 3"):
            configure.changed(PARTS[name], nested(path, 3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"saflex": {"rule": {"lookahead": -1}}}, "x.saflex.rule: lookahead must be >= 0"),
        ({"sla": {"beta": "much"}}, "x.sla: beta must be >= 0; given 'much'"),
        ({"saflx": {}}, r"x has no field 'saflx'; did you mean 'saflex'\?"),
        ({"name": "slaa"}, r"x.name must be one of .*did you mean 'sla'\?"),
        ({"rule": "safle"}, r"x.rule must be one of .*did you mean 'saflex'\?"),
        ({"loss": "augmi"}, r"x.loss must be one of .*did you mean 'augmix'\?"),
    ],
)
def test_a_bad_value_or_name_is_refused_with_its_section(changes, message):
    config = ConfigDict(methods.all_methods()).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        configure.check(config, "x")


# --- methods and rules ---------------------------------------------------------------------------


def built(**section):
    section = {"name": "supervised", "rule": "as_given", "loss": "cross_entropy"} | section
    model = from_linen(configure.make_network(section, MLP((4,)), 3))
    return configure.make_method(section, model, optax.sgd(0.1), RUN)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_every_rule_and_loss_or_none(name):
    for key, others in (("rule", RULES), ("loss", configure.LOSSES)):
        only = {"rule": "as_given", "loss": "cross_entropy"}[key]
        assert built(name=name, **{key: only}).step
        for other in others.keys() - {only}:
            if key in METHODS[name].takes:
                assert built(name=name, **{key: other}).step
            else:
                with pytest.raises(ValueError, match=f"{key} must be {only!r} with {name}; given"):
                    built(name=name, **{key: other})


@pytest.mark.parametrize("name", METHODS)
def test_what_a_methods_rule_sees_of_the_run_is_of_one_kind(name):
    spec = METHODS[name]
    seen = spec.seen(RUN, spec.options)
    labels = seen.labels()
    assert labels.shape == (seen.num_samples, seen.num_classes)
    np.testing.assert_array_equal(seen.counts, labels.sum(0))
    # The trusted ones are still the last.
    assert seen.num_trusted * RUN.num_samples == RUN.num_trusted * seen.num_samples


def test_only_what_holds_the_runs_labels_says_so():
    names = {rule for rule in RULES if configure.of_labels({"rule": rule, "loss": "cross_entropy"})}
    assert names == {"implicit", "drw"}
    losses = {n for n in configure.LOSSES if configure.of_labels({"rule": "as_given", "loss": n})}
    assert losses == {"ldam"}


# --- from another package ------------------------------------------------------------------------


def test_a_rule_and_a_method_of_another_package_train_by_a_config(monkeypatch):
    """Those of docs/design.md, through all that `experiments` does with a config."""
    monkeypatch.setitem(RULES, "soft", design_test.module("Add a rule").SPEC)
    monkeypatch.setitem(METHODS, "sam", design_test.module("Add a method").SPEC)
    config = wdbc.get_config()
    config.method = methods.all_methods("sam", "soft", soft={"rule": {"tau": 0.5}})
    config.method.sam.rho = 0.1
    config.augment = "feature_noise(0.1)"
    config.model.widths = (4,)
    config.train.update({"steps": 2, "log_every": 1, "batch_size": 16, "val_batch_size": 8})
    config.arms = {"plain": {"method": {"rule": "as_given"}}, "soft": {}}
    config = arms.configs(config)["soft"]
    data = task.make_data(config)
    method = build.make_method(config, data.pools)
    step = build.with_upstream(config, method).step
    result = build.fit(config, data, method, parallel.jit_runner(step), progress=False)
    assert int(result.state.step) == 2
    assert all(0 < record["val_loss"] < 2 for record in result.history)
    scores = task.test_scores(method, result.state, data)
    assert 0 < scores["accuracy"] <= 1
