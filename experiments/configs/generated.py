"""Garments of a generated pool: few real ones, and edits of them, of which some are wrong.

Command:   docs/generation.md has the four commands that make the pool and compare these arms.
Hardware:  2 CPU cores, see there.
Expected:  the table there.

50 training and 20 trusted samples a class of Fashion-MNIST, at 14x14 pixels; candidates train as
samples of their own, so that each has its own memory. All arms also train on the trusted samples.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sources

PLAIN = {"name": "supervised", "rule": "as_given"}
SAFLEX = {"name": "supervised", "rule": "saflex"}
NONE = {"pool": "", "pool_rows": False, "pool_flagged": "keep"}
ARMS = {
    "raw": {"method": PLAIN},
    "filtered": {"method": PLAIN, "data": {"pool_flagged": "drop"}},
    "saflex": {"method": SAFLEX},
    "saflex_filtered": {"method": SAFLEX, "data": {"pool_flagged": "drop"}},
    "real_only": {"method": PLAIN, "data": NONE},
    "trusted_only": {"method": PLAIN,
                     "data": {**NONE, "train_on_val": False, "trusted_only": True}},
}  # fmt: skip


def get_config() -> ConfigDict:
    """The config."""
    data = sources.section(
        "fashion_mnist", size=14, per_class=50, val=200, train_on_val=True,
        pool="runs/pool", pool_rows=True,
    )  # fmt: skip
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            "data": data,
            "augment": "shift(1) | flip",
            "model": {"name": "small_cnn", "widths": (16, 32), "norm": "group"},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 1e-4},
            "method": methods.all_methods(rule="saflex"),
            "train": {"steps": 600, "batch_size": 128, "val_batch_size": 0, "log_every": 100,
                      "checkpoint_every": 300, "keep_best": False},
            "arms": ARMS,
        }
    )  # fmt: skip
