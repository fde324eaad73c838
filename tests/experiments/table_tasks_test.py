"""The suite "tables": its halves, its arms, and that its data are what the tasks say."""

import numpy as np
import pytest

from experiments import arms, suite, suite_tasks, table_tasks, task, tuning
from experiments.datasets import DATASETS

LAST = {arm: [*table_tasks.grid_of(arm)][-1] for arm in table_tasks.arms_of(0.4)}
TASKS = table_tasks.make(choices={name: LAST for name in table_tasks.grid()})


def names(tasks, half=None):
    return {t.config.data.name for t in tasks.values() if half in (None, t.half)}


def test_the_half_report_has_data_sets_that_no_task_used_before():
    report, development = (names(TASKS, half) for half in reversed(suite_tasks.HALVES))
    assert report == {"adult", "electricity", "satimage", "covertype", "heart"}
    used = names(suite_tasks.make("small"))
    large = {"letter", "magic", "marketing"}
    assert development == suite_tasks.TABLES.keys() | large and not report & (development | used)
    # Every task's name is of one suite.
    assert not TASKS.keys() & suite_tasks.make("small").keys()


def test_a_third_of_the_data_sets_has_a_transformer_too():
    of_network = {
        network: {t.config.data.name for t in TASKS.values() if t.config.model.name == name}
        for network, name in (("mlp", "mlp"), ("ft", "ft_transformer"))
    }
    assert of_network["mlp"] == names(TASKS) and of_network["ft"] == {*table_tasks.TRANSFORMED}
    assert round(len(of_network["mlp"]) / len(of_network["ft"])) == 3
    for half in suite_tasks.HALVES:
        assert of_network["ft"] & names(TASKS, half)


@pytest.mark.parametrize("name", ["heart_mlp", "adult_ft_40", "wdbc_ft", "segment_mlp_40"])
def test_every_arm_is_one_that_runs(name):
    t = TASKS[name]
    found = suite.configs(t, "")
    fitted = {"logistic", "boosted_trees", "boosted_trees_stopped"}
    of_noise = {"small_loss", "elr", "saflex_elr"} if t.noise else set()
    ours = {*arms.STANDING, *arms.SQUARED}
    assert {*found} == {*ours, *fitted, "early_stopping", *of_noise}
    assert {a for a, c in found.items() if c.model.name != t.config.model.name} == fitted
    assert {c.method.rule for a, c in found.items() if "saflex" in a} == {"saflex"}
    for config in found.values():
        assert config.train.val_batch_size <= config.data.val
        assert config.data.noise == t.noise
    assert found["logistic"].model.to_dict() == {"name": "logistic", "C": 1.0}
    trees = found["boosted_trees"], found["boosted_trees_stopped"]
    assert [c.data.train_on_val for c in trees] == [True, False]
    assert all(c.model.to_dict() == {"name": "boosted_trees", "leaves": 31} for c in trees)
    networks = {a: c for a, c in found.items() if a not in fitted}
    assert {c.optimizer.weight_decay for c in networks.values()} == {1.0}
    assert [a for a, c in networks.items() if c.train.keep_best] == ["early_stopping"]


def test_every_point_is_tried_on_other_seeds_and_on_as_many_samples_as_are_trusted():
    tried = table_tasks.grid()
    assert tried.keys() == TASKS.keys()
    for name in ("heart_mlp", "adult_ft_40"):
        of_task, final = tried[name], TASKS[name]
        assert of_task.config.seed == tuning.FIRST_SEED > final.config.seed + final.seeds
        assert of_task.config.data.select == final.config.data.val
        found = {arm.split(tuning.AT)[0] for arm in suite.configs(of_task, "")}
        assert found == {*suite.configs(final, "")}
    assert (
        tried["adult_mlp"].config.data.train == 3800 and tried["heart_mlp"].config.data.train == 0
    )
    seeds = {name: of_task.seeds for name, of_task in tried.items()}
    assert [seeds[name] for name in ("heart_mlp", "heart_mlp_20", "adult_ft")] == [5, 2, 2]
    config = tried["wdbc_mlp_40"].config
    made, final = task.make_data(config), task.make_data(TASKS["wdbc_mlp_40"].config)
    assert len(made.test.labels) == 113
    assert len(made.pools.candidates.labels) == len(final.pools.candidates.labels) - 113


def test_only_what_was_tuned_and_without_any_the_command_is_said():
    assert [*table_tasks.make(choices={"heart_mlp": LAST, "another": LAST})] == ["heart_mlp"]
    found = table_tasks.make(choices={"heart_mlp": {"upstream": "decay_1"}})["heart_mlp"]
    assert [*suite.configs(found, "")] == ["upstream"]
    with pytest.raises(ValueError, match="--suite=tables --tune"):
        table_tasks.make(choices={})


def test_the_data_of_a_task():
    for name in ("wdbc_mlp", "wdbc_mlp_40"):
        t = TASKS[name]
        made = task.make_data(t.config)
        assert made.wrong.mean() == pytest.approx(t.noise, abs=5e-3)
        assert len(made.held_out.labels) == t.config.data.val == 113
        assert len(made.test.labels) == 170


@pytest.mark.parametrize("name", table_tasks.DATA)
def test_the_splits_leave_enough_of_the_rows_to_train(name):
    section = TASKS[f"{name}_mlp"].config.data
    if name == "wdbc":
        return
    counts = DATASETS[name].counts
    rows = sum(counts.get("train", counts.get("all")))
    assert bool(section.test) != ("test" in counts)
    assert rows - section.val - section.test >= max(section.train, 50)
    assert section.val <= np.ceil(rows / 5)
