"""Emoji of two vendors: a small CLIP from scratch on one's, tested on the other's drawings.

Command:   python -m experiments.clip_emoji
Hardware:  2 CPU cores, under 10 minutes.
Expected:  see docs/clip.md, which that command printed.

A class is one of the groups of the Unicode list that have 24 emoji or more, 24 of them, and its
captions are the names of its emoji, 32 at most, of which an image gets one of its class at random
at each visit.
"""

from ml_collections import ConfigDict

from experiments.arms import STANDING
from experiments.configs import digits, methods, sources

CAPTIONS = {"right": 0.0, "wrong 30 %": 0.3}  # where captions come from -> share of wrong classes
TEXT = {"depth": 1, "vocab_size": 1054, "context": 16, "width": 32, "heads": 2}
FLYP = {"embed_dim": 64, "text": TEXT}


def _arm(rule: str = "as_given", **data) -> dict:
    return {"method": {"name": "flyp", "rule": rule}, "data": {"train_on_val": True} | data}


ARMS = {
    "flyp": _arm(),
    "class_head": {
        "method": {"name": "supervised", "rule": "as_given"}, "data": {"train_on_val": True},
    },
    "trusted_only": _arm(**STANDING["trusted_only"]["data"]),
    "saflex": _arm("saflex"),
}  # fmt: skip


def get_config(captions: str = "wrong 30 %") -> ConfigDict:
    """The config with its arms.

    Args:
      captions: of CAPTIONS.
    """
    config = digits.get_config()
    config.data = sources.section(
        "emoji_groups", size=24, captions="emoji", val=200, noise=CAPTIONS[captions]
    )
    config.augment = "shift(2) | flip"
    config.model = {"name": "small_cnn", "widths": (16, 32, 64), "norm": "group"}
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 1e-2
    config.method = methods.all_methods("flyp", "saflex", flyp=FLYP)
    config.train = {
        "steps": 800, "batch_size": 64, "val_batch_size": 64, "log_every": 200,
        "checkpoint_every": 800, "keep_best": False,
    }  # fmt: skip
    config.arms = ARMS
    return config
