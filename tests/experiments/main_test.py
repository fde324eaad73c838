"""What a config builds, runs and refuses; the command that trains one."""

import importlib
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments import build, task
from experiments.configs import digits, wdbc
from saflex_jax import configure, parallel, train
from saflex_jax.batches import take
from saflex_jax.methods import METHODS
from saflex_jax.rules import RULES
from tests.train import process_
from tests.train.setup_ import arrays, assert_same_bits, read_records

FOLDER = process_.ROOT / "experiments" / "configs"


def changed(config, **overrides):
    config.update_from_flattened_dict(overrides)
    return config


def small(**overrides):
    """A config that compiles quickly."""
    changes = {"model.widths": (8,), "train.batch_size": 16, "augment": "feature_noise(0.1)"}
    return changed(wdbc.get_config(), **changes | overrides)


def small_images(**overrides):
    """The same of images."""
    changes = {"model.widths": (4, 4), "train.batch_size": 16, "augment": "shift(1)"}
    changes |= {"method.protonet.ways": 4, "method.protonet.queries": 3}  # 16 rows an episode
    return changed(digits.get_config(), **changes | overrides)


def steps(config, count, *, devices):
    """State and metrics (sums and counts) after some steps, all built from a config."""
    build.check(config)
    data = task.make_data(config)
    method = build.make_method(config, data.pools, data.source.columns)
    step = build.with_upstream(config, method).step
    runner = parallel.RUNNERS[config.runner](step, devices=jax.devices()[:devices])
    state = runner.put_state(jax.jit(lambda: build.init_state(config, method, data.pools))())
    runner, stream = build.make_input(config, data, runner)
    for _ in range(count):
        state, metrics = runner.step(state, runner.put_batch(next(stream)))
    return state, jax.device_get(metrics)


# --- what runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_says_how_to_run_it_and_on_what(path):
    module = importlib.import_module(f"experiments.configs.{path.stem}")
    if hasattr(module, "get_config"):
        assert "Command:" in module.__doc__ and "Hardware:" in module.__doc__


# Captions are files: of flyp tests/experiments/clip_test.py.
TAKES_RULE = {name: "rule" in spec.takes for name, spec in METHODS.items() if name != "flyp"}


@pytest.mark.parametrize(
    "name, rule",
    [
        *((name, "saflex" if takes else "as_given") for name, takes in TAKES_RULE.items()),
        *(("supervised", rule) for rule in RULES if rule != "saflex"),
    ],
)
def test_every_method_and_rule_is_built_of_a_config(name, rule):
    """As far as the traced step; tests/train/loop_guard_test.py trains each of them."""
    make = small if name == "supervised" else small_images
    config = make(**{"method.name": name, "method.rule": rule})
    if "clean" in METHODS[name].needs:
        config.data.update({"unlabelled": True, "noise": 0.0})
    data, held = task.make_data(config), []
    method = build.make_method(config, data.pools, data.source.columns)
    state = jax.eval_shape(lambda: build.init_state(config, method, data.pools))
    _, stream = build.make_input(config, data, parallel.Runner(None, None, None, held.append))
    streams = take(*held, next(stream))
    new, metrics = jax.eval_shape(build.with_upstream(config, method).step, state, streams)
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics
    reads_val = rule in ("saflex", "saflex_paper", "l2rw", "meta_weight_net", "implicit")
    assert ("val_loss" in metrics) == (reads_val or name == "madaug")


def test_options_and_the_run_reach_the_rule():
    options = {"scoring.direction": "identity", "rule.lookahead": 0.5, "rule.memory.decay": 0.25}
    config = small(**{f"method.saflex.{name}": value for name, value in options.items()})
    for trusted in (0, 60):
        config.data.train_on_val = trusted > 0
        pools = task.make_data(config).pools
        run = build.run_info(config, pools)
        rule = configure.make_rule(config.method.to_dict(), run)
        assert rule.scoring.direction == "identity" and rule.schedule.every == 1
        assert (rule.rule.lookahead, rule.rule.memory.decay) == (0.5, 0.25)
        assert rule.rule.run is run and run.num_trusted == trusted and run.num_val == 60
        assert run.num_samples == 309 + trusted and run.num_classes == 2
        assert run.steps_per_epoch == run.num_samples / 16 and run.num_steps == config.train.steps
        np.testing.assert_array_equal(run.counts, pools.candidates.labels.sum(0))
        assert run.upstream == "feature_noise(0.1)" and run.axis_name is None
    config.runner = "pmap"
    assert build.run_info(config, pools).axis_name == "data"


def test_pmap_and_jit_agree_by_config():
    # Mixup would pair within a device's share under pmap. The damping keeps conjugate gradients
    # from magnifying the rounding by which already jit on 1 and on several devices differ.
    overrides = {"method.saflex.scoring.direction": "cg(10, damping=0.3)"}
    (jitted, jit_metrics), (mapped, pmap_metrics) = (
        steps(small(**overrides, runner=runner), 3, devices=4) for runner in ("jit", "pmap")
    )
    for name, expected in arrays(jitted).items():
        np.testing.assert_allclose(arrays(mapped)[name], expected, atol=2e-6, err_msg=name)
    assert jit_metrics.keys() == pmap_metrics.keys()
    for name, (total, count) in jit_metrics.items():
        np.testing.assert_allclose(
            np.divide(*pmap_metrics[name]), total / count, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_batch_statistics_are_the_global_batchs_by_config():
    overrides = {"model.norm": "batch", "method.rule": "as_given"}
    jitted, mapped = (
        arrays(steps(small(**overrides, runner=runner), 1, devices=4)[0].model_state)
        for runner in ("jit", "pmap")
    )
    assert jitted
    for name, expected in jitted.items():
        np.testing.assert_allclose(mapped[name], expected, atol=1e-6, err_msg=name)


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
    config = small(
        **{"data.train_on_val": trains, "method.saflex.rule.noise_rate": 0.5,
           "method.saflex.scoring.direction": "identity"}
    )  # fmt: skip
    data = task.make_data(config)
    method = build.make_method(config, data.pools, data.source.columns)
    state = jax.jit(lambda: build.init_state(config, method, data.pools))()
    candidates = data.pools.candidates
    learned = jax.jit(method.targets)(state, data.pools)
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
        ("", "augment", "mix_up(1.0)", r"augment must be .*'mix_up'; did you mean 'mixup'\?"),
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
        ("method", "name", "madaug", "config.method.rule must be 'as_given' with madaug; given 's"),
        ("method.saflex.rule", "lookahead", -1.0, "lookahead must be >= 0 and finite; given -1.0"),
        ("method.saflex.rule.memory", "decay", 1.0, r"decay must lie in \[0, 1\); given 1.0"),
        ("method.saflex.scoring", "direction", "cgg", r"direction must be .*did you mean 'cg'\?"),
        ("method.meta_weight_net", "start", -1, "start must be a whole number >= 0; given -1"),
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
    jax.monitoring.clear_event_listeners()


def test_an_option_that_does_not_fit_the_network_is_refused_before_compilation(compiled):
    config = small(**{"method.saflex.scoring.predicate": "hed"})
    data = task.make_data(config)
    method = build.make_method(config, data.pools)
    runner = parallel.RUNNERS[config.runner](method.step, devices=jax.devices()[:1])
    state = build.init_state(config, method, data.pools)
    runner, stream = build.make_input(config, data, runner)
    batch = runner.put_batch(next(stream))
    compiled.clear()  # the operations of the initialisation
    with pytest.raises(ValueError, match="predicate selects no parameter; the paths are"):
        runner.step(state, batch)
    assert not compiled


# --- a rule over another method ----------------------------------------------------------------

FIRST, LAST = 3, 6  # checkpoints
SAFLEX_OVER = {
    "automix": {"method.automix.momentum": 0.5, "method.automix.momentum_end": 0.9},
    "sla": {"method.sla.transformations": "rotation2", "model.name": "mlp", "model.norm": "none"},
}


@pytest.fixture(scope="module", params=SAFLEX_OVER)
def over(request, tmp_path_factory):
    """SAFLEX as the rule of another method, by the config alone, and trained as the command does.

    The method's name; (folder, last state) of a whole run, and of one killed after FIRST steps.
    """
    config = small_images(
        **{"method.name": request.param, "method.rule": "saflex_paper",
           # This leaves samples out from the first step on.
           "method.saflex_paper.rule.tolerance": 0.25,
           "method.saflex_paper.rule.memory.decay": 0.97, "augment": "",
           "train.steps": LAST, "train.log_every": 1, "train.checkpoint_every": FIRST},
        **SAFLEX_OVER[request.param],
    )  # fmt: skip
    data = task.make_data(config)
    method = build.with_upstream(config, build.make_method(config, data.pools))
    runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])

    def run(folder):
        checkpoints = train.Checkpoints(
            folder / "checkpoints", config=build.settings(config), every=FIRST
        )
        writer = train.MetricsWriter(folder, resume_from=checkpoints.latest)
        options = {"checkpoints": checkpoints, "writer": writer, "progress": False}
        state = build.fit(config, data, method, runner, **options).state
        writer.close(), checkpoints.close()
        return folder, state

    root = tmp_path_factory.mktemp(request.param)
    whole = run(root / "whole")
    shutil.copytree(root / "whole", root / "killed")
    shutil.rmtree(root / "killed" / "checkpoints" / str(LAST))
    return request.param, whole, run(root / "killed")


def test_saflex_over_another_method_by_configuration_alone(over):
    name, (folder, state), _ = over
    records = process_.records(folder)
    assert list(records) == [*range(1, LAST + 1)]
    for record in records.values():  # of the method, and of its rule
        assert {"val_loss", "kept", "relabelled", "candidate_loss"} < set(record)
    assert any(record["kept"] < 1 or record["relabelled"] > 0 for record in records.values())
    if name == "sla":  # both views of every sample
        assert state.extra.rule.visits.sum() == LAST * 16 * 2
    else:  # of mixtures those that are nearly one sample
        assert 0 < state.extra.rule.rule.visits.sum() < LAST * 16


def test_saflex_over_another_method_resumes_bit_for_bit(over):
    _, (folder, whole), (other, resumed) = over
    assert whole.step == LAST
    assert_same_bits(resumed, whole)
    assert process_.records(folder) == process_.records(other)


# --- the command -----------------------------------------------------------------------------


def test_an_unknown_flag_names_the_nearest(tmp_path):
    job = process_.start(tmp_path / "run", "--config.train.stepss=3", env=process_.environment())
    code, stdout, stderr = job.finish()
    assert code != 0 and stdout == ""
    assert "no field 'stepss'; did you mean 'steps'?" in stderr
    assert not (tmp_path / "run").exists()


def test_the_command_writes_its_result_and_tensorboard_without_tensorflow(tmp_path):
    # A TensorFlow that reports when somebody imports it, and cannot be used.
    fake, report = tmp_path / "fake" / "tensorflow", tmp_path / "imported"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        f"open({str(report)!r}, 'w').close()\nraise ImportError('not for run time')\n"
    )
    env = process_.environment() | {"PYTHONPATH": str(fake.parent)}
    workdir = tmp_path / "run"
    quick = ["--config.augment=", "--config.train.steps=6", "--config.method.rule=as_given"]
    job = process_.start(workdir, "--tensorboard", *quick, env=env)
    code, stdout, stderr = job.finish()
    assert code == 0, stderr[-3000:]
    assert not report.exists()
    result = json.loads((workdir / "result.json").read_text())
    settings = result.pop("config")
    assert json.loads(stdout) == result and 0 < result["test_accuracy"] < 1
    assert result["steps"] == 6 == settings["train"]["steps"]
    assert settings["method"]["rule"] == "as_given"

    (events,) = workdir.glob("events.out.tfevents.*")
    logged = {}
    for event in read_events(events):
        for value in event.summary.value:
            logged.setdefault(event.step, {})[value.tag] = value.simple_value
    expected = {r.pop("step"): r for r in read_records(workdir / "metrics.jsonl")}
    assert logged.keys() == expected.keys() == {3, 6}
    for step, record in expected.items():
        assert logged[step] == pytest.approx(record, rel=1e-6)


def read_events(path):
    """The records of an event file: length, its checksum, data, its checksum."""
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
