"""What is said of the runs, on records with answers worked out by hand."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments import arms, report, report_figures


def line(task, arm, seed, accuracy, **more):
    """A record as `experiments.suite` writes it; accuracy in points."""
    return {
        "suite": "small", "task": task, "half": "report", "noise": 0.0, "val": 50, "arm": arm,
        "seed": seed, "settings": "same", "test_accuracy": accuracy / 100, "test_ece": 0.05,
        "seconds_per_step": 0.001, "versions": {"jax": "0.10.2"},
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


def test_records_by_task_arm_and_seed():
    assert list(RUNS) == ["clean", "wrong", "few", "other"]
    assert list(REPORT) == ["clean", "wrong", "few"]
    assert RUNS["wrong"]["mwn"][1]["test_accuracy"] == 0.5
    assert report.all_arms(RUNS) == ["upstream", "upstream_train_val", "saflex", "l2rw", "mwn"]


def test_only_the_last_settings_of_a_tasks_arm_count():
    old = [line("a", "saflex", seed, 10, settings="old") for seed in range(3)]
    base = [line("a", "upstream", seed, 20, settings="old") for seed in range(3)]
    new = [line("a", "saflex", seed, 30, settings="new") for seed in range(2)]
    found = report.by_task([*old, *base, *new])
    assert report.gains(found, "saflex", "upstream") == {"a": pytest.approx([10, 10])}
    twice = report.by_task([*base, *new, line("a", "saflex", 0, 31, settings="new")])
    assert report.gains(twice, "saflex", "upstream") == {"a": pytest.approx([11, 10])}


def test_records_of_several_suites_or_none_are_refused():
    full = line("a", "saflex", 0, 10, suite="full")
    with pytest.raises(ValueError, match=r"must be of one suite; given \['full', 'small'\]"):
        report.by_task([*RECORDS, full])
    with pytest.raises(ValueError, match=r"must be of one suite; given \[\]"):
        report.by_task([])


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


def test_the_five_numbers():
    # Over train + validation: "clean" 0, 1, -1 (mean 0); "wrong" 1, -1 (mean 0); "few" 6.
    found = report.headline(REPORT, "saflex")
    assert found == pytest.approx({
        "gain_over_upstream": 1.0,
        "gain_over_upstream_train_val": 2.0,
        "gain_over_upstream_train_val_noisy": 0.0,  # "wrong" alone has 40 % or more
        "worst_gain_over_upstream": -4.0,
        # "wrong": over l2rw by 0, 1, and level with mwn's mean, 50. "few" is above l2rw. "clean",
        # far below l2rw, has no wrong labels.
        "share_of_noisy_tasks_at_or_above_best_baseline": 1.0,
    }, abs=1e-9)  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    below = report.by_task([*RECORDS, line("few", "mwn", 0, 26.5, noise=0.1)])
    below = report.headline(report.of_half(below, "report"), "saflex")
    assert below["share_of_noisy_tasks_at_or_above_best_baseline"] == 0.5
    assert set(report.headline(REPORT, "saflex_train_val").values()) == {None}
    assert set(report.headline({}, "saflex").values()) == {None}


def test_a_best_baseline_is_one_that_is_no_base_and_no_rule():
    without = [
        *lines("t", {"upstream": [90], "upstream_train_val": [90], "saflex": [50],
                     "saflex_other": [99]}, noise=0.4),
    ]  # fmt: skip
    assert report.at_or_above_best(report.by_task(without), "saflex") is None
    one = report.by_task([*without, line("t", "boot", 0, 50, noise=0.4)])
    assert report.at_or_above_best(one, "saflex") == 1.0
    level = lines("t", {"saflex": [70, 81.1], "boot": [81.1, 70]}, noise=0.4)  # but for rounding
    assert report.at_or_above_best(report.by_task(level), "saflex") == 1.0
    two = report.by_task([*without, *lines("t", {"boot": [50], "mwn": [50.1]}, noise=0.4)])
    assert report.at_or_above_best(two, "saflex") == 0.0


def test_calibration_and_cost():
    records = [
        *(line("a", "upstream", s, 50, seconds_per_step=t) for s, t in enumerate((1, 2, 9))),
        *(line("a", "x", s, 50, seconds_per_step=t) for s, t in enumerate((3, 4, 100))),
        *(line("b", "upstream", s, 50, seconds_per_step=10) for s in range(2)),
        *(line("b", "x", s, 50, seconds_per_step=10, test_ece=0.3) for s in range(2)),
        line("c", "x", 0, 50, test_ece=0.2),
    ]
    runs = report.by_task(records)
    assert report.step_cost(runs, "x") == pytest.approx((4 / 2 + 1) / 2)
    assert report.step_cost(runs, "upstream") == 1
    assert report.step_cost(report.by_task(records[-1:]), "x") is None
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


def test_the_tables_say_the_numbers():
    overview = cells(report.overview(REPORT))
    assert list(overview) == ["upstream", "upstream_train_val", "saflex", "l2rw", "mwn"]
    row = overview["saflex"]
    half = 4.302652729911275 * math.sqrt(21) / math.sqrt(3)
    assert row["tasks"] == "3" and row["ECE"] == "5.00" and row["step cost"] == "1.00"
    assert row["- upstream (95 % interval)"] == f"+1.00 ({1 - half:+.2f} to {1 + half:+.2f})"
    assert overview["upstream"]["- upstream (95 % interval)"] == ""
    assert overview["mwn"]["- upstream_train_val (95 % interval)"] == "+0.00"

    accuracies = cells(report.accuracies(REPORT))
    assert accuracies["clean"] == {
        "task": "clean", "noise": "0.00", "val": "50", "upstream": "70.00",
        "upstream_train_val": "72.00", "saflex": "72.00", "l2rw": "**90.00**", "mwn": "",
    }  # fmt: skip
    assert accuracies["wrong"]["saflex"] == accuracies["wrong"]["mwn"] == "**50.00**"

    rows = [row.split(" | ") for row in report.details(REPORT).splitlines()]
    (found,) = [row for row in rows if row[0] == "| clean" and row[1] == "saflex"]
    apart = 4.302652729911275 / math.sqrt(3)
    spread = apart * np.std([61, 72, 83], ddof=1)
    assert found[2:5] == ["3", f"72.00 ({72 - spread:.2f} to {72 + spread:.2f})",
                          f"+2.00 ({2 - apart:+.2f} to {2 + apart:+.2f})"]  # fmt: skip
    assert found[5] == f"+0.00 ({-apart:+.2f} to {apart:+.2f})"

    five = cells(report.headlines(REPORT))
    assert five["`worst_gain_over_upstream`"]["saflex"] == "-4.00"
    assert five["`share_of_noisy_tasks_at_or_above_best_baseline`"]["saflex"] == "1.00"


def test_the_command_writes_the_page_with_its_sources_and_figures(tmp_path, capsys):
    results, out = tmp_path / "small.jsonl", tmp_path / "docs" / "results.md"
    results.write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + '{"half a li')
    assert report.main([str(results), f"--out={out}"]) == 0
    text = out.read_text()
    for part in (
        "python -m experiments.suite --suite=small", "2026-11-22", "seeds among 0 to 2",
        f"python -m experiments.report {results}", "jax 0.10.2", f"{len(RECORDS)} runs of 4 tasks",
        report.overview(REPORT), report.accuracies(REPORT), report.details(REPORT),
        report.overview(report.of_half(RUNS, "development")),
        "](results_noise.png)", "](results_val.png)",
    ):  # fmt: skip
        assert part in text
    assert text.index('half "report"') < text.index('half "development"')
    assert {p.name for p in out.parent.iterdir()} == {
        "results.md", "results_noise.png", "results_val.png",
    }  # fmt: skip
    capsys.readouterr()
    assert report.main([str(results), "--json", "--arm=saflex"]) == 0
    assert json.loads(capsys.readouterr().out) == report.headline(REPORT, "saflex")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nothing.jsonl"), "--json"])
    assert "records must be of one suite; given []" in capsys.readouterr().err


def test_points_of_the_figures():
    records = [r | {"task": f"g_val_{r['val']}"} for r in RECORDS if r["task"] == "wrong"]
    records += [r | {"task": "g", "val": 100} for r in records]
    found = report.points(report.by_task(records), "saflex", "upstream", "val")
    assert [(p["x"], p["family"]) for p in found] == [(200, "g"), (100, "g")]
    assert all(p["mean"] == pytest.approx(5) for p in found)
    assert report.points(RUNS, "saflex", "upstream", "noise")[1]["x"] == 0.4


def test_figures_draw_the_points():
    def task(x, mean, family="f"):
        return {
            "x": x, "mean": mean, "low": mean - 1, "high": mean + 1, "family": family,
        }  # fmt: skip

    tasks = [task(0.4, 2.0), task(0.0, 1.0), task(0.4021, 4.0)]
    figure = report_figures.gain_against_noise({"upstream": {"saflex": tasks}, "other": {}})
    left, right = figure.axes
    assert [a.get_ylabel() for a in figure.axes] == [
        "points of test accuracy over upstream", "points of test accuracy over other",
    ]  # fmt: skip
    assert not right.lines[1:]  # the zero alone
    dots, line = left.lines[1:3]
    assert dots.get_ydata().tolist() == [2, 1, 4]
    assert line.get_xydata().tolist() == [[0, 1], [0.4, 3]]  # one level

    tasks = [task(200, 3.0, "g"), task(50, 1.0, "g"), task(100, 9.0, "alone")]
    figure = report_figures.gain_against_validation({"upstream": {"saflex": tasks}})
    (axis,) = figure.axes
    drawn = [found.get_xydata().tolist() for found in axis.lines[1:3]]
    assert sorted(drawn) == [[[50, 1], [200, 3]], [[100, 9]]]
    ends = sorted(c.get_segments()[0].tolist() for c in axis.collections)
    assert ends == [[[50, 0], [50, 2]], [[200, 2], [200, 4]]]
    assert axis.get_xscale() == "log"


def test_the_course_of_a_run_is_that_of_the_seeds_that_learned():
    history = [
        [{"step": s, "noise_rate": rate / 10, "relabelled": rate / 20} for s, rate in pairs]
        for pairs in ([(50, 1), (100, 4)], [(50, 3), (100, 4)])
    ]
    records = [line("a", "saflex", n, 50, noise=0.4, history=h) for n, h in enumerate(history)]
    records += [line("a", "upstream", 0, 50, noise=0.4, history=[{"step": 50}])]
    records += [line("b", "saflex", 0, 50, history=[{"step": 50, "kept": 1.0}])]
    found = report.courses(report.by_task(records), "saflex")
    assert list(found) == ["a"] and found["a"]["noise"] == 0.4
    left, right = report_figures.course(found).axes
    assert left.lines[0].get_xydata().tolist() == [[50, pytest.approx(0.2)], [100, 0.4]]
    assert right.lines[0].get_ydata().tolist() == [pytest.approx(0.1), 0.2]


def test_without_results_the_kept_ones_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / report.RESULTS).write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert report.main(["--json", "--arm=saflex"]) == 0
    assert json.loads(capsys.readouterr().out) == report.headline(REPORT, "saflex")


def test_reading_leaves_out_half_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    assert arms.read_records(path) == []
    path.write_text('{"a": 1}\n{"b"')
    assert arms.read_records(path) == [{"a": 1}]
