"""Policies learned in the loop beside drawn ones; 10,000 training images of Fashion-MNIST.

Command:   python -m experiments.prepare fashion_mnist
           python -m experiments.compare --config=experiments/configs/learned_policies.py --seeds=5
Hardware:  2 CPU cores, about 40 minutes (estimated from single steps).
Expected:  not run here. For orientation, in full runs on CIFAR-10 with a Wide-ResNet-40-2 the
           papers have, as remembered and not looked up, about one point above plain training.

The published runs take 200 epochs and more, these six: MADAug's curriculum and the multiplier of
the invariance constraint have clocks twenty and ten times as fast. MADAug reads 500 validation
labels, which the others do not see.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sla

PLAIN = {"name": "supervised"}
ARMS = {
    "baseline": {"method": PLAIN},
    "randaugment": {"method": PLAIN, "augment": "randaugment(2, 9)"},
    "trivialaugment": {"method": PLAIN, "augment": "trivialaugment"},
    "invariance": {"method": {"name": "invariance"}},
    "madaug": {"method": {"name": "madaug"}},
}


def get_config() -> ConfigDict:
    """The config; what is not set here is as in sla.py. Without an arm it trains MADAug."""
    config = sla.get_config()
    config.train.steps = 1000
    config.method = methods.all_methods(
        "madaug", madaug={"tau": 2.0}, invariance={"dual_rate": 1e-3}
    )
    config.arms = ARMS
    return config
