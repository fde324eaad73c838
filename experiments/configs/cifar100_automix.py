"""AutoMix and its relatives at full size: CIFAR-100, ResNet-18, 200 epochs.

Command:   tfds build cifar100 --data_dir=data --file_format=array_record
           python -m experiments.compare --config=experiments/configs/cifar100_automix.py
Hardware:  one GPU; too much for a CPU.
Expected:  not run here. OpenMixup's table for this network and 200 epochs (repository
           Westlake-AI/openmixup, Mixup_cifar.md; top-1 %, median of the last ten epochs, number of
           seeds not said): baseline 76.42, mixup 78.52, cutmix 79.45, AutoMix 80.12, SAMix 81.21;
           AdAutoMix 81.55 (repository JinXins/Adversarial-AutoMixup, Experiments.md).

It differs from these runs: AdamW in the place of SGD with momentum, a learning rate that falls to
zero for every arm, shifts over black in the place of reflections, mixup and cutmix with a share of
its own for every sample, and the accuracy of the last step, of the head "one".
"""

from ml_collections import ConfigDict

from experiments.configs import automix, methods, sources

EPOCHS, BATCH_SIZE = 200, 100


def get_config() -> ConfigDict:
    """The config; without an arm it trains AutoMix."""
    augment = "shift(4) | flip(0.5)"
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            # One image of each class, which nobody reads: all but these train.
            "data": sources.section("tfds:cifar100", val=100),
            "augment": augment,
            "model": {"name": "resnet18", "norm": "batch"},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 5e-2},
            "method": methods.all_methods("automix"),
            "train": {"steps": EPOCHS * 49_900 // BATCH_SIZE, "batch_size": BATCH_SIZE,
                      "val_batch_size": BATCH_SIZE, "log_every": 499, "checkpoint_every": 4_990,
                      "keep_best": False},
            "arms": automix.arms(augment),
        }
    )  # fmt: skip
