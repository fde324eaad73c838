"""Arms of a comparison: their configs, what they share, and what is said of them."""

import importlib
import json
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import arms, build, figures, task
from experiments.configs import digits, wdbc
from saflex_jax.types import Batch, Streams
from tests.train import process_

FOLDER = process_.ROOT / "experiments" / "configs"


def tiny(**changes):
    """A config of images that compiles quickly."""
    config = digits.get_config()
    config.data.update({"val": 24, "test": 200})  # of 8 devices
    config.augment = "shift(1)"
    config.model.widths = (4,)
    config.train.update({"steps": 6, "log_every": 3, "batch_size": 16})
    config.update(changes)
    return config


def as_settings(text):
    """A config's fields without those that came later and are off: results outlive them."""
    plain = json.loads(text)
    assert plain["train"].pop("keep_best") is False
    assert not any(plain["data"].pop(name) for name in build.LATER)
    return plain


def of_sla(predict, **options):
    section = {"mode": "sla", "predict": predict, **options}
    return {"method": {"name": "sla", "rule": "as_given", "sla": section}}


# --- configs -------------------------------------------------------------------------------------


def test_arms_are_changes_of_the_config_in_the_order_written():
    changes = {
        "second": {"augment": "flip(0.5)"},
        "first": {"method": {"rule": "as_given"}, "model": {"widths": [5, 6]}},
        "a": {"method": {"saflex": {"rule": {"sharpness": 1, "memory": {"decay": 0.5}}}}},
    }
    config = tiny(arms=changes)
    before = config.to_json()
    config.lock()  # as the command line leaves it
    found = arms.configs(config)
    assert list(found) == list(changes)
    assert config.to_json() == before
    # All fields but those named are the config's; a number becomes one of the field's kind.
    plain = as_settings(before)
    for arm, changed in {
        "second": plain | {"augment": "flip(0.5)"},
        "first": plain
        | {"method": plain["method"] | {"rule": "as_given"}}
        | {"model": plain["model"] | {"widths": [5, 6]}},
    }.items():
        assert build.settings(found[arm]) == {k: v for k, v in changed.items() if k != "arms"}
    assert found["first"].model.widths == (5, 6)
    rule = found["a"].method.saflex.rule
    assert rule.memory.decay == 0.5 and isinstance(rule.sharpness, float)
    assert config.method.saflex.rule.memory.decay == 0.97


def test_without_arms_there_are_the_five():
    for config in (tiny(), tiny(arms={})):
        found = [
            (arm, c.method.rule, c.data.train_on_val, c.data.trusted_only)
            for arm, c in arms.configs(config).items()
        ]
        assert found == [
            ("upstream", "as_given", False, False),
            ("upstream_train_val", "as_given", True, False),
            ("trusted_only", "as_given", False, True),
            ("saflex", "saflex", False, False),
            ("saflex_train_val", "saflex", True, False),
        ]
    config = tiny()
    config.method.name = "sla"
    of_upstream, of_saflex = (arms.configs(config)[arm].method for arm in ("upstream", "saflex"))
    assert (of_upstream.name, of_upstream.rule) == ("supervised", "as_given")
    assert (of_saflex.name, of_saflex.rule) == ("sla", "saflex")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trian": {}}, r"config has no field 'trian'; did you mean 'train'\?"),
        ({"method": {"nam": "sla"}}, r"config.method has no field 'nam'; did you mean 'name'\?"),
        ({"method": {"sla": {"mod": "da"}}}, r"config.method.sla .*did you mean 'mode'\?"),
        ({"data": {"nois": 0.1}}, r"config.data has no field 'nois'; did you mean 'noise'\?"),
        ({"method": {"name": "madaug"}}, "rule must be 'as_given' with madaug; given 'saflex'"),
        ({"seed": 3}, "all arms run on the comparison's seeds"),
        ({"train": {"steps": "many"}}, "many is of original type"),
        ({"train": 3}, r"must be nested changes of the config; given \{'train': 3\}"),
        (3, "must be nested changes of the config; given 3"),
    ],
)
def test_a_bad_arm_is_named(changes, message):
    config = tiny(arms={"good": {}, "bad": changes})
    with pytest.raises(ValueError, match=rf"config\.arms\.bad .*{message}"):
        arms.configs(config)


def test_other_bad_configs_are_refused():
    config = tiny(arms={"late": {"train": {"log_every": 6}}})
    message = r"config.train.steps must exceed config.train.log_every = 6, .*given 6 \(late\)"
    with pytest.raises(ValueError, match=message):
        arms.configs(config)
    with pytest.raises(ValueError, match=r"config\.arms must be a dict, arm -> changes; given 3"):
        arms.configs(tiny(arms=3))
    config = tiny()
    config.method.nam = "sla"
    with pytest.raises(ValueError, match=r"^config\.method has no field 'nam'"):
        arms.configs(config)


def test_a_runs_settings_leave_out_the_arms():
    config = tiny(arms={"a": {}})
    build.check(config)
    assert build.settings(config) == as_settings(tiny().to_json())
    assert arms.settings(config) == arms.settings(arms.of_seed(config, 5))
    assert arms.of_seed(config, 5).seed == 5 and config.seed == 0


def test_arms_that_differ_in_what_is_read_are_trained_once():
    def automix(**options):
        return {"method": {"name": "automix", "automix": options}}

    config = tiny(
        arms={
            "si": of_sla("single"),
            "one_q": automix(predict="one_q"),
            "ag": of_sla("aggregated"),
            "ag_two": of_sla("aggregated", transformations="rotation2"),
            "mix_k": automix(predict="mix_k"),
            "mix_k_alpha": automix(predict="mix_k", alpha=1.0),
        }
    )
    groups = [list(group) for group in arms.trainings(arms.configs(config))]
    assert groups == [["si", "ag"], ["one_q", "mix_k"], ["ag_two"], ["mix_k_alpha"]]
    assert [list(g) for g in arms.trainings(arms.configs(tiny()))] == [[a] for a in arms.STANDING]


# --- every config --------------------------------------------------------------------------------


SHAPES = {"digits": ((8, 8, 1), 10), "wdbc": ((30,), 2), "fashion_mnist": ((28, 28, 1), 10),
          "cifar10": ((32, 32, 3), 10), "tfds:cifar100": ((32, 32, 3), 100)}  # fmt: skip


def pools(name, size=4):
    shape, classes = SHAPES[name]
    rows = np.arange(size, dtype=np.int32)
    labels = np.full((size, classes), 1 / classes, np.float32)
    batch = Batch(np.zeros((size, *shape), np.float32), labels, np.ones(size, bool), rows)
    return Streams(batch, batch)


# These need files; they are tested beside their commands.
ELSEWHERE = ("generated", "clip_cifar", "clip_emoji", "flyp_fmow", "flyp_imagenet", "flyp_iwildcam")
GROUPS = [
    pytest.param(group, id=f"{path.stem}-{'-'.join(group)}")
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem not in ELSEWHERE
    if hasattr(module := importlib.import_module(f"experiments.configs.{path.stem}"), "get_config")
    for group in arms.trainings(arms.configs(module.get_config()))
]


@pytest.mark.parametrize("group", GROUPS)
def test_every_arm_of_every_config_builds(group):
    config, *_ = group.values()
    size, classes = 4, SHAPES[config.data.name][1]
    if config.method.name == "protonet":  # whole episodes, and their own classes
        size, classes = config.train.batch_size, config.method.protonet.ways
    data = pools(config.data.name, size)
    if config.data.unlabelled:
        data = data._replace(clean=data.val)
    method, *others = (build.make_method(c, data) for c in group.values())
    if config.model.name == "resnet18":  # slow to trace; sla.py and automix.py have the same arms
        return
    state = jax.eval_shape(lambda: build.init_state(config, method, data))
    for each in (method, *others):
        logits = jax.eval_shape(each.predict, state, data.val.inputs)
        assert logits.shape == (size, classes)
    new, metrics = jax.eval_shape(build.with_upstream(config, method).step, state, data)
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics


# --- runs ----------------------------------------------------------------------------------------


def without_time(records):
    def drop(x):
        return {k: v for k, v in x.items() if k not in ("seconds_per_step", "history")}

    return [drop(records), *map(drop, records["history"])]


def counting(monkeypatch, module, name):
    """The calls of a function, which goes on as it was."""
    calls, function = [], getattr(module, name)

    def count(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, count)
    return calls


def test_a_shared_training_is_the_separate_one_bit_for_bit(monkeypatch):
    options = {"transformations": "rotation2"}
    changes = {"si": of_sla("single", **options), "ag": of_sla("aggregated", **options)}
    config = tiny(arms=changes)
    config.model = {"name": "mlp", "widths": (4,)}  # quicker to compile
    found = arms.configs(config)
    fits, tests = counting(monkeypatch, build, "fit"), counting(monkeypatch, task, "test_scores")
    (group,) = arms.trainings(found)
    shared = arms.run(group, {}, progress=False)
    assert list(shared) == ["si", "ag"] and len(fits) == 1 and len(tests) == 2
    (apart,) = arms.run({"ag": found["ag"]}, {}, progress=False).values()
    assert len(fits) == 2 and len(tests) == 3
    assert without_time(shared["ag"]) == without_time(apart)
    assert shared["si"]["history"] == shared["ag"]["history"]
    assert shared["si"]["test_loss"] != shared["ag"]["test_loss"]
    assert shared["si"]["seconds_per_step"] > 0
    # Nothing is learned of samples, so nothing is looked at.
    assert "samples" not in apart and not any("eval/" in k for r in apart["history"] for k in r)


def test_what_learns_weights_is_looked_at():
    config = wdbc.get_config()
    config.model.widths = (4,)
    config.augment = "feature_noise(0.1)"
    config.method.saflex.scoring.direction = "identity"
    config.train.update({"steps": 4, "log_every": 2, "batch_size": 16, "val_batch_size": 24})
    found = arms.configs(config)
    (record,) = arms.run({"saflex": found["saflex"]}, {}, progress=False).values()
    assert [set(r) >= {"eval/weight_right", "eval/weight_wrong"} for r in record["history"]] == [
        True, True,
    ]  # fmt: skip
    assert len(record["samples"]) == 2 * figures.COLUMNS
    assert sum(s["wrong"] for s in record["samples"]) == figures.COLUMNS
    assert not build.learns(found["upstream"])


@pytest.mark.parametrize(
    "method, again",
    [
        ({}, 0),
        ({"rule": "as_given"}, 0),
        ({"rule": "implicit"}, 1),
        ({"loss": "ldam"}, 1),
        ({"rule": "drw"}, 1),
        ({"name": "sla", "rule": "implicit"}, 1),
        ({"name": "sla"}, 0),
    ],
)
def test_a_seed_builds_anew_only_what_holds_its_labels(monkeypatch, method, again):
    stopped = SimpleNamespace(stopped_by=signal.SIGINT)
    monkeypatch.setattr(build, "fit", lambda *args, **kwargs: stopped)
    made = counting(monkeypatch, build, "make_method")
    (config,) = arms.configs(tiny(arms={"x": {"method": method}})).values()
    compiled = {}
    for seed in (0, 1):
        assert arms.run({"x": arms.of_seed(config, seed)}, compiled) is None  # as Ctrl-C leaves it
    assert len(made) == 1 + again


def test_a_seed_builds_anew_where_its_splits_have_other_sizes(monkeypatch):
    """Copies that are left out may shorten either split, and a method holds the sizes of both."""
    monkeypatch.setattr(build, "fit", lambda *args, **kwargs: stopped())
    made, whole = counting(monkeypatch, build, "make_method"), task.make_data(tiny())
    (config,), compiled = arms.configs(tiny(arms={"x": {}})).values(), {}

    def built(train, val):
        pools = jax.tree.map(lambda x: x[:train], whole.pools.candidates), whole.pools.val
        pools = Streams(pools[0], jax.tree.map(lambda x: x[:val], pools[1]))
        monkeypatch.setattr(task, "make_data", lambda _: whole._replace(pools=pools))
        arms.run({"x": config}, compiled, look=False)
        return len(made)

    assert [built(100, 24), built(100, 23), built(99, 24), built(100, 24)] == [1, 2, 3, 3]


# --- what is said --------------------------------------------------------------------------------


def test_paired_differences_and_their_interval():
    # Differences 1, 2 and 3: mean 2, sd 1, and Student's t of two degrees of freedom.
    found = arms.paired_difference([11, 22, 33], [10, 20, 30])
    assert found["mean"] == pytest.approx(2)
    assert found["high"] - 2 == pytest.approx(4.302652729911275 / np.sqrt(3))
    assert 2 - found["low"] == pytest.approx(4.302652729911275 / np.sqrt(3))
    rng = np.random.default_rng(0)
    for number in (2, 5, 9):
        a, b = rng.normal(size=(2, number))
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        expected = {"mean": a.mean() - b.mean(), "low": low, "high": high}
        assert arms.paired_difference(list(a), list(b)) == pytest.approx(expected)
    assert arms.paired_difference([0.5], [0.25]) == {"mean": 0.25, "low": None, "high": None}


def records(values, seconds, **more):
    return [
        {"test_accuracy": v, "test_loss": 1.0, "seconds_per_step": s, "seed": n, **more}
        for n, (v, s) in enumerate(zip(values, seconds))
    ]


RUNS = {
    "z": records([0.50, 0.70, 0.60], [0.010, 0.030, 0.020]),
    "a_long_name_of_an_arm": records([0.60, 0.80, 0.85], [0.050, 0.040, 0.060]),
}


def test_summary_and_table():
    found = arms.summary(RUNS)
    assert list(found) == list(RUNS)
    base, other = found.values()
    assert base["test_accuracy"] == [0.50, 0.70, 0.60] and base["difference"] is None
    assert base["mean"] == pytest.approx(0.6) and base["sd"] == pytest.approx(0.1)
    assert (base["n"], base["seconds_per_step"], base["step_cost"]) == (3, 0.02, 1)
    assert other["difference"]["mean"] == pytest.approx(0.15)
    assert other["seconds_per_step"] == 0.05 and other["step_cost"] == pytest.approx(2.5)
    assert json.loads(json.dumps(found)) == found
    head, first, second = arms.table(found, "test_accuracy").splitlines()
    assert "difference to z (95% interval)" in head and "test accuracy" in head
    half = stats.t.ppf(0.975, 2) * np.std([0.1, 0.1, 0.25], ddof=1) / np.sqrt(3)
    interval = f"+0.1500 ({0.15 - half:+.4f} to {0.15 + half:+.4f})"
    assert second.split("  ")[0] == "a_long_name_of_an_arm 0.7500 +- 0.1323"
    assert interval in second and "50.00" in second and second.endswith("2.50x")
    assert "0.6000 +- 0.1000  (n = 3)" in first and first.endswith("1.00x")

    alone = arms.summary({arm: runs[:1] for arm, runs in RUNS.items()})
    assert alone["z"]["sd"] is None
    _, first, second = arms.table(alone, "test_accuracy").splitlines()
    assert "0.5000 +- -  (n = 1)" in first and "+0.1000  " in second


def panels(figure):
    """Label of the horizontal axis -> axis."""
    return {axis.get_xlabel().split(" (")[0]: axis for axis in figure.axes}


def test_the_figure_of_general_arms():
    differences = {arm: found["difference"] for arm, found in arms.summary(RUNS).items()}
    found = panels(figures.compare(RUNS, title="x", differences=differences))
    assert list(found) == ["test accuracy, %", "points, seed by seed"]
    scores, apart = found.values()
    rows = [label.get_text() for label in scores.get_yticklabels()]
    assert rows == ["z", "a long name of an arm"] and apart.get_title(loc="left") == "minus z"
    assert [list(line.get_xdata()) for line in scores.lines] == [
        [100 * r["test_accuracy"] for r in runs] for runs in RUNS.values()
    ]
    means = [c.get_segments()[0][:, 0].tolist() for c in scores.collections]
    assert means == [pytest.approx([60, 60]), pytest.approx([75, 75])]
    assert [text.get_text() for text in scores.texts] == ["60.0", "75.0"]
    (interval,) = apart.collections  # none of the base
    other = differences["a_long_name_of_an_arm"]
    ends = interval.get_segments()[0]
    assert ends[:, 0].tolist() == [100 * other["low"], 100 * other["high"]] and ends[0, 1] == 1
    assert apart.lines[1].get_xdata().tolist() == [100 * other["mean"]]
    assert scores.get_ylim() == apart.get_ylim()  # one row an arm


def test_panels_on_what_was_learned_are_those_of_the_arm_saflex():
    sample = {"input": [[0.5]], "clean": 1, "wrong": False, "prior": 1, "label": 1,
              "confidence": 0.9, "weight": 1.0}  # fmt: skip
    image = sample | {"input": np.zeros((3, 3, 1)).tolist()}
    history = [{"step": s, "eval/weight_right": 1.0, "eval/weight_wrong": 0.5} for s in (1, 2)]

    def learned(sample):
        return records([0.5, 0.6], [1, 1], samples=[sample], history=history)

    def draw(runs, **options):
        return figures.compare(runs, title="x", **options)

    weights = "training step"

    found = panels(draw({"upstream": learned(sample), "saflex": learned(sample)}))
    assert list(found) == ["test accuracy, %", weights]
    right, wrong, _ = found[weights].lines
    assert list(right.get_ydata()) == [1.0, 1.0] and list(wrong.get_ydata()) == [0.5, 0.5]
    with_images = draw({"upstream": learned(image), "saflex": learned(image)})
    assert len(with_images.axes) == 2 + figures.ROWS * figures.COLUMNS
    assert len(panels(draw({"upstream": learned(image), "mine": learned(image)}))) == 1
    difference = {"base": None, "saflex": {"mean": 0.1, "low": None, "high": None}}
    runs = {"base": records([0.5], [1]), "saflex": learned(sample)[:1]}
    names = ["test accuracy, %", "points, seed by seed", weights]
    assert list(panels(draw(runs, differences=difference))) == names


# --- a comparison and its command ----------------------------------------------------------------

CONFIG = """
from experiments.configs import wdbc

def get_config():
    config = wdbc.get_config()
    config.model.widths = (4,)
    config.augment = "feature_noise(0.1)"
    config.train.update({"steps": 4, "log_every": 2, "batch_size": 16,
                         "val_batch_size": 24})
    config.arms = {"plain": {"method": {"rule": "as_given"}},
                   "hard": {"method": {"rule": "as_given"}, "optimizer": {"learning_rate": 0.1}}}
    return config
"""


def small_config():
    module = {}
    exec(CONFIG, module)
    return module["get_config"]()


def recorded(monkeypatch, compiled):
    """(arm, seed) of each run as it starts, those of a sweep in one list; programs are shared."""
    started = []

    def watched(name, members_of):
        function = getattr(arms, name)

        def call(*given, **options):
            *given, _ = given
            members = members_of(given[0])
            started.append([(arm, c.seed) for member in members for arm, c in member.items()])
            return function(*given, compiled, **options)

        monkeypatch.setattr(arms, name, call)

    watched("run", lambda member: [member])
    watched("run_sweep", lambda members: members)
    return started


@pytest.mark.parametrize("at_once", [False, True])
def test_a_comparison_that_was_killed_resumes_with_what_is_left(tmp_path, monkeypatch, at_once):
    configs, log = arms.configs(small_config()), tmp_path / "new" / "runs.jsonl"
    started = recorded(monkeypatch, {})
    if not at_once:
        monkeypatch.setattr(arms, "sweeps", lambda config: False)

    def run_all(resume):
        started.clear()
        records = arms.run_all(configs, (0, 1), log, resume=resume, progress=False)
        return records, list(started)

    def together(runs):
        return [runs] if at_once else [[run] for run in runs]

    whole, ran = run_all(False)
    interleaved = [("plain", 0), ("hard", 0), ("plain", 1), ("hard", 1)]
    assert list(whole) == interleaved and ran == together(interleaved)
    lines = log.read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(whole.values())

    # Killed while it wrote the last line; and one arm has other settings by now.
    other = json.loads(lines[0])
    other["settings"]["optimizer"]["learning_rate"] = 3.0
    kept = lines[1:3]
    log.write_text("\n".join([json.dumps(other), *kept, lines[3][:50]]))
    resumed, ran = run_all(True)
    assert ran == together([("plain", 0), ("hard", 1)])
    for of_run, record in resumed.items():
        assert without_time(record) == without_time(whole[of_run])
    again = log.read_text().splitlines()
    assert again[:3] == [json.dumps(other), *kept] and len(again) == 5
    assert run_all(True) == (resumed, []) and log.read_text().splitlines() == again
    one = {"hard": configs["hard"]}  # the other arm's runs stay
    assert list(arms.run_all(one, (1,), log, resume=True)) == [("hard", 1)]
    assert log.read_text().splitlines() == again

    monkeypatch.setattr(arms, "sweeps", lambda config: False)
    results = iter([{"plain": {}}, None])  # interrupted in the second run
    monkeypatch.setattr(arms, "run", lambda *_, **__: next(results))
    assert list(arms.run_all(configs, (0, 1), log, resume=False)) == [("plain", 0)]


def test_runs_of_other_data_are_not_gone_on_with(tmp_path, monkeypatch):
    rows = np.arange(40)
    x = np.random.default_rng(0).normal(size=(40, 2)).round(3)
    file, log = tmp_path / "mine.csv", tmp_path / "runs.jsonl"

    def written(labels):
        lines = [f"{a},{b},{'xy'[label]}" for (a, b), label in zip(x, labels)]
        file.write_text("\n".join(["a,b,kind", *lines]))
        task.opened.cache_clear(), task.task_source.cache_clear()

    config = small_config()
    config.data.update({"name": str(file), "val": 6, "test": 8, "noise": 0.0})
    written(rows % 2)
    configs = arms.configs(config)
    monkeypatch.setattr(arms, "sweeps", lambda config: False)
    monkeypatch.setattr(arms, "run", lambda members, *_, **__: {arm: {} for arm in members})
    whole = arms.run_all(configs, (0,), log, resume=False)
    assert arms.run_all(configs, (0,), log, resume=True) == whole
    written(rows // 2 % 2)
    with pytest.raises(ValueError, match=r"; labels and splits of .*mine.csv differ .* seed 0\. "):
        arms.run_all(configs, (0,), log, resume=True)
    older = [{k: v for k, v in record.items() if k != "data"} for record in whole.values()]
    log.write_text("".join(json.dumps(record) + "\n" for record in older))
    assert [*arms.run_all(configs, (0, 1), log, resume=True).values()][:2] == older


# --- sweeps --------------------------------------------------------------------------------------


def small_members(changes=({}, {}), **train):
    """Members of SAFLEX on a table, seed n with the n-th changes of a flat config."""
    config = small_config()
    config.arms = {}
    config.method.saflex.scoring.direction = "identity"  # quicker to compile
    config.train.update({"steps": 6, **train})
    members = []
    for seed, own in enumerate(changes):
        changed = arms.of_seed(config, seed)
        changed.update_from_flattened_dict(own)
        members.append({"saflex": changed})
    return members


def test_a_sweep_has_the_records_of_single_runs():
    """Seeds, options, early stopping and what is looked at; to rounding."""
    options = {"optimizer.weight_decay": 0.5, "method.saflex.rule.sharpness": 1.0, "seed": 1}
    members = small_members(({}, {}, options), keep_best=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as a sweep that fails would give
        found = dict(arms.run_each(members, {}, progress=False))
    compiled = {}
    for place, member in enumerate(members):
        if place == 2:
            compiled = {}
        (own,), (expected,) = (
            found[place].values(),
            arms.run(member, compiled, progress=False).values(),
        )
        assert own.keys() == expected.keys() and own["best_step"] == expected["best_step"]
        assert own["test_accuracy"] == expected["test_accuracy"]
        assert own["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
        for name in ("history", "samples"):
            for a, b in zip(own[name], expected[name], strict=True):
                a.pop("seconds_per_step", None), b.pop("seconds_per_step", None)
                assert {k: np.shape(v) for k, v in a.items()} == {
                    k: np.shape(v) for k, v in b.items()
                }
                for k in a:
                    np.testing.assert_allclose(a[k], b[k], rtol=1e-3, atol=1e-4, err_msg=k)
    one, other = found[1]["saflex"], found[2]["saflex"]
    assert one["history"][0]["eval/loss"] != other["history"][0]["eval/loss"]


def stopped():
    return SimpleNamespace(stopped_by=signal.SIGINT)


def test_members_go_apart_where_they_do_not_fit_one_program(monkeypatch):
    whole = {"data.train": 0}
    members = small_members(({}, {}, {"train.steps": 8}, {}, {"augment": "identity"}, whole, whole))
    sizes = iter((100, 100, 101, 100, 100))

    def make_data(config):
        rows = np.zeros(next(sizes), np.float32)
        return SimpleNamespace(pools=[rows], start=None)

    monkeypatch.setattr(task, "make_data", make_data)
    monkeypatch.setattr(arms, "SWEEP_BYTES", 3 * 400)
    found = []

    def run_sweep(members, data, compiled, **options):
        found.append([m["saflex"].seed for m in members])
        return [{"saflex": {}}] * len(members)

    monkeypatch.setattr(arms, "run_sweep", run_sweep)
    monkeypatch.setattr(arms, "run", lambda member, *_, **__: found.append(member["saflex"].seed))
    assert {place for place, _ in arms.run_each(members, {})} == set(range(7))
    # 3 is of another size, 2 and 4 of other programs; of the four others three fit the memory.
    assert found == [[0, 1], [5, 6], 3, 2, 4]


def test_a_sweep_that_fails_is_repeated_one_by_one(monkeypatch):
    def run_sweep(*_, **__):
        raise FloatingPointError("step 3 of members [1]")

    def run(member, *_, **__):
        if member["saflex"].seed == 1:
            raise FloatingPointError("step 3")
        return {"saflex": {"seed": member["saflex"].seed}}

    monkeypatch.setattr(arms, "run_sweep", run_sweep)
    monkeypatch.setattr(arms, "run", run)
    with pytest.warns(
        UserWarning,
        match=r"follow one by one, .* failed: FloatingPointError: step 3 of members \[1\]",
    ):
        (_, first), (place, error), (_, last) = arms.run_each(small_members(({}, {}, {})), {})
    assert (first, last) == ({"saflex": {"seed": 0}}, {"saflex": {"seed": 2}})
    assert place == 1 and str(error) == "step 3"


def test_a_sweep_compiles_anew_for_other_options_and_not_for_other_seeds(monkeypatch):
    made, stop = [], [stopped()] * 2
    monkeypatch.setattr(
        arms, "_compile_sweep", lambda *given: made.append(given) or ({0: 0}, 0, None)
    )
    monkeypatch.setattr(build, "fit_sweep", lambda *_, **__: stop)
    data, compiled = [SimpleNamespace(pools=[np.zeros(3)], start=None)] * 2, {}

    def sweep(*decays, seed=0):
        members = small_members([{"optimizer.weight_decay": d} for d in decays])
        for member in members:
            member["saflex"].seed += seed
        assert arms.run_sweep(members, data, compiled) is None
        return len(made)

    assert [sweep(0.1, 0.1), sweep(0.1, 0.1, seed=5)] == [1, 1]
    assert [sweep(0.2, 0.2), sweep(0.1, 0.2), sweep(0.1, 0.3), sweep(0.1, 0.2)] == [2, 3, 4, 4]


def test_an_interrupted_sweep_has_no_records(monkeypatch):
    monkeypatch.setattr(arms, "run_sweep", lambda *_, **__: None)
    assert list(arms.run_each(small_members(), {})) == [(0, None), (1, None)]


@pytest.mark.parametrize(
    "changes, pays",
    [
        ({}, True),
        ({"method.name": "co_teaching", "method.rule": "as_given"}, True),
        ({"model": {"name": "small_cnn"}}, False),  # on a CPU
        ({"runner": "pmap"}, False),
        ({"data.on_device": False}, False),
        ({"method.rule": "implicit"}, False),
        ({"method.loss": "ldam"}, False),
        ({"method.name": "protonet", "method.rule": "as_given"}, False),
        ({"model": {"name": "logistic"}}, False),
    ],
)
def test_where_a_sweep_pays(monkeypatch, changes, pays):
    config = small_config()
    for name, value in changes.items():
        config.unlock()
        if name == "model":
            config.model = value
        else:
            config.update_from_flattened_dict({name: value})
    assert arms.sweeps(config) is arms.sweeps_anywhere(config) is pays
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert arms.sweeps(config) is (pays or changes == {"model": {"name": "small_cnn"}})


def test_arms_that_differ_in_swept_options_share_a_program():
    config = small_config()
    plain = {"method": {"rule": "as_given"}}
    config.arms = {
        "a": plain,
        "b": plain | {"optimizer": {"weight_decay": 1.0}},
        "c": plain | {"model": {"widths": (3,)}},
        "d": {"method": {"saflex": {"rule": {"sharpness": 2.0}}}},
        "e": {"method": {"saflex": {"rule": {"sharpness": 1.0, "memory": {"decay": 0.5}}}}},
        "f": {"method": {"saflex": {"rule": {"noise_rate": 0.1}}}},
    }
    found = arms.configs(config)
    assert [list(group) for group in arms.programs(found)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    options = build.swept([found["d"], found["e"]])
    assert {k: v.tolist() for k, v in options.items()} == {
        "method.saflex.rule.sharpness": [2.0, 1.0],
        "method.saflex.rule.memory.decay": pytest.approx([0.97, 0.5]),
    }
    # Images on a CPU: one program a training.
    images = arms.configs(tiny(arms={"a": plain, "b": config.arms.b.to_dict()}))
    assert [list(group) for group in arms.programs(images)] == [["a"], ["b"]]


def test_the_command_of_a_comparison(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    configs, log = arms.configs(small_config()), tmp_path / "runs.jsonl"
    for score, seed in ((0.5, 0), (0.625, 1)):  # finished runs, so that nothing is trained
        for arm, more in (("plain", 0.0), ("hard", 0.25 * seed)):
            record = {"arm": arm, "seed": seed, "settings": arms.settings(configs[arm]),
                      "test_accuracy": score + more, "seconds_per_step": 0.25}  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
    command = [sys.executable, "-m", "experiments.compare", "--noprogress", "--json", "--seeds=2",
               f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}", "--resume",
               "--base=hard"]  # fmt: skip
    done = subprocess.run(
        command, cwd=process_.ROOT, env=process_.environment(), timeout=process_.LIMIT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert list(summary) == ["hard", "plain"] and summary["hard"]["difference"] is None
    assert summary["plain"]["test_accuracy"] == [0.5, 0.625]
    assert summary["plain"]["difference"]["mean"] == -0.125
    assert summary["plain"]["difference"]["low"] is not None
    assert len(log.read_text().splitlines()) == 4
    assert (tmp_path / "compare.png").stat().st_size > 0
