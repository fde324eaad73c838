"""Features computed once by `experiments.features`, and runs on them."""

import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from experiments import build, command_line, task
from experiments import features as command
from experiments.configs import digits, sources
from experiments.features import Options, compute
from saflex_jax import Batch, augment, checks, configure, data, models, parallel
from saflex_jax.augment import OPERATIONS
from saflex_jax.models import ResNet18
from tests.models.weights_ import safetensors, state_of

SIDE, SIZE, VIEWS, PIPELINE = 6, 32, 3, "shift(1) | flip"
ROWS = {"train": 40, "test": 12}
RNG = np.random.default_rng(0)


class Tiny(ResNet18):
    blocks: tuple = (1,)
    width: int = 8


COMPILED = {}  # most sets of this file are made by the same programs


def extractor(backbone, variables, options, views, make=command.make_extractor):
    key = options._replace(limit=0), views
    if key not in COMPILED:
        COMPILED[key] = make(backbone, variables, options, views)
    return COMPILED[key]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_network(monkeypatch)


def tiny_network(monkeypatch):
    monkeypatch.setitem(configure.BACKBONES, "resnet18", Tiny)
    monkeypatch.setattr(command, "IMAGES", 24)
    monkeypatch.setattr(command, "make_extractor", extractor)


def forget():
    for cached in (task.opened, task.task_source, task.feature_set):
        cached.cache_clear()


def write_images(folder, name, channels=3, splits=True, side=SIDE, seed=0):
    """A prepared data set whose label is in its images."""
    rng, size = np.random.default_rng(seed), sum(ROWS.values())
    labels = np.arange(size) % 2
    images = rng.integers(0, 120, (size, side, side, channels)) + 100 * labels[:, None, None, None]
    about = data.Description(
        name, "arrays", "multiclass", 2,
        splits={"train": (0, 40), "test": (40, 52)} if splits else {},
    )  # fmt: skip
    arrays = {"inputs": images.astype(np.uint8), "labels": labels,
              "extra_worst": 1 - labels, "extra_cell": np.arange(size) // 26}  # fmt: skip
    (folder / name).mkdir()
    data.write_prepared(folder / name, about, arrays)
    return arrays


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Data sets "mnist" (colours and an official test split) and "usps" (grey, without one)."""
    forget()
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, "mnist")
    write_images(folder, "usps", channels=1, splits=False, side=5, seed=1)
    backbone = Tiny("imagenet", norm="frozen")
    (folder / "weights.safetensors").write_bytes(safetensors(state_of(backbone)))
    return folder


def made(out, name="mnist", tag="", **options):
    """(the set, its message)."""
    chosen = Options(**{"size": SIZE, "views": VIEWS, "augment": PIPELINE} | options)
    message = compute(name, chosen, str(out / "weights.safetensors"), out, tag)
    forget()
    return data.from_features(message.split(": ")[1]), message


BACKBONE = Tiny("imagenet", norm="frozen")


@jax.jit
def features_of(variables, images):
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    images = jax.image.resize(images, (len(images), SIZE, SIZE, 3), "bilinear")
    imagenet = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    mean, deviation = imagenet.reshape(2, 1, 1, 1, 3)
    return BACKBONE.apply(variables, (images - mean) / deviation, train=False)


def by_hand(out, images):
    """f32[B, D]: the network on images f32[B, H, W, C] as they are."""
    variables = models.from_torchvision(models.read_weights(out / "weights.safetensors"), BACKBONE)
    return np.asarray(features_of(variables, images))


def close(given, expected):
    np.testing.assert_allclose(np.float32(given), expected, rtol=2e-3, atol=2e-3)


# --- the command


@pytest.mark.parametrize("name", ["mnist", "usps"])
def test_views_are_the_networks_features_of_the_pipelines_draws(out, name):
    found, _ = made(out, name)
    source = task.opened(name, str(out), 0, "", False)
    images, seen = np.float32(source.inputs) / 255, 40 if name == "mnist" else 52
    np.testing.assert_array_equal(found.rows, np.arange(52))
    close(found.source.inputs[:], by_hand(out, images))
    assert found.source.views.shape == (seen, VIEWS, 8)
    draw = jax.jit(augment.parse(PIPELINE))
    for row in (0, 17, seen - 1):  # each alone, whatever chunk it was in
        index = np.array([row], np.int32)
        one = Batch(jnp.asarray(images[index]), np.eye(2, dtype=np.float32)[:1], np.ones(1, bool),
                    index)  # fmt: skip
        for view in range(1, VIEWS):
            key = jax.random.fold_in(jax.random.key(0), view)
            drawn = draw(key, one)
            close(found.source.views[row, view], by_hand(out, drawn.inputs)[0])
            np.testing.assert_array_equal(
                found.trace.magnitude[row, view], drawn.trace.magnitude[0]
            )
            names = [found.operations[n] for n in found.trace.operation[row, view]]
            assert names == [OPERATIONS[n] for n in drawn.trace.operation[0]] == ["shift", "flip"]
    assert {found.operations[n] for n in found.trace.operation[:, 0].ravel()} == {"identity"}


def test_it_is_the_data_set_in_all_but_its_inputs(out):
    found, _ = made(out)
    source = task.opened("mnist", str(out), 0, "", False)
    np.testing.assert_array_equal(found.source.labels, source.labels)
    np.testing.assert_array_equal(found.source.extra["worst"], source.extra["worst"])
    for split in ROWS:
        np.testing.assert_array_equal(found.source.splits[split], source.splits[split])
    np.testing.assert_array_equal(found.prints, data.fingerprints(source.inputs, chunk=9))


def test_a_limit_keeps_the_first_training_rows_and_the_test_split(out):
    whole, _ = made(out)
    some, message = made(out, limit=10)
    assert message.endswith("resnet18_32_shift-1-flip_x3_n10")
    np.testing.assert_array_equal(some.rows, [*range(10), *range(40, 52)])
    np.testing.assert_array_equal(some.source.views, whole.source.views[:10])
    np.testing.assert_array_equal(some.source.inputs[10:], whole.source.inputs[40:])
    with pytest.raises(ValueError, match="--limit must be at most 40, the training rows"):
        made(out, limit=41)


def test_a_second_call_computes_nothing_and_other_options_need_another_name(out, monkeypatch):
    made(out, tag="named")
    monkeypatch.setattr(command, "_fill", lambda *_: pytest.fail("computes"))
    assert made(out, tag="named")[1] == f"ready: {out / 'features/mnist/named'}"
    with pytest.raises(ValueError, match=r"--tag must be a new name; .* holds a set of other"):
        made(out, tag="named", seed=1)


def test_an_interrupted_run_goes_on_where_it_stopped(out, monkeypatch):
    whole, _ = made(out)
    note, folder = command._note, out / "features" / "mnist"

    def interrupt(part, done):
        note(part, done)
        if done.get("views", 0) == 16:  # two chunks of 8 rows
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "_note", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made(out, tag="resumed")
    assert not (folder / "resumed").exists()
    views = np.load(folder / ".resumed.part" / "views.npy")
    assert views[:16].any((1, 2)).all() and not views[16:].any()
    computed, extract = [], command.make_extractor

    def counting(*arguments):
        compiled = extract(*arguments)

        def call(images, rows):
            if not isinstance(rows, jax.core.Tracer):
                computed.extend(rows.tolist())
            return compiled(images, rows)

        return call

    monkeypatch.setattr(command, "make_extractor", counting)
    found, _ = made(out, tag="resumed")
    assert sorted(set(computed)) == [*range(16, 52)]
    np.testing.assert_array_equal(found.source.views, whole.source.views)
    np.testing.assert_array_equal(found.source.inputs[:], whole.source.inputs[:])
    np.testing.assert_array_equal(found.prints, whole.prints)
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".part")]


def test_another_data_set_or_other_labels_are_not_ready(out, tmp_path):
    """Folders of one name, as many images in each; then an image is moved to its right class."""
    for name in "ab":
        for n in range(6):
            file = tmp_path / name / "images" / ("cat", "dog")[n % 2] / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
    first, second = (str(tmp_path / name / "images") for name in "ab")
    made(out, first, tag="own")
    assert made(out, first, tag="own")[1].startswith("ready")
    with pytest.raises(ValueError, match=r"images/own holds a set of other images$"):
        made(out, second, tag="own")
    os.rename(f"{first}/cat/0.png", f"{first}/dog/0.png")
    forget()
    with pytest.raises(ValueError, match=r"images/own holds a set of other labels, file, images$"):
        made(out, first, tag="own")


def test_what_was_begun_with_other_options_is_begun_anew(out, monkeypatch):
    part = out / "features" / "mnist" / ".anew.part"
    part.mkdir()
    (part / "done.json").write_text(json.dumps({"views": 40}))
    (part / "features.json").write_text(json.dumps({"format": 1, "options": {"size": 5}}))
    found, _ = made(out, tag="anew")
    np.testing.assert_array_equal(found.source.views, made(out)[0].source.views)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "mixup(1.0)"}, "--augment must keep labels and rows"),
        ({"augment": ""}, "--augment must be given where --views > 1, and nowhere else"),
        ({"views": 1}, "--augment must be given where --views > 1, and nowhere else"),
        ({"augment": "shfit(1)"}, "did you mean 'shift'"),
        ({"backbone": "mlp"}, r"--backbone must be one of \['resnet18', 'resnet50'\]"),
        ({"backbone": "resnet50"}, r"state.* must have shape \[64\]; given \[8\]"),
        ({"corrupt": "fog:9"}, "--corrupt must be KIND:1 to KIND:5"),
        ({"size": 0}, "--size must be a whole number >= 1"),
    ],
)
def test_bad_options_are_named(out, options, message):
    with pytest.raises(ValueError, match=message):
        made(out, tag="bad", **options)


def test_a_table_has_no_features(out):
    with pytest.raises(ValueError, match=r"features need images \[N, H, W, C\]; given \[569, 30\]"):
        made(out, "wdbc")


# --- runs on features


TAG = "resnet18_32_shift-1-flip_x3"


def config(out, **section):
    found = digits.get_config()
    found.data = sources.section(
        **{"name": "mnist", "dir": str(out), "features": TAG, "val": 8} | section
    )
    del found["model"]
    found.model = ConfigDict({"name": "mlp", "widths": (8,)})
    found.augment = "view | mixup(0.2)"
    found.train.steps, found.train.log_every, found.train.batch_size = 40, 20, 16
    found.optimizer.learning_rate, found.method.rule = 0.02, "as_given"
    return found


@pytest.fixture(scope="module")
def sets(out):
    """Feature sets of both data sets, as they are and under fog."""
    with pytest.MonkeyPatch.context() as patched:
        tiny_network(patched)
        for name in ("mnist", "usps"):
            made(out, name), made(out, name, corrupt="fog:3")
    return out


def views_of(sets, name="mnist"):
    return np.float32(data.from_features(sets / "features" / name / TAG).source.views)


def test_inputs_are_views_of_candidates_and_view_0_of_the_rest(sets):
    section = config(sets, train_on_val=True, labels="worst")
    own = task.make_data(section)
    images = task.make_data(config(sets, train_on_val=True, labels="worst", features=""))
    # Everything but the inputs is what it is on images.
    for mine, theirs in zip(
        jax.tree.leaves(own.pools._replace(val=None)._replace(candidates=own.pools.candidates[1:])),
        jax.tree.leaves(images.pools._replace(val=None)._replace(
            candidates=images.pools.candidates[1:])),
    ):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(own.wrong, images.wrong)
    assert own.removed == images.removed
    assert own.pools.candidates.inputs.shape == (40, VIEWS, 8)
    assert own.held_out.inputs.shape == (8, 8) and own.test.inputs.shape == (12, 8)
    # The training rows have mean zero and deviation one; validation samples come last.
    first = own.pools.candidates.inputs[:, 0]
    np.testing.assert_allclose(first[:32].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(first[:32].std(0), 1, atol=1e-4)
    np.testing.assert_array_equal(first[32:], own.held_out.inputs)


def test_a_run_learns_from_features(sets):
    found = config(sets)
    build.check(found)
    own = task.make_data(found)
    method = build.make_method(found, own.pools, own.source.columns)
    step = build.with_upstream(found, method).step
    runner = parallel.RUNNERS["jit"](step, devices=jax.devices()[:1])
    result = build.fit(found, own, method, runner, progress=False)
    assert task.test_scores(method, result.state, own)["accuracy"] > 0.9


def test_copies_are_left_out_as_they_are_of_images(sets, monkeypatch):
    found = data.from_features(sets / "features" / "mnist" / TAG)
    prints = found.prints.copy()
    prints[3] = prints[45]  # a training row that is a test row
    monkeypatch.setattr(task, "feature_set", lambda *_: found._replace(prints=prints))
    own = task.make_data(config(sets, val=8))
    assert own.removed == {"train": 1, "val": 0} or own.removed == {"train": 0, "val": 1}


def test_validation_from_train_is_view_0(sets):
    own = task.make_data(config(sets, val_from="train"))
    np.testing.assert_array_equal(own.pools.val.inputs, own.pools.candidates.inputs[:, 0])


def test_noise_that_follows_inputs_follows_view_0(sets):
    noisy = task.make_data(config(sets, noise=0.25, noise_kind="instance"))
    expected = data.instance_noise(
        noisy.pools.candidates.inputs[:, 0], noisy.clean_labels, 2, share=0.25, seed=0
    )
    np.testing.assert_array_equal(noisy.pools.candidates.labels.argmax(1), expected)
    assert noisy.wrong.sum() == 8


def test_trusted_samples_alone_keep_their_views(sets):
    own = task.make_data(config(sets, trusted_only=True))
    assert own.pools.candidates.inputs.shape[1:] == (VIEWS, 8)
    np.testing.assert_array_equal(own.pools.candidates.inputs[:8, 0], own.held_out.inputs)


def test_corrupted_test_rows_are_those_of_the_sibling(sets):
    clean, fog = (task.make_data(config(sets, corrupt=c)) for c in ("", "fog:3"))
    np.testing.assert_array_equal(clean.pools.candidates.inputs, fog.pools.candidates.inputs)
    sibling = data.from_features(sets / "features" / "mnist" / f"{TAG}.fog-3").source
    split = task.make_split(config(sets).data, data.from_features(
        sets / "features" / "mnist" / TAG).source, seed=0)  # fmt: skip
    own = views_of(sets)[split.train, 0]
    expected = (np.float32(sibling.inputs[:]) - own.mean(0)) / own.std(0)
    np.testing.assert_allclose(fog.test.inputs, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(fog.test.inputs - clean.test.inputs).max() > 0.1
    # Rows of any split can be tested where there is no official one, and none else where there is.
    grey = task.make_data(config(sets, name="usps", test=20, corrupt="fog:3"))
    assert grey.test.inputs.shape == (20, 8)
    with pytest.raises(ValueError, match=r"config\.data\.corrupt must be '' where other rows"):
        task.make_data(config(sets, select=10, corrupt="fog:3"))
    with pytest.raises(ValueError, match=r"fog-2 must be a feature set"):
        task.make_data(config(sets, corrupt="fog:2"))


def test_another_data_sets_features_are_tested_on_or_come_from_outside(sets):
    shifted = task.make_data(config(sets, test_on="usps"))
    assert shifted.test.inputs.shape == (52, 8)
    fog = task.make_data(config(sets, test_on="usps", corrupt="fog:3"))
    assert fog.test.inputs.shape == (52, 8)
    assert np.abs(fog.test.inputs - shifted.test.inputs).max() > 0.1
    group = task.make_data(config(sets, name="usps", test_on="cell=1"))
    assert group.test.inputs.shape == (26, 8) and group.pools.candidates.inputs.shape[0] == 18
    clean = task.make_data(config(sets)).pools.candidates.inputs
    mixed = task.make_data(config(sets, outside=0.5, outside_from=f"usps@{TAG}"))
    replaced = mixed.wrong
    assert replaced.sum() == 16
    inputs = mixed.pools.candidates.inputs
    np.testing.assert_array_equal(inputs[~replaced], clean[~replaced])
    other, own = views_of(sets, "usps"), views_of(sets)
    rows = task.make_split(config(sets).data, data.from_features(
        sets / "features" / "mnist" / TAG).source, seed=0).train  # fmt: skip
    other = (other - own[rows, 0].mean(0)) / own[rows, 0].std(0)
    for row in inputs[replaced]:
        assert np.abs(other - row).max((1, 2)).min() < 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": ""}, r"must start with view with features, as 'view \| mixup\(0.2\)' does"),
        ({"augment": "mixup(0.2)"}, "must start with view with features"),
        ({"augment": "view | flip"}, "must start with view with features; inputs must be images"),
        ({"data.size": 8}, "config.data.size must be 0 with features"),
        ({"data.task": "ordinal"}, "config.data.task must be '' with features"),
    ],
)
def test_what_does_not_go_with_features_is_said_before_anything_is_compiled(sets, changes, message):
    found = config(sets)
    found.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        build.check(found)


def test_a_set_that_was_not_computed_is_named(sets):
    with pytest.raises(
        ValueError,
        match=r"features/mnist/other must be a feature set; .saflex features mnist. makes",
    ):
        task.make_data(config(sets, features="other"))


@pytest.mark.parametrize(
    ("debug", "fail", "error"),
    [
        (False, lambda: checks.whole(size=-1), SystemExit),
        (True, lambda: checks.whole(size=-1), ValueError),
        (False, lambda: np.zeros(2) + np.zeros(3), ValueError),  # a bug
    ],
)
def test_the_command_shows_where_a_bug_is_and_with_debug_every_error(
    monkeypatch, tmp_path, debug, fail, error
):
    options = {"out": str(tmp_path), "weights": __file__, "backbone": "resnet18", "tag": "",
               "augment": "", "corrupt": "", "size": 6, "pixels": 0, "views": 1, "limit": 0,
               "seed": 0}  # fmt: skip
    for name, value in options.items():
        monkeypatch.setattr(command, f"_{name}", SimpleNamespace(value=value))
    monkeypatch.setattr(command, "compute", lambda *_: fail())
    monkeypatch.setattr(command_line, "_debug", debug)
    with pytest.raises(error), command_line.in_a_line():
        command.main(["features", "digits"])
