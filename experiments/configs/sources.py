"""The `data` section of a config: which samples train, validate and test, and with which labels."""

from __future__ import annotations

from typing import Any

# Field -> default and meaning. The name has no default.
FIELDS = {
    "name": (
        "",
        'a set that `saflex prepare` made, "digits" or "wdbc", which need no files, "tfds:NAME", '
        "or the path of a file or a folder",
    ),
    "dir": ("data", "folder in which `saflex prepare` put data sets"),
    "size": (0, "resize images to size x size pixels; 0 = leave them as they are"),
    "channels": (0, "read a folder's images with 1 channel (grey) or 3; 0 = as the files are"),
    "task": ("", '"ordinal" says that the classes of an .npz file are ordered'),
    "test_on": ("", 'test on another data set, or on the rows of a group, as in "cell=1"'),
    "trusted": (
        "",
        "a text file that names the trusted samples, FILE or FILE,CLASS a line (of a table or an "
        ".npz file ROW, from 0 on); they are the validation split",
    ),
    "val": (0, "trusted samples held out of training; 0 = the official validation split"),
    "test": (0, "test samples held out of training; 0 = the official test split"),
    "select": (
        0,
        "> 0: this many training samples with right labels stand in for the test split, to choose "
        "options on",
    ),
    "novel": (0, "few-shot: test on the last `novel` classes, which no training sample is of"),
    "per_class": (0, "training samples of each class; 0 = all"),
    "train": (0, "training samples, drawn at random; 0 = all"),
    "imbalance": (
        1.0,
        "size of the first training class over that of the last, exponential between them",
    ),
    "unlabelled": (False, "hide all training labels; the validation samples train with theirs"),
    "train_on_val": (False, "the validation samples also train"),
    "trusted_only": (False, "nothing but the validation samples trains"),
    "val_from": ("", '"train": there are no trusted samples; training samples take their place'),
    "folds": (
        0,
        "> 0: split validation samples that train into folds, so that none directs a batch that it "
        "is in",
    ),
    "labels": ("", 'train on another label set of the data set, as "worst" of cifar10n'),
    "noise": (0.0, "share of the training labels to make wrong"),
    "noise_kind": ("symmetric", 'which labels go wrong: "symmetric", "pairwise" or "instance"'),
    "cleaning": (
        "",
        'before training "confident" or "neighbours" drop suspect samples; "audit" learns soft '
        "labels, where some are surely wrong, and drops what is unlike trusted samples, if these "
        'train, too; "audit_first" drops the same, and the rule starts from what it believes',
    ),
    "outside": (0.0, "share of the training inputs to replace by those of `outside_from`"),
    "outside_from": ("", "data set whose inputs belong to no class"),
    "pool": ("", "folder or ArrayRecord file of generated candidates"),
    "pool_rows": (
        False,
        "generated candidates train beside their sources, as samples; False = in their place",
    ),
    "pool_flagged": ("keep", '"drop": leave out candidates that a filter flagged'),
    "corrupt": ("", 'corrupt the test images: KIND:1 to KIND:5, as "fog:3"'),
    "features": ("", "a set that `saflex features` made; its features are the inputs"),
    "captions": ("", "captions of the classes, made by `python -m experiments.captions`; for flyp"),
    "on_device": (True, "keep the whole set on every device; False = read ahead from the host"),
}
DEFAULTS = {field: default for field, (default, _) in FIELDS.items() if field != "name"}


def section(name: str, **changes: Any) -> dict[str, Any]:
    """The section of a data set: its name, "tfds:NAME", or the path of a file or a folder."""
    return {"name": name, **DEFAULTS, **changes}
