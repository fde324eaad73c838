"""Every field of every config has a meaning, which stands where the field is defined."""

import dataclasses
import importlib
import pkgutil

import pytest

from experiments import build, configs, fields
from experiments.configs import sources
from saflex_jax import configure
from saflex_jax.rules import Simplex

CONFIGS = [
    name
    for _, name, _ in pkgutil.iter_modules(configs.__path__)
    if hasattr(importlib.import_module(f"experiments.configs.{name}"), "get_config")
]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_config_has_a_meaning(name):
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    for field in fields.of_config(config):
        assert field.meaning, field


def test_the_tables_have_every_field_that_is_accepted():
    tables = fields.tables()
    paths = {field.path for of_section in tables.values() for field in of_section}
    accepted = {f"{name}.{field}" for name, of in build.SECTIONS.items() for field in of}
    accepted |= {f"model.{field}" for field in configure.BESIDE}
    accepted |= {f"method.{key}" for key in configure.KEYS}
    assert accepted <= paths
    assert {f"method.{name}" for name in configure.all_options()} <= tables.keys()


def test_meanings_say_it_themselves():
    for of_section in fields.tables().values():
        for field in of_section:
            assert not field.meaning.startswith(("see ", "likewise", "as of ")), field


def test_a_meaning_may_stand_elsewhere():
    meaning = fields.followed(
        "learn", "see `core.targets.solve_targets`", "saflex_jax.rules.simplex"
    )
    assert meaning == fields.attributes(Simplex)["learn"]
    assert '"weights" keeps y = q' in meaning
    with pytest.raises(ValueError, match=r"speed must have a meaning in the docstring of .*solve"):
        fields.followed("speed", "see `core.targets.solve_targets`", "saflex_jax.rules.simplex")


def test_a_field_without_a_meaning_is_an_error(monkeypatch):
    monkeypatch.delitem(fields.MEANINGS, "train.steps")
    config = importlib.import_module("experiments.configs.digits").get_config()
    with pytest.raises(ValueError, match=r"train\.steps must have a meaning in .*MEANINGS"):
        fields.of_config(config)


def test_a_dataclass_without_a_meaning_is_an_error(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Network:
        """One.

        Attributes:
          width, depth: of it, over
            two lines.
        """

        width: int = 1
        depth: int = 1
        heads: int = 1

    assert fields.attributes(Network) == dict.fromkeys(("width", "depth"), "of it, over two lines")
    monkeypatch.setitem(configure.BACKBONES, "mine", Network)
    with pytest.raises(ValueError, match=r"heads must have a meaning in .*Network"):
        fields.tables()


def test_the_data_section_has_the_defaults_of_its_fields():
    section = sources.section("digits", val=5)
    assert list(section) == list(sources.FIELDS)
    assert section["val"] == 5 and section["noise_kind"] == "symmetric"
