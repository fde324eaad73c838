"""FLYP's own recipes, for whoever has the data and CLIP's weights: ViT-B/16 of OpenAI.

    from experiments.configs import flyp

    method = flyp.make_method("open_clip_folder", "imagenet", run, rule=saflex.posterior(run))

`run.captions` are the tokens of the class names in the recipe's templates
(`data.captions.caption_table`, with `models.Tokenizer` as its encoder); candidates are images of
224 pixels in [0, 1] after `resized_crop` with a scale of .9 to 1. None was run here, for want of
the weights. Published are (ViT-B/16, %; iWildCam is macro-F1, FMoW out of distribution the worst
region), in distribution / out of it:

                 FLYP          zero-shot       full fine-tuning
    iWildCam     52.2 / 35.6
    FMoW         68.6 / 41.3
    ImageNet     82.2 / 59.5   68.3 / 58.7     81.3 / 54.9   (five shifts, their mean)

Source: Goyal et al., CVPR 2023, its repository locuslab/FLYP for the recipes, and for the numbers a
later paper's table of re-runs; the paper itself says 82.6 for ImageNet.

It differs: rows of one class are no negatives of each other, where FLYP's code takes them for such.
"""

from __future__ import annotations

from typing import NamedTuple

import optax

from saflex_jax import checks, models
from saflex_jax.methods import flyp
from saflex_jax.types import Method, Rule, RunInfo


class Recipe(NamedTuple):
    """Epochs, rows of a batch, and AdamW's options; it decays all parameters."""

    epochs: int
    batch_size: int
    weight_decay: float
    learning_rate: float = 1e-5
    warmup: int = 500  # steps


RECIPES = {
    "imagenet": Recipe(10, 512, 0.1),
    "iwildcam": Recipe(20, 256, 0.2),
    "fmow": Recipe(20, 256, 0.2),
}


def make_method(
    folder: str,
    recipe: str,
    run: RunInfo,
    *,
    rule: Rule | None = None,
    options: flyp.Options = flyp.Options(),
    dtype: str | None = None,
    remat: bool = False,
) -> Method:
    """FLYP from the weights in a folder.

    Args:
      folder: as `models.load_clip` reads it.
      recipe: of RECIPES.
      run: of which captions, classes and number of samples are read.
      rule: what pairs count; None = all alike.
      options: of the loss; the towers are the folder's.
      dtype, remat: see `models.load_clip`: half precision, and activations made again.

    Raises:
      ValueError: an unknown recipe, or what `load_clip` refuses.
    """
    checks.choice(RECIPES, recipe=recipe)
    epochs, batch_size, decay, rate, warmup = RECIPES[recipe]
    clip, params = models.load_clip(folder, dtype=dtype, remat=remat)
    steps = epochs * -(-run.num_samples // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(warmup, steps // 2), steps)
    model = models.from_linen(models.TwoTowers.of(clip))
    model = model._replace(init=lambda key, inputs: (params, {}))
    return flyp.make(model, optax.adamw(schedule, weight_decay=decay), options, rule=rule, run=run)
