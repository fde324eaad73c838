"""The suite's tasks, the half that each belongs to, and the arms that run on it; configs alone.

The rule and its defaults were chosen on the half "development", by validation accuracy. The half
"report" was for the frozen defaults; it has been seen since, and `experiments.report` counts it as
development. The suites "pretrained" and "tables" have report halves of their own. A table is in one
half only; Fashion-MNIST and CIFAR-10N are in both, with other samples or labels. Both halves have
tables and images, clean and noisy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import arms
from experiments.configs import digits, methods, sources
from saflex_jax.methods import METHODS

SUITES = ("small", "full")
HALVES = ("development", "report")
# The arms that are compared task by task: whether none loses is asked of single tasks.
HEADLINE = ("upstream", "upstream_train_val", "trusted_only", "saflex_train_val")


class Task(NamedTuple):
    """One task: a config with arms, and what the report sorts it by.

    Attributes:
      half: of HALVES.
      noise: share of the candidates whose label is wrong, or that are of no class.
      seeds: how many, from config.seed on.
      seconds: estimates for one run of the upstream pipeline on one CPU core, its steps and its
        evaluation, compilation apart; None = not measured.
      config: with the arms of the comparison.
      other_seeds: how many the arms that are not of HEADLINE have at most; None = as many.
    """

    half: str
    noise: float
    seeds: int
    seconds: tuple[float, float] | None
    config: ConfigDict
    other_seeds: int | None = None

    def seeds_of(self, arm: str) -> int:
        """How many seeds this arm has."""
        if arm in HEADLINE or self.other_seeds is None:
            return self.seeds
        return min(self.seeds, self.other_seeds)


class _Images(NamedTuple):
    """An image task; `milliseconds` a step and `tested` seconds of evaluation, on one CPU core."""

    half: str
    noise: float
    augment: str
    milliseconds: float
    tested: float
    data: dict[str, Any]
    widths: tuple[int, ...] = (16, 32, 64)
    soft: str = "soft_crop(3) | flip"  # the pipeline of the baseline Soft Augmentation
    baselines: bool = True  # whether more arms are run than arms.STANDING


NOISE = 0.4  # of the noisy twin of every table
FEW = 200  # training samples of a class up to which it is few on purpose
CUTMIX, MIXUP = "tabular_cutmix(1.0, probability=0.5)", "mixup(0.4, probability=0.5)"
# Data set -> rows, half, upstream pipeline. In pairs, so that both halves have every pipeline
# twice. wdbc is in the first half because this project's trials looked at it before.
TABLES = {
    "wdbc": (569, "development", CUTMIX),
    "appendicitis": (106, "report", CUTMIX),
    "cleveland": (297, "development", MIXUP),
    "cmc": (1473, "report", MIXUP),
    "madelon": (2600, "development", "identity"),
    "vehicle": (846, "report", "identity"),
    "australian": (690, "development", CUTMIX),
    "german": (1000, "report", CUTMIX),
    "pima": (768, "development", MIXUP),
    "phoneme": (5404, "report", MIXUP),
    "spambase": (4597, "development", "identity"),
    "segment": (2310, "report", "identity"),
}
# These have rows that are equal. A run leaves those out that val or test have too, more or fewer by
# the seed: with a share that is always there, all seeds share a compilation.
WITH_COPIES = {"cmc", "phoneme", "spambase", "segment", "chest_xray"}
ALWAYS_THERE = 0.9
TABLE_STEPS, IMAGE_STEPS, FULL_STEPS = 400, 400, 20_000
TABLE_SECONDS = 0.5, 0.1  # the steps of a run, and its evaluation, on one CPU core

_CROP = "shift(2) | flip"


def _garments(per_class: int, val: int, **more: Any) -> dict[str, Any]:
    return sources.section("fashion_mnist", per_class=per_class, val=val, **more)


def generator(share: float, outside_from: str = "mnist") -> dict[str, Any]:
    """Stands in for a generator: half of its bad samples are of no class, half are mislabelled."""
    mislabelled = share / 2 / (1 - share / 2)  # of those that are of a class
    return {"outside": share / 2, "outside_from": outside_from, "noise": mislabelled}


IMAGES = {
    # Few-shot, clean.
    "fashion_10": _Images("report", 0.0, _CROP, 7, 3, _garments(10, val=50)),
    "fashion_50": _Images("development", 0.0, "randaugment(2, 9)", 8, 3, _garments(50, val=100)),
    "fashion_200": _Images(
        "report", 0.0, f"{_CROP} | cutmix(1.0, probability=0.5)", 7, 3, _garments(200, val=200)
    ),
    # A noisy generator; the three with share .4 differ in the number of validation samples alone.
    **{
        f"generator_{share:.0%}".removesuffix("%"): _Images(
            half, share, _CROP, 7, 3, _garments(200, val=200, **generator(share))
        )
        for share, half in ((0.2, "report"), (0.4, "development"), (0.6, "report"))
    },
    **{
        f"generator_40_val_{val}": _Images(
            "development", 0.4, _CROP, 7, 3, _garments(200, val=val, **generator(0.4)),
            baselines=False,
        )
        for val in (50, 800)
    },
    # Labels by people; the share of wrong ones is that of the files.
    "cifar10n_random1": _Images(
        "development", 0.1723, f"shift(4) | flip | {MIXUP}", 11, 4.5,
        sources.section("cifar10n", per_class=1000, val=500, labels="random1"),
        soft="soft_crop(4) | flip",
    ),
    "cifar10n_worst": _Images(
        "report", 0.4021, "shift(4) | flip", 11, 4.5,
        sources.section("cifar10n", per_class=1000, val=500, labels="worst"),
        soft="soft_crop(4) | flip",
    ),
    "chest_xray": _Images(
        "report", 0.0, "shift(4) | randaugment(1, 5)", 24, 1.5,
        sources.section("chest_xray", size=64, per_class=1000, val=200), (8, 16, 32, 64),
        "soft_crop(6) | flip",
    ),
    # Tested on another distribution.
    "mnist_usps": _Images(
        "development", 0.0, MIXUP, 5, 1,
        sources.section("mnist", size=16, per_class=300, val=200, test_on="usps"),
        soft="soft_crop(2)",
    ),
    "fashion_fog": _Images(
        "report", 0.0, "randaugment(2, 9)", 8, 4, _garments(500, val=200, corrupt="fog:3")
    ),
}  # fmt: skip


def make(suite: str, folder: str = "data") -> dict[str, Task]:
    """Name -> task, in the order of the suite: tables and images in turn.

    "small" is for 2 CPU cores and a little over two hours. "full" is for an accelerator: every
    table under all three upstream pipelines, on an MLP and on an FT-Transformer, all training
    images but where there are few on purpose, a ResNet-18 and FULL_STEPS.

    Args:
      suite: of SUITES.
      folder: where `experiments.prepare` put data sets.
    """
    full = suite == "full"
    pipelines = (CUTMIX, MIXUP, "identity")
    tables = {
        name: task
        for table, (_, _, own) in TABLES.items()
        for augment in (pipelines if full else (own,))
        for backbone in (("mlp", "ft_transformer") if full else ("mlp",))
        for name, task in _tables(table, augment, backbone, full=full).items()
    }
    images = {name: _images(spec, full=full) for name, spec in IMAGES.items()}
    tasks = _in_turn(tables, images)
    for task in tasks.values():
        task.config.data.dir = folder
    return tasks


def _in_turn(first: dict, second: dict) -> dict:
    """Both, the shorter one's items spread evenly among the other's."""
    place = {
        key: (n + 0.5) / len(group) for group in (first, second) for n, key in enumerate(group)
    }
    both = first | second
    return {key: both[key] for key in sorted(both, key=place.__getitem__)}


def table_splits(table: str) -> dict[str, int]:
    """Numbers of rows of a table: val, test, and train, where 0 is all the others."""
    rows, *_ = TABLES[table]
    val, test = min(rows // 5, 200), min(3 * rows // 10, 2000)
    train = int(ALWAYS_THERE * (rows - val - test)) if table in WITH_COPIES else 0
    return {"val": val, "test": test, "train": train}


def _tables(table: str, augment: str, backbone: str, *, full: bool) -> dict[str, Task]:
    """The clean and the noisy task of a table."""
    _, half, _ = TABLES[table]
    splits = table_splits(table)
    steps = FULL_STEPS // 10 if full else TABLE_STEPS
    tasks = {}
    for noise in (0.0, NOISE):
        config = _base(noise, half, steps, batch_size=32, val_batch_size=min(splits["val"], 64))
        config.data = sources.section(table, **splits, noise=noise)
        config.augment = augment
        config.model = {"name": "mlp", "widths": (64, 64), "norm": "none"}
        config.optimizer.learning_rate = 3e-3
        if backbone == "ft_transformer":
            config.model = {"name": backbone}
            config.optimizer.learning_rate = 1e-3
        of_pipeline = f"_{augment.partition('(')[0]}_{backbone}" if full else ""
        name = f"{table}{of_pipeline}{'_noisy' if noise else ''}"
        tasks[name] = Task(half, noise, 10, None if full else TABLE_SECONDS, config)
    return tasks


def _images(spec: _Images, *, full: bool) -> Task:
    steps = FULL_STEPS if full else IMAGE_STEPS
    batch_size = 128 if full else 32
    config = _base(spec.noise, spec.half, steps, batch_size=batch_size, val_batch_size=batch_size)
    config.data = dict(spec.data)
    config.augment = spec.augment
    config.arms.soft_augmentation = arms.STANDING["upstream_train_val"] | {"augment": spec.soft}
    if not spec.baselines:
        config.arms = arms.STANDING
    config.model = {"name": "small_cnn", "widths": spec.widths, "norm": "batch"}
    if full:
        config.model = {"name": "resnet18", "norm": "group"}
        config.optimizer.learning_rate = 1e-3
        config.train.val_batch_size = min(batch_size, spec.data["val"])
        if spec.noise or config.data.per_class > FEW:
            config.data.per_class = 0
    seconds = None if full else (steps * spec.milliseconds / 1e3, spec.tested)
    seeds = 7 if spec.half == "report" else 5
    return Task(spec.half, spec.noise, seeds, seconds, config, other_seeds=5)


def _base(
    noise: float, half: str, steps: int, *, batch_size: int, val_batch_size: int
) -> ConfigDict:
    """What all tasks have in common; SAFLEX's options are its defaults.

    The two baselines that leave out the samples of large loss are told the share of wrong labels,
    as in their papers; no other arm knows it, and without wrong labels they are plain training. The
    options of label smoothing and bootstrapping are the best of three each, on the tables of the
    half "development".
    """
    config = digits.get_config()
    forget = {"forget": noise, "ramp": steps // 4}
    config.method = methods.all_methods(
        rule="saflex",
        label_smoothing={"epsilon": 0.1},
        bootstrap={"hard": True, "beta": 0.5, "start": steps // 4},
        **{name: forget for name in TOLD},
    )
    config.train = {
        "steps": steps, "batch_size": batch_size, "val_batch_size": val_batch_size,
        "log_every": steps // 8, "checkpoint_every": steps,
    }  # fmt: skip
    config.arms = all_arms(noise, half)
    return config


# Baselines, and whether the validation samples train, too: they do where a method does not read
# them otherwise, since it would be at a disadvantage without.
BASELINES = {
    "label_smoothing": True,
    "bootstrap": True,
    "small_loss": True,
    "co_teaching": True,
    "l2rw": False,
    "meta_weight_net": False,
}
TOLD = ("small_loss", "co_teaching")  # of these those that know the share of wrong labels
# Of SAFLEX, beside those of arms.STANDING: what directs the learning, and the rule of the paper.
# The first two are of the rule as it was when they ran; what this leaves out came later.
_BEFORE = {"saflex": {"rule": {"by_class": False, "lookahead": 1.0, "sharpness": 2.0}}}
PROTOCOLS: dict[str, dict] = {
    "saflex_folds": {"data": {"train_on_val": True, "folds": 5}, "method": _BEFORE},
    "saflex_train_batch": {
        "data": {"train_on_val": False, "val_from": "train"},
        "method": _BEFORE,
    },
    "saflex_paper": {
        "data": {"train_on_val": False},
        "method": {"rule": "saflex_paper"},
    },
}


def all_arms(noise: float, half: str) -> dict[str, dict]:
    """Arm -> changes of a task's config: upstream, SAFLEX's protocols, the baselines."""
    baselines = {
        name: {
            "method": {"name": name, "rule": "as_given"} if name in METHODS else {"rule": name},
            "data": {"train_on_val": trains},
        }
        for name, trains in BASELINES.items()
        if noise or name not in TOLD
    }
    with_elr = arms.WITH_ELR if noise else {}
    squared = arms.SQUARED if half == "report" else {}  # where the learned power was judged
    return {**arms.STANDING, **squared, **PROTOCOLS, **baselines, **with_elr}


# Of a step, in those of the upstream pipeline, where batch statistics take a pass of their own.
_COST = {"upstream": 1.0, "upstream_train_val": 1.0, "trusted_only": 1.0, "label_smoothing": 1.1,
         "bootstrap": 1.3, "small_loss": 1.3, "soft_augmentation": 1.1, "saflex_paper": 3.0,
         "l2rw": 2.7, "meta_weight_net": 3.1, "co_teaching": 2.1, "logistic": 0.1,
         "boosted_trees": 1.0, "boosted_trees_stopped": 1.0}  # fmt: skip
_RULE = 1.7  # of the arms with SAFLEX's default rule
COMPILATION, LOADING = 6.0, 1.5  # seconds of one CPU core, for each arm of a task and pass


def seconds(task: Task, arm: str) -> float | None:
    """Estimate for one run of an arm on one CPU core, compilation apart."""
    if task.seconds is None:
        return None
    steps, tested = task.seconds
    return steps * _COST.get(arm, _RULE) + tested
