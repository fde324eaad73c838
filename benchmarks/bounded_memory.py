"""What a memory of a sample's few largest beliefs loses against one of all classes.

    python -m benchmarks.bounded_memory [--json] [--out FILE] [--task NAME ...] [--top K ...]
                                        [--seeds=3] [--data=data]

Noisy tasks of the suite "pretrained", half "development": an MLP on features, the trusted samples
train, weight decay 1. These have ten classes; of 100 and 1,000 there are made ones (`write_made`),
a linear classifier, 40 % wrong, evenly or each class for the next. A row is a task and how many
classes' beliefs are kept of a sample (`VisitMean.top`; "all": the dense memory). Accuracy is of the
test split, the AUC says how well what is remembered tells wrong given labels from right ones; both
are means over seeds. "points" are differences to "all" in hundredths, mean and worst seed; bytes
are a sample's. `--steps`: fewer than the task's, for a try.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from functools import partial

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks import reporting
from experiments import arms, pretrained_tasks
from experiments.configs import sources
from experiments.pretrained_tasks import DEVELOPMENT
from saflex_jax.core import memory, posterior

NOISY = tuple(  # of ten classes
    name for name, spec in DEVELOPMENT.items() if spec.noise and spec.features[0] == "cifar10n"
)
MADE = {  # name -> (classes, kind of noise)
    f"made_{classes}_{kind}": (classes, kind)
    for classes in (100, 1000)
    for kind in ("symmetric", "pairwise")
}
TASKS = (*NOISY, *MADE)
ROWS, SIDE = 20_000, 8
ARM, ALL = "saflex_train_val", "all"


def write_made(file: pathlib.Path, classes: int) -> None:
    """A data set of Gaussian classes; in each ten of them they lie near one another.

    SIDE x SIDE numbers as grey pixels: ROWS that train, 5 of a class (2 of more than 100) that are
    trusted, a fifth of ROWS to test on.
    """
    draw, numbers, arrays = np.random.default_rng(0), (SIDE, SIDE), {}
    tens = np.repeat(draw.normal(size=(classes // 10, *numbers)), 10, axis=0)
    centres = tens + 0.5 * draw.normal(size=(classes, *numbers))
    trusted = (5 if classes <= 100 else 2) * classes
    for split, size in (("train", ROWS), ("val", trusted), ("test", ROWS // 5)):
        labels = np.arange(size) % classes
        values = 128 + 30 * (centres[labels] + draw.normal(size=(size, *numbers)))
        arrays[f"{split}_images"] = values.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    np.savez(file, **arrays)


def config_of(task: str, top: int | None, folder: str, steps: int, made: pathlib.Path):
    """The task's config with SAFLEX and this memory; a made data set is written to `made`."""
    config = pretrained_tasks.config_of("cifar_40" if task in MADE else task, folder)
    if task in MADE:
        classes, kind = MADE[task]
        file = made / f"{classes}.npz"
        if not file.exists():
            write_made(file, classes)
        config.data = sources.section(str(file), noise=0.4, noise_kind=kind)
        config.augment, config.optimizer.learning_rate = "cutout(2)", 1e-2
    point = pretrained_tasks.grid_of(ARM)["linear_1e-2" if task in MADE else "mlp_1"]
    config.arms = {ARM: pretrained_tasks.ARMS[ARM] | point}
    config.train.steps = steps or config.train.steps
    chosen = arms.configs(config)[ARM]
    if top is not None:
        with chosen.unlocked():
            chosen.method.saflex.rule.memory.top = top
    return chosen


def measured(method, state, data) -> dict[str, float]:
    """Accuracy, and how well wrong labels are told from right ones; reads the test split."""
    kept, labels = state.extra.rule.memory, jnp.asarray(data.pools.candidates.labels)
    size, classes = labels.shape
    seen = slice(0, size - len(data.held_out.labels))  # trusted samples stand at the end
    believed = memory.recall(kept, jnp.arange(size), classes)
    doubt = 1 - np.asarray(posterior.agreement(believed, labels))
    return arms.tested(method, state, data) | {
        "auc": float(roc_auc_score(data.wrong[seen], doubt[seen])),
        "bytes": sum(x.nbytes for x in kept) / len(kept.visits),
    }


class BoundedMemory(reporting.Benchmark):
    """The benchmark: tasks and numbers of classes."""

    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    rounds, series = None, ()

    @staticmethod
    def add_options(parser):
        """--task, --top, --seeds, --steps, --data."""
        parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
        parser.add_argument("--top", nargs="+", type=int, default=(8, 4, 2))
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--steps", type=int, default=0)
        parser.add_argument("--data", default="data", help="where features are")

    def __init__(self, options):
        self.options, self.runs = options, {}
        self.wanted = [(task, top) for task in options.task for top in (None, *options.top)]

    @property
    def length(self):
        return len(self.wanted)

    def measure(self, bar):
        """All seeds of a task and memory in one program."""
        with tempfile.TemporaryDirectory() as made:
            for task, top in self.wanted:
                key = task, ALL if top is None else str(top)
                bar.set_description(" ".join(key))
                given = self.options.data, self.options.steps, pathlib.Path(made)
                self.runs[key] = self.runs_of(config_of(task, top, *given))
                bar.update()

    def runs_of(self, config):
        """Of each seed: accuracy, AUC and bytes; all seeds or, after Ctrl-C, none."""
        members = [{ARM: arms.of_seed(config, seed)} for seed in range(self.options.seeds)]
        options = {"progress": False, "look": False, "measure": measured}
        records = {}
        for place, found in arms.run_each(members, {}, **options):
            records[place] = reporting.whole(found)[ARM]
        names = "test_accuracy", "auc", "bytes"
        return [{name: records[place][name] for name in names} for place in sorted(records)]

    def report(self):
        """Rows of means, and every run."""
        rows = {}
        for (task, kept), runs in self.runs.items():
            dense = self.runs[task, ALL]
            values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
            points = values["test_accuracy"] - [run["test_accuracy"] for run in dense]
            rows.setdefault(task, {})[kept] = {
                "accuracy": float(values["test_accuracy"].mean()),
                "spread": float(values["test_accuracy"].std(ddof=min(1, len(runs) - 1))),
                "points": float(100 * points.mean()),
                "worst_points": float(100 * points.min()),
                "auc": float(values["auc"].mean()),
                "bytes": float(values["bytes"].mean()),
            }
        runs = {" ".join(key): own for key, own in self.runs.items()}
        seeds = {"seeds": list(range(self.options.seeds))}
        return {"tasks": rows, "runs": runs, "machine": seeds}

    @staticmethod
    def table(report):
        """The means."""
        return reporting.tables(report["tasks"])


main = partial(reporting.command, BoundedMemory)

if __name__ == "__main__":
    sys.exit(main())
