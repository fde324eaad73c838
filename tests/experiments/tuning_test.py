"""Options by a grid: what is chosen, from which samples, and how it is kept."""

import json
import os

import numpy as np
import pytest

from experiments import arms, suite, suite_tasks, task, tuning
from experiments.configs import sources, wdbc


def of_npz(tmp_path, *, poison=False):
    """A task on a file with an official test split, which may be nonsense."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    images = rng.integers(0, 200, size=(400, 4, 4)) + 50 * labels[:, None, None]
    test, test_labels = images[350:], labels[350:]
    if poison:
        test, test_labels = rng.integers(0, 2, size=(50, 4, 4)), 1 - test_labels
    arrays = {
        "train": (images[:300], labels[:300]), "val": (images[300:350], labels[300:350]),
        "test": (test, test_labels),
    }  # fmt: skip
    path = tmp_path / f"{poison}.npz"
    np.savez(
        path,
        **{f"{split}_images": x.astype(np.uint8) for split, (x, _) in arrays.items()},
        **{f"{split}_labels": y[:, None] for split, (_, y) in arrays.items()},
    )
    config = wdbc.get_config()
    config.data = sources.section(str(path), val=20, noise=0.3)
    config.augment = "identity"
    config.model = {"name": "mlp", "widths": (4,)}
    config.train.update({"steps": 4, "log_every": 2, "batch_size": 16, "val_batch_size": 16})
    config.arms = {"upstream": {"method": {"rule": "as_given"}}}
    return suite_tasks.Task("report", 0.3, 5, None, config)


def test_the_choice_cannot_see_the_test_split(tmp_path):
    found = []
    for poison in (False, True):
        tuned = tuning.on_trusted_samples(of_npz(tmp_path, poison=poison), 200)
        (config,) = suite.configs(tuned, "").values()
        assert config.data.select == 200 and tuned.seeds == 2
        data = task.make_data(config)
        # Training samples with right labels, none of which trains or directs.
        assert len(data.test.labels) == 200 and len(data.pools.candidates.labels) == 80
        (record,) = arms.run({"x": config}, {}, progress=False, look=False,
                             measure=suite.measured).values()  # fmt: skip
        found.append({k: v for k, v in record.items() if k.startswith(("test_", "val_"))})
        with np.load(config.data.name) as file:
            right = dict(zip(map(bytes, file["train_images"]), file["train_labels"][:, 0]))
        shown = [right[bytes(image)] for image in np.asarray(data.test.inputs)]
        assert np.array_equal(data.test.labels.argmax(1), shown)
    assert found[0] == found[1] and len(found[0]) == 6
    # Without the choice the same run does see it.
    seen = []
    for poison in (False, True):
        (config,) = suite.configs(of_npz(tmp_path, poison=poison), "").values()
        (record,) = arms.run({"x": config}, {}, progress=False, look=False,
                             measure=suite.measured).values()  # fmt: skip
        seen.append(record["test_accuracy"])
    assert seen[0] != seen[1]


def test_seeds_and_samples_to_choose_on(tmp_path):
    given = of_npz(tmp_path)
    for found, samples, seeds in (
        (tuning.on_trusted_samples(given, 20), 20, [100, 101]),
        (tuning.on_trusted_samples(given, 200, 3), 200, [100, 101, 102]),
    ):
        assert found.config.data.select == samples and given.config.data.select == 0
        assert found.config.seed == tuning.FIRST_SEED >= given.seeds
        jobs = suite.jobs({"t": found}, {"t": {"upstream": found.config}}, set())
        assert [seed for job in jobs for seed in job.seeds] == seeds


def test_the_best_point_is_chosen_and_the_first_of_level_ones():
    names = {"t": ["a@1", "a@2", "a@3", "b@1", "b@2"], "u": ["a@1"]}
    accuracies = {
        ("t", "a@1"): [0.5, 0.6], ("t", "a@2"): [0.6, 0.7], ("t", "a@3"): [0.7, 0.6],
        ("t", "b@1"): [0.9, 0.9], ("t", "b@2"): [0.9],  # one run is missing
        ("u", "a@1"): [0.1, 0.1],
    }  # fmt: skip
    seeds = {"t": 2, "u": 2}
    assert tuning.choose(names, accuracies, seeds) == {"t": {"a": "2"}, "u": {"a": "1"}}
    assert tuning.choose(names, accuracies, {"t": 2, "u": 3}) == {"t": {"a": "2"}}
    assert tuning.choose({}, {}, {}) == {}


def test_no_choice_is_made_by_fewer_seeds(tmp_path, monkeypatch):
    given = tuning.on_trusted_samples(of_npz(tmp_path), 20)
    points = {n: {"optimizer": {"weight_decay": float(n)}} for n in ("1", "2")}
    given.config.arms = tuning.every_arm({"upstream": {}}, lambda arm: points)

    def run(todo, *, record, **_):
        for job in todo:
            for seed in job.seeds:
                record(job, seed, {arm: {"test_accuracy": float(arm[-1])} for arm in job.arms})

    monkeypatch.setattr(os, "environ", {**os.environ})  # the command sets some for its workers
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setitem(suite.TUNED, "pretrained", lambda folder: {"t": given})
    monkeypatch.setattr(tuning, "CHOICES", tmp_path / "tuned.json")
    command = ["--suite=pretrained", "--tune", f"--workdir={tmp_path / 'runs'}"]
    assert suite.main([*command, "--seeds=1"]) == 0 and tuning.read() == {}
    assert suite.main(command) == 0 and tuning.read() == {"t": {"upstream": "2"}}


def test_choices_are_kept_in_one_piece_and_added_to(tmp_path):
    path = tmp_path / "tuned.json"
    assert tuning.read(path) == {}
    tuning.write({"t": {"a": "1", "b": "2"}}, path)
    tuning.write({"t": {"b": "3"}, "u": {"a": "1"}}, path)
    assert tuning.read(path) == {"t": {"a": "1", "b": "3"}, "u": {"a": "1"}}
    assert json.loads(path.read_text()) == tuning.read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


def test_arms_at_points():
    grid = {"1": {"optimizer": {"weight_decay": 1.0}}, "2": {"optimizer": {"weight_decay": 2.0}}}
    given = {"a": {"data": {"val": 5}, "optimizer": {"learning_rate": 0.1}}, "b": {}}
    found = tuning.chosen_arms(given, lambda arm: grid, {"a": "2", "b": "1", "another": "1"})
    assert found == {
        "a": {"data": {"val": 5}, "optimizer": {"learning_rate": 0.1, "weight_decay": 2.0}},
        "b": grid["1"],
    }
    every = tuning.every_arm(given, lambda arm: grid)
    assert list(every) == ["a@1", "a@2", "b@1", "b@2"] and every["a@2"] == found["a"]
    assert tuning.chosen_arms(given, lambda arm: grid, {"b": "1"}) == {"b": grid["1"]}
    with pytest.raises(ValueError, match=r"tuned.json: a must be one of \['1', '2'\]; given '3'"):
        tuning.chosen_arms(given, lambda arm: grid, {"a": "3", "b": "1"})
