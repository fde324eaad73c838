"""Comparisons of contrastive fine-tuning: captions by config, several test sets, one loop."""

import json

import jax
import numpy as np
import pytest

from experiments import arms, build, captions, clip, task
from experiments.configs import clip_cifar, clip_emoji, digits, methods, sources
from experiments.configs import flyp as recipes
from saflex_jax import RunInfo, models
from saflex_jax.types import TrainState

TEXT = {"depth": 0, "projected": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With captions of the digits, as embeddings that a locked encoder would make."""
    root = tmp_path_factory.mktemp("data")
    (root / "captions").mkdir()
    table = np.random.default_rng(0).normal(size=(10, 2, 8)).astype(np.float32)
    np.save(root / "captions" / "digits.npy", table)
    return root


def config(folder, rule="saflex"):
    made = digits.get_config()
    made.data = sources.section("digits", val=50, test=200, noise=0.4, captions="digits",
                                dir=str(folder), train_on_val=True)  # fmt: skip
    made.augment = "shift(1)"
    made.model = {"name": "mlp", "widths": (16,)}
    made.method = methods.all_methods("flyp", rule, flyp={"embed_dim": 8, "text": TEXT})
    made.train.update({"steps": 4, "log_every": 2, "batch_size": 64})
    made.arms = {"flyp": {"method": {"rule": "as_given"}}, "saflex": {}}
    return made


@pytest.mark.slow
def test_a_config_trains_both_arms_and_reads_every_test_set(folder, tmp_path, capsys, monkeypatch):
    given = {"SEEDS": 2, "FIRST": 3, "WORKDIR": str(tmp_path), "RESUME": False, "ARMS": [],
             "SET": '{"optimizer": {"learning_rate": 0.002}}'}  # fmt: skip
    for name, value in given.items():
        flag = type("Flag", (), {"value": value})
        monkeypatch.setattr(clip, name, flag)
    clip.run({"some": config(folder)}, {"test": {}, "fog:3": {"corrupt": "fog:3"}})
    title, *rows = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["some", "test", "fog:3"]
    assert [row.split()[0] for row in rows] == ["flyp", "saflex"]
    record, *others = map(json.loads, (tmp_path / "some.jsonl").read_text().splitlines())
    assert {r["seed"] for r in (record, *others)} == {3, 4}
    assert record["settings"]["optimizer"]["learning_rate"] == 0.002
    assert record["test_accuracy"] != record["fog:3_accuracy"]


def test_captions_that_are_not_there_are_asked_for_before_anything_compiles(folder):
    wrong = config(folder)
    wrong.data.captions = "none"
    data = task.make_data(wrong)
    with pytest.raises(ValueError, match=r"python -m experiments.captions none writes"):
        build.make_method(wrong, data.pools)
    wrong.data.captions = ""
    with pytest.raises(ValueError, match=r"flyp needs run.captions"):
        build.make_method(wrong, data.pools)


@pytest.mark.parametrize("module", [clip_cifar, clip_emoji])
def test_the_committed_arms_differ_by_their_configuration_alone(module):
    for name in module.CAPTIONS:
        made = arms.configs(module.get_config(name))
        assert {"flyp", "saflex", "trusted_only"} <= set(made)
        a, b = (arms.settings(made[arm]) for arm in ("flyp", "saflex"))
        assert a["method"].pop("rule") != b["method"].pop("rule")
        assert a == b


def test_captions_of_emoji_are_the_names_of_their_groups(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra clip is not installed")
    from saflex_jax.data import Description, from_prepared, write_prepared

    groups = np.repeat([0, 1, 2], [captions.LEAST, 2, captions.LEAST])
    labels = np.tile(groups, 2)
    half = len(groups)
    names = np.array([f"thing {n % half}" for n in range(2 * half)])
    about = Description("emoji", "arrays", "multiclass", 3, ("a", "b", "c"),
                        splits={"train": (0, half), "test": (half, 2 * half)})  # fmt: skip
    (tmp_path / "emoji").mkdir()
    images = np.arange(2 * half, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 3), np.uint8
    )
    write_prepared(tmp_path / "emoji", about,
                   {"inputs": images, "labels": labels, "extra_caption": names})  # fmt: skip
    table = captions.emoji(tmp_path)
    assert table.shape == (2, captions.LEAST, captions.EMOJI_CONTEXT)
    kept = from_prepared(tmp_path / "emoji_groups")
    assert kept.class_names == ("a", "c") and len(kept.labels) == 4 * captions.LEAST
    np.testing.assert_array_equal(np.bincount(kept.labels[kept.splits["test"]]), captions.LEAST)
    np.testing.assert_array_equal(kept.inputs[:, 0, 0, 0], np.flatnonzero(labels != 1))


def test_a_recipe_trains_the_clip_of_a_folder(monkeypatch):
    clip_network = models.make_clip("tiny")
    tokens = np.full((3, 1, 16), 2047)
    image = np.zeros((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(clip_network.init, jax.random.key(0), image, tokens[:1, 0])
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes["params"])
    monkeypatch.setattr(models, "load_clip", lambda folder, **options: (clip_network, params))
    run = RunInfo(1000, 3, captions=tokens)
    method = recipes.make_method("folder", "iwildcam", run)
    state = jax.eval_shape(method.init, jax.random.key(0), image)
    assert isinstance(state, TrainState)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"recipe must be one of .*did you mean 'imagenet'"):
        recipes.make_method("folder", "imagenets", run)
