"""Upstream augmentation on the device: pure (key, Batch) -> Batch, run inside the step."""

from saflex_jax.augment.base import Augment, chain, upstream
from saflex_jax.augment.image import affine, shift
from saflex_jax.augment.mixing import mixup
from saflex_jax.augment.tabular import feature_noise

__all__ = ["Augment", "affine", "chain", "feature_noise", "mixup", "shift", "upstream"]
