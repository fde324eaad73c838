"""Contrastive fine-tuning on CIFAR-10 whose captions come from people's labels, right or wrong.

    python -m experiments.prepare cifar10n resnet18 minilm
    python -m experiments.features cifar10n --views=4 --augment="shift(4) | flip" --limit=12000 \\
        --tag=crop        # and again with --corrupt=fog:3 and --corrupt=jpeg_compression:3
    python -m experiments.captions cifar10n
    python -m experiments.clip_cifar [--seeds=5]

Prints the accuracy in % of every arm on the official test images, and on the same under fog and
under JPEG's loss, once with right captions and once with those of one annotator. Each test set is
read once an arm and seed. Options were chosen on seeds 100 to 102, on training images with right
labels in the place of test images (--select).
"""

from __future__ import annotations

from absl import app, flags, logging

from experiments import clip, command_line
from experiments.configs import clip_cifar

_SELECT = flags.DEFINE_integer("select", 0, "So many training images stand in for the test set.")
CORRUPTIONS = ("fog:3", "jpeg_compression:3")


def main(argv: list[str]) -> None:
    """Runs and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    settings = {f"{name} captions": clip_cifar.get_config(name) for name in clip_cifar.CAPTIONS}
    tests = {"test": {}} | {c: {"corrupt": c} for c in CORRUPTIONS}
    if _SELECT.value:
        tests = {"test": {}}
        for config in settings.values():
            config.data.select = _SELECT.value
    clip.run("clip_cifar", settings, tests)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    command_line.run_absl(main)
