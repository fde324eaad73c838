"""The suite "pretrained": heads on features of a pretrained network, where people work today.

The halves were named here before any run. Rules and options are chosen on the half "development":
CIFAR-10 (human and artificial label noise) and chest X-rays. The half "report" has other data sets:
Fashion-MNIST, brain MRI, solar cells, USPS and MNIST. All inputs are features that
`python -m experiments.features` makes (SETS); `view` draws one of a sample's augmented views.

Every arm, upstream included, has the same small grid: a linear head or an MLP, little or much
weight decay; the logistic regression has four strengths of regularisation instead. `grid` has every
arm at every point, for `experiments.suite --tune`; `make` has every arm at the chosen one
(`experiments.tuning`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import tuning
from experiments.arms import PLAIN, SQUARED, STANDING, WITH_ELR
from experiments.configs import digits, methods, sources
from experiments.feature_sets import corrupted_tag, feature_folder
from experiments.suite_tasks import ALWAYS_THERE, WITH_COPIES, Task, generator
from experiments.tuning import Changes, Choices

HEADS = {"linear": (), "mlp": (256,)}  # hidden widths
DECAYS = ("1e-2", "1")
STRENGTHS = ("5e-4", "3e-3", "1e-2", "1e-1")  # of a logistic regression: 1 / regularisation
ESTIMATED = ("linear_probe",)  # arms that scikit-learn fits


def _arm(trains: bool, method: dict | None = None, **changes: Any) -> dict[str, Any]:
    """Changes of a config; `trains`: whether the trusted samples train, too."""
    data = {"train_on_val": trains} | changes.pop("data", {})
    return {"method": method or PLAIN, "data": data, **changes}


ARMS: dict[str, dict[str, Any]] = {
    "upstream": STANDING["upstream"],
    # What a user would do without any of this: the fair partners.
    "upstream_train_val": STANDING["upstream_train_val"],
    "trusted_only": STANDING["trusted_only"],
    "early_stopping": _arm(False, train={"keep_best": True}),
    "linear_probe": _arm(True, model={"name": "logistic"}),
    # The rule.
    "saflex": _arm(False, {"rule": "saflex"}),
    "saflex_train_val": _arm(True, {"rule": "saflex"}),
    "saflex_paper": _arm(False, {"rule": "saflex_paper"}),
    "saflex_elr": WITH_ELR["saflex_elr"],
    **SQUARED,
    "saflex_audit": _arm(True, data={"cleaning": "audit"}),
    "saflex_audit_elr": _arm(
        True, WITH_ELR["saflex_elr"]["method"], data={"cleaning": "audit_first"}
    ),
    # Baselines. Those that do not read the trusted samples otherwise train on them.
    "confident_learning": _arm(True, data={"cleaning": "confident"}),
    "neighbours": _arm(True, data={"cleaning": "neighbours"}),
    "elr": WITH_ELR["elr"],
    "dividemix": _arm(True, {"name": "dividemix"}),
    "l2rw": _arm(False, {"rule": "l2rw"}),
    "small_loss": _arm(True, {"rule": "small_loss"}),
    "co_teaching": _arm(True, {"name": "co_teaching", "rule": "as_given"}),
}
TOLD = ("small_loss", "co_teaching")  # these are told the share of wrong labels
# These know no graded labels.
OF_CLASSES = ("confident_learning", "neighbours", "saflex_audit", "saflex_audit_elr")
GRADED = ("solar_cells",)


def grid_of(arm: str) -> dict[str, Changes]:
    """Point -> changes of a config, in the order in which the first of level ones is chosen."""
    if arm in ESTIMATED:
        return {f"C_{c}": {"model": {"C": float(c)}} for c in STRENGTHS}
    return {
        f"{name}_{decay}": {
            "model": {"widths": widths},
            "optimizer": {"weight_decay": float(decay)},
        }
        for name, widths in HEADS.items()
        for decay in DECAYS
    }


# (data set, name of its features) -> options of `python -m experiments.features`.
CROP = "--views=4 --augment='shift(4) | flip'"
SETS = {
    ("cifar10n", "crop"): f"{CROP} --limit=12000",
    ("chest_xray", "crop"): f"{CROP} --pixels=96",
    ("fashion_mnist", "crop"): "--views=4 --augment='shift(2) | flip' --limit=12000",
    ("fashion_mnist", "randaugment"): "--views=8 --augment='randaugment(2, 9)' --limit=2000",
    ("brain_mri", "crop"): f"{CROP} --pixels=96",
    ("solar_cells", "crop"): f"{CROP} --pixels=96",
    ("usps", "crop"): "--views=4 --augment='shift(1)'",
    ("mnist", "rotated"): "--views=4 --augment='affine(degrees=180)' --limit=6000",
}
FOG = "fog:3"
# On trusted samples of other seeds 500 steps at this rate lost nothing against 2,500 at a third of
# it, for plain training and for SAFLEX, with right labels and with people's (2026-11-27).
STEPS, LEARNING_RATE = 500, 3e-3


# (samples, seeds) to choose on. By 200 samples of two seeds heads differed by a point and more from
# chance alone (2026-11-28). Small sets, a fifth of them a seed, and few-shot tasks get more seeds.
LARGE, SMALL, TINY = (1000, 2), (400, 5), (200, 5)


class _Spec(NamedTuple):
    """A task: half, wrong labels, key of SETS, the rest of its data, pipeline, batch, choice."""

    half: str
    noise: float
    features: tuple[str, str]
    data: dict[str, Any]
    augment: str = "view"
    batch_size: int = 256
    chosen_on: tuple[int, int] = LARGE


def _cifar(wrong: float, augment: str = "view", *, val: int = 500, **data: Any) -> _Spec:
    return _Spec("development", wrong, ("cifar10n", "crop"), {"val": val, **data}, augment)


def _few(per_class: int, half: str, features: tuple[str, str], val: int) -> _Spec:
    # A multiple of 8, and no more than there are without the trusted ones: no row comes twice.
    rows = min(256, 10 * per_class // 8 * 8)
    data = {"per_class": per_class, "val": val}
    return _Spec(half, 0.0, features, data, batch_size=rows, chosen_on=SMALL)


def _fashion(wrong: float, *, val: int = 500, **data: Any) -> _Spec:
    return _Spec("report", wrong, ("fashion_mnist", "crop"), {"val": val, **data})


def _brain(wrong: float, **data: Any) -> _Spec:
    data = {"val": 200, "test": 800, **data}
    return _Spec("report", wrong, ("brain_mri", "crop"), data, chosen_on=SMALL)


DEVELOPMENT = {
    "cifar": _cifar(0.0),
    "cifar_mixup": _cifar(0.0, "view | mixup(0.2)"),
    # Labels by people; the shares of wrong ones are those of the first 12,000.
    "cifar_aggregate": _cifar(0.09, labels="aggregate"),
    "cifar_random1": _cifar(0.18, labels="random1"),
    "cifar_worst": _cifar(0.41, labels="worst"),
    "cifar_worst_val_100": _cifar(0.41, labels="worst", val=100),
    "cifar_worst_val_10": _cifar(0.41, labels="worst", val=10),
    "cifar_worst_mixup": _cifar(0.41, "view | mixup(0.2)", labels="worst"),
    "cifar_20": _cifar(0.2, noise=0.2),
    "cifar_40": _cifar(0.4, noise=0.4),
    "cifar_pairwise_30": _cifar(0.3, noise=0.3, noise_kind="pairwise"),
    "cifar_generator_40": _cifar(0.4, **generator(0.4, "fashion_mnist")),
    "cifar_few_10": _few(10, "development", ("cifar10n", "crop"), val=50),
    "chest": _Spec("development", 0.0, ("chest_xray", "crop"), {"val": 200}),
    "chest_40": _Spec("development", 0.4, ("chest_xray", "crop"), {"val": 200, "noise": 0.4}),
}
REPORT = {
    "fashion": _fashion(0.0),
    **{f"fashion_{n}": _fashion(n / 100, noise=n / 100) for n in (20, 40, 60)},
    **{f"fashion_40_val_{val}": _fashion(0.4, noise=0.4, val=val) for val in (100, 10)},
    "fashion_pairwise_40": _fashion(0.4, noise=0.4, noise_kind="pairwise"),
    "fashion_instance_40": _fashion(0.4, noise=0.4, noise_kind="instance"),
    **{
        f"fashion_generator_{n}": _fashion(n / 100, **generator(n / 100, "mnist@rotated"))
        for n in (20, 40, 60)
    },
    **{
        f"fashion_few_{number}": _few(number, "report", ("fashion_mnist", "randaugment"), val=val)
        for number, val in ((1, 10), (5, 20), (10, 50), (50, 100))
    },
    "fashion_fog": _fashion(0.0, corrupt=FOG),
    "brain_mri": _brain(0.0),
    "brain_mri_40": _brain(0.4, noise=0.4),
    "solar_poly": _Spec(
        "report", 0.0, ("solar_cells", "crop"), {"val": 100, "test_on": "cell=1"}, chosen_on=TINY
    ),
    "usps_40": _Spec("report", 0.4, ("usps", "crop"), {"val": 200, "noise": 0.4}),
    # Rotations that turn a digit into another, or into none.
    "mnist_rotated": _Spec("report", 0.0, ("mnist", "rotated"), {"val": 500}),
}  # fmt: skip
SEEDS = 5


def make(folder: str = "data", choices: Choices | None = None) -> dict[str, Task]:
    """Name -> task, with the arms at their chosen points of the grid; only what was tuned.

    Args:
      folder: where data sets and features are.
      choices: task -> arm -> point; None = those of the project, `tuning.read`.

    Raises:
      ValueError: nothing was tuned; says how.
    """
    choices = tuning.read() if choices is None else choices
    tasks = {}
    for name, spec in (DEVELOPMENT | REPORT).items():
        config = _config(spec, folder)
        config.arms = tuning.chosen_arms(arms(spec), grid_of, choices.get(name, {}))
        tasks[name] = Task(spec.half, spec.noise, SEEDS, None, config)
    return tuning.tuned("pretrained", tasks)


def grid(folder: str = "data") -> dict[str, Task]:
    """Name -> task, with every arm at every point, to choose by: on other seeds, without a test.

    Args:
      folder: where data sets and features are.
    """
    tasks = {}
    for name, spec in (DEVELOPMENT | REPORT).items():
        config = _config(spec, folder)
        config.arms = tuning.every_arm(arms(spec), grid_of)
        task = Task(spec.half, spec.noise, SEEDS, None, config)
        tasks[name] = tuning.on_trusted_samples(task, *spec.chosen_on)
    return tasks


def arms(spec: _Spec) -> dict[str, dict[str, Any]]:
    """The arms of a task: without wrong labels there is no share of them to be told."""
    name, _ = spec.features
    without = TOLD * (not spec.noise) + OF_CLASSES * (name in GRADED)
    return {arm: changes for arm, changes in ARMS.items() if arm not in without}


def missing(tasks: dict[str, Task]) -> list[str]:
    """The commands that compute what features of the tasks are not there."""
    sets = set()
    for section in (t.config.data for t in tasks.values() if t.config.data.features):
        given = (section.name, section.outside_from, section.test_on)
        for name, _, own in (n.partition("@") for n in given if n and "=" not in n):
            sets.add((section.dir, name, own or section.features, ""))
        if section.corrupt:
            sets.add((section.dir, section.name, section.features, section.corrupt))
    return [
        f"python -m experiments.features {name} --out={folder} --tag={tag} "
        + (f"--corrupt={corrupt}" if corrupt else SETS[name, tag])
        for folder, name, tag, corrupt in sorted(sets)
        if not feature_folder(folder, name, corrupted_tag(tag, corrupt)).exists()
    ]


def config_of(task: str, folder: str = "data") -> ConfigDict:
    """What the arms of a task have in common, by its name in either half."""
    return _config((DEVELOPMENT | REPORT)[task], folder)


def _config(spec: _Spec, folder: str) -> ConfigDict:
    """What the arms of a task have in common; SAFLEX's options are its defaults."""
    config = digits.get_config()
    name, tag = spec.features
    config.data = sources.section(name, features=tag, dir=folder, **spec.data)
    config.augment = spec.augment
    config.model = {"name": "mlp"}
    config.optimizer.learning_rate = LEARNING_RATE
    forget = {"forget": spec.noise, "ramp": STEPS // 4}
    val = spec.data["val"]
    if name in WITH_COPIES:
        val = int(ALWAYS_THERE * val)
    config.method = methods.all_methods(**{name: forget for name in TOLD})
    config.train = {
        "steps": STEPS, "batch_size": spec.batch_size, "val_batch_size": min(val, 256),
        "log_every": STEPS // 20, "checkpoint_every": STEPS,
    }  # fmt: skip
    return config
