"""SLA and its relatives at full size: CIFAR-10, ResNet-18, 200 epochs.

Command:   python -m experiments.prepare cifar10
           python -m experiments.compare --config=experiments/configs/cifar_sla.py
Hardware:  one GPU; too much for a CPU.
Expected:  not run here. The paper (Lee et al., ICML 2020) has, with a ResNet-32 and rotation, as
           remembered and not looked up: baseline 92.39, self-distillation 93.26, aggregated
           94.50 %. A ResNet-18 starts higher: OpenMixup's table has 94.87 % for it after 200 epochs
           (repository Westlake-AI/openmixup, Mixup_cifar.md).

As in the paper 5,000 training images are held out and 128 samples, hence 512 views, make a batch.
It differs from it: the larger network, AdamW with a cosine in the place of SGD with steps, and the
last parameters in the place of those that were best on the images held out.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sla, sources

EPOCHS, BATCH_SIZE = 200, 128


def get_config() -> ConfigDict:
    """The config; without an arm it trains SLA with self-distillation."""
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            "data": sources.section("cifar10", val=5000),
            "augment": "shift(4) | flip(0.5)",
            "model": {"name": "resnet18", "norm": "batch"},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 5e-2},
            "method": methods.all_methods("sla"),
            "train": {"steps": EPOCHS * 45_000 // BATCH_SIZE, "batch_size": BATCH_SIZE,
                      "val_batch_size": BATCH_SIZE, "log_every": 352, "checkpoint_every": 3_520,
                      "keep_best": False},
            "arms": sla.ARMS,
        }
    )  # fmt: skip
