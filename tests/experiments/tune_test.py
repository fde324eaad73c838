"""A pretrained network in image space: its head, its last stage, or all of it is trained."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import build, task
from experiments.configs import digits, sources
from saflex_jax import configure, models, parallel
from saflex_jax.models import ResNet18
from tests.models.weights_ import safetensors, state_of


class Tiny(ResNet18):
    blocks: tuple = (1, 1)
    width: int = 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(configure.BACKBONES, "resnet18", Tiny)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(safetensors(state_of(Tiny())))
    return path


def config(weights, tune, **model):
    found = digits.get_config()
    found.data = sources.section("digits", val=50, test=100)
    found.method.rule, found.augment = "as_given", "shift(1)"
    found.train.steps = found.train.log_every = 3
    del found["model"]
    found.model = ConfigDict({"name": "resnet18", "weights": str(weights), "tune": tune} | model)
    return found


LAST_STAGE = ("Conv_2", "Conv_3", "Conv_4", "Norm_3", "Norm_4", "Norm_5")


@pytest.mark.parametrize("tune", ["head", "last_stage"])
def test_what_is_tuned_moves_and_nothing_else_does(weights, tune):
    found = config(weights, tune)
    build.check(found)
    data = task.make_data(found)
    method = build.make_method(found, data.pools)
    first = jax.device_get(build.init_state(found, method, data.pools))
    runner = parallel.RUNNERS["jit"](
        build.with_upstream(found, method).step, devices=jax.devices()[:1]
    )
    last = jax.device_get(build.fit(found, data, method, runner, progress=False).state)
    # It starts from the file, and the statistics stay.
    variables = models.from_torchvision(
        models.read_weights(weights), Tiny("imagenet", norm="frozen")
    )
    for given, started in zip(jax.tree.leaves(variables), jax.tree.leaves(
        {"batch_stats": first.model_state["batch_stats"]["backbone"],
         "params": first.params["backbone"]}
    )):  # fmt: skip
        np.testing.assert_array_equal(given, started)
    assert jax.tree.all(jax.tree.map(np.array_equal, first.model_state, last.model_state))

    def moved(before, after):
        return not any(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))
        )

    assert moved(first.params["head"], last.params["head"])
    trained = first.params["head"]
    for name, before in first.params["backbone"].items():
        tuned = tune == "last_stage" and name in LAST_STAGE
        after = last.params["backbone"][name]
        assert (
            moved(before, after)
            if tuned
            else jax.tree.all(jax.tree.map(np.array_equal, before, after))
        )
        trained = (trained, before) if tuned else trained
    # Adam keeps two numbers for each that is trained, and two counts of steps.
    numbers = sum(x.size for x in jax.tree.leaves(trained))
    assert sum(x.size for x in jax.tree.leaves(last.opt_state)) == 2 * numbers + 2


def test_all_is_everything():
    train = models.tuned(Tiny(), "all")
    assert all(map(train, ("head/bias", "backbone/stem/kernel", "backbone/Conv_4/kernel")))


def test_images_are_seen_as_imagenet_has_them(weights):
    found = config(weights, "head")
    data = task.make_data(found)
    model = build.make_model(found, data.pools)
    images = data.test.inputs[:4]  # grey, in [0, 1]
    params, state = jax.jit(model.init)(jax.random.key(0), images)
    variables = {"params": params["backbone"], "batch_stats": state["batch_stats"]["backbone"]}
    apply = jax.jit(functools.partial(Tiny("imagenet", norm="frozen").apply, train=False))
    features = apply(variables, models.imagenet_inputs(images))
    expected = features @ params["head"]["kernel"]  # the bias starts at zero
    found = jax.jit(model.logits)(params, state, images)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tune": "some"}, r"config.model.tune must be one of \['all', 'head', 'last_stage'\]"),
        ({"norm": "group"}, r"config.model.norm with weights must be one of \['frozen'\]"),
        ({"stem": "cifar"}, r"config.model.stem with weights must be one of \['imagenet'\]"),
        ({"file": ""}, r"config.model.tune without weights must be one of \['all'\]"),
        ({"name": "small_cnn"}, r"config.model.weights must be '' for small_cnn"),
    ],
)
def test_bad_options_are_named(weights, model, message):
    weights = model.pop("file", weights)
    with pytest.raises(ValueError, match=message):
        build.check(config(weights, **({"tune": "head"} | model)))
