"""FLYP's recipe for ImageNet: 10 epochs of 512 pairs, weight decay .1.

Command:   python -m experiments.main --config=experiments/configs/flyp_imagenet.py
Hardware:  accelerators with 80 GB together, a day; not run here. `experiments.configs.flyp` says
           which files it needs.
Expected:  published accuracy in %, in distribution / mean of five shifts (ImageNetV2, -R, -A,
           -Sketch, ObjectNet):
               FLYP 82.2 / 59.5, zero-shot 68.3 / 58.7, full fine-tuning 81.3 / 54.9
           (re-runs of a later paper; FLYP's own says 82.6).

The official validation images are data/imagenet/test; val is held out of training, 10 a class.
"""

from ml_collections import ConfigDict

from experiments.configs import flyp


def get_config() -> ConfigDict:
    """The config."""
    config = flyp.make("imagenet", samples=1_281_167, epochs=10, batch_size=512, decay=0.1)
    config.data.val = 10_000
    return config
