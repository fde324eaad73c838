"""From a config to a run: early stopping on the validation split."""

import signal

import jax
import numpy as np
import pytest

from experiments import build, task
from experiments.configs import few_shot, wdbc
from saflex_jax import parallel, train


def small(**changes):
    """A config of a table that compiles quickly; the arm "upstream" with early stopping."""
    config = wdbc.get_config()
    config.model.widths = (4,)
    config.augment = "identity"
    config.method.rule = "as_given"
    config.train.update({"steps": 9, "log_every": 2, "checkpoint_every": 3})
    config.train.update({"batch_size": 16, "val_batch_size": 24})  # of 8 devices
    config.train.keep_best = True
    config.optimizer.learning_rate = 0.3  # the last record is not the best one
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("name", ["train_on_val", "trusted_only", "unlabelled"])
def test_validation_samples_that_train_are_no_choice(name):
    config = small(**{f"data.{name}": True, "data.noise": 0.0})
    message = rf"config\.data\.{name} must be False with train\.keep_best=True.*; given True"
    with pytest.raises(ValueError, match=message):
        build.check(config)
    config.train.keep_best = False
    build.check(config)


def test_what_takes_no_steps_or_knows_no_classes_of_the_split_is_refused():
    config = small()
    config.model = {"name": "logistic"}
    with pytest.raises(ValueError, match=r"keep_best must be False with logistic; given True"):
        build.check(config)
    config = few_shot.get_config()
    with config.unlocked():
        config.train.keep_best = True
    config.method.name = "protonet"
    with pytest.raises(ValueError, match=r"keep_best must be False with protonet; given True"):
        build.check(config)
    config = small()
    data = task.make_data(config)
    data = data._replace(source=data.source._replace(task="multilabel"))
    method = build.make_method(config, data.pools)
    with pytest.raises(ValueError, match=r"must be False for wdbc, whose labels are no classes"):
        build.fit(config, data, method, parallel.jit_runner(method.step))


def test_only_options_that_any_value_fits_are_given_apart():
    config = small()
    pools = task.make_data(config).pools
    build.make_method(config, pools, options={"optimizer.weight_decay": 0.5})
    with pytest.raises(ValueError, match=r"options has no field 'train.steps'.*known fields"):
        build.make_method(config, pools, options={"train.steps": 3})


def test_a_config_without_the_field_has_it_off():
    config = small()
    del config.train["keep_best"]
    build.check(config)
    assert not build.keeps_best(config)
    other = small()
    other.train.keep_best = False
    assert build.settings(config) == build.settings(other)
    assert build.settings(small())["train"]["keep_best"] is True


def test_the_best_record_is_what_a_run_ends_with_also_after_a_stop(tmp_path):
    config = small()
    data = task.make_data(config)
    method = build.make_method(config, data.pools)
    runner = parallel.jit_runner(method.step)
    assert jax.device_count() == 8

    def fit(folder=None, **options):
        checkpoints = None
        if folder is not None:
            settings = build.settings(config)
            checkpoints = train.Checkpoints(
                tmp_path / folder / "checkpoints",
                config=settings,
                every=config.train.checkpoint_every,
            )
        result = build.fit(
            config, data, method, runner, checkpoints=checkpoints, progress=False, **options
        )
        if checkpoints is not None:
            checkpoints.close()
        return result

    def stop(state):
        if int(state.step) == 6:
            signal.raise_signal(signal.SIGTERM)
        return {"seen": int(state.step)}

    whole = fit(evaluate=lambda state: {"seen": int(state.step)})
    accuracies = {r["step"]: r["eval/accuracy"] for r in whole.history}
    assert [*accuracies] == [2, 4, 6, 8, 9] == [r["eval/seen"] for r in whole.history]
    best = max(accuracies, key=accuracies.get)
    assert int(whole.state.step) == best < 9
    found = train.make_evaluator(method, data.held_out.inputs, data.held_out.labels)(whole.state)
    assert found["accuracy"] == accuracies[best]

    stopped = fit("killed", evaluate=stop)
    assert stopped.stopped_by == signal.SIGTERM and int(stopped.state.step) == 7
    for _ in range(2):  # goes on, and says it again
        assert_same(fit("killed").state, whole.state)
    assert [p.name for p in (tmp_path / "killed" / "best").iterdir()] == [str(best)]


def test_members_of_a_sweep_without_a_record_have_empty_histories(monkeypatch):
    config = small(**{"train.keep_best": False})
    data = task.make_data(config)
    method = build.make_method(config, data.pools)
    monkeypatch.setattr(train, "fit", lambda runner, state, *_, **__: train.FitResult(state, [], 0))
    runner = parallel.sweep_runner(method.step, devices=jax.devices()[:1])
    results = build.fit_sweep([config, config], [data, data], method, runner)
    assert [result.history for result in results] == [[], []]


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(found.step) == int(expected.step)
