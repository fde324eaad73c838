"""The `data` section of a config: which samples train, validate and test, and with which labels."""

from __future__ import annotations

from typing import Any

DEFAULTS = {
    "dir": "data",  # where `python -m experiments.prepare` put data sets
    "size": 0,  # pixels that images are resized to; 0 = as they are
    "task": "",  # "ordinal" says so of an .npz file given by its path
    "test_on": "",  # another data set, or the rows of a group: "cell=1"
    "val": 0,  # samples held out of training; 0 = the official split
    "test": 0,
    "select": 0,  # > 0: so many training samples stand in for the test split, to choose options on
    "novel": 0,  # the last so many classes are what is tested on, and nothing else sees them
    "per_class": 0,  # few-shot: training samples of each class; 0 = all
    "train": 0,  # training samples at random; 0 = all. One number for seeds that lose other copies
    "imbalance": 1.0,  # of the training classes: the first over the last, between exponentially
    "unlabelled": False,  # no training label is seen; the validation samples train beside
    "train_on_val": False,
    "trusted_only": False,  # the candidates are the validation samples and nothing else
    "val_from": "",  # "train": the training samples, as given, direct the learning themselves
    "folds": 0,  # > 0: no sample directs a batch that it is in; with the two above
    "labels": "",  # another label set to train on: "worst" of cifar10n
    "noise": 0.0,  # share of wrong training labels
    "noise_kind": "symmetric",  # or "pairwise", "instance"
    "cleaning": "",  # before training: "confident", "neighbours" (`experiments.cleaning`)
    "outside": 0.0,  # share of training inputs replaced by those of the data set `outside_from`
    "outside_from": "",
    "pool": "",  # a folder or ArrayRecord file of generated candidates
    "pool_rows": False,  # they train beside their sources, as samples; False = in their place
    "pool_flagged": "keep",  # "drop": without those that a filter flagged
    "corrupt": "",  # of the test inputs: "fog:3"
    "features": "",  # a set that `experiments.features` made: inputs are its features, not images
    "captions": "",  # of the classes: a set that `experiments.captions` made, for flyp
    "on_device": True,  # the whole set on every device; False = read ahead from the host
}


def section(name: str, **changes: Any) -> dict[str, Any]:
    """The section of a data set: its name, "tfds:NAME", or the path of a file or a folder."""
    return {"name": name, **DEFAULTS, **changes}
