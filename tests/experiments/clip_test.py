"""Comparisons of contrastive fine-tuning: captions by config, several test sets, one loop."""

import copy
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import arms, build, captions, clip, command_line, task
from experiments.configs import (
    clip_cifar,
    clip_emoji,
    digits,
    flyp_fmow,
    flyp_imagenet,
    flyp_iwildcam,
    methods,
    sources,
)
from saflex_jax import models, parallel
from saflex_jax.data.captions import FLYP_TEMPLATES, filled

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


def give(monkeypatch, **flags):
    defaults = {"SEEDS": 2, "FIRST": 3, "RESUME": False, "ARMS": [], "SET": "{}"}
    for name, value in (defaults | flags).items():
        monkeypatch.setattr(clip, name, SimpleNamespace(value=value))


def test_an_unknown_arm_is_refused_and_the_log_stays(folder, tmp_path, monkeypatch):
    log = tmp_path / "some.jsonl"
    log.write_text('{"arm": "flyp", "seed": 3, "settings": {}}\n')
    give(monkeypatch, WORKDIR=str(tmp_path), ARMS=["flip"], RESUME=True)
    with pytest.raises(ValueError, match=r"--arms must be one of .* given 'flip'; did you mean"):
        clip.run("clip_some", {"some": config(folder)}, {"test": {}})
    assert log.read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"SET": '{"data":'}, r"--set must be JSON, .*; given '{\"data\":'; Expecting value"),
        ({"SET": '{"data": 3}'}, r"--set must be JSON, nested changes of the config; given"),
        ({"SET": "[1]"}, r"--set must be JSON, nested changes of the config; given '\[1\]'"),
        ({"SET": '{"data": {"nois": 1}}'}, r"config.data has no field 'nois'; did you mean"),
        ({"ARMS": ["typo"]}, r"--arms must be one of .*'flyp'.*; given 'typo'"),
    ],
)
def test_bad_options_of_a_comparison_are_a_line(folder, monkeypatch, flag, message):
    give(monkeypatch, WORKDIR="nowhere", **flag)
    monkeypatch.setattr(arms, "run_all", lambda *_, **__: pytest.fail("nothing runs"))
    with pytest.raises(SystemExit, match=message), command_line.in_a_line():
        clip.run("clip_some", {"some": config(folder)}, {"test": {}})


def test_an_unknown_set_of_captions_is_a_line_before_any_is_made(monkeypatch):
    monkeypatch.setattr(captions, "CAPTIONS", {"emoji": lambda root: pytest.fail("made")})
    with pytest.raises(SystemExit, match=r"name must be one of \['emoji'\]; given 'foo'"):
        with command_line.in_a_line():
            captions.main(["captions", "emoji", "foo"])


@pytest.mark.slow
def test_a_config_trains_both_arms_and_reads_every_test_set(folder, tmp_path, capsys, monkeypatch):
    give(monkeypatch, WORKDIR=str(tmp_path), SET='{"optimizer": {"learning_rate": 0.002}}')
    clip.run("clip_some", {"some": config(folder)}, {"test": {}, "fog:3": {"corrupt": "fog:3"}})
    title, *rows = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["some", "test", "fog:3", "test:", "more"]
    assert " to " not in rows[0] and " to " in rows[1]
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


def test_captions_of_emoji_are_the_names_of_their_groups(tmp_path, monkeypatch):
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
    modes = [(tmp_path / name).stat().st_mode for name in ("emoji", "emoji_groups")]
    assert modes[0] == modes[1]  # whoever reads the one reads the other

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(captions, "write_prepared", full)
    with pytest.raises(OSError, match="no space left"):
        captions.emoji(tmp_path)
    assert from_prepared(tmp_path / "emoji_groups").class_names == ("a", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".emoji_groups.lock", "emoji", "emoji_groups"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """The weights of a small network, as a hub has them, with a tokenizer of its captions."""
    pytest.importorskip("tokenizers", reason="the extra clip is not installed")
    root = tmp_path_factory.mktemp("clip")
    texts = filled(["cat", "dog"], FLYP_TEMPLATES["iwildcam"])
    words = models.word_vocabulary([text for own in texts for text in own])
    sizes = {"width": 64, "layers": 1}
    text = {"context_length": 12, "vocab_size": words.get_vocab_size(), "heads": 1, **sizes}
    told = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "patch_size": 8, **sizes},
            "text_cfg": text}  # fmt: skip
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": told}))
    words.save(str(root / "tokenizer.json"))
    network = models.clip_of({"model_cfg": told})
    example = np.zeros((1, 16, 16, 3), np.float32), np.full((1, 12), text["vocab_size"] - 1)
    params = jax.jit(network.init)(jax.random.key(0), *example)["params"]
    state = models.to_clip(params, network, "open_clip")
    models.write_weights(root / "open_clip_model.safetensors", state)
    return root


@pytest.mark.parametrize("module", [flyp_imagenet, flyp_iwildcam, flyp_fmow])
def test_recipes_are_configs_that_wait_for_their_data(module):
    config = module.get_config()
    with pytest.raises(ValueError, match=r"data\.name must be the path .* there is no 'data/"):
        build.check(config)
    config.data.name = "digits"
    build.check(config)
    for name, value, message in (
        ("optimizer.warmup", config.train.steps, r"warmup must be less than config.train.steps"),
        ("model.weights", "", r"model.weights must be a folder as models.load_clip reads it"),
        ("model.widths", (3,), r"config.model has no field 'widths'"),
        ("method.name", "supervised", r"method.name must be flyp with model.name='clip'"),
        ("method.flyp.embed_dim", 64, r"flyp.embed_dim must be left as it is .*given 64"),
    ):
        wrong = copy.deepcopy(config)
        with wrong.unlocked():
            wrong.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=message):
            build.check(wrong)


def test_a_recipe_trains_the_towers_of_a_folder(clip_folder, tmp_path):
    rng = np.random.default_rng(0)
    for split, number in {"train": 4, "val": 2, "test": 2}.items():
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(number):
                noise = rng.integers(256, size=(20, 24, 3)).astype(np.uint8)
                Image.fromarray(noise).save(folder / f"{k}.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "captions").mkdir()
    table = captions.of_names(tmp_path / "names.txt", clip_folder, "iwildcam")
    np.save(tmp_path / "captions" / "iwildcam.npy", table)
    assert table.shape == (2, 2, 12)

    config = flyp_iwildcam.get_config()
    config.data.update({"name": str(tmp_path / "images"), "dir": str(tmp_path), "size": 16})
    config.model.weights = str(clip_folder)
    config.method.update({"rule": "saflex", "flyp": {"parts": 1}})
    config.optimizer.warmup = 1
    config.train.update({"steps": 2, "batch_size": 4, "val_batch_size": 4, "log_every": 1})
    data = task.make_data(config)
    method = build.make_method(config, data.pools)
    start = build.init_state(config, method, data.pools)
    _, params = models.load_clip(clip_folder)
    jax.tree.map(np.testing.assert_array_equal, start.params, params)
    runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])
    result = build.fit(config, data, method, runner, progress=False)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), result.state.params, params)
    assert moved["head"]["image"]["kernel"] and np.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize(
    "names, templates, message",
    [
        ("cat\n", "imagenet", "must hold two names or more, one a line; given 1"),
        ("cat\n\n", "imagenet", "names must not be empty; class 1 is ''"),
        ("cat\ndog", "imagenets", "did you mean 'imagenet'"),
        (None, "imagenet", "NAME=FILE must be a text file that exists; given"),
    ],
)
def test_names_of_classes_that_are_none_are_refused(names, templates, message, tmp_path):
    file = tmp_path / "names.txt"
    if names is not None:
        file.write_text(names)
    with pytest.raises(ValueError, match=message):
        captions.of_names(file, tmp_path, templates)
