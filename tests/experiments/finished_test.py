"""What is read off a finished run: tables of candidates and their provenance, predictions."""

import json

import numpy as np
import pytest

from experiments import audit, build, export, finished, generating, pool_files, predict, task
from experiments.configs import digits, wdbc
from experiments.generators import Options
from saflex_jax import train
from saflex_jax.core.targets import prior_targets
from saflex_jax.rules import RULES
from tests.experiments.runs_ import finish, read

PROMPTS = ("color", "wrong class")
PER_CLASS, VAL, DRAWS = 4, 20, 2
REAL, MADE = 10 * PER_CLASS, DRAWS * (10 * PER_CLASS + VAL)
SIZE = REAL + MADE + VAL


def changed(pool="", **fields):
    config = digits.get_config()
    config.data.update({"per_class": PER_CLASS, "val": VAL, "test": 50, "noise": 0.0})
    config.data.update({"train_on_val": True, "pool": str(pool), "pool_rows": bool(pool)})
    config.train.update({"steps": 40, "batch_size": 32, "log_every": 20, "checkpoint_every": 20})
    config.augment = "shift(1)"
    config.unlock()
    config.model = {"name": "mlp", "widths": (16,)}
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on digits and a pool of edits, as `experiments.main` leaves it."""
    folder = tmp_path_factory.mktemp("finished")
    pool, run = folder / "pool", folder / "run"
    plan = generating.Plan("edits", Options(), PROMPTS, (0.3, 0.7), DRAWS, 7.5, 50, 0)
    generating.make_plan(plan, changed(), [0], pool)
    generating.run(pool, progress=False)
    config = changed(pool)
    return finish(config, run, every=20)


def test_an_exported_table_has_every_candidate_with_where_it_comes_from(workdir, tmp_path, capsys):
    file = tmp_path / "all.csv"
    export.main([f"--workdir={workdir}", "--step=20", f"--out={file}"])
    assert capsys.readouterr().out.strip() == str(file)
    rows = read(file)
    assert len(rows) == SIZE and [row["row"] for row in rows] == list(map(str, range(SIZE)))
    assert [row["trusted"] for row in rows] == ["0"] * (REAL + MADE) + ["1"] * VAL
    planned = {row["file_name"]: row for row in pool_files.read_plan(workdir.parent / "pool")[1]}
    made = rows[REAL : REAL + MADE]
    assert len({row["file"] for row in made}) == MADE
    for row in made:
        record = planned[row["file"]]
        assert row["prompt"] == record["prompt"] and row["given"] == str(record["label"])
        assert float(row["strength"]) == pytest.approx(record["strength"])
        assert row["bad"] == str(int(record["prompt"] == "wrong class"))
    # A candidate's source is a row of the table; the pool knows rows of the data set.
    trained = task.trained_rows(changed().data, task.make_split_source(changed())[2])
    rows_of_set = np.full(SIZE, -1)
    rows_of_set[:REAL], rows_of_set[REAL + MADE :] = trained[:REAL], trained[REAL:]
    for row in made:
        assert rows_of_set[int(row["source"])] == planned[row["file"]]["source"]
    assert [row["source"] for row in rows[:REAL]] == list(map(str, range(REAL)))


def test_a_folders_own_files_stay_beside_those_of_a_pool(workdir):
    run = finished.opened(workdir)
    names = np.array([f"c/{row}.png" for row in range(len(run.data.source.labels))])
    source = run.data.source._replace(extra={"file": names})
    table = finished.columns(run._replace(data=run.data._replace(source=source)))
    real, pool = run.data.rows >= 0, {row["file_name"] for row in pool_files.read_plan(
        workdir.parent / "pool")[1]}  # fmt: skip
    assert table["file"][real].tolist() == names[run.data.rows[real]].tolist()
    assert real.sum() == REAL + VAL and set(table["file"][~real].tolist()) <= pool


def test_an_audit_of_a_run_groups_by_prompt_and_draws_its_images(workdir, tmp_path):
    pytest.importorskip("jinja2")
    audit.main([f"--workdir={workdir}", f"--out={tmp_path}"])
    rows = read(tmp_path / "audit.csv")
    assert len(rows) == 2 * SIZE and {row["draw"] for row in rows} == {"0", "1"}
    assert {row["prompt"] for row in rows} == {"", *PROMPTS}
    assert all(row["operations"].startswith("shift") for row in rows)
    page = (tmp_path / "audit.html").read_text()
    for text in ("wrong class @ 0.7", "By operation and magnitude", "data:image/png", "bad"):
        assert text in page


def test_predictions_score_as_the_run_did(workdir, tmp_path):
    predict.main([f"--workdir={workdir}", "--source=digits", f"--out={tmp_path / 'p.csv'}"])
    rows = read(tmp_path / "p.csv")
    probs = np.array([[float(row[f"p{k}"]) for k in range(10)] for row in rows])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-4)
    predicted, label = (np.array([int(row[name]) for row in rows])
                        for name in ("predicted", "label"))  # fmt: skip
    np.testing.assert_array_equal(predicted, probs.argmax(1))
    run = finished.opened(workdir)
    _, _, split, _ = task.make_split_source(run.config)
    scored = task.test_scores(run.method, run.state, run.data)["accuracy"]
    assert np.mean((predicted == label)[split.test]) == pytest.approx(scored, abs=1e-6)
    assert len(set(predicted)) > 1


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (export, ["--step=7"], "7"),
        (export, ["--draws=0"], "draws must be a whole number >= 1; given 0"),
        (predict, ["--source=digit"], "digit is not prepared|must be"),
        (predict, ["--source={other}"], r"inputs of shape \[8, 8, 1\], as the run's"),
        (predict, ["--source=digits", "--step=7"], "7"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(workdir, tmp_path, program, options, message):
    other = tmp_path / "other.npz"
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.zeros((10, 6, 6), np.uint8)
        arrays[f"{split}_labels"] = np.arange(10)[:, None] % 2
    np.savez(other, **arrays)
    options = [option.format(other=other) for option in options]
    with pytest.raises((ValueError, train.CheckpointError), match=message):
        program.main([f"--workdir={workdir}", f"--out={tmp_path / 'out.csv'}", *options])
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"data.unlabelled": True}, "labels to judge; given one of unlabelled=True"),
        ({"data.cleaning": "audit"}, "labels as given to judge; given one of cleaning='audit'"),
    ],
)
def test_labels_that_a_run_did_not_see_are_not_judged(field, message):
    with pytest.raises(ValueError, match=message):
        finished.columns(finished.Run(changed(**field), None, None, None))


def test_a_run_that_its_training_samples_direct_is_looked_at_by_these(monkeypatch):
    """The held-out samples, which its steps never read, give the utility alone."""
    config = changed(**{"data.train_on_val": False, "data.val_from": "train"})
    made, directed = task.make_data(config), []
    method = build.make_method(config, made.pools)
    state = build.init_state(config, method, made.pools)
    targets = prior_targets(made.pools.candidates.labels, np.ones(REAL, bool))
    method = method._replace(targets=lambda _, streams: directed.append(streams.val) or targets)
    monkeypatch.setattr(finished, "DIRECTING", 9, raising=False)
    monkeypatch.setattr(finished, "BATCH", REAL)
    (found,) = finished.look(finished.Run(config, made, method, state))
    (val,), rows = directed, [0, 4, 9, 14, 19, 24, 29, 34, 39]
    assert val.index.tolist() == rows and len(found.utility) == REAL
    np.testing.assert_array_equal(val.labels, made.pools.candidates.labels[rows])


def test_only_a_rule_that_learns_a_posterior_judges_labels(monkeypatch):
    config = wdbc.get_config()
    made = task.make_data(config)
    given = made.pools.candidates.labels
    targets = prior_targets(given, np.ones(len(given), bool))
    unlike = np.roll(given, 1, 1)[: len(given) // 2]  # what the network believes of one half
    everything = finished.Looked(
        targets, np.zeros(len(given)), np.concatenate([unlike, given[len(unlike) :]]),
        np.full(len(given), -1), *np.zeros((2, len(given), 0), int),
    )  # fmt: skip

    def verdict(rule):
        config.method.rule = rule
        doubt = targets._replace(utility=np.where(np.arange(len(given)) < 9, -0.5, 0.5))
        looked = everything._replace(targets=doubt if rule == "saflex" else targets)
        monkeypatch.setattr(finished, "look", lambda run, draws: [looked] * draws)
        return audit.verdict(finished.columns(finished.Run(config, made, None, None)))

    of_all = f"of {len(given)} labels are"
    assert f"9 {of_all} more likely wrong than right, by the rule" in verdict("saflex")
    for rule in set(RULES) - {"saflex"}:
        assert f"{len(unlike)} {of_all} not what the network believes; the rule" in verdict(rule)


def test_a_file_of_ones_own_is_asked_for_and_registers(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "mine", RULES["as_given"])
    config = wdbc.get_config()
    config.method.rule = "mine"
    (tmp_path / "result.json").write_text(json.dumps({"config": json.loads(config.to_json())}))
    monkeypatch.delitem(RULES, "mine")
    with pytest.raises(ValueError, match=r"'mine'.*; if a file of yours registers it, say --conf"):
        finished.read_config(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text("from saflex_jax.rules import RULES\nRULES['mine'] = RULES['as_given']\n")
    for program, options in ((export, []), (audit, []), (predict, ["--source=digits"])):
        RULES.pop("mine", None)
        with pytest.raises(ValueError, match="--workdir must be of a finished run"):
            program.main([f"--workdir={tmp_path / 'none'}", f"--config={file}", *options])
        assert finished.read_config(tmp_path).method.rule == "mine"
    with pytest.raises(ValueError, match="--config must be a Python file; given digits"):
        export.main([f"--workdir={tmp_path}", "--config=digits"])


@pytest.mark.parametrize(
    ("program", "option", "message"),
    [
        (export, "--out=x.txt", r"suffix of a table must be one of .*; given '.txt'"),
        (predict, "--out=x", r"suffix of a table must be one of .*; given ''"),
        (export, "--draws=0", "--draws must be a whole number >= 1; given 0"),
        (audit, "--draws=0", "--draws must be a whole number >= 1; given 0"),
    ],
)
def test_options_are_looked_at_before_the_run(tmp_path, program, option, message):
    options = [f"--workdir={tmp_path / 'none'}", option]
    with pytest.raises(ValueError, match=message):
        program.main([*options, "--source=digits"] if program is predict else options)


def test_a_run_of_episodes_is_refused_by_name(tmp_path):
    config = digits.get_config()
    config.method.update({"name": "protonet", "rule": "as_given"})
    (tmp_path / "result.json").write_text(json.dumps({"config": json.loads(config.to_json())}))
    with pytest.raises(ValueError, match=r"--workdir must be of a method with .* of protonet"):
        finished.read_config(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    for program, options in ((export, []), (predict, ["--source=digits"])):
        with pytest.raises(ValueError, match="--workdir must be of a finished run"):
            program.main([f"--workdir={tmp_path}", *options])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
