import importlib
import math
import shutil
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments import build, task
from experiments.configs import digits, wdbc
from saflex_jax import parallel
from saflex_jax.data import SOURCES
from saflex_jax.train import Checkpoints, MetricsWriter
from tests.train import process_
from tests.train.setup_ import arrays, assert_same_bits, read_records

FOLDER = process_.ROOT / "experiments" / "configs"
MODULES = [
    importlib.import_module(f"experiments.configs.{path.stem}") for path in FOLDER.glob("*.py")
]
# Those of embedded data; tests/arms_test.py builds all.
CONFIGS = sorted(
    module.__name__
    for module in MODULES
    if hasattr(module, "get_config") and module.get_config().data.name in SOURCES
)


def changed(config, **overrides):
    config.update_from_flattened_dict(overrides)
    return config


def small(**overrides):
    """A config that compiles quickly."""
    return changed(wdbc.get_config(), **{"model.widths": (8,), "train.batch_size": 16, **overrides})


def small_images(**overrides):
    """The same of images."""
    changes = {"model.widths": (4, 4), "train.batch_size": 16, "augment": "shift(1)"}
    changes |= {"method.protonet.ways": 4, "method.protonet.queries": 3}  # 16 rows an episode
    return changed(digits.get_config(), **changes, **overrides)


def steps(config, count=2, *, devices=1):
    """State and metrics (sums and counts) after some steps, all built from a config."""
    build.check(config)
    data = task.make_data(config)
    alone = build.make_method(config, data.pools, data.source.columns)
    method = build.with_upstream(config, alone)
    runner = parallel.RUNNERS[config.runner](method.step, devices=jax.devices()[:devices])
    state = runner.put_state(build.init_state(config, method, data.pools))
    runner, stream = build.make_input(config, data, runner)
    for _ in range(count):
        state, metrics = runner.step(state, runner.put_batch(next(stream)))
    return state, jax.device_get(metrics)


# --- what runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs(name):
    module = importlib.import_module(name)
    assert "Command:" in module.__doc__ and "Hardware:" in module.__doc__
    state, metrics = steps(module.get_config())
    assert int(state.step) == 2
    assert all(np.isfinite(total) for total, _ in metrics.values())


def finite(state, metrics):
    assert int(state.step) == 2
    assert all(np.isfinite(total) for total, _ in metrics.values())


@pytest.mark.parametrize(
    "method, changes",
    [("fixmatch", {"data.unlabelled": True, "data.noise": 0.0}), ("protonet", {})],
)
def test_methods_whose_data_are_special_run_by_config(method, changes):
    """Of all others tests/train/loop_guard_test.py has runs."""
    finite(*steps(small_images(**{"method.name": method, "method.rule": "as_given", **changes})))


def test_options_reach_the_rule():
    # An infinite prior strength with the weights left alone is the plain upstream step.
    plain, _ = steps(small(**{"method.rule": "as_given"}))
    options = {"prior_strength": math.inf, "learn": "labels"}
    options = {f"method.saflex_paper.rule.{k}": v for k, v in options.items()}
    anchored, metrics = steps(small(**options, **{"method.rule": "saflex_paper"}))
    assert metrics["kept"][0] == metrics["kept"][1]
    for name, expected in arrays(plain.params).items():
        np.testing.assert_allclose(arrays(anchored.params)[name], expected, atol=1e-6)


REWEIGHTING = {
    "l2rw": {"scoring.predicate": "head", "scoring.mode": "finite_difference",
             "schedule.start": 2},
    "meta_weight_net": {"predicate": "head", "hidden": 7, "inner_learning_rate": 0.2,
                        "meta_tx": 0.1, "seed": 1, "start": 2},
}  # fmt: skip


@pytest.mark.parametrize("rule", REWEIGHTING)
def test_options_of_reweighting_by_config(rule):
    options = {f"method.{rule}.{name}": value for name, value in REWEIGHTING[rule].items()}
    config = small(**{"method.rule": rule}, **options)
    state, metrics = steps(config, 3)
    assert metrics["val_loss"][1] == 1  # of the third step alone
    assert all(np.isfinite(total) for total, _ in metrics.values())
    if rule == "meta_weight_net":
        net, _ = state.extra
        assert net["out"]["kernel"].shape == (7, 1)
    (start,) = (name for name in options if name.endswith("start"))
    with pytest.raises(ValueError, match="start must be a whole number >= 0; given -1"):
        build.check(changed(config, **{start: -1}))


def test_pmap_and_jit_agree_by_config():
    # Mixup pairs within a device's share under pmap. The damping keeps conjugate gradients from
    # magnifying the rounding by which already jit on 1 and on 8 devices differ.
    overrides = {
        "augment": "feature_noise(0.1)", "train.val_batch_size": 56,
        "method.saflex.scoring.direction": "cg(damping=0.3)",
    }  # fmt: skip
    found = {
        runner: steps(small(**overrides, runner=runner), 3, devices=8) for runner in ("jit", "pmap")
    }
    (jitted, jit_metrics), (mapped, pmap_metrics) = found["jit"], found["pmap"]
    for name, expected in arrays(jitted).items():
        np.testing.assert_allclose(arrays(mapped)[name], expected, atol=2e-6, err_msg=name)
    assert jit_metrics.keys() == pmap_metrics.keys()
    for name, (total, count) in jit_metrics.items():
        np.testing.assert_allclose(
            np.divide(*pmap_metrics[name]), total / count, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_batch_statistics_are_the_global_batchs_by_config():
    overrides = {"augment": "feature_noise(0.1)", "model.norm": "batch", "train.val_batch_size": 56}
    found = [
        arrays(steps(small(**overrides, runner=runner), 1, devices=8)[0].model_state)
        for runner in ("jit", "pmap")
    ]
    assert found[0]
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, atol=1e-6, err_msg=name)


def test_data_of_a_seed():
    config = wdbc.get_config()
    one, same = task.make_data(config), task.make_data(config)
    other = task.make_data(changed(wdbc.get_config(), seed=1))
    assert (one.pools.candidates.inputs == same.pools.candidates.inputs).all()
    assert not (one.pools.candidates.inputs == other.pools.candidates.inputs).all()
    # Standardised by the training split alone, which is therefore exact there.
    np.testing.assert_allclose(one.pools.candidates.inputs.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(one.pools.candidates.inputs.std(0), 1, atol=1e-4)

    sizes = [len(x.labels) for x in (one.pools.candidates, one.pools.val, one.test)]
    assert sizes == [569 - 60 - 200, 60, 200]
    given = one.pools.candidates.labels.argmax(-1)
    assert (given != one.clean_labels).sum() == round(0.3 * sizes[0])

    # With train_on_val the validation samples join the candidates, rightly labelled.
    both = task.make_data(changed(wdbc.get_config(), **{"data.train_on_val": True}))
    joined = both.pools.candidates
    assert (joined.index == np.arange(sizes[0] + 60)).all()
    np.testing.assert_array_equal(joined.inputs[sizes[0] :], both.pools.val.inputs)
    np.testing.assert_array_equal(joined.labels[sizes[0] :], both.pools.val.labels)
    assert (joined.labels.argmax(-1) != both.clean_labels).sum() == round(0.3 * sizes[0])
    for a, b in ((one.pools.val, both.pools.val), (one.test, both.test)):
        np.testing.assert_array_equal(a.inputs, b.inputs)

    # With val_from="train" the training samples direct themselves, with the labels they were given;
    # the held-out ones stay to select by.
    own = task.make_data(changed(wdbc.get_config(), **{"data.val_from": "train"}))
    for name in ("inputs", "labels"):
        seen = [getattr(pool, name) for pool in (own.pools.val, own.pools.candidates)]
        np.testing.assert_array_equal(*seen)
        held = [getattr(pool, name) for pool in (own.held_out, one.pools.val)]
        np.testing.assert_array_equal(*held)


@pytest.mark.parametrize(
    "changes", [{"data.train_on_val": True}, {"data.val_from": "train"}], ids=["trusted", "all"]
)
@pytest.mark.parametrize("on_device", [True, False])
def test_folds_of_a_config(changes, on_device):
    config = changed(wdbc.get_config(), **{"data.folds": 4, "data.on_device": on_device}, **changes)
    build.check(config)
    data = task.make_data(config)
    plain = parallel.Runner(None, None, lambda batch: batch, lambda pools: plain)
    _, stream = build.make_input(config, data, plain)
    number, trusted = (len(pool.labels) for pool in data.pools[:2])
    for _ in range(9):
        batch = next(stream)
        if on_device:
            rows, val = batch.candidates, batch.val + number - trusted
        else:  # the samples themselves
            rows, val = batch.candidates.index, batch.val.index + number - trusted
        assert not set(rows) & set(val)
        assert len(rows) == config.train.batch_size
        assert len(val) == (config.train.val_batch_size or trusted // 4)


def test_samples_to_choose_on_come_from_training_with_right_labels():
    # Images, whose values do not depend on what trains.
    plain, chosen = (
        task.make_data(changed(digits.get_config(), **{"data.select": n})) for n in (0, 90)
    )

    def prints(batch):
        return {x.tobytes() for x in np.asarray(batch.inputs)}

    assert len(chosen.test.labels) == 90
    assert prints(chosen.test) <= prints(plain.pools.candidates) - prints(chosen.pools.candidates)
    assert len(chosen.pools.candidates.labels) == len(plain.pools.candidates.labels) - 90
    assert prints(chosen.held_out) == prints(plain.held_out)
    right = {x.tobytes(): y for x, y in zip(chosen.source.inputs, chosen.source.labels)}
    found = [right[np.asarray(x).tobytes()] for x in chosen.test.inputs]
    np.testing.assert_array_equal(found, chosen.test.labels.argmax(1))


@pytest.mark.parametrize("trains", [True, False])
def test_validation_samples_that_train_stay_as_given(trains):
    config = small(**{"data.train_on_val": trains, "method.saflex.rule.noise_rate": 0.5})
    data = task.make_data(config)
    method = build.make_method(config, data.pools, data.source.columns)
    state = build.init_state(config, method, data.pools)
    candidates = data.pools.candidates
    learned = method.targets(state, data.pools)
    as_given = (np.asarray(learned.labels) == candidates.labels).all(1)
    trusted = np.arange(len(as_given)) >= len(as_given) - trains * len(data.held_out.labels)
    np.testing.assert_array_equal(as_given, trusted)


# --- bad configs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, field, value, message",
    [
        ("", "sed", 1, r"config has no field 'sed'; did you mean 'seed'\?"),
        ("train", "stepss", 3, r"config.train has no field 'stepss'; did you mean 'steps'\?"),
        ("data", "val_from", "test", r"config.data.val_from must be one of"),
        ("data", "folds", 4, r"config.data.folds must be 0 unless train_on_val=True or"),
        ("data", "noize", 0.1, r"config.data has no field 'noize'; did you mean 'noise'\?"),
        (
            "",
            "augment",
            "mix_up(1.0)",
            r"augment must be one of .*'mix_up'; did you mean 'mixup'\?",
        ),
        ("method", "loss", "augmi", r"config.method.loss .*did you mean 'augmix'\?"),
        ("optimizer", "learning_rte", 1, r"did you mean 'learning_rate'\?"),
        ("model", "width", (3,), r"config.model has no field 'width'; did you mean 'widths'\?"),
        ("model", "axis_name", "data", r"config.model has no field 'axis_name'"),
        ("method.saflex", "num_samples", 3, r"config.method.saflex has no field 'num_samples'"),
        ("method.saflex.rule", "run", 3, r"config.method.saflex.rule has no field 'run'"),
        ("method", "options", {}, r"config.method has no field 'options'; .*known fields: "),
        ("method.saflex_paper.rule", "temprature", 1, r"did you mean 'temperature'\?"),
        ("method.implicit", "max_wight", 1, r"method.implicit .*did you mean 'max_weight'\?"),
        ("method", "rule", "safle", r"config.method.rule .*did you mean 'saflex'\?"),
        (
            "method",
            "name",
            "madaug",
            "config.method.rule must be 'as_given' with madaug; given 'saf",
        ),
        ("method.drw", "counts", 3, "config.method.drw has no field 'counts'; known fields: "),
        ("method.l2rw.scoring", "chunck", 4, r"scoring has no field 'chunck'; .*'chunk'\?"),
        ("method.meta_weight_net", "hiden", 9, r"did you mean 'hidden'\?"),
        ("", "runner", "jitt", r"config.runner must be one of .*'jitt'; did you mean 'jit'\?"),
        ("data", "name", "digit", r"config.data.name .*did you mean 'digits'\?"),
        ("model", "name", "small_cn", r"config.model.name .*did you mean 'small_cnn'\?"),
        ("method", "name", "supervise", r"config.method.name .*did you mean 'supervised'\?"),
        ("train", "steps", 0, "config.train.steps must be positive and finite; given 0"),
        ("train", "checkpoint_every", -1, "config.train.checkpoint_every must be positive"),
    ],
)
def test_a_bad_config_is_refused(where, field, value, message):
    config = digits.get_config()
    build.check(config)
    section = config
    for name in filter(None, where.split(".")):
        section = section[name]
    section[field] = value
    with pytest.raises(ValueError, match=message):
        build.check(config)


@pytest.fixture
def compiled():
    """The names of what XLA compiled so far."""
    names = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda: 1)()
    assert names  # it hears
    names.clear()
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("rule.lookahead", -1.0, "lookahead must be >= 0 and finite; given -1.0"),
        ("rule.memory.decay", 1.0, r"decay must lie in \[0, 1\); given 1.0"),
        ("scoring.direction", "cgg", r"direction must be one of .*did you mean 'cg'\?"),
        ("scoring.predicate", "hed", "predicate selects no parameter; the paths are"),
    ],
)
def test_a_bad_option_is_refused_before_compilation(compiled, option, value, message):
    config = small(**{f"method.saflex.{option}": value})
    data = task.make_data(config)
    with pytest.raises(ValueError, match=message):
        method = build.make_method(config, data.pools)
        runner = parallel.RUNNERS[config.runner](method.step, devices=jax.devices()[:1])
        state = build.init_state(config, method, data.pools)
        runner, stream = build.make_input(config, data, runner)
        batch = runner.put_batch(next(stream))
        compiled.clear()  # the operations of the initialisation
        runner.step(state, batch)
    assert not compiled


# --- the command -----------------------------------------------------------------------------


def test_an_unknown_flag_names_the_nearest(tmp_path):
    job = process_.start(tmp_path / "run", "--config.train.stepss=3", env=process_.environment())
    code, stdout, stderr = job.finish()
    assert code != 0 and stdout == ""
    assert 'Did you mean "steps" instead of "stepss"?' in stderr
    assert not (tmp_path / "run").exists()


FIRST, LAST = 3, 6  # checkpoints
SAFLEX_OVER = {
    "automix": {"method.automix.momentum": 0.5, "method.automix.momentum_end": 0.9},
    "sla": {"method.sla.transformations": "rotation2", "model.name": "mlp", "model.norm": "none"},
}


def over(method):
    """What the command runs: SAFLEX as the rule of another method."""
    return {
        # The paper's rule leaves samples out from the first step on.
        "method.name": method, "method.rule": "saflex_paper", "model.widths": (4, 4),
        "method.saflex_paper.scoring.predicate": "head",
        "method.saflex_paper.rule.memory.decay": 0.97,
        "train.batch_size": 16, "train.steps": LAST, "train.log_every": 1,
        "train.checkpoint_every": FIRST, **SAFLEX_OVER[method],
    }  # fmt: skip


@pytest.fixture(scope="module", params=SAFLEX_OVER)
def runs(request, tmp_path_factory):
    """A method; the folders and last states of a run, and of one that goes on from step FIRST."""
    method, root = request.param, tmp_path_factory.mktemp("over")
    config = changed(digits.get_config(), **over(method))
    build.check(config)
    data = task.make_data(config)
    trained = build.with_upstream(config, build.make_method(config, data.pools))
    runner = parallel.RUNNERS[config.runner](trained.step, devices=jax.devices()[:1])

    def run(folder):
        checkpoints = Checkpoints(
            folder / "checkpoints", config=build.settings(config), every=FIRST
        )
        writer = MetricsWriter(folder, resume_from=checkpoints.latest)
        result = build.fit(
            config, data, trained, runner, writer=writer, checkpoints=checkpoints, progress=False
        )
        writer.close(), checkpoints.close()
        return result.state

    whole = run(root / "whole")
    shutil.copytree(root / "whole", root / "killed")
    shutil.rmtree(root / "killed" / "checkpoints" / str(LAST))
    return method, (root / "whole", whole), (root / "killed", run(root / "killed"))


def test_saflex_over_another_method_by_configuration_alone(runs):
    _, (folder, _), _ = runs
    records = process_.records(folder)
    assert list(records) == [*range(1, LAST + 1)]
    for record in records.values():  # of the method, and of its rule
        assert {"val_loss", "kept", "relabelled", "candidate_loss"} < set(record)
    weighed = [record["kept"] < 1 or record["relabelled"] > 0 for record in records.values()]
    assert any(weighed)


def test_saflex_over_another_method_resumes_bit_for_bit(runs):
    method, (folder, whole), (resumed_folder, resumed) = runs
    assert whole.step == resumed.step == LAST
    assert_same_bits(resumed, whole)
    memory = whole.extra.rule if method == "sla" else whole.extra.rule.rule
    assert memory.visits.sum() == LAST * 16 * (2 if method == "sla" else 1)  # of views, mixtures
    assert process_.records(folder) == process_.records(resumed_folder)


def test_tensorboard_without_tensorflow(tmp_path):
    # A TensorFlow that reports when somebody imports it, and cannot be used.
    fake, report = tmp_path / "fake" / "tensorflow", tmp_path / "imported"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        f"open({str(report)!r}, 'w').close()\nraise ImportError('not for run time')\n"
    )
    env = process_.environment(tmp_path.parent / "compiled")
    env["PYTHONPATH"] = str(fake.parent)
    workdir = tmp_path / "run"
    job = process_.start(workdir, "--tensorboard", env=env)
    code, _, stderr = job.finish()
    assert code == 0, stderr[-3000:]
    assert not report.exists()

    (events,) = workdir.glob("events.out.tfevents.*")
    found = {}
    for event in read_events(events):
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    expected = {r.pop("step"): r for r in read_records(workdir / "metrics.jsonl")}
    assert found.keys() == expected.keys()
    for step, record in expected.items():
        assert found[step] == pytest.approx(record, rel=1e-6)


def read_events(path):
    """The records of an event file: length, its checksum, data, its checksum."""
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
