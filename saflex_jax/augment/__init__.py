"""Upstream augmentation on the device: pure (key, Batch) -> Batch, run inside the step."""

from saflex_jax.augment.alternatives import (
    Alternatives,
    of_operations,
    of_pipelines,
    of_views,
)
from saflex_jax.augment.base import (
    OPERATIONS,
    Augment,
    by_operation,
    chain,
    choice,
    identity,
    on,
    per_example,
    record,
    register_operation,
    sample_keys,
    views,
)
from saflex_jax.augment.captions import swapped_classes, wrong_captions
from saflex_jax.augment.corruptions import corrupt
from saflex_jax.augment.fields import random_field
from saflex_jax.augment.made import candidate_trace, groups
from saflex_jax.augment.mixing import (
    cutmix,
    fmix,
    gridmix,
    manifold_mixup,
    mixup,
    resizemix,
    smoothmix,
)
from saflex_jax.augment.parse import parse, register
from saflex_jax.augment.policies import augmix, autoaugment, randaugment, trivialaugment
from saflex_jax.augment.spatial import (
    affine,
    blur,
    cutout,
    flip,
    random_erasing,
    resized_crop,
    shift,
    soft_crop,
)
from saflex_jax.augment.tabular import feature_mask, feature_noise, smote, tabular_cutmix
from saflex_jax.augment.view import view

__all__ = [
    "OPERATIONS",
    "Alternatives",
    "Augment",
    "affine",
    "augmix",
    "autoaugment",
    "blur",
    "by_operation",
    "candidate_trace",
    "chain",
    "choice",
    "corrupt",
    "cutmix",
    "cutout",
    "feature_mask",
    "feature_noise",
    "flip",
    "fmix",
    "gridmix",
    "groups",
    "identity",
    "manifold_mixup",
    "mixup",
    "of_operations",
    "of_pipelines",
    "of_views",
    "on",
    "parse",
    "per_example",
    "randaugment",
    "random_erasing",
    "random_field",
    "record",
    "register",
    "register_operation",
    "resized_crop",
    "resizemix",
    "sample_keys",
    "shift",
    "smoothmix",
    "smote",
    "soft_crop",
    "swapped_classes",
    "tabular_cutmix",
    "trivialaugment",
    "view",
    "views",
    "wrong_captions",
]
