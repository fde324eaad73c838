"""From `config.data` to the arrays of one seed: source, splits, labels, noise, all checked."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn import metrics

from experiments import candidates as made_candidates
from experiments import cleaning, named_rows
from experiments.configs import sources
from experiments.datasets import DATASETS
from experiments.feature_sets import feature_folder, feature_inputs, feature_set
from saflex_jax import checks, configure, data, train
from saflex_jax.augment import corruptions
from saflex_jax.batches import floats
from saflex_jax.data.seeds import generator
from saflex_jax.types import Batch, Method, Streams, TrainState

TABLES = (".csv", ".arff", ".dat", ".data")
NOISE = {
    "symmetric": lambda inputs, *given, **options: data.symmetric_noise(*given, **options),
    "pairwise": lambda inputs, *given, **options: data.pairwise_noise(*given, **options),
    "instance": data.instance_noise,
}
MADE = ("emoji_groups",)  # of prepared sets, by `experiments.captions`
TFDS = "tfds:"  # before the name of a data set that TFDS prepared
TEST_EPISODES = 400  # of a method that is tested on episodes
CHUNK = 256  # images in memory at once where a set is gone through
EVALUATED = 512  # test rows at once, at least those of an episode


class Data(NamedTuple):
    """One seed's data.

    Attributes:
      pools: candidates (labels partly wrong, or hidden), val (trusted, unless it is the candidates
        again), clean (val again, where the candidates are unlabelled).
      held_out: the validation split, whatever `pools` has of it.
      test: read once, at the end; rows that are not to be scored are masked.
      together: test rows that are predicted together: 1, or those of an episode.
      clean_labels: i[N] of the candidates, the largest entry of the right prior; for diagnosis
        only, training never sees it.
      wrong: bool[N] of the candidates: another label is right, or none is; for diagnosis only.
      source: what all were taken from.
      removed: split -> rows left out because val or test hold the same input.
      generated: candidates of a generator that stand in for samples, or None.
      pool: candidates of a generator, however they train, or None. Of those that are samples the
        trace says which is which ("candidate").
      seed: of all draws.
      rows: i[N] of the candidates, their rows of the source; -1 = of a pool, or from outside.
      start: what an audit believes of the candidates, for the rule to start from, or None.
    """

    pools: Streams
    held_out: Batch
    test: Batch
    together: int
    clean_labels: np.ndarray
    wrong: np.ndarray
    source: data.Source
    removed: dict[str, int]
    generated: data.Pool | None
    pool: data.Pool | None = None
    seed: int = 0
    rows: np.ndarray | None = None
    start: cleaning.Start | None = None


def check(section: ConfigDict) -> None:
    """Raises ValueError on an unknown field or a value out of range, before anything is read."""
    checks.known("config.data", section, sources.FIELDS)
    computed = feature_folder(section.dir, section.name, section.features)
    if not (section.features and computed.exists()):
        check_name(section.name)
    checks.choice(NOISE, **{"config.data.noise_kind": section.noise_kind})
    for name in ("noise", "outside"):
        checks.fraction(**{f"config.data.{name}": section[name]})
    for name in ("size", "val", "test", "select", "novel", "per_class", "train", "folds"):
        checks.whole(**{f"config.data.{name}": section[name]})
    checks.choice(("", "train"), **{"config.data.val_from": section.val_from})
    checks.choice(("0", "1", "3"), **{"config.data.channels": str(section.channels)})
    if section.trusted and section.val:
        raise ValueError(
            f"config.data.val must be 0 with trusted={section.trusted!r}, whose samples are the "
            f"validation split; given {section.val}"
        )
    if section.folds and not (section.train_on_val or section.val_from):
        raise ValueError(
            "config.data.folds must be 0 unless train_on_val=True or val_from='train': the samples "
            f"of a fold train in other batches; given {section.folds}"
        )
    if section.folds and section.pool:
        raise ValueError(f"config.data.folds must be 0 with a pool; given {section.folds}")
    if not 1 <= section.imbalance < math.inf:
        raise ValueError(
            f"config.data.imbalance must be >= 1 and finite, 1 being off; given {section.imbalance}"
        )
    made_candidates.check(section)
    if section.test_on and section.test:
        raise ValueError(f"config.data.test must be 0 with test_on; given {section.test}")
    if section.labels and section.noise:
        raise ValueError(
            f"config.data.noise must be 0 with labels={section.labels!r}; given {section.noise}"
        )
    if section.novel and (section.noise or section.labels):
        raise ValueError(
            "config.data.novel must be 0 with other labels, which may be novel classes'; given "
            f"{section.novel}, noise={section.noise} and labels={section.labels!r}"
        )
    for name in ("train_on_val", "val_from", "unlabelled", "pool"):
        if section.trusted_only and section[name]:
            raise ValueError(
                f"config.data.{name} must be {sources.DEFAULTS[name]!r} with trusted_only=True: "
                f"nothing but the validation samples trains; given {section[name]!r}"
            )
    for name in ("train_on_val", "val_from", "labels", "noise", "pool"):
        if section.unlabelled and section[name]:
            raise ValueError(
                f"config.data.{name} must be {sources.DEFAULTS[name]!r} with unlabelled=True: no "
                "training label is seen, and the validation samples train beside; given "
                f"{section[name]!r}"
            )
    checks.choice(("", *cleaning.KINDS), **{"config.data.cleaning": section.cleaning})
    for name in ("trusted_only", "unlabelled", "pool"):
        if section.cleaning and section[name]:
            raise ValueError(
                f"config.data.cleaning must be '' with {name}={section[name]!r}: it judges "
                f"training samples by their given labels; given {section.cleaning!r}"
            )
    checks.choice(("", "ordinal"), **{"config.data.task": section.task})
    if bool(section.outside) != bool(section.outside_from):
        raise ValueError(
            "config.data.outside and outside_from must be given together; given "
            f"{section.outside} and {section.outside_from!r}"
        )
    check_corruption("config.data.corrupt", section.corrupt)
    for name in ("size", "task", "pool"):
        if section.features and section[name]:
            raise ValueError(
                f"config.data.{name} must be {sources.DEFAULTS[name]!r} with features, which were "
                f"computed before; given {section[name]!r}"
            )


def check_name(name: str, field: str = "config.data.name") -> None:
    """Raises ValueError unless it is a known data set, or the path of something that is there."""
    known = {*data.SOURCES, *DATASETS, *MADE}
    if name in known or name.startswith(TFDS) or (name and pathlib.Path(name).exists()):
        return
    near = checks.nearest(name, known)
    raise ValueError(
        f"{field} must be the path of a folder of images, an .npz file or a table, or a data set "
        f"of `saflex prepare --list`; there is no {name!r}{near}"
    )


def is_own(name: str) -> bool:
    """Whether a data set's name is the path of somebody's own data, whose labels nobody checked."""
    return name not in {*data.SOURCES, *DATASETS, *MADE} and pathlib.Path(name).exists()


def check_corruption(name: str, given: str) -> None:
    """Raises ValueError unless it is "fog:3" or the like, or empty."""
    if not given:
        return
    kind, _, severity = given.partition(":")
    checks.choice(corruptions.CORRUPTIONS, **{name: kind})
    if severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"{name} must be KIND:1 to KIND:5; given {given!r}")


def captions(section: ConfigDict) -> np.ndarray | None:
    """The captions [K, T, ...] of all classes; None where the config names none.

    Raises:
      ValueError: they were not made (says how).
    """
    if not section.captions:
        return None
    path = pathlib.Path(section.dir) / "captions" / f"{section.captions}.npy"
    if not path.is_file():
        raise ValueError(
            f"config.data.captions must be made first: python -m experiments.captions "
            f"{section.captions} writes {path}"
        )
    return np.load(path)


def title(section: ConfigDict) -> str:
    """The task in a few words."""
    kind = "" if section.noise_kind == "symmetric" else f"{section.noise_kind} "
    said = {
        "labels": f"{section.labels} labels",
        "noise": f"{section.noise:.0%} {kind}wrong labels",
        "outside": f"{section.outside:.0%} from {section.outside_from}",
        "novel": f"{section.novel} novel classes",
        "per_class": f"{section.per_class} a class",
        "train": f"{section.train} samples",
        "unlabelled": f"only {section.val or 'validation'} labelled",
        "trusted_only": f"{section.val or 'validation'} samples alone",
        "imbalance": f"classes {section.imbalance:g} : 1",
        "test_on": f"tested on {section.test_on}",
        "corrupt": f"tested under {section.corrupt}",
        "features": f"features {section.features}",
    }
    changed = [said[k] for k in said if section[k] != sources.DEFAULTS[k]]
    return ", ".join([pathlib.Path(section.name).stem, *changed])


@functools.lru_cache(maxsize=2)  # several seeds and arms read the same files
def opened(
    name: str, folder: str, size: int, task: str, on_device: bool, channels: int = 0
) -> data.Source:
    """The data set of that name: embedded, prepared in `folder`, or the file or folder `name`.

    Args:
      name: one of `data.SOURCES` or `datasets.DATASETS`, a path, or "tfds:cifar10".
      folder: where `experiments.prepare` (or TFDS) put data sets.
      size: pixels that images are resized to; 0 = as they are.
      task: "ordinal" says so of classes; "" = as the data set has it.
      on_device: read all rows now.
      channels: of the images of a folder, 1 or 3; 0 = as its files are.

    Raises:
      ValueError: not prepared (says how), or malformed.
    """
    shape, path = (size, size) if size else None, pathlib.Path(name)
    if name in data.SOURCES:
        source = data.SOURCES[name]()
    elif name.startswith(TFDS):
        source = data.from_tfds(name.removeprefix(TFDS), data_dir=folder)
    elif name in DATASETS or not path.exists():
        source = data.from_prepared(pathlib.Path(folder) / name, size=shape)
    elif path.is_dir():
        source = data.from_folder(path, size=shape, channels=channels or None)
    elif path.suffix.lower() in TABLES:
        source = data.from_table(path)
    elif path.suffix.lower() == ".npz":
        source = data.from_npz(path)
    else:
        raise ValueError(
            f"{name} must be a folder of images, an .npz file or a comma-separated table "
            f"({', '.join(TABLES)}); given {f'a file {path.suffix}' if path.suffix else 'a file'}"
        )
    if task and (source.labels.ndim > 1 or source.task not in ("multiclass", task)):
        raise ValueError(
            f"config.data.task must be '' for {name}, a {source.task} one; given {task!r}"
        )
    if channels and not path.is_dir():
        raise ValueError(
            f"config.data.channels must be 0 for {name}, no folder of images; given {channels}"
        )
    if shape and source.columns is not None:
        raise ValueError(f"config.data.size must be 0 for {name}, a table; given {size}")
    if shape:
        source = source._replace(inputs=data.resized(source.inputs, shape))
    inputs = np.asarray(source.inputs) if on_device else source.inputs
    return source._replace(inputs=inputs, task=task or source.task)


def beside(source: data.Source, other: data.Source) -> data.Source:
    """Both in one, the other as the test split: another distribution of the same classes.

    Raises:
      ValueError: they differ in classes, labels or the kind of an input.
    """

    def kind(x):
        return f"{x.dtype}{list(x.shape[1:])}"

    names = source.class_names and other.class_names  # as far as they have names
    for what, mine, its in (
        ("classes", source.num_classes, other.num_classes),
        ("classes", names and source.class_names, names and other.class_names),
        ("task", source.task, other.task),
        ("labels", source.labels.ndim, other.labels.ndim),
        ("inputs", kind(source.inputs), kind(other.inputs)),
    ):
        if mine != its:
            raise ValueError(
                f"config.data.test_on must have {what} {mine}, as the training set; given {its}; "
                "config.data.size resizes the images of both"
            )
    size = len(source.labels)
    return source._replace(
        inputs=data.joined(source.inputs, other.inputs),
        labels=np.concatenate([source.labels, other.labels]),
        splits={"train": np.arange(size), **source.splits}
        | {"test": size + np.arange(len(other.labels))},
        extra=_extra_beside(source, other),
    )


def _extra_beside(source: data.Source, other: data.Source) -> dict[str, np.ndarray]:
    """File names and other label sets of both; where the other has none, "" and its labels.

    What else is known of rows, as groups and captions, is left out.
    """
    own, labels = source.extra, source.labels
    instead = {
        name: other.labels
        for name, values in own.items()
        if values.dtype.kind in "iuf" and values.shape == labels.shape
    }
    if "file" in own:
        instead["file"] = np.full(len(other.labels), "")
    return {
        name: np.concatenate([own[name], other.extra.get(name, values)])
        for name, values in instead.items()
    }


def _as_read(section: ConfigDict) -> tuple:
    """The arguments of `opened` behind the name."""
    fields = ("dir", "size", "task", "on_device", "channels")
    return tuple(section[field] for field in fields)


@functools.lru_cache(maxsize=2)
def task_source(test_on: str, name: str, *key) -> tuple[data.Source, np.ndarray]:
    """The data set, with another one as its test split if `test_on` names one; and its prints."""
    source = opened(name, *key)
    if test_on and "=" not in test_on:
        source = beside(source, opened(test_on, *key))
    return source, data.fingerprints(source.inputs, chunk=CHUNK)


def feature_source(test_on: str, name: str, folder: str, tag: str):
    """`task_source` of features."""
    features = feature_set(name, folder, tag)
    source, prints = features.source, features.prints
    if test_on and "=" not in test_on:
        other = feature_set(test_on, folder, tag)
        source = beside(source, other.source)
        prints = np.concatenate([prints, other.prints])
    return source, prints


def split_inputs(section: ConfigDict, source: data.Source, split: data.Split, seed: int) -> tuple:
    """(candidates, validation samples as candidates, validation samples, test samples).

    Raises:
      ValueError: corruptions where inputs are no images.
    """
    if source.views is not None:
        return feature_inputs(section, source, split)
    inputs = source.inputs
    if source.columns is not None and (section.corrupt or section.outside):
        raise ValueError(f"config.data.corrupt and outside need images; {section.name} is a table")
    if source.columns is not None:  # the scale of its columns, from the training split alone
        inputs = data.fit_encoder(inputs[split.train], source.columns)(inputs)
    candidates, val, test = (data.subset(inputs, rows) for rows in split)
    if section.corrupt:
        test = corrupted(test, section.corrupt, seed)
    return candidates, val, val, test


def outside_inputs(section: ConfigDict, source: data.Source, prints: np.ndarray, train: np.ndarray):
    """Inputs of another data set, in the form of the candidates, without any of its own."""
    if section.features:
        other = feature_set(section.outside_from, section.dir, section.features)
        views = data.fit_scale(source.inputs[train])(other.source.views)
        return data.subset(views, np.flatnonzero(~np.isin(other.prints[: len(views)], prints)))
    other = np.asarray(opened(section.outside_from, *_as_read(section)).inputs)
    return other[~np.isin(data.fingerprints(other, chunk=CHUNK), prints)]


def strata(source: data.Source) -> np.ndarray:
    """i[N] classes to keep in proportion: the label, or what comes nearest where it is no class."""
    if source.labels.ndim == 1:
        return source.labels
    if source.task == "multilabel":
        return source.labels.any(1).astype(np.int64)
    return source.labels.argmax(1)


def make_split(section: ConfigDict, source: data.Source, seed: int) -> data.Split:
    """The rows that train, validate and test.

    A number of samples is held out of the rows that would train; zero is the official split.
    `test_on="cell=1"` tests on the rows whose `extra["cell"]` is 1, and none of these trains.

    Raises:
      ValueError: no such group; no official split where none is held out; as `data.hold_out`.
    """
    groups, official = strata(source), dict(source.splits)
    rest = official.pop("train", np.arange(len(groups)))
    if "=" in section.test_on:
        name, _, value = section.test_on.partition("=")
        checks.choice(source.extra, **{"config.data.test_on": name})
        values = source.extra[name].astype(str)
        checks.choice(set(values.tolist()), **{f"config.data.test_on: {name}": value})
        rest, official["test"] = rest[values[rest] != value], np.flatnonzero(values == value)
        if section.trusted and np.isin(official["val"], official["test"]).any():
            raise ValueError(
                f"config.data.trusted must name no tested sample; given some with {section.test_on}"
            )
    _check_sizes(section, groups[rest])
    if section.val and section.test:
        parts = data.stratified_split(groups[rest], val=section.val, test=section.test, seed=seed)
        return data.Split(*(rest[rows] for rows in parts))
    for name in ("val", "test"):
        if section[name]:
            rest, official[name] = data.hold_out(rest, groups, size=section[name], seed=seed)
        elif name not in official:
            raise ValueError(
                f"config.data.{name} must be a number of samples, since {section.name} has no "
                f"official {name} split; given 0"
            )
    return data.Split(rest, official["val"], official["test"])


def _check_sizes(section: ConfigDict, classes: np.ndarray) -> None:
    """Raises ValueError unless what is held out, and what is left, may have all classes."""
    size, least = len(classes), len(np.unique(classes))
    held = {name: section[name] for name in ("val", "test") if section[name]}
    if min([*held.values(), size - sum(held.values())]) >= least:
        return
    asked = " and ".join(f"config.data.{name}={number}" for name, number in held.items())
    fits = held_out_sizes(classes, held)
    fix = " ".join(f"--config.data.{name}={number}" for name, number in fits.items())
    raise ValueError(
        f"{asked} must leave samples of all {least} classes in each split; {section.name} has "
        f"{size} to split, {size - sum(held.values())} would be left to train on. Try {fix}"
    )


def held_out_sizes(classes: np.ndarray, splits: Iterable[str]) -> dict[str, int]:
    """Split -> samples to hold out: a tenth for val, a fifth for test; room for all classes.

    Args:
      classes: i[N], of what is split.
      splits: of "val" and "test".
    """
    shares, least = {"val": 10, "test": 5}, len(np.unique(classes))
    return {split: max(least, len(classes) // shares[split]) for split in splits}


def sample(rows: np.ndarray, number: int, seed: int) -> np.ndarray:
    """`number` of the rows at random, sorted.

    Raises:
      ValueError: there are fewer.
    """
    if len(rows) < number:
        raise ValueError(f"config.data.train must be at most {len(rows)}; given {number}")
    return np.sort(generator("train", seed).permutation(rows)[:number])


def given_labels(
    section: ConfigDict, source: data.Source, rows: np.ndarray, inputs: Any, seed: int
) -> np.ndarray:
    """The labels that training is given for rows with these inputs: another set's, or with noise.

    Raises:
      ValueError: no such set; noise where labels are no classes.
    """
    if section.labels:
        checks.choice(source.extra, **{"config.data.labels": section.labels})
        return source.extra[section.labels][rows]
    labels = source.labels[rows]
    if not section.noise:
        return labels
    if labels.ndim > 1:
        raise ValueError(
            f"config.data.noise must be 0 where labels are no classes, as in {section.name}; "
            f"given {section.noise}"
        )
    if isinstance(inputs, dict):  # a table with categories
        inputs = inputs["numeric"]
    if source.views is not None:
        inputs = inputs[:, 0]
    make = NOISE[section.noise_kind]
    return make(inputs, labels, source.num_classes, share=section.noise, seed=seed)


def repeated(inputs: Any, labels: np.ndarray, least: int) -> tuple[Any, np.ndarray]:
    """The samples over and over, `least` rows or more.

    So a batch of a few samples has no row twice, each copy is augmented on its own.
    """
    rows = np.tile(np.arange(len(labels)), math.ceil(least / len(labels)))
    return data.subset(inputs, rows), labels[rows]


def cleaned(
    config: ConfigDict, source: data.Source, inputs: Any, labels: np.ndarray, *, trusted: int,
    folder: pathlib.Path | None,
) -> tuple[np.ndarray, np.ndarray, cleaning.Start | None]:  # fmt: skip
    """(rows that `config.data.cleaning` leaves, the last `trusted` ones among them; their labels;
    what a rule starts from).

    Raises:
      ValueError: labels that are no classes.
    """
    section = config.data
    if labels.ndim > 1:
        raise ValueError(
            f"config.data.cleaning must be '' where labels are no classes, as in {section.name}; "
            f"given {section.cleaning!r}"
        )
    stay, labels, start = cleaning.cleaned(
        section.cleaning, inputs, labels, source.num_classes, trusted=trusted, seed=config.seed,
        folder=folder,
    )  # fmt: skip
    if start is not None:
        start = start._replace(beliefs=start.beliefs[stay])
    return np.flatnonzero(stay), labels[stay], start


def make_split_source(config: ConfigDict) -> tuple:
    """(data set, its prints, the rows of `config.seed`, copies left out).

    Raises:
      ValueError: as of `make_split`; a split that lacks a class.
    """
    section, seed = config.data, config.seed
    if section.features:
        key = section.dir, section.features
        source, prints = feature_source(section.test_on, section.name, *key)
    else:
        source, prints = task_source(section.test_on, section.name, *_as_read(section))
    if section.trusted:
        source = named_rows.trusted(source, section.trusted)
    split, removed = data.without_copies(make_split(section, source, seed), prints)
    if section.novel:
        split = data.novel_classes(
            split, source.labels, novel=section.novel, num_classes=source.num_classes
        )
    if section.select:
        rest, chosen_on = data.hold_out(split.train, strata(source), size=section.select, seed=seed)
        split = split._replace(train=rest, test=chosen_on)
    if section.per_class:
        few = data.few_shot(strata(source)[split.train], per_class=section.per_class, seed=seed)
        split = split._replace(train=split.train[few])
    if section.train:
        split = split._replace(train=sample(split.train, section.train, seed))
    if section.imbalance > 1:
        tail = data.long_tail(strata(source)[split.train], ratio=section.imbalance, seed=seed)
        split = split._replace(train=split.train[tail])
    data.check_split(split, source.labels, source.num_classes, novel=section.novel > 0)
    return source, prints, split, removed


def trained_rows(section: ConfigDict, split: data.Split) -> np.ndarray:
    """Rows that train: the training split, and the validation split where it is asked for."""
    return np.concatenate([split.train, split.val]) if section.train_on_val else split.train


def make_data(config: ConfigDict, folder: pathlib.Path | None = None) -> Data:
    """Opens, splits, corrupts and standardises, all by `config.seed`.

    `folder` is that of the run, see `cleaning.cleaned`.
    """
    section, seed = config.data, config.seed
    source, prints, split, removed = make_split_source(config)
    candidates, trusted, val, test = split_inputs(section, source, split, seed)
    given = given_labels(section, source, split.train, candidates, seed)
    clean, outside = source.labels[split.train], np.zeros(len(split.train), bool)
    rows = split.train
    if section.outside:
        other = outside_inputs(section, source, prints, split.train)
        candidates, outside = data.outside_candidates(
            np.asarray(candidates), other, share=section.outside, seed=seed
        )
    val_labels = source.labels[split.val]
    made = made_candidates.opened(section, source, trained_rows(section, split))
    places = np.full(len(given), -1)
    if section.pool_rows:
        given, clean, val_labels = (
            data.priors(labels, source.num_classes, source.task)
            for labels in (given, clean, val_labels)
        )
        added = made_candidates.samples(made, candidates, on_device=section.on_device)
        candidates = data.joined(*added.inputs)
        given, clean = np.concatenate([given, added.given]), np.concatenate([clean, added.clean])
        outside = np.append(outside, np.zeros(len(added.given), bool))
        places = np.append(places, added.places)
        rows = np.append(rows, np.full(len(added.places), -1))
    if section.train_on_val:
        candidates = data.joined(candidates, trusted)
        given, clean = (np.concatenate([labels, val_labels]) for labels in (given, clean))
        outside = np.append(outside, np.zeros(len(val_labels), bool))
        places = np.append(places, np.full(len(val_labels), -1))
        rows = np.append(rows, split.val)
    start = None
    if section.cleaning:
        number = len(given) - len(split.train)
        stay, given, start = cleaned(
            config, source, candidates, given, trusted=number, folder=folder
        )
        candidates = data.subset(candidates, stay)
        clean, outside, rows = clean[stay], outside[stay], rows[stay]
    if section.trusted_only:
        candidates, given = repeated(trusted, val_labels, config.train.batch_size)
        clean, outside = given, np.zeros(len(given), bool)
        rows = np.resize(split.val, len(given))

    def pool(inputs, labels):
        labels = data.priors(labels, source.num_classes, source.task)
        rows = np.arange(len(labels), dtype=np.int32)
        return Batch(inputs, labels, np.ones(len(rows), bool), rows)

    held_out = pool(val, val_labels)
    pools = Streams(pool(candidates, given), held_out)
    if section.pool_rows:
        trace = made_candidates.trace(made, places)
        pools = pools._replace(candidates=pools.candidates._replace(trace=trace))
    if section.val_from == "train":
        pools = pools._replace(val=pools.candidates)
        if source.views is not None:
            pools = pools._replace(val=pool(candidates[:, 0], given))
    clean = pool(None, clean).labels.argmax(1)
    wrong = (pools.candidates.labels.argmax(1) != clean) | outside
    if section.unlabelled:
        hidden = np.full_like(pools.candidates.labels, 1 / pools.candidates.labels.shape[1])
        pools = Streams(pools.candidates._replace(labels=hidden), held_out, held_out)
    tested, together = pool(test, source.labels[split.test]), 1
    if episode := configure.episode(config.method.to_dict()):
        if source.task != "multiclass":
            raise ValueError(
                f"config.data.name must be of classes without order for {config.method.name}; "
                f"{section.name} is {source.task}"
            )
        tested, together = in_episodes(tested, seed=seed, **episode._asdict())
    return Data(
        pools,
        held_out,
        tested,
        together,
        clean,
        wrong,
        source,
        removed,
        None if section.pool_rows else made,
        made,
        seed,
        np.where(outside, -1, rows),
        start,
    )


def in_episodes(
    pool: Batch, *, ways: int, shots: int, queries: int, seed: int
) -> tuple[Batch, int]:
    """TEST_EPISODES episodes of a pool, labelled by the class within the episode; and their size.

    Support rows are masked, since their labels are given.
    """
    stream = data.EpisodeStream(
        pool.labels.argmax(1), ways=ways, shots=shots, queries=queries, episodes=TEST_EPISODES,
        seed=seed, purpose="test episodes",
    )  # fmt: skip
    rows, of_class = stream.rows(0).candidates, shots + queries
    place = np.arange(len(rows))
    labels = np.eye(ways, dtype=np.float32)[place // of_class % ways]
    inputs, mask = data.subset(pool.inputs, rows), place % of_class >= shots
    return Batch(inputs, labels, mask, pool.index[rows]), ways * of_class


def corrupted(images: Any, corruption: str, seed: int) -> np.ndarray:
    """The images f32[N, H, W, C] under "fog:3", made on the device."""
    name, _, severity = corruption.partition(":")
    corrupt = functools.partial(corruptions.corrupt, name=name, severity=int(severity))
    compiled = jax.jit(lambda key, x, index: corrupt(key, x, index=index))
    out = np.empty(images.shape, np.float32)
    for begin in range(0, len(images), CHUNK):
        # The last chunk takes rows of the one before, so that all have one shape.
        rows = np.arange(CHUNK) + max(0, min(begin, len(images) - CHUNK))
        rows = rows[rows < len(images)]
        out[rows] = compiled(jax.random.key(seed), floats(images[rows]), rows)
    return out


def test_scores(method: Method, state: TrainState, task: Data) -> dict[str, float]:
    """What is reported of the test split, which this reads.

    accuracy (share) and loss (nats); for classes in order also the quadratically weighted kappa;
    for several labels at once, in the place of accuracy, the mean over labels of the area under the
    ROC curve.
    """
    test, together = task.test, task.together
    batch_size = max(1, EVALUATED // together) * together
    scores = train.make_evaluator(
        method, test.inputs, test.labels, mask=test.mask, batch_size=batch_size
    )(state)
    if task.source.task == "multiclass":
        return scores
    probs = train.probabilities(method, state, test.inputs)
    if task.source.task == "ordinal":
        truth = test.labels.argmax(1)
        kappa = metrics.cohen_kappa_score(truth, probs.argmax(1), weights="quadratic")
        return scores | {"kappa": float(kappa)}
    present = test.labels > 0
    both = present.any(0) & ~present.all(0)
    auc = metrics.roc_auc_score(present[:, both], probs[:, both], average="macro")
    return {"auc": float(auc), "loss": scores["loss"]}
