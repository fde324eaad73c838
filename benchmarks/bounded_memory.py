"""What a memory of a sample's few largest beliefs loses against one of all classes.

    python -m benchmarks.bounded_memory [--json] [--out FILE] [--task NAME ...] [--top K ...]
                                        [--seeds=3] [--data=data]

Noisy tasks of the suite "pretrained", half "development": an MLP on features, the trusted samples
train, weight decay 1. A row is a task and how many classes' beliefs are kept of a sample
(`VisitMean.top`; "all": the dense memory). Accuracy is of the test split, the AUC says how well
what is remembered tells wrong given labels from right ones; both are means over seeds. "points" are
differences to "all" in hundredths, mean and worst seed; bytes are a sample's. `--steps`: fewer than
the task's, for a try.
"""

from __future__ import annotations

import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks import reporting
from experiments import arms, pretrained_tasks
from experiments.pretrained_tasks import DEVELOPMENT
from saflex_jax.core import memory, posterior

NOISY = tuple(  # of ten classes
    name for name, spec in DEVELOPMENT.items() if spec.noise and spec.features[0] == "cifar10n"
)
ARM, ALL = "saflex_train_val", "all"


def config_of(task: str, top: int | None, folder: str, steps: int):
    """The task's config with SAFLEX and this memory."""
    config = pretrained_tasks.config_of(task, folder)
    point = pretrained_tasks.grid_of(ARM)["mlp_1"]
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
        parser.add_argument("--task", nargs="+", choices=NOISY, default=NOISY)
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
        for task, top in self.wanted:
            key = task, ALL if top is None else str(top)
            bar.set_description(" ".join(key))
            config = config_of(task, top, self.options.data, self.options.steps)
            members = [{ARM: arms.of_seed(config, seed)} for seed in range(self.options.seeds)]
            options = {"progress": False, "look": False, "measure": measured}
            records = {}
            for place, found in arms.run_each(members, {}, **options):
                if isinstance(found, Exception):
                    raise found
                records[place] = found[ARM]
            self.runs[key] = [
                {name: records[place][name] for name in ("test_accuracy", "auc", "bytes")}
                for place in sorted(records)
            ]
            bar.update()

    def report(self):
        """Rows of means, and every run."""
        rows = {}
        for (task, kept), runs in self.runs.items():
            dense = self.runs[task, ALL]
            values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
            points = values["test_accuracy"] - [run["test_accuracy"] for run in dense]
            rows.setdefault(task, {})[kept] = {
                "accuracy": float(values["test_accuracy"].mean()),
                "spread": float(values["test_accuracy"].std()),
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
