"""Breast-cancer table (WDBC, 30 numeric columns) with 30 % wrong labels; embedded data, any CPU.

Command:   python -m experiments.compare --config=experiments/configs/wdbc.py
Hardware:  2 CPU cores, about a minute.
"""

from ml_collections import ConfigDict

from experiments.configs import digits


def get_config() -> ConfigDict:
    """The config; what is not set here is as in digits.py."""
    config = digits.get_config()
    config.data.update({"name": "wdbc", "val": 60, "test": 200, "noise": 0.3})
    config.augment = "feature_noise(0.1) | mixup(0.4, probability=0.25)"
    config.model = {"name": "mlp", "widths": (64, 64), "norm": "none"}
    config.train.update({"steps": 600, "batch_size": 64})
    return config
