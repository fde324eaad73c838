"""What is said of the runs, on records with answers worked out by hand."""

import functools
import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments import report, report_figures, style


def line(task, arm, seed, accuracy, **more):
    """A record as `experiments.suite` writes it; accuracy in points."""
    return {
        "suite": "new", "regime": "scratch", "task": task, "half": "report", "noise": 0.0,
        "val": 50, "arm": arm, "seed": seed, "settings": "same", "test_accuracy": accuracy / 100,
        "test_ece": 0.05, "seconds_per_step": 0.001, "versions": {"jax": "0.10.2"},
        "date": "2026-11-22T04:00:00+00:00", **more,
    }  # fmt: skip


def lines(task, scores, **more):
    """Arm -> points, one a seed."""
    return [
        line(task, arm, seed, value, **more)
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]


# Gains of "saflex" over upstream: 1, 2, 3 (mean 2); 5, 5 (mean 5); -4 (one seed).
RECORDS = [
    *lines("clean", {"upstream": [60, 70, 80], "upstream_train_val": [61, 71, 84],
                     "saflex": [61, 72, 83], "l2rw": [90, 90, 90]}),
    *lines("wrong", {"upstream": [50, 40], "upstream_train_val": [54, 46], "saflex": [55, 45],
                     "l2rw": [55, 44], "mwn": [50, 50]}, noise=0.4, val=200),
    *lines("few", {"upstream": [30], "upstream_train_val": [20], "saflex": [26], "l2rw": [20]},
           noise=0.1, val=500),
    *lines("other", {"upstream": [10, 10], "saflex": [90, 90]}, half="development", noise=0.6),
]  # fmt: skip
RUNS = report.by_task(RECORDS)
REPORT = report.of_half(RUNS, "report")
OF_SAFLEX = functools.partial(report.of_tasks, arm="saflex")


def test_records_by_task_arm_and_seed():
    assert list(RUNS) == ["clean", "wrong", "few", "other"]
    assert list(REPORT) == ["clean", "wrong", "few"]
    assert RUNS["wrong"]["mwn"][1]["test_accuracy"] == 0.5
    assert report.all_arms(RUNS) == ["upstream", "upstream_train_val", "saflex", "l2rw", "mwn"]
    more = report.by_task([*RECORDS, line("few", "linear_probe", 0, 1), line("few", "a", 0, 1)])
    assert report.all_arms(more) == [
        "upstream", "upstream_train_val", "linear_probe", "saflex", "a", "l2rw", "mwn",
    ]  # fmt: skip


def test_regimes_are_kept_apart_and_old_records_are_from_scratch():
    old = line("wrong", "saflex", 0, 1, suite="small")
    del old["regime"]
    new = line("wrong", "saflex", 0, 2, suite="pretrained", regime="pretrained")
    found = report.by_regime([old, new, line("other", "saflex", 0, 3)])
    assert list(found) == ["pretrained", "scratch"]
    assert found["pretrained"]["wrong"]["saflex"][0] == new
    assert found["scratch"]["wrong"]["saflex"][0] == old and list(found["scratch"])[1] == "other"
    with pytest.raises(ValueError, match="regime must be one of"):
        report.by_regime([line("a", "saflex", 0, 1, regime="pretraind")])


def test_a_half_that_was_seen_is_development():
    seen = [line("a", "saflex", 0, 1, suite=suite) for suite in ("small", "full")]
    assert [report.half_of(record) for record in seen] == ["development", "development"]
    assert report.half_of(line("a", "saflex", 0, 1)) == "report"
    assert report.of_half(
        report.by_task([seen[0], line("b", "saflex", 0, 1)]), "report"
    ).keys() == {"b"}


def test_only_the_last_settings_of_a_tasks_arm_count():
    old = [line("a", "saflex", seed, 10, settings="old") for seed in range(3)]
    base = [line("a", "upstream", seed, 20, settings="old") for seed in range(3)]
    new = [line("a", "saflex", seed, 30, settings="new") for seed in range(2)]
    found = report.by_task([*old, *base, *new])
    assert report.gains(found, "saflex", "upstream") == {"a": pytest.approx([10, 10])}
    twice = report.by_task([*base, *new, line("a", "saflex", 0, 31, settings="new")])
    assert report.gains(twice, "saflex", "upstream") == {"a": pytest.approx([11, 10])}


def test_a_task_of_two_suites_and_no_records_are_refused():
    twice = line("few", "saflex", 0, 10, suite="full")
    with pytest.raises(ValueError, match="of one suite; given few of new and full"):
        report.by_task([*RECORDS, twice])
    with pytest.raises(ValueError, match="must hold a record; given none"):
        report.by_regime([])


def test_gains_are_paired_by_seed():
    assert report.gains(REPORT, "saflex", "upstream") == {
        "clean": pytest.approx([1, 2, 3]), "wrong": pytest.approx([5, 5]),
        "few": pytest.approx([-4]),
    }  # fmt: skip
    # Seeds in another order, and seeds that only one of the two has run.
    mixed = [line("t", "upstream", s, v) for s, v in ((4, 40), (1, 10), (2, 20))]
    mixed += [line("t", "saflex", s, v) for s, v in ((1, 11), (9, 99), (4, 47))]
    assert report.gains(report.by_task(mixed), "saflex", "upstream") == {"t": pytest.approx([1, 7])}
    assert report.gains(RUNS, "mwn", "upstream_train_val") == {"wrong": pytest.approx([-4, 4])}
    assert report.gains(RUNS, "nobody", "upstream") == {}


def test_the_interval_is_over_tasks():
    # Means 2, 5 and -4: mean 1, deviations 1, 4 and -5, sd sqrt(21).
    found = report.over_tasks(report.gains(REPORT, "saflex", "upstream"))
    half = 4.302652729911275 * math.sqrt(21) / math.sqrt(3)
    assert found == pytest.approx({"mean": 1, "low": 1 - half, "high": 1 + half})
    assert report.over_tasks({"a": [1.0, 3.0]}) == {"mean": 2.0, "low": None, "high": None}
    assert report.over_tasks({}) is None


def test_the_interval_of_these_tasks_is_that_of_their_seeds():
    rng = np.random.default_rng(0)
    one = list(rng.normal(size=5))
    # Of one task it is the task's own, and of one that never varies half as wide.
    assert report.of_these_tasks({"a": one}) == pytest.approx(report.interval(one))
    both, own = report.of_these_tasks({"a": one, "b": [3.0, 3.0]}), report.interval(one)
    assert both["high"] - both["low"] == pytest.approx((own["high"] - own["low"]) / 2)
    # It holds the true average as often as it says.
    draws = [
        {"a": list(rng.normal(1, 1, size=4)), "b": list(rng.normal(-3, 2, size=10))}
        for _ in range(2000)
    ]
    found = [report.of_these_tasks(draw) for draw in draws]
    assert np.mean([f["low"] < -1 < f["high"] for f in found]) == pytest.approx(0.95, abs=0.015)
    assert report.of_these_tasks({"a": [1.0, 2.0], "b": [1.0]})["low"] is None
    assert report.of_these_tasks({"a": [1.0, 1.0]}) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert report.of_these_tasks({}) is None


def test_wins_ties_and_losses_by_the_paired_test():
    assert report.outcome([5.0, 5.0]) == "win" and report.outcome([-5.0, -5.0]) == "loss"
    assert report.outcome([0.0, 0.0]) == "tie" and report.outcome([9.0]) == "tie"
    rng, seen = np.random.default_rng(0), []
    for _ in range(200):
        values = rng.normal(rng.choice([-1, 0, 1]), 1, size=5)
        significant = stats.ttest_1samp(values, 0).pvalue < 0.05
        expected = ("win" if values.mean() > 0 else "loss") if significant else "tie"
        seen.append(report.outcome(list(values)))
        assert seen[-1] == expected
    assert set(seen) == {"win", "tie", "loss"}
    assert report.counts({"a": [5.0, 5.0], "b": [1.0, -1.0], "c": [2.0, 2.1], "d": [-1.0]}) == {
        "win": 2, "tie": 2, "loss": 0,
    }  # fmt: skip


# The best partner is the linear probe on "few", else upstream_train_val, which is level with
# trusted_only on "wrong": gains of "saflex" -1, 0 and 0.
PARTNERED = report.by_task([
    *RECORDS,
    *lines("wrong", {"trusted_only": [51, 49], "early_stopping": [50, 40]}, noise=0.4),
    *lines("few", {"trusted_only": [1], "linear_probe": [27]}, noise=0.1),
])  # fmt: skip


def test_the_fair_partner_is_the_best_of_what_a_user_would_do():
    found = report.of_half(PARTNERED, "report")
    assert report.fair_partners(found, "saflex") == {
        "clean": "upstream_train_val", "wrong": "upstream_train_val", "few": "linear_probe",
    }  # fmt: skip
    better = [line("wrong", "trusted_only", s, v, noise=0.4) for s, v in enumerate((51.5, 49))]
    found = report.by_task(
        [r for t in found.values() for a in t.values() for r in a.values()] + better
    )
    assert report.fair_partners(found, "saflex")["wrong"] == "trusted_only"
    assert report.gains_over_partner(found, "saflex") == {
        "clean": pytest.approx([0, 1, -1]), "wrong": pytest.approx([3.5, -4]), "few": [-1],
    }  # fmt: skip
    # Not itself; and neither upstream, nor a baseline, nor an arm of the rule.
    assert report.fair_partners(found, "trusted_only")["wrong"] == "upstream_train_val"
    none = report.by_task(lines("t", {"upstream": [90], "saflex": [50], "l2rw": [99]}))
    assert report.fair_partners(none, "saflex") == report.gains_over_partner(none, "saflex") == {}


def test_the_numbers():
    # Over upstream 2, 5 and -4. Over the partner: "clean" 0, "wrong" 0, "few" -1; over train +
    # validation 0, 0 and 6.
    found = report.headline(report.of_half(PARTNERED, "report"), "saflex")
    third, half = -1 / 3, 4.302652729911275 / 3
    quarter = 12.706204736174694 / 2
    over_base = 4.302652729911275 * 2
    assert found == {
        "tasks": 3,
        "gain_over_upstream": pytest.approx(1.0),
        "gain_over_best_fair_partner": pytest.approx(third),
        "gain_over_best_fair_partner_interval": pytest.approx([third - half, third + half]),
        "worst_gain_over_best_fair_partner": -1.0,
        "worst_task_over_best_fair_partner": "few",
        "gain_over_best_fair_partner_clean": pytest.approx(0.0),
        "gain_over_best_fair_partner_clean_interval": None,
        "worst_gain_over_best_fair_partner_clean": 0.0,
        "worst_task_over_best_fair_partner_clean": "clean",
        "gain_over_best_fair_partner_noisy": pytest.approx(-0.5),
        "gain_over_best_fair_partner_noisy_interval": pytest.approx(
            [-0.5 - quarter, -0.5 + quarter]
        ),
        "worst_gain_over_best_fair_partner_noisy": -1.0,
        "worst_task_over_best_fair_partner_noisy": "few",
        "gain_over_best_fair_partner_very_noisy": pytest.approx(0.0),  # "wrong" alone: 40 %
        "gain_over_best_fair_partner_very_noisy_interval": None,
        "worst_gain_over_best_fair_partner_very_noisy": 0.0,
        "worst_task_over_best_fair_partner_very_noisy": "wrong",
        "gain_over_upstream_train_val": pytest.approx(2.0),
        "gain_over_upstream_train_val_interval": pytest.approx([2 - over_base, 2 + over_base]),
        "worst_gain_over_upstream_train_val": 0.0,
        "worst_task_over_upstream_train_val": "clean",
        "gain_over_upstream_train_val_clean": pytest.approx(0.0),
        "gain_over_upstream_train_val_clean_interval": None,
        "worst_gain_over_upstream_train_val_clean": 0.0,
        "worst_task_over_upstream_train_val_clean": "clean",
        # "wrong": level with mwn, trusted_only and train + validation. "few": below the probe.
        "share_of_noisy_tasks_at_or_above_best_baseline": 0.5,
    }
    assert json.loads(json.dumps(found)) == found
    nothing = report.headline({}, "saflex")
    assert nothing.pop("tasks") == 0 and set(nothing.values()) == {None}
    unknown = report.headline(REPORT, "saflex_train_val")
    assert unknown.pop("tasks") == 0 and set(unknown.values()) == {None}


def test_a_baseline_is_every_arm_without_the_rule():
    def share(*more):
        with_rule = lines("t", {"saflex": [50], "saflex_other": [99]}, noise=0.4)
        return report.at_or_above_best(report.by_task([*with_rule, *more]), "saflex")

    assert share() is None
    assert share(line("t", "boot", 0, 50, noise=0.4)) == 1.0
    assert share(line("t", "upstream", 0, 50.1, noise=0.4)) == 0.0
    assert share(*lines("t", {"boot": [50], "trusted_only": [50.1]}, noise=0.4)) == 0.0
    level = lines("t", {"saflex": [70, 81.1], "boot": [81.1, 70]}, noise=0.4)  # but for rounding
    assert report.at_or_above_best(report.by_task(level), "saflex") == 1.0
    told = lines("t", {"saflex": [50], "upstream": [51], "boot": [52.5]}, noise=0.4)
    assert report.over_best_baseline(report.by_task(told), "saflex") == {"t": (-2.5, "boot")}


def test_calibration():
    records = [
        *(line("a", "x", s, 50) for s in range(3)),
        *(line("b", "x", s, 50, test_ece=0.3) for s in range(2)),
        line("c", "x", 0, 50, test_ece=0.2),
    ]
    runs = report.by_task(records)
    assert report.mean_of(runs, "x", "test_ece") == pytest.approx((0.05 + 0.3 + 0.2) / 3)
    assert report.mean_of(runs, "nobody", "test_ece") is None


# --- the page ------------------------------------------------------------------------------------


def cells(text):
    """A Markdown table as row name -> column -> cell."""

    def split(row):
        return [cell.strip() for cell in row.strip("|").split("|")]

    head, _, *rows = map(split, text.splitlines())
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head, row)) for row in rows}


def test_the_tables_say_the_numbers(monkeypatch):
    monkeypatch.setattr(report, "ARM", "saflex")
    runs = report.of_half(PARTNERED, "report")
    overview = cells(report.overview(runs))
    assert list(overview) == report.all_arms(runs)
    row = overview["saflex"]
    half = 4.302652729911275 * math.sqrt(21) / math.sqrt(3)
    assert row["tasks"] == "3" and row["ECE"] == "5.00"
    assert row["- upstream (95 % interval)"] == f"+1.00 ({1 - half:+.2f} to {1 + half:+.2f})"
    apart, third = 4.302652729911275 / 3, 1 / 3
    assert row["- fair partner (95 % interval)"] == (
        f"-0.33 ({-third - apart:+.2f} to {-third + apart:+.2f})"
    )
    assert row["won, tied, lost"] == "0, 3, 0" and row["of these tasks"] == ""
    assert overview["upstream"]["- upstream (95 % interval)"] == ""

    found = cells(report.of_tasks(runs, "saflex"))
    assert list(found) == ["few", "clean", "wrong"]  # the worst first
    assert found["few"] == {
        "task": "few", "noise": "0.10", "val": "500", "seeds": "1", "saflex": "26.00",
        "- upstream_train_val": "+6.00", "- fair partner": "-1.00, linear_probe",
        "- best without": "-4.00, upstream",
    }  # fmt: skip
    assert found["clean"]["- best without"] == ""  # no label is wrong there
    apart = 4.302652729911275 / math.sqrt(3)
    assert found["clean"]["- fair partner"] == (
        f"+0.00 ({-apart:+.2f} to {apart:+.2f}), upstream_train_val"
    )

    accuracies = cells(report.accuracies(REPORT))
    assert accuracies["clean"] == {
        "task": "clean", "upstream": "70.00", "upstream_train_val": "72.00", "saflex": "72.00",
        "l2rw": "**90.00**", "mwn": "",
    }  # fmt: skip
    assert accuracies["wrong"]["saflex"] == accuracies["wrong"]["mwn"] == "**50.00**"

    summary = cells(report.summary({"here": runs, "there": {}}, "saflex"))
    assert summary["`tasks`"] == {"": "`tasks`", "here": "3", "there": "0"}
    assert summary["`worst_gain_over_best_fair_partner`"]["here"] == "-1.00 (few)"
    assert summary["`share_of_noisy_tasks_at_or_above_best_baseline`"]["here"] == "0.50"
    over_base = 4.302652729911275 * 2
    assert summary["`gain_over_upstream_train_val`"]["here"] == (
        f"+2.00 ({2 - over_base:+.2f} to {2 + over_base:+.2f})"
    )
    assert summary["`gain_over_upstream`"] == {
        "": "`gain_over_upstream`", "here": "+1.00", "there": "",
    }  # fmt: skip


def test_where_it_does_not_help_is_said():
    lost = lines("a", {"saflex": [50, 50], "trusted_only": [51, 51], "boot": [52, 53]}, noise=0.4)
    parts = {"new": report.of_half(PARTNERED, "report"), "lost": report.by_task(lost)}
    head, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.shortcomings(parts, ("saflex", "nobody")).splitlines()
    ]
    assert rows == [
        ["`saflex`, new", "1 of 3, 0 surely", "-1.00 `few`, linear_probe", "1 of 2",
         "-4.00 `few`, upstream"],
        ["`saflex`, lost", "1 of 1, 1 surely", "-1.00 `a`, trusted_only", "1 of 1",
         "-2.50 `a`, boot"],
    ]  # fmt: skip
    assert len(head) == 5
    won = report.by_task(lines("a", {"saflex": [51, 51], "trusted_only": [50, 50]}))
    assert "| 0 of 1, 0 surely |  |  |  |" in report.shortcomings({"won": won}, ("saflex",))


def test_the_command_writes_the_page_with_its_sources_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ARM", "saflex")
    monkeypatch.setattr(report, "JUDGED", ("saflex", "l2rw"))
    first, second = tmp_path / "new.jsonl", tmp_path / "pretrained.jsonl"
    features = lines("p", {"upstream": [50, 50], "trusted_only": [52, 52], "saflex": [53, 54]},
                     suite="pretrained", regime="pretrained", noise=0.4)  # fmt: skip
    first.write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + '{"half a li')
    second.write_text("".join(json.dumps(r) + "\n" for r in features))
    out = tmp_path / "docs" / "results.md"
    assert report.main([str(first), str(second), f"--out={out}"]) == 0
    text = out.read_text()
    pretrained = report.by_task(features)
    for part in (
        f"`python -m experiments.suite --suite=new`: {len(RECORDS)} runs of 4 tasks, 2026-11-22, "
        "seeds among 0 to 2",
        "`python -m experiments.suite --suite=pretrained`: 6 runs of 1 tasks",
        f"python -m experiments.report {first} {second}", "jax 0.10.2",
        *(table(runs) for table in (report.overview, report.accuracies, OF_SAFLEX)
          for runs in (REPORT, report.of_half(RUNS, "development"), pretrained)),
        report.of_tasks(REPORT, "l2rw"),
        "| `saflex`, pretrained, report |", "| `l2rw`, scratch, report |",
        "`l2rw`, points of test accuracy:",
        "](results_partner.png)", "](results_noise.png)", "](results_val.png)",
    ):  # fmt: skip
        assert part in text
    assert "`l2rw`, pretrained" not in text  # it did not run there
    order = ("Where it does not help", "Against the best fair partner", "## Pretrained, report",
             "## Scratch, report", "## Scratch, development")  # fmt: skip
    assert sorted(order, key=text.index) == [*order]
    assert {p.name for p in out.parent.iterdir()} == {
        "results.md", "results_partner.png", "results_noise.png", "results_val.png",
    }  # fmt: skip
    capsys.readouterr()
    assert report.main([str(first), str(second), "--json", "--arm=saflex"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pretrained": report.headline(pretrained, "saflex"),
        "scratch": report.headline(REPORT, "saflex"),
    }
    nothing, missing = tmp_path / "nothing.jsonl", tmp_path / "missing.jsonl"
    nothing.write_text("")
    for options, message in (
        ([nothing, "--json"], "results must hold a record; given none"),
        ([first, missing, "--json"], f"must be files of records; there is no {missing}"),
        ([first, "--json", "--arm=saflexx"], "--arm must be one of ['l2rw', "),
        ([first, "--arm=saflex", f"--out={out}"], "--arm is of the numbers of --json"),
    ):
        with pytest.raises(SystemExit):
            report.main([*map(str, options)])
        assert message in capsys.readouterr().err


def test_points_of_the_figures():
    records = [r | {"task": f"g_val_{r['val']}"} for r in RECORDS if r["task"] == "wrong"]
    records += [r | {"task": "g", "val": 100, "half": "development"} for r in records]
    found = report.points(report.by_task(records), "saflex")
    assert [(p["val"], p["family"], p["half"]) for p in found] == [
        (200, "g", "report"), (100, "g", "development"),
    ]  # fmt: skip
    for point in found:
        assert point["mean"] == pytest.approx(0) and point["low"] == pytest.approx(
            -12.706, abs=1e-3
        )
        assert point["partner"] == "upstream_train_val" and point["noise"] == 0.4


def test_figures_draw_the_points():
    def task(mean, **more):
        about = {"task": "t", "partner": "p", "half": "report", "noise": 0.0, "val": 50}
        return {**about, "mean": mean, "low": mean - 1, "high": mean + 1, "family": "f"} | more

    tasks = [task(2.0, noise=0.4), task(1.0), task(4.0, noise=0.4021)]
    figure = report_figures.gain_against_noise({"pretrained": {"saflex": tasks}, "other": {}})
    left, right = figure.axes
    assert [a.get_title(loc="left") for a in figure.axes] == ["pretrained", "other"]
    assert not right.lines[1:]  # the zero alone
    dots, line = left.lines[1:3]
    assert dots.get_ydata().tolist() == [2, 1, 4]
    assert line.get_xydata().tolist() == [[0, 1], [40, 3]]  # one level
    assert [text.get_text() for text in left.texts] == ["saflex"]

    tasks = [task(3.0, val=200, family="g"), task(1.0, family="g"), task(9.0, val=100, family="h")]
    figure = report_figures.gain_against_validation({"pretrained": {"saflex": tasks}})
    (axis,) = figure.axes
    drawn = [found.get_xydata().tolist() for found in axis.lines[1:3]]
    assert sorted(drawn) == [[[50, 1], [200, 3]], [[100, 9]]]
    ends = sorted(c.get_segments()[0].tolist() for c in axis.collections)
    assert ends == [[[50, 0], [50, 2]], [[200, 2], [200, 4]]]
    assert axis.get_xscale() == "log"

    figure = report_figures.gain_by_task({
        "pretrained": [task(1.0, task="b", half="development", low=None), task(3.0, task="a"),
                       task(-2.0, task="d", noise=0.4)],
        "scratch": [task(0.0, task="c")],
    })  # fmt: skip
    upper, lower = figure.axes
    rows = [label.get_text() for label in upper.get_yticklabels()]
    assert rows == ["40% are wrong", "d", "0% are wrong", "a", "b"]
    dots = [found.get_xydata().tolist() for found in upper.lines[1:]]
    assert dots == [[[-2, 1]], [[3, 3]], [[1, 4]]]
    assert upper.lines[3].get_markerfacecolor() == style.PAPER  # of the half "development"
    intervals = [c.get_segments()[0].tolist() for c in upper.collections]
    assert intervals == [[[-3, 1], [-1, 1]], [[2, 3], [4, 3]]]
    assert [line.get_color() for line in upper.lines[1:]] == [style.ALL, style.OURS, style.OTHER]
    assert [text.get_text() for text in upper.texts] == ["- p"] * 3
    assert [label.get_text() for label in lower.get_yticklabels()] == ["0% are wrong", "c"]


def test_the_course_of_a_run_is_that_of_the_seeds_that_learned():
    history = [
        [{"step": s, "noise_rate": rate / 10, "relabelled": rate / 20} for s, rate in pairs]
        for pairs in ([(50, 1), (100, 4)], [(50, 3), (100, 4)])
    ]
    records = [line("a", "saflex", n, 50, noise=0.4, history=h) for n, h in enumerate(history)]
    records += [line("a", "upstream", 0, 50, noise=0.4, history=[{"step": 50}])]
    records += [line("b", "saflex", 0, 50, history=[{"step": 50, "kept": 1.0}])]
    runs = report.by_task(records)
    assert report.share_found(runs, "saflex") == pytest.approx(1)  # in the end
    assert report.share_found(runs, "upstream") is None
    found = report.courses(runs, "saflex")
    assert list(found) == ["a"] and found["a"]["noise"] == 0.4
    upper, lower = report_figures.course(found).axes  # one share of wrong labels
    truth, task = upper.lines
    assert truth.get_ydata() == [40, 40]
    assert task.get_xydata().tolist() == [[50, pytest.approx(20)], [100, 40]]
    assert lower.lines[1].get_ydata().tolist() == [pytest.approx(10), 20]


def test_without_results_the_kept_ones_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    # One of the project's files; the others are not there.
    (tmp_path / report.RESULTS[-1]).write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert report.main(["--json", "--arm=saflex"]) == 0
    assert json.loads(capsys.readouterr().out) == {"scratch": report.headline(REPORT, "saflex")}
