"""The suite: tasks, the order of jobs, what is kept, workers that fail or are killed."""

import itertools
import json
import math
import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest

from experiments import arms, json_lines, suite, suite_tasks, task
from experiments.configs import digits, wdbc
from experiments.suite import Job
from saflex_jax.train import StopRequest
from tests.train import process_

SMALL = suite_tasks.make("small")
RESULTS = process_.ROOT / "docs" / "results.jsonl"


@pytest.fixture(scope="module")
def small_configs():
    """Task -> arm -> config, of the small suite."""
    return {name: suite.configs(t, "") for name, t in SMALL.items()}


# --- tasks ---------------------------------------------------------------------------------------


def test_halves_hold_the_same_kinds_of_tasks():
    kinds = {}
    for half in suite_tasks.HALVES:
        found = [t for t in SMALL.values() if t.half == half]
        tables = [t for t in found if t.config.model.name == "mlp"]
        images = [t for t in found if t.config.model.name == "small_cnn"]
        assert len(tables) + len(images) == len(found)
        for group in (tables, images):
            assert any(t.noise == 0 for t in group) and any(t.noise >= 0.4 for t in group)
        kinds[half] = sorted((t.config.augment, t.noise) for t in tables)
    assert kinds["development"] == kinds["report"] and len(kinds["report"]) == 12
    halves = {}
    for t in SMALL.values():
        if t.config.model.name == "mlp":
            halves.setdefault(t.config.data.name, set()).add(t.half)
    assert len(halves) == 12 and all(len(found) == 1 for found in halves.values())


def test_the_small_suite_takes_a_little_over_two_hours_on_two_cores(small_configs):
    todo = suite.jobs(SMALL, small_configs, set())
    runs = {(job.task, arm): 0 for job in todo for arm in job.arms}
    for job in todo:
        for arm in job.arms:
            runs[job.task, arm] += len(job.seeds)

    def image(t):
        return t.config.model.name == "small_cnn"

    def judged(t):
        return 7 if t.half == "report" else 5

    def seeds(t, arm):
        return judged(t) if arm in suite_tasks.HEADLINE else 5

    assert runs == {
        (name, arm): seeds(t, arm) if image(t) else 10
        for name, t in SMALL.items()
        for arm in small_configs[name]
    }
    assert 1800 < suite.estimate(SMALL, todo) / 2 < 8000


@pytest.fixture(scope="module")
def full():
    """The tasks of the full suite."""
    return suite_tasks.make("full")


def test_every_task_has_every_arm_and_fits_its_data(small_configs, full):
    assert len(full) == 12 * 3 * 2 * 2 + len(suite_tasks.IMAGES)
    # Of the full suite's tables those of one kind are looked at.
    some = {n: t for n, t in full.items() if n in suite_tasks.IMAGES or n.startswith("wdbc")}
    pairs = [(t, small_configs[name]) for name, t in SMALL.items()]
    for t, found in [*pairs, *((t, arms.configs(t.config)) for t in some.values())]:
        more = {*suite_tasks.PROTOCOLS, "l2rw", "meta_weight_net", "label_smoothing", "bootstrap"}
        assert set(found) == {*arms.STANDING} or set(found) >= {*arms.STANDING, *more}
        assert (
            not t.noise
            or len(found) == len(arms.STANDING)
            or set(found) >= {"small_loss", "co_teaching"}
        )
        for config in found.values():
            section = config.data
            assert config.train.val_batch_size <= section.val
            # Half of a generator's bad samples come from outside, and the labels of some of these
            # are drawn anew, too, which makes them no worse.
            if not section.labels:
                wrong = 1 - (1 - section.noise) * (1 - section.outside)
                assert wrong == pytest.approx(t.noise)
        for arm in arms.STANDING:
            assert found[arm].method.rule == ("saflex" if "saflex" in arm else "as_given")
            assert found[arm].data.train_on_val == arm.endswith("train_val")
            assert found[arm].data.trusted_only == (arm == "trusted_only")


def test_all_samples_in_the_full_suite_but_where_they_are_few_on_purpose(full):
    kept = {n: full[n].config.data.per_class for n in suite_tasks.IMAGES}
    assert {n: k for n, k in kept.items() if k} == {
        "fashion_10": 10, "fashion_50": 50, "fashion_200": 200,
    }  # fmt: skip


def test_the_share_of_wrong_labels_is_that_of_the_data():
    for name in ("wdbc", "wdbc_noisy"):
        config = arms.of_seed(SMALL[name].config, 3)
        config.data.train_on_val = False
        assert task.make_data(config).wrong.mean() == pytest.approx(SMALL[name].noise, abs=5e-3)


def test_a_number_of_training_samples():
    config = wdbc.get_config()
    config.data.update({"train": 200, "noise": 0.0})
    rows = []
    for seed in (0, 1):
        data = task.make_data(arms.of_seed(config, seed))
        rows.append(data.pools.candidates.inputs)
        assert len(data.pools.candidates.labels) == 200
    whole = config.copy_and_resolve_references()
    whole.data.train = 0
    labels = task.make_data(arms.of_seed(whole, 0)).clean_labels
    assert labels.mean() == pytest.approx(0.63, abs=0.05)
    # At random and not the first ones, which are mostly of one class.
    assert task.make_data(arms.of_seed(config, 0)).clean_labels.mean() == pytest.approx(
        labels.mean(), abs=0.05
    )
    found = task.sample(np.arange(100, 400), 30, 0)
    assert np.array_equal(found, np.unique(found)) and found.min() >= 100 and found[-1] > 340
    assert not np.array_equal(found, task.sample(np.arange(100, 400), 30, 1))
    with pytest.raises(ValueError, match=r"config\.data\.train must be at most 300; given 301"):
        task.sample(np.arange(300), 301, 0)


# --- what is measured ----------------------------------------------------------------------------


def test_scores_by_hand():
    p = np.array([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.0, 1.0]], np.float32)
    labels = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    found = suite.scores(p, labels)
    assert found["accuracy"] == 0.5
    tiny = math.log(np.finfo(np.float32).tiny)
    loss = -(math.log(0.9) + math.log(0.05) + math.log(0.6) + tiny) / 4
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    # 15 bins: .9 is in (13/15, 14/15], .95 and 1 in the last, .6 = 9/15 in (8/15, 9/15].
    ece = (abs(1 - 0.9) + abs(0 + 0 - 0.95 - 1.0) + abs(1 - 0.6)) / 4
    assert found["ece"] == pytest.approx(ece, abs=1e-5)


def test_calibration_error_as_defined():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.4), size=400)
    y = rng.integers(5, size=400)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(400) if b / 15 < p[i].max() <= (b + 1) / 15]
        if inside:
            accuracy = np.mean([p[i].argmax() == y[i] for i in inside])
            confidence = np.mean([p[i].max() for i in inside])
            expected += len(inside) / 400 * abs(accuracy - confidence)
    found = suite.scores(p, np.eye(5)[y])
    assert found["ece"] == pytest.approx(expected, abs=1e-6) and expected > 0.1
    assert found["loss"] == pytest.approx(-np.log(p[np.arange(400), y]).mean(), abs=1e-6)


def test_validation_scores_are_of_the_validation_split_and_agree_with_the_evaluator():
    config = wdbc.get_config()
    config.model.widths = (4,)
    config.augment = "identity"
    config.method.rule = "as_given"
    config.train.update({"steps": 4, "log_every": 2, "batch_size": 16, "val_batch_size": 24})
    seen = []

    def measure(method, state, data):
        seen.append(task.test_scores(method, state, data))
        swapped = data._replace(test=data.held_out)
        seen.append(task.test_scores(method, state, swapped))
        return suite.measured(method, state, data)

    (found,) = arms.run({"x": config}, {}, progress=False, look=False, measure=measure).values()
    for split, expected in zip(("test", "val"), seen):
        for name in ("accuracy", "loss"):
            assert found[f"{split}_{name}"] == pytest.approx(expected[name], abs=2e-6)
    assert not any("eval/" in name for r in found["history"] for name in r)


# --- settings and files --------------------------------------------------------------------------


def test_the_hash_is_of_what_fixes_a_run():
    def changed(**changes):
        config = digits.get_config()
        config.update_from_flattened_dict(changes)
        return suite.settings_hash(config)

    same = changed()
    assert re.fullmatch("[0-9a-f]{12}", same)
    for name, value in {
        "method.l2rw.schedule.start": 5, "method.sla.mode": "da", "data.dir": "/elsewhere",
        "seed": 7,
    }.items():  # fmt: skip
        assert changed(**{name: value}) == same, name
    different = [
        changed(**{name: value})
        for name, value in {
            "method.saflex.rule.lookahead": 0.7, "method.rule": "l2rw", "data.noise": 0.1,
            "train.steps": 801, "augment": "flip", "model.widths": (16, 33), "method.loss": "ldam",
        }.items()
    ]  # fmt: skip
    assert len({same, *different}) == len(different) + 1
    # As if the field were not there: results outlive fields and options that are added.
    config = digits.get_config()
    del config.data["select"], config.method.saflex.rule["sharpness"]
    del config.method.saflex["schedule"], config.method["l2rw"]
    assert suite.settings_hash(config) == same != changed(**{"data.select": 5})
    assert same != changed(**{"method.saflex.schedule.every": 2})
    assert same != changed(**{"method.saflex.rule.noise_rate": 0.0})  # else it is estimated
    assert same != changed(**{"train.keep_best": True})
    del config.train["keep_best"]
    assert suite.settings_hash(config) == same
    # Of the method and of the rule.
    over = {"method.name": "sla"}
    assert changed(**over) != changed(**over, **{"method.saflex.rule.lookahead": 0.7})
    assert changed(**over) != changed(**over, **{"method.sla.mode": "da"})
    assert changed(**over) == changed(**over, **{"method.l2rw.schedule.start": 5})


def test_the_projects_own_results_count_as_finished(small_configs):
    """Where this fails an option moved: `--rehash`, or another default: run the arms again."""
    todays = {
        (name, arm): suite.settings_hash(config)
        for name, by_arm in small_configs.items()
        for arm, config in by_arm.items()
    }
    records = json_lines.read(RESULTS)
    assert records and {r["suite"] for r in records} == {"small"}
    assert all(r["settings"] == todays[r["task"], r["arm"]] for r in records)


def test_a_new_hash_is_that_of_an_arms_last_settings_and_nothing_else_changes(tmp_path, capsys):
    arm = suite.configs(SMALL["wdbc"], "^saflex$")["saflex"]
    last = {"suite": "small", "task": "wdbc", "arm": "saflex", "settings": "1" * 12}
    records = [
        last | {"seed": 0, "settings": "0" * 12},  # of other settings, before
        last | {"seed": 0, "note": "1" * 12, "x": 0.1 + 0.2},
        last | {"seed": 0, "suite": "full"},
        last | {"seed": 0, "arm": "gone"},
        last | {"seed": 1},
        last | {"seed": 0, "task": "pima", "arm": "upstream"},
    ]
    lines = [json.dumps(r) for r in records]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join([*lines, '{"half a li']))
    command = [f"--rehash={path}", "--tasks=^wdbc$"]
    assert suite.main(command) == 0
    assert "2 records with a new hash" in capsys.readouterr().err
    for number in (1, 4):
        of_settings = f'"settings": "{"1" * 12}"'
        assert of_settings in lines[number]
        new = f'"settings": "{suite.settings_hash(arm)}"'
        lines[number] = lines[number].replace(of_settings, new)
    assert path.read_text() == "\n".join([*lines, '{"half a li'])
    assert suite.main(command) == 0 and "0 records with a new hash" in capsys.readouterr().err
    assert path.read_text() == "\n".join([*lines, '{"half a li'])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    done = {(r["task"], r["arm"], r["seed"], r["settings"]) for r in json_lines.read(path)}
    task = {"wdbc": SMALL["wdbc"]._replace(seeds=3)}
    assert short(suite.jobs(task, {"wdbc": {"saflex": arm}}, done)) == [("wdbc", "saflex", (2,))]
    with pytest.raises(SystemExit):
        suite.main(["--rehash=nowhere", "--tasks=^wdbc$"])
    assert "--rehash must be a file of records; given nowhere" in capsys.readouterr().err


# --- jobs ----------------------------------------------------------------------------------------


def three_arms():
    """Two that share a training, and one."""
    config = digits.get_config()

    def sla(predict):
        return {"method": {"name": "sla", "sla": {"mode": "sla", "predict": predict}}}

    config.arms = {"plain": {"method": {"rule": "as_given"}}, "si": sla("single"),
                   "ag": sla("aggregated")}  # fmt: skip
    return config


TWO = {
    "one": suite_tasks.Task("report", 0.0, 5, 1.0, three_arms()),
    "two": suite_tasks.Task("report", 0.0, 2, 1.0, three_arms()),
}
FOUND = {name: suite.configs(t, "") for name, t in TWO.items()}


def short(found):
    return [(job.task, *job.arms, job.seeds) for job in found]


def test_first_seeds_of_all_tasks_come_first():
    assert short(suite.jobs(TWO, FOUND, set())) == [
        ("one", "plain", (0,)), ("one", "si", "ag", (0,)),
        ("two", "plain", (0,)), ("two", "si", "ag", (0,)),
        ("one", "plain", (1, 2)), ("one", "si", "ag", (1, 2)),
        ("two", "plain", (1,)), ("two", "si", "ag", (1,)),
        ("one", "plain", (3, 4)), ("one", "si", "ag", (3, 4)),
    ]  # fmt: skip


def test_what_is_done_with_the_same_settings_is_not_done_again():
    every = {
        (name, arm, seed, suite.settings_hash(config))
        for name, t in TWO.items()
        for arm, config in FOUND[name].items()
        for seed in range(t.seeds)
    }
    assert suite.jobs(TWO, FOUND, every) == []
    (hash_of_si,) = {h for _, arm, _, h in every if arm == "si"}
    again = {("one", "si", 1, hash_of_si), ("one", "plain", 4, "another")}
    left = suite.jobs(TWO, FOUND, every - again)
    assert short(left) == [("one", "si", (1,))]
    # Another's settings are no settings.
    other = {(n, a, s, "0" * 12) for n, a, s, _ in every}
    assert short(suite.jobs(TWO, FOUND, other)) == short(suite.jobs(TWO, FOUND, set()))


def test_what_sweeps_has_one_job_in_the_first_pass():
    config = wdbc.get_config()
    plain = {"method": {"rule": "as_given"}}
    config.arms = {"plain": plain, "decay": plain | {"optimizer": {"weight_decay": 1.0}},
                   "wide": plain | {"model": {"widths": (9,)}}}  # fmt: skip
    images = TWO["one"]._replace(seeds=2)
    tasks = {"table": suite_tasks.Task("report", 0.0, 5, 1.0, config), "images": images}
    found = {name: suite.configs(t, "") for name, t in tasks.items()}
    todo = suite.jobs(tasks, found, set())
    assert short(todo) == [
        ("table", "plain", "decay", (0, 1, 2, 3, 4)), ("table", "wide", (0, 1, 2, 3, 4)),
        ("images", "plain", (0,)), ("images", "si", "ag", (0,)),
        ("images", "plain", (1,)), ("images", "si", "ag", (1,)),
    ]  # fmt: skip
    assert [job.parts for job in todo[:4:3]] == [
        [(seed, (arm,)) for seed in range(5) for arm in ("plain", "decay")], [(0, ("si", "ag"))],
    ]  # fmt: skip
    done = {("table", "plain", 3, suite.settings_hash(found["table"]["plain"]))}
    assert short(suite.jobs(tasks, found, done))[:2] == [
        ("table", "plain", "decay", (0, 1, 2, 4)), ("table", "decay", (3,)),
    ]  # fmt: skip


def test_selections():
    chosen = suite.select(SMALL, half="report", names="^german|fashion_10", seeds=3)
    assert {n: t.seeds for n, t in chosen.items()} == {
        "german": 3, "german_noisy": 3, "fashion_10": 3,
    }  # fmt: skip
    assert suite.select(SMALL, half="development", names="^german", seeds=None) == {}
    assert {t.seeds for t in suite.select(SMALL, half=None, names="", seeds=7).values()} == {5, 7}
    three = suite.select(SMALL, half=None, names="fashion_10", seeds=3)["fashion_10"]
    assert three.seeds_of("upstream") == three.seeds_of("l2rw") == 3
    assert list(suite.configs(TWO["one"], "si|plain")) == ["plain", "si"]


def test_cores_are_shared_out():
    assert suite.share([4, 1, 2, 7, 9], 2) == [{1, 4, 9}, {2, 7}]
    assert suite.share([3], 2) == [{3}, {3}]
    assert suite.share([], 2) == [set(), set()]


# --- workers -------------------------------------------------------------------------------------


class Thread(threading.Thread):
    """A worker in this process; `Dies` ends it as SIGKILL ends a process."""

    exitcode = -9

    def __init__(self, target, args):
        super().__init__(daemon=True)
        self._work, self._of_work = target, args

    def run(self):
        connection, _ = self._of_work
        try:
            self._work(*self._of_work)
        except (Dies, OSError):
            pass
        connection.really_close()

    def kill(self):
        pass


class Dies(BaseException):
    pass


class Theirs:
    """The worker's end, which the parent must not close in one and the same process."""

    def __init__(self, connection):
        self.recv, self.send, self.really_close = (
            connection.recv, connection.send, connection.close,
        )  # fmt: skip

    def close(self):
        pass


class Context:
    Process = Thread

    @staticmethod
    def Pipe():
        ours, theirs = multiprocessing.Pipe()
        return ours, Theirs(theirs)


class Given(NamedTuple):
    """What stands for the config of a run."""

    config: int
    seed: int


HISTORY = {"history": [{"step": 50, "kept": 0.9, "loss": 1.0, "grad_norm": 2.0}]}


@pytest.fixture
def in_threads(monkeypatch):
    """`suite.run` on threads; the test says what a run returns."""
    monkeypatch.setattr(suite.multiprocessing, "get_context", lambda kind: Context)
    monkeypatch.setattr(suite.os, "setsid", lambda: None)
    monkeypatch.setattr(suite.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(suite.arms, "of_seed", Given)
    monkeypatch.setattr(suite.arms, "trainings", lambda configs: [configs])
    monkeypatch.setattr(suite.arms, "sweeps", lambda config: False)

    def start(behave, todo, workers, stop=None, heard=lambda: None):
        def fake(of_seed, compiled, **options):
            assert options["look"] is False and options["measure"] is suite.measured
            return {arm: HISTORY | behave(arm, *given) for arm, given in of_seed.items()}

        monkeypatch.setattr(suite.arms, "run", fake)
        found, failed = [], []

        def record(job, seed, records):
            short = {"history": [{"step": 50, "kept": 0.9}]}
            assert all(r.items() >= short.items() for r in records.values())
            records = {a: {k: r[k] for k in r.keys() - short} for a, r in records.items()}
            found.append((job.task, seed, records))
            heard()

        suite.run(
            todo,
            workers=workers,
            stop=stop or StopRequest(),
            record=record,
            fail=lambda job, seed, error: failed.append((job.task, seed, error)),
        )
        return found, failed

    return start


def test_one_worker_keeps_the_order_and_records_are_small(in_threads):
    todo = [Job("a", {"x": 1, "y": 2}, (0, 1)), Job("b", {"x": 3}, (5,))]
    found, failed = in_threads(lambda arm, config, seed: {"v": config}, todo, 1)
    both = {"x": {"v": 1}, "y": {"v": 2}}
    assert found == [("a", 0, both), ("a", 1, both), ("b", 5, {"x": {"v": 3}})]
    assert failed == []


def test_a_run_that_fails_leaves_the_others(in_threads):
    def behave(arm, config, seed):
        if (config, seed) == (1, 1):
            raise ValueError("told to")
        if config == 2 and seed == 3:
            raise Dies
        return {}

    todo = [Job("fails", {"x": 1}, (0, 1, 2)), Job("dies", {"x": 2}, (2, 3, 4)),
            *(Job(f"more {n}", {"x": 3}, (0,)) for n in range(3))]  # fmt: skip
    for workers in (1, 2, 9):
        found, failed = in_threads(behave, todo, workers)
        assert sorted(found) == [("dies", 2, {"x": {}}), ("fails", 0, {"x": {}}),
                                 ("fails", 2, {"x": {}}),
                                 *((f"more {n}", 0, {"x": {}}) for n in range(3))]  # fmt: skip
        told, *died = sorted(failed, key=lambda f: f[0] == "dies")
        assert told[:2] == ("fails", 1)
        assert "ValueError: told to" in told[2] and "Traceback" in told[2]
        assert [f[:2] for f in died] == [("dies", 3), ("dies", 4)]
        assert "ended with -9" in died[0][2]


def test_a_signal_loses_nothing_that_was_finished(in_threads, monkeypatch):
    stop, asked, killed = StopRequest(), threading.Event(), threading.Event()
    monkeypatch.setattr(Thread, "kill", lambda self: killed.set())

    def behave(arm, config, seed):
        if seed == 3:
            stop.signal = signal.SIGTERM
            asked.set()
            killed.wait(60)
        return {"v": seed}

    # The parent writes the first record while the others are finished and the signal comes.
    def hear():
        return asked.wait(60)

    found, failed = in_threads(behave, [Job("a", {"x": 0}, tuple(range(10)))], 1, stop, hear)
    assert [seed for _, seed, _ in found] == [0, 1, 2] and failed == []


def test_workers_that_end_with_the_same_signal_have_not_failed(in_threads):
    stop = StopRequest()

    def behave(arm, config, seed):
        if (config, seed) in ((0, 1), (1, 0)):
            stop.signal = signal.SIGTERM
            raise Dies if config == 0 else RuntimeError
        return {}

    todo = [Job("a", {"x": 0}, (0, 1, 2)), Job("b", {"x": 1}, (0, 1)), Job("c", {"x": 2}, (0,))]
    for workers in (1, 2):
        stop.signal = None
        found, failed = in_threads(behave, todo, workers, stop)
        assert failed == [] and all(task in "ab" for task, _, _ in found)


# --- the command ---------------------------------------------------------------------------------


def test_dry_run_says_what_is_left(tmp_path, capsys):
    given = ["--dry_run", "--tasks=^wdbc$", "--seeds=3", f"--workdir={tmp_path}"]
    assert suite.main([*given, "--arms=^upstream|^saflex$", "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^wdbc +development +0\.00 +113 +400 +9 ", out, re.M)
    assert "1 tasks, 9 runs left, estimated time with 2 CPU core(s): 0.0 h" in out
    config = suite.configs(SMALL["wdbc"], "")["saflex"]
    done = {"task": "wdbc", "arm": "saflex", "seed": 2, "settings": suite.settings_hash(config)}
    json_lines.append(tmp_path / "small.jsonl", done)
    suite.main([*given, "--arms=^saflex$"])
    assert "1 tasks, 2 runs left" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"small.jsonl"}  # nothing is run


@pytest.mark.parametrize(
    "given, message",
    [
        (["--jobs=0"], "--jobs and --seeds must be >= 1; given 0 and None"),
        (["--tasks=nonsense"], "nothing matches --tasks='nonsense'"),
        (["--tasks=["], "--tasks must be a regular expression; given '[': unterminated"),
        (["--arms=("], "--arms must be a regular expression; given '(': missing )"),
        (["--half=both"], "invalid choice: 'both'"),
        (["--tasks=generator_20|usps|wdbc", "--data=nowhere"],
         "experiments.prepare --out=nowhere fashion_mnist mnist usps"),
    ],
)  # fmt: skip
def test_bad_commands_are_refused(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as error:
        suite.main([*given, f"--workdir={tmp_path / 'out'}"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_and_resumed_every_run_is_made_once(tmp_path):
    """Two tasks, one that fails; SIGTERM, then SIGKILL in the middle of a line, then to the end."""
    broken, workdir = tmp_path / "data" / "pima", tmp_path / "runs"
    broken.mkdir(parents=True)
    (broken / "dataset.json").write_text("{}")
    results, errors = workdir / "small.jsonl", workdir / "errors.jsonl"
    command = [sys.executable, "-m", "experiments.suite", "--tasks=^wdbc|^pima$", "--seeds=2",
               "--arms=^upstream$|^saflex$", "--jobs=2", f"--workdir={workdir}",
               f"--data={tmp_path / 'data'}"]  # fmt: skip

    def lines():
        return results.read_bytes().count(b"\n") if results.exists() else 0

    def start():
        return subprocess.Popen(
            command,
            cwd=process_.ROOT,
            env=process_.environment(),
            text=True,
            stderr=subprocess.PIPE,
        )

    kept = b""
    for number, more in ((signal.SIGTERM, 1), (signal.SIGKILL, 1)):
        before, job = lines(), start()
        deadline = time.monotonic() + process_.LIMIT
        while lines() < before + more and time.monotonic() < deadline:
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.02)
        job.send_signal(number)
        stderr = job.communicate(timeout=process_.LIMIT)[1]
        if number == signal.SIGTERM:
            assert job.returncode == 128 + 15, stderr
            assert "the same command continues" in stderr
        now = results.read_bytes()
        assert now.startswith(kept) and now.endswith(b"\n")
        kept = now
    with results.open("ab") as file:
        file.write(b'{"suite": "sm')
    job = start()
    stderr = job.communicate(timeout=process_.LIMIT)[1]
    assert job.returncode == 1, stderr
    assert results.read_bytes().startswith(kept)
    records = json_lines.read(results)
    made = sorted((r["task"], r["arm"], r["seed"]) for r in records)
    assert made == sorted(itertools.product(["wdbc", "wdbc_noisy"], ["saflex", "upstream"], [0, 1]))
    failed = [json.loads(line) for line in errors.read_text().splitlines()]
    assert {r["task"] for r in failed} == {"pima"} and len(failed) == 4
    assert all("Traceback" in r["error"] for r in failed)
    for r in records:
        assert 0.5 < r["test_accuracy"] <= 1 and 0.5 < r["val_accuracy"] <= 1
        assert r["seconds_per_step"] > 0 and r["half"] == "development"
        assert [h["step"] for h in r["history"]] == [50 * (n + 1) for n in range(8)]
        learned = {"kept", "relabelled", "noise_rate"} if r["arm"] == "saflex" else set()
        assert all(h.keys() == {"step", *learned} for h in r["history"])
        assert r["versions"].keys() == {*suite.PACKAGES} and r["date"].endswith("+00:00")
        assert r["settings"] == suite.settings_hash(suite.configs(SMALL[r["task"]], "")[r["arm"]])
        assert r["noise"] == SMALL[r["task"]].noise and r["val"] == 113
    job = subprocess.run([*command, "--tasks=^wdbc"], cwd=process_.ROOT, timeout=process_.LIMIT,
                         env=process_.environment())  # fmt: skip
    assert job.returncode == 0 and json_lines.read(results) == records and not errors.exists()
