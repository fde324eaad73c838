"""Bundled Flax Linen networks and the adapters that turn any network into a `types.Model`."""

from saflex_jax.models.adapters import from_function, from_linen, from_nnx
from saflex_jax.models.classifier import Classifier, Heads, mix_hidden
from saflex_jax.models.clip import (
    CLIP,
    CLIPS,
    ImageTower,
    TextTower,
    check_images,
    check_tokens,
    clip_inputs,
    make_clip,
    unit,
)
from saflex_jax.models.clip_config import clip_of
from saflex_jax.models.clip_text import Tokenizer, read_tokenizer, word_vocabulary
from saflex_jax.models.clip_weights import from_clip, load_clip, to_clip
from saflex_jax.models.ft_transformer import FTTransformer
from saflex_jax.models.mix_block import (
    AdversarialMixBlock,
    AdversarialMixBlockOptions,
    MixBlock,
    MixBlockOptions,
)
from saflex_jax.models.mlp import MLP
from saflex_jax.models.pretrained import (
    TUNED,
    from_torchvision,
    imagenet_inputs,
    only,
    tuned,
    with_weights,
)
from saflex_jax.models.resnet import ResNet, ResNet18, ResNet50
from saflex_jax.models.sentence_encoder import load_sentence_encoder
from saflex_jax.models.small_cnn import SmallCNN
from saflex_jax.models.tensor_files import read_weights, write_weights
from saflex_jax.models.two_towers import TwoTowers, pretrained_towers
from saflex_jax.models.vit import ViT

__all__ = [
    "CLIP",
    "CLIPS",
    "MLP",
    "TUNED",
    "AdversarialMixBlock",
    "AdversarialMixBlockOptions",
    "Classifier",
    "FTTransformer",
    "Heads",
    "ImageTower",
    "MixBlock",
    "MixBlockOptions",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "SmallCNN",
    "TextTower",
    "Tokenizer",
    "TwoTowers",
    "ViT",
    "check_images",
    "check_tokens",
    "clip_inputs",
    "clip_of",
    "from_clip",
    "from_function",
    "from_linen",
    "from_nnx",
    "from_torchvision",
    "imagenet_inputs",
    "load_clip",
    "load_sentence_encoder",
    "make_clip",
    "mix_hidden",
    "only",
    "pretrained_towers",
    "read_tokenizer",
    "read_weights",
    "to_clip",
    "tuned",
    "unit",
    "with_weights",
    "word_vocabulary",
    "write_weights",
]
