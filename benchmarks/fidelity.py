"""How true the first-order step is: scores against brute force, memories, and what both are worth.

    python -m benchmarks.fidelity [--json] [--out FILE] [--figure FILE.png] [--seeds=3]
        [--accuracy-seeds=5] [--rounds=5] [--part agreement,end_to_end,memory]

agreement: every direction beside every truth (`benchmarks.truths`), over the course of training.
memory: scores averaged over visits, with and without augmentation and small validation batches.
end_to_end: test accuracy at equal wall time, in `rounds` turns, full bilevel optimisation included.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import tqdm

from benchmarks import fidelity_agreement as agreement
from benchmarks import fidelity_end_to_end as end_to_end
from benchmarks import fidelity_figures as figures
from benchmarks import fidelity_memory as memory
from benchmarks import fidelity_problems as problems
from benchmarks import timing
from saflex_jax import checks

PARTS = ("agreement", "memory", "end_to_end")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn")


class Found:
    """What was measured so far; filled in place, so that an interruption loses nothing."""

    def __init__(self):
        self.agreement = agreement.Found([], {})
        self.memory = memory.Found({}, {})
        self.end_to_end: end_to_end.Found = {}
        self.failed: dict[str, str] = {}


def length(options: argparse.Namespace) -> int:
    """Runs of the parts asked for: the bar's length."""
    followed, trained = memory.jobs(options.seeds, options.accuracy_seeds)
    competitions = end_to_end.jobs(options.accuracy_seeds)
    runs = {
        "agreement": len(agreement.jobs(options.seeds)),
        "memory": len(followed) + len(trained),
        "end_to_end": len(competitions) * len(end_to_end.ARMS),
    }
    return sum(runs[part] for part in options.part)


def measure(options: argparse.Namespace, found: Found, bar: tqdm.tqdm) -> None:
    """Runs the parts; one that fails leaves its reason and stops no other."""
    seeds, accuracy_seeds = options.seeds, options.accuracy_seeds
    parts = {
        "agreement": lambda: agreement.measure(found.agreement, seeds=seeds, bar=bar),
        "memory": lambda: memory.measure(
            found.memory, seeds=seeds, accuracy_seeds=accuracy_seeds, bar=bar
        ),
        "end_to_end": lambda: end_to_end.measure(
            found.end_to_end, seeds=accuracy_seeds, rounds=options.rounds, bar=bar
        ),
    }
    for part in options.part:
        try:
            parts[part]()
        except Exception as error:  # the other parts' numbers are kept
            found.failed[part] = f"{type(error).__name__}: {error}"


def report(options: argparse.Namespace, found: Found) -> dict:
    """The JSON."""
    made = {
        "agreement": agreement.summary(found.agreement),
        "memory": memory.summary(found.memory),
        "end_to_end": end_to_end.summary(found.end_to_end),
    }
    return {part: made[part] for part in options.part} | {
        "problems": problems.SETTINGS,
        "seeds": {"agreement": options.seeds, "accuracy": options.accuracy_seeds},
        "failed": found.failed,
        "machine": timing.machine(PACKAGES) | {"rounds": options.rounds},
    }


def show(value: float | None, width: int = 8, digits: int = 2) -> str:
    """So many digits, or "-"."""
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def mean_and_sd(found: dict) -> str:
    """Of seeds, and how many of them count."""
    return f"{show(found['mean'], 7, 4)} ± {show(found['sd'], 6, 4)} (n = {found['n']})"


def agreement_table(made: dict) -> list[str]:
    """Spearman's correlation of each direction with each truth."""
    lines = [
        "rank correlation with each truth (leave one out: of prior labels), mean over seeds and",
        "over the moments that all rows of a table have, named with its problem",
    ]
    for problem, by_truth in made["over_all"].items():
        names = list(by_truth)
        moments = ", ".join(map(str, made["over_all_moments"][problem]))
        lines += [
            "",
            f"{f'{problem} ({moments})':32}"
            + "".join(f"{name.replace('exact ', ''):>14}" for name in names),
        ]
        for direction in dict.fromkeys(d for found in by_truth.values() for d in found):
            cells = [figures.rank(by_truth[name].get(direction, {})) for name in names]
            lines.append(f"  {direction:30}" + "".join(show(cell, 16) for cell in cells))
    return lines


def memory_table(made: dict) -> list[str]:
    """Area under the ROC curve after the last visits, and test accuracy."""
    kinds = list(memory.KINDS)
    lines = ["right labels told from wrong by remembered scores: AUC after the last visit"]
    lines += [f"{'':44}" + "".join(f"{kind:>10}" for kind in kinds)]
    for problem, settings in made["fidelity"].items():
        for setting, directions in settings.items():
            for direction, found in directions.items():
                last = [list(found[kind]["auc"].values())[-1]["mean"] for kind in kinds]
                name = f"{problem}, {setting}, {direction}"
                lines.append(f"  {name:42}" + "".join(show(value, 10) for value in last))
    lines += ["", "test accuracy, mean and sd over seeds"]
    for setting, arms in made["accuracy"].items():
        lines += [f"  {setting:20} {arm:22} {mean_and_sd(a)}" for arm, a in arms.items()]
    return lines


def end_to_end_table(made: dict) -> list[str]:
    """Test accuracy at equal wall time."""
    lines = ["test accuracy at equal wall time: last parameters, those of least validation loss"]
    for problem, arms in made["accuracy"].items():
        for arm, found in arms.items():
            cells = [mean_and_sd(found[at]) for at in ("last", "best")]
            count = sum(found["by_seed"]["steps"]) / len(found["by_seed"]["steps"])
            lines.append(f"  {problem:6}{arm:30}{cells[0]:>26}{cells[1]:>26}{count:>10,.0f} steps")
    rules = {name: rule for name, rule in made["settings"].items() if name.startswith("saflex")}
    for name, rule in rules.items():
        lines.append(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in rule.items()))
    return lines


def table(made: dict) -> str:
    """The report for people."""
    makers = {"agreement": agreement_table, "memory": memory_table, "end_to_end": end_to_end_table}
    machine = made["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores; {machine['date']}"]
    for part in PARTS:
        if part in made:
            lines += ["", f"== {part}", *makers[part](made[part])]
    return "\n".join(lines + [f"failed: {part}: {why}" for part, why in made["failed"].items()])


def parts(text: str) -> list[str]:
    """The parts named in "agreement,memory"."""
    names = text.split(",")
    for name in names:
        checks.choice(PARTS, part=name)
    return names


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", type=pathlib.Path, help="FILE.png, and beside it FILE_*.png")
    parser.add_argument("--seeds", type=int, default=3, help="of agreement and memory")
    parser.add_argument("--accuracy-seeds", type=int, default=5, help="where accuracy is reported")
    parser.add_argument("--part", type=str, default=",".join(PARTS))
    found = Found()

    def start(options):
        checks.whole(1, seeds=options.seeds)
        checks.whole(1, accuracy_seeds=options.accuracy_seeds)
        options.part = parts(options.part)
        return length(options), lambda bar: measure(options, found, bar)

    def finish(options):
        made = report(options, found)
        if options.figure is not None:
            figures.draw(made, options.figure)
        return made

    return timing.command(parser, argv, start=start, report=finish, table=table)


if __name__ == "__main__":
    sys.exit(main())
