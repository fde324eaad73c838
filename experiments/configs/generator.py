"""Garments of a noisy generator: 20 % have a wrong label, 20 % are handwritten digits.

Command:   python -m experiments.prepare fashion_mnist mnist
           python -m experiments.compare --config=experiments/configs/generator.py --seeds=3
Hardware:  2 CPU cores, about 3 minutes.
Expected:  docs/results_gallery.png, which that command drew.

The suite's task "generator_40" with the arms of `experiments.arms` alone: what is learned of single
samples.
"""

from ml_collections import ConfigDict

from experiments import arms, suite_tasks


def get_config() -> ConfigDict:
    """The config, as in the suite but for the arms."""
    config = suite_tasks.make("small")["generator_40"].config
    config.arms = arms.STANDING
    return config
