"""The results of `experiments.suite`: a page with tables and figures, or its numbers.

    python -m experiments.report [runs/suite/small.jsonl ...] [--out=docs/results.md]
    python -m experiments.report [runs/suite/small.jsonl ...] --json [--arm=saflex_train_val]

Without a file it reads the project's own results, those of RESULTS that there are. Regimes are kept
apart: networks from scratch, and heads on pretrained features.

Differences are paired: an arm and its base on one task and seed share splits, wrong labels and the
order of the batches. Per task the interval is Student's t over the seeds' differences. Over tasks
it is Student's t over the tasks' means: an interval of the mean over tasks like these, in which a
task is one observation. One more task's own gain scatters far more widely. Tasks that share a data
set count as several, although they are related. How sure the average over exactly these tasks is,
another question, is said beside it.

What an arm has to beat is on each task the best of what a user would do without it, its fair
partner (PARTNERS). The best one is known from the same test runs that the arm is compared on, which
favours the partner.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable

import numpy as np
from scipy import stats

from experiments import arms, json_lines, report_figures, style
from experiments.suite_tasks import HALVES
from saflex_jax import checks

# The project's own.
RESULTS = ("docs/results_pretrained.jsonl", "docs/results_tables.jsonl", "docs/results.jsonl")
GALLERY = "results_gallery.png"  # beside the page; made by another command
# task -> arm -> seed -> record
Runs = dict[str, dict[str, dict[int, dict]]]

REGIMES = ("pretrained", "scratch")  # of a record's field; one without it is from scratch
# Suites whose half "report" was looked at before the rule of today: all their tasks are
# development now.
SEEN = ("small", "full")
UPSTREAM, TRAIN_VAL = "upstream", "upstream_train_val"
PARTNERS = (
    *(TRAIN_VAL, "trusted_only", "early_stopping"),
    *("linear_probe", "logistic", "boosted_trees", "boosted_trees_stopped"),
)
RULE = "saflex"  # prefix of the arms with the rule that is judged
ARM = "saflex_train_val"  # the arm that is judged: it trains on what upstream_train_val has
# On the page.
JUDGED = (ARM, "saflex_elr", "saflex_audit", "saflex_audit_elr")
DRAWN = (RULE, *JUDGED)  # in the figures, where it holds the trusted samples out, too
NOISY = 0.4  # from this share of wrong labels on a task is very noisy
POINTS = 100  # records have accuracies as shares; the page has points

GALLERY_TITLE = (
    "What SAFLEX learned about the samples of a noisy generator, by `python -m experiments.compare "
    "--config=experiments/configs/generator.py --seeds=3`"
)


# --- Pure functions of records


def by_regime(records: Iterable[dict]) -> dict[str, Runs]:
    """Regime -> `by_task` of its records, in the order of REGIMES.

    Raises:
      ValueError: no record; an unknown regime; as `by_task`.
    """
    of_regime: dict[str, list] = {regime: [] for regime in REGIMES}
    for record in records:
        regime = record.get("regime", "scratch")
        checks.choice(REGIMES, regime=regime)
        of_regime[regime].append(record)
    found = {regime: by_task(some) for regime, some in of_regime.items() if some}
    if not found:
        raise ValueError("results must hold a record; given none")
    return found


def by_task(records: Iterable[dict]) -> Runs:
    """The records by task, arm and seed.

    Where a task's arm was run under several settings, those of its last record count.

    Raises:
      ValueError: two suites have a task of one name.
    """
    records = list(records)
    suites = {}
    for r in records:
        if suites.setdefault(r["task"], r["suite"]) != r["suite"]:
            raise ValueError(
                f"task must be of one suite; given {r['task']} of {suites[r['task']]} and "
                f"{r['suite']}"
            )
    last = {(r["task"], r["arm"]): r["settings"] for r in records}
    runs: Runs = {}
    for r in records:
        if r["settings"] == last[r["task"], r["arm"]]:
            runs.setdefault(r["task"], {}).setdefault(r["arm"], {})[r["seed"]] = r
    return runs


def about(runs: Runs, task: str) -> dict:
    """Any record of the task, for the fields that all share: half, noise, val."""
    (first, *_), *_ = (list(seeds.values()) for seeds in runs[task].values())
    return first


def half_of(record: dict) -> str:
    """The half of a record's task; "development" where its suite's report half was seen."""
    return "development" if record["suite"] in SEEN else record["half"]


def of_half(runs: Runs, half: str) -> Runs:
    """The tasks of that half."""
    return {task: by_arm for task, by_arm in runs.items() if half_of(about(runs, task)) == half}


def clean(runs: Runs) -> Runs:
    """The tasks without wrong labels."""
    return {task: by_arm for task, by_arm in runs.items() if not about(runs, task)["noise"]}


def noisy(runs: Runs, least: float = np.finfo(float).tiny) -> Runs:
    """The tasks with wrong labels; with at least that share of them."""
    return {task: by_arm for task, by_arm in runs.items() if about(runs, task)["noise"] >= least}


def all_arms(runs: Runs) -> list[str]:
    """Upstream, fair partners, arms with the rule, baselines; the last two by name."""
    names = {arm for by_arm in runs.values() for arm in by_arm}
    first = [arm for arm in (UPSTREAM, *PARTNERS) if arm in names]
    return first + sorted(names - {*first}, key=lambda arm: (not arm.startswith(RULE), arm))


def gains(runs: Runs, arm: str, base: str) -> dict[str, list[float]]:
    """Task -> the arm's gain over the base in points of test accuracy, one for each common seed.

    Tasks without a common seed are left out.
    """
    by_task = {}
    for task, by_arm in runs.items():
        records, others = by_arm.get(arm, {}), by_arm.get(base, {})
        values = [
            _rounded(POINTS * (records[seed]["test_accuracy"] - others[seed]["test_accuracy"]))
            for seed in sorted(records.keys() & others.keys())
        ]
        if values:
            by_task[task] = values
    return by_task


def _rounded(points: float) -> float:
    """Drops the rounding errors of a difference, which could turn a tie into a loss."""
    return round(float(points), 6)


def fair_partners(runs: Runs, arm: str) -> dict[str, str]:
    """Task -> the arm of PARTNERS, other than `arm`, that `arm` gains least over.

    With the same seeds for all it is the one with the highest mean. The first of several that are
    level. Tasks that the arm shares with no partner are left out.
    """
    least: dict[str, tuple[float, str]] = {}
    for partner in PARTNERS:
        for task, values in ({} if partner == arm else gains(runs, arm, partner)).items():
            gain = _rounded(np.mean(values))
            if task not in least or gain < least[task][0]:
                least[task] = gain, partner
    return {task: least[task][1] for task in runs if task in least}


def gains_over_partner(runs: Runs, arm: str) -> dict[str, list[float]]:
    """Task -> the arm's gain over the task's fair partner, as `gains`."""
    return {
        task: gains({task: runs[task]}, arm, partner)[task]
        for task, partner in fair_partners(runs, arm).items()
    }


def interval(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and interval of 95 % by Student's t, as `arms.paired_difference` to zero."""
    values = list(values)
    return arms.paired_difference(values, [0.0] * len(values))


def over_tasks(gains: dict[str, list[float]]) -> dict[str, float | None] | None:
    """Mean over tasks of the means over seeds, with its interval over tasks; None without tasks."""
    return interval(np.mean(values) for values in gains.values()) if gains else None


def mean_gain(gains: dict[str, list[float]]) -> float | None:
    """Mean over tasks of the means over seeds; None without tasks."""
    return over_tasks(gains)["mean"] if gains else None


def of_these_tasks(gains: dict[str, list[float]]) -> dict[str, float | None] | None:
    """Mean over tasks of the means over seeds, with its interval over seeds.

        mean +- t_(0.975, v) e / T ,   e^2 = sum_t e_t^2 ,   e_t^2 = sd_t^2 / n_t
        v = e^4 / sum_t e_t^4 / (n_t - 1)

    The tasks are fixed: this is how sure the average over exactly these tasks is. None without
    tasks; no interval where a task has one seed.

    Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components",
    Biometrics Bulletin 1946, for v.
    """
    if not gains:
        return None
    mean, numbers = mean_gain(gains), [len(values) for values in gains.values()]
    if min(numbers) < 2:
        return {"mean": mean, "low": None, "high": None}
    squares = np.array([np.var(values, ddof=1) / len(values) for values in gains.values()])
    if not squares.sum():
        return {"mean": mean, "low": mean, "high": mean}
    freedom = squares.sum() ** 2 / np.sum(squares**2 / (np.array(numbers) - 1))
    half = stats.t.ppf((1 + arms.LEVEL) / 2, freedom) * np.sqrt(squares.sum()) / len(gains)
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def outcome(values: list[float]) -> str:
    """Of a task's gains: "tie" if their interval contains zero, else "win" or "loss"."""
    gain = interval(values)
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        return "tie"
    return "win" if gain["mean"] > 0 else "loss"


def counts(gains: dict[str, list[float]]) -> dict[str, int]:
    """How many tasks were won, tied and lost."""
    outcomes = [outcome(values) for values in gains.values()]
    return {name: outcomes.count(name) for name in ("win", "tie", "loss")}


def over_best_baseline(runs: Runs, arm: str) -> dict[str, tuple[float, str]]:
    """Task -> the arm's gain over the best arm without the rule, over common seeds, and its name.

    These are upstream, the fair partners and all baselines, those that are told the share of wrong
    labels, too. A task is left out if the arm or all of them were not run on it.
    """
    least: dict[str, tuple[float, str]] = {}
    for other in all_arms(runs):
        for task, values in ({} if other.startswith(RULE) else gains(runs, arm, other)).items():
            gain = _rounded(np.mean(values))
            if task not in least or gain < least[task][0]:
                least[task] = gain, other
    return least


def at_or_above_best(runs: Runs, arm: str) -> float | None:
    """Share of the tasks of `over_best_baseline` with no loss; None if there is no such task."""
    least = over_best_baseline(runs, arm)
    return float(np.mean([gain >= 0 for gain, _ in least.values()])) if least else None


def worst(gains: dict[str, list[float]]) -> dict | None:
    """The task with the least mean over seeds, and that mean; None without tasks."""
    if not gains:
        return None
    means = {task: _rounded(np.mean(values)) for task, values in gains.items()}
    task = min(means, key=means.get)
    return {"task": task, "gain": means[task]}


def _apart(base: str, gains: dict[str, list[float]]) -> dict:
    """The mean gain over a base, its interval over tasks, and the worst task."""
    whole, least = over_tasks(gains), worst(gains)
    bounds = whole and [whole["low"], whole["high"]]
    return {
        f"gain_over_{base}": whole and whole["mean"],
        f"gain_over_{base}_interval": None if bounds == [None, None] else bounds,
        f"worst_gain_over_{base}": least and least["gain"],
        f"worst_task_over_{base}": least and least["task"],
    }


def headline(runs: Runs, arm: str) -> dict[str, float | list | dict | None]:
    """What is said of an arm over these tasks, in points; None where there is no run.

    Gains are means over tasks of means over seeds; an interval is of 95 % over tasks, [low, high];
    "worst" is a task and its mean; the share is of the tasks with wrong labels.
    """
    upstream = gains(runs, arm, UPSTREAM)
    tasks = _number_of_tasks(runs, arm)
    numbers: dict = {"tasks": tasks, "gain_over_upstream": mean_gain(upstream)}
    parts = {"": runs, "_clean": clean(runs), "_noisy": noisy(runs),
             "_very_noisy": noisy(runs, NOISY)}  # fmt: skip
    for part, some in parts.items():
        numbers |= _apart(f"best_fair_partner{part}", gains_over_partner(some, arm))
    for part in ("", "_clean"):
        numbers |= _apart(f"{TRAIN_VAL}{part}", gains(parts[part], arm, TRAIN_VAL))
    share = at_or_above_best(noisy(runs), arm)
    return numbers | {"share_of_noisy_tasks_at_or_above_best_baseline": share}


def _number_of_tasks(runs: Runs, arm: str) -> int:
    """Those that the arm ran on."""
    return sum(arm in by_arm for by_arm in runs.values())


def mean_of(runs: Runs, arm: str, name: str) -> float | None:
    """Mean over tasks of the mean over seeds of one field of the records."""
    means = [
        np.mean([record[name] for record in by_arm[arm].values()])
        for by_arm in runs.values()
        if arm in by_arm
    ]
    return float(np.mean(means)) if means else None


# --- The page


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def signed(gain: dict[str, float | None] | None) -> str:
    """Mean and interval, such as "+1.20 (+0.80 to +1.60)"; nothing for None."""
    return arms.difference_text(gain, digits=2)


def spread(gain: dict[str, float | None] | None) -> str:
    """The interval alone, such as "+0.80 to +1.60"; nothing without one."""
    none = gain is None or gain["low"] is None
    return "" if none else f"{gain['low']:+.2f} to {gain['high']:+.2f}"


def number(value: float | None, form: str = ".2f") -> str:
    """The formatted number; nothing for None."""
    return "" if value is None else format(value, form)


def shortcomings(parts: dict[str, Runs], arms: Iterable[str]) -> str:
    """One row for each arm and part: how often something else is better, and where most."""
    head = ["arm", "fair partner better", "worst", "baseline better", "worst"]
    rows = []
    for arm in arms:
        for name, runs in with_arm(parts, arm).items():
            found, partners = gains_over_partner(runs, arm), fair_partners(runs, arm)
            best = over_best_baseline(noisy(runs), arm)
            below = [(np.mean(v), task, partners[task]) for task, v in found.items()]
            below = [least for least in below if least[0] < 0]
            less = [(gain, task, other) for task, (gain, other) in best.items() if gain < 0]
            rows.append([
                f"`{arm}`, {name}",
                f"{len(below)} of {len(found)}, {counts(found)['loss']} surely",
                _worst_of(below),
                f"{len(less)} of {len(best)}" if best else "",
                _worst_of(less),
            ])  # fmt: skip
    return markdown(head, rows)


def _worst_of(losses: list[tuple[float, str, str]]) -> str:
    """The worst task, and what is better there; nothing without one."""
    return "{:+.2f} `{}`, {}".format(*min(losses)) if losses else ""


def with_arm(parts: dict[str, Runs], arm: str) -> dict[str, Runs]:
    """The parts in which it ran."""
    return {name: runs for name, runs in parts.items() if arm in all_arms(runs)}


def summary(parts: dict[str, Runs], arm: str) -> str:
    """`headline` of an arm, one column for each part."""
    numbers = {name: headline(runs, arm) for name, runs in parts.items()}
    names, *_ = numbers.values()
    rows = []
    for name in names:
        if not name.startswith("worst_task") and not name.endswith("_interval"):
            rows.append([f"`{name}`", *(_said(found, name) for found in numbers.values())])
    return markdown(["", *parts], rows)


def _said(numbers: dict, name: str) -> str:
    """A number of `headline` with its interval or its task."""
    value, bounds = numbers[name], numbers.get(f"{name}_interval")
    if value is None or not name.startswith(("gain", "worst")):
        return number(value, "d" if name == "tasks" else ".2f")
    if name.startswith("worst"):
        return f"{value:+.2f} ({numbers[name.replace('gain', 'task')]})"
    return signed({"mean": value, **dict(zip(("low", "high"), bounds or (None, None)))})


def overview(runs: Runs) -> str:
    """One row per arm: gains over upstream and the fair partner, calibration, `share_found`."""
    head = ["arm", "tasks", f"- {UPSTREAM} (95 % interval)", "- fair partner (95 % interval)",
            "of these tasks", "won, tied, lost", "ECE", "found"]  # fmt: skip
    rows = []
    for arm in all_arms(runs):
        over_upstream = {} if arm == UPSTREAM else gains(runs, arm, UPSTREAM)
        over_partner = gains_over_partner(runs, arm)
        outcomes = ", ".join(map(str, counts(over_partner).values())) if over_partner else ""
        ece = mean_of(runs, arm, "test_ece")
        rows.append([
            arm, str(_number_of_tasks(runs, arm)),
            signed(over_tasks(over_upstream)), signed(over_tasks(over_partner)),
            spread(of_these_tasks(over_partner)), outcomes,
            number(ece and POINTS * ece), number(share_found(runs, arm)),
        ])  # fmt: skip
    return markdown(head, rows)


def of_tasks(runs: Runs, arm: str) -> str:
    """One row per task, the least gain over the fair partner first: an arm and what lies around it.

    "Best without" is the best arm without the rule, on tasks with wrong labels.
    """
    partners, over_partner = fair_partners(runs, arm), gains_over_partner(runs, arm)
    over_base, best = gains(runs, arm, TRAIN_VAL), over_best_baseline(noisy(runs), arm)
    rows = []
    for task in sorted(partners, key=lambda task: np.mean(over_partner[task])):
        common, records = about(runs, task), runs[task][arm].values()
        base = interval(over_base[task]) if task in over_base else None
        partner = f"{signed(interval(over_partner[task]))}, {partners[task]}"
        accuracy = POINTS * float(np.mean([r["test_accuracy"] for r in records]))
        over_best = f"{best[task][0]:+.2f}, {best[task][1]}" if task in best else ""
        rows.append([task, f"{common['noise']:.2f}", str(common["val"]), str(len(records)),
                     number(accuracy), signed(base), partner, over_best])  # fmt: skip
    head = ["task", "noise", "val", "seeds", arm, f"- {TRAIN_VAL}", "- fair partner",
            "- best without"]  # fmt: skip
    return markdown(head, rows)


def accuracies(runs: Runs) -> str:
    """Mean test accuracy, one row per task and one column per arm; the best is bold."""
    columns = all_arms(runs)
    rows = []
    for task, by_arm in runs.items():
        means = {
            arm: POINTS * float(np.mean([r["test_accuracy"] for r in seeds.values()]))
            for arm, seeds in by_arm.items()
        }
        cells = [number(means.get(arm)) for arm in columns]
        best = number(max(means.values()))
        rows.append([task, *(f"**{cell}**" if cell == best else cell for cell in cells)])
    return markdown(["task", *columns], rows)


def provenance(regimes: dict[str, Runs], files: list[str]) -> str:
    """Commands, seeds, dates and versions of everything on the page."""
    by_suite: dict[str, list] = {}
    for runs in regimes.values():
        for by_arm in runs.values():
            for seeds in by_arm.values():
                for r in seeds.values():
                    by_suite.setdefault(r["suite"], []).append(r)
    lines = []
    for suite, records in by_suite.items():
        dates, seeds = sorted(r["date"][:10] for r in records), {r["seed"] for r in records}
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        tasks = len({r["task"] for r in records})
        lines.append(
            f"- `python -m experiments.suite --suite={suite}`: {len(records)} runs of {tasks} "
            f"tasks, {when}, seeds among {min(seeds)} to {max(seeds)}"
        )
    every = [r for records in by_suite.values() for r in records]
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in every})
    said = f"This page: `python -m experiments.report {' '.join(files)}`. {'; '.join(versions)}."
    return "\n".join([said, "", *lines])


SHORTCOMINGS = """\
On how many tasks the best fair partner has a higher mean, "surely" with an interval that excludes
zero; and, of the tasks with wrong labels, on how many any arm without the rule has one. In points,
with the worst task and what is better there. Task by task: further down.
"""

INTRODUCTION = """\
Points of test accuracy, read once per run with the last parameters (with early stopping, with those
that were best on the trusted samples). An arm's *fair partner* on a task is the best of what a user
would do without it: train on all samples (`upstream_train_val`), on the trusted samples alone
(`trusted_only`), or with early stopping on them (`early_stopping`); a logistic regression on
features (`linear_probe`) or tables (`logistic`); boosted trees on tables (`boosted_trees`), or with
early stopping on the trusted samples (`boosted_trees_stopped`). The best one is known from the same
test runs, which favours the partner.
`share_of_noisy_tasks_at_or_above_best_baseline` counts a task if no arm without the rule has a
higher mean, including arms that are told the share of wrong labels (`small_loss`, `co_teaching`).
"Very noisy": at least 40 % are wrong.

Differences are paired seed by seed. An interval over tasks is Student's t over the tasks' means: it
is for the mean over such tasks, not for the gain on one more task, which scatters far more. "Of
these tasks" is the seeds' interval for the average over exactly these tasks. A task's interval is
Student's t over its seeds; a task is won or lost if the interval excludes zero. ECE is the expected
calibration error in points, 15 bins. "Found": the share of wrong labels as the rule estimates it in
the end, over the true one, the median of the noisy tasks. `noise` is the share of wrong labels
among the candidates, `val` the number of trusted samples. The cost of a step: [cost.md](cost.md).

`upstream` trains on the training split alone. SAFLEX (defaults) holds the trusted samples out in
`saflex`, also trains on them in `saflex_train_val`, cuts them into five folds in `saflex_folds`,
and does not use them in `saflex_train_batch`; `saflex_paper` is the paper's rule, held out.
`saflex_squared` is `saflex_train_val` with squared beliefs (`sharpness=2`), the default up to
2026-11-29, in the place of the power that the given labels speak for.
`saflex_elr` is the rule inside ELR, which is as strong as the rule finds labels wrong; its beliefs
are not sharpened (`sharpness=1`), and it trains on them. `saflex_audit` trains plainly on the soft
labels that an audit learned beforehand, on labels as given where none is surely wrong.
`saflex_audit_elr` is `saflex_elr` that starts from what an audit believes, where some are. Where an
audit cannot tell labels from features at all (one sample a class), or labels are graded, these two
have no runs.

Of the other baselines, `confident_learning` and `neighbours` leave samples out before training, by
a cross-validated logistic regression or the labels of the nearest; `soft_augmentation` trains on
the soft labels of its crops; the rest are methods and rules by their papers' names.
`early_stopping`, `boosted_trees_stopped`, `l2rw` and `meta_weight_net` hold the trusted samples
out, too; the other arms train on them.

Two regimes: heads on features of a pretrained network, and networks from scratch. With pretrained
features every arm has its best head and decay on right-labelled training samples of other seeds,
1,000 of each of two, of small sets and few-shot tasks 200 or 400 of each of five
([tuned.json](tuned.json); `experiments/pretrained_tasks.py` has the grid). From scratch, the suite
"tables" trains MLPs and FT-Transformers to convergence, each arm with its best decay, chosen
likewise by as many samples as are trusted, of each of two seeds, of MLPs on right labels five
(`experiments/table_tasks.py`); of its half "development" the transformers were not run. In
the suite "small" all arms share one setting, and `saflex_folds` and `saflex_train_batch` are of an
earlier version of the rule, without confused classes and with whole steps (`by_class=False`,
`lookahead=1`).

Brain MRI and most tables have no test split of their own, so each seed draws one: some samples by
which a head or decay was chosen are test samples of a reported seed. It is so for all arms alike.

The halves were named before any run: rules and options are chosen on "development". How often each
arm has been run on the half "report", and what prompted the next time (points over the best fair
partner with wrong labels, unless said otherwise; every change but that of `saflex_train_val` was
chosen on "development" alone):

- `saflex_squared` on "pretrained": with whole steps (-.66 on all tasks, worst -4.7 with 10
  trusted samples), then with steps that are shorter for few trusted samples.
- The baselines, tuned alike, ran after both, on tasks with wrong labels alone (`elr` on two more,
  for the README). They showed what the rule lacks.
- `saflex_elr`: with ELR at full strength throughout (pretrained +1.71, right labels -.51, worst
  -3.8; from scratch -.49, on "development" -2.49), then as it is.
- `saflex_audit`: with the kind of head chosen by labels as given, which learned labels always
  (+.74, worst -5.4; 5 and 10 right-labelled images a class -1.9 and -1.2); with trusted labels that
  choose and a test whether any label is wrong (+1.37, worst -3.9); and, on wrong labels alone, with
  the share of wrong labels that the audit's first round found (with that round's confusion +1.32,
  and as it is), which makes its tables truer and heads no better. Heads and decays were chosen for
  the third of these four.
- `saflex_train_val`, prompted by the losses of `saflex_squared` on covertype and chosen on four
  tables (letter, magic and marketing, which are tasks of "development" since, and white wine):
  with powers from 1/2 on (pretrained +1.68, tables -.97; adult with 40 % wrong 3.6 below a power of
  2, `phoneme_noisy` of "small" 3.9 below plain training), then with powers from 1 on.
- These but the audit: with the share of wrong labels shrunk by the largest standard error that it
  can have, then by the one that it has, chosen on CIFAR-10 features and tables of "development".
  Before, `saflex_squared` was +1.27 (scratch -.80), `saflex_train_val` +1.70 (-.53),
  `saflex_elr` +1.71 (-1.10). Where the head stayed the same, tasks with wrong labels changed by -.1
  to 0 on average; from scratch, with the same decay, by 0 to +2.2 (trusted samples held out).
- All arms of "pretrained": with heads chosen by the trusted samples' number of two seeds, 200 to
  500, then by 1,000 and more, since heads had differed by more than what was compared (with 10
  trusted samples two arms had taken heads that cost them 2 points). 119 of 305 heads changed.
  Before, `saflex_squared` was +1.20, `saflex_train_val` +1.47, `saflex_elr` +1.45,
  `saflex_audit` +1.29, `elr` +1.1, with no baseline above them on 3, 6, 7, 7 and 5 of 12 tasks.
  `saflex_paper` ran for the first time.
- `saflex_train_val` once more, since the best power at an end of its range was not always reached;
  heads and decays are those of before. Its power became the default afterwards, by "development"
  (docs/why.md).
- `saflex_audit` twice more, since audits of few samples learned wrong labels by heart: with at most
  16 passes, chosen on chest X-rays and on parts of CIFAR-10. First its heads also trained on all
  views of a sample (+1.61, .18 to 3.05; brain MRI 90.8, nine others lower by .03 to .2); where
  samples are many, development spoke against that (CIFAR-10N "worst" with 100 trusted samples: 79.7
  for 80.3). So it is by the first view, as before; heads of 8,000 samples or more do not change.
  Before, it was +1.35, with no baseline above it on 8 tasks.
- All arms on the MLPs' tables with right labels: with decays, leaves and strengths chosen by the
  trusted samples' number of two seeds, then of five, prompted by cmc of "development": there
  SAFLEX, with both powers, had taken another decay than all samples did, by 400 samples, and was 4
  points below. 45 of 195 choices changed. Before, `saflex_train_val` was .04 above all samples on
  the seven tables of "report" and .2 below on the 15 of "development", `saflex_squared` .6 above
  and .6 below.
- `boosted_trees_stopped` on the MLPs' tables: after all of these.
- `saflex_audit_elr`: once. On eight tasks of "development" or like them, of two seeds and one head,
  it had been .4 points above `saflex_elr` on average, .3 below on chest X-rays.

On right labels two tasks test on samples unlike those by which heads are chosen, solar cells of
another kind and images in fog. What arms differ by there, up to 7 points, is their heads, which
chance chose. On the other seven SAFLEX is within .1 of all samples on average.

One image a class trained in batches of 16, of which the 10 rows of arms without the trusted samples
came twice; all arms ran again in batches of 8.

The suite "small" had its own half "report", on which three rules were run up to 2026-11-26; all its
tasks are development now.
"""


def page(regimes: dict[str, Runs], files: list[str], figures: dict[str, str]) -> str:
    """The whole page in Markdown.

    Args:
      regimes: of `by_regime`.
      files: the results, as given on the command line.
      figures: title -> path of an image, from the page.
    """
    parts = {
        f"{regime}, {half}": part
        for regime, runs in regimes.items()
        for half in reversed(HALVES)
        if (part := of_half(runs, half))
    }
    summaries = (
        f"`{arm}`, points of test accuracy:\n\n{summary(own, arm)}"
        for arm in JUDGED
        if (own := with_arm(parts, arm))
    )
    text = ["# Results", provenance(regimes, files),
            "## Where it does not help", shortcomings(parts, JUDGED), SHORTCOMINGS,
            "## Against the best fair partner", *summaries,
            "## How to read this", INTRODUCTION]  # fmt: skip
    for name, part in parts.items():
        text += [f"## {name[0].upper()}{name[1:]}: {len(part)} tasks", overview(part),
                 accuracies(part),
                 *(of_tasks(part, arm) for arm in JUDGED if arm in all_arms(part))]  # fmt: skip
    text += [f"## {title}\n\n![{title}]({path})" for title, path in figures.items()]
    return "\n\n".join(part.strip() for part in text) + "\n"


def points(runs: Runs, arm: str) -> list[dict]:
    """One dict per task, for a figure: the arm's gain over the fair partner.

    "task", "partner", "half", "noise", "val", "mean", "low", "high", and "family": tasks of one
    family differ only in the number of trusted samples.
    """
    partners = fair_partners(runs, arm)
    return [
        {
            "task": task,
            "partner": partners[task],
            "half": half_of(about(runs, task)),
            **{name: about(runs, task)[name] for name in ("noise", "val")},
            "family": re.sub(r"_val_\d+$", "", task),
            **interval(values),
        }
        for task, values in gains_over_partner(runs, arm).items()
    ]


def courses(runs: Runs, arm: str) -> dict[str, dict]:
    """Task -> {"noise", "steps", a measure: f64[seeds, records]} of an arm that learns."""
    by_task = {}
    for task, by_arm in runs.items():
        histories = [r.get("history") for r in by_arm.get(arm, {}).values()]
        histories = [h for h in histories if h and "noise_rate" in h[0]]
        if histories:
            by_task[task] = {
                "noise": about(runs, task)["noise"],
                "steps": [h["step"] for h in histories[0]],
                **{k: np.array([[h[k] for h in one] for one in histories])
                   for k in ("noise_rate", "relabelled")},
            }  # fmt: skip
    return by_task


def share_found(runs: Runs, arm: str) -> float | None:
    """The estimated share of wrong labels over the true one, at the end: the tasks' median.

    Without wrong labels, and for an arm that estimates none, a task does not count.
    """
    learned = courses(noisy(runs), arm).values()
    found = [np.mean(one["noise_rate"][:, -1]) / one["noise"] for one in learned]
    return float(np.median(found)) if found else None


def draw(regimes: dict[str, Runs], out: pathlib.Path) -> dict[str, str]:
    """Writes the figures beside the page; returns title -> file name."""
    names = {}

    def save(figure, name, title):
        path = out.with_name(f"{out.stem}_{name}.png")
        style.save(figure, path)
        names[title] = path.name

    own = {regime: found for regime, runs in regimes.items() if (found := points(runs, ARM))}
    if own:
        save(report_figures.gain_by_task(own), "partner", f"{ARM} over the best fair partner")
    panels = {
        regime: {arm: points(runs, arm) for arm in all_arms(runs) if arm in DRAWN}
        for regime, runs in regimes.items()
    }
    for by, title in (
        ("noise", "the share of wrong labels"),
        ("val", "the number of trusted samples"),
    ):
        save(
            report_figures.DRAWN[by](panels), by, f"Gain over the best fair partner against {title}"
        )
    learned = {f"{regime} {task}": one for regime, runs in regimes.items()
               for task, one in courses(runs, ARM).items()}  # fmt: skip
    if learned:
        save(report_figures.course(learned), "course", f"What {ARM} learns through a run")
    if out.with_name(GALLERY).exists():
        names[GALLERY_TITLE] = GALLERY
    return names


def main(arguments: list[str] | None = None) -> int:
    """Prints the numbers, or writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("results", nargs="*", help="files that experiments.suite wrote")
    add("--json", action="store_true", help='print the numbers of the half "report", by regime')
    add("--arm", help=f"the arm of these numbers; default: {ARM}")
    add(
        "--out",
        type=pathlib.Path,
        default="docs/results.md",
        help="the page; its figures go to the same folder",
    )
    given = parser.parse_args(arguments)
    if given.arm and not given.json:
        parser.error(f"--arm is of the numbers of --json, the page has all; given {given.arm}")
    files = given.results or [name for name in RESULTS if pathlib.Path(name).exists()]
    if lacking := [file for file in files if not pathlib.Path(file).is_file()]:
        parser.error(f"results must be files of records; there is no {lacking[0]}")
    try:
        regimes = by_regime(r for f in files for r in json_lines.read(pathlib.Path(f)))
    except ValueError as error:
        parser.error(str(error))
    if given.json:
        arm, known = given.arm or ARM, {a for runs in regimes.values() for a in all_arms(runs)}
        try:
            checks.choice(known, **{"--arm": arm})
        except ValueError as error:
            parser.error(str(error))
        said = {name: headline(of_half(runs, "report"), arm) for name, runs in regimes.items()}
        print(json.dumps(said))
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page(regimes, files, draw(regimes, given.out)))
    print(given.out, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
