"""What the recipes of FLYP share: OpenAI's ViT-B/16, fine-tuned on folders of images.

`flyp_imagenet`, `flyp_iwildcam` and `flyp_fmow` are the configs. They wait for what is not here:

    data/NAME/{train,val,test}/CLASS/FILE    images; val is trusted and does not train
    data/weights/clip_b16                    a folder as `models.load_clip` reads it, with its
                                             tokenizer.json
    data/captions/NAME.npy                   of the class names, one a line, as folders are sorted:
        python -m experiments.captions NAME=names.txt --templates=NAME \\
            --weights=data/weights/clip_b16

`--config.method.rule=saflex` weighs pairs. None was run here, for want of the weights.

It differs from FLYP: rows of one class are no negatives of each other, where its code takes them
for such; images are resized to 224 x 224 whole, not cropped in the centre; what is reported is
accuracy.

Source: Goyal et al., "Finetune Like You Pretrain", CVPR 2023; its repository locuslab/FLYP for the
recipes. Published numbers are those of a later paper's table of re-runs (ViT-B/16).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import methods, sources

WARMUP = 500  # steps


def make(name: str, *, samples: int, epochs: int, batch_size: int, decay: float) -> ConfigDict:
    """A recipe.

    Args:
      name: of the folder of images, and of the captions.
      samples: of the training split, which make an epoch.
      epochs: of the run.
      batch_size: pairs of a step.
      decay: AdamW's, of all parameters.
    """
    steps = epochs * -(-samples // batch_size)
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            "data": sources.section(f"data/{name}", size=224, captions=name, on_device=False),
            "augment": "resized_crop(scale=(0.9, 1.0))",
            "model": {
                "name": "clip", "weights": "data/weights/clip_b16", "dtype": "bfloat16",
                "remat": True,
            },
            "optimizer": {"learning_rate": 1e-5, "weight_decay": decay, "warmup": WARMUP},
            "method": methods.all_methods("flyp", flyp={"parts": 8}),
            "train": {
                "steps": steps, "batch_size": batch_size, "val_batch_size": batch_size // 4,
                "log_every": 100, "checkpoint_every": 1000, "keep_best": False,
            },
        }
    )  # fmt: skip
